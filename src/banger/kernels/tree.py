"""Somebody's directory with a kernel in it, read without following one link out of it.

Owns opening below a directory (by descriptor, component by component, no link followed), the
bounds on what is read, and the copy of a modules tree into a tar. What the files mean is left
to `importer`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from banger.errors import InvalidInput
from banger.images.ext4 import SOURCE_DATE_EPOCH

# Bounds: Ubuntu's generic kernel has 6,500 modules in 1,100 directories, 600 MB uncompressed.
MAX_MODULE_FILES = 50_000
MAX_ENTRIES = 200_000
MAX_MODULES_BYTES = 8 * 1024 * 1024 * 1024
MAX_FILE_BYTES = 1024 * 1024 * 1024
MAX_DEPTH = 24

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_DIRECTORY_FLAGS = _FLAGS | os.O_DIRECTORY
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EISDIR)
# A name that every tool takes as it is: the modules of Linux need no more.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,+@=~-]{0,254}")
_MODULE = re.compile(r".+\.ko(?:\.(?:xz|gz|zst))?", re.DOTALL)


class ModulesCopy(NamedTuple):
    """What `copy_modules` took: paths with their sizes, and how many links it left."""

    sizes: dict[str, int]
    links: int

    @property
    def modules(self) -> list[str]:
        """The paths that are modules."""
        return [path for path in self.sizes if is_module(path)]


def is_module(path: str) -> bool:
    """Tell whether a path's name is that of a module."""
    return _MODULE.fullmatch(path.rpartition("/")[2]) is not None


