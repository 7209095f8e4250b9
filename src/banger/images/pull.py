"""Images by name: pull, list, read, delete.

Owns the order of a pull (stage, build, check, measure, install) and joins mmdebstrap to
mke2fs by a pipe, so a root file system is written once. Leaves joining concurrent pulls
of one name to the daemon's operations.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from banger.catalog import DebianImage, image_entry
from banger.errors import Conflict
from banger.events import EventSink
from banger.host.commands import HostCommands
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
) -> ImageManifest:
    """Make the image of a catalog entry and install it; cancellation leaves nothing behind.

    An image that is installed already raises Conflict unless `force`.
    """
    entry = image_entry(name)
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
    read_fd, write_fd = os.pipe()

    async def produce() -> tuple[dict[str, str], dict[str, str]]:
        try:
            return await write_debian_tar(
                entry, write_fd, commands=commands, sink=sink, mirror=mirror, work=work,
                cache_dir=cache_dir,
            )  # fmt: skip
        finally:
            os.close(write_fd)  # mke2fs sees the end of the tar

    async def consume() -> None:
        try:
            await build_ext4(
                read_fd, rootfs, size_bytes=entry.capacity_mib * 1024 * 1024,
                label=entry.name, commands=commands, sink=sink, work=work,
            )  # fmt: skip
        finally:
            os.close(read_fd)  # mmdebstrap sees that nobody reads any more

    producer = asyncio.create_task(produce())
    consumer = asyncio.create_task(consume())
    try:
        # The first failure is the cause: a dead reader fails the writer, an early end the reader.
        await asyncio.wait({producer, consumer}, return_when=asyncio.FIRST_EXCEPTION)
        for task in (producer, consumer):
            if task.done() and task.exception() is not None:
                raise task.exception()  # type: ignore[misc]
        await consumer
        return await producer
    finally:
        for task in (producer, consumer):
            task.cancel()
        await asyncio.gather(producer, consumer, return_exceptions=True)


def list_images(data_dir: Path) -> list[str]:
    """Return the names of installed images, corrupted ones too."""
    return artifacts.names(data_dir, "image")


def read_image(data_dir: Path, name: str) -> ImageManifest:
    """Return an installed image's manifest; raise NotFound or Corrupted."""
    return artifacts.read(data_dir, "image", name, ImageManifest)


def rootfs_path(data_dir: Path, name: str) -> Path:
    """Return the path of an image's root file system."""
    return artifacts.artifact_directory(data_dir, "image", name) / ROOTFS


def delete_image(data_dir: Path, name: str) -> None:
    """Remove an image; whether a machine uses it is the caller's to know."""
    artifacts.delete(data_dir, "image", name)
