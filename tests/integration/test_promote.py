"""A stopped VM becomes an image, over the fake VMM: the agent's tar, the import, crashes between."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from banger.errors import Conflict, InvalidInput, NotFound, Unavailable
from banger.events import NullSink
from banger.host.process import find_by_argument
from banger.images import pull as store
from banger.images.artifacts import ImageManifest, install, sweep_staging
from banger.images.blobcache import BlobCache
from banger.images.layers import Limits
from banger.services import promote
from banger.services.images import ImportParts
from banger.services.promote import Promoter
from banger.services.reconcile import reconcile
from tests.support.ext4_listing import list_image
from tests.support.parts import Parts

pytestmark = pytest.mark.integration

SINK = NullSink()
BASE = ImageManifest(
    name="tiny",
    digest="sha256:0",
    size_bytes=1,
    allocated_bytes=1,
    origin="test",
    description="",
    created_at="2026-01-01T00:00:00Z",
    files={"rootfs.ext4": 1},
    default_user="someone",
    default_env={"A": "b"},
    entrypoint=("/entry",),
    command=("word",),
    working_dir="/work",
    kernel="tiny",
    platform="linux/amd64",
)


@pytest.fixture
async def root() -> AsyncIterator[Path]:
    """A short directory; what is left of its VMMs is ended."""
    with tempfile.TemporaryDirectory(prefix="bng-") as name:
        yield Path(name)
        for process in find_by_argument(name):
            process.kill()
            await process.wait()


@pytest.fixture
async def parts(root: Path) -> AsyncIterator[Parts]:
    """A daemon's parts, with a stopped VM `box` of the image `tiny`."""
    made = await Parts(root).open()
    staged = made.layout.data / "staging" / "tiny"
    staged.mkdir(parents=True)
    (staged / "rootfs.ext4").write_bytes(b"x")
    install(staged, made.layout.data, "image", BASE, force=False)
    await made.vms.create({"name": "box"}, SINK)
    yield made
    await made.close()


