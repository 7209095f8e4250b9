"""Firecracker's releases: what is known of them, which one is here, and installing one.

Owns `<data>/firecracker/`, and what a version means. Leaves running them to the adapters.

<data>/firecracker/
  .lock                   held by whoever installs or removes
  .staging-<token>/       a release in the making; a crash's is swept by the next holder
  <version>/              whole or absent: written beside, fsynced, renamed
    firecracker  jailer   mode 0755
    archive.sha256        of the archive they came from
  current -> <version>    replaced in one step

An archive is worth what its digest is worth: it is compared before a byte of the archive is
read as anything, and it comes from the table below or from the user, never from the server.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import platform
import re
import secrets
import tarfile
import time
import urllib.parse
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from banger.errors import Conflict, Corrupted, InvalidInput, NotFound, Unavailable
from banger.events import EventSink
from banger.host.commands import HostCommands
from banger.host.files import fsync_directory, no_space_named, remove_tree
from banger.host.locks import locked, try_lock


class Version(NamedTuple):
    """A release's number; compares as one."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


# sha256 of upstream's firecracker-vVERSION-x86_64.tgz, which upstream publishes beside the archive
# (.tgz.sha256.txt). GitHub itself was out of reach: each was read in December 2026 in a public
# index of repositories, from ten files that pin it, of projects with nothing else in common.
RELEASES: dict[Version, str] = {
    # Two of the ten name upstream's .sha256.txt as their source.
    Version(1, 17, 0): "06094a1108ae9e82aa4c23a775aa92758f53f1175d422270d9d6162cb9ade558",
    # One says that upstream's own file is its source, one that upstream's check passed; the page
    # of nya-a-cat/ferrobox on what it vendors is among them.
    Version(1, 16, 1): "382a02a869e4d6d5cb14c40577f9545e8458021ea8b0b2d3fc10ec14d9c242e6",
    # Two name upstream's file as their source; ferrobox's page and microagent's Homebrew formula
    # are among the ten.
    Version(1, 15, 1): "d4a32ab2322d887ca1bc4a4e7afa9cc35393e6362dfc2b3becb389d362e4275a",
}
DEFAULT = Version(1, 15, 1)

# The oldest our requests were run on, which is also the oldest upstream's API we compared.
MINIMUM = Version(1, 12, 1)
# Machines of 1.12.1 were really run; requests were held against the API description of both.
TESTED = (Version(1, 12, 1), Version(1, 16, 1))
# Since 1.16.0, and until 1.17.0, a VM that was paused and resumed takes no connection over vsock
# any more (firecracker-microvm/firecracker issue 6074, mended by pull request 6100).
_SILENT_VSOCK = "paused and resumed, a VM takes no connection any more (upstream's issue 6074)"
KNOWN_BAD = {Version(1, 16, 0): _SILENT_VSOCK, Version(1, 16, 1): _SILENT_VSOCK}
_JAILER_FIXED = Version(1, 13, 2)
_JAILER_BROKEN_AGAIN = Version(1, 14, 0)  # a branch of its own: mended in 1.14.1

_ROOT_NAME = "firecracker"
_CURRENT = "current"
_STAGING = ".staging-"
_PROGRAMS = ("firecracker", "jailer")
_DIGEST_FILE = "archive.sha256"

_ARCHIVE_LIMIT_BYTES = 200 << 20  # 1.16.1 has 7.5 MB
_UNPACKED_LIMIT_BYTES = 512 << 20  # with the debug symbols, which are read past
_PROGRAM_LIMIT_BYTES = 64 << 20  # 1.16.1 has 3 MB
_MEMBERS_LIMIT = 200  # 1.16.1 has about 20
_CHUNK_BYTES = 1 << 18
_CONNECT_TIMEOUT_S = 20
_SILENCE_TIMEOUT_S = 60  # between two pieces
_DOWNLOAD_TIMEOUT_S = 1800  # 7.5 MB at 4 kB/s
_VERSION = re.compile(r"v?(\d{1,4})\.(\d{1,4})\.(\d{1,4})")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


