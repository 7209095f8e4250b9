"""Bundles of real file systems: out, in again, over HTTP, and what of the way may go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.server
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.errors import (
    BangerError,
    Conflict,
    Corrupted,
    InvalidInput,
    NoSpace,
    NotFound,
    Unavailable,
)
from banger.events import NullSink
from banger.host.commands import HostCommands
from banger.host.files import allocated_bytes
from banger.images import artifacts, bundle
from banger.images.artifacts import ImageManifest
from banger.images.bundle import BundleRef, export_bundle, import_bundle
from banger.images.register import register_image

pytestmark = pytest.mark.integration

COMMANDS = HostCommands()


class Stages(NullSink):
    """Remembers stages, and lets a test wait for one."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.bytes: list[tuple[int, int]] = []
        self.moved = asyncio.Event()

    def stage(self, stage: str) -> None:
        self.seen.append(stage)

    def progress(self, done_bytes: int, total_bytes: int = 0) -> None:
        self.bytes.append((done_bytes, total_bytes))
        self.moved.set()


def make_rootfs(directory: Path, size: str = "64M", content: int = 3_000_000) -> Path:
    """Make a small ext4 with some noise in it."""
    tree = directory / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/hostname").write_text("base\n")
    (tree / "noise").write_bytes(os.urandom(content))
    rootfs = directory / "source.ext4"
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(tree), str(rootfs), size],
        check=True,
    )
    return rootfs


async def install(data: Path, rootfs: Path, name: str = "base") -> ImageManifest:
    return await register_image(
        name, rootfs, data_dir=data, commands=COMMANDS, sink=NullSink(), kernel="generic-6.12",
        description="A base",
    )  # fmt: skip


async def export(data: Path, output: Path, name: str = "base", **options: bool) -> bundle.Exported:
    return await export_bundle(
        name, output, data_dir=data, commands=COMMANDS, sink=NullSink(), **options
    )


async def pull(data: Path, location: Path | str, sha256: str | None = None, **options):
    options.setdefault("sink", NullSink())
    return await import_bundle(
        BundleRef(str(location), sha256), options.pop("name", "copy"), data_dir=data,
        commands=COMMANDS, **options,
    )  # fmt: skip


