"""Images in files: OCI layouts, tars of them, and what `docker save` wrote.

Owns finding blobs in a directory (image-spec's image-layout.md) or inside a tar, which is
read in place: of an archive only the headers are looked at, and nothing is unpacked to disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import posixpath
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol, cast

import msgspec

from banger.errors import Corrupted, InvalidInput, NotFound, nearest
from banger.images.oci import (
    MAX_DOCUMENT_BYTES,
    OCI_INDEX,
    OCI_MANIFEST,
    BlobFile,
    Descriptor,
    as_json,
    check_digest,
    decode,
    digest_of,
)
from banger.images.reference import DockerArchiveRef, LayoutRef, OciArchiveRef, parse_source
from banger.images.unpacking import MAX_HEADER_BYTES, sniff

_REF_NAME = "org.opencontainers.image.ref.name"
_IMAGE_NAME = "io.containerd.image.name"
_MAX_MEMBERS = 10_000
_HASH_CHUNK_BYTES = 1 << 20
_TAR_LAYER = "application/vnd.oci.image.layer.v1.tar"
_CONFIG = "application/vnd.oci.image.config.v1+json"


class _Files(Protocol):
    """Where the files of a layout are: a directory or an archive."""

    def find(self, name: str) -> BlobFile | None:
        """Return a file by its name below the layout, None when there is none."""


class _Directory:
    def __init__(self, path: Path) -> None:
        self._path = path

    def find(self, name: str) -> BlobFile | None:
        path = self._path / name
        try:
            # Whoever made the layout may have linked into it; only its own plain files count.
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            size = os.fstat(fd).st_size
        finally:
            os.close(fd)
        return BlobFile(path, 0, size) if path.is_file() else None


class _Archive:
    """The files in a tar by name, with the links of old `docker save` followed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        try:
            with open(path, "rb") as file:
                if sniff(file.read(8)) != "none":
                    raise InvalidInput(
                        f"{path} is compressed",
                        hint=f"unpack it first: zcat, xzcat or zstdcat {path}",
                    )
                file.seek(0)
                self._index(file)
        except OSError as error:
            raise InvalidInput(f"cannot read {path}: {error.strerror}") from error
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            raise InvalidInput(f"{path} is not a tar that reads: {error}") from error

    def _index(self, file: io.BufferedReader) -> None:
        bounded = cast("IO[bytes]", _Bounded(file))
        with tarfile.open(fileobj=bounded, mode="r:", errors="surrogateescape") as archive:
            for count, info in enumerate(archive):
                if count > _MAX_MEMBERS:
                    raise InvalidInput(f"{self._path} has more than {_MAX_MEMBERS} members")
                name = _clean(info.name)
                if info.issym():
                    target = posixpath.join(posixpath.dirname(name), info.linkname)
                    self._links[name] = _clean(target)
                elif info.islnk():
                    self._links[name] = _clean(info.linkname)
                elif info.isreg() and info.sparse is None:
                    self._files[name] = (info.offset_data, info.size)

    def find(self, name: str) -> BlobFile | None:
        full = _clean(name)
        full = self._links.get(full, full)
        found = self._files.get(full)
        return None if found is None else BlobFile(self._path, *found)