# -- what a version means


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be said of a version: `status` is ok, warning or fail, as doctor has them."""

    status: str
    message: str


def parse_version(text: str) -> Version | None:
    """Return the version in the first line of `firecracker --version` or `jailer --version`."""
    first = text.strip().partition("\n")[0]
    found = re.search(r"\b" + _VERSION.pattern, first)
    return Version(*(int(part) for part in found.groups())) if found else None


def version_of(text: str) -> Version:
    """Return the version a user named (`1.17.0`, `v1.17.0`), or raise InvalidInput."""
    found = _VERSION.fullmatch(text)
    if found is None:
        raise InvalidInput(f"{text!r} is no version of Firecracker", hint=f"such as {DEFAULT}")
    return Version(*(int(part) for part in found.groups()))


def judge_firecracker(version: Version | None) -> Verdict:
    """Return whether a Firecracker of this version serves (None: it did not say which it is)."""
    if version is None:
        return Verdict("warning", "it does not say that it is Firecracker")
    if version < MINIMUM:
        return Verdict("fail", f"Firecracker {version} is older than {MINIMUM}")
    if version in KNOWN_BAD:
        return Verdict("warning", f"Firecracker {version}: {KNOWN_BAD[version]}")
    if version.major > MINIMUM.major:
        return Verdict("warning", f"Firecracker {version} may have another API than {TESTED[-1]}")
    if version > TESTED[-1]:
        return Verdict("ok", f"Firecracker {version}, newer than the tested {TESTED[-1]}")
    return Verdict("ok", f"Firecracker {version}")


def judge_jailer(version: Version | None) -> Verdict:
    """Return whether a jailer of this version may be trusted with root."""
    if version is None:
        return Verdict("warning", "it does not say that it is Firecracker's jailer")
    if version < _JAILER_FIXED or version == _JAILER_BROKEN_AGAIN:
        return Verdict(
            "warning",
            f"jailer {version} follows symlinks that local users plant (CVE-2026-1386); banger "
            "runs it where only root can plant one, and a newer one is better still",
        )
    return Verdict("ok", f"jailer {version}")


# -- which one is here


@dataclass(frozen=True, slots=True)
class Installed:
    """A release that `install` put in place."""

    version: Version
    directory: Path
    current: bool


def find_firecracker(commands: HostCommands, configured: str, data: Path) -> str | None:
    """Return the path of the Firecracker to run, or None.

    `configured` is the config's `firecracker_bin`: another than the default is looked up as it
    is; the default means the installed one, else PATH's.
    """
    return _find(commands, "firecracker", configured, data)


def find_jailer(commands: HostCommands, configured: str, data: Path) -> str | None:
    """Return the path of the jailer to run, or None; as `find_firecracker`, by `jailer_bin`."""
    return _find(commands, "jailer", configured, data)


def _find(commands: HostCommands, program: str, configured: str, data: Path) -> str | None:
    if configured == program:
        # The version's own path: `current` may be flipped between this and the start, and the
        # jailer links or copies what it is given.
        installed = (data / _ROOT_NAME / _CURRENT / program).resolve()
        if os.access(installed, os.X_OK) and installed.is_file():
            return str(installed)
    return commands.find(configured)


def list_installed(data: Path) -> list[Installed]:
    """Return the releases in place, the newest first."""
    root = data / _ROOT_NAME
    current = _current_name(root)
    found = []
    with contextlib.suppress(FileNotFoundError):
        for path in root.iterdir():
            named = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", path.name)
            if named and path.is_dir():
                version = Version(*(int(part) for part in named.groups()))
                found.append(Installed(version, path, path.name == current))
    return sorted(found, key=lambda entry: entry.version, reverse=True)


def _current_name(root: Path) -> str:
    try:
        return os.readlink(root / _CURRENT)
    except OSError:
        return ""


# -- installing and removing


def install(
    version: Version, base_url: str, sha256: str | None, data: Path, sink: EventSink
) -> Installed:
    """Install a release and make it the current one; one that is there is only made current.

    `sha256` is the whole archive's; None takes the pinned one. Whatever fails or interrupts it
    leaves nothing behind, and the current one current. A second caller waits for the first.

    Raises InvalidInput when no digest is known, Corrupted when the archive has another or is not
    one of Firecracker's, Unavailable when it cannot be had, NoSpace, and Conflict when the same
    version is installed from another archive.
    """
    if platform.machine() != "x86_64":
        raise Unavailable(f"banger runs Firecracker on x86-64 only, this is {platform.machine()}")
    wanted = _wanted_digest(version, sha256)
    for verdict in (judge_firecracker(version), judge_jailer(version)):
        if verdict.status != "ok":
            sink.warning(verdict.message)
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    root = data / _ROOT_NAME
    root.mkdir(exist_ok=True, mode=0o700)
    with _held(root, sink), no_space_named(root):
        target = root / str(version)
        if target.is_dir():
            _check_same(version, target, wanted)
        else:
            staging = root / f"{_STAGING}{secrets.token_hex(4)}"
            staging.mkdir(mode=0o755)
            try:
                archive = staging / "archive.tgz"
                _get(_archive_url(base_url, version), archive, wanted, version, sink)
                sink.stage("unpack")
                _unpack(archive, version, staging)
                archive.unlink()
                _write_durable(staging / _DIGEST_FILE, f"{wanted}\n".encode(), 0o644)
                fsync_directory(staging)
                staging.rename(target)
            finally:
                remove_tree(staging)
            fsync_directory(root)
        _make_current(root, target.name)
    return Installed(version, target, current=True)


def remove(version: Version, data: Path) -> bool:
    """Remove an installed release; return whether it was the current one.

    A VM that runs keeps what it runs. Raises NotFound when it is not installed.
    """
    root = data / _ROOT_NAME
    if not (root / str(version)).is_dir():
        raise NotFound(
            f"Firecracker {version} is not installed by banger",
            hint="`banger firecracker list` shows what is",
        )
    with _held(root, None):
        was_current = _current_name(root) == str(version)
        if was_current:
            (root / _CURRENT).unlink()
        gone = root / f"{_STAGING}{secrets.token_hex(4)}"
        with contextlib.suppress(FileNotFoundError):  # another did it while we waited
            (root / str(version)).rename(gone)
        fsync_directory(root)
        remove_tree(gone)
    return was_current


def _wanted_digest(version: Version, sha256: str | None) -> str:
    if sha256 is not None:
        if not _SHA256.fullmatch(sha256):
            raise InvalidInput(f"{sha256!r} is no sha256: 64 hexadecimal digits")
        return sha256.lower()
    if version not in RELEASES:
        known = ", ".join(str(one) for one in sorted(RELEASES, reverse=True))
        raise InvalidInput(
            f"the digest of Firecracker {version} is not known here (that of {known} is)",
            hint=f"give it with --sha256: upstream has it in {_archive_name(version)}.sha256.txt "
            "beside the archive",
        )
    return RELEASES[version]


def _archive_name(version: Version) -> str:
    return f"firecracker-v{version}-x86_64.tgz"


def _archive_url(base_url: str, version: Version) -> str:
    return f"{base_url.rstrip('/')}/v{version}/{_archive_name(version)}"


@contextlib.contextmanager
def _held(root: Path, sink: EventSink | None) -> Iterator[None]:
    """Hold the directory's lock, and sweep what a crash left: nobody else makes anything now."""
    with contextlib.ExitStack() as stack:
        fd = try_lock(root / ".lock")
        if fd is not None:
            stack.callback(os.close, fd)
        else:
            if sink is not None:
                sink.stage("wait for another install of Firecracker")
            stack.enter_context(locked(root / ".lock"))
        for left in root.glob(f"{_STAGING}*"):
            remove_tree(left)
        yield


