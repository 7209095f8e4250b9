"""`vm cp`: files between the host and a VM, as tar through the agent."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from banger.cli import output
from banger.cli.context import Context, endpoint_of
from banger.cli.parsing import Parser, add_json, add_quiet
from banger.cli.progress import Progress
from banger.errors import BangerError, InvalidInput, NotFound, UsageError

if TYPE_CHECKING:
    from banger.guest.transport import Endpoint

_CHUNK_BYTES = 256 * 1024
_MAX_WARNINGS = 10


class Place(NamedTuple):
    """One side: a path in the VM `vm`, or on the host when that is None."""

    vm: str | None
    path: str


def parse_place(text: str) -> Place:
    """Parse `NAME:PATH` or a path of the host; one with a colon is written `./a:b`."""
    name, colon, path = text.partition(":")
    if colon and name and "/" not in name and not name.startswith("."):
        return Place(name, path or ".")
    if not text:
        raise InvalidInput("an empty path names nothing", hint="banger vm cp FILE NAME:/tmp")
    return Place(None, text)


def build_cp(parser: Parser) -> None:
    """Arguments of `vm cp`."""
    parser.usage = (
        "banger vm cp [-q] SOURCE NAME:PATH\n       banger vm cp [-q] NAME:PATH DESTINATION"
    )
    parser.description = (
        "Copy files and directories between the host and a running VM.\n"
        "Into an existing directory, the copy keeps its name; a destination that does not exist\n"
        "is the new name. DIRECTORY/. copies what is in it. Relative paths in the VM begin at\n"
        "/root. `-` is a tar stream on stdin or stdout. What comes from a VM is not trusted:\n"
        "links that lead out of the copy and devices are left out, with a warning."
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("destination", metavar="DESTINATION")
    add_quiet(parser)
    add_json(parser, "print what was copied as JSON (to stderr)")
    parser.examples(
        ("banger vm cp ./app box:/srv", "to /srv/app (or to /srv, when that is absent)"),
        ("banger vm cp box:/var/log/syslog .", "from the VM to here"),
        ("banger vm cp box:/etc - | tar t", "a directory of the VM as a tar"),
    )


def run_cp(context: Context, args: argparse.Namespace) -> int:
    """Copy."""
    source, destination = parse_place(args.source), parse_place(args.destination)
    if (source.vm is None) == (destination.vm is None):
        raise UsageError(
            "one side must be NAME:PATH and the other a path of the host",
            hint="banger vm cp FILE NAME:/tmp, or banger vm cp NAME:/tmp/FILE .",
        )
    with Progress(quiet=args.quiet or args.json) as progress:
        warnings = _Warnings(progress)
        if destination.vm is not None:
            report = _to_guest(context, source.path, destination, progress, warnings)
        else:
            report = _from_guest(context, source, destination.path, progress, warnings)
        warnings.close()
    if context.json:
        output.write_json_line({"type": "result", "result": report}, sys.stderr)
    return 0


class _Warnings:
    """Shows the first few warnings and counts the rest."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._count = 0

    def add(self, message: str) -> None:
        """Take one."""
        self._count += 1
        if self._count <= _MAX_WARNINGS:
            self._progress.warning(message)

    def close(self) -> None:
        """Tell how many were not shown."""
        if self._count > _MAX_WARNINGS:
            self._progress.warning(f"and {self._count - _MAX_WARNINGS} more of these")


def _endpoint(context: Context, name: str) -> Endpoint:
    from banger.cli.vm_ssh import connect_running

    return endpoint_of(connect_running(context, name))


def _guest_path(path: str) -> bytes:
    return os.fsencode(path if path.startswith("/") else f"/root/{path}")


def _stat(endpoint: Endpoint, path: bytes) -> dict[str, Any] | None:
    from banger.guest import agent

    found = agent.stat_path(endpoint, path)
    return None if not found or found.get("exists") is False else dict(found)


def _is_directory(found: dict[str, Any] | None) -> bool:
    return found is not None and "dir" in (found.get("type"), found.get("target_type"))


# -- host to guest


def _to_guest(
    context: Context, source: str, destination: Place, progress: Progress, warnings: _Warnings
) -> dict[str, Any]:
    from banger.guest import agent

    assert destination.vm is not None
    if source != "-":
        found = _host_stat(source)
    endpoint = _endpoint(context, destination.vm)
    path = _guest_path(destination.path)
    there = _stat(endpoint, path)
    progress.stage(f"copy to {destination.vm}")
    if source == "-":
        if not _is_directory(there):
            raise InvalidInput(
                f"{destination.path} is not a directory in {destination.vm}",
                hint="a tar stream goes into a directory that exists",
            )
        return _sent(agent.put_tar(endpoint, _followed(path), _stdin_chunks()), warnings)
    directory, name = _guest_target(endpoint, destination, there, source=source, found=found)
    chunks = iter_host(os.fsencode(source), name, warnings.add)
    return _sent(agent.put_tar(endpoint, directory, _counted(chunks, progress)), warnings)