@pytest.fixture
def guest(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the agent, which runs on this very host, takes for the VM's root."""
    tree = root / "guest"
    tree.mkdir()
    monkeypatch.setattr(promote, "EXPORT_ROOT", os.fsencode(tree))
    return tree


def _promoter(parts: Parts, **limits: int) -> Promoter:
    data_dir = parts.layout.data
    blobs = BlobCache(parts.layout.cache / "blobs", 1 << 20)
    inside = ImportParts(data_dir, parts.commands, Limits(**limits), _no_registry, blobs)
    return Promoter(parts.vms, parts.images, parts.kernels, inside)


def _no_registry(*_: Any) -> Any:
    raise AssertionError("nothing here is in a registry")


async def _promote(parts: Parts, **request: Any) -> None:
    # The stub of the store knows nothing of what is installed beside it.
    parts.image_source._installed.append("mine")
    await _promoter(parts).promote("box", {"name": "mine", **request}, SINK)


def _nothing_left(parts: Parts) -> bool:
    staging = list((parts.layout.data / "staging").iterdir())
    mine = parts.layout.data / "images" / "mine"
    processes = find_by_argument(f"{parts.layout.runtime_vms}/")
    return not (staging or mine.exists() or processes or list(parts.layout.runtime_vms.iterdir()))


async def test_the_image_has_the_files_and_the_words_of_the_base(parts: Parts, guest: Path) -> None:
    (guest / "bin").mkdir(mode=0o755)
    (guest / "bin" / "tool").write_bytes(b"program")
    os.link(guest / "bin" / "tool", guest / "bin" / "same")
    os.setxattr(guest / "bin" / "tool", "user.note", b"a\0b")
    os.chown(guest / "bin" / "tool", 7, 70_000)
    os.symlink("/bin/tool", guest / os.fsdecode(b"l\xff"))
    (guest / ("n" * 255)).write_text("long")
    subprocess.run(["setcap", "cap_net_raw+ep", guest / "bin" / "tool"], check=True)
    os.mknod(guest / "null", 0o20666, os.makedev(1, 3))
    os.mkfifo(guest / "pipe")
    before = await parts.rows.find("box")
    await _promote(parts)
    assert await parts.rows.find("box") == before
    made = store.read_image(parts.layout.data, "mine")
    said = ("default_user", "default_env", "entrypoint", "command", "working_dir", "kernel")
    assert [getattr(made, name) for name in said] == [getattr(BASE, name) for name in said]
    assert (made.platform, made.origin) == ("linux/amd64", "vm:box on tiny")
    rootfs = parts.layout.data / "images" / "mine" / "rootfs.ext4"
    subprocess.run(["/usr/sbin/e2fsck", "-fn", rootfs], check=True, capture_output=True)
    found = list_image(rootfs)
    tool = found[b"/bin/tool"]
    assert (tool["names"], tool["data"], tool["gid"]) == (
        {b"/bin/tool", b"/bin/same"},
        b"program",
        70_000,
    )
    assert tool["capability"]
    assert found[b"/l\xff"]["target"] == "/bin/tool"
    assert found[b"/null"]["device"] == "01:03"
    assert {b"/pipe", b"/" + b"n" * 255} <= set(found)
    shown = subprocess.run(
        ["/usr/sbin/debugfs", "-R", "ea_get -x /bin/tool user.note", rootfs],
        capture_output=True,
        check=True,
    )
    assert b"61 00 62" in shown.stdout
    assert not list((parts.layout.data / "staging").iterdir())


@pytest.mark.parametrize(
    ("vm", "request_", "kind", "says"),
    [
        ("box", {"name": "UPPER"}, InvalidInput, "not a name"),
        ("box", {"name": "tiny"}, Conflict, "installed already"),
        ("box", {"name": "tiny", "force": True}, Conflict, "used by box"),
        ("box", {"name": "debian-bookworm"}, Conflict, "of the catalog"),
        ("box", {"name": "mine", "kernel": "nothing"}, NotFound, "nothing"),
        ("bux", {"name": "mine"}, NotFound, "bux"),
    ],
)
async def test_what_cannot_be_is_refused_before_anything_starts(
    parts: Parts, vm: str, request_: Any, kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        await _promoter(parts).promote(vm, request_, SINK)
    assert _nothing_left(parts)


async def test_a_running_machine_is_refused_with_the_way_to_stop_it(parts: Parts) -> None:
    await parts.vms.start("box", SINK)
    with pytest.raises(Conflict, match="box is running") as caught:
        await _promote(parts)
    assert caught.value.hint == "stop it first: `banger vm stop box`"


async def test_a_machine_that_is_too_large_leaves_nothing(parts: Parts, guest: Path) -> None:
    with open(guest / "hole", "wb") as file:
        file.truncate(8 << 20)
    with pytest.raises(InvalidInput, match="more than 1048576 bytes"):
        await _promoter(parts, max_bytes=1 << 20).promote("box", {"name": "mine"}, SINK)
    assert _nothing_left(parts)
    assert (await parts.vms.get("box"))["state"] == "stopped"


class _Told(NullSink):
    def __init__(self) -> None:
        self.reading = asyncio.Event()

    def stage(self, stage: str) -> None:
        if "reading the machine" in stage:
            self.reading.set()


async def _reading(parts: Parts, guest: Path) -> asyncio.Task[Any]:
    """Begin a promotion that has much to read, and return when it reads."""
    with open(guest / "hole", "wb") as file:
        file.truncate(200 << 30)
    sink = _Told()
    promoter = _promoter(parts, max_bytes=1 << 50)
    task = asyncio.create_task(promoter.promote("box", {"name": "mine"}, sink))
    await asyncio.wait(
        [task, asyncio.create_task(sink.reading.wait())], return_when=asyncio.FIRST_COMPLETED
    )
    return task


async def test_cancelling_leaves_nothing_and_the_machine_as_it_was(
    parts: Parts, guest: Path
) -> None:
    before = await parts.rows.find("box")
    task = await _reading(parts, guest)
    assert (await parts.vms.get("box"))["state"] == "stopping"
    with pytest.raises(Conflict, match="is stopping"):
        await parts.vms.connection("box")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert _nothing_left(parts)
    assert await parts.rows.find("box") == before


async def test_killing_the_machine_ends_the_promotion(parts: Parts, guest: Path) -> None:
    task = await _reading(parts, guest)
    await parts.vms.kill("box")
    with pytest.raises(Unavailable):
        await task
    assert _nothing_left(parts)


async def test_a_daemon_that_was_killed_meanwhile_finds_the_machine_and_stops_it(
    parts: Parts, guest: Path
) -> None:
    task = await _reading(parts, guest)
    row = await parts.rows.find("box")
    later = await Parts(parts.layout.data.parent).open()
    await reconcile(later.rows, later.vms, later.networks, later.layout)
    async with asyncio.timeout(20):
        while (await later.vms.get("box"))["state"] != "stopped":
            await asyncio.sleep(0.02)
    assert row.process is not None
    assert not row.process.alive()
    await asyncio.wait([task])
    task.exception()
    await later.close()
    sweep_staging(parts.layout.data)
    assert _nothing_left(parts)
    assert json.loads((parts.layout.data / "images" / "tiny" / "manifest.json").read_text())
