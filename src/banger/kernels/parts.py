"""The files of a kernel's artifact, whoever makes it.

    vmlinux                 the ELF kernel
    config                  its build configuration (empty when nobody knew it)
    modules.ext4            the content of /lib/modules/<release>, read-only
    boot-modules/NAME.ko    what the initramfs loads, uncompressed
    boot-modules/list       their names in load order, one a line

Owns their names and the end of every making: measured, described, renamed into place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from banger.images import artifacts
from banger.images.artifacts import KernelManifest
from banger.kernels.modules import decompress_module, module_name

VMLINUX = "vmlinux"
CONFIG = "config"
MODULES = "modules.ext4"
MODULES_LABEL = "banger-mods"
BOOT_MODULES = "boot-modules"
BOOT_LIST = "list"


class KernelParts(NamedTuple):
    """What was found in a kernel's tree."""

    release: str
    boot_modules: tuple[str, ...]


def write_boot_modules(
    output: Path, order: Sequence[str], read: Callable[[str], bytes]
) -> tuple[str, ...]:
    """Write the modules of the initramfs, given by path in load order, and return their names."""
    directory = output / BOOT_MODULES
    directory.mkdir(mode=0o755)
    for path in order:
        name = module_name(path)
        (directory / f"{name}.ko").write_bytes(decompress_module(path, read(path)))
    names = tuple(module_name(path) for path in order)
    (directory / BOOT_LIST).write_text("".join(f"{name}\n" for name in names))
    return names


async def install_parts(
    output: Path,
    data_dir: Path,
    parts: KernelParts,
    *,
    name: str,
    origin: str,
    description: str,
    force: bool,
) -> KernelManifest:
    """Install a directory of a kernel's files under a name; see `artifacts.install`."""
    digest = await artifacts.digest_file(output / VMLINUX)
    (output / MODULES).chmod(0o444)
    files, allocated = artifacts.measure(output)
    manifest = KernelManifest(
        name=name,
        release=parts.release,
        digest=digest,
        size_bytes=sum(files.values()),
        allocated_bytes=allocated,
        origin=origin,
        description=description,
        created_at=artifacts.now_rfc3339(),
        files=files,
        boot_modules=parts.boot_modules,
    )
    await asyncio.to_thread(artifacts.install, output, data_dir, "kernel", manifest, force=force)
    return manifest
