"""Kernels by name: pull, list, read, delete. The mirror image of `images.pull`."""

from __future__ import annotations

from pathlib import Path

from banger.catalog import kernel_entry
from banger.errors import Conflict
from banger.events import EventSink
from banger.host.commands import HostCommands
from banger.images import artifacts
from banger.images.artifacts import KernelManifest
from banger.kernels.debian import build_debian_kernel
from banger.kernels.parts import install_parts


async def pull_kernel(
    name: str,
    *,
    data_dir: Path,
    cache_dir: Path,  # noqa: ARG001 - the same call as pull_image
    commands: HostCommands,
    sink: EventSink,
    mirror: str | None = None,
    force: bool = False,
) -> KernelManifest:
    """Take the kernel of a catalog entry and install it; cancellation leaves nothing behind.

    A kernel that is installed already raises Conflict unless `force`.
    """
    entry = kernel_entry(name)
    if not force and artifacts.artifact_directory(data_dir, "kernel", name).exists():
        raise Conflict(
            f"kernel {name} is installed already",
            hint=f"`banger kernel pull --force {name}` takes it anew",
        )
    async with artifacts.staging(data_dir, "kernel", name) as staged:
        output = staged / "artifact"
        output.mkdir(mode=0o700)
        work = staged / "work"
        work.mkdir(mode=0o700)
        parts = await build_debian_kernel(
            entry, output, commands=commands, sink=sink, mirror=mirror, work=work
        )
        sink.stage("installing the kernel")
        return await install_parts(
            output,
            data_dir,
            parts,
            name=name,
            origin=f"debian:{entry.suite}/{entry.package}",
            description=entry.description,
            force=force,
        )


def list_kernels(data_dir: Path) -> list[str]:
    """Return the names of installed kernels, corrupted ones too."""
    return artifacts.names(data_dir, "kernel")


def read_kernel(data_dir: Path, name: str) -> KernelManifest:
    """Return an installed kernel's manifest; raise NotFound or Corrupted."""
    return artifacts.read(data_dir, "kernel", name, KernelManifest)


def kernel_directory(data_dir: Path, name: str) -> Path:
    """Return the directory of a kernel's files."""
    return artifacts.artifact_directory(data_dir, "kernel", name)


def delete_kernel(data_dir: Path, name: str) -> None:
    """Remove a kernel; whether a machine uses it is the caller's to know."""
    artifacts.delete(data_dir, "kernel", name)
