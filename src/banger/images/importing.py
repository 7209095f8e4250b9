"""Images of layers: from any source of blobs to an installed ext4.

Owns the order of an import (fetch, index, merge into mke2fs, attributes, check, install) and
the talk with the process that reads the layers (`images.flatten`). Leaves where blobs come from
to `registry` and `layouts`, and joining equal pulls to the services.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from banger.errors import BangerError, CommandFailed, Conflict, Corrupted, InvalidInput, NoSpace
from banger.events import EventSink
from banger.host.commands import HostCommands
from banger.host.tasks import piped, together
from banger.images import artifacts
from banger.images.artifacts import ImageManifest
from banger.images.ext4 import build_ext4, check_ext4, probe_strategy, size_for
from banger.images.inodes import Marked, apply_xattrs
from banger.images.layers import Limits
from banger.images.layouts import open_archive, open_layout
from banger.images.oci import (
    BlobFile,
    BlobSource,
    Defaults,
    Descriptor,
    Platform,
    host_platform,
    parse_platform,
    resolve,
)
from banger.images.pull import ROOTFS
from banger.images.reference import (
    DockerArchiveRef,
    LayoutRef,
    OciArchiveRef,
    RegistryRef,
    RootfsRef,
)

_TIMEOUT_S = 3600.0
_LINE_LIMIT_BYTES = 16 << 20  # the last message names every inode with odd attributes
# A top layer from here on is written while it is read; below, nobody would notice.
STREAM_FROM_BYTES = 64 << 20
_PIPE_BYTES = 1 << 20  # F_SETPIPE_SZ; as much as a user may have

Layered = RegistryRef | LayoutRef | OciArchiveRef | DockerArchiveRef
OpenRegistry = Callable[[RegistryRef, EventSink], AbstractAsyncContextManager[BlobSource]]


@dataclass(frozen=True, slots=True)
class ImportRequest:
    """What to import and what to call it; without `size_bytes` the file system fits its files.

    `like` is an image whose manifest says what a root file system cannot say of itself; `origin`
    names the source where its path does not.
    """

    source: Layered | RootfsRef
    name: str
    description: str = ""
    kernel: str = ""
    platform: str = ""
    size_bytes: int | None = None
    force: bool = False
    origin: str = ""
    like: ImageManifest | None = None


@dataclass(slots=True)
class _Layers:
    """The layers of an import, from the bottom up, each there once it is awaited."""

    each: list[Callable[[], Any]]
    total_bytes: int
    defaults: Defaults = field(default_factory=Defaults)
    platform: str = ""
    digest: str = ""
    newest: int = 0  # no file is expected to be newer, in seconds since the epoch; 0: unknown


async def import_image(
    request: ImportRequest,
    *,
    data_dir: Path,
    commands: HostCommands,
    sink: EventSink,
    limits: Limits,
    open_registry: OpenRegistry,
) -> ImageManifest:
    """Import an image and install it; cancellation and failure leave nothing behind.

    Raises Conflict when the name is taken and `force` is not given, InvalidInput and Corrupted
    for what no image may hold, and what the source raises.
    """
    platform = parse_platform(request.platform) if request.platform else host_platform()
    origin = request.origin or request.source.origin
    if not request.force and artifacts.artifact_directory(data_dir, "image", request.name).exists():
        raise Conflict(
            f"image {request.name} is installed already",
            hint="--force makes it anew, --name gives this one another name",
        )
    async with artifacts.staging(data_dir, "image", request.name) as staged:
        rootfs = staged / "artifact" / ROOTFS
        rootfs.parent.mkdir(mode=0o700)
        work = staged / "work"
        work.mkdir(mode=0o700)
        async with _layers_of(request, platform, work, commands, sink, open_registry) as layers:
            await _build(layers, rootfs, work, request, limits, commands, sink)
        sink.stage("installing the image")
        rootfs.chmod(0o444)
        digest = await _digest_synced(rootfs)
        files, allocated = artifacts.measure(rootfs.parent)
        manifest = ImageManifest(
            name=request.name,
            digest=digest,
            size_bytes=files[ROOTFS],
            allocated_bytes=allocated,
            origin=origin,
            description=request.description or f"imported from {origin}",
            created_at=artifacts.now_rfc3339(),
            files=files,
            default_user=layers.defaults.user,
            default_env=layers.defaults.env or {},
            entrypoint=layers.defaults.entrypoint,
            command=layers.defaults.command,
            working_dir=layers.defaults.working_dir,
            kernel=request.kernel,
            platform=layers.platform,
            source_digest=layers.digest,
        )
        await asyncio.to_thread(
            artifacts.install, rootfs.parent, data_dir, "image", manifest, force=request.force
        )
    return manifest


async def _digest_synced(path: Path) -> str:
    """Return a file's digest while the disk takes it: `install` finds it synced."""

    def sync() -> None:
        with open(path, "rb") as file:
            os.fsync(file.fileno())

    syncing = asyncio.create_task(asyncio.to_thread(sync))
    try:
        return await artifacts.digest_file(path)
    finally:
        await syncing


