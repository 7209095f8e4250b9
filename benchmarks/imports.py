"""Imports of images against the tools that do the same in steps, and against the disk."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from banger.events import NullSink
from banger.host.commands import HostCommands
from banger.images.ext4 import build_ext4
from banger.images.importing import ImportRequest, import_image
from banger.images.layers import Limits
from banger.images.reference import parse_source
from banger.images.registry import RegistrySettings, open_registry
from benchmarks.table import Row, at_most, faster, in_turns, timed, within
from tests.support import registries
from tests.support.artifacts import cache_root, need_image
from tests.support.sandbox import Sandbox

_MEMORY_LIMIT = 200 << 20
_TAG = "t"
_ROUNDS = 3


def import_rows(user: Sandbox, work: Path) -> Iterator[Row]:
    """Every row about imports; `work` is a directory with 8 GB to spare.

    Ours is the whole command line with the daemon up, as the peer is three whole programs.
    """
    layout = _layout()
    files, size = _content(layout)
    subject = f"import of {size / 1e6:.0f} MB in {files} files"

    source = f"oci:{layout}:{_TAG}"

    def ours() -> None:
        user.ok("image", "pull", "-q", "--name", "bench-import", source)

    def peer() -> None:
        (work / "peer").mkdir()
        _run("skopeo", "copy", "-q", f"oci:{layout}:{_TAG}", f"oci:{work}/peer/lay:{_TAG}")
        _run("umoci", "unpack", "--image", f"{work}/peer/lay:{_TAG}", str(work / "peer" / "b"))
        image = work / "peer" / "x.ext4"
        _run(
            "mkfs.ext4", "-q", "-d", f"{work}/peer/b/rootfs", str(image), f"{size // 2**20 + 512}m"
        )
        _run("sync", "-d", str(image))

    def clean() -> None:
        user.run("image", "delete", "bench-import")
        shutil.rmtree(work / "peer", ignore_errors=True)

    ours()  # both find the layers in the page cache
    import_s, peer_s = in_turns(ours, peer, _ROUNDS, clean=clean)
    steps = "skopeo copy + umoci unpack + mkfs.ext4 -d"
    yield faster(subject, import_s, steps, peer_s, 3)
    clean()
    peak = _in_a_process(source, work)
    yield within(
        "its memory at the peak: the largest process, and the one that asked",
        peak["own"] + peak["children"],
        f"{(peak['own'] + peak['children']) >> 20} MiB",
        _MEMORY_LIMIT,
        "<= 200 MiB",
    )
    tar = work / "plain.tar"
    _flatten(layout, tar)
    disk_s = min(timed(lambda: _write_through(tar, work / "copy")) for _ in range(_ROUNDS))
    (work / "copy").unlink()
    yield _plain_row(
        f"{subject}, against the disk", import_s, "its bytes written and synced", disk_s
    )
    merge_s = min(timed(lambda: _flatten(layout, Path("/dev/null"))) for _ in range(_ROUNDS))
    gunzip_s = min(timed(lambda: _gunzip(layout)) for _ in range(_ROUNDS))
    yield _plain_row(
        f"the merge alone: two readings, one tar ({size / 1e6 / merge_s:.0f} MB/s)",
        merge_s, "gzip -dc of the layers, once", gunzip_s,
    )  # fmt: skip
    yield from _registry_rows(layout, work)
    yield _strategy_row(tar, work, size)
    tar.unlink()


def _registry_rows(layout: Path, work: Path) -> Iterator[Row]:
    with registries.real_registry(work / "registry", work / "registry" / "storage") as registry:
        registries.push(layout, _TAG, registry.host, "bench:1")
        source = f"{registry.host}/bench:1"

        def cold() -> None:
            shutil.rmtree(work / "cache", ignore_errors=True)
            _in_a_process(source, work)

        warm_s, cold_s = in_turns(lambda: _in_a_process(source, work), cold, 2)
        yield _plain_row("re-import, its layers in the cache", warm_s, "cold pull", cold_s)
    shutil.rmtree(work / "registry")


def _strategy_row(tar: Path, work: Path, size: int) -> Row:
    def build(strategy: str) -> Callable[[], None]:
        return lambda: asyncio.run(
            build_ext4(
                tar, work / "s.ext4", size_bytes=size + (512 << 20), label="bench",
                commands=HostCommands(), strategy=strategy, work=work,  # type: ignore[arg-type]
            )
        )  # fmt: skip

    tar_s, stage_s = in_turns(build("tar"), build("stage"), 2)
    (work / "s.ext4").unlink()
    return _plain_row("ext4 of a tar: mke2fs reads it", tar_s, "staged, then debugfs", stage_s)


def _plain_row(what: str, ours_s: float, peer: str, peer_s: float) -> Row:
    row = at_most(what, ours_s, peer, peer_s, 1)
    return Row(row.what, row.ours, row.against, row.ratio, "(none)", None)


# -- what is measured


def _in_a_process(source: str, work: Path) -> dict[str, int]:
    """Import in a process of its own; return its peaks of memory in bytes."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.imports", source, str(work)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    found: dict[str, int] = json.loads(done.stdout)
    return found


