"""Kernels small enough to make a hundred of: an ELF that says it is one, and its surroundings."""

from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path

from banger.kernels.features import FEATURES

RELEASE = "6.1.0-test"
_PVH = struct.pack("<III4sQ", 4, 8, 18, b"Xen\0", 0x1000000)
_OTHER_NOTE = struct.pack("<III8sI", 6, 4, 257, b"Linux\0\0\0", 0)


def make_elf(
    release: str = RELEASE,
    *,
    content: bytes = b"",
    config: str | None = None,
    pvh: bool = True,
    machine: int = 62,
) -> bytes:
    """Return an ELF64 program with a kernel's banner, notes and, when asked, its IKCONFIG."""
    notes = _OTHER_NOTE + (_PVH if pvh else b"")
    body = f"Linux version {release} (test@test) #1 SMP\n\0".encode() + content
    if config is not None:
        body += b"IKCFG_ST IKCFG_ST" + gzip.compress(config.encode()) + b"IKCFG_ED"
    start = 64 + 2 * 56
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(b"\x7fELF\x02\x01\x01" + bytes(9), 2, machine, 1, 0x1000000, 64, 0, 0),
        *(64, 56, 2, 0, 0, 0),
    )
    load = struct.pack("<IIQQQQQQ", 1, 5, start, 0, 0, len(body), len(body), 4096)
    at = start + len(body)
    note = struct.pack("<IIQQQQQQ", 4, 4, at, 0, 0, len(notes), len(notes), 4)
    return header + load + note + body + notes


def small_elf(vmlinux: Path) -> bytes:
    """Return an ELF with 6 MiB of a real kernel's code: what compressors are made for."""
    data = vmlinux.read_bytes()
    release = re.search(rb"Linux version (\S+) ", data)
    assert release is not None
    return make_elf(release[1].decode(), content=data[0x200000:0x800000])


def bzimage(payload: bytes, *, version: int = 0x020F) -> bytes:
    """Return a kernel image with a setup of four sectors before its payload."""
    setup = bytearray(512 * 5)
    setup[0x1F1] = 4
    struct.pack_into("<H", setup, 0x1FE, 0xAA55)
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, version)
    struct.pack_into("<II", setup, 0x248, 64, len(payload))
    return bytes(setup) + bytes(64) + payload + b"after"


def full_config(**changes: str) -> str:
    """Return a configuration with every row of the table built in; `changes` are y, m or n."""
    options = {option: "y" for row in FEATURES for option, _ in row.options} | changes
    return "".join(
        f"# CONFIG_{name} is not set\n" if value == "n" else f"CONFIG_{name}={value}\n"
        for name, value in options.items()
    )


def make_module(release: str = RELEASE) -> bytes:
    """Return what passes for a module of a kernel."""
    return b"\x7fELF" + bytes(60) + f"\0vermagic={release} SMP mod_unload \0".encode()
