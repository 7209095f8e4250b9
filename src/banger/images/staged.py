"""A tar into an ext4 on hosts whose mke2fs takes directories only.

Owns the second strategy of `images.ext4`. The tar is staged as plain files of our own under
a private directory, every step relative to a directory's fd and following no link;
`mke2fs -d` copies that; then owners, modes, times, extended attributes and device nodes are
set through debugfs by inode number. No name from the tar ever becomes a word of a command,
so no name can be one.

How an inode is found without its name: each staged inode carries its own number as its
modification time, which mke2fs copies; the inode tables of the result are then read here.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from banger.errors import Corrupted, InvalidInput
from banger.host.commands import HostCommands
from banger.host.files import no_space_named
from banger.images.inodes import (
    check_xattr_name,
    inode_mtimes,
    run_debugfs,
    set_times,
    set_xattrs,
)

_MAX_DEPTH = 256
_MAX_XATTR_BYTES = 64 * 1024
_CHUNK_BYTES = 1 << 20
_XATTR_PREFIX = "SCHILY.xattr."
# Staged times start here, so that a time mke2fs makes itself is not taken for a number.
_FIRST_NUMBER = 1000
_ROOT_INODE = 2


@dataclass(slots=True)
class Attributes:
    """What an inode of the tar has that a staged file cannot have without root."""

    mode: int  # with file type bits
    uid: int
    gid: int
    mtime: int
    device: tuple[int, int] | None = None
    xattrs: dict[str, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class StagedTree:
    """A staged directory and the attributes of its inodes by their number."""

    root: Path
    scratch: Path
    attributes: dict[int, Attributes]


def split_name(name: str) -> tuple[bytes, ...]:
    """Return a member's name as components below the root; () is the root itself.

    A leading slash and `.` components fall away, as in every tar reader. Raises
    InvalidInput for `..` and for components no file system takes.
    """
    parts = tuple(part for part in os.fsencode(name).split(b"/") if part not in (b"", b"."))
    for part in parts:
        if part == b".." or len(part) > 255 or b"\0" in part:
            raise InvalidInput(f"the tar has a member with an unusable name: {name!r}")
    if len(parts) > _MAX_DEPTH:
        raise InvalidInput(f"the tar has a member more than {_MAX_DEPTH} directories deep")
    return parts


def stage_tar(source: IO[bytes], directory: Path) -> StagedTree:
    """Stage a tar stream below a private directory; blocks, so call it in a thread.

    A later member of the same name replaces an earlier one. Raises InvalidInput for a tar
    that does not read or has an unusable name.
    """
    root, scratch = directory / "root", directory / "scratch"
    root.mkdir(mode=0o700)
    scratch.mkdir(mode=0o700)
    stager = _Stager(root)
    with no_space_named(directory), contextlib.closing(stager):
        try:
            with tarfile.open(
                fileobj=source, mode="r|", encoding="utf-8", errors="surrogateescape"
            ) as archive:
                for member in archive:
                    stager.add(archive, member)
        except tarfile.TarError as error:
            raise InvalidInput(f"the tar does not read: {error}") from error
        stager.finish()
    return StagedTree(root, scratch, stager.attributes)


class _Stager:
    def __init__(self, root: Path) -> None:
        self.attributes: dict[int, Attributes] = {}
        self._root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # What was staged, by path: the number of its inode. Directories include the root.
        self._numbers: dict[tuple[bytes, ...], int] = {}
        self._next = _FIRST_NUMBER
        self._new_number((), Attributes(stat.S_IFDIR | 0o755, 0, 0, 0))

    def close(self) -> None:
        os.close(self._root_fd)

    def _new_number(self, path: tuple[bytes, ...], attributes: Attributes) -> int:
        number = self._next
        self._next += 1
        self._numbers[path] = number
        self.attributes[number] = attributes
        return number

    @contextlib.contextmanager
    def _parent(self, path: tuple[bytes, ...]) -> Iterator[int]:
        """Open a path's parent directory, making what is missing, component by component."""
        fd = os.dup(self._root_fd)
        try:
            for depth, part in enumerate(path[:-1], start=1):
                if path[:depth] not in self._numbers:
                    os.mkdir(part, 0o700, dir_fd=fd)
                    self._new_number(path[:depth], Attributes(stat.S_IFDIR | 0o755, 0, 0, 0))
                try:
                    below = os.open(
                        part,
                        os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
                        dir_fd=fd,
                    )
                except OSError as error:
                    raise InvalidInput(
                        f"the tar has a member below {b'/'.join(path[:depth])!r}, "
                        "which is not a directory"
                    ) from error
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        path = split_name(member.name)
        if member.islnk():
            self._add_hard_link(path, split_name(member.linkname))
            return
        attributes = Attributes(
            _file_type(member) | (member.mode & 0o7777),
            member.uid,
            member.gid,
            max(0, int(member.mtime)),
            (member.devmajor, member.devminor) if member.ischr() or member.isblk() else None,
            _xattrs(member),
        )
        if not path:
            if not member.isdir():
                raise InvalidInput("the root of the tar is not a directory")
            self.attributes[self._numbers[()]] = attributes
            return
        with self._parent(path) as parent:
            name = path[-1]
            if member.isdir() and path in self._numbers:
                number = self._numbers[path]
                if stat.S_ISDIR(self.attributes[number].mode):
                    self.attributes[number] = attributes
                    return
            self._remove(parent, path)
            if member.isdir():
                os.mkdir(name, 0o700, dir_fd=parent)
            elif member.issym():
                os.symlink(os.fsencode(member.linkname), name, dir_fd=parent)
            elif member.isfifo():
                os.mkfifo(name, 0o600, dir_fd=parent)
            else:
                self._write(archive, member, name, parent)
            self._new_number(path, attributes)

    def _remove(self, parent: int, path: tuple[bytes, ...]) -> None:
        if path not in self._numbers:
            return
        try:
            os.unlink(path[-1], dir_fd=parent)
        except IsADirectoryError as error:
            raise InvalidInput(
                f"the tar replaces the directory {b'/'.join(path)!r} by something else"
            ) from error
        del self._numbers[path]

    def _add_hard_link(self, path: tuple[bytes, ...], target: tuple[bytes, ...]) -> None:
        number = self._numbers.get(target)
        if not path or number is None or stat.S_ISDIR(self.attributes[number].mode):
            raise InvalidInput(f"the tar links {b'/'.join(path)!r} to what is not there")
        if path == target:
            return
        with self._parent(target) as source, self._parent(path) as parent:
            self._remove(parent, path)
            os.link(
                target[-1], path[-1], src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False
            )
            self._numbers[path] = number

    @staticmethod
    def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, name: bytes, parent: int) -> None:
        fd = os.open(
            name,
            os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
            0o600,
            dir_fd=parent,
        )
        with os.fdopen(fd, "wb", buffering=0) as file:
            content = archive.extractfile(member) if member.isreg() else None
            while content is not None and (chunk := content.read(_CHUNK_BYTES)):
                file.write(chunk)

    def finish(self) -> None:
        """Write each inode's number into its modification time, children before parents."""
        for path in sorted(self._numbers, key=len, reverse=True):
            times = (self._numbers[path], self._numbers[path])
            if not path:
                os.utime(self._root_fd, times)
                continue
            with self._parent(path) as parent:
                os.utime(path[-1], times, dir_fd=parent, follow_symlinks=False)


