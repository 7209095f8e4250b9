"""OCI and Docker image documents: which manifest of an index, which layers, which defaults.

Owns the JSON shapes of image-spec 1.1 (descriptor.md, manifest.md, image-index.md, config.md) and
of Docker's image manifest version 2, schema 2, as far as an import reads them, the choice of
a platform, and the protocol every source of blobs meets. Fetches nothing itself.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec

from banger.errors import InvalidInput, NotFound, Unavailable

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_DOCKER_SCHEMA1 = "application/vnd.docker.distribution.manifest.v1"
ACCEPTED = (OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST)

# A manifest above this is refused by registries too (distribution: 4 MiB).
MAX_DOCUMENT_BYTES = 4 << 20
_MAX_INDEX_DEPTH = 4
_MAX_LAYERS = 256
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


class Platform(msgspec.Struct, frozen=True):
    """What a manifest of an index was built for; see image-index.md."""

    os: str = ""
    architecture: str = ""
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """One blob: its type, digest and size in bytes."""

    media_type: str
    digest: str
    size: int
    platform: Platform | None = None
    annotations: dict[str, str] = {}
    artifact_type: str = ""


class BlobFile(NamedTuple):
    """Where a verified blob lies: `size` bytes from `offset` of a file."""

    path: Path
    offset: int
    size: int


class BlobSource(Protocol):
    """Where an image comes from: a registry, a layout, an archive."""

    @property
    def origin(self) -> str:
        """Return the reference for people and for the manifest."""

    async def manifest(self, descriptor: Descriptor | None) -> tuple[bytes, str]:
        """Return a manifest or index, verified, and its media type (may be empty).

        None asks for what the reference names.
        """

    async def blob(self, descriptor: Descriptor, progress: Callable[[int], None]) -> BlobFile:
        """Return a blob whose size and digest were verified; `progress` is told its new bytes."""


class _Document(msgspec.Struct, frozen=True, rename="camel"):
    """An index, a manifest or an older document, told apart by what it holds."""

    schema_version: int = 0
    media_type: str = ""
    config: Descriptor | None = None
    layers: tuple[Descriptor, ...] | None = None
    manifests: tuple[Descriptor, ...] | None = None


class _RuntimeConfig(msgspec.Struct, frozen=True):
    """`config` of an image configuration; its keys are Docker's, hence the names."""

    User: str = ""
    Env: tuple[str, ...] | None = None
    Entrypoint: tuple[str, ...] | None = None
    Cmd: tuple[str, ...] | None = None
    WorkingDir: str = ""


class _RootFs(msgspec.Struct, frozen=True):
    diff_ids: tuple[str, ...] = ()


class _ImageConfig(msgspec.Struct, frozen=True):
    """An image configuration, config.md."""

    architecture: str = ""
    os: str = ""
    variant: str = ""
    created: str | None = None
    config: _RuntimeConfig | None = None
    rootfs: _RootFs = _RootFs()


@dataclass(frozen=True, slots=True)
class Defaults:
    """How an image wants to be run."""

    user: str = "root"
    env: dict[str, str] | None = None
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    working_dir: str = ""


@dataclass(frozen=True, slots=True)
class Image:
    """One platform's image: `layers` from the bottom up with the digests they unpack to."""

    digest: str
    platform: str
    layers: tuple[Descriptor, ...]
    diff_ids: tuple[str, ...]
    defaults: Defaults
    created: int  # seconds since the epoch; 0 when it does not say


def host_platform() -> Platform:
    """Return the platform of images that this host runs."""
    machine = os.uname().machine
    return Platform("linux", {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine))


def parse_platform(text: str) -> Platform:
    """Return the platform of `linux/amd64` or `linux/arm64/v8`; raise InvalidInput.

    Another architecture than the host's makes an image that no VM here runs, but may be exported.
    """
    parts = text.split("/")
    if not 2 <= len(parts) <= 3 or not all(re.fullmatch(r"[a-z0-9._-]+", part) for part in parts):
        raise InvalidInput(f"{text!r} is not a platform", hint="write it like linux/amd64")
    if parts[0] != "linux":
        raise InvalidInput(f"banger runs Linux only, not {parts[0]}", hint="--platform linux/amd64")
    return Platform(*parts)