def left(data: Path) -> list[str]:
    """Return what is in the store and in staging."""
    found = artifacts.names(data, "image")
    staging = data / "staging"
    return found + (sorted(p.name for p in staging.iterdir()) if staging.exists() else [])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the image `base`, and base.tar.zst beside it."""
    place = tmp_path_factory.mktemp("made")

    async def make() -> None:
        await install(place / "data", make_rootfs(place))
        await export(place / "data", place / "base.tar.zst")

    asyncio.run(make())
    return place


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


# -- there and back


async def test_an_exported_image_comes_back_equal(made: Path, data: Path) -> None:
    before = artifacts.read(made / "data", "image", "base", ImageManifest)
    sink = Stages()
    after = await pull(data, made / "base.tar.zst", sink=sink)
    assert artifacts.read(data, "image", "copy", ImageManifest) == after
    assert after.digest == before.digest == artifacts.sha256_of(data / "images/copy/rootfs.ext4")
    assert after.size_bytes == before.size_bytes
    assert after.allocated_bytes <= before.allocated_bytes
    assert (after.kernel, after.description) == ("generic-6.12", "A base")
    assert after.created_at == before.created_at
    assert after.origin == f"bundle:{made}/base.tar.zst"
    file = (made / "base.tar.zst").read_bytes()
    assert after.source_digest == f"sha256:{hashlib.sha256(file).hexdigest()}"
    assert left(data) == ["copy"]
    assert sink.bytes[-1][0] == sink.bytes[-1][1] > 3_000_000
    assert oct((data / "images/copy/rootfs.ext4").stat().st_mode)[-3:] == "444"


async def test_equal_images_give_equal_files(made: Path, data: Path, tmp_path: Path) -> None:
    """Also one that came by another way and lies elsewhere, when it says the same of itself."""
    first = await export(made / "data", tmp_path / "one.tar.zst")
    time.sleep(1.1)
    second = await export(made / "data", tmp_path / "two.tar.zst")
    assert first.sha256 == second.sha256
    assert (tmp_path / "one.tar.zst").read_bytes() == (tmp_path / "two.tar.zst").read_bytes()
    found = subprocess.run(["sha256sum", tmp_path / "one.tar.zst"], capture_output=True, check=True)
    assert found.stdout.split()[0].decode() == first.sha256
    assert (tmp_path / "one.tar.zst").stat().st_size == first.size_bytes
    # The directory they were made in is nobody's business.
    plain = subprocess.run(
        ["zstd", "-dc", tmp_path / "one.tar.zst"], capture_output=True, check=True
    )
    assert str(made).encode() not in plain.stdout
    assert str(tmp_path).encode() not in plain.stdout


async def test_tar_alone_unpacks_it_with_its_holes(made: Path, tmp_path: Path) -> None:
    subprocess.run(["tar", "--zstd", "-xf", made / "base.tar.zst"], check=True, cwd=tmp_path)
    subprocess.run(["e2fsck", "-fn", tmp_path / "rootfs.ext4"], check=True, capture_output=True)
    before = artifacts.read(made / "data", "image", "base", ImageManifest)
    assert artifacts.sha256_of(tmp_path / "rootfs.ext4") == before.digest
    assert allocated_bytes(tmp_path / "rootfs.ext4") < before.allocated_bytes + (1 << 20)


async def test_an_image_is_replaced_by_force_only(made: Path, data: Path) -> None:
    await pull(data, made / "base.tar.zst")
    with pytest.raises(Conflict, match="installed already"):
        await pull(data, made / "base.tar.zst")
    await pull(data, made / "base.tar.zst", force=True, kernel="generic-6.1", description="Mine")
    found = artifacts.read(data, "image", "copy", ImageManifest)
    assert (found.kernel, found.description) == ("generic-6.1", "Mine")
    assert left(data) == ["copy"]


async def test_a_file_is_replaced_by_force_only(made: Path, tmp_path: Path) -> None:
    output = tmp_path / "base.tar.zst"
    output.write_bytes(b"precious")
    with pytest.raises(Conflict, match="exists"):
        await export(made / "data", output)
    assert output.read_bytes() == b"precious"
    done = await export(made / "data", output, force=True)
    assert output.stat().st_size == done.size_bytes
    assert os.listdir(tmp_path) == ["base.tar.zst"]


async def test_export_names_what_it_cannot(made: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await export(made / "data", tmp_path / "x", name="absent")
    for output in (Path("x.tar.zst"), tmp_path, tmp_path / "no/such/x"):
        with pytest.raises(InvalidInput):
            await export(made / "data", output)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInput, match="not a regular file"):
        await export(made / "data", tmp_path / "pipe", force=True)
    assert os.listdir(tmp_path) == ["pipe"]


async def test_a_damaged_image_is_not_exported(data: Path, tmp_path: Path) -> None:
    await install(data, make_rootfs(tmp_path))
    rootfs = data / "images/base/rootfs.ext4"
    rootfs.chmod(0o644)
    with open(rootfs, "r+b") as file:
        file.seek(1 << 20)
        file.write(b"damage")
    with pytest.raises(Corrupted, match="changed after it was installed"):
        await export(data, tmp_path / "out.tar.zst")
    assert not list(tmp_path.glob("*out.tar.zst*"))


# -- what is not installed


async def test_truncation_at_many_places_installs_nothing(
    made: Path, data: Path, tmp_path: Path
) -> None:
    whole = (made / "base.tar.zst").read_bytes()
    cut = tmp_path / "cut.tar.zst"
    for size in (0, 1, 100, 5000, len(whole) // 2, len(whole) - 4, len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(Corrupted, match="cut off|empty"):
            await pull(data, cut)
        assert left(data) == []


async def test_altered_bytes_install_nothing(made: Path, data: Path, tmp_path: Path) -> None:
    whole = (made / "base.tar.zst").read_bytes()
    altered = tmp_path / "altered.tar.zst"
    pin = hashlib.sha256(whole).hexdigest()
    for at in (0, 5, 200, len(whole) // 3, len(whole) - 1, len(whole)):
        copy = bytearray(whole + b"\0")
        copy[at] ^= 1
        altered.write_bytes(copy[: max(at + 1, len(whole))])
        with pytest.raises(Corrupted):
            # Byte 5 is how much memory the decoder may take: without a pin it makes no difference.
            await pull(data, altered, pin if at == 5 else None)
        assert left(data) == []


async def test_another_bundle_than_the_pinned_is_not_installed(made: Path, data: Path) -> None:
    with pytest.raises(Corrupted, match="another bundle than the pinned one"):
        await pull(data, made / "base.tar.zst", "0" * 64)
    assert left(data) == []
    right = hashlib.sha256((made / "base.tar.zst").read_bytes()).hexdigest()
    await pull(data, made / "base.tar.zst", right)


async def test_a_file_system_that_is_not_clean_is_not_installed(data: Path, tmp_path: Path) -> None:
    """A right bundle of a wrong file system: the digests agree, e2fsck does not."""
    await install(data, make_rootfs(tmp_path), "bad")
    rootfs = data / "images/bad/rootfs.ext4"
    rootfs.chmod(0o644)
    subprocess.run(
        ["debugfs", "-w", "-R", "set_inode_field /noise block[0] 7", rootfs],
        check=True, capture_output=True,
    )  # fmt: skip
    subprocess.run(
        ["debugfs", "-w", "-R", "clri /etc/hostname", rootfs], check=True, capture_output=True
    )
    manifest = data / "images/bad/manifest.json"
    old = artifacts.read(data, "image", "bad", ImageManifest).digest
    manifest.write_text(manifest.read_text().replace(old, artifacts.sha256_of(rootfs)))
    await export(data, tmp_path / "bad.tar.zst", "bad")
    with pytest.raises(Corrupted, match="does not pass e2fsck"):
        await pull(tmp_path / "other", tmp_path / "bad.tar.zst")
    assert left(tmp_path / "other") == []


@pytest.mark.parametrize("kind", ["absent", "directory", "fifo", "tar", "ext4"])
async def test_what_is_no_bundle(kind: str, made: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "thing"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "tar":
        subprocess.run(["tar", "--zstd", "-cf", path, "-C", made, "tree"], check=True)
    elif kind == "ext4":
        path = made / "source.ext4"
    with pytest.raises(BangerError) as caught:
        await pull(data, path)
    assert "\n" not in caught.value.message
    assert left(data) == []


async def test_cancelling_leaves_nothing(made: Path, data: Path, tmp_path: Path) -> None:
    await install(data, make_rootfs(tmp_path, "512M", 200_000_000))
    for step in ("export", "import"):
        sink = Stages()
        target = tmp_path / "big.tar.zst"
        task = asyncio.create_task(
            export_bundle("base", target, data_dir=data, commands=COMMANDS, sink=sink)
            if step == "export"
            else pull(data, target, sink=sink)
        )
        async with asyncio.timeout(60):
            await sink.moved.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert left(data) == ["base"]
        if step == "export":
            assert not list(tmp_path.glob("*big*"))
            await export(data, target)


async def test_a_killed_worker_is_an_error(data: Path, tmp_path: Path) -> None:
    await install(data, make_rootfs(tmp_path, "512M", 100_000_000))
    sink = Stages()
    task = asyncio.create_task(
        export_bundle("base", tmp_path / "x.tar.zst", data_dir=data, commands=COMMANDS, sink=sink)
    )
    async with asyncio.timeout(60):
        await sink.moved.wait()
    found = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "images.bundle_worker"],
        capture_output=True, check=True,
    )  # fmt: skip
    for pid in found.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    with pytest.raises(Corrupted, match="ended early"):
        await task
    assert not list(tmp_path.glob("*.tar.zst*"))


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a small tmpfs")
async def test_a_full_disk_is_named_and_leaves_nothing(made: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", small], check=True)
    try:
        with pytest.raises(NoSpace) as caught:
            await pull(small / "data", made / "base.tar.zst")
        assert "MiB free" in caught.value.message
        with pytest.raises(NoSpace):
            await export(made / "data", small / "base.tar.zst")
        assert left(small / "data") == []
        assert not list(small.glob("*.zst*"))
    finally:
        subprocess.run(["umount", small], check=True)


# -- over HTTP


class Server:
    """Serves one body the way a test wants it."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.mode = "plain"
        self.target = ""
        self.seen: list[str] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.seen.append(self.path)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self._answer()

            def _answer(self) -> None:
                body, mode = server.body, server.mode
                length = len(body)
                if mode == "status":
                    self.send_error(503)
                    return
                if mode == "redirect" and self.path != "/moved":
                    self.send_response(302)
                    self.send_header("Location", server.target or "/moved")
                    self.end_headers()
                    return
                if mode == "long":
                    length += 10
                elif mode == "short":
                    length -= 10
                self.send_response(200)
                if mode != "unsaid":
                    self.send_header("Content-Length", str(length))
                self.end_headers()
                half = len(body) // 2 if mode in ("stops", "hangs") else len(body)
                self.wfile.write(body[:half])
                self.wfile.flush()
                if mode == "hangs":
                    server.hanging.wait(60)
                elif mode == "stops":
                    self.connection.shutdown(socket.SHUT_RDWR)

            def log_message(self, *_: object) -> None:
                return

        self.hanging = threading.Event()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/base.tar.zst"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.hanging.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server(made: Path) -> Iterator[Server]:
    running = Server((made / "base.tar.zst").read_bytes())
    yield running
    running.close()


