"""A root file system of somebody else's becomes an image, or one line says why not."""

from __future__ import annotations

import asyncio
import os
import re
import struct
import subprocess
from pathlib import Path

import pytest

from banger.errors import Conflict, Corrupted, InvalidInput
from banger.events import NullSink
from banger.host.commands import HostCommands
from banger.images import artifacts, pull
from banger.images.artifacts import ImageManifest
from banger.images.bundle import export_bundle
from banger.images.register import check_superblock, register_image

pytestmark = pytest.mark.integration

COMMANDS = HostCommands()


class Warnings(NullSink):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def warning(self, message: str) -> None:
        self.seen.append(message)


def make(path: Path, *options: str, size: str = "16M") -> Path:
    tree = path.parent / "tree"
    (tree / "etc").mkdir(parents=True, exist_ok=True)
    (tree / "etc/hostname").write_text("base\n")
    subprocess.run(
        ["mke2fs", "-q", "-F", *(options or ("-t", "ext4")), "-d", str(tree), str(path), size],
        check=True,
    )
    return path


def debugfs(path: Path, *commands: str) -> None:
    for command in commands:
        done = subprocess.run(
            ["debugfs", "-w", "-R", command, path], capture_output=True, check=True
        )
        lines = done.stderr.decode().splitlines()[1:]
        assert lines == [], lines


async def register(data: Path, rootfs: Path, name: str = "base", **options) -> ImageManifest:
    options.setdefault("sink", NullSink())
    return await register_image(name, rootfs, data_dir=data, commands=COMMANDS, **options)


def left(data: Path) -> list[str]:
    staging = data / "staging"
    found = sorted(path.name for path in staging.iterdir()) if staging.exists() else []
    return artifacts.names(data, "image") + found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    return make(tmp_path / "rootfs.ext4")


