"""Values checked once at the edge: names and sizes.

Light on purpose: the command line's hot path imports it.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from banger.errors import InvalidInput

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_NAME_LIMIT = 63  # a DNS label, RFC 1035 section 2.3.4
_SIZE = re.compile(r"\s*([0-9]{1,19}(?:\.[0-9]{1,19})?)\s*([kmgt]?)(i?b?)\s*", re.IGNORECASE)
_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_MIB = 1 << 20
_GIB = 1 << 30

_MEMORY_FLOOR_BYTES = 128 * _MIB  # Debian's kernel and systemd do not come up with less
_DISK_FLOOR_BYTES = 256 * _MIB
_DISK_CEILING_BYTES = 16 << 40  # ext4 with 4 KiB blocks and 32-bit block numbers
_VCPU_CEILING = 64

NETWORK_MODES = ("user", "bridge", "none")

_ADJECTIVES = (
    "amber bold brave brisk calm clever cosmic crisp daring eager early fair fast fierce gentle "
    "glad golden grand happy humble jolly keen kind lively lucky mellow merry mighty misty neat "
    "nimble noble plucky proud quick quiet rapid ready royal rustic sharp shiny silent silver "
    "smart snug solid spry steady still sunny swift tidy tiny vivid warm wild wise witty zesty"
).split()
_NOUNS = (
    "badger beaver bison bobcat condor coyote crane cricket dingo dolphin eagle egret falcon "
    "ferret finch fox gecko gibbon hare hawk heron ibex ibis jackal jay kestrel koala lark lemur "
    "llama lynx magpie marmot marten mole moose newt ocelot orca osprey otter owl panda parrot "
    "pelican pika puffin quail rabbit raven robin seal shrew sparrow squid stork swan tapir tern "
    "toad vole weasel wombat wren yak"
).split()


class HostLimits(NamedTuple):
    """What this host has, against which sizes are checked."""

    cpus: int
    memory_bytes: int
    disk_free_bytes: int


def host_limits(directory: str) -> HostLimits:
    """Return this host's CPUs, memory, and the free space of the file system of `directory`."""
    space = os.statvfs(directory)
    return HostLimits(
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        disk_free_bytes=space.f_bavail * space.f_frsize,
    )


def default_vcpu(limits: HostLimits) -> int:
    """Return half of the host's CPUs, at least 2 where there are 2, at most 8."""
    return max(min(2, limits.cpus), min(8, limits.cpus // 2))


def default_memory_bytes(limits: HostLimits) -> int:
    """Return a quarter of the host's memory in whole 256 MiB, from 512 MiB to 8 GiB."""
    quarter = limits.memory_bytes // 4 // (256 * _MIB) * (256 * _MIB)
    return min(max(quarter, 512 * _MIB), 8 * _GIB)


def default_disk_size_bytes(limits: HostLimits) -> int:
    """Return what a VM's sparse disk may grow to: half of the free space, 8 to 64 GiB."""
    half = limits.disk_free_bytes // 2 // _GIB * _GIB
    return min(max(half, 8 * _GIB), 64 * _GIB)


def check_vm_name(name: str) -> str:
    """Return a VM's name; raise InvalidInput unless it is a lower-case DNS label with a letter."""
    if not name:
        raise InvalidInput("a VM's name cannot be empty", hint="leave --name out to get one")
    if len(name) > _NAME_LIMIT:
        raise InvalidInput(
            f"the name {name[:20]}... has {len(name)} characters; {_NAME_LIMIT} are allowed",
            hint="choose a shorter --name",
        )
    if not _NAME.fullmatch(name) or name.isdigit():
        suggestion = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        usable = suggestion and not suggestion.isdigit()
        raise InvalidInput(
            f"{name!r} is not a VM name: use a-z, 0-9 and inner '-', with at least one letter",
            hint=f"for example --name {suggestion if usable else 'sandbox'}",
        )
    return name


def generate_name(taken: set[str]) -> str:
    """Return a name like `brisk-otter` that is not in `taken`."""
    import secrets

    while True:
        name = f"{secrets.choice(_ADJECTIVES)}-{secrets.choice(_NOUNS)}"
        if name in taken and len(taken) > len(_ADJECTIVES):
            name = f"{name}-{secrets.token_hex(2)}"
        if name not in taken:
            return name


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `512M`, `2GiB`, `1.5g` or `4096` (bytes).

    Units are powers of 1024, as for every VM tool; raises InvalidInput.
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise InvalidInput(f"{text!r} is not a size", hint="write it like 512M, 2G or 1.5GiB")
    if "." in found[1] and not found[2]:
        raise InvalidInput(f"{text!r} is not a whole number of bytes", hint="give it a unit: 1.5G")
    whole, _, fraction = found[1].partition(".")
    shift = _UNITS[found[2].lower()]
    # Integers only: a float would round large sizes.
    part = (int(fraction) << shift) // 10 ** len(fraction) if fraction else 0
    return (int(whole) << shift) + part


def format_size(size_bytes: int) -> str:
    """Return a size for people: `512 MiB`, `1.5 GiB`."""
    value, unit = float(size_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    text = f"{value:.1f}".removesuffix(".0") if unit != "B" else str(size_bytes)
    return f"{text} {unit}"


def check_vcpu(count: int, limits: HostLimits) -> int:
    """Return a vCPU count; raise InvalidInput below 1 or far above what the host has."""
    ceiling = min(_VCPU_CEILING, max(2 * limits.cpus, 2))
    if not 1 <= count <= ceiling:
        raise InvalidInput(
            f"{count} vCPUs are not possible here: 1 to {ceiling}",
            hint=f"this host has {limits.cpus} CPUs; try --vcpu {default_vcpu(limits)}",
        )
    return count


def check_memory(size_bytes: int, limits: HostLimits) -> int:
    """Return a memory size in whole MiB; raise InvalidInput outside 128 MiB to the host's own."""
    if not _MEMORY_FLOOR_BYTES <= size_bytes <= limits.memory_bytes:
        raise InvalidInput(
            f"{_shown(size_bytes)} of memory is not possible here: "
            f"{format_size(_MEMORY_FLOOR_BYTES)} to {format_size(limits.memory_bytes)}",
            hint=f"try --memory {default_memory_bytes(limits) // _MIB}M",
        )
    return size_bytes // _MIB * _MIB


def check_disk_size(size_bytes: int) -> int:
    """Return a disk size in whole MiB; raise InvalidInput outside 256 MiB to 16 TiB.

    A disk is sparse, so it may be larger than what is free.
    """
    if not _DISK_FLOOR_BYTES <= size_bytes <= _DISK_CEILING_BYTES:
        raise InvalidInput(
            f"a disk of {_shown(size_bytes)} is not possible: "
            f"{format_size(_DISK_FLOOR_BYTES)} to {format_size(_DISK_CEILING_BYTES)}",
            hint="try --disk-size 20G",
        )
    return size_bytes // _MIB * _MIB


def _shown(size_bytes: int) -> str:
    return format_size(size_bytes) if size_bytes > 0 else f"{size_bytes} bytes"
