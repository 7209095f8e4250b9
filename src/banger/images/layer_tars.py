"""The members of a layer's tar, read forwards only.

Owns what a tar header may say (`tarfile` reads it, and is not trusted) and turns it into the
values of `images.layers`. Runs in the process of `images.flatten` alone.
"""

from __future__ import annotations

import contextlib
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, cast

from banger.errors import Corrupted, InvalidInput
from banger.images.layers import Content, Limits, Member, check_xattrs
from banger.images.unpacking import UnpackedStream

_BLOCK = 512
_XATTR_PREFIX = "SCHILY.xattr."
_MAX_TIME = (1 << 31) - 1  # mke2fs writes 32 bits
_MAX_ID = (1 << 32) - 2  # 4294967295 is "no id" to chown(2)
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's file, and the digest of its unpacked bytes if that is to be checked."""

    path: str
    offset: int
    size: int
    diff_id: str = ""


class _StrictInfo(tarfile.TarInfo):
    """tarfile takes a damaged header for the archive's end; here it is an error."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if not buf or buf.count(0) == _BLOCK == len(buf):
                raise
            raise Corrupted(f"a layer's tar is damaged: {error}") from error


@contextlib.contextmanager
def open_layer(layer: Layer, limits: Limits) -> Iterator[UnpackedStream]:
    """Open a layer's file at its offset as the stream of what is packed in it."""
    hashed = layer.diff_id.startswith("sha256:")
    with open(layer.path, "rb", buffering=0) as file:
        file.seek(layer.offset)
        stream = UnpackedStream(file, layer.size, max_expansion=limits.max_expansion, hashed=hashed)
        try:
            yield stream
        finally:
            stream.close()


def members_of(
    layer: Layer, number: int, limits: Limits, progress: Progress | None = None
) -> Iterator[Member]:
    """Yield a layer's members; raise InvalidInput or Corrupted for a bad layer."""
    with open_layer(layer, limits) as stream:
        yield from members_in(stream, layer, number, progress)


def members_in(
    stream: UnpackedStream, layer: Layer, number: int, progress: Progress | None = None
) -> Iterator[Member]:
    """Yield the members of an open layer, each with the stream at its content: read it or not."""
    content_end = 0
    try:
        with tarfile.open(
            fileobj=cast("IO[bytes]", stream),
            mode="r:",
            tarinfo=_StrictInfo,
            encoding="utf-8",
            errors="surrogateescape",
        ) as archive:
            for info in archive:
                content_end = info.offset_data + (0 if info.sparse else info.size)
                archive.members = []  # type: ignore[attr-defined]  # else it keeps them all
                member = member_of(info, number)
                if member is not None:
                    yield member
                if progress is not None:
                    progress(stream.tell())
    except tarfile.ReadError as error:
        # umoci writes layers that end with the last file's last byte. What was cut elsewhere
        # ends before it, and its digest would differ anyway.
        is_whole = 0 < content_end <= stream.tell()
        if "empty file" not in str(error) and not is_whole:
            raise Corrupted(f"a layer's tar does not read: {error}") from error
    except (tarfile.TarError, ValueError, OverflowError, IndexError) as error:
        raise Corrupted(f"a layer's tar does not read: {error}") from error
    except RecursionError as error:
        raise InvalidInput("a layer's tar nests its headers without end") from error
    found = stream.drain()
    if found and found != layer.diff_id:
        raise Corrupted(f"a layer unpacks to {found}, the image says {layer.diff_id}")


def member_of(info: tarfile.TarInfo, layer: int) -> Member | None:
    """Return a tar header as a Member; None for kinds that unpackers skip."""
    name = _bytes(info.name)
    content = None
    device = (0, 0)
    target = b""
    if info.isreg():
        kind = stat.S_IFREG
        extents = None
        if info.sparse is not None:
            extents = _extents(info)
        if info.size:
            content = Content(layer, info.offset_data, info.size, extents)
    elif info.isdir():
        kind = stat.S_IFDIR
    elif info.issym():
        kind = stat.S_IFLNK
        target = _bytes(info.linkname)
        if not target or len(target) > 4095 or b"\0" in target:
            raise InvalidInput(f"a layer has an unusable symbolic link: {info.name[:120]!r}")
    elif info.islnk():
        kind = stat.S_IFREG
        target = _bytes(info.linkname)
    elif info.ischr() or info.isblk():
        kind = stat.S_IFCHR if info.ischr() else stat.S_IFBLK
        device = (info.devmajor, info.devminor)
        if not (0 <= device[0] < 1 << 12 and 0 <= device[1] < 1 << 20):
            raise InvalidInput(f"a layer has an unusable device node: {info.name[:120]!r}")
    elif info.isfifo():
        kind = stat.S_IFIFO
    elif info.type in (tarfile.XGLTYPE, b"V"):  # a volume's label
        return None
    else:
        raise InvalidInput(f"a layer has a member of unknown kind {info.type!r}: {info.name!r}")
    if not (0 <= info.uid <= _MAX_ID and 0 <= info.gid <= _MAX_ID):
        raise InvalidInput(f"a layer has an unusable owner: {info.name[:120]!r}")
    xattrs = _xattrs(info)
    check_xattrs(name, xattrs)
    return Member(
        name=name,
        # Linux has no modes on symbolic links: they show as 0777 whatever a tar says.
        mode=kind | (0o777 if kind == stat.S_IFLNK else info.mode & 0o7777),
        uid=info.uid,
        gid=info.gid,
        mtime=min(max(int(info.mtime), 0), _MAX_TIME),
        is_hard_link=info.islnk(),
        target=target,
        device=device,
        xattrs=xattrs,
        content=content,
    )


def _extents(info: tarfile.TarInfo) -> tuple[tuple[int, int], ...]:
    extents = []
    end = 0
    # typeshed calls it bytes; it is a list of (offset, bytes).
    for offset, count in cast("list[tuple[int, int]]", info.sparse or []):
        if not count:
            continue  # marks the end, or fills the header's table
        if offset < end or count < 0 or offset + count > info.size:
            raise Corrupted(f"a layer has a damaged sparse file: {info.name[:120]!r}")
        end = offset + count
        extents.append((offset, count))
    return tuple(extents)


def _xattrs(info: tarfile.TarInfo) -> dict[str, bytes]:
    if not info.pax_headers:
        return {}
    return {
        key[len(_XATTR_PREFIX) :]: value.encode("utf-8", "surrogateescape")
        for key, value in info.pax_headers.items()
        if key.startswith(_XATTR_PREFIX)
    }


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
