"""Artifacts on disk: images and kernels, whole or absent.

Owns this tree, below the data directory:

    <data>/images/<name>/manifest.json   written last; its presence is the artifact's presence
    <data>/images/<name>/...             the files the manifest names, with their sizes
    <data>/kernels/<name>/...            the same
    <data>/staging/<kind>-<name>-<token>/        an artifact being made, or one on its way out
    <data>/staging/<kind>-<name>-<token>.lock    flocked by its maker as long as it lives

A maker works in its staging directory and renames it into place; a crash leaves a staging
directory whose lock nobody holds, which `sweep_staging` removes. A reader never sees half
an artifact. What the files mean is left to `images` and `kernels`.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from banger.errors import Conflict, Corrupted, InvalidInput, NotFound, nearest
from banger.host.files import (
    allocated_bytes,
    data_extents,
    exchange,
    fsync_directory,
    make_private_directory,
    no_space_named,
    remove_tree,
    write_atomic,
)
from banger.host.locks import locked, try_lock

_LOG = logging.getLogger(__name__)

Kind = Literal["image", "kernel"]
MANIFEST = "manifest.json"
MOUNT_TABLE = "/proc/self/mountinfo"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_REMOVE_ATTEMPTS = 20  # two seconds: what a killed dpkg needs to be gone on a busy host
_HASH_CHUNK_BYTES = 1024 * 1024


class LinkedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A root file system that stays where its owner has it; how it was when it was checked."""

    path: str
    size_bytes: int
    mtime_ns: int
    inode: int


class ImageManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What an installed image is. `digest` is sha256 of rootfs.ext4; `files` their sizes."""

    name: str
    digest: str
    size_bytes: int
    allocated_bytes: int
    origin: str
    description: str
    created_at: str  # RFC 3339, UTC
    files: dict[str, int]
    default_user: str = "root"
    default_env: dict[str, str] = {}
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    working_dir: str = ""
    kernel: str = ""  # the kernel a VM of this image gets when none is asked for
    platform: str = ""  # as `linux/amd64`
    source_digest: str = ""  # what a registry calls it
    packages: dict[str, str] = {}
    extras: dict[str, str] = {}  # extra -> version, or "missing: why"
    linked: LinkedFile | None = None  # then there is no rootfs.ext4 among `files`


class KernelManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What an installed kernel is. `digest` is sha256 of vmlinux; `files` their sizes."""

    name: str
    release: str
    digest: str
    size_bytes: int
    allocated_bytes: int
    origin: str
    description: str
    created_at: str  # RFC 3339, UTC
    files: dict[str, int]
    boot_modules: tuple[str, ...] = ()


_Manifest = TypeVar("_Manifest", ImageManifest, KernelManifest)


