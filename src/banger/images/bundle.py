"""Bundles: an installed image out to one file, and in again from a file or a URL.

Owns what a user writes for one, the order of an export and an import, and what of a bundle's
word is believed. The bytes are `bundle_format`'s, read and written in a process of its own
(`bundle_worker`); an import's digests are checked there before anything is installed here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import sys
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from banger import errors
from banger.errors import BangerError, CommandFailed, Conflict, Corrupted, InvalidInput, NoSpace
from banger.events import EventSink
from banger.host import download
from banger.host.commands import HostCommands
from banger.host.files import fsync_directory
from banger.host.tasks import piped
from banger.images import artifacts
from banger.images.artifacts import ImageManifest
from banger.images.bundle_format import FORMAT, ROOTFS
from banger.images.ext4 import check_ext4

ENDINGS = (".tar.zst", ".tar.zstd")
_TIMEOUT_S = 4 * 3600.0  # a large bundle over a slow line
_LINE_LIMIT_BYTES = 16 << 20
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_WORKER = (sys.executable, "-I", "-m", "banger.images.bundle_worker")
_KINDS: dict[str, type[BangerError]] = {
    kind.code: kind
    for kind in (Corrupted, InvalidInput, NoSpace, errors.Unavailable, errors.NotFound)
}


@dataclass(frozen=True, slots=True)
class BundleRef:
    """Where a bundle lies (a path or a URL), and sha256 of the file if it is known."""

    location: str
    sha256: str | None = None

    @property
    def origin(self) -> str:
        """Return the reference for people, without what a URL keeps secret."""
        return f"bundle:{download.shown(self.location)}"

    def default_name(self) -> str:
        """Return the image's name here: the file's name without its ending."""
        path = download.path_of(self.location)
        last = path.name if path else urllib.parse.urlsplit(self.location).path.rpartition("/")[2]
        for ending in (*ENDINGS, ".tar", ".zst", ".bundle"):
            last = last.removesuffix(ending)
        name = re.sub(r"[^a-z0-9._-]+", "-", urllib.parse.unquote(last).lower()).strip("-._")
        return name[:63].rstrip("-._") or "bundle"


@dataclass(frozen=True, slots=True)
class Exported:
    """A bundle that was written; `sha256` is hexadecimal, of the whole file."""

    path: Path
    sha256: str
    size_bytes: int


def parse_bundle(text: str) -> BundleRef | None:
    """Return the bundle that `text` names, or None when it is for others to read.

    That is `bundle:PATH` or `bundle:URL`, or an https, http or file URL that ends with
    `.tar.zst`; a URL may carry its pin as `#sha256=HEX`. Raises InvalidInput.
    """
    explicit = text.startswith("bundle:")
    location = text.removeprefix("bundle:")
    if not explicit and not re.match(r"(https?|file)://", location):
        return None
    if "://" not in location:
        if not location:
            raise InvalidInput("bundle: has no path", hint="write bundle:FILE.tar.zst")
        return BundleRef(location)
    location, _, fragment = location.partition("#")
    if not explicit and not urllib.parse.urlsplit(location).path.endswith(ENDINGS):
        return None
    download.split_url(location)
    sha256 = None
    if fragment:
        key, _, value = fragment.partition("=")
        if key != "sha256":
            raise InvalidInput(f"{fragment!r} is no pin", hint="write URL#sha256=HEX")
        sha256 = check_sha256(value)
    return BundleRef(location, sha256)


def check_sha256(text: str) -> str:
    """Return a pin in lower case; raise InvalidInput."""
    text = text.removeprefix("sha256:")
    if not _SHA256.fullmatch(text):
        raise InvalidInput(f"{text[:80]!r} is no sha256: 64 hexadecimal digits")
    return text.lower()


async def import_bundle(
    ref: BundleRef,
    name: str,
    *,
    data_dir: Path,
    commands: HostCommands,
    sink: EventSink,
    kernel: str = "",
    description: str = "",
    force: bool = False,
) -> ImageManifest:
    """Install the image of a bundle; failure and cancellation leave nothing behind.

    `kernel` and `description` stand above what the bundle says. What is believed of a bundle
    without a pin is whoever answers for its URL; http, where anybody can answer, needs one.

    Raises Conflict when the name is taken and `force` is not given, InvalidInput for what may
    not be asked for, Unavailable, NoSpace, and Corrupted for a bundle that is not whole, not
    the pinned one, or not clean.
    """
    if not force and artifacts.artifact_directory(data_dir, "image", name).exists():
        raise Conflict(
            f"image {name} is installed already",
            hint="--force replaces it, --name gives this one another name",
        )
    plain_http = "any" if ref.sha256 is not None else "never"
    if download.path_of(ref.location) is None:
        download.check_scheme(ref.location, "any" if ref.sha256 is not None else "never")
    async with artifacts.staging(data_dir, "image", name) as staged:
        rootfs = staged / "artifact" / ROOTFS
        rootfs.parent.mkdir(mode=0o700)
        sink.stage(f"reading {download.shown(ref.location)}")
        request = {
            "location": ref.location,
            "sha256": ref.sha256,
            "plain_http": plain_http,
            "rootfs": str(rootfs),
        }
        done = await _work({"unpack": request}, commands, sink)
        sink.stage("checking the file system")
        await check_ext4(rootfs, commands=commands)
        sink.stage("installing the image")
        rootfs.chmod(0o444)
        files, allocated = artifacts.measure(rootfs.parent)
        said = done["manifest"]
        manifest = ImageManifest(
            name=name,
            digest=said["digest"],
            size_bytes=files[ROOTFS],
            allocated_bytes=allocated,
            origin=ref.origin,
            description=description or said["description"] or f"from {ref.origin}",
            created_at=said["created_at"] or artifacts.now_rfc3339(),
            files=files,
            default_user=said["default_user"],
            default_env=said["default_env"],
            entrypoint=tuple(said["entrypoint"]),
            command=tuple(said["command"]),
            working_dir=said["working_dir"],
            kernel=kernel or said["kernel"],
            platform=said["platform"],
            source_digest=f"sha256:{done['sha256']}",
            packages=said["packages"],
            extras=said["extras"],
        )
        await asyncio.to_thread(
            artifacts.install, rootfs.parent, data_dir, "image", manifest, force=force
        )
    return manifest


async def export_bundle(
    name: str,
    output: Path,
    *,
    data_dir: Path,
    commands: HostCommands,
    sink: EventSink,
    force: bool = False,
) -> Exported:
    """Write an installed image to `output` as a bundle, whole or not at all.

    Raises NotFound and Corrupted for the image, Conflict when the file is there and `force` is
    not given, InvalidInput for a path that cannot be, NoSpace.
    """
    image = await asyncio.to_thread(artifacts.read, data_dir, "image", name, ImageManifest)
    if not output.is_absolute() or output.is_dir() or not output.parent.is_dir():
        reason = "is a directory" if output.is_dir() else "is no path of a file in a directory"
        raise InvalidInput(f"{output} {reason}", hint=f"write -o FILE{ENDINGS[0]}")
    _refuse_existing(output, force=force)
    staged = output.with_name(f".{output.name[:200]}.{secrets.token_hex(4)}")
    origin = _public(image.origin)
    said = {
        "format": FORMAT,
        "name": image.name,
        "digest": image.digest,
        "origin": origin,
        "description": image.description.replace(image.origin, origin),
        "created_at": image.created_at,
        "platform": image.platform,
        "kernel": image.kernel,
        "default_user": image.default_user,
        "default_env": image.default_env,
        "entrypoint": image.entrypoint,
        "command": image.command,
        "working_dir": image.working_dir,
        "packages": image.packages,
        "extras": image.extras,
    }
    rootfs = artifacts.rootfs_of(data_dir, image)
    request = {"rootfs": str(rootfs), "output": str(staged), "manifest": said}
    try:
        done = await _work({"pack": request}, commands, sink)
        await asyncio.to_thread(_put_in_place, staged, output, force=force)
    finally:
        staged.unlink(missing_ok=True)
    return Exported(output, done["sha256"], done["packed_bytes"])


def _public(origin: str) -> str:
    """Return an origin for strangers: of a path on this host its last part."""
    local = re.fullmatch(r"([a-z-]+:)(?:file:)?[/.~].*?([^/]+)/*", origin)
    return f"{local[1]}{local[2]}" if local else origin


def _put_in_place(staged: Path, output: Path, *, force: bool) -> None:
    if force:
        os.replace(staged, output)
    else:
        try:
            os.link(staged, output)  # unlike a rename it never replaces what came meanwhile
        except FileExistsError:
            _refuse_existing(output, force=False)
        except OSError:  # a file system without hard links
            _refuse_existing(output, force=False)
            os.replace(staged, output)
    fsync_directory(output.parent)


def _refuse_existing(output: Path, *, force: bool) -> None:
    if not force and os.path.lexists(output):
        raise Conflict(f"{output} exists", hint="--force replaces it")
    if output.exists() and not output.is_file():
        raise InvalidInput(f"{output} is not a regular file, and would be replaced by one")


async def _work(request: dict[str, Any], commands: HostCommands, sink: EventSink) -> dict[str, Any]:
    """Have the worker do a request; return what it reported, raise what it found wrong."""
    done: dict[str, Any] | None = None
    error: BangerError | None = None

    def take(message: dict[str, Any]) -> None:
        nonlocal done, error
        if "progress" in message:
            sink.progress(*message["progress"])
        elif "stage" in message:
            sink.stage(message["stage"])
        elif "error" in message:
            found = message["error"]
            kind = _KINDS.get(found["code"], BangerError)
            error = kind(found["message"], hint=found.get("hint", ""))
        elif "done" in message:
            done = message["done"]

    failed: CommandFailed | None = None

    async def run(write_fd: int) -> None:
        nonlocal failed
        # Not raised here: the reason is in what the reader has yet to read.
        try:
            await commands.run(
                _WORKER, stdin=msgspec.json.encode(request), stdout=write_fd, timeout_s=_TIMEOUT_S
            )
        except CommandFailed as caught:
            failed = caught

    await piped(run, lambda read_fd: _listen(read_fd, take))
    if error is not None:
        raise error
    if done is None or failed is not None:
        said = failed.stderr_tail.splitlines()[-1:] if failed else []
        raise Corrupted(f"the bundle's reader ended early: {''.join(said) or 'it said nothing'}")
    return done


async def _listen(fd: int, take: Callable[[dict[str, Any]], None]) -> None:
    stream = asyncio.StreamReader(limit=_LINE_LIMIT_BYTES)
    # A descriptor of its own: the transport closes it, and `piped` closes the other.
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(os.dup(fd), "rb", buffering=0)
    )
    with contextlib.closing(transport):
        while line := await stream.readline():
            take(json.loads(line))
