"""The bytes of a bundle: an image as one file, for any place that can serve files.

    zstd, one frame, with its checksum
      tar
        manifest.json          what the image is, and which ranges of rootfs.ext4 hold data
        rootfs.ext4            a sparse member as GNU tar writes it (PAX, sparse format 1.0)
        1024 zeros, the end

`tar --zstd -xf FILE` unpacks it, holes included: that is why the data is not in a format of
ours. The reader, though, takes one form only. Manifest read, every byte of the tar that is not
content is known, and compared; so there is no tar parser that a hostile file could confuse, and
no second member, link, path or trailing byte that it could hold.

Equal content gives equal bytes: no clock, owner or mode is in it, and a hole is what is zero,
not what the file system of the day left out.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import msgspec

from banger.errors import Corrupted, InvalidInput, Unavailable
from banger.host.files import data_extents

FORMAT = 1
MANIFEST = "manifest.json"
ROOTFS = "rootfs.ext4"
MAX_ROOTFS_BYTES = 256 << 30  # zeros cost no disk, but are hashed: two minutes at this size
MAX_MANIFEST_BYTES = 4 << 20
# Below the floor no disk is in danger; what compresses better than the ratio is no image.
_EXPANSION_FLOOR_BYTES = 1 << 30
_MAX_EXPANSION = 200
_MAX_EXTENTS = 1 << 16
_GRANULE_BYTES = 1 << 16
_PAGE_BYTES = 4096
_BLOCK = 512
_CHUNK_BYTES = 1 << 20
_LEVEL = 6  # 80 MB/s on one core for 28 % of the size; 9 takes 1.6 times as long for 27 %
_WINDOW_LOG_MAX = 27  # 128 MiB of memory: what zstd --long asks for
_ZEROS = bytes(_CHUNK_BYTES)
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d)")
_PLATFORM = re.compile(r"[a-z0-9]+/[a-z0-9_]+(?:/[a-z0-9]+)?")

Progress = Callable[[int, int], None]


class BundleManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What manifest.json says. `extents` are [offset, length) of rootfs.ext4; the rest is zero.

    Keys of a later format 1 that are not known here are passed over.
    """

    format: int
    name: str
    digest: str
    size_bytes: int
    extents: tuple[tuple[int, int], ...]
    origin: str = ""
    description: str = ""
    created_at: str = ""
    platform: str = ""
    kernel: str = ""
    default_user: str = "root"
    default_env: dict[str, str] = {}
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    working_dir: str = ""
    packages: dict[str, str] = {}
    extras: dict[str, str] = {}

    @property
    def data_bytes(self) -> int:
        """Return the bytes that are not holes."""
        return sum(length for _, length in self.extents)


class _AnyFormat(msgspec.Struct):
    format: int