async def resolve(source: BlobSource, platform: Platform) -> Image:
    """Follow a source's manifest or index to the image of a platform.

    Raises NotFound when no manifest is for it, InvalidInput for what is no image, Unavailable
    for Docker's schema 1.
    """
    descriptor: Descriptor | None = None
    for _ in range(_MAX_INDEX_DEPTH):
        raw, media_type = await source.manifest(descriptor)
        document = parse_document(raw, media_type, source.origin)
        if document.manifests is None:
            return await _image(source, document, digest_of(raw), platform, descriptor)
        descriptor = choose(document.manifests, platform, source.origin)
    raise InvalidInput(f"{source.origin} nests its indexes more than {_MAX_INDEX_DEPTH} deep")


def parse_document(raw: bytes, media_type: str, origin: str) -> _Document:
    """Return a manifest or an index; raise InvalidInput or Unavailable for anything else."""
    document = decode(raw, _Document, f"the manifest of {origin}")
    kind = document.media_type or media_type
    if document.schema_version == 1 or kind.startswith(_DOCKER_SCHEMA1):
        raise Unavailable(
            f"{origin} is in Docker's old format (schema 1), which nobody makes any more",
            hint="pull and push it again with a current Docker, or skopeo copy --format oci",
        )
    # A document that is both is an attack on whoever reads it the other way (CVE-2021-41190).
    if (document.manifests is not None) == (document.layers is not None):
        raise InvalidInput(f"{origin} is neither an image nor an index of images ({kind or '?'})")
    wanted = (OCI_MANIFEST, DOCKER_MANIFEST)
    if document.manifests is not None:
        wanted = (OCI_INDEX, DOCKER_LIST)
    for said in (document.media_type, media_type):
        if said in ACCEPTED and said not in wanted:
            raise InvalidInput(f"{origin} says it is a {said} and is none")
    return document


def choose(manifests: Iterable[Descriptor], platform: Platform, origin: str) -> Descriptor:
    """Return the manifest for a platform: an equal variant first, then any of the architecture.

    Attestations and other artifacts in an index are no images and are passed over.
    """
    candidates = [one for one in manifests if _may_be_image(one)]
    if not candidates:
        raise InvalidInput(f"{origin} has no image in it: its index is empty")
    unsaid = [one for one in candidates if one.platform is None]
    fitting = [
        one
        for one in candidates
        if one.platform is not None
        and (one.platform.os, one.platform.architecture) == (platform.os, platform.architecture)
    ]
    exact = [one for one in fitting if one.platform and one.platform.variant == platform.variant]
    plain = [one for one in fitting if one.platform and not one.platform.variant]
    if exact or plain:
        return (exact or plain)[0]
    if fitting and not platform.variant:
        return fitting[0]
    if unsaid and len(candidates) == len(unsaid):
        if len(unsaid) > 1:
            raise InvalidInput(
                f"{origin} holds {len(unsaid)} images",
                hint="name one of them behind the path: oci:DIR:TAG",
            )
        return unsaid[0]
    there = sorted({str(one.platform) for one in candidates if one.platform})
    raise NotFound(
        f"{origin} has no image for {platform}: there are {', '.join(there)}",
        hint=f"--platform {there[0]} takes that one" if there else "",
    )


def _may_be_image(descriptor: Descriptor) -> bool:
    # BuildKit's attestations: platform unknown/unknown and an annotation that says so.
    if "vnd.docker.reference.type" in descriptor.annotations or descriptor.artifact_type:
        return False
    if descriptor.platform is not None and descriptor.platform.os == "unknown":
        return False
    return descriptor.media_type in (*ACCEPTED, "")


