"""The ELF of a kernel: is it one that our VMMs boot, and what does it say of itself.

Owns the header, the program headers and the notes of an ELF64; every offset is checked against
the file, which may come from anywhere. Reads no file.
"""

from __future__ import annotations

import mmap
import re
import struct
from typing import NamedTuple

from banger.errors import InvalidInput

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")  # elf(5), Elf64_Ehdr
_SEGMENT = struct.Struct("<IIQQQQQQ")  # Elf64_Phdr
_NOTE = struct.Struct("<III")  # Elf64_Nhdr
_X86_64, _EXECUTABLE, _SHARED = 62, 2, 3
_LOAD, _NOTES = 1, 4
_MAX_SEGMENTS = 64
_MAX_NOTES_BYTES = 1024 * 1024
_PVH_ENTRY = 18  # XEN_ELFNOTE_PHYS32_ENTRY, xen/include/public/elfnote.h
# init/version.c: the release, then who built it.
_BANNER = re.compile(rb"Linux version ([0-9A-Za-z][0-9A-Za-z._+~-]{0,63}) ")


class Elf(NamedTuple):
    """What was read. `pvh` tells whether it has the entry that QEMU's microvm starts it by."""

    release: str
    pvh: bool


def read_elf(data: bytes | mmap.mmap) -> Elf:
    """Return what a kernel's ELF says; raise InvalidInput unless it is a whole one for x86-64."""
    if len(data) < _HEADER.size or data[:4] != b"\x7fELF":
        raise InvalidInput("the kernel is not an ELF")
    ident, kind, machine, _, _, table, _, _, _, size, count, _, _, _ = _HEADER.unpack_from(data)
    if (ident[4], ident[5], machine) != (2, 1, _X86_64):
        raise InvalidInput(
            "the kernel is not for x86-64", hint="banger runs x86-64 machines: take such a kernel"
        )
    if kind not in (_EXECUTABLE, _SHARED):
        raise InvalidInput("the kernel's ELF is not a program (is it an object file?)")
    if size != _SEGMENT.size or not 0 < count <= _MAX_SEGMENTS or table + size * count > len(data):
        raise InvalidInput("the kernel's ELF is damaged: its program headers do not read")
    loaded = pvh = False
    for index in range(count):
        type_, _, offset, _, _, in_file, _, _ = _SEGMENT.unpack_from(data, table + index * size)
        if type_ in (_LOAD, _NOTES) and offset + in_file > len(data):
            raise InvalidInput("the kernel's ELF is cut off: a segment ends beyond its end")
        loaded = loaded or type_ == _LOAD
        if type_ == _NOTES and in_file <= _MAX_NOTES_BYTES:
            pvh = pvh or _has_pvh_entry(data[offset : offset + in_file])
    if not loaded:
        raise InvalidInput("the kernel's ELF is damaged: there is nothing to load in it")
    found = _BANNER.search(data)
    if found is None:
        raise InvalidInput("the ELF is not a Linux kernel: it does not name its version")
    return Elf(found[1].decode("ascii"), pvh)


def _has_pvh_entry(notes: bytes) -> bool:
    position = 0
    while position + _NOTE.size <= len(notes):
        name_bytes, data_bytes, kind = _NOTE.unpack_from(notes, position)
        name_at = position + _NOTE.size
        if notes[name_at : name_at + name_bytes] == b"Xen\0" and kind == _PVH_ENTRY:
            return True
        position = name_at + -(-name_bytes // 4) * 4 + -(-data_bytes // 4) * 4
    return False