def _host_stat(source: str) -> os.stat_result:
    try:
        found = os.lstat(source)
    except FileNotFoundError as error:
        raise NotFound(f"{source} does not exist", hint="check the path") from error
    return found


def _followed(path: bytes) -> bytes:
    """Return a directory's path so that a link to it counts as the directory."""
    return path.rstrip(b"/") + b"/."


def _guest_target(
    endpoint: Endpoint,
    destination: Place,
    there: dict[str, Any] | None,
    *,
    source: str,
    found: os.stat_result,
) -> tuple[bytes, bytes]:
    """Return the directory to extract in and the name the copy gets there, as docker cp does.

    The name is empty when the contents go straight into the directory.
    """
    path = _guest_path(destination.path)
    is_directory = stat.S_ISDIR(found.st_mode)
    contents_only = is_directory and os.path.basename(source.rstrip("/")) in (".", "..")
    shown = f"{destination.vm}:{destination.path}"
    if _is_directory(there):
        if contents_only:
            return _followed(path), b""
        name = os.path.basename(os.fsencode(os.path.abspath(source)))
        return _followed(path), name
    if there is not None and is_directory:
        raise InvalidInput(f"{shown} is not a directory", hint="a directory cannot replace a file")
    if there is None and path.endswith(b"/") and not is_directory:
        raise NotFound(f"{shown} does not exist", hint="make it first, or leave the last / out")
    if is_directory and contents_only:
        return path.rstrip(b"/"), b""
    parent, name = os.path.split(path.rstrip(b"/"))
    if not _is_directory(_stat(endpoint, parent or b"/")):
        raise NotFound(
            f"{os.fsdecode(parent)} does not exist in {destination.vm}",
            hint=f"banger vm exec {destination.vm} -- mkdir -p {os.fsdecode(parent)}",
        )
    return _followed(parent or b"/"), name