def pin_of(server: Server) -> str:
    return hashlib.sha256(server.body).hexdigest()


@pytest.mark.parametrize("mode", ["plain", "unsaid", "redirect"])
async def test_a_bundle_comes_over_http(mode: str, server: Server, data: Path) -> None:
    server.mode = mode
    found = await pull(data, f"{server.url}?token=secret", pin_of(server))
    assert found.origin == f"bundle:{server.url}?..."
    assert left(data) == ["copy"]


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("stops", "base.tar.zst: |cut off"),
        ("long", "base.tar.zst: |cut off"),
        ("short", "cut off"),
        ("status", "HTTP 503"),
    ],
)
async def test_a_server_that_fails_installs_nothing(
    mode: str, words: str, server: Server, data: Path
) -> None:
    server.mode = mode
    with pytest.raises((Unavailable, Corrupted), match=words) as caught:
        await pull(data, server.url, pin_of(server))
    assert "\n" not in caught.value.message
    assert left(data) == []


async def test_http_needs_a_pin(server: Server, data: Path) -> None:
    with pytest.raises(InvalidInput, match="http tells nobody") as caught:
        await pull(data, server.url)
    assert "sha256" in caught.value.hint
    assert server.seen == []
    assert left(data) == []


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://[bad/"])
async def test_a_redirect_leads_to_no_other_kind_of_place(
    target: str, server: Server, data: Path
) -> None:
    server.mode, server.target = "redirect", target
    with pytest.raises((Unavailable, InvalidInput)):
        await pull(data, server.url, pin_of(server))
    assert left(data) == []


async def test_cancelling_a_server_that_hangs_leaves_nothing(server: Server, data: Path) -> None:
    server.mode = "hangs"
    sink = Stages()
    task = asyncio.create_task(pull(data, server.url, pin_of(server), sink=sink))
    async with asyncio.timeout(60):
        while not server.seen:
            await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left(data) == []