def decode_manifest(raw: bytes) -> BundleManifest:
    """Return the manifest of a bundle that was made by anybody; raise Corrupted or Unavailable."""
    try:
        number = msgspec.json.decode(raw, type=_AnyFormat).format
        if number != FORMAT:
            raise Unavailable(
                f"the bundle is of format {number}, and this banger reads format {FORMAT}",
                hint="a newer banger reads it" if number > FORMAT else "",
            )
        manifest = msgspec.json.decode(raw, type=BundleManifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupted(f"the bundle's {MANIFEST} does not read: {error}") from error
    _check(manifest)
    return manifest


def _check(manifest: BundleManifest) -> None:
    def need(sound: bool, what: str) -> None:
        if not sound:
            raise Corrupted(f"the bundle's {MANIFEST} is wrong: {what}")

    need(_NAME.fullmatch(manifest.name) is not None, "name")
    need(_SHA256.fullmatch(manifest.digest) is not None, "digest")
    need(not manifest.kernel or _NAME.fullmatch(manifest.kernel) is not None, "kernel")
    need(not manifest.platform or _PLATFORM.fullmatch(manifest.platform) is not None, "platform")
    need(not manifest.created_at or _TIME.fullmatch(manifest.created_at) is not None, "created_at")
    for word in (manifest.description, manifest.origin):
        need(len(word) <= 1000 and word.isprintable(), "description or origin")
    words = [
        *(manifest.default_user, manifest.working_dir, *manifest.entrypoint, *manifest.command),
        *(word for pair in manifest.default_env.items() for word in pair),
    ]
    need(bool(manifest.default_user) and not any("\0" in word for word in words), "a NUL")
    need(not any("=" in name or not name for name in manifest.default_env), "default_env")
    need(
        0 < manifest.size_bytes <= MAX_ROOTFS_BYTES,
        f"size_bytes, above {MAX_ROOTFS_BYTES >> 30} GiB",
    )
    need(len(manifest.extents) <= _MAX_EXTENTS, "too many extents")
    position = 0
    for offset, length in manifest.extents:
        need(offset >= position and length > 0, "extents")
        position = offset + length
    need(position <= manifest.size_bytes, "extents")


# -- the tar around the content


def manifest_head(size: int) -> bytes:
    """Return the tar header of manifest.json."""
    return _header(MANIFEST, size, b"0")


def rootfs_head(manifest: BundleManifest) -> bytes:
    """Return all bytes between the manifest and the data: the PAX header, the header, the map.

    GNU tar, libarchive and Python's tarfile read it; see "Storing Sparse Files" and "PAX Format,
    Version 1.0" of the GNU tar manual.
    """
    keys = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": ROOTFS,
        "GNU.sparse.realsize": str(manifest.size_bytes),
    }
    records = b"".join(_record(key, value) for key, value in keys.items())
    ranges = list(manifest.extents)
    if not ranges or sum(ranges[-1]) < manifest.size_bytes:
        ranges.append((manifest.size_bytes, 0))  # how a hole at the end is written
    numbers = [len(ranges), *(number for pair in ranges for number in pair)]
    sparse_map = _padded("".join(f"{number}\n" for number in numbers).encode())
    return b"".join(
        (
            _header(f"./PaxHeaders/{ROOTFS}", len(records), b"x"),
            _padded(records),
            _header(f"./GNUSparseFile.0/{ROOTFS}", len(sparse_map) + manifest.data_bytes, b"0"),
            sparse_map,
        )
    )


def tail(manifest: BundleManifest) -> bytes:
    """Return what follows the data: its padding and the end of the archive."""
    return bytes(-manifest.data_bytes % _BLOCK + 2 * _BLOCK)


def _header(name: str, size: int, kind: bytes) -> bytes:
    # Above 8 GiB what GNU tar calls base-256; all readers know it.
    size_field = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    head = b"".join(
        (
            name.encode().ljust(100, b"\0"),
            b"0000644\0" + b"0000000\0" * 2,
            size_field,
            b"00000000000\0",
            b" " * 8,
            kind + bytes(100),
            b"ustar\0" + b"00" + bytes(64) + b"0000000\0" * 2,
        )
    ).ljust(_BLOCK, b"\0")
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


def _record(key: str, value: str) -> bytes:
    rest = f" {key}={value}\n"
    length = len(rest) + 2
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return f"{length}{rest}".encode()


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _BLOCK)


# -- writing