def _file_type(member: tarfile.TarInfo) -> int:
    if member.isdir():
        return stat.S_IFDIR
    if member.issym():
        return stat.S_IFLNK
    if member.isfifo():
        return stat.S_IFIFO
    if member.ischr():
        return stat.S_IFCHR
    if member.isblk():
        return stat.S_IFBLK
    if member.isreg():
        return stat.S_IFREG
    raise InvalidInput(f"the tar has a member of an unknown kind: {member.name!r}")


def _xattrs(member: tarfile.TarInfo) -> dict[str, bytes]:
    found = {}
    for key, value in member.pax_headers.items():
        if not key.startswith(_XATTR_PREFIX):
            continue
        name = key[len(_XATTR_PREFIX) :]
        data = value.encode("utf-8", "surrogateescape")
        check_xattr_name(name)
        if len(data) > _MAX_XATTR_BYTES:
            raise InvalidInput(f"{member.name!r} has an unusable extended attribute {name!r}")
        found[name] = data
    return found


async def apply_attributes(tree: StagedTree, image: Path, *, commands: HostCommands) -> None:
    """Give the inodes of an image, made by `mke2fs -d` of the tree, their attributes."""
    inodes = {mtime: number for number, mtime in inode_mtimes(image)}
    inodes[_FIRST_NUMBER] = _ROOT_INODE  # the first one is the root, whose time mke2fs sets
    script: list[str] = []
    retyped = False
    live = _live(tree)
    for number, attributes in tree.attributes.items():
        inode = inodes.get(number)
        if inode is None:
            if number in live:
                raise Corrupted(f"mke2fs lost inode {number} of {image.name}")
            continue  # a file that a later member replaced
        retyped = retyped or attributes.device is not None
        script += _commands_for(inode, attributes, tree.scratch)
    await run_debugfs(script, image, scratch=tree.scratch, commands=commands)
    if retyped:
        # Directory entries still say "regular file"; e2fsck takes the type from the inode.
        fixed = await commands.run(["e2fsck", "-fy", str(image)], check=False, timeout_s=600)
        if fixed.exit_status not in (0, 1):
            raise Corrupted(f"{image.name} does not pass e2fsck after its device nodes were set")


def _live(tree: StagedTree) -> set[int]:
    """Return the numbers of inodes still in the staged tree (a replaced file's is not)."""
    live = set()
    for directory, names, files in os.walk(os.fsencode(tree.root)):
        live.add(int(os.lstat(directory).st_mtime))
        for name in (*names, *files):
            live.add(int(os.lstat(os.path.join(directory, name)).st_mtime))
    return live


def _commands_for(inode: int, attributes: Attributes, scratch: Path) -> Iterator[str]:
    def put(name: str, value: str) -> str:
        return f"set_inode_field <{inode}> {name} {value}"

    yield put("mode", f"0{attributes.mode:o}")
    yield put("uid", str(attributes.uid))
    yield put("gid", str(attributes.gid))
    yield from set_times(inode, attributes.mtime)
    if attributes.device is not None:
        major, minor = attributes.device
        # ext4 keeps small numbers in the old 8:8 form in block 0, others in block 1.
        old = major << 8 | minor if major < 256 and minor < 256 else 0
        new = 0 if old else (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
        yield put("flags", "0")
        for index, value in enumerate((old, new, *(0,) * 10)):
            yield put(f"block[{index}]", f"0x{value:x}")
    yield from set_xattrs(inode, attributes.xattrs, scratch)
