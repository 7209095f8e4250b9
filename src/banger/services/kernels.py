"""What only kernels have: they are imported, checked, and named by images.

The rest of their life is `services.artifacts`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from banger.api import models
from banger.errors import Conflict, InvalidInput
from banger.events import EventSink, NamedSink
from banger.kernels.features import missing_required
from banger.kernels.importer import ImportSource
from banger.services.artifact_sources import KernelSource
from banger.services.artifacts import ArtifactService, UsedBy, Wire


class KernelService(ArtifactService):
    """Use cases on kernels."""

    def __init__(self, source: KernelSource, used_by: UsedBy) -> None:
        super().__init__(source, used_by)
        self._kernels = source

    async def import_(self, name: str, request: models.KernelImport, sink: EventSink) -> Wire:
        """Make a kernel of files on this host; one that VMs use is not replaced."""
        force = request.get("force", False)
        source = ImportSource(
            _absolute(request, "directory") or Path(),
            kernel=_absolute(request, "kernel"),
            modules=_absolute(request, "modules"),
            config=_absolute(request, "config"),
        )
        if force:
            await self._need_unused(name, "replaced")
        named = NamedSink(sink, f"kernel {name}")
        await self._kernels.import_files(name, source, named, force=force)
        return await self._describe(name)

    async def check_features(self, name: str) -> models.KernelCheck:
        """Compare an installed kernel with what machines and Docker need."""
        await self.check(name)
        report = await self._kernels.check(name)
        features: list[Any] = [finding._asdict() for finding in report.findings]
        return {
            "name": name,
            "release": report.release,
            "ok": not missing_required(report.findings),
            "config_known": report.has_config,
            "features": features,
        }

    async def config(self, name: str) -> models.KernelConfig:
        """Return an installed kernel's configuration."""
        await self.check(name)
        return {"name": name, "config": await asyncio.to_thread(self._kernels.config, name)}

    async def _describe(self, name: str) -> Wire:
        users = await asyncio.to_thread(self._kernels.image_users, name)
        return {**await super()._describe(name), "used_by_images": users}

    async def _need_unused(self, name: str, verb: str) -> None:
        vms = await self._used_by(name)
        # A kernel that is replaced is still there for the images that name it.
        found = (
            [] if verb == "replaced" else await asyncio.to_thread(self._kernels.image_users, name)
        )
        told, hints = [], []
        for noun, plural, users in (("vm", "VM", vms), ("image", "image", found)):
            if users:
                told.append(f"{plural}{'s' if len(users) > 1 else ''} {', '.join(users)}")
                hints.append(f"`banger {noun} delete {' '.join(users)}`")
        if told:
            raise Conflict(
                f"the kernel {name} cannot be {verb}: used by {' and '.join(told)}",
                hint=f"delete them first: {', '.join(hints)}",
            )


def _absolute(request: models.KernelImport, field: str) -> Path | None:
    value = request.get(field)
    if value is None:
        return None
    path = Path(str(value))
    if not path.is_absolute() or "\0" in str(value):
        raise InvalidInput(
            f"{field} is not an absolute path: {value!r}",
            hint="give the whole path: the daemon has a working directory of its own",
        )
    return path