def _import(source: str, work: Path) -> None:
    from banger.images.blobcache import BlobCache
    from banger.images.credentials import Credentials

    commands = HostCommands()
    cache = BlobCache(work / "cache", 10 << 30)
    credentials = Credentials({"REGISTRY_AUTH_FILE": "/dev/null"}, work, commands)
    asyncio.run(
        import_image(
            ImportRequest(parse_source(source), "bench", force=True),  # type: ignore[arg-type]
            data_dir=work / "data",
            commands=commands,
            sink=NullSink(),
            limits=Limits(),
            open_registry=lambda ref, sink: open_registry(
                ref, settings=RegistrySettings(), credentials=credentials, cache=cache, sink=sink
            ),
        )
    )
    # Of itself not by getrusage(2): that counts the process which it was before its exec, too, and
    # so the whole of `make bench`.
    status = Path("/proc/self/status").read_text()
    own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps({"own": own << 10, "children": children << 10}))


def _flatten(layout: Path, output: Path) -> None:
    messages: list[dict[str, object]] = [{"limits": {}, "stream": None}]
    for path in _layers(layout):
        layer = {"path": str(path), "offset": 0, "size": path.stat().st_size}
        messages.append({"layer": layer, "is_top": False})
    lines = "".join(json.dumps(message) + "\n" for message in messages)
    with open(output, "wb") as file:
        subprocess.run(
            [sys.executable, "-m", "banger.images.flatten", str(file.fileno())],
            input=lines, text=True, check=True, stdout=subprocess.DEVNULL, pass_fds=(file.fileno(),),
        )  # fmt: skip


def _gunzip(layout: Path) -> None:
    for path in _layers(layout):
        with open(path, "rb") as file:
            subprocess.run(["gzip", "-dc"], stdin=file, stdout=subprocess.DEVNULL, check=True)


def _write_through(source: Path, output: Path) -> None:
    _run("dd", f"if={source}", f"of={output}", "bs=1M", "conv=fsync", "status=none")


# -- the image


def _layout() -> Path:
    """Return an OCI layout of the default image's files, made once: two layers, umoci's gzip."""
    rootfs = need_image("debian-bookworm") / "rootfs.ext4"
    layout = cache_root() / f"bench-import-{rootfs.parents[2].name}"
    if layout.exists():
        return layout
    tree, made = layout.with_suffix(".tree"), layout.with_suffix(".new")
    for path in (tree, made):
        shutil.rmtree(path, ignore_errors=True)
    tree.mkdir(parents=True)
    _run("debugfs", "-R", f"rdump / {tree}", str(rootfs))
    _run("umoci", "init", "--layout", str(made))
    _run("umoci", "new", "--image", f"{made}:{_TAG}")
    usr = tree.parent / f"{tree.name}.usr"
    (tree / "usr").rename(usr)
    _run("umoci", "insert", "--image", f"{made}:{_TAG}", str(tree), "/")
    _run("umoci", "insert", "--image", f"{made}:{_TAG}", str(usr), "/usr")
    shutil.rmtree(tree)
    shutil.rmtree(usr)
    made.rename(layout)
    return layout


def _layers(layout: Path) -> list[Path]:
    def blob(digest: str) -> Path:
        return layout / "blobs" / digest.replace(":", "/")

    index = json.loads((layout / "index.json").read_text())
    manifest = json.loads(blob(index["manifests"][0]["digest"]).read_text())
    return [blob(layer["digest"]) for layer in manifest["layers"]]


def _content(layout: Path) -> tuple[int, int]:
    files = size = 0
    for path in _layers(layout):
        with tarfile.open(path) as archive:
            for info in archive:
                files += 1
                size += info.size
    return files, size


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True, env=HostCommands().environment)


if __name__ == "__main__":
    _import(sys.argv[1], Path(sys.argv[2]))
    sys.exit(os.EX_OK)
