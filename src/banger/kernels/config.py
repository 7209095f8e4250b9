"""A kernel's build configuration: the text, and where an image carries it (IKCONFIG).

Owns the format of .config and of the copy that CONFIG_IKCONFIG puts into a kernel or into its
module `configs`. Reads no file.
"""

from __future__ import annotations

import re
import zlib

from banger.errors import InvalidInput

MAX_CONFIG_BYTES = 4 * 1024 * 1024  # Debian's is 130 to 280 KB
_LINE = re.compile(r"CONFIG_([A-Za-z0-9_]+)=(.*)")
# kernel/configs.c
_BEGIN, _END = b"IKCFG_ST", b"IKCFG_ED"


def parse_config(text: str) -> dict[str, str]:
    """Return the options that are set, without their `CONFIG_`: `y`, `m`, or a value."""
    found = (_LINE.fullmatch(line.strip()) for line in text.splitlines())
    return {match[1]: match[2] for match in found if match}


def checked_config(data: bytes, where: str) -> bytes:
    """Return a configuration's bytes; raise InvalidInput when they are none."""
    if len(data) > MAX_CONFIG_BYTES:
        raise InvalidInput(f"{where} is too large for a kernel's configuration")
    if b"\0" in data or not parse_config(data.decode("utf-8", "replace")):
        raise InvalidInput(
            f"{where} is not a kernel's configuration: no line of it sets a CONFIG_ option",
            hint="take the .config the kernel was built with: `--config FILE`",
        )
    return data


def embedded_config(data: bytes) -> bytes | None:
    """Return the configuration inside an ELF (a kernel's or a module's), None without one."""
    start = 0
    # The markers may stand in strings too: the right one is followed by a gzip stream.
    for _ in range(16):
        start = data.find(_BEGIN + b"\x1f\x8b", start)
        if start < 0:
            return None
        start += len(_BEGIN)
        inflater = zlib.decompressobj(wbits=31)
        try:
            text = inflater.decompress(data[start : start + MAX_CONFIG_BYTES], MAX_CONFIG_BYTES)
        except zlib.error:
            continue
        if inflater.unused_data.startswith(_END) and parse_config(text.decode("utf-8", "replace")):
            return text
    return None