def artifact_directory(data_dir: Path, kind: Kind, name: str) -> Path:
    """Return where an artifact lives; raise InvalidInput for a name that is not one."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"{name!r} is not a name for {'an' if kind == 'image' else 'a'} {kind}",
            hint="use up to 63 of a-z 0-9 . _ - and begin with a letter or a digit",
        )
    return data_dir / f"{kind}s" / name


@contextlib.asynccontextmanager
async def staging(data_dir: Path, kind: Kind, name: str) -> AsyncIterator[Path]:
    """Make a private staging directory; remove it on the way out unless it was installed."""
    artifact_directory(data_dir, kind, name)
    base = make_private_directory(data_dir / "staging")
    directory = base / f"{kind}-{name}-{secrets.token_hex(4)}"
    lock_path = directory.with_name(directory.name + ".lock")
    with locked(lock_path):
        try:
            directory.mkdir(mode=0o700)
            yield directory
        finally:
            # Not to_thread: a cancelled task must not leave before its files are gone.
            _remove_unmounted(directory)
            lock_path.unlink(missing_ok=True)


def _remove_unmounted(directory: Path) -> None:
    """Remove a tree; raise Conflict, and remove nothing, when a mount lies below it.

    No maker mounts anything in our namespace. Were one to, removing the tree would remove
    what is mounted.
    """
    below = f"{os.path.realpath(directory)}/"
    with open(MOUNT_TABLE, encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            mount_point = line.split()[4].encode("latin-1", "replace").decode("unicode_escape")
            if mount_point.startswith(below):
                raise Conflict(
                    f"{mount_point} is mounted below {directory}, which is to be removed",
                    hint=f"umount {mount_point}",
                )
    for attempt in range(_REMOVE_ATTEMPTS):
        try:
            remove_tree(directory)
            return
        except OSError:
            # A killed child of a child may still write for a moment after its parent is gone.
            if attempt == _REMOVE_ATTEMPTS - 1:
                raise
            time.sleep(0.1)


def sweep_staging(data_dir: Path) -> list[str]:
    """Remove what dead makers left in staging and return the names removed; never raise for one."""
    base = data_dir / "staging"
    swept = []
    for entry in sorted(base.iterdir()) if base.is_dir() else []:
        if entry.name.endswith(".lock"):
            continue
        lock_path = entry.with_name(entry.name + ".lock")
        fd = try_lock(lock_path)
        if fd is None:
            continue
        try:
            _remove_unmounted(entry)
            lock_path.unlink(missing_ok=True)
            swept.append(entry.name)
        except (OSError, Conflict) as error:
            _LOG.warning("staging: %s is left where it is: %s", entry.name, error)
        finally:
            os.close(fd)
    for entry in base.glob("*.lock") if base.is_dir() else []:
        fd = try_lock(entry)
        if fd is not None:
            if not entry.with_suffix("").exists():
                entry.unlink(missing_ok=True)
            os.close(fd)
    return swept


def install(
    staged: Path,
    data_dir: Path,
    kind: Kind,
    manifest: ImageManifest | KernelManifest,
    *,
    force: bool,
) -> None:
    """Make a staged directory durable and rename it to its place.

    Without `force` an artifact that is there already raises Conflict. With it the two change
    places in one step, so that a crash leaves one of them; the old one goes with the staging.
    """
    target = artifact_directory(data_dir, kind, manifest.name)
    write_atomic(
        staged / MANIFEST,
        json.dumps(msgspec.to_builtins(manifest), indent=2, sort_keys=True).encode() + b"\n",
        mode=0o644,
    )
    with no_space_named(staged):
        for root, _, names in os.walk(staged):
            for name in names:
                fd = os.open(os.path.join(root, name), os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
            fsync_directory(Path(root))
    make_private_directory(target.parent)
    if os.path.lexists(target):
        if not force:
            raise Conflict(
                f"{kind} {manifest.name} is installed already",
                hint=f"`banger {kind} pull --force {manifest.name}` replaces it",
            )
        exchange(staged, target)
    else:
        os.rename(staged, target)
    fsync_directory(target.parent)


def delete(data_dir: Path, kind: Kind, name: str) -> None:
    """Remove an artifact, a corrupted one too; raise NotFound when there is none."""
    target = artifact_directory(data_dir, kind, name)
    if not os.path.lexists(target):
        raise _not_found(data_dir, kind, name)
    aside = make_private_directory(data_dir / "staging") / f"{kind}-{name}-{secrets.token_hex(4)}"
    os.rename(target, aside)  # gone in one step; a crash from here on leaves work for the sweep
    fsync_directory(target.parent)
    remove_tree(aside)


def names(data_dir: Path, kind: Kind) -> list[str]:
    """Return the names of installed artifacts, sorted; corrupted ones are among them."""
    base = data_dir / f"{kind}s"
    return sorted(entry.name for entry in base.iterdir()) if base.is_dir() else []


def read(data_dir: Path, kind: Kind, name: str, shape: type[_Manifest]) -> _Manifest:
    """Return the manifest of an installed artifact after a look at its files.

    Raises NotFound when it is not installed, Corrupted when the manifest does not read or
    a file is missing or has another size.
    """
    target = artifact_directory(data_dir, kind, name)
    try:
        raw = (target / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        if not target.exists():
            raise _not_found(data_dir, kind, name) from error
        raise _corrupted(kind, name, "it has no manifest") from error
    try:
        manifest = msgspec.json.decode(raw, type=shape)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _corrupted(kind, name, f"its manifest does not read: {error}") from error
    if manifest.name != name:
        raise _corrupted(kind, name, f"its manifest names {manifest.name!r}")
    for file, size_bytes in manifest.files.items():
        try:
            found = os.lstat(target / file).st_size
        except OSError as error:
            raise _corrupted(kind, name, f"its file {file} is missing") from error
        if found != size_bytes:
            raise _corrupted(kind, name, f"its file {file} has {found} of {size_bytes} bytes")
    if isinstance(manifest, ImageManifest) and manifest.linked is not None:
        _check_linked(name, manifest.linked)
    return manifest


def rootfs_of(data_dir: Path, manifest: ImageManifest) -> Path:
    """Return the path of an image's root file system; never written to, wherever it lies."""
    if manifest.linked is not None:
        return Path(manifest.linked.path)
    return artifact_directory(data_dir, "image", manifest.name) / "rootfs.ext4"