class Tree:
    """An open directory. Paths are relative, of `/`-separated names; no link is followed."""

    def __init__(self, directory: Path) -> None:
        self.path = directory
        try:
            self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise InvalidInput(
                f"{directory} is not a directory that can be read: {error.strerror}",
                hint="give the directory that holds the kernel: `--from DIR`",
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def names(self, path: str = "") -> list[str]:
        """Return the names in a directory, sorted; none when there is no such directory."""
        with self._opened(path, directory=True) as fd:
            return [] if fd is None else sorted(_listed(fd))

    def is_file(self, path: str) -> bool:
        """Tell whether a path is a regular file."""
        with self._opened(path) as fd:
            return fd is not None

    def is_directory(self, path: str) -> bool:
        """Tell whether a path is a directory."""
        with self._opened(path, directory=True) as fd:
            return fd is not None

    def read(self, path: str, limit_bytes: int) -> bytes | None:
        """Return a file's content, None when it is no regular file; raise when it is larger."""
        with self._opened(path) as fd:
            return None if fd is None else read_bounded(fd, limit_bytes, str(self.path / path))

    def copy_modules(self, path: str, output: Path) -> ModulesCopy:
        """Write the modules and their indexes below a directory to a new tar; see `empty_copy`.

        Taken are `modules.*` at the top and every file that is a module; links (`build` and
        `source` are two) and everything else stay where they are.
        """
        copier = _Copier()
        with (
            self._opened(path, directory=True) as fd,
            tarfile.open(output, "x:", format=tarfile.PAX_FORMAT) as sink,
        ):
            if fd is None:
                raise InvalidInput(f"{self.path / path} was taken away while it was read")
            copier.copy(fd, "", sink)
        return ModulesCopy(copier.sizes, copier.links)

    @contextlib.contextmanager
    def _opened(self, path: str, *, directory: bool = False) -> Iterator[int | None]:
        parts = [part for part in path.split("/") if part]
        if any(part in (".", "..") for part in parts):
            raise InvalidInput(f"{path!r} is not a path below a directory")
        with contextlib.ExitStack() as stack:
            fd = self._fd
            for number, part in enumerate(parts, start=1):
                last_file = number == len(parts) and not directory
                found = _open(part, fd, str(self.path / path), file=last_file)
                if found is None:
                    yield None
                    return
                stack.callback(os.close, found)
                fd = found
            yield fd


def _open(name: str, parent: int, shown: str, *, file: bool) -> int | None:
    """Open an entry of a directory; None when it is not there or of another kind."""
    try:
        fd = os.open(name, _FLAGS if file else _DIRECTORY_FLAGS, dir_fd=parent)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise InvalidInput(f"{shown} cannot be read: {error.strerror}") from error
    if file and not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        return None
    return fd


def _listed(fd: int) -> list[str]:
    names: list[str] = []
    with os.scandir(fd) as entries:
        for entry in entries:
            if len(names) >= MAX_ENTRIES:
                raise InvalidInput(f"a directory has more than {MAX_ENTRIES} entries")
            names.append(entry.name)
    return names


def read_bounded(fd: int, limit_bytes: int, shown: str) -> bytes:
    """Return what is left to read of a file; raise InvalidInput above the limit."""
    with open(fd, "rb", closefd=False, buffering=0) as file:
        out = bytearray()
        while chunk := file.read(min(1 << 20, limit_bytes + 1 - len(out))):
            out += chunk
            if len(out) > limit_bytes:
                raise InvalidInput(f"{shown} is larger than {limit_bytes >> 20} MiB")
    return bytes(out)


def read_file(path: Path, limit_bytes: int) -> bytes:
    """Return the content of a file the user named (a link is their word); bounded."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidInput(f"{path} is not a file")
        return read_bounded(fd, limit_bytes, str(path))
    finally:
        os.close(fd)


def _refused(told: str) -> InvalidInput:
    return InvalidInput(told, hint="name the modules of the kernel alone: `--modules DIR`")


class _Copier:
    """Copies one tree, and counts."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.links = 0
        self._entries = 0
        self._bytes = 0

    def copy(self, fd: int, path: str, sink: tarfile.TarFile) -> None:
        if path.count("/") >= MAX_DEPTH:
            raise _refused(f"the modules' tree is deeper than {MAX_DEPTH} directories")
        sink.addfile(_entry(f"./{path}" if path else ".", tarfile.DIRTYPE))
        for name in sorted(_listed(fd)):
            self._entries += 1
            if self._entries > MAX_ENTRIES:
                raise _refused(f"the modules' tree has more than {MAX_ENTRIES} entries")
            try:
                mode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
            except FileNotFoundError:  # gone since it was listed
                continue
            below = f"{path}/{name}" if path else name
            if stat.S_ISLNK(mode):
                self.links += 1
            elif stat.S_ISDIR(mode):
                self._copy_directory(fd, name, below, sink)
            elif stat.S_ISREG(mode) and (is_module(name) or self._is_index(path, name)):
                self._copy_file(fd, name, below, sink)

    @staticmethod
    def _is_index(path: str, name: str) -> bool:
        return not path and name.startswith("modules.")

    def _copy_directory(self, fd: int, name: str, below: str, sink: tarfile.TarFile) -> None:
        _check_name(name, below)
        child = _open(name, fd, below, file=False)
        if child is None:  # it became something else in the meantime
            return
        try:
            self.copy(child, below, sink)
        finally:
            os.close(child)

    def _copy_file(self, fd: int, name: str, below: str, sink: tarfile.TarFile) -> None:
        _check_name(name, below)
        child = _open(name, fd, below, file=True)
        if child is None:
            return
        with open(child, "rb") as file:
            size = os.fstat(child).st_size
            self._bytes += size
            if size > MAX_FILE_BYTES or self._bytes > MAX_MODULES_BYTES:
                raise _refused(f"the modules are too large: at {below}")
            if len(self.sizes) >= MAX_MODULE_FILES:
                raise _refused(f"the kernel has more than {MAX_MODULE_FILES} modules")
            entry = _entry(f"./{below}", tarfile.REGTYPE)
            entry.size = size
            try:
                sink.addfile(entry, file)
            except OSError as error:
                if error.errno is None:  # tarfile's own: the file became shorter
                    raise _refused(f"{below} changed while it was read") from error
                raise
        self.sizes[below] = size


def empty_copy(output: Path) -> ModulesCopy:
    """Write the tar of a kernel that has no modules: its top, and nothing in it."""
    with tarfile.open(output, "x:", format=tarfile.PAX_FORMAT) as sink:
        sink.addfile(_entry(".", tarfile.DIRTYPE))
    return ModulesCopy({}, 0)


def _check_name(name: str, shown: str) -> None:
    if not _NAME.fullmatch(name):
        raise _refused(f"the modules' tree has a name that no kernel's has: {shown!r}")


def _entry(name: str, kind: bytes) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type = kind
    entry.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    entry.mtime = SOURCE_DATE_EPOCH
    return entry


def unpack_copy(tar: Path, directory: Path) -> None:
    """Write a tar of `copy_modules` out as plain files of ours, below a new directory.

    Safe because the tar is ours: its names were checked, and it holds files and directories only.
    """
    with tarfile.open(tar, "r:") as source:
        for member in source:
            target = directory / member.name
            if member.isdir():
                target.mkdir(mode=0o700, exist_ok=True)
                continue
            content = source.extractfile(member)
            assert content is not None
            with open(target, "xb") as file:
                while chunk := content.read(1 << 20):
                    file.write(chunk)