# -- the layers of a source


@contextlib.asynccontextmanager
async def _layers_of(
    request: ImportRequest,
    platform: Platform,
    work: Path,
    commands: HostCommands,
    sink: EventSink,
    open_registry: OpenRegistry,
) -> AsyncIterator[_Layers]:
    source = request.source
    if isinstance(source, RootfsRef):
        layers = await _rootfs_layer(Path(source.path), platform, work, commands, sink)
        if request.like is not None:
            layers.defaults = _defaults_of(request.like)
            layers.platform = request.like.platform
        yield layers
        return
    async with contextlib.AsyncExitStack() as stack:
        opened: BlobSource
        if isinstance(source, RegistryRef):
            sink.stage("asking the registry")
            opened = await stack.enter_async_context(open_registry(source, sink))
        elif isinstance(source, LayoutRef):
            opened = open_layout(source)
        else:
            sink.stage("reading the archive")
            opened = await open_archive(source)
        image = await resolve(opened, platform)
        total = sum(layer.size for layer in image.layers)
        done = 0

        def progress(count: int) -> None:
            nonlocal done
            done += count
            sink.progress(done, total)

        sink.stage("fetching layers")
        # All at once: the source bounds how many run; equal layers are fetched once.
        tasks: dict[str, asyncio.Task[BlobFile]] = {}
        for layer in image.layers:
            if layer.digest not in tasks:
                tasks[layer.digest] = asyncio.create_task(opened.blob(layer, progress))

        def waiter(layer: Descriptor, diff_id: str) -> Callable[[], Any]:
            async def wait() -> tuple[BlobFile, str]:
                return await asyncio.shield(tasks[layer.digest]), diff_id

            return wait

        # Elsewhere the packed bytes were verified; hashing the unpacked ones too would take half
        # as long again as inflating them.
        named_by_content = isinstance(source, DockerArchiveRef)
        each = [
            waiter(layer, diff_id if named_by_content else "")
            for layer, diff_id in zip(image.layers, image.diff_ids, strict=True)
        ]
        try:
            yield _Layers(each, total, image.defaults, image.platform, image.digest, image.created)
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)


def _defaults_of(manifest: ImageManifest) -> Defaults:
    return Defaults(
        user=manifest.default_user,
        env=manifest.default_env,
        entrypoint=manifest.entrypoint,
        command=manifest.command,
        working_dir=manifest.working_dir,
    )


async def _rootfs_layer(
    path: Path, platform: Platform, work: Path, commands: HostCommands, sink: EventSink
) -> _Layers:
    """Return a tar as one layer; a directory becomes a tar first."""
    if path.is_dir():
        sink.stage(f"reading {path}")
        path = await _tar_of(path, work, commands)
    elif not path.is_file():
        raise InvalidInput(f"{path} is neither a tar nor a directory")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error

    async def ready() -> tuple[BlobFile, str]:
        return BlobFile(path, 0, size), ""

    newest = int(path.stat().st_mtime)
    return _Layers([ready], size, platform=str(platform), newest=newest)


async def _tar_of(directory: Path, work: Path, commands: HostCommands) -> Path:
    """Write a directory as a tar; what the caller owns becomes root's, unless it is root."""
    output = work / "rootfs.tar"
    owner_map = work / "owners"
    uid, gid = os.getuid(), os.getgid()
    owner_map.write_text(f"+{uid} root:0\n" if uid else "")
    group_map = work / "groups"
    group_map.write_text(f"+{gid} root:0\n" if uid else "")
    with open(output, "xb") as file:
        await commands.run(
            [
                "tar", "--create", "--format=posix", "--numeric-owner", "--sparse",
                "--xattrs", "--xattrs-include=*", f"--owner-map={owner_map}",
                f"--group-map={group_map}", "--one-file-system",
                f"--directory={directory}", "--file=-", ".",
            ],
            stdout=file,
            timeout_s=_TIMEOUT_S,
        )  # fmt: skip
    return output


# -- merging


async def _build(
    layers: _Layers,
    rootfs: Path,
    work: Path,
    request: ImportRequest,
    limits: Limits,
    commands: HostCommands,
    sink: EventSink,
) -> None:
    if await probe_strategy(commands) == "tar":
        try:
            await _merge(layers, rootfs, work, request, limits, commands, sink, streamed=True)
            return
        except _Restart:
            pass
        except NoSpace as error:
            # It was promised too little: the index knows.
            if "does not fit" not in error.message or request.size_bytes:
                raise
        sink.stage("reading layers once more")
    await _merge(layers, rootfs, work, request, limits, commands, sink, streamed=False)


class _Restart(Exception):
    """The top layer cannot be streamed."""


