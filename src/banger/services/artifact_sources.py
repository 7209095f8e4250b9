"""Images and kernels as `services.artifacts` sees them: the store, the catalog, the makers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from banger.catalog import BundleImage, DebianImage, catalog_kernels
from banger.catalog.extra import Catalogs
from banger.errors import Corrupted, NotFound, Unavailable
from banger.events import EventSink
from banger.host.commands import HostCommands
from banger.images import pull as images
from banger.images.artifacts import ImageManifest, KernelManifest
from banger.images.bundle import BundleRef, import_bundle
from banger.kernels import pull as kernels
from banger.kernels.check import KernelReport, check_kernel, read_config
from banger.kernels.importer import ImportSource, import_kernel
from banger.services.artifacts import Wire

_UNSAID: Wire = {
    "platform": "",
    "kernel": "",
    "user": "root",
    "env": {},
    "entrypoint": [],
    "command": [],
    "working_dir": "",
}


@dataclass(frozen=True, slots=True)
class _Source:
    """What both kinds need: where artifacts live, how programs run, which mirror."""

    data_dir: Path
    cache_dir: Path
    commands: HostCommands
    mirror: str | None

    async def _make(
        self, maker: Callable[..., Awaitable[object]], name: str, sink: EventSink, *, force: bool
    ) -> None:
        await maker(
            name,
            data_dir=self.data_dir,
            cache_dir=self.cache_dir,
            commands=self.commands,
            sink=sink,
            mirror=self.mirror,
            force=force,
        )


@dataclass(frozen=True, slots=True)
class ImageSource(_Source):
    """Images of the catalogs and of the store."""

    catalogs: Catalogs = field(default_factory=Catalogs)
    kind = "image"

    def catalog(self) -> list[str]:
        """Return the names that can be pulled."""
        return list(self.catalogs.current().images)

    def installed(self) -> list[str]:
        """Return the names in the store, sorted."""
        return images.list_images(self.data_dir)

    def wire(self, name: str) -> Wire:
        """Return the shape `api.models.Image`, but for `used_by`."""
        if name not in self.installed():
            entry = self.catalogs.current().entry(name)
            return {**_absent(name, entry.description), **_UNSAID}
        manifest = images.read_image(self.data_dir, name)
        return {
            **_installed(manifest),
            "platform": manifest.platform,
            "kernel": manifest.kernel,
            "user": manifest.default_user,
            "env": manifest.default_env,
            "entrypoint": list(manifest.entrypoint),
            "command": list(manifest.command),
            "working_dir": manifest.working_dir,
        }

    async def pull(self, name: str, sink: EventSink, *, force: bool) -> None:
        """Make and install the image of a catalog's entry."""
        catalog = await asyncio.to_thread(self.catalogs.current)
        for warning in catalog.warnings:
            sink.warning(warning)
        entry = catalog.entry(name)
        if isinstance(entry, DebianImage):
            maker = functools.partial(images.pull_image, entry=entry)
            await self._make(maker, name, sink, force=force)
        elif isinstance(entry, BundleImage):
            await import_bundle(
                BundleRef(entry.url, entry.sha256),
                name,
                data_dir=self.data_dir,
                commands=self.commands,
                sink=sink,
                kernel=entry.kernel,
                description=entry.description,
                force=force,
            )
        else:  # the service of images takes these to their registry
            raise Unavailable(f"{name} is an image of a registry", hint=f"pull {entry.source}")

    def delete(self, name: str) -> None:
        """Remove the image."""
        images.delete_image(self.data_dir, name)


class KernelSource(_Source):
    """Kernels of the catalog and of the store."""

    kind = "kernel"

    def catalog(self) -> list[str]:
        """Return the names that can be pulled."""
        return list(catalog_kernels())

    def installed(self) -> list[str]:
        """Return the names in the store, sorted."""
        return kernels.list_kernels(self.data_dir)

    def wire(self, name: str) -> Wire:
        """Return the shape `api.models.Kernel`, but for `used_by`."""
        if name not in self.installed():
            return {**_absent(name, catalog_kernels()[name].description), "release": ""}
        manifest = kernels.read_kernel(self.data_dir, name)
        return {**_installed(manifest), "release": manifest.release}

    async def pull(self, name: str, sink: EventSink, *, force: bool) -> None:
        """Fetch and install the kernel."""
        await self._make(kernels.pull_kernel, name, sink, force=force)

    def image_users(self, name: str) -> list[str]:
        """Return the installed images that name a kernel; damaged ones name none."""
        users = []
        for image in images.list_images(self.data_dir):
            with contextlib.suppress(NotFound, Corrupted):
                if images.read_image(self.data_dir, image).kernel == name:
                    users.append(image)
        return users

    async def import_files(
        self, name: str, source: ImportSource, sink: EventSink, *, force: bool
    ) -> None:
        """Make and install a kernel of files on this host."""
        await import_kernel(
            name,
            source,
            data_dir=self.data_dir,
            commands=self.commands,
            sink=sink,
            force=force,
        )

    async def check(self, name: str) -> KernelReport:
        """Compare an installed kernel with what machines and Docker need."""
        return await check_kernel(self.data_dir, name, commands=self.commands)

    def config(self, name: str) -> str:
        """Return an installed kernel's configuration."""
        return read_config(self.data_dir, name)

    def delete(self, name: str) -> None:
        """Remove the kernel."""
        kernels.delete_kernel(self.data_dir, name)


def _installed(manifest: ImageManifest | KernelManifest) -> Wire:
    return {
        "name": manifest.name,
        "installed": True,
        "digest": manifest.digest,
        "size_bytes": manifest.size_bytes,
        "disk_bytes": manifest.allocated_bytes,
        "origin": manifest.origin,
        "created_at": manifest.created_at,
        "description": manifest.description,
    }


def _absent(name: str, description: str) -> Wire:
    return {
        "name": name,
        "installed": False,
        "digest": "",
        "size_bytes": 0,
        "disk_bytes": 0,
        "origin": "catalog",
        "created_at": "",
        "description": description,
    }
