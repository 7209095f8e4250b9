"""What only images have: they come from registries, archives and bundles, and from VMs.

The rest of their life is `services.artifacts`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from banger.api.models import Blob, ImagePull
from banger.catalog import OciImage, catalog_images
from banger.errors import Conflict, Corrupted, InvalidInput
from banger.events import EventSink, NamedSink
from banger.host.commands import HostCommands
from banger.images import artifacts
from banger.images import pull as store
from banger.images.blobcache import BlobCache
from banger.images.bundle import BundleRef, import_bundle, parse_bundle
from banger.images.importing import ImportRequest, OpenRegistry, import_image
from banger.images.layers import Limits
from banger.images.layouts import name_in_archive
from banger.images.oci import parse_platform
from banger.images.reference import CatalogRef, DockerArchiveRef, RegistryRef, Source, parse_source
from banger.services.artifact_sources import ImageSource
from banger.services.artifacts import ArtifactService, UsedBy, Wire


@dataclass(frozen=True, slots=True)
class ImportParts:
    """What an import works with."""

    data_dir: Path
    commands: HostCommands
    limits: Limits
    open_registry: OpenRegistry
    blobs: BlobCache


class ImageService(ArtifactService):
    """Use cases on images."""

    def __init__(self, source: ImageSource, used_by: UsedBy, parts: ImportParts) -> None:
        super().__init__(source, used_by)
        self._images = source
        self._parts = parts

    async def pull_source(self, request: ImagePull, sink: EventSink) -> Wire:
        """Make an image of whatever its source names; one from the same source is left alone."""
        text = request["source"]
        source = parse_bundle(text) or parse_source(text)
        force = request.get("force", False)
        if isinstance(source, CatalogRef):
            _refuse_for_catalog(source.name, request)
            return await self.pull(source.name, sink, force=force)
        name = request.get("name")
        if not name and isinstance(source, DockerArchiveRef):
            name = (await asyncio.to_thread(name_in_archive, source)).default_name()
        name = name or source.default_name()
        artifacts.artifact_directory(self._parts.data_dir, "image", name)  # is it a name at all
        if request.get("platform"):
            parse_platform(request["platform"])
        if name in catalog_images():
            raise Conflict(
                f"{name} is the name of an image of the catalog", hint="choose another --name"
            )
        if name in await asyncio.to_thread(self._source.installed):
            if not force:
                origin = request.get("origin") or source.origin
                await asyncio.to_thread(self._check_same, name, origin)
                return await self._describe(name)
            await self._need_unused(name, "replaced")
        named = NamedSink(sink, f"image {name}")
        await self._pulls.run(
            f"{name} {source.origin}", named, lambda all_: self._import(source, name, request, all_)
        )
        return await self._describe(name)

    async def ensure_source(self, text: str, sink: EventSink) -> str:
        """Have the image of a VM's creation installed and return its name.

        A name of the store or the catalog is itself; anything else is pulled as `image pull` does.
        """
        if not set(text) & set("/:@"):
            await self.ensure(text, sink)
            return text
        return str((await self.pull_source({"source": text}, sink))["name"])

    async def _make(self, name: str, sink: EventSink, *, force: bool) -> None:
        entry = await asyncio.to_thread(lambda: self._images.catalogs.current().entry(name))
        if not isinstance(entry, OciImage):
            await super()._make(name, sink, force=force)
            return
        source = parse_source(entry.source)
        if not isinstance(source, RegistryRef):
            raise InvalidInput(f"the catalog's {name} is no image of a registry: {entry.source}")
        request = ImportRequest(
            source=source,
            name=name,
            description=entry.description,
            kernel=entry.kernel,
            platform=entry.platform,
            size_bytes=entry.capacity_mib << 20 or None,
            force=force,
        )
        parts = self._parts
        await import_image(
            request,
            data_dir=parts.data_dir,
            commands=parts.commands,
            sink=NamedSink(sink, f"image {name}"),
            limits=parts.limits,
            open_registry=parts.open_registry,
        )

    async def _import(
        self, source: Source | BundleRef, name: str, request: ImagePull, sink: EventSink
    ) -> None:
        parts = self._parts
        kernel = request.get("kernel", "")
        force = request.get("force", False)
        if isinstance(source, BundleRef):
            await import_bundle(
                source,
                name,
                data_dir=parts.data_dir,
                commands=parts.commands,
                sink=sink,
                kernel=kernel,
                force=force,
            )
            return
        assert not isinstance(source, CatalogRef)
        await import_image(
            ImportRequest(
                source=source,
                name=name,
                kernel=kernel,
                platform=request.get("platform", ""),
                size_bytes=request.get("size_bytes"),
                force=force,
                origin=request.get("origin", ""),
            ),
            data_dir=parts.data_dir,
            commands=parts.commands,
            sink=sink,
            limits=parts.limits,
            open_registry=parts.open_registry,
        )

    def _check_same(self, name: str, origin: str) -> None:
        """Raise Conflict when the image of that name came from elsewhere."""
        try:
            found = store.read_image(self._parts.data_dir, name).origin
        except Corrupted as error:
            error.hint = f"pull it again with --force, or `banger image delete {name}`"
            raise
        if found != origin:
            raise Conflict(
                f"image {name} is installed already, from {found}",
                hint="--name gives this one another name, --force replaces that one",
            )

    # -- the cache of downloaded blobs

    async def blobs(self) -> list[Blob]:
        """Return what is kept of downloads, the least recently used first."""
        return [
            {
                "digest": blob.digest,
                "size_bytes": blob.size_bytes,
                "used_at": artifacts.rfc3339(blob.last_used),
                "partial": blob.partial,
                "in_use": blob.in_use,
            }
            for blob in await self._parts.blobs.list()
        ]

    async def prune_blobs(self, *, everything: bool) -> int:
        """Remove downloads that did not end, and what is over the limit or everything."""
        return await self._parts.blobs.prune(all=everything)


def _refuse_for_catalog(name: str, request: ImagePull) -> None:
    """Raise InvalidInput for what a catalog's entry decides by itself."""
    for field in ("name", "kernel", "platform", "size_bytes"):
        if request.get(field) and request.get(field) != name:
            option = {"kernel": "kernel-ref", "size_bytes": "size"}.get(field, field)
            raise InvalidInput(
                f"--{option} is not for an image of the catalog",
                hint=f"`banger image pull {name}` alone; a registry's image has a tag or a host, "
                f"as {name}:latest",
            )