def _check_same(version: Version, target: Path, wanted: str) -> None:
    try:
        found = (target / _DIGEST_FILE).read_text().strip()
    except OSError:
        found = "unknown"
    whole = all(os.access(target / program, os.X_OK) for program in _PROGRAMS)
    if found != wanted or not whole:
        raise Conflict(
            f"Firecracker {version} is installed from another archive (sha256 {found[:12]}...)"
            if whole
            else f"the installed Firecracker {version} is damaged",
            hint=f"banger firecracker remove {version}",
        )


def _make_current(root: Path, name: str) -> None:
    if _current_name(root) == name:
        return
    link = root / f"{_STAGING}{secrets.token_hex(4)}"
    link.symlink_to(name)
    try:
        os.replace(link, root / _CURRENT)
    except BaseException:
        link.unlink()
        raise
    fsync_directory(root)


# -- getting the archive


def _get(url: str, archive: Path, wanted: str, version: Version, sink: EventSink) -> None:
    sink.stage(f"download Firecracker {version}")
    digest = hashlib.sha256()
    done = 0
    deadline = time.monotonic() + _DOWNLOAD_TIMEOUT_S
    with open(archive, "xb") as file, _opened(url) as (pieces, total):
        for piece in pieces:
            done += len(piece)
            if done > _ARCHIVE_LIMIT_BYTES:
                raise Corrupted(
                    f"{url} has more than {_ARCHIVE_LIMIT_BYTES >> 20} MiB: no archive of "
                    "Firecracker's"
                )
            if time.monotonic() > deadline:
                raise Unavailable(f"{url} did not arrive within {_DOWNLOAD_TIMEOUT_S:.0f} s")
            digest.update(piece)
            file.write(piece)
            sink.progress(done, total)
    if digest.hexdigest() != wanted:
        raise Corrupted(
            f"{url} has another digest: sha256 {digest.hexdigest()}, expected {wanted}",
            hint="it arrived damaged, or it is not what upstream released: try again, and trust "
            "it less when that repeats",
        )


