"""Images by name: pull, list, read, delete.

Owns the order of a pull (stage, build, check, measure, install) and joins mmdebstrap to
mke2fs by a pipe, so a root file system is written once. Leaves joining concurrent pulls
of one name to the daemon's operations.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from banger.catalog import DebianImage, image_entry
from banger.errors import Conflict
from banger.events import EventSink
from banger.host.commands import HostCommands
from banger.host.tasks import piped
from banger.images import artifacts
from banger.images.artifacts import ImageManifest
from banger.images.debian import write_debian_tar
from banger.images.ext4 import build_ext4

ROOTFS = "rootfs.ext4"


async def pull_image(
    name: str,
    *,
    data_dir: Path,
    cache_dir: Path,
    commands: HostCommands,
    sink: EventSink,
    mirror: str | None = None,
    force: bool = False,
    entry: DebianImage | None = None,
) -> ImageManifest:
    """Make the image of a catalog entry and install it; cancellation leaves nothing behind.

    `entry` is the one of another catalog than the built-in. An image that is installed already
    raises Conflict unless `force`.
    """
    entry = entry or _built_in(name)
    if not force and artifacts.artifact_directory(data_dir, "image", name).exists():
        raise Conflict(
            f"image {name} is installed already",
            hint=f"`banger image pull --force {name}` makes it anew",
        )
    async with artifacts.staging(data_dir, "image", name) as staged:
        rootfs = staged / "artifact" / ROOTFS
        rootfs.parent.mkdir(mode=0o700)
        work = staged / "work"
        work.mkdir(mode=0o700)
        packages, extras = await _build_rootfs(
            entry, rootfs, commands=commands, sink=sink, mirror=mirror, work=work,
            cache_dir=cache_dir,
        )  # fmt: skip
        sink.stage("installing the image")
        rootfs.chmod(0o444)
        digest = await artifacts.digest_file(rootfs)
        files, allocated = artifacts.measure(rootfs.parent)
        manifest = ImageManifest(
            name=name,
            digest=digest,
            size_bytes=files[ROOTFS],
            allocated_bytes=allocated,
            origin=f"debian:{entry.suite}",
            description=entry.description,
            created_at=artifacts.now_rfc3339(),
            files=files,
            packages=packages,
            extras=extras,
        )
        await asyncio.to_thread(
            artifacts.install, rootfs.parent, data_dir, "image", manifest, force=force
        )
    return manifest


def _built_in(name: str) -> DebianImage:
    entry = image_entry(name)
    if not isinstance(entry, DebianImage):
        raise TypeError(f"{name} is not made of packages")
    return entry


async def _build_rootfs(
    entry: DebianImage,
    rootfs: Path,
    *,
    commands: HostCommands,
    sink: EventSink,
    mirror: str | None,
    work: Path,
    cache_dir: Path,
) -> tuple[dict[str, str], dict[str, str]]:
    made: tuple[dict[str, str], dict[str, str]] = ({}, {})

    async def produce(write_fd: int) -> None:
        nonlocal made
        made = await write_debian_tar(
            entry, write_fd, commands=commands, sink=sink, mirror=mirror, work=work,
            cache_dir=cache_dir,
        )  # fmt: skip

    async def consume(read_fd: int) -> None:
        await build_ext4(
            read_fd, rootfs, size_bytes=entry.capacity_mib * 1024 * 1024,
            label=entry.name, commands=commands, sink=sink, work=work,
        )  # fmt: skip

    await piped(produce, consume)
    return made


def list_images(data_dir: Path) -> list[str]:
    """Return the names of installed images, corrupted ones too."""
    return artifacts.names(data_dir, "image")


def read_image(data_dir: Path, name: str) -> ImageManifest:
    """Return an installed image's manifest; raise NotFound or Corrupted."""
    return artifacts.read(data_dir, "image", name, ImageManifest)


def rootfs_path(data_dir: Path, name: str) -> Path:
    """Return the path of an installed image's root file system; raise as `read_image` does."""
    return artifacts.rootfs_of(data_dir, read_image(data_dir, name))


def delete_image(data_dir: Path, name: str) -> None:
    """Remove an image; whether a machine uses it is the caller's to know."""
    artifacts.delete(data_dir, "image", name)