async def _merge(
    layers: _Layers,
    rootfs: Path,
    work: Path,
    request: ImportRequest,
    limits: Limits,
    commands: HostCommands,
    sink: EventSink,
    *,
    streamed: bool,
) -> None:
    flattener = _Flattener(layers, limits, sink, streamed=streamed)

    async def consume(read_fd: int) -> None:
        summary = await flattener.summary
        sink.stage("writing the file system")
        await build_ext4(
            read_fd,
            rootfs,
            size_bytes=request.size_bytes or size_for(summary["data_bytes"], summary["inodes"]),
            inodes=summary["inodes"],
            newest=summary["newest"],
            label=request.name,
            commands=commands,
            sink=sink,
            work=work,
            check=False,
        )

    try:
        await piped(lambda write_fd: flattener.run(write_fd, commands), consume)
    except NoSpace as error:
        if request.size_bytes and "does not fit" in error.message:
            error.hint = "give a larger --size, or none: it is found then"
        raise
    sink.stage("checking the file system")
    if flattener.marked:
        await apply_xattrs(rootfs, flattener.marked, work=work, commands=commands)
    await check_ext4(rootfs, commands=commands)


class _Flattener:
    """The talk with the process of `images.flatten`; see there for the messages."""

    def __init__(self, layers: _Layers, limits: Limits, sink: EventSink, *, streamed: bool) -> None:
        self._layers = layers
        self._stream: dict[str, int] | None = None
        if streamed and layers.newest:
            self._stream = {"newest": layers.newest, "from_bytes": STREAM_FROM_BYTES}
        self._limits = limits
        self._sink = sink
        self.summary: asyncio.Future[dict[str, int]] = asyncio.get_running_loop().create_future()
        self.marked: list[Marked] = []
        self._error: BangerError | None = None
        self._is_fed = False
        self._is_done = False
        self._is_restart = False

    async def run(self, tar_fd: int, commands: HostCommands) -> None:
        """Feed it every layer and write its tar to `tar_fd`; raises what it found wrong."""
        lines_read, lines_write = os.pipe()
        fcntl.fcntl(lines_write, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        said_read, said_write = os.pipe()

        async def work() -> None:
            failure: CommandFailed | None = None
            try:
                await commands.run(
                    [sys.executable, "-I", "-m", "banger.images.flatten", str(tar_fd)],
                    stdin=lines_read,
                    stdout=said_write,
                    pass_fds=(tar_fd,),
                    timeout_s=_TIMEOUT_S,
                )
            except CommandFailed as error:
                failure = error
            finally:
                os.close(said_write)  # the listener sees the end
            await listener
            if self._is_restart:
                raise _Restart
            if failure is not None:
                raise self._error or CommandFailed(
                    "the layers could not be read", stderr_tail=failure.stderr_tail
                ) from failure

        async def feed() -> None:
            with os.fdopen(lines_write, "wb", buffering=0) as lines:
                head = {"limits": dataclasses.asdict(self._limits), "stream": self._stream}
                lines.write(_line(head))
                for number, ready in enumerate(self._layers.each, start=1):
                    blob, diff_id = await ready()
                    layer = {
                        "path": str(blob.path), "offset": blob.offset, "size": blob.size,
                        "diff_id": diff_id,
                    }  # fmt: skip
                    with contextlib.suppress(BrokenPipeError):
                        is_top = number == len(self._layers.each)
                        lines.write(_line({"layer": layer, "is_top": is_top}))
            self._sink.stage("reading layers")
            self._is_fed = True

        listener = asyncio.create_task(self._listen(said_read))
        try:
            await together(work(), feed())
        finally:
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)
            os.close(lines_read)
        if not self._is_done:
            raise Corrupted("the layers were not read to their end")

    async def _listen(self, fd: int) -> None:
        stream = asyncio.StreamReader(limit=_LINE_LIMIT_BYTES)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(fd, "rb", buffering=0)
        )
        try:
            while line := await stream.readline():
                self._take(json.loads(line))
        finally:
            transport.close()

    def _take(self, message: dict[str, Any]) -> None:
        if "progress" in message:
            if self._is_fed:
                total = self.summary.result()["data_bytes"] if self.summary.done() else 0
                self._sink.progress(message["progress"], total)
        elif "warning" in message:
            self._sink.warning(message["warning"])
        elif "summary" in message:
            self.summary.set_result(message["summary"])
        elif "restart" in message:
            self._is_restart = True
        elif "error" in message:
            error = message["error"]
            kind = Corrupted if error["code"] == Corrupted.code else InvalidInput
            self._error = kind(error["message"], hint=error.get("hint", ""))
        elif "done" in message:
            self._is_done = True
            self.marked = [
                Marked(one["mark"], one["mtime"], {
                    name: bytes.fromhex(value) for name, value in one["xattrs"].items()
                })
                for one in message["done"]["xattrs"]
            ]  # fmt: skip


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
