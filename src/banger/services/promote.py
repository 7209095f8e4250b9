"""A stopped VM becomes an image: its base and its own disk as one, without its identity.

Owns the order (look, boot to be read, stream to a spool, import). What a guest wrote is hostile:
no tool of the host sees its disk; it arrives as a tar of the agent's and is read as any hostile
tar is, by `images.flatten`. What counts as identity is `guest.boot`'s.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from banger.api.models import VmPromote
from banger.catalog import catalog_images
from banger.errors import Cancelled, Conflict, InvalidInput
from banger.events import EventSink, NamedSink
from banger.guest import agent
from banger.guest.transport import Endpoint
from banger.host.files import no_space_named
from banger.images import artifacts
from banger.images import pull as store
from banger.images.importing import ImportRequest, import_image
from banger.images.reference import RootfsRef
from banger.services.artifacts import ArtifactService, Wire
from banger.services.boot import EXPORT_ROOT
from banger.services.images import ImportParts
from banger.services.vms import VmService

# A guest that reads a slow disk under emulation has been silent for seconds, never for this long.
_SILENCE_TIMEOUT_S = 120.0
_TELL_INTERVAL_S = 0.2
_MAX_WARNINGS = 10


@dataclass(frozen=True, slots=True)
class Promoter:
    """Makes images of VMs."""

    vms: VmService
    images: ArtifactService
    kernels: ArtifactService
    parts: ImportParts

    async def promote(self, vm_name: str, request: VmPromote, sink: EventSink) -> Wire:
        """Make an image of a stopped VM; the VM stays as it is, failure leaves nothing behind.

        The image says of itself what the VM's image does. Raises Conflict unless the VM is stopped
        and the name is free (with `force`: used by nobody).
        """
        name, force = request["name"], request.get("force", False)
        vm = await self.vms.get(vm_name)
        if vm["state"] != "stopped":
            raise Conflict(
                f"{vm['name']} is {vm['state']}",
                hint=f"stop it first: `banger vm stop {vm['name']}`",
            )
        await self._check_name(name, force=force)
        if kernel := request.get("kernel", ""):
            await self.kernels.get(kernel)
        data_dir = self.parts.data_dir
        base = await asyncio.to_thread(store.read_image, data_dir, vm["image"])
        named = NamedSink(sink, f"image {name}")
        # A second staging directory: the import has one of its own for what it makes.
        async with artifacts.staging(data_dir, "image", name) as staged:
            spool = staged / "rootfs.tar"
            await self._spool(vm["id"], spool, named)
            await import_image(
                ImportRequest(
                    source=RootfsRef(str(spool)),
                    name=name,
                    description=request.get("description", "") or f"made of the VM {vm['name']}",
                    kernel=kernel or base.kernel,
                    force=force,
                    origin=f"vm:{vm['name']} on {base.name}",
                    like=base,
                ),
                data_dir=data_dir,
                commands=self.parts.commands,
                sink=named,
                limits=self.parts.limits,
                open_registry=self.parts.open_registry,
            )
        return await self.images.get(name)

    async def _check_name(self, name: str, *, force: bool) -> None:
        directory = artifacts.artifact_directory(self.parts.data_dir, "image", name)
        if name in catalog_images():
            raise Conflict(
                f"{name} is the name of an image of the catalog", hint="choose another --name"
            )
        if not directory.exists():
            return
        if not force:
            raise Conflict(
                f"image {name} is installed already",
                hint="--force replaces it, --name gives this one another name",
            )
        users = (await self.images.get(name))["used_by"]
        if users:
            raise Conflict(
                f"the image {name} cannot be replaced: used by {', '.join(users)}",
                hint=f"delete them first: `banger vm delete {' '.join(users)}`",
            )

    async def _spool(self, vm_id: str, spool: Path, sink: EventSink) -> None:
        """Write the VM's root file system to a tar; ends with the VM stopped in any case."""
        loop = asyncio.get_running_loop()
        writer = _Writer(
            self.parts.limits.max_bytes,
            lambda done: loop.call_soon_threadsafe(sink.progress, done, 0),
        )
        reading: asyncio.Task[list[str]] | None = None
        try:
            async with self.vms.read_stopped(vm_id, sink) as endpoint:
                sink.stage("reading the machine's files")
                reading = asyncio.create_task(asyncio.to_thread(writer.run, endpoint, spool))
                warnings = await asyncio.shield(reading)
        finally:
            writer.is_cancelled = True
            if reading is not None:  # its guest is gone: it ends now
                await asyncio.wait([reading])
                reading.exception()  # also when nobody asks for it any more
        for warning in warnings[:_MAX_WARNINGS]:
            sink.warning(warning)
        if len(warnings) > _MAX_WARNINGS:
            sink.warning(f"and {len(warnings) - _MAX_WARNINGS} more of these")


class _Writer:
    """Takes the agent's tar, in a thread; bounded, for what the guest sends has no other end."""

    def __init__(self, max_bytes: int, tell: Callable[[int], object]) -> None:
        self.is_cancelled = False
        self._max_bytes = max_bytes
        self._tell = tell
        self._done = 0
        self._told_at = 0.0

    def run(self, endpoint: Endpoint, spool: Path) -> list[str]:
        """Write all of it and return the agent's warnings."""
        with no_space_named(spool.parent), open(spool, "xb") as file:

            def take(piece: bytes) -> None:
                self._count(len(piece))
                # A machine's sparse files come as zeros; here they are holes again.
                if piece.count(0) == len(piece):
                    file.seek(len(piece), os.SEEK_CUR)
                else:
                    file.write(piece)

            result = agent.get_tar(
                endpoint,
                EXPORT_ROOT + b"/.",
                take,
                timeout_s=_SILENCE_TIMEOUT_S,
                full=True,
            )
            file.truncate()  # as far as it came: a tar ends with zeros
        found = result.get("warnings")
        texts = [str(one)[:300] for one in found] if isinstance(found, list) else []
        return ["".join(c if c.isprintable() else "?" for c in text) for text in texts]

    def _count(self, size: int) -> None:
        if self.is_cancelled:
            raise Cancelled("cancelled")
        self._done += size
        if self._done > self._max_bytes:
            raise InvalidInput(
                f"the machine's files are more than {self._max_bytes} bytes",
                hint="raise import_limits.max_size in the configuration if you trust it",
            )
        now = time.monotonic()
        if now - self._told_at >= _TELL_INTERVAL_S:
            self._told_at = now
            self._tell(self._done)
