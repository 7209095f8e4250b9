"""Images and kernels as things a VM needs: there, made, in use, deleted.

One service serves both kinds; what differs between them is an `ArtifactSource`. Equal pulls
are joined; an artifact a VM uses is neither replaced nor deleted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from banger.errors import Conflict, Corrupted, NotFound, nearest
from banger.events import EventSink, NamedSink
from banger.services.operations import SharedSteps

UsedBy = Callable[[str], Awaitable[list[str]]]
Wire = dict[str, Any]


class ArtifactSource(Protocol):
    """One kind of artifact: its catalog, its store and its maker. Blocking but for `pull`."""

    @property
    def kind(self) -> str:
        """Return `image` or `kernel`."""

    def catalog(self) -> list[str]:
        """Return the names that can be pulled."""

    def installed(self) -> list[str]:
        """Return the names in the store, sorted."""

    def wire(self, name: str) -> Wire:
        """Return the `api.models` shape of an artifact without `used_by`.

        Raises Corrupted when it is installed and does not read back.
        """

    def pull(self, name: str, sink: EventSink, *, force: bool) -> Coroutine[Any, Any, None]:
        """Make an artifact from its catalog entry; whole or absent."""

    def delete(self, name: str) -> None:
        """Remove an installed artifact."""


class ArtifactService:
    """Use cases on one kind of artifact."""

    def __init__(self, source: ArtifactSource, used_by: UsedBy) -> None:
        self._source = source
        self._used_by = used_by
        self._pulls = SharedSteps()

    async def all(self) -> list[Wire]:
        """Return what is installed and what could be, sorted by name."""
        known = await asyncio.to_thread(self._names)
        return [await self._describe(name) for name in known]

    async def get(self, name: str) -> Wire:
        """Return one artifact of the store or the catalog; raise NotFound with the nearest name."""
        await self._need_known(name)
        return await self._describe(name)

    async def check(self, name: str) -> None:
        """Raise NotFound unless the artifact is installed, Corrupted unless it reads back."""
        await self.read(name)

    async def read(self, name: str) -> Wire:
        """Return an installed artifact's `api.models` shape without `used_by`; see `check`."""
        if name not in await asyncio.to_thread(self._source.installed):
            raise NotFound(
                f"the {self._source.kind} {name} is not installed",
                hint=f"pull it: `banger {self._source.kind} pull {name}`",
            )
        return await asyncio.to_thread(self._source.wire, name)

    async def is_installed(self, name: str) -> bool:
        """Tell whether an artifact is in the store."""
        return name in await asyncio.to_thread(self._source.installed)

    async def ensure(self, name: str, sink: EventSink) -> None:
        """Have an artifact installed, pulling it when absent."""
        if name in await asyncio.to_thread(self._source.installed):
            await asyncio.to_thread(self._source.wire, name)
            return
        await self._need_known(name)
        await self._pulls.run(name, sink, lambda all_: self._pull_absent(name, all_))

    async def ensure_source(self, text: str, sink: EventSink) -> str:
        """Have what a new VM asks for installed and return its name: here they are the same."""
        await self.ensure(text, sink)
        return text

    async def _pull_absent(self, name: str, sink: EventSink) -> None:
        # Asked again: another pull may have ended since the caller looked.
        if name not in await asyncio.to_thread(self._source.installed):
            await self._make(name, sink, force=False)

    async def _make(self, name: str, sink: EventSink, *, force: bool) -> None:
        named = NamedSink(sink, f"{self._source.kind} {name}")
        await self._source.pull(name, named, force=force)

    async def pull(self, name: str, sink: EventSink, *, force: bool) -> Wire:
        """Have an artifact installed; with `force`, made anew unless a VM uses it."""
        if not force:
            await self.ensure(name, sink)
            return await self._describe(name)
        await self._need_known(name)
        await self._need_unused(name, "replaced")
        await self._pulls.run(name, sink, lambda all_: self._make(name, all_, force=True))
        return await self._describe(name)

    async def delete(self, name: str, *, although_used: bool = False) -> list[str]:
        """Remove an artifact and return the VMs that used it.

        Raises Conflict naming them, unless `although_used`.
        """
        if name not in await asyncio.to_thread(self._source.installed):
            await self._need_known(name)
            raise NotFound(f"the {self._source.kind} {name} is not installed")
        if not although_used:
            await self._need_unused(name, "deleted")
        users = await self._used_by(name)
        await asyncio.to_thread(self._source.delete, name)
        return users

    async def _describe(self, name: str) -> Wire:
        try:
            shape = await asyncio.to_thread(self._source.wire, name)
        except Corrupted as error:
            # A listing must not fail for one damaged entry; the entry says what it is.
            shape = {"name": name, "installed": True, "description": f"damaged: {error.message}"}
            for text in ("digest", "origin", "created_at", "release"):
                shape.setdefault(text, "")
            shape.update(size_bytes=0, disk_bytes=0)
            if self._source.kind == "image":
                del shape["release"]
        return {**shape, "used_by": await self._used_by(name)}

    def _names(self) -> list[str]:
        return sorted({*self._source.catalog(), *self._source.installed()})

    async def _need_known(self, name: str) -> None:
        known = await asyncio.to_thread(self._names)
        if name not in known:
            close = nearest(name, known)
            raise NotFound(
                f"no {self._source.kind} is named {name!r}",
                hint=f"did you mean {close}?"
                if close
                else f"known: {', '.join(known)} (`banger {self._source.kind} list`)",
            )

    async def _need_unused(self, name: str, verb: str) -> None:
        users = await self._used_by(name)
        if users:
            raise Conflict(
                f"the {self._source.kind} {name} cannot be {verb}: used by {', '.join(users)}",
                hint=f"delete them first: `banger vm delete {' '.join(users)}`",
            )
