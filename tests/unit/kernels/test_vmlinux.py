"""The ELF inside a bzImage, for every compression a kernel is built with."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.errors import BangerError, InvalidInput
from banger.kernels import vmlinux
from tests.support.kernels import bzimage

try:
    from compression import zstd
except ImportError:
    from backports import zstd

ELF = b"\x7fELF" + bytes(range(256)) * 40


def lz4_legacy(data: bytes) -> bytes:
    """Return data as LZ4 literals in one block of a legacy frame."""
    count = len(data) - 15
    block = b"\xf0" + b"\xff" * (count // 255) + bytes([count % 255]) + data
    return b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block


@pytest.mark.parametrize(
    "compress",
    [
        gzip.compress,
        bz2.compress,
        lzma.compress,
        lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
        zstd.compress,
        lz4_legacy,
        lambda data: data,
    ],
    ids=["gzip", "bzip2", "xz", "lzma", "zstd", "lz4", "none"],
)
def test_every_compression_gives_the_elf(compress) -> None:
    # The build appends the length of the kernel to the compressed stream.
    payload = compress(ELF) + (struct.pack("<I", len(ELF)) if compress(ELF) != ELF else b"")
    assert vmlinux.extract_vmlinux(bzimage(payload)) == ELF


def test_an_elf_is_taken_as_it_is() -> None:
    assert vmlinux.extract_vmlinux(ELF) == ELF


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"MZ" * 600,
        bzimage(gzip.compress(ELF))[:3000],
        bzimage(gzip.compress(ELF), version=0x0201),
        bzimage(b"\x1f\x8b garbage"),
        bzimage(gzip.compress(ELF)[:-400]),
        bzimage(lzma.compress(ELF)[:-50]),
        bzimage(zstd.compress(ELF)[:-10]),
        bzimage(bz2.compress(ELF)[:-10]),
        bzimage(lzma.compress(ELF, format=lzma.FORMAT_ALONE)[:-50]),
        bzimage(lz4_legacy(ELF)[:-10]),
        bzimage(lz4_legacy(ELF) + struct.pack("<I", len(ELF) + 1)),
        bzimage(lz4_legacy(ELF) + b"\x01\x02"),
        bzimage(gzip.compress(b"no elf")),
        bzimage(b"????" * 10),
        bzimage(b"\x02\x21\x4c\x18" + struct.pack("<I", 4) + b"\x01A\xff\xff"),
    ],
)
def test_what_is_no_kernel_is_refused(image: bytes) -> None:
    with pytest.raises(InvalidInput):
        vmlinux.extract_vmlinux(image)


@given(st.binary(max_size=200), st.sampled_from([b"\x02\x21\x4c\x18", b"BZh", b"\x1f\x8b", b""]))
def test_noise_never_raises_anything_but_a_designed_error(noise: bytes, magic: bytes) -> None:
    try:
        vmlinux.extract_vmlinux(bzimage(magic + noise))
    except BangerError:
        pass


def test_lz4_matches_may_overlap_themselves() -> None:
    # literals "ab", then a match 2 back of 10 bytes, then literals "END__"
    block = b"\x26ab\x02\x00" + b"\x50END__"
    frame = b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block
    assert vmlinux.lz4_legacy(frame) == b"ab" * 6 + b"END__"


def test_lz4_frames_may_follow_each_other() -> None:
    assert vmlinux.lz4_legacy(lz4_legacy(ELF) + lz4_legacy(ELF)) == ELF * 2


@pytest.mark.parametrize("kind", ["match", "literals"])
def test_an_lz4_block_gives_no_more_than_a_block_holds(kind: str) -> None:
    # A length is as many bytes of 255 as one likes: 40 KB of block would be 10 MB.
    long = b"\xff" * 40_000 + b"\x00"
    block = b"\x1fa\x01\x00" + long if kind == "match" else b"\xf0" + long + bytes(10_200_015)
    frame = b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block
    with pytest.raises(InvalidInput, match="damaged"):
        vmlinux.lz4_legacy(frame)
