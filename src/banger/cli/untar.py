"""A tar from a guest, written below one directory of the host.

A guest is hostile: its tar may name `../../.bashrc`, plant a link and write through it,
or claim sizes without end. So every step is relative to an open directory and follows no
link; links that point outside, devices and pipes are left out with a warning; names are
bytes throughout; and every record read into memory is bounded.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import NamedTuple, Protocol

from banger.errors import BangerError, Conflict, InvalidInput

_BLOCK = 512
_CHUNK_BYTES = 256 * 1024
_MAX_RECORD_BYTES = 1024 * 1024  # a name of PATH_MAX and some pax records fit many times
_MAX_DEPTH = 256

Warn = Callable[[str], None]


class Reader(Protocol):
    """A source of bytes: `read` returns at most `count`, and nothing only at the end."""

    def read(self, count: int, /) -> bytes:
        """Return some bytes."""


class Entry(NamedTuple):
    """One header, with long names and pax records applied."""

    name: bytes
    kind: bytes
    mode: int
    size: int
    mtime: int
    link: bytes


class BadTarError(BangerError):
    """The guest sent something that is no tar."""

    code = "bad_tar"


class TarReader:
    """Reads headers and data in one pass: ustar, GNU long names and sizes, pax."""

    def __init__(self, source: Reader) -> None:
        self._source = source
        self._left = 0  # of the current entry's data
        self._padding = 0

    def next(self) -> Entry | None:
        """Return the next entry, or None at the end; what was not read of the last is skipped."""
        self._skip()
        long_name: bytes | None = None
        long_link: bytes | None = None
        pax: dict[bytes, bytes] = {}
        for _ in range(16):  # records before one entry: three are usual
            block = self._exactly(_BLOCK, end_allowed=True)
            if not block or block == bytes(_BLOCK):
                return None
            _check_sum(block)
            kind = block[156:157]
            size = _number(block[124:136])
            if kind in b"LKxg":
                data = self._record(size)
                if kind == b"L":
                    long_name = data.split(b"\0")[0]
                elif kind == b"K":
                    long_link = data.split(b"\0")[0]
                elif kind == b"x":
                    pax = _pax(data)
                continue
            name = _text(block[0:100])
            if block[257:263] == b"ustar\0" and block[345] != 0:
                name = _text(block[345:500]) + b"/" + name
            if b"size" in pax:
                size = _decimal(pax[b"size"])
            self._left = size if kind in (b"0", b"\0", b"7") else 0
            self._padding = -self._left % _BLOCK
            return Entry(
                name=pax.get(b"path", name if long_name is None else long_name),
                kind=kind,
                mode=_number(block[100:108]),
                size=size,
                mtime=_decimal(pax[b"mtime"]) if b"mtime" in pax else _number(block[136:148]),
                link=pax.get(
                    b"linkpath", _text(block[157:257]) if long_link is None else long_link
                ),
            )
        raise BadTarError("the tar from the guest has too many records before one entry")

    def data(self) -> bytes:
        """Return the next bytes of the current entry; nothing at its end."""
        if self._left == 0:
            return b""
        chunk = self._source.read(min(self._left, _CHUNK_BYTES))
        if not chunk:
            raise BadTarError("the tar from the guest ends in the middle of a file")
        self._left -= len(chunk)
        return chunk

    def _skip(self) -> None:
        while self.data():
            pass
        if self._padding:
            self._exactly(self._padding)
            self._padding = 0

    def _record(self, size: int) -> bytes:
        if size > _MAX_RECORD_BYTES:
            raise BadTarError("the tar from the guest has a record that is too long")
        return self._exactly(size + -size % _BLOCK)[:size]

    def _exactly(self, count: int, *, end_allowed: bool = False) -> bytes:
        parts = []
        left = count
        while left:
            part = self._source.read(left)
            if not part:
                if end_allowed and left == count:
                    return b""
                raise BadTarError("the tar from the guest ends early")
            parts.append(part)
            left -= len(part)
        return b"".join(parts)


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU base-256; a negative one has no business here
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if value > 1 << 62:
            raise BadTarError("the tar from the guest has a number out of range")
        return value
    digits = field.replace(b"\0", b" ").strip() or b"0"
    try:
        return int(digits, 8)
    except ValueError as error:
        raise BadTarError("the tar from the guest has a broken number") from error


def _decimal(text: bytes) -> int:
    whole = text.partition(b".")[0]
    digits = whole.removeprefix(b"-")
    if not digits.isdigit() or len(digits) > 18:
        raise BadTarError("the tar from the guest has a broken pax number")
    return 0 if whole.startswith(b"-") else int(digits)


def _check_sum(block: bytes) -> None:
    if sum(block) - sum(block[148:156]) + 8 * 32 != _number(block[148:156]):
        raise BadTarError("what the guest sent is no tar")


def _pax(data: bytes) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    while data:
        length_text, space, _ = data.partition(b" ")
        if not space or not length_text.isdigit() or len(length_text) > 8:
            raise BadTarError("the tar from the guest has a broken pax record")
        length = int(length_text)
        record = data[len(length_text) + 1 : length]
        key, equals, value = record.partition(b"=")
        if length > len(data) or not equals or not record.endswith(b"\n"):
            raise BadTarError("the tar from the guest has a broken pax record")
        found[key] = value[:-1]
        data = data[length:]
    return found


class Extracted(NamedTuple):
    """What an extraction wrote."""

    files: int
    bytes: int


def extract(
    source: Reader, root_fd: int, *, rename: tuple[bytes, bytes] | None, warn: Warn
) -> Extracted:
    """Write a tar below the open directory `root_fd` and return what was written.

    `rename` replaces the first component of every name: (what the guest calls it, what it
    becomes here); an entry outside of it is refused. With (name, b"") the component is
    dropped, so its contents land in the root itself.
    """
    writer = _Writer(root_fd, warn)
    reader = TarReader(source)
    try:
        while (entry := reader.next()) is not None:
            parts = _parts(entry.name, rename)
            writer.write(parts, entry, reader, rename)
        return Extracted(writer.files, writer.bytes)
    finally:
        writer.close()


def _parts(name: bytes, rename: tuple[bytes, bytes] | None) -> list[bytes]:
    """Return a safe relative path as components; raise for one that leaves the root."""
    if name.startswith(b"/") or b"\0" in name:
        raise _unsafe(name)
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in parts or len(parts) > _MAX_DEPTH:
        raise _unsafe(name)
    if rename is not None:
        theirs, ours = rename
        if theirs != b".":
            if not parts or parts[0] != theirs:
                raise _unsafe(name)
            parts = parts[1:]
        parts = ([ours] if ours else []) + parts
    return parts


def _unsafe(name: bytes) -> BangerError:
    return InvalidInput(
        f"the guest sent the unsafe name {os.fsdecode(name)!r}: nothing was written there",
        hint="do not trust this VM",
        code="unsafe_name",
    )


class _Writer:
    """Makes entries below one directory without ever following a link."""

    def __init__(self, root_fd: int, warn: Warn) -> None:
        self._root_fd = root_fd
        self._warn = warn
        self._modes: list[tuple[list[bytes], int, int]] = []
        self._made: set[tuple[bytes, ...]] = set()  # regular files of this very tar
        self._open: tuple[list[bytes], int] | None = None
        self.files = 0
        self.bytes = 0

    def close(self) -> None:
        """Give directories their modes and times, innermost first, and close what is open."""
        self._leave()
        for parts, mode, mtime in reversed(self._modes):
            try:
                fd = self._walk(parts, make=False)
            except (OSError, BangerError):
                continue
            try:
                os.fchmod(fd, mode)
                os.utime(fd, (mtime, mtime))
            finally:
                os.close(fd)

    def write(
        self,
        parts: list[bytes],
        entry: Entry,
        reader: TarReader,
        rename: tuple[bytes, bytes] | None,
    ) -> None:
        """Make one entry."""
        kind = entry.kind
        if kind == b"5":
            self._leave()
            os.close(self._walk(parts, make=True))
            if parts:
                # Always ours to enter while the rest is written, and to delete afterwards.
                self._modes.append((parts, entry.mode & 0o777 | 0o700, entry.mtime))
            return
        if not parts:
            raise _unsafe(entry.name)
        parent, leaf = self._parent(parts[:-1]), parts[-1]
        if kind in (b"0", b"\0", b"7"):
            self._regular(parent, leaf, entry, reader)
            self._made.add(tuple(parts))
        elif kind == b"2":
            if _escapes(parts[:-1], entry.link):
                self._skip(entry, f"points outside ({os.fsdecode(entry.link)})")
                return
            self._clear(parent, leaf)
            os.symlink(entry.link, leaf, dir_fd=parent)
        elif kind == b"1":
            self._hard_link(parent, leaf, entry, rename)
        else:
            self._skip(entry, "is neither file, directory nor link")

    def _skip(self, entry: Entry, why: str) -> None:
        self._warn(f"{os.fsdecode(entry.name)} {why}: not copied")

    def _regular(self, parent: int, leaf: bytes, entry: Entry, reader: TarReader) -> None:
        self._clear(parent, leaf)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(leaf, flags, 0o600, dir_fd=parent)
        try:
            while chunk := reader.data():
                view = memoryview(chunk)
                while view:
                    view = view[os.write(fd, view) :]
                self.bytes += len(chunk)
            os.fchmod(fd, entry.mode & 0o777)  # setuid and setgid stay in the guest
            os.utime(fd, (entry.mtime, entry.mtime))
        finally:
            os.close(fd)
        self.files += 1

    def _hard_link(
        self, parent: int, leaf: bytes, entry: Entry, rename: tuple[bytes, bytes] | None
    ) -> None:
        target = _parts(entry.link, rename)
        if tuple(target) not in self._made:
            self._skip(entry, "is a hard link to something not in this copy")
            return
        directory = self._walk(target[:-1], make=False)
        try:
            self._clear(parent, leaf)
            os.link(
                target[-1], leaf, src_dir_fd=directory, dst_dir_fd=parent, follow_symlinks=False
            )
        finally:
            os.close(directory)
        self.files += 1

    def _clear(self, parent: int, leaf: bytes) -> None:
        """Remove a file or link in the way; a directory in the way is an error."""
        try:
            os.unlink(leaf, dir_fd=parent)
        except FileNotFoundError:
            pass
        except (IsADirectoryError, PermissionError) as error:
            if stat.S_ISDIR(os.stat(leaf, dir_fd=parent, follow_symlinks=False).st_mode):
                raise Conflict(
                    f"{os.fsdecode(leaf)} is a directory here and a file in the VM",
                    hint="remove it, or copy to another place",
                ) from error
            raise

    def _parent(self, parts: list[bytes]) -> int:
        if self._open is not None and self._open[0] == parts:
            return self._open[1]
        self._leave()
        fd = self._walk(parts, make=True)
        self._open = (parts, fd)
        return fd

    def _leave(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def _walk(self, parts: list[bytes], *, make: bool) -> int:
        """Open a directory below the root, component by component."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.dup(self._root_fd)
        try:
            for part in parts:
                if make:
                    try:
                        os.mkdir(part, 0o700, dir_fd=fd)
                    except FileExistsError:
                        pass
                inner = os.open(part, flags, dir_fd=fd)
                os.close(fd)
                fd = inner
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise Conflict(
                    f"{os.fsdecode(b'/'.join(parts))} leads through something that is no directory",
                    hint="copy to an empty directory",
                ) from error
            raise
        return fd


def _escapes(directory: list[bytes], target: bytes) -> bool:
    """Tell whether a symbolic link in `directory` could lead out of the root.

    Counted without looking at the disk, and with every `..` taken at its worst: one that
    comes after a name may go through another link, so only leading ones are allowed.
    """
    if target.startswith(b"/") or not target or b"\0" in target:
        return True
    depth = len(directory)
    descended = False
    for part in target.split(b"/"):
        if part == b"..":
            if descended:
                return True
            depth -= 1
            if depth < 0:
                return True
        elif part not in (b"", b"."):
            descended = True
    return False
