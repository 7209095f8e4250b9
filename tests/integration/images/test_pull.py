"""A real mmdebstrap, the smallest set of packages, and what a failed pull leaves: nothing."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from pathlib import Path

import pytest

from banger.catalog import DebianImage, catalog_images
from banger.errors import Conflict, NoSpace, Unavailable
from banger.events import NullSink
from banger.host.commands import HostCommands
from banger.images import pull
from banger.images.ext4 import check_ext4

pytestmark = pytest.mark.integration

COMMANDS = HostCommands()
FULL = catalog_images()["debian-bookworm"]
TINY = DebianImage(
    name="tiny", description="", suite="bookworm", variant="essential", packages=(),
    capacity_mib=256, files=FULL.files, mask=FULL.mask, exclude=FULL.exclude, keep=FULL.keep,
)  # fmt: skip


@pytest.fixture(autouse=True)
def tiny_catalog(monkeypatch: pytest.MonkeyPatch) -> dict[str, DebianImage]:
    entries = {"tiny": TINY}
    monkeypatch.setattr(pull, "image_entry", entries.__getitem__)
    return entries


class StageWaiter(NullSink):
    """Sets an event when a stage begins whose name holds a word."""

    def __init__(self, word: str) -> None:
        self.word, self.seen = word, asyncio.Event()

    def stage(self, stage: str) -> None:
        if self.word in stage:
            self.seen.set()


async def pull_tiny(tmp_path: Path, **options):
    return await pull.pull_image(
        "tiny",
        **{
            "data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache", "commands": COMMANDS,
            "sink": NullSink(), **options,
        },
    )  # fmt: skip


def debugfs(image: Path, request: str) -> str:
    return subprocess.run(
        ["/usr/sbin/debugfs", "-R", request, image], capture_output=True, check=True, text=True
    ).stdout


def nothing_left(tmp_path: Path) -> bool:
    return (
        list((tmp_path / "data" / "staging").iterdir()) == []
        and pull.list_images(tmp_path / "data") == []
    )


def processes_with(word: str) -> list[str]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path("/proc", pid, "cmdline").read_bytes()
        except OSError:
            continue
        if word.encode() in line:
            found.append(f"{pid}: {line!r}")
    return found


async def test_a_pulled_image_is_a_checked_file_system_of_its_packages(tmp_path: Path) -> None:
    manifest = await pull_tiny(tmp_path)
    rootfs = pull.rootfs_path(tmp_path / "data", "tiny")
    assert pull.read_image(tmp_path / "data", "tiny") == manifest
    assert "dash" in manifest.packages
    assert manifest.origin == "debian:bookworm"
    await check_ext4(rootfs, commands=COMMANDS)
    assert "PermitRootLogin yes" in debugfs(rootfs, "cat /etc/ssh/sshd_config.d/banger.conf")
    assert debugfs(rootfs, "cat /etc/machine-id") == ""
    assert "Size: 0" in debugfs(rootfs, "stat /etc/machine-id")
    assert 'dest: "/dev/null"' in debugfs(
        rootfs, "stat /etc/systemd/system/systemd-firstboot.service"
    )
    assert "Mode:  04755" in debugfs(rootfs, "stat /usr/bin/su")
    assert "locale.alias" not in debugfs(rootfs, "ls /usr/share/man")
    assert os.uname().nodename not in debugfs(rootfs, "cat /etc/hostname")
    assert list((tmp_path / "data" / "staging").iterdir()) == []
    cached = {file.name.split("_")[0] for file in (tmp_path / "cache/debs/tiny").iterdir()}
    assert "dash" in cached
    with pytest.raises(Conflict):
        await pull_tiny(tmp_path)


async def test_an_archive_that_does_not_answer_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        await pull_tiny(tmp_path, mirror="http://127.0.0.1:9/debian")
    assert "debian_mirror" in caught.value.hint
    assert nothing_left(tmp_path)


async def test_a_cancelled_pull_leaves_nothing_and_nobody(tmp_path: Path) -> None:
    sink = StageWaiter("installing the base")
    task = asyncio.create_task(pull_tiny(tmp_path, sink=sink))
    seen = asyncio.create_task(sink.seen.wait())
    await asyncio.wait({task, seen}, timeout=120, return_when=asyncio.FIRST_COMPLETED)
    assert seen.done()
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began < 15
    assert nothing_left(tmp_path)
    assert processes_with(str(tmp_path)) == []


async def test_an_image_that_does_not_fit_stops_the_build(
    tmp_path: Path, tiny_catalog: dict[str, DebianImage]
) -> None:
    small = {name: getattr(TINY, name) for name in TINY.__struct_fields__} | {"capacity_mib": 8}
    tiny_catalog["tiny"] = DebianImage(**small)
    with pytest.raises(NoSpace):
        await pull_tiny(tmp_path)
    assert nothing_left(tmp_path)
    assert processes_with(str(tmp_path)) == []