def iter_host(source: bytes, name: bytes, warn: Any) -> Iterator[bytes]:
    """Yield a tar of a file or tree of the host, named `name` (empty: only what is inside)."""
    from banger.services import workspaces

    def pieces() -> Iterator[bytes]:
        directory, leaf = os.path.split(source.rstrip(b"/") or b"/")
        if os.path.isdir(source) and (not os.path.islink(source) or source.endswith(b"/")):
            yield from _host_tree(source, name, warn)
        else:
            fd = os.open(directory or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                yield from workspaces.tar_entry(fd, leaf, name, warn)
            finally:
                os.close(fd)
        yield bytes(1024)

    return workspaces.batched(pieces())


def _host_tree(root: bytes, name: bytes, warn: Any) -> Iterator[bytes]:
    from banger.services import workspaces

    def told(error: OSError) -> None:
        warn(f"{os.fsdecode(error.filename)} cannot be read ({error.strerror}): not copied")

    for parent, directories, files, fd in os.fwalk(root, onerror=told, follow_symlinks=False):
        relative = os.path.relpath(parent, root)
        below = b"" if relative == b"." else relative
        here = b"/".join(part for part in (name, below) if part)
        if here:
            yield workspaces.tar_directory(here, os.fstat(fd))
        directories.sort()
        links = [d for d in directories if os.path.islink(os.path.join(parent, d))]
        for leaf in sorted([*files, *links]):
            entry = b"%b/%b" % (here, leaf) if here else leaf
            yield from workspaces.tar_entry(fd, leaf, entry, warn)


def _stdin_chunks() -> Iterator[bytes]:
    while chunk := os.read(0, _CHUNK_BYTES):
        yield chunk


def _counted(chunks: Iterator[bytes], progress: Progress) -> Iterator[bytes]:
    done = 0
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        progress.progress(done)


def _sent(result: dict[str, Any], warnings: _Warnings) -> dict[str, Any]:
    for message in result.get("warnings") or []:
        warnings.add(str(message))
    return {"files": result.get("files", 0), "bytes": result.get("bytes", 0)}


# -- guest to host


def _from_guest(
    context: Context, source: Place, destination: str, progress: Progress, warnings: _Warnings
) -> dict[str, Any]:
    from banger.guest import agent

    assert source.vm is not None
    endpoint = _endpoint(context, source.vm)
    path = _guest_path(source.path)
    there = _stat(endpoint, path)
    if there is None:
        raise NotFound(f"{source.path} does not exist in {source.vm}", hint="check the path")
    contents_only = os.path.basename(path.rstrip(b"/")) == b"."
    asked = _asked_path(path)
    if destination == "-":
        if sys.stdout.isatty():
            raise InvalidInput("a tar is nothing for a terminal", hint="append `| tar t`")
        sys.stdout.flush()
        result = agent.get_tar(endpoint, asked, sys.stdout.buffer.write)
        sys.stdout.buffer.flush()
        return _sent(result, warnings)
    directory, name = _host_target(destination, asked, contents_only, _is_directory(there), there)
    progress.stage(f"copy from {source.vm}")
    root_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        rename = (_sent_name(asked), name)
        return _receive(
            endpoint, asked, root_fd, rename=rename, progress=progress, warnings=warnings
        )
    finally:
        os.close(root_fd)


def _asked_path(path: bytes) -> bytes:
    """Return the path to ask for: `DIR/.` means the directory itself, links followed."""
    while path.endswith((b"/.", b"/./")):
        path = path.removesuffix(b"/").removesuffix(b".") or b"/"
    return path or b"/"


def _sent_name(path: bytes) -> bytes:
    """Return the first component of the names the agent sends: the path's last."""
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            parts = parts[:-1]
        elif part not in (b"", b"."):
            parts.append(part)
    return parts[-1] if parts else b"."


def _host_target(
    destination: str,
    asked: bytes,
    contents_only: bool,
    is_directory: bool,
    there: dict[str, Any],
) -> tuple[bytes, bytes]:
    """Return the directory of the host to write in and the copy's name (empty: its contents)."""
    wanted = os.fsencode(destination)
    name = (
        b""
        if contents_only
        else _sent_name(asked).replace(b".", b"root")
        if (_sent_name(asked) == b".")
        else _sent_name(asked)
    )
    if os.path.isdir(wanted):
        return wanted, name
    copies_tree = is_directory and (there.get("type") == "dir" or asked.endswith(b"/"))
    if os.path.lexists(wanted) and copies_tree:
        raise InvalidInput(
            f"{destination} is not a directory", hint="a directory cannot replace a file"
        )
    if destination.endswith("/") and not copies_tree:
        raise NotFound(
            f"{destination} does not exist", hint="make it first, or leave the last / out"
        )
    parent, leaf = os.path.split(wanted.rstrip(b"/"))
    if not os.path.isdir(parent or b"."):
        raise NotFound(f"{os.fsdecode(parent)} does not exist", hint="make it first: mkdir -p")
    if leaf in (b"", b".", b".."):
        raise NotFound(f"{destination} does not exist", hint="make it first")
    return parent or b".", leaf


def _receive(
    endpoint: Endpoint,
    path: bytes,
    root_fd: int,
    *,
    rename: tuple[bytes, bytes],
    progress: Progress,
    warnings: _Warnings,
) -> dict[str, Any]:
    """Run the agent's pushing and our writing side by side, joined by a pipe."""
    import threading

    from banger.cli import untar
    from banger.guest import agent

    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    outcome: list[Any] = []

    def pull() -> None:
        try:
            with os.fdopen(write_fd, "wb") as sink:
                outcome.append(agent.get_tar(endpoint, path, sink.write))
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            outcome.append(error)

    thread = threading.Thread(target=pull, daemon=True)
    thread.start()
    failure: Exception | None = None
    with os.fdopen(read_fd, "rb", buffering=_CHUNK_BYTES) as source:
        try:
            written = untar.extract(
                _Counting(source, progress), root_fd, rename=rename, warn=warnings.add
            )
            while source.read(_CHUNK_BYTES):
                pass  # the padding behind a tar's end
        except (BangerError, OSError) as error:
            failure = error
    thread.join()
    result = outcome[0]
    # A tar that ends early is the consequence; what the agent said is the cause.
    if isinstance(result, BangerError) and not isinstance(failure, InvalidInput):
        raise result
    if failure is not None:
        raise failure
    if isinstance(result, BaseException):
        raise result
    for message in result.get("warnings") or []:
        warnings.add(str(message))
    return {"files": written.files, "bytes": written.bytes}


class _Counting:
    """Tells progress what passes."""

    def __init__(self, source: Any, progress: Progress) -> None:
        self._source = source
        self._progress = progress
        self._done = 0

    def read(self, count: int, /) -> bytes:
        """Read and count."""
        chunk: bytes = self._source.read(count)
        self._done += len(chunk)
        self._progress.progress(self._done)
        return chunk


VERBS = {"cp": (build_cp, run_cp)}
