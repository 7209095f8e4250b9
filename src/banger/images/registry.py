"""Images of registries: manifests and blobs, verified, by way of mirrors and the blob cache.

Owns what is asked for and whether it is right: a manifest has the digest it was asked by, or the
one its answer claims; a blob has the size and digest of its descriptor. How a host is talked to
is `registry_http`'s, where blobs are kept `blobcache`'s, what documents mean `oci`'s.

Whom we trust: a digest is checked against the bytes, so for everything named by one, a mirror is
worth as much as the registry, and neither is worth more than a wire. What a **tag** names is the
word of who answers: the configured mirrors first, the registry after them, over TLS. A mirror
may so hold back or go back on a tag; pull by digest, or configure no mirror, where that matters.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec

from banger.errors import BangerError, Corrupted, InvalidInput, NotFound, Unavailable, nearest
from banger.events import EventSink
from banger.images.blobcache import BlobCache, Meter, Partial, Pins, short
from banger.images.credentials import Credentials
from banger.images.oci import ACCEPTED, MAX_DOCUMENT_BYTES, BlobFile, Descriptor
from banger.images.reference import RegistryRef
from banger.images.registry_http import (
    Endpoint,
    RegistrySettings,
    Retrying,
    Transient,
    failed,
    make_client,
)

if TYPE_CHECKING:
    import httpx2

__all__ = ["RegistrySettings", "RegistrySource", "open_registry"]

_T = TypeVar("_T")
_SCHEMA1 = "application/vnd.docker.distribution.manifest.v1"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")
_APPEND_BYTES = 256 << 10  # written and hashed at once; one thread hop each
_PROGRESS_BYTES = 1 << 20  # a try that brought this much was no failure
_TAGS_BYTES = 1 << 20


class _Tags(msgspec.Struct, frozen=True):
    tags: list[str] | None = None


@contextlib.asynccontextmanager
async def open_registry(
    ref: RegistryRef,
    *,
    settings: RegistrySettings,
    credentials: Credentials,
    cache: BlobCache,
    sink: EventSink,
) -> AsyncIterator[RegistrySource]:
    """Open an image of a registry; its blobs stay in the cache until the block ends.

    After that, the cache is cut to its limit. Nothing is asked yet.
    """
    try:
        with cache.pinning() as pins:
            async with make_client(settings) as client:
                yield RegistrySource(ref, settings, credentials, client, pins, sink)
    finally:
        with contextlib.suppress(OSError):
            await cache.evict()


class _Place(NamedTuple):
    endpoint: Endpoint
    is_mirror: bool


class RegistrySource:
    """An image of a registry, as `oci.BlobSource` has it; `open_registry` makes it.

    Blobs may be asked for at once: no more than `max_parallel_downloads` are downloaded.
    """

    def __init__(
        self,
        ref: RegistryRef,
        settings: RegistrySettings,
        credentials: Credentials,
        client: httpx2.AsyncClient,
        pins: Pins,
        sink: EventSink,
    ) -> None:
        self._ref = ref
        self._settings = settings
        self._pins = pins
        self._sink = sink
        self._downloads = asyncio.Semaphore(settings.max_parallel_downloads)
        urls = [*settings.mirrors.get(ref.host, ()), ref.host]
        self._places = [
            _Place(
                Endpoint(
                    url,
                    ref.repository,
                    client=client,
                    settings=settings,
                    find_credential=credentials.find,
                ),
                is_mirror=url != ref.host,
            )
            for url in urls
        ]

    @property
    def origin(self) -> str:
        """Return the whole reference."""
        return self._ref.origin

    async def manifest(self, descriptor: Descriptor | None) -> tuple[bytes, str]:
        """Return a manifest or index, verified, and its media type; None: what the tag names.

        Raises NotFound, Unavailable, Corrupted.
        """

        async def ask(endpoint: Endpoint) -> tuple[bytes, str]:
            return await self._manifest(endpoint, descriptor)

        return await self._somewhere(ask)

    async def blob(self, descriptor: Descriptor, progress: Callable[[int], None]) -> BlobFile:
        """Return a blob, from the cache or downloaded; the sum of `progress` becomes its size.

        Raises NotFound, Unavailable, Corrupted, NoSpace.
        """
        meter = Meter(progress)

        async def ask(endpoint: Endpoint) -> BlobFile:
            async def fetch(partial: Partial) -> None:
                async with self._downloads:
                    await self._download(endpoint, partial)

            return await self._pins.obtain(descriptor.digest, descriptor.size, fetch, meter)

        return await self._somewhere(ask)

    async def _somewhere(self, ask: Callable[[Endpoint], Awaitable[_T]]) -> _T:
        """Ask the mirrors in order, then the registry; a mirror's failure is only a warning."""
        for place in list(self._places):
            try:
                return await ask(place.endpoint)
            except Transient as failure:  # outside of what is retried: choosing a scheme
                error: BangerError = failure.error
            except (Unavailable, NotFound, Corrupted) as raised:
                error = raised
            if not place.is_mirror:
                raise _named(error, self._ref)
            if not isinstance(error, NotFound) and place in self._places:
                self._places.remove(place)  # the rest of the image is not asked there
                self._sink.warning(f"mirror {place.endpoint.host}: {error.message}")
        raise AssertionError("the registry is the last place")

    # -- manifests

    async def _manifest(
        self, endpoint: Endpoint, descriptor: Descriptor | None
    ) -> tuple[bytes, str]:
        wanted = self._ref.digest if descriptor is None else descriptor.digest
        reference = wanted or self._ref.reference
        if wanted is not None and not _DIGEST.fullmatch(wanted):
            raise InvalidInput(f"{wanted!r} is not a digest banger knows: sha256 or sha512")
        retrying = Retrying(self._settings, self._sink.warning)
        while True:
            try:
                async with endpoint.get(
                    f"manifests/{reference}", {"Accept": ", ".join(ACCEPTED)}
                ) as response:
                    if response.status_code != 200:
                        raise Unavailable(
                            f"{endpoint.host} answers with status {response.status_code}"
                        )
                    body = await endpoint.read(response, MAX_DOCUMENT_BYTES)
                    said_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
                    said_digest = response.headers.get("Docker-Content-Digest", "")
                    break
            except Transient as failure:
                await retrying.wait(failure)
            except NotFound as error:
                raise await self._nearer(endpoint, error, descriptor) from error
        if descriptor is not None and len(body) != descriptor.size:
            raise Corrupted(
                f"the manifest {short(descriptor.digest)} has {len(body)} bytes, "
                f"not {descriptor.size}"
            )
        schema1 = said_type.startswith(_SCHEMA1)
        # Without a digest of ours this only finds accidents: both come from the same server.
        # Schema 1 has its digest taken without its signatures, and is refused by `oci` anyway.
        expected = wanted or ("" if schema1 else said_digest)
        if expected and (not _DIGEST.fullmatch(expected) or _digest(body, expected) != expected):
            if schema1:
                raise InvalidInput(f"{self.origin} is of Docker's schema 1, which banger reads not")
            raise Corrupted(f"what arrived is not the manifest {short(expected)}")
        return body, (descriptor.media_type if descriptor is not None else "") or said_type

    async def _nearer(
        self, endpoint: Endpoint, error: NotFound, descriptor: Descriptor | None
    ) -> NotFound:
        """Return the error of a missing manifest, with the nearest tag when that is had cheaply."""
        ref = self._ref
        if error.message.startswith(f"{endpoint.host} has no image "):
            return error
        if descriptor is not None:
            return NotFound(f"{endpoint.host} lacks the manifest {short(descriptor.digest)}")
        if ref.digest is not None:
            return NotFound(f"{endpoint.host} has no {short(ref.digest)} of {ref.repository}")
        tags: list[str] = []
        with contextlib.suppress(BangerError, Transient, msgspec.DecodeError, UnicodeDecodeError):
            async with endpoint.get("tags/list?n=1000", {"Accept": "application/json"}) as response:
                body = await endpoint.read(response, _TAGS_BYTES)
                tags = msgspec.json.decode(body, type=_Tags).tags or []
        close = nearest(ref.reference, [tag for tag in tags if tag.isprintable()])
        return NotFound(
            f"{endpoint.host} has no tag {ref.reference} of {ref.repository}",
            hint=f"did you mean {ref.host}/{ref.repository}:{close}?" if close else "",
        )

    # -- blobs

    async def _download(self, endpoint: Endpoint, partial: Partial) -> None:
        """Append what a partial lacks, in as many requests as it takes."""
        retrying = Retrying(self._settings, self._sink.warning)
        ranges = True
        while partial.size_bytes < partial.wanted_bytes:
            if not ranges:
                await partial.restart()
            begun = partial.size_bytes
            headers = {"Range": f"bytes={begun}-"} if begun else {}
            try:
                async with endpoint.get(f"blobs/{partial.digest}", headers) as response:
                    ranges = await self._take(endpoint, response, partial)
            except Transient as failure:
                if partial.size_bytes - begun >= _PROGRESS_BYTES:
                    retrying.progressed()
                await retrying.wait(failure)
            except NotFound as error:
                raise NotFound(f"{endpoint.host} lacks the blob {short(partial.digest)}") from error

    async def _take(self, endpoint: Endpoint, response: httpx2.Response, partial: Partial) -> bool:
        """Append a body; return whether a range may be asked for again."""
        wanted = partial.wanted_bytes
        if response.status_code == 416:
            if not partial.size_bytes:
                raise Unavailable(f"{endpoint.host} answers a question for all with 416")
            return False
        if response.status_code == 206:
            said = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if said is None or int(said[1]) != partial.size_bytes:
                return False
            total = wanted if said[3] == "*" else int(said[3])
        else:
            if partial.size_bytes:
                await partial.restart()  # the range was ignored: this is all of it
            length = response.headers.get("Content-Length", "")
            total = int(length) if re.fullmatch(r"[0-9]{1,19}", length) else wanted
        if total != wanted:
            raise Corrupted(
                f"{endpoint.host} has {total} bytes of {short(partial.digest)}, not {wanted}"
            )
        await self._append(endpoint, response, partial)
        if partial.size_bytes < wanted:
            raise Transient(
                Corrupted(
                    f"{endpoint.host} ends {short(partial.digest)} after {partial.size_bytes} of "
                    f"{wanted} bytes"
                )
            )
        return True

    async def _append(
        self, endpoint: Endpoint, response: httpx2.Response, partial: Partial
    ) -> None:
        import httpx2

        held = bytearray()
        failure: Transient | Unavailable | None = None
        window_end = time.monotonic() + self._settings.window_s
        in_window = 0
        try:
            # As it arrives: a drip must be seen before it fills a chunk.
            async for piece in response.aiter_raw():
                held += piece
                in_window += len(piece)
                if len(held) >= _APPEND_BYTES:
                    full, held = bytes(held), bytearray()
                    await partial.append(full)
                now = time.monotonic()
                if now >= window_end:
                    if in_window < self._settings.window_bytes:
                        raise Transient(
                            Unavailable(
                                f"{endpoint.host} sends {short(partial.digest)} too slowly: "
                                f"{in_window} bytes in {self._settings.window_s:.0f} s"
                            )
                        )
                    window_end, in_window = now + self._settings.window_s, 0
        except Transient as stalled:
            failure = stalled
        except httpx2.TransportError as error:
            failure = failed(response.url.host, error)
        if held:
            await partial.append(bytes(held))  # what came is kept: the next try goes on after it
        if failure is not None and partial.size_bytes < partial.wanted_bytes:
            raise failure


def _digest(body: bytes, like: str) -> str:
    algorithm = like.partition(":")[0]
    return f"{algorithm}:{hashlib.new(algorithm, body).hexdigest()}"


def _named(error: BangerError, ref: RegistryRef) -> BangerError:
    """Return the error with the reference in front of it."""
    return type(error)(f"{ref.origin}: {error.message}", hint=error.hint, code=error.code)
