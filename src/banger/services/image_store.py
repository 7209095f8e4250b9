"""Images that are here already: registered, exported, deleted; and what the catalogs say.

Images that come from elsewhere are `services.images`'.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from banger.api.models import (
    Catalog,
    CatalogEntry,
    ImageDeleted,
    ImageExport,
    ImageExported,
    ImageRegister,
    KernelImport,
)
from banger.catalog import BundleImage, DebianImage, ImageEntry, catalog_images
from banger.catalog.extra import Catalogs
from banger.errors import Conflict, InvalidInput
from banger.events import EventSink, NamedSink
from banger.host.commands import HostCommands
from banger.images import artifacts
from banger.images.bundle import export_bundle
from banger.images.register import check_superblock, register_image
from banger.services.artifacts import ArtifactService, UsedBy, Wire
from banger.services.kernels import KernelService


@dataclass(frozen=True, slots=True)
class ImageStore:
    """Use cases on the images of the store. `running` names the VMs of an image that run."""

    images: ArtifactService
    kernels: KernelService
    running: UsedBy
    catalogs: Catalogs
    data_dir: Path
    commands: HostCommands

    async def register(self, request: ImageRegister, sink: EventSink) -> Wire:
        """Make an image of an ext4 on this host, and a kernel of the files given with it."""
        name = request["name"]
        force = request.get("force", False)
        directory = artifacts.artifact_directory(self.data_dir, "image", name)
        if name in catalog_images():
            raise Conflict(
                f"{name} is the name of an image of the catalog", hint="choose another --name"
            )
        if force and directory.exists():
            users = (await self.images.get(name))["used_by"]
            if users:
                raise Conflict(
                    f"the image {name} cannot be replaced: used by {', '.join(users)}",
                    hint=f"delete them first: `banger vm delete {' '.join(users)}`",
                )
        rootfs = _absolute("rootfs", request["rootfs"])
        # Before minutes of importing a kernel.
        await asyncio.to_thread(check_superblock, rootfs)
        had_kernel = await self.kernels.is_installed(name)
        kernel = await self._kernel_of(request, sink)
        try:
            await register_image(
                name,
                rootfs,
                data_dir=self.data_dir,
                commands=self.commands,
                sink=NamedSink(sink, f"image {name}"),
                link=request.get("link", False),
                kernel=kernel,
                description=request.get("description", ""),
                force=force,
            )
        except BaseException:
            if request.get("kernel") and not had_kernel:
                await self.kernels.delete(name)
            raise
        return await self.images.get(name)

    async def _kernel_of(self, request: ImageRegister, sink: EventSink) -> str:
        """Return the kernel an image is registered with, importing the one of files."""
        wanted = request.get("kernel_ref", "")
        if request.get("initrd"):
            sink.warning(
                "the initrd is not used: banger boots every kernel with its agent's own initramfs"
            )
        if not request.get("kernel"):
            if request.get("modules"):
                raise InvalidInput(
                    "modules without a kernel", hint="--kernel FILE names the kernel they are of"
                )
            if wanted:
                await self.kernels.get(wanted)  # installed, or of the catalog
            return wanted
        if wanted:
            raise InvalidInput(
                "both the name of a kernel and the file of one", hint="give one of the two"
            )
        name = request["name"]
        file = _absolute("kernel", request["kernel"])
        # Its configuration may be beside it, as in /boot.
        files: KernelImport = {
            "directory": str(file.parent),
            "kernel": str(file),
            "force": request.get("force", False),
        }
        if request.get("modules"):
            files["modules"] = str(_absolute("modules", request["modules"]))
        await self.kernels.import_(name, files, sink)
        return name

    async def export(self, name: str, request: ImageExport, sink: EventSink) -> ImageExported:
        """Write an image to a file of this host."""
        await self.images.check(name)
        done = await export_bundle(
            name,
            _absolute("path", request["path"]),
            data_dir=self.data_dir,
            commands=self.commands,
            sink=NamedSink(sink, f"image {name}"),
            force=request.get("force", False),
        )
        return {
            "name": name,
            "path": str(done.path),
            "sha256": done.sha256,
            "size_bytes": done.size_bytes,
        }

    async def delete(self, name: str, *, force: bool) -> ImageDeleted:
        """Remove an image; with `force` although VMs that do not run are made of it.

        Those have no base any more: they start again only once the same image is back.
        """
        if force:
            running = await self.running(name)
            if running:
                raise Conflict(
                    f"the image {name} cannot be deleted: {', '.join(running)} "
                    f"{'run' if len(running) > 1 else 'runs'} from it",
                    hint=f"stop them first: `banger vm stop {' '.join(running)}`",
                )
        stranded = await self.images.delete(name, although_used=force)
        return {"ok": True, "stranded": stranded}

    async def catalog(self) -> Catalog:
        """Return what the catalogs say, and what is wrong with them."""
        found = await asyncio.to_thread(self.catalogs.current)
        return {
            "entries": [
                _wire(name, entry, found.origins[name]) for name, entry in found.images.items()
            ],
            "warnings": list(found.warnings),
        }


def _wire(name: str, entry: ImageEntry, catalog: str) -> CatalogEntry:
    if isinstance(entry, DebianImage):
        kind, source, pinned = "debian", f"debian:{entry.suite}", False
    elif isinstance(entry, BundleImage):
        kind, source, pinned = "bundle", entry.url, True
    else:
        kind, source, pinned = "oci", entry.source, "@sha256:" in entry.source
    return {
        "name": name,
        "kind": kind,
        "description": entry.description,
        "source": source,
        "pinned": pinned,
        "kernel": "" if isinstance(entry, DebianImage) else entry.kernel,
        "catalog": catalog,
    }


def _absolute(field: str, text: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or "\0" in text:
        raise InvalidInput(
            f"{field} is not an absolute path: {text!r}",
            hint="give the whole path: the daemon has a working directory of its own",
        )
    return path
