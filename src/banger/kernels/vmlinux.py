"""The ELF kernel inside a bzImage.

Owns the x86 boot protocol's setup header and the payload's compression. Reads no file.
Firecracker takes an ELF only; QEMU's microvm boots one through PVH.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib

from banger.errors import InvalidInput, Unavailable

MAX_VMLINUX_BYTES = 512 * 1024 * 1024
_LZ4_LEGACY_MAGIC = b"\x02\x21\x4c\x18"
_LZ4_BLOCK_BYTES = 8 * 1024 * 1024  # lz4_Frame_format.md: what a legacy block holds at most

# Documentation/arch/x86/boot.rst: offsets into the image.
_SETUP_SECTS = 0x1F1
_BOOT_FLAG = 0x1FE
_HEADER_MAGIC = 0x202
_VERSION = 0x206
_PAYLOAD_OFFSET = 0x248
_PAYLOAD_LENGTH = 0x24C


def extract_vmlinux(image: bytes) -> bytes:
    """Return the ELF kernel of a bzImage (an ELF is returned as it is).

    Raises InvalidInput when it is no kernel of x86-64 or its payload does not decompress,
    Unavailable when a decoder is not installed.
    """
    if image[:4] == b"\x7fELF":
        return image
    vmlinux = decompress_payload(find_payload(image))
    if vmlinux[:4] != b"\x7fELF":
        raise InvalidInput("the payload of the kernel image is not an ELF")
    return vmlinux


def find_payload(image: bytes) -> bytes:
    """Return the compressed payload that the setup header of a bzImage points at."""
    if len(image) < 0x250 or image[_HEADER_MAGIC : _HEADER_MAGIC + 4] != b"HdrS":
        raise InvalidInput("this is not a Linux kernel image (bzImage or ELF)")
    (boot_flag,) = struct.unpack_from("<H", image, _BOOT_FLAG)
    (version,) = struct.unpack_from("<H", image, _VERSION)
    if boot_flag != 0xAA55 or version < 0x0208:
        raise InvalidInput("the kernel image speaks a boot protocol older than 2.08")
    setup_sectors = image[_SETUP_SECTS] or 4
    offset, length = struct.unpack_from("<II", image, _PAYLOAD_OFFSET)
    start = (setup_sectors + 1) * 512 + offset
    if length == 0 or start + length > len(image):
        raise InvalidInput("the kernel image is cut off: its payload ends beyond its end")
    return image[start : start + length]


def decompress_payload(payload: bytes) -> bytes:
    """Return a payload decompressed; what follows the stream (its length, 4 bytes) is ignored.

    Raises InvalidInput for a stream that does not end, or gives more than MAX_VMLINUX_BYTES.
    Measured with 58 MB: 0.1 s (zstd), 0.2 (gzip), 0.8 (xz, lzma), 1.5 (bzip2), 1 to 1.6 (lz4, in
    Python). Call it in a thread.
    """
    try:
        if payload[:4] == b"\x28\xb5\x2f\xfd":
            return zstd(payload, MAX_VMLINUX_BYTES, "the kernel's payload")
        if payload[:6] == b"\xfd7zXZ\x00":
            return _bounded(lzma.LZMADecompressor(lzma.FORMAT_XZ), payload)
        if payload[:2] == b"\x1f\x8b":
            inflater = zlib.decompressobj(wbits=31)
            found = inflater.decompress(payload, MAX_VMLINUX_BYTES)
            return _complete(found, inflater.eof)
        if payload[:3] == b"BZh":
            return _bounded(bz2.BZ2Decompressor(), payload)
        if payload[:3] == b"\x5d\x00\x00":
            return _bounded(lzma.LZMADecompressor(lzma.FORMAT_ALONE), payload)
        if payload[:4] == _LZ4_LEGACY_MAGIC:
            return lz4_legacy(payload)
    except (lzma.LZMAError, zlib.error, OSError, EOFError) as error:
        raise InvalidInput(f"the kernel's payload does not decompress: {error}") from error
    if payload[:4] == b"\x7fELF":
        return payload
    raise InvalidInput(
        f"the kernel's payload has an unknown compression (begins with {payload[:4].hex()})"
    )


def _bounded(decoder: lzma.LZMADecompressor | bz2.BZ2Decompressor, payload: bytes) -> bytes:
    return _complete(decoder.decompress(payload, MAX_VMLINUX_BYTES), decoder.eof)


def _complete(found: bytes, ended: bool) -> bytes:
    if not ended:
        raise InvalidInput("the kernel's payload is cut off or above 512 MiB")
    return found


def zstd(data: bytes, limit_bytes: int, what: str) -> bytes:
    """Return one zstd frame decompressed; `what` names it in the errors."""
    try:
        try:
            from compression import zstd as codec  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            from backports import zstd as codec  # type: ignore[no-redef,unused-ignore]
    except ImportError as error:
        raise Unavailable(
            f"{what} is compressed with zstd and Python has no decoder for it",
            hint="install the Python package backports.zstd",
        ) from error
    decoder = codec.ZstdDecompressor()
    try:
        found: bytes = decoder.decompress(data, limit_bytes)
    except codec.ZstdError as error:
        raise InvalidInput(f"{what} does not decompress: {error}") from error
    if not decoder.eof:
        raise InvalidInput(f"{what} is cut off or above {limit_bytes >> 20} MiB")
    return found


def lz4_legacy(payload: bytes) -> bytes:
    """Return a stream of LZ4's legacy frame decompressed (lz4_Frame_format.md, "Legacy frame").

    The build of the kernel appends the length of what was compressed, which is checked. A stream
    without it that is cut between two blocks looks whole: its ELF tells (`elf.read_elf`).
    """
    out = bytearray()
    position = 4
    while position < len(payload):
        if position + 4 > len(payload):
            raise InvalidInput("the kernel's lz4 payload is cut off")
        (size,) = struct.unpack_from("<I", payload, position)
        word = payload[position : position + 4]
        position += 4
        if word == _LZ4_LEGACY_MAGIC:  # frames may follow each other
            continue
        if position == len(payload):
            if size != len(out):
                raise InvalidInput(
                    f"the kernel's lz4 payload is damaged: it gives {len(out)} bytes, not {size}"
                )
            break
        if size == 0 or position + size > len(payload):
            raise InvalidInput("the kernel's lz4 payload is cut off or damaged")
        _lz4_block(payload[position : position + size], out)
        position += size
        if len(out) > MAX_VMLINUX_BYTES:
            raise InvalidInput("the kernel's payload is cut off or above 512 MiB")
    return bytes(out)


def _lz4_block(block: bytes, out: bytearray) -> None:
    # Matches of the legacy frame do not reach over the start of their block.
    floor = len(out)
    ceiling = floor + _LZ4_BLOCK_BYTES
    position = 0
    try:
        while position < len(block):
            token = block[position]
            position += 1
            literals = token >> 4
            if literals == 15:
                literals, position = _lz4_length(block, position)
            end = position + literals
            if end > len(block) or len(out) + literals > ceiling:
                raise IndexError
            out += block[position:end]
            position = end
            if position == len(block):
                return
            distance = block[position] | block[position + 1] << 8
            position += 2
            length = token & 15
            if length == 15:
                length, position = _lz4_length(block, position)
            length += 4
            here = len(out)
            start = here - distance
            if distance == 0 or start < floor or here + length > ceiling:
                raise IndexError
            if length <= distance:
                out += out[start : start + length]
            else:  # the match overlaps what it makes: a pattern, repeated
                pattern = out[start:]
                out += (pattern * (length // distance + 1))[:length]
    except IndexError as error:
        raise InvalidInput("the kernel's lz4 payload is damaged") from error


def _lz4_length(block: bytes, position: int) -> tuple[int, int]:
    """Return a length of 15 and what the bytes at `position` add, and the place behind them."""
    length = 15
    while True:
        more = block[position]
        position += 1
        length += more
        if more != 255:
            return length, position
