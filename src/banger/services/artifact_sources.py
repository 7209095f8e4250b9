"""Images and kernels as `services.artifacts` sees them: the store, the catalog, the makers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from banger.catalog import catalog_images, catalog_kernels
from banger.events import EventSink
from banger.host.commands import HostCommands
from banger.images import pull as images
from banger.images.artifacts import ImageManifest, KernelManifest
from banger.kernels import pull as kernels
from banger.services.artifacts import Wire


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


class ImageSource(_Source):
    """Images of the catalog and of the store."""

    kind = "image"

    def catalog(self) -> list[str]:
        """Return the names that can be pulled."""
        return list(catalog_images())

    def installed(self) -> list[str]:
        """Return the names in the store, sorted."""
        return images.list_images(self.data_dir)

    def wire(self, name: str) -> Wire:
        """Return the shape `api.models.Image`, but for `used_by`."""
        if name not in self.installed():
            return _absent(name, catalog_images()[name].description)
        return _installed(images.read_image(self.data_dir, name))

    async def pull(self, name: str, sink: EventSink, *, force: bool) -> None:
        """Build and install the image."""
        await self._make(images.pull_image, name, sink, force=force)

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
