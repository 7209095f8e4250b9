"""Inodes of an unmounted ext4: found by their modification time, changed by number.

Owns reading the inode tables and the scripts that debugfs runs. No name of a file ever becomes
a word of a command, so no name can be one: whoever wants to change an inode gives it a
modification time of its own first, which mke2fs keeps, and finds its number by that.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from banger.errors import CommandFailed, Corrupted, InvalidInput
from banger.host.commands import HostCommands

_TIMEOUT_S = 600
# The name of an attribute does become a word of a command.
_XATTR_NAME = re.compile(r"[A-Za-z0-9_.:+@-]{1,255}")


@dataclass(frozen=True, slots=True)
class Marked:
    """An inode by the modification time that only it has, and what it shall have instead."""

    mark: int
    mtime: int
    xattrs: dict[str, bytes]


async def apply_xattrs(
    image: Path, marked: Iterable[Marked], *, work: Path, commands: HostCommands
) -> None:
    """Give marked inodes their attributes and their time; `work` is a private directory."""
    inodes = {mtime: number for number, mtime in inode_mtimes(image)}
    scratch = work / "xattrs"
    scratch.mkdir(mode=0o700)
    script: list[str] = []
    for one in marked:
        if one.mark not in inodes:
            raise Corrupted(f"mke2fs lost an inode of {image.name}")
        script += set_xattrs(inodes[one.mark], one.xattrs, scratch)
        script += set_times(inodes[one.mark], one.mtime)
    await run_debugfs(script, image, scratch=scratch, commands=commands)


def check_xattr_name(name: str) -> None:
    """Raise InvalidInput unless an attribute's name can be a word of a command."""
    if not _XATTR_NAME.fullmatch(name):
        raise InvalidInput(f"a file has an unusable extended attribute {name[:80]!r}")


def set_times(inode: int, mtime: int) -> Iterator[str]:
    """Yield the commands that set an inode's four times."""
    for name in ("mtime", "atime", "ctime", "crtime"):
        yield f"set_inode_field <{inode}> {name} @0x{mtime:x}"


def set_xattrs(inode: int, xattrs: dict[str, bytes], scratch: Path) -> Iterator[str]:
    """Yield the commands that set extended attributes; raises InvalidInput for an unusable name."""
    for index, (name, data) in enumerate(sorted(xattrs.items())):
        check_xattr_name(name)
        file = f"x{inode}-{index}"  # debugfs runs in the scratch directory
        (scratch / file).write_bytes(data)
        yield f"ea_set -f {file} <{inode}> {name}"


async def run_debugfs(
    script: list[str], image: Path, *, scratch: Path, commands: HostCommands
) -> None:
    """Run commands on an image, in the directory `scratch`; a complaint raises CommandFailed."""
    (scratch / "script").write_text("\n".join(script) + "\n", encoding="ascii")
    done = await commands.run(
        ["debugfs", "-w", "-f", "script", str(image.absolute())], cwd=scratch, timeout_s=_TIMEOUT_S
    )
    # debugfs ends with status 0 whatever happened: anything but its banner is a failure.
    complaints = [line for line in done.stderr.splitlines() if not line.startswith("debugfs ")]
    if complaints:
        raise CommandFailed(f"debugfs failed: {complaints[0]}", stderr_tail="\n".join(complaints))


def inode_mtimes(image: Path) -> Iterator[tuple[int, int]]:
    """Yield (inode number, modification time) of the inodes in use of an ext4.

    Reads the superblock, the group descriptors and the inode tables; see "Ext4 data
    structures" in the kernel's documentation for every offset.
    """
    with open(image, "rb") as file:
        file.seek(1024)
        superblock = file.read(1024)
        (magic,) = struct.unpack_from("<H", superblock, 0x38)
        if magic != 0xEF53:
            raise Corrupted(f"{image.name} is not an ext4")
        (total,) = struct.unpack_from("<I", superblock, 0x0)
        first_block, log_block_size = struct.unpack_from("<II", superblock, 0x14)
        (per_group,) = struct.unpack_from("<I", superblock, 0x28)
        (inode_bytes,) = struct.unpack_from("<H", superblock, 0x58)
        (incompat,) = struct.unpack_from("<I", superblock, 0x60)
        (descriptor_bytes,) = struct.unpack_from("<H", superblock, 0xFE)
        is_64bit = bool(incompat & 0x80)
        descriptor_bytes = descriptor_bytes if is_64bit else 32
        block_bytes = 1024 << log_block_size
        groups = -(-total // per_group)
        file.seek((first_block + 1) * block_bytes)
        descriptors = file.read(groups * descriptor_bytes)
        for group in range(groups):
            base = group * descriptor_bytes
            (table,) = struct.unpack_from("<I", descriptors, base + 0x8)
            (unused,) = struct.unpack_from("<H", descriptors, base + 0x1C)
            (flags,) = struct.unpack_from("<H", descriptors, base + 0x12)
            if is_64bit:
                table |= struct.unpack_from("<I", descriptors, base + 0x28)[0] << 32
                unused |= struct.unpack_from("<H", descriptors, base + 0x32)[0] << 16
            if flags & 0x1:  # INODE_UNINIT
                continue
            used = max(0, per_group - unused)
            file.seek(table * block_bytes)
            inodes = file.read(used * inode_bytes)
            for index in range(used):
                (mtime,) = struct.unpack_from("<I", inodes, index * inode_bytes + 0x10)
                (links,) = struct.unpack_from("<H", inodes, index * inode_bytes + 0x1A)
                if links:
                    yield group * per_group + index + 1, mtime
