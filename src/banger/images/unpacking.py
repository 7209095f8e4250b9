"""The bytes of a layer, unpacked as they are read, forwards only.

Owns telling compressions apart by content, streams of several members or frames, and the
limit on what a few bytes may grow to. It runs in a process of its own (`images.flatten`):
the input is hostile and the decoders are C.
"""

from __future__ import annotations

import bz2
import hashlib
import lzma
import queue
import threading
from collections.abc import Iterator
from typing import IO, Any

from banger.errors import Corrupted, InvalidInput

CHUNK_BYTES = 1 << 20
_READ_BYTES = 256 * 1024
_AHEAD = 16  # pieces of 1 MiB between two threads
# A tar header with its long name or its attributes; content is taken by `pieces`.
MAX_HEADER_BYTES = 1 << 20
# Below this nobody's disk is in danger, whatever the ratio: a page of zeros compresses 1:1000.
EXPANSION_FLOOR_BYTES = 1 << 30
_XZ_MEMORY_BYTES = 256 << 20


class UnpackedStream:
    """A forward-only file of a blob's unpacked bytes; enough of a file for tarfile.

    `seek` goes forwards; `read` refuses more than a header's size, so that no header can ask
    for memory. Raises Corrupted for a cut or damaged stream.
    """

    def __init__(
        self, file: IO[bytes], size_bytes: int, *, max_expansion: int, hashed: bool = False
    ) -> None:
        self._file = file
        self._left = size_bytes
        self._ceiling = max(EXPANSION_FLOOR_BYTES, size_bytes * max_expansion)
        self._position = 0
        self._buffer = b""
        self._at = 0
        self._hash = hashlib.sha256() if hashed else None
        self._pending = self._take()
        self.compression = sniff(self._pending)
        self._decoder = _decoder(self.compression)
        # Inflating, hashing and what the caller does run on as many cores as there are: the C
        # code of the first two lets go of the interpreter's lock.
        self._stages = [_Ahead(self._unpacked())]
        if self._hash is not None:
            self._stages.append(_Ahead(_hashing(self._stages[0].pieces(), self._hash)))
        self._source = self._stages[-1].pieces()

    def close(self) -> None:
        """Let the threads go; the file may be closed then."""
        for stage in self._stages:
            stage.close()

    # -- what tarfile asks for

    def tell(self) -> int:
        """Return the offset in the unpacked stream."""
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go forwards to an absolute offset."""
        if whence != 0 or offset < self._position:
            raise InvalidInput("a layer's tar points backwards")
        left = offset - self._position
        while left:
            piece = self._piece(left)
            if not piece:
                break
            left -= len(piece)
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes; fewer only at the end."""
        if size < 0 or size > MAX_HEADER_BYTES:
            raise InvalidInput("a layer's tar has a header above 1 MiB")
        first = bytes(self._piece(size))
        if len(first) == size or not first:
            return first
        parts = [first]
        left = size - len(first)
        while left and (piece := self._piece(left)):
            parts.append(bytes(piece))
            left -= len(piece)
        return b"".join(parts)

    # -- content

    def pieces(self, size: int) -> Any:
        """Yield exactly `size` bytes in pieces; raise Corrupted when they are not there."""
        left = size
        while left:
            piece = self._piece(left)
            if not piece:
                raise Corrupted("a layer ends in the middle of a file")
            left -= len(piece)
            yield piece

    def drain(self) -> str:
        """Read to the end and return `sha256:<hex>` of all bytes ("" when not hashed)."""
        while self._piece(CHUNK_BYTES):
            pass
        return f"sha256:{self._hash.hexdigest()}" if self._hash is not None else ""

    def _piece(self, limit: int) -> memoryview | bytes:
        if self._at >= len(self._buffer):
            self._buffer = next(self._source, b"")
            self._at = 0
            if not self._buffer:
                return b""
        piece = memoryview(self._buffer)[self._at : self._at + limit]
        self._at += len(piece)
        self._position += len(piece)
        return piece

    def _unpacked(self) -> Iterator[bytes]:
        """Yield the unpacked bytes in pieces, none of them empty."""
        while (data := self._unpack()) is not None:
            self._ceiling -= len(data)
            if self._ceiling < 0:
                raise InvalidInput(
                    "a layer grows far beyond its packed size: it looks like a bomb",
                    hint="raise import_limits.max_expansion in the configuration if you trust it",
                )
            if data:
                yield data

    def _unpack(self) -> bytes | None:
        """Return the next unpacked bytes, perhaps none yet; None at the end."""
        if self._decoder is None:
            data = self._pending
            self._pending = self._take() if data else b""
            return data or None
        if self._decoder.eof:
            return self._next_member()
        if not self._pending and self._decoder.is_hungry:
            self._pending = self._take()
        data, self._pending = self._pending, b""
        try:
            found = self._decoder.decompress(data, CHUNK_BYTES)
        except Exception as error:
            raise Corrupted(f"a layer's {self.compression} stream is damaged: {error}") from error
        # A decoder may still hold output when its input has ended, hence not asked before.
        if not found and not data and not self._decoder.eof:
            raise Corrupted(f"a layer's {self.compression} stream is cut off")
        return found

    def _next_member(self) -> bytes | None:
        assert self._decoder is not None
        rest = self._decoder.unused_data + self._pending
        # gzip(1) pads with zeros on tape-like devices; anything else is another member.
        rest = rest.lstrip(b"\0") if self.compression in ("gzip", "xz") else rest
        while len(rest) < 18 and (more := self._take()):
            rest += more
            rest = rest.lstrip(b"\0") if self.compression in ("gzip", "xz") else rest
        if not rest:
            return None
        if sniff(rest) != self.compression:
            raise Corrupted(f"a layer has something else behind its {self.compression} stream")
        self._decoder = _decoder(self.compression)
        self._pending = rest
        return b""

    def _take(self) -> bytes:
        data = self._file.read(min(_READ_BYTES, self._left))
        if not data and self._left:
            raise Corrupted("a layer's file is shorter than it was")
        self._left -= len(data)
        return data