def linked_file(path: Path) -> LinkedFile:
    """Return how a file is now."""
    found = os.stat(path)
    return LinkedFile(
        path=str(path),
        size_bytes=found.st_size,
        mtime_ns=found.st_mtime_ns,
        inode=found.st_ino,
    )


def _check_linked(name: str, linked: LinkedFile) -> None:
    try:
        changed = linked_file(Path(linked.path)) != linked
        reason = "was changed since it was registered"
    except OSError as error:
        changed, reason = True, f"cannot be looked at: {error.strerror}"
    if changed:
        raise Corrupted(
            f"image {name} is linked to {linked.path}, which {reason}",
            hint=f"`banger image register --force --link --name {name} --rootfs {linked.path}` "
            f"takes it as it is now, `banger image delete {name}` forgets it",
        )


def measure(staged: Path) -> tuple[dict[str, int], int]:
    """Return the size of every file below a staged artifact, and the bytes allocated to all."""
    files = {
        str(path.relative_to(staged)): path.lstat().st_size
        for path in sorted(staged.rglob("*"))
        if path.is_file()
    }
    return files, allocated_bytes(staged)


def sha256_of(path: Path) -> str:
    """Return `sha256:<hex>` of a file; holes are hashed without being read."""
    digest = hashlib.sha256()
    zeros = bytes(_HASH_CHUNK_BYTES)
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        buffer = memoryview(bytearray(_HASH_CHUNK_BYTES))
        position = 0
        for start, end in [*data_extents(file.fileno(), size), (size, size)]:
            while position < start:
                count = min(start - position, _HASH_CHUNK_BYTES)
                digest.update(zeros if count == _HASH_CHUNK_BYTES else zeros[:count])
                position += count
            file.seek(start)
            while position < end:
                count = file.readinto(buffer[: min(end - position, _HASH_CHUNK_BYTES)])
                if not count:
                    raise Corrupted(f"{path} became shorter while it was read")
                digest.update(buffer[:count])
                position += count
    return f"sha256:{digest.hexdigest()}"


async def digest_file(path: Path) -> str:
    """Return `sha256_of` a file, computed beside the event loop."""
    return await asyncio.to_thread(sha256_of, path)


def now_rfc3339() -> str:
    """Return the present time, in UTC, to the second."""
    return rfc3339(time.time())


def rfc3339(seconds: float) -> str:
    """Return a time since the epoch as RFC 3339, in UTC, to the second."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _not_found(data_dir: Path, kind: Kind, name: str) -> NotFound:
    close = nearest(name, names(data_dir, kind))
    return NotFound(
        f"{kind} {name!r} is not installed",
        hint=f"did you mean {close}?" if close else f"`banger {kind} pull {name}`",
    )


def _corrupted(kind: Kind, name: str, why: str) -> Corrupted:
    return Corrupted(
        f"{kind} {name} is corrupted: {why}",
        hint=f"`banger {kind} pull --force {name}` makes it anew, "
        f"`banger {kind} delete {name}` removes it",
    )


def manifest_as_json(manifest: ImageManifest | KernelManifest) -> dict[str, Any]:
    """Return a manifest as plain JSON values."""
    built: dict[str, Any] = msgspec.to_builtins(manifest)
    return built