async def _image(
    source: BlobSource,
    document: _Document,
    digest: str,
    platform: Platform,
    chosen: Descriptor | None,
) -> Image:
    assert document.layers is not None
    if document.config is None:
        raise InvalidInput(f"{source.origin} has no configuration: it is no image")
    if len(document.layers) > _MAX_LAYERS:
        raise InvalidInput(f"{source.origin} has {len(document.layers)} layers: at most 256")
    for layer in document.layers:
        if "foreign" in layer.media_type or "nondistributable" in layer.media_type:
            raise Unavailable(f"{source.origin} has a layer that may not be distributed")
        if ".layer." not in layer.media_type and "rootfs.diff" not in layer.media_type:
            raise InvalidInput(
                f"{source.origin} is no image of a root file system: it holds {layer.media_type}"
            )
        if "+encrypted" in layer.media_type:
            raise Unavailable(f"{source.origin} has encrypted layers")
    if document.config.size > MAX_DOCUMENT_BYTES:
        raise InvalidInput(f"{source.origin} has a configuration of {document.config.size} bytes")
    blob = await source.blob(document.config, lambda _: None)
    with open(blob.path, "rb") as file:
        file.seek(blob.offset)
        raw = file.read(blob.size)
    config = decode(raw, _ImageConfig, f"the configuration of {source.origin}")
    found = Platform(config.os, config.architecture, config.variant)
    if config.os and config.os != "linux":
        raise NotFound(f"{source.origin} is an image for {found}, not for Linux")
    # The index' word stands above a configuration that says nothing.
    if config.architecture and chosen is None and config.architecture != platform.architecture:
        raise NotFound(
            f"{source.origin} has no image for {platform}: it is for {found}",
            hint=f"--platform {found} takes it all the same",
        )
    diff_ids = config.rootfs.diff_ids
    if diff_ids and len(diff_ids) != len(document.layers):
        raise InvalidInput(
            f"{source.origin} has {len(document.layers)} layers and {len(diff_ids)} names for them"
        )
    return Image(
        digest,
        str(found) if config.architecture else str(platform),
        document.layers,
        diff_ids or ("",) * len(document.layers),
        defaults_of(config.config or _RuntimeConfig()),
        _seconds(config.created or ""),
    )


def _seconds(text: str) -> int:
    """Return an RFC 3339 time as seconds; 0 for anything else, and for what 31 bits do not hold.

    Rounded up, as Go's archive/tar may have rounded the times of files made just before it.
    """
    try:
        seconds = math.ceil(datetime.datetime.fromisoformat(text).timestamp())
    except (ValueError, OverflowError):
        return 0
    return seconds if 0 < seconds < 1 << 31 else 0


def defaults_of(config: _RuntimeConfig) -> Defaults:
    """Return how an image wants to be run; raise InvalidInput for words no process can take."""
    env = {}
    for pair in config.Env or ():
        name, _, value = pair.partition("=")
        if name:
            env[name] = value
    words = (*(config.Entrypoint or ()), *(config.Cmd or ()), config.User, config.WorkingDir)
    if any("\0" in word for word in (*words, *env, *env.values())):
        raise InvalidInput("the image's configuration has a NUL in it")
    return Defaults(
        user=config.User or "root",
        env=env,
        entrypoint=config.Entrypoint or (),
        command=config.Cmd or (),
        working_dir=config.WorkingDir,
    )


_T = TypeVar("_T")


def decode(raw: bytes, shape: type[_T], what: str) -> _T:
    """Return a JSON document as a shape; raise InvalidInput that says what does not read."""
    try:
        return msgspec.json.decode(raw, type=shape)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"{what} does not read: {error}") from error


def check_digest(digest: str) -> str:
    """Return a digest; raise InvalidInput unless it is a sha256 or sha512 in full."""
    if not _DIGEST.fullmatch(digest):
        raise InvalidInput(f"{digest[:80]!r} is not a digest (sha256:<64 hexadecimal digits>)")
    return digest


def digest_of(data: bytes) -> str:
    """Return `sha256:<hex>` of some bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def as_json(document: Any) -> bytes:
    """Return a document as JSON."""
    return msgspec.json.encode(document)
