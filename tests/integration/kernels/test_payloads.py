"""Images as the real compressors of a kernel's build make them."""

from __future__ import annotations

import functools
import struct
import subprocess

import pytest

from banger.errors import InvalidInput
from banger.kernels import vmlinux
from banger.kernels.elf import read_elf
from tests.support.artifacts import need_kernel
from tests.support.kernels import bzimage, make_elf, small_elf

pytestmark = pytest.mark.integration

# arch/x86/boot/compressed/Makefile and scripts/Makefile.lib, with less effort for xz and lzma.
ENCODERS = {
    "gzip": ["gzip", "-n", "-9", "-c"],
    "bzip2": ["bzip2", "-9", "-c"],
    "xz": ["xz", "--check=crc32", "--x86", "--lzma2=preset=1", "-c"],
    "lzma": ["xz", "--format=lzma", "-1", "-c"],
    "lz4": ["lz4", "-l", "-9", "-c"],
    "lz4-fast": ["lz4", "-l", "-1", "-c"],
    "zstd": ["zstd", "-22", "--ultra", "-c"],
}
KINDS = pytest.mark.parametrize("kind", ENCODERS)


@pytest.fixture(scope="module")
def elf() -> bytes:
    return small_elf(need_kernel() / "vmlinux")


@functools.cache
def encode(kind: str, data: bytes) -> bytes:
    return subprocess.run(ENCODERS[kind], input=data, capture_output=True, check=True).stdout


@KINDS
def test_what_a_real_encoder_made_gives_the_elf(kind: str, elf: bytes) -> None:
    stream = encode(kind, elf)
    assert len(stream) < len(elf) * 0.75  # it was compressed, not stored
    # The build appends the length (gzip has it of its own).
    for payload in (stream + struct.pack("<I", len(elf)), stream):
        assert vmlinux.extract_vmlinux(bzimage(payload)) == elf


@pytest.mark.parametrize("kind", ["gzip", "lz4"])  # of the others the small one tells as much
def test_a_whole_kernel_gives_itself(kind: str) -> None:
    whole = (need_kernel() / "vmlinux").read_bytes()
    image = bzimage(encode(kind, whole) + struct.pack("<I", len(whole)))
    assert vmlinux.extract_vmlinux(image) == whole


@KINDS
@pytest.mark.parametrize("part", [0.01, 0.5, 0.999])
def test_a_cut_stream_is_refused(kind: str, part: float, elf: bytes) -> None:
    stream = encode(kind, elf)
    cut = stream[: int(len(stream) * part)]
    with pytest.raises(InvalidInput):
        read_elf(vmlinux.extract_vmlinux(bzimage(cut)))


def test_an_lz4_stream_cut_between_blocks_is_noticed(elf: bytes) -> None:
    whole = make_elf(content=elf + elf)
    stream = encode("lz4", whole)
    (size,) = struct.unpack_from("<I", stream, 4)
    cut = stream[: 8 + size]
    assert len(cut) < len(stream)
    # Its length, where the build appended it, tells; else that the ELF ends before its segments.
    with pytest.raises(InvalidInput, match="damaged"):
        vmlinux.extract_vmlinux(bzimage(cut + struct.pack("<I", len(whole))))
    found = vmlinux.extract_vmlinux(bzimage(cut))
    with pytest.raises(InvalidInput, match="cut off"):
        read_elf(found)


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", "zstd"])  # lzma and lz4 have no sum
def test_a_flipped_bit_is_refused(kind: str, elf: bytes) -> None:
    stream = bytearray(encode(kind, elf))
    stream[len(stream) // 2] ^= 0x10
    with pytest.raises(InvalidInput):
        vmlinux.extract_vmlinux(bzimage(bytes(stream) + struct.pack("<I", len(elf))))


@KINDS
def test_a_bomb_ends_at_the_bound(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vmlinux, "MAX_VMLINUX_BYTES", 32 << 20)
    bomb = encode(kind, b"\x7fELF" + bytes(64 << 20))
    assert len(bomb) < 1 << 20
    with pytest.raises(InvalidInput, match="above 512 MiB|above 32 MiB"):
        vmlinux.extract_vmlinux(bzimage(bomb))