def find_extents(fd: int, size_bytes: int) -> tuple[tuple[int, int], ...]:
    """Return the ranges of a file that are not zero, in steps of 64 KiB or more.

    The steps grow with the size, so there are never more than 32768 ranges.
    """
    step = _GRANULE_BYTES
    while step * _MAX_EXTENTS < size_bytes:
        step *= 2
    zeros = bytes(step)
    found: list[tuple[int, int]] = []
    next_step = 0
    for start, end in data_extents(fd, size_bytes):
        for offset in range(max(next_step, start // step * step), end, step):
            block = os.pread(fd, min(step, size_bytes - offset), offset)
            next_step = offset + step
            if block == zeros[: len(block)]:
                continue
            if found and sum(found[-1]) == offset:
                found[-1] = (found[-1][0], found[-1][1] + len(block))
            else:
                found.append((offset, len(block)))
    return tuple(found)


def write_bundle(
    manifest: BundleManifest, rootfs: IO[bytes], output: IO[bytes], progress: Progress
) -> tuple[str, int]:
    """Write a bundle; return sha256 (hexadecimal) and size of what was written.

    Raises Corrupted when the root file system is not what the manifest's digest says.
    """
    zstd = _zstd()
    # One thread: more give other bytes, and not every build of the library has them.
    packer = zstd.ZstdCompressor(
        options={
            zstd.CompressionParameter.compression_level: _LEVEL,
            zstd.CompressionParameter.checksum_flag: 1,
        }
    )
    whole = hashlib.sha256()
    written = 0

    def put(packed: bytes) -> None:
        nonlocal written
        whole.update(packed)
        output.write(packed)
        written += len(packed)

    raw = msgspec.json.encode(manifest, order="sorted") + b"\n"
    if len(raw) > MAX_MANIFEST_BYTES:
        raise InvalidInput(f"what is to be said of the image has {len(raw)} bytes: at most 4 MiB")
    for part in (manifest_head(len(raw)), _padded(raw), rootfs_head(manifest)):
        put(packer.compress(part))
    content = _Content(manifest, progress)
    for offset, length in manifest.extents:
        content.skip_to(offset)
        rootfs.seek(offset)
        left = length
        while left:
            piece = rootfs.read(min(left, _CHUNK_BYTES))
            if not piece:
                raise Corrupted(f"{ROOTFS} became shorter while it was read")
            content.take(piece)
            put(packer.compress(piece))
            left -= len(piece)
    content.finish("the image's root file system was changed after it was installed")
    put(packer.compress(tail(manifest)))
    put(packer.flush())
    return whole.hexdigest(), written


class _Content:
    """Hashes rootfs.ext4, holes as the zeros they are, and tells how far it is."""

    def __init__(self, manifest: BundleManifest, progress: Progress) -> None:
        self._manifest = manifest
        self._progress = progress
        self._hash = hashlib.sha256()
        self._position = 0
        self._done = 0

    def skip_to(self, offset: int) -> None:
        while self._position < offset:
            count = min(offset - self._position, _CHUNK_BYTES)
            self._hash.update(_ZEROS if count == _CHUNK_BYTES else _ZEROS[:count])
            self._position += count

    def take(self, piece: bytes | memoryview) -> None:
        self._hash.update(piece)
        self._position += len(piece)
        self._done += len(piece)
        self._progress(self._done, self._manifest.data_bytes)

    def finish(self, otherwise: str) -> None:
        self.skip_to(self._manifest.size_bytes)
        if f"sha256:{self._hash.hexdigest()}" != self._manifest.digest:
            raise Corrupted(otherwise)


# -- reading


class PackedStream:
    """The tar inside a bundle, read forwards; hashes the bundle as it comes.

    Raises Corrupted for what is cut off, damaged or grows without measure. Memory is bounded
    by the window (128 MiB) and a few pieces.
    """

    def __init__(self, pieces: Iterable[bytes]) -> None:
        zstd = _zstd()
        self._error: type[Exception] = zstd.ZstdError
        self._decoder = zstd.ZstdDecompressor(
            options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX}
        )
        self._source = iter(pieces)
        self._hash = hashlib.sha256()
        self.packed_bytes = 0
        self._unpacked_bytes = 0
        self._buffer = memoryview(b"")

    def read(self, count: int) -> bytes:
        """Return exactly `count` bytes."""
        return b"".join(self.pieces(count))

    def pieces(self, count: int) -> Iterator[memoryview]:
        """Yield exactly `count` bytes in pieces."""
        while count:
            if not self._buffer:
                self._fill()
            piece = self._buffer[:count]
            self._buffer = self._buffer[len(piece) :]
            count -= len(piece)
            yield piece

    def finish(self) -> str:
        """Check that nothing follows; return sha256 (hexadecimal) of the whole bundle."""
        extra = len(self._buffer) > 0
        while not extra and not self._decoder.eof:
            extra = bool(self._unpack())
        if extra or self._decoder.unused_data or next(self._source, b""):
            raise Corrupted("the bundle has something behind its end")
        return self._hash.hexdigest()

    def _fill(self) -> None:
        while True:
            if self._decoder.eof:
                raise Corrupted("the bundle is cut off")
            data = self._unpack()
            if data:
                self._buffer = memoryview(data)
                return

    def _unpack(self) -> bytes:
        packed = b""
        if self._decoder.needs_input:
            packed = next(self._source, b"")
            if not packed:
                raise Corrupted(
                    "the bundle is cut off" if self.packed_bytes else "the bundle is empty"
                )
            self._hash.update(packed)
            self.packed_bytes += len(packed)
        try:
            data: bytes = self._decoder.decompress(packed, _CHUNK_BYTES)
        except self._error as error:
            if not self._unpacked_bytes:
                raise Corrupted("this is not a bundle: it is not packed with zstd") from error
            raise Corrupted(f"the bundle is damaged: {error}") from error
        self._unpacked_bytes += len(data)
        if self._unpacked_bytes > _EXPANSION_FLOOR_BYTES + self.packed_bytes * _MAX_EXPANSION:
            raise Corrupted("the bundle grows far beyond its packed size: it looks like a bomb")
        return data


def read_manifest(stream: PackedStream) -> BundleManifest:
    """Read up to where the data begins."""
    head = stream.read(_BLOCK)
    try:
        size = int(head[124:135], 8)
    except ValueError:
        size = -1
    if not 0 < size <= MAX_MANIFEST_BYTES or head != manifest_head(size):
        raise Corrupted(
            f"this is not a bundle: it does not begin with {MANIFEST} as banger writes it",
            hint="`banger image export` makes bundles; a tar of files is rootfs:FILE, an image of "
            "Docker docker-archive:FILE",
        )
    raw = stream.read(size)
    manifest = decode_manifest(raw)
    expected = _padded(raw)[size:] + rootfs_head(manifest)
    if stream.read(len(expected)) != expected:
        raise Corrupted(f"the bundle's tar does not hold the {ROOTFS} of its {MANIFEST}")
    return manifest


def read_rootfs(
    stream: PackedStream, manifest: BundleManifest, output: IO[bytes], progress: Progress
) -> str:
    """Write the root file system, sparse, and check it and the end of the bundle.

    Returns sha256 (hexadecimal) of the whole bundle. `output` is empty, seekable, unbuffered.
    """
    content = _Content(manifest, progress)
    for offset, length in manifest.extents:
        content.skip_to(offset)
        position = offset
        for piece in stream.pieces(length):
            content.take(piece)
            _write_sparse(output, position, piece)
            position += len(piece)
    output.truncate(manifest.size_bytes)
    content.finish(f"the bundle's {ROOTFS} has another digest than its {MANIFEST} says")
    if stream.read(len(tail(manifest))).strip(b"\0"):
        raise Corrupted(f"the bundle has something behind its {ROOTFS}")
    return stream.finish()


def _write_sparse(output: IO[bytes], position: int, piece: memoryview) -> None:
    """Write a piece at its place, without its pages of zeros."""
    zeros = _ZEROS[:_PAGE_BYTES]
    start = 0
    at = 0
    while at < len(piece):
        # To the next page of the file, not of the piece: else pages are written in parts.
        count = min(_PAGE_BYTES - (position + at) % _PAGE_BYTES, len(piece) - at)
        if piece[at : at + count] == zeros[:count]:
            _write_all(output, position + start, piece[start:at])
            start = at + count
        at += count
    _write_all(output, position + start, piece[start:])


def _write_all(output: IO[bytes], position: int, data: memoryview) -> None:
    while data:
        count = os.pwrite(output.fileno(), data, position)
        position += count
        data = data[count:]


def _zstd() -> Any:
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        from backports import zstd  # type: ignore[no-redef,unused-ignore]
    return zstd
