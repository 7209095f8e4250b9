"""The ELF of a kernel: what is read of it, and what is refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.errors import BangerError, InvalidInput
from banger.kernels.elf import read_elf
from tests.support.kernels import RELEASE, make_elf


def test_release_and_pvh_entry_are_read() -> None:
    assert read_elf(make_elf()) == (RELEASE, True)
    assert read_elf(make_elf("5.10.1+x", pvh=False)) == ("5.10.1+x", False)


def _with(offset: int, shape: str, value: int) -> bytes:
    data = bytearray(make_elf())
    struct.pack_into(shape, data, offset, value)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "not an ELF"),
        (b"\x7fELF", "not an ELF"),
        (make_elf(machine=183), "not for x86-64"),  # aarch64
        (_with(4, "B", 1), "not for x86-64"),  # 32 bits
        (_with(16, "<H", 1), "object file"),
        (_with(56, "<H", 0), "program headers"),
        (_with(56, "<H", 65535), "program headers"),
        (_with(32, "<Q", 1 << 62), "program headers"),
        (_with(64 + 32, "<Q", 1 << 63), "cut off"),
        (make_elf()[:-20], "cut off"),
        (_with(64, "<I", 9), "nothing to load"),
        (make_elf().replace(b"Linux version", b"Minix version"), "not a Linux kernel"),
        (make_elf("../../etc/x"), "not a Linux kernel"),
    ],
)
def test_what_no_vmm_of_ours_starts_is_refused(data: bytes, told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        read_elf(data)


@given(st.integers(0, 64 + 112 - 1), st.binary(min_size=1, max_size=16))
def test_damaged_headers_never_raise_anything_but_a_designed_error(at: int, noise: bytes) -> None:
    data = bytearray(make_elf())
    data[at : at + len(noise)] = noise
    try:
        read_elf(bytes(data))
    except BangerError:
        pass