class _Bounded:
    """As much of a file as tarfile needs, and no more for a header than is its due."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self.tell = file.tell
        self.seek = file.seek

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > MAX_HEADER_BYTES:
            raise InvalidInput("the tar has a header above 1 MiB")
        return self._file.read(size)


class LayoutSource:
    """An OCI layout as `oci.BlobSource`; every blob is verified when it is asked for."""

    def __init__(self, files: _Files, origin: str, tag: str | None) -> None:
        self._files = files
        self.origin = origin
        self._tag = tag

    async def manifest(self, descriptor: Descriptor | None) -> tuple[bytes, str]:
        """Return a manifest or index of the layout."""
        if descriptor is not None:
            if descriptor.size > MAX_DOCUMENT_BYTES:
                raise InvalidInput(f"{self.origin} has a manifest of {descriptor.size} bytes")
            return _read(await self.blob(descriptor, lambda _: None)), descriptor.media_type
        found = self._files.find("index.json")
        if found is None or self._files.find("oci-layout") is None:
            raise InvalidInput(
                f"{self.origin} is not an OCI image layout: it has no index.json and oci-layout",
                hint="`skopeo copy docker://IMAGE oci:DIR` and `umoci` make one",
            )
        raw = _read(found)
        return self._named(raw), OCI_INDEX

    def _named(self, raw: bytes) -> bytes:
        """Return the index with what the tag names, or as it is when it holds one image."""
        try:
            index = json.loads(raw)
            manifests = [one for one in index["manifests"] if isinstance(one, dict)]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InvalidInput(f"the index.json of {self.origin} does not read: {error}") from error
        tags = [_tag_of(one) for one in manifests]
        if self._tag is None:
            known = sorted({tag for tag in tags if tag})
            if len(known) > 1:
                raise InvalidInput(
                    f"{self.origin} holds the images {', '.join(known)}",
                    hint=f"name one: {self.origin}:{known[0]}",
                )
            return raw
        chosen = [one for one, tag in zip(manifests, tags, strict=True) if tag == self._tag]
        if not chosen:
            known = sorted({tag for tag in tags if tag})
            close = nearest(self._tag, known) or (known[0] if known else "")
            raise NotFound(
                f"{self.origin}: nothing is tagged {self._tag} there",
                hint=f"it has {', '.join(known)}; did you mean {close}?"
                if known
                else "leave :TAG out",
            )
        return json.dumps({**index, "manifests": chosen}).encode()

    async def blob(self, descriptor: Descriptor, progress: Callable[[int], None]) -> BlobFile:
        """Return a blob of the layout after hashing it."""
        algorithm, _, encoded = check_digest(descriptor.digest).partition(":")
        found = self._files.find(f"blobs/{algorithm}/{encoded}")
        if found is None:
            raise Corrupted(f"{self.origin} lacks the blob {descriptor.digest}")
        await verify(found, descriptor, self.origin)
        progress(found.size)
        return found


class DockerArchiveSource:
    """What `docker save` wrote, shown as an OCI image.

    Its layers are named by what they unpack to (diff_id), which the unpacking checks.
    """

    def __init__(self, files: _Files, origin: str, name: str | None) -> None:
        self._files = files
        self.origin = origin
        self._name = name and _plain(name)
        self._blobs: dict[str, BlobFile] = {}

    async def manifest(self, descriptor: Descriptor | None) -> tuple[bytes, str]:
        """Return a manifest made of the archive's manifest.json."""
        if descriptor is not None:
            raise InvalidInput(f"{self.origin} has no further manifests")
        found = self._files.find("manifest.json")
        if found is None:
            raise InvalidInput(
                f"{self.origin} is not what `docker save` writes: it has no manifest.json",
                hint="a tar of an OCI layout is pulled as oci-archive:FILE, one of a root file "
                "system as rootfs:FILE",
            )
        entry = self._chosen(
            decode(_read(found), list[_Saved], f"the manifest.json of {self.origin}")
        )
        config = self._need(entry.Config)
        raw = _read(config)
        digest = digest_of(raw)
        said = entry.Config.removesuffix(".json").rpartition("/")[2]
        if len(said) == 64 and digest != f"sha256:{said}":
            raise Corrupted(f"the configuration in {self.origin} is not the one it is named after")
        diff_ids = decode(raw, _DiffIds, f"the configuration of {self.origin}").rootfs.diff_ids
        if len(diff_ids) != len(entry.Layers):
            raise InvalidInput(f"{self.origin}: its configuration has other layers than it")
        self._blobs[digest] = config
        layers = []
        for diff_id, name in zip(diff_ids, entry.Layers, strict=True):
            blob = self._blobs[check_digest(diff_id)] = self._need(name)
            layers.append(Descriptor(_TAR_LAYER, diff_id, blob.size))
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": Descriptor(_CONFIG, digest, config.size),
            "layers": layers,
        }
        return as_json(document), OCI_MANIFEST

    def _chosen(self, saved: list[_Saved]) -> _Saved:
        names = [name for one in saved for name in one.RepoTags or ()]
        if self._name is None:
            if len(saved) != 1:
                raise InvalidInput(
                    f"{self.origin} holds {len(saved)} images",
                    hint=f"name one: {self.origin}:{names[0]}" if names else "",
                )
            return saved[0]
        for one in saved:
            if self._name in map(_plain, one.RepoTags or ()):
                return one
        raise NotFound(
            f"{self.origin}: no image is named {self._name} there",
            hint=f"it has {', '.join(names)}" if names else "leave the name out",
        )

    def _need(self, name: str) -> BlobFile:
        found = self._files.find(name)
        if found is None:
            raise Corrupted(f"{self.origin} lacks its file {name[:120]!r}")
        return found

    async def blob(self, descriptor: Descriptor, progress: Callable[[int], None]) -> BlobFile:
        """Return a file of the archive."""
        progress(descriptor.size)
        return self._blobs[descriptor.digest]