@pytest.mark.parametrize(
    "options",
    [
        ("-t", "ext4"),
        ("-t", "ext4", "-O", "^has_journal"),
        ("-t", "ext4", "-O", "^64bit,^metadata_csum,inline_data,ea_inode,large_dir", "-I", "256"),
        ("-t", "ext4", "-b", "1024"),
        ("-t", "ext3"),
        ("-t", "ext2"),
    ],
)
async def test_a_clean_one_is_copied(options: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    rootfs = make(tmp_path / "rootfs.ext4", *options)
    before = rootfs.read_bytes()
    found = await register(data, rootfs, kernel="generic-6.12", description="Mine")
    assert artifacts.read(data, "image", "base", ImageManifest) == found
    assert pull.rootfs_path(data, "base").read_bytes() == before == rootfs.read_bytes()
    assert (found.kernel, found.description) == ("generic-6.12", "Mine")
    assert found.origin == f"file:{rootfs}"
    assert found.digest == artifacts.sha256_of(rootfs)
    assert found.allocated_bytes < 8 << 20  # sparse
    rootfs.unlink()
    assert artifacts.read(data, "image", "base", ImageManifest) == found


async def test_a_name_is_taken_by_force_only(data: Path, rootfs: Path) -> None:
    await register(data, rootfs)
    with pytest.raises(Conflict, match="installed already"):
        await register(data, rootfs)
    await register(data, rootfs, force=True, link=True)
    assert left(data) == ["base"]
    with pytest.raises(InvalidInput, match="not a name"):
        await register(data, rootfs, "../up")


# -- links


async def test_a_linked_one_stays_where_it_is(data: Path, rootfs: Path, tmp_path: Path) -> None:
    link = tmp_path / "by-another-name"
    link.symlink_to(rootfs)
    before = os.stat(rootfs)
    found = await register(data, link, link=True)
    assert os.listdir(data / "images/base") == ["manifest.json"]
    assert pull.rootfs_path(data, "base") == rootfs
    assert found.origin == f"linked:{rootfs}"
    assert (found.allocated_bytes, found.size_bytes) == (0, 16 << 20)
    after = os.stat(rootfs)
    for field in ("st_mode", "st_uid", "st_mtime_ns", "st_ctime_ns", "st_nlink", "st_size"):
        assert getattr(after, field) == getattr(before, field)
    # Export and delete treat it like any other.
    await export_bundle(
        "base", tmp_path / "b.tar.zst", data_dir=data, commands=COMMANDS, sink=NullSink()
    )
    pull.delete_image(data, "base")
    assert rootfs.exists()
    assert left(data) == []


@pytest.mark.parametrize("change", ["content", "size", "another", "gone", "unreachable"])
async def test_a_linked_one_that_changed_is_corrupted(
    change: str, data: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    rootfs = make(place / "rootfs.ext4")
    await register(data, rootfs, link=True)
    if change == "content":
        with open(rootfs, "r+b") as file:
            file.seek(8192)
            file.write(b"x")
    elif change == "size":
        stamp = os.stat(rootfs)
        os.truncate(rootfs, 32 << 20)
        os.utime(rootfs, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    elif change == "another":
        stamp = os.stat(rootfs)
        make(tmp_path / "other.ext4").replace(rootfs)
        os.utime(rootfs, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    elif change == "gone":
        rootfs.unlink()
    else:
        place.rename(tmp_path / "elsewhere")
    with pytest.raises(Corrupted, match=re.escape(str(rootfs))) as caught:
        pull.rootfs_path(data, "base")
    assert "--link --name base" in caught.value.hint
    assert "banger image delete base" in caught.value.hint
    pull.delete_image(data, "base")


async def test_a_private_linked_file_is_warned_of(data: Path, rootfs: Path) -> None:
    rootfs.chmod(0o600)
    sink = Warnings()
    await register(data, rootfs, link=True, sink=sink)
    assert "jailer" in sink.seen[0]


# -- what is refused


def ends(text: bytes, at: int = 0):
    def write(path: Path) -> None:
        with open(path, "r+b") as file:
            file.write(bytes(4096))
            file.seek(at)
            file.write(text)

    return write


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: debugfs(path, "feature needs_recovery"), "journal to be replayed"),
        (lambda path: debugfs(path, "set_super_value state 0"), "is not clean"),
        (lambda path: debugfs(path, "set_super_value state 3"), "is not clean"),
        (lambda path: debugfs(path, "feature encrypt"), "no guest is sure to mount: encrypt"),
        (lambda path: debugfs(path, "feature casefold"), "no guest is sure to mount: casefold"),
        (lambda path: os.truncate(path, 8 << 20), "is cut off"),
        (lambda path: os.truncate(path, 1500), "no ext4 file system"),
        (lambda path: os.truncate(path, 0), "no ext4 file system"),
        (ends(b""), "no ext4 file system$"),
        (ends(b"XFSB"), "but an XFS"),
        (ends(b"hsqs"), "but a squashfs"),
        (ends(b"QFI\xfb"), "but a qcow2"),
        (ends(b"\x1f\x8b"), "packed with gzip"),
        (ends(b"\x28\xb5\x2f\xfd"), "packed with zstd"),
        (ends(b"ustar", 257), "but a tar"),
        (ends(b"\x55\xaa", 510), "a disk with partitions"),
    ],
)
async def test_one_line_says_why_not(change, words: str, data: Path, rootfs: Path) -> None:
    change(rootfs)
    before = rootfs.read_bytes()
    with pytest.raises(InvalidInput, match=words) as caught:
        await register(data, rootfs)
    assert "\n" not in caught.value.message
    assert str(rootfs) in caught.value.message
    assert rootfs.read_bytes() == before
    assert left(data) == []


async def test_a_dirty_journal_is_refused(data: Path, tmp_path: Path) -> None:
    """A real one: written by debugfs' journal writer, as a machine that crashed leaves it."""
    rootfs = make(tmp_path / "rootfs.ext4", "-t", "ext4", "-O", "^metadata_csum,^64bit", size="32M")
    block = tmp_path / "block"
    block.write_bytes(b"j" * 4096)
    script = tmp_path / "script"
    script.write_text(f"jo\njw -b 3000 {block}\njc\n")
    subprocess.run(["debugfs", "-w", "-f", script, rootfs], check=True, capture_output=True)
    with pytest.raises(InvalidInput, match="journal to be replayed") as caught:
        await register(data, rootfs)
    assert "e2fsck -p" in caught.value.hint
    subprocess.run(["e2fsck", "-fy", rootfs], capture_output=True, check=False)
    await register(data, rootfs)


@pytest.mark.parametrize("link", [False, True])
async def test_one_that_is_damaged_inside_is_refused(link: bool, data: Path, rootfs: Path) -> None:
    debugfs(rootfs, "clri /etc/hostname")
    before = rootfs.read_bytes()
    with pytest.raises(Corrupted, match="does not pass e2fsck"):
        await register(data, rootfs, link=link)
    assert rootfs.read_bytes() == before
    assert left(data) == []


async def test_paths_that_lead_nowhere(data: Path, rootfs: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path, words in (
        (tmp_path / "absent", "No such file"),
        (tmp_path, "not a regular file|cannot read"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "loop", "cannot read"),
        (Path("/dev/null"), "not a regular file"),
        (Path("rootfs.ext4"), "not an absolute path"),
    ):
        with pytest.raises(InvalidInput, match=words):
            await register(data, path)
    assert left(data) == []


def test_any_superblock_is_judged(rootfs: Path) -> None:
    """Whatever 32 bits stand at any place of the superblock: a verdict, nothing else."""
    whole = rootfs.read_bytes()[: 1 << 17]
    for at in range(0, 1024, 2):
        for value in (0, 0xFFFFFFFF, 0x80000000):
            changed = bytearray(whole)
            struct.pack_into("<I", changed, 1024 + at, value)
            rootfs.write_bytes(changed)
            try:
                check_superblock(rootfs)
            except InvalidInput:
                continue


async def test_cancelling_leaves_nothing(data: Path, tmp_path: Path) -> None:
    rootfs = make(tmp_path / "rootfs.ext4", "-t", "ext4", "-O", "^has_journal", size="512M")
    with open(rootfs, "r+b") as file:  # in free blocks: e2fsck minds them not, a copy does
        file.seek(256 << 20)
        for _ in range(64):
            file.write(os.urandom(1 << 20))
    for moment in (0.0, 0.02, 0.1, 0.3):
        task = asyncio.create_task(register(data, rootfs))
        await asyncio.sleep(moment)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert left(data) == []