@contextlib.contextmanager
def _opened(url: str) -> Iterator[tuple[Iterator[bytes], int]]:
    """Open a URL; yields its pieces and its size (0: unknown). Failures name the URL."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise InvalidInput(f"{url} is not a URL: {error}", hint=_url_hint()) from error
    if parts.scheme == "file":
        path = urllib.parse.unquote(parts.path)
        if parts.netloc not in ("", "localhost"):
            raise InvalidInput(f"{url}: a file URL names no other host")
        try:
            file = open(path, "rb")
        except OSError as error:
            raise Unavailable(f"{url}: {error.strerror}", hint=_url_hint()) from error
        with file:
            if not Path(path).is_file():
                raise Unavailable(f"{url} is not a file", hint=_url_hint())
            yield iter(lambda: file.read(_CHUNK_BYTES), b""), os.fstat(file.fileno()).st_size
        return
    if parts.scheme not in ("http", "https"):
        raise InvalidInput(f"{url} is not an http, https or file URL", hint=_url_hint())
    with _http(url) as opened:
        yield opened


@contextlib.contextmanager
def _http(url: str) -> Iterator[tuple[Iterator[bytes], int]]:
    import httpx2  # 150 ms, for a command that takes seconds

    # The certificates are the system's (truststore), the proxy the environment's.
    timeout = httpx2.Timeout(_SILENCE_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
    # As it is: what is hashed is what was released, not what a server made of it on the way.
    headers = {"Accept-Encoding": "identity", "User-Agent": "banger"}
    try:
        with (
            httpx2.Client(timeout=timeout, follow_redirects=True, max_redirects=5) as client,
            client.stream("GET", url, headers=headers) as response,
        ):
            if response.status_code != 200:
                raise Unavailable(f"{url}: HTTP {response.status_code}", hint=_url_hint())
            size = response.headers.get("Content-Length", "")
            yield response.iter_raw(_CHUNK_BYTES), int(size) if size.isdecimal() else 0
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise Unavailable(f"{url}: {reason}", hint=_url_hint()) from error


def _url_hint() -> str:
    return (
        "see firecracker_base_url in config, or --base-url: a mirror or a file URL serves as well"
    )


# -- taking two programs out of it


def _unpack(archive: Path, version: Version, into: Path) -> None:
    """Write the two programs of an archive whose digest was right; nothing else of it is used."""
    top = f"release-v{version}-x86_64"
    wanted = {f"{top}/{program}-v{version}-x86_64": program for program in _PROGRAMS}
    try:
        with gzip.open(archive) as plain:
            for member, content in _members(_Bounded(plain)):
                program = wanted.get(member.name)
                if program is not None:
                    # "x": a second member of the name is refused, not believed.
                    _write_durable(into / program, _program(member, content), 0o755)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise Corrupted(f"the archive does not unpack: {error}") from error
    except FileExistsError as error:
        raise Corrupted("the archive has a program twice") from error
    missing = [name for name, program in wanted.items() if not (into / program).exists()]
    if missing:
        raise Corrupted(f"the archive has no {missing[0]}")


def _members(plain: _Bounded) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    # Read from front to back; tarfile opens members here and writes no file, ever.
    with tarfile.open(fileobj=plain, mode="r|") as tar:
        for count, member in enumerate(tar, start=1):
            if count > _MEMBERS_LIMIT:
                raise Corrupted(f"the archive has more than {_MEMBERS_LIMIT} members")
            regular = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
            yield member, tar.extractfile(member) if regular else None


def _program(member: tarfile.TarInfo, content: IO[bytes] | None) -> bytes:
    if content is None or member.sparse is not None:
        raise Corrupted(f"{member.name} in the archive is not a regular file")
    if member.size > _PROGRAM_LIMIT_BYTES:
        raise Corrupted(f"{member.name} in the archive has {member.size} bytes")
    data = content.read()
    # ELF-64, little-endian; e_type EXEC or DYN; e_machine x86-64 (elf(5)).
    if len(data) < 64 or data[:6] != b"\x7fELF\x02\x01":
        raise Corrupted(f"{member.name} in the archive is not an x86-64 program")
    kind, machine = data[16] | data[17] << 8, data[18] | data[19] << 8
    if kind not in (2, 3) or machine != 62:
        raise Corrupted(f"{member.name} in the archive is not an x86-64 program")
    return data


class _Bounded(io.BufferedIOBase):
    """Reads a stream up to a bound: a small gzip can hold a very large nothing."""

    def __init__(self, stream: gzip.GzipFile) -> None:
        self._stream = stream
        self._left = _UNPACKED_LIMIT_BYTES

    def read(self, size: int | None = -1) -> bytes:
        """Return up to `size` bytes."""
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise Corrupted(f"the archive unpacks to more than {_UNPACKED_LIMIT_BYTES >> 20} MiB")
        return data


def _write_durable(path: Path, data: bytes, mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fchmod(fd, mode)  # whatever the umask is
        os.fsync(fd)