class _Saved(msgspec.Struct, frozen=True):
    """One entry of manifest.json, as moby's image/tarexport writes it."""

    Config: str
    Layers: tuple[str, ...]
    RepoTags: tuple[str, ...] | None = None


class _RootFs(msgspec.Struct, frozen=True):
    diff_ids: tuple[str, ...] = ()


class _DiffIds(msgspec.Struct, frozen=True):
    rootfs: _RootFs = _RootFs()


def open_layout(ref: LayoutRef) -> LayoutSource:
    """Open an OCI layout; raise InvalidInput when there is no directory."""
    path = Path(ref.path)
    if not path.is_dir():
        raise InvalidInput(
            f"{ref.path} is not a directory", hint="a tar of a layout is oci-archive:"
        )
    return LayoutSource(_Directory(path), ref.origin, ref.tag)


async def open_archive(ref: OciArchiveRef | DockerArchiveRef) -> LayoutSource | DockerArchiveSource:
    """Open a tar of an OCI layout or of `docker save`, after a look at its headers."""
    files = await asyncio.to_thread(_Archive, Path(ref.path))
    if isinstance(ref, OciArchiveRef):
        return LayoutSource(files, ref.origin, ref.tag)
    return DockerArchiveSource(files, ref.origin, ref.name)


def name_in_archive(ref: DockerArchiveRef) -> DockerArchiveRef:
    """Return a reference to the one image of an archive by its name, if it has one."""
    if ref.name is not None:
        return ref
    try:
        found = _Archive(Path(ref.path)).find("manifest.json")
        saved = decode(_read(found), list[_Saved], ref.origin) if found is not None else []
        names = [name for one in saved for name in one.RepoTags or ()]
        # Parsed again: an archive may say anything.
        text = f"docker-archive:{ref.path}:{names[0]}" if len(names) == 1 else ""
        named = parse_source(text) if text else ref
    except InvalidInput:  # the import says what is wrong with it
        return ref
    return named if isinstance(named, DockerArchiveRef) and named.path == ref.path else ref


async def verify(blob: BlobFile, descriptor: Descriptor, origin: str) -> None:
    """Raise Corrupted unless a blob has the size and the digest of its descriptor."""
    if blob.size != descriptor.size:
        raise Corrupted(
            f"{origin}: the blob {descriptor.digest} has {blob.size} of {descriptor.size} bytes"
        )
    algorithm, _, encoded = descriptor.digest.partition(":")
    if await asyncio.to_thread(_hash, blob, algorithm) != encoded:
        raise Corrupted(f"{origin}: the blob {descriptor.digest} is damaged: its digest differs")


def _hash(blob: BlobFile, algorithm: str) -> str:
    digest = hashlib.new(algorithm)
    with open(blob.path, "rb", buffering=0) as file:
        file.seek(blob.offset)
        left = blob.size
        while left and (piece := file.read(min(left, _HASH_CHUNK_BYTES))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def _clean(name: str) -> str:
    """Return a member's name from the archive's root on, without `..`."""
    return posixpath.normpath("/" + name.lstrip("/"))


def _plain(name: str) -> str:
    """Return a RepoTag as Docker shows it: `docker.io/library/app:v1` is `app:v1`."""
    return name.removeprefix("docker.io/").removeprefix("library/")


def _read(blob: BlobFile) -> bytes:
    if blob.size > MAX_DOCUMENT_BYTES:
        raise InvalidInput(f"{blob.path} has a document of {blob.size} bytes: at most 4 MiB")
    with open(blob.path, "rb") as file:
        file.seek(blob.offset)
        return file.read(blob.size)


def _tag_of(descriptor: dict[str, Any]) -> str:
    annotations = descriptor.get("annotations")
    if not isinstance(annotations, dict):
        return ""
    name = annotations.get(_REF_NAME) or annotations.get(_IMAGE_NAME) or ""
    return name if isinstance(name, str) else ""
