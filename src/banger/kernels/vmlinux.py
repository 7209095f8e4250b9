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
    """Return a payload decompressed; what follows the stream (its length, 4 bytes) is ignored."""
    try:
        if payload[:4] == b"\x28\xb5\x2f\xfd":
            return _zstd(payload)
        if payload[:6] == b"\xfd7zXZ\x00":
            return _bounded(lzma.LZMADecompressor(lzma.FORMAT_XZ), payload)
        if payload[:2] == b"\x1f\x8b":
            inflater = zlib.decompressobj(wbits=31)
            found = inflater.decompress(payload, MAX_VMLINUX_BYTES)
            return _complete(found, inflater.eof)
        if payload[:3] == b"BZh":
            return _bounded(bz2.BZ2Decompressor(), payload)
        if payload[:3] == b"\x5d\x00\x00":
            return _bounded(lzma.LZMADecompressor(lzma.FORMAT_ALONE), payload, has_end=False)
        if payload[:4] == b"\x02\x21\x4c\x18":
            return lz4_legacy(payload)
    except (lzma.LZMAError, zlib.error, OSError, EOFError) as error:
        raise InvalidInput(f"the kernel's payload does not decompress: {error}") from error
    if payload[:4] == b"\x7fELF":
        return payload
    raise InvalidInput(
        f"the kernel's payload has an unknown compression (begins with {payload[:4].hex()})"
    )


def _bounded(
    decoder: lzma.LZMADecompressor | bz2.BZ2Decompressor, payload: bytes, *, has_end: bool = True
) -> bytes:
    return _complete(decoder.decompress(payload, MAX_VMLINUX_BYTES), decoder.eof or not has_end)


def _complete(found: bytes, ended: bool) -> bytes:
    if not ended:
        raise InvalidInput("the kernel's payload is cut off or above 512 MiB")
    return found


def _zstd(payload: bytes) -> bytes:
    try:
        try:
            from compression import zstd  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            from backports import zstd  # type: ignore[no-redef,unused-ignore]
    except ImportError as error:
        raise Unavailable(
            "the kernel is compressed with zstd and Python has no decoder for it",
            hint="install the Python package backports.zstd",
        ) from error
    decoder = zstd.ZstdDecompressor()
    try:
        found: bytes = decoder.decompress(payload, MAX_VMLINUX_BYTES)
    except zstd.ZstdError as error:
        raise InvalidInput(f"the kernel's payload does not decompress: {error}") from error
    return _complete(found, decoder.eof)


def lz4_legacy(payload: bytes) -> bytes:
    """Return a stream of LZ4's legacy frame decompressed (lz4_Frame_format.md, "Legacy frame")."""
    out = bytearray()
    position = 4
    while position + 4 <= len(payload):
        (size,) = struct.unpack_from("<I", payload, position)
        position += 4
        # The last word is the length of the kernel, which the build appends to the payload.
        if size == 0 or position + size > len(payload):
            break
        _lz4_block(memoryview(payload)[position : position + size], out)
        position += size
        if len(out) > MAX_VMLINUX_BYTES:
            raise InvalidInput("the kernel's payload is above 512 MiB")
    return bytes(out)


def _lz4_block(block: memoryview, out: bytearray) -> None:
    # Matches of the legacy frame do not reach over the start of their block.
    floor = len(out)
    position = 0
    try:
        while position < len(block):
            token = block[position]
            literals, position = _lz4_length(block, position + 1, token >> 4)
            if position + literals > len(block):
                raise IndexError
            out += block[position : position + literals]
            position += literals
            if position == len(block):
                return
            distance = block[position] | block[position + 1] << 8
            length, position = _lz4_length(block, position + 2, token & 15)
            length += 4
            start = len(out) - distance
            if distance == 0 or start < floor:
                raise IndexError
            while length > 0:  # a match may overlap what it makes
                piece = out[start : start + length]
                out += piece
                start += len(piece)
                length -= len(piece)
    except IndexError as error:
        raise InvalidInput("the kernel's lz4 payload is damaged") from error


def _lz4_length(block: memoryview, position: int, length: int) -> tuple[int, int]:
    if length == 15:
        while True:
            more = block[position]
            position += 1
            length += more
            if more != 255:
                break
    return length, position