class _Ahead:
    """Runs an iterator in a thread of its own, a few pieces ahead of who takes them."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._slots = threading.Semaphore(_AHEAD)
        self._ready: queue.SimpleQueue[bytes | BaseException | None] = queue.SimpleQueue()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, args=(pieces,), daemon=True)
        self._thread.start()

    def _run(self, pieces: Iterator[bytes]) -> None:
        end: BaseException | None = None
        try:
            for piece in pieces:
                self._slots.acquire()
                if self._is_closed:
                    return
                self._ready.put(piece)
        except BaseException as error:  # noqa: BLE001 - it is raised again where it is taken
            end = error
        self._ready.put(end)

    def pieces(self) -> Iterator[bytes]:
        """Yield the pieces; raise what the iterator raised."""
        while True:
            piece = self._ready.get()
            if piece is None:
                return
            if isinstance(piece, BaseException):
                raise piece
            self._slots.release()
            yield piece

    def close(self) -> None:
        """End the thread."""
        self._is_closed = True
        self._slots.release()
        self._ready.put(None)  # a stage behind this one may wait
        self._thread.join()


def _hashing(pieces: Iterator[bytes], digest: hashlib._Hash) -> Iterator[bytes]:
    for piece in pieces:
        digest.update(piece)
        yield piece


def sniff(head: bytes) -> str:
    """Tell a compression by its magic number: gzip, zstd, xz, bzip2, or none (a plain tar)."""
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    # RFC 8878: a frame, or a skippable one (0x184D2A50 to 0x184D2A5F, little-endian)
    if head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        return "zstd"
    if head[:6] == b"\xfd7zXZ\0":
        return "xz"
    if head[:3] == b"BZh":
        return "bzip2"
    return "none"


def _decoder(compression: str) -> _Decoder | None:
    if compression == "gzip":
        # ISA-L: twice to three times zlib's speed, and without the interpreter's lock (which its
        # decompressobj keeps).
        from isal import igzip_lib

        return _Decoder(igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP))
    if compression == "zstd":
        return _Zstd()
    if compression == "xz":
        return _Decoder(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES))
    if compression == "bzip2":
        return _Decoder(bz2.BZ2Decompressor())
    return None


class _Decoder:
    """A decoder with the interface of bz2's: all four have it."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder

    @property
    def eof(self) -> bool:
        return bool(self._decoder.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._decoder.unused_data)

    @property
    def is_hungry(self) -> bool:
        return bool(self._decoder.needs_input)

    def decompress(self, data: bytes, limit: int) -> bytes:
        return bytes(self._decoder.decompress(data, limit))


class _Zstd(_Decoder):
    def __init__(self) -> None:
        try:
            from compression import zstd  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            from backports import zstd  # type: ignore[no-redef,unused-ignore]
        # A frame may ask for a window; 128 MiB is what zstd -19 --long=27 needs.
        super().__init__(
            zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 27})
        )
