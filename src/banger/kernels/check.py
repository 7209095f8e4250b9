"""An installed kernel held against what machines and Docker need.

Owns reading an artifact back: its configuration, its ELF, and which modules really are in its
files (modules.ext4 through debugfs, by inode number; nothing is mounted). `features` judges.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import re
from pathlib import Path
from typing import NamedTuple

from banger.errors import Corrupted, InvalidInput
from banger.host.commands import HostCommands
from banger.images import artifacts
from banger.images.artifacts import KernelManifest
from banger.kernels.config import MAX_CONFIG_BYTES, parse_config
from banger.kernels.elf import read_elf
from banger.kernels.features import Finding, check_features
from banger.kernels.modules import module_name
from banger.kernels.parts import BOOT_MODULES, CONFIG, MODULES, VMLINUX
from banger.kernels.tree import MAX_DEPTH, MAX_ENTRIES, is_module

_ROOT_INODE = 2
# `ls -p` of debugfs: /inode/mode/uid/gid/name/size/
_LISTED = re.compile(r"/(\d+)/(\d{6})/\d+/\d+/([^/]*)/(\d*)/")


class KernelReport(NamedTuple):
    """What was found out about a kernel."""

    release: str
    has_config: bool
    findings: list[Finding]


async def check_kernel(data_dir: Path, name: str, *, commands: HostCommands) -> KernelReport:
    """Compare an installed kernel with the table; raise NotFound or Corrupted."""
    manifest = await asyncio.to_thread(artifacts.read, data_dir, "kernel", name, KernelManifest)
    directory = artifacts.artifact_directory(data_dir, "kernel", name)
    text = await asyncio.to_thread(read_config, data_dir, name)
    pvh = await asyncio.to_thread(_has_pvh, directory / VMLINUX, name)
    found = await list_modules(directory / MODULES, commands=commands)
    early = {
        path.name.removesuffix(".ko") for path in (directory / BOOT_MODULES).glob("*.ko")
    } & set(manifest.boot_modules)
    findings = check_features(
        parse_config(text),
        early_modules=frozenset(early),
        modules=frozenset(module_name(path) for path in found),
        pvh=pvh,
    )
    return KernelReport(manifest.release, bool(text.strip()), findings)


def read_config(data_dir: Path, name: str) -> str:
    """Return an installed kernel's configuration, empty when nobody knew it."""
    artifacts.read(data_dir, "kernel", name, KernelManifest)
    path = artifacts.artifact_directory(data_dir, "kernel", name) / CONFIG
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read(MAX_CONFIG_BYTES).decode("utf-8", "replace")
    return ""


def _has_pvh(vmlinux: Path, name: str) -> bool:
    try:
        with (
            open(vmlinux, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return read_elf(data).pvh
    except (InvalidInput, ValueError) as error:  # ValueError: mmap of an empty file
        raise Corrupted(
            f"kernel {name} is corrupted: its vmlinux does not read: {error}",
            hint=f"`banger kernel rm {name}` removes it",
        ) from error


async def list_modules(image: Path, *, commands: HostCommands) -> list[str]:
    """Return the names of the module files in a modules.ext4 that hold anything.

    A run of debugfs per level of directories: it takes no recursive listing. Directories are
    named by inode number, so no name in there becomes a word of a command.
    """
    found: list[str] = []
    level, seen = [_ROOT_INODE], {_ROOT_INODE}
    for _ in range(MAX_DEPTH + 1):
        if not level:
            return found
        script = "".join(f"ls -p <{inode}>\n" for inode in level)
        done = await commands.run(
            ["debugfs", "-f", "-", str(image)], stdin=script.encode("ascii"), timeout_s=60
        )
        level = []
        for inode, mode, name, size in _LISTED.findall(done.stdout.decode("utf-8", "replace")):
            if mode.startswith("04") and name not in (".", "..") and int(inode) not in seen:
                seen.add(int(inode))
                level.append(int(inode))
            elif mode.startswith("10") and is_module(name) and int(size or 0) > 0:
                found.append(name)
        if len(seen) + len(found) > MAX_ENTRIES:
            break
    raise Corrupted(f"{image} has more directories or files than a kernel's modules have")
