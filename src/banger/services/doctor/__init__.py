"""The host's checks: what banger needs of it, what is missing, and the command that mends it.

Owns one small function per check and the table of them; those of Firecracker and of the networks
have modules of their own. Only `fix` changes anything; the checks read, run programs that print,
and make files in a temporary directory at most.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import pwd
import re
import shlex
import shutil
import sqlite3
import stat
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from banger import __version__
from banger.config import Config, config_path, load_config
from banger.errors import BangerError, CommandFailed, InvalidInput, Unavailable
from banger.guest.boot import agent_binary
from banger.host.commands import HostCommands
from banger.images.ext4 import probe_strategy
from banger.paths import Paths
from banger.services.doctor import firecracker, network
from banger.services.doctor.findings import (
    PROBE_TIMEOUT_S,
    Check,
    Host,
    Mend,
    fail,
    install,
    ok,
    warning,
)
from banger.store.layout import Layout
from banger.types import format_size
from banger.vmm.probe import KvmProbe, probe_kvm

__all__ = ["Check", "fix", "run_checks"]

_FIX_TIMEOUT_S = 1800
_DAEMON_TIMEOUT_S = 5
_ANSWER_LIMIT_BYTES = 64 * 1024
_SPACE_WARN_BYTES = 10 << 30  # an image, its build and a few VMs
_SPACE_FAIL_BYTES = 2 << 30  # the default image does not build in less
_QEMU_FLOOR = (7, 2)  # the oldest that our command line was run on
_QEMU_TCG_FLOOR = (8, 0)  # see docs/debugging.md, "Kernel 6.12 on QEMU 7.2"
_KERNEL_TCG_BOUND = (6, 2)  # 6.1 runs under any QEMU; 6.12 is known not to
_SUBORDINATE_IDS = (Path("/etc/subuid"), Path("/etc/subgid"))
_SUBORDINATE_COUNT = 65536  # what mmdebstrap needs, and useradd gives
_DEBIAN_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


async def run_checks(
    commands: HostCommands,
    paths: Paths,
    config: Config,
    *,
    kvm: KvmProbe | None = None,
) -> list[Check]:
    """Run every check and return what each found, in the order of the table.

    A broken configuration file is a finding like any other: the caller passes the defaults
    instead. A check that itself breaks is a warning. `kvm` is probed when absent.
    """
    if kvm is None:
        kvm = await asyncio.to_thread(probe_kvm)
    host = Host(
        commands=commands,
        paths=paths,
        layout=Layout.of(paths),
        config=config,
        kvm=kvm,
        qemu=await _qemu_version(commands, config.qemu_bin),
        is_root=os.getuid() == 0,
    )
    return [await _guarded(host, name, check) for name, check in _CHECKS]


async def fix(check: Check, commands: HostCommands | None = None) -> bool:
    """Run the command that mends `check`; root's commands through `sudo -n` where needed.

    Returns True: something was run, so the checks are worth running again.

    Raises InvalidInput when there is none that may be run unasked, CommandFailed or
    Unavailable when it does not succeed.
    """
    if not check.fixable or not check.fix:
        raise InvalidInput(f"nothing mends {check.name} by itself", hint=check.fix)
    commands = commands or HostCommands()
    argv = shlex.split(check.fix)
    if argv[0] == "sudo" and os.getuid() == 0:
        argv = argv[1:]
    elif argv[0] == "sudo":
        argv = ["sudo", "-n", *argv[1:]]
    if "apt-get" in argv:
        # An index of another day names packages the mirror no longer has.
        prefix = argv[: argv.index("apt-get")]
        await _fixing([*prefix, "apt-get", "-qq", "update"], commands)
    await _fixing(argv, commands)
    return True


async def _fixing(argv: list[str], commands: HostCommands) -> None:
    try:
        await commands.run(
            argv, env={"DEBIAN_FRONTEND": "noninteractive"}, timeout_s=_FIX_TIMEOUT_S
        )
    except CommandFailed as error:
        if argv[0] == "sudo" and "password" in error.stderr_tail:
            command = shlex.join([word for word in argv if word != "-n"])
            raise Unavailable("sudo asks for a password", hint=f"run `{command}`") from error
        raise


async def _guarded(host: Host, name: str, check: Callable[[Host], Awaitable[Check]]) -> Check:
    try:
        found = await check(host)
    except BangerError as error:
        found = warning(f"could not be checked: {error.message}", error.hint)
    except Exception as error:  # noqa: BLE001 - the other checks are worth more than this one
        found = warning(f"could not be checked: {type(error).__name__}: {error}")
    return replace(found, name=name)


# -- the virtual machine monitor


async def _check_kvm(host: Host) -> Check:
    if host.kvm.usable:
        return ok(host.kvm.reason)
    return warning(
        f"{host.kvm.reason}; VMs are emulated (tcg): right, and several times slower",
        "sudo usermod -aG kvm $USER" if "permission" in host.kvm.reason else "",
    )


async def _check_vmm(host: Host) -> Check:
    if platform.machine() != "x86_64":
        return fail(f"banger runs on x86-64 hosts, this one is {platform.machine()}")
    binary = host.config.qemu_bin
    if host.commands.find(binary) is None:
        return fail(f"{binary} is not installed", await install(host, "qemu-system-x86"))
    if host.qemu is None:
        return fail(f"`{binary} --version` does not say that it is QEMU", "see qemu_bin in config")
    version = _dotted(host.qemu)
    if host.qemu < _QEMU_FLOOR:
        return fail(
            f"QEMU {version} is older than {_dotted(_QEMU_FLOOR)}",
            await install(host, "qemu-system-x86"),
        )
    machines = await _first_words(host, [binary, "-machine", "help"])
    if "microvm" not in machines:
        return fail(
            f"QEMU {version} has no microvm machine",
            await install(host, "qemu-system-x86"),
        )
    accelerators = await _first_words(host, [binary, "-accel", "help"])
    wanted = "kvm" if host.kvm.usable else "tcg"
    if wanted not in accelerators:
        return fail(f"QEMU {version} has no accelerator {wanted}: a build without it")
    named = ", ".join(sorted(accelerators & {"kvm", "tcg"}))
    return ok(f"QEMU {version} with microvm and {named}")


async def _check_pair(host: Host) -> Check:
    """A kernel and a VMM that are known not to go together."""
    kernel = host.config.default_kernel_name
    release = _kernel_release(host, kernel)
    if host.qemu is None:
        return warning("not checked: there is no QEMU")
    if host.kvm.usable or host.qemu >= _QEMU_TCG_FLOOR or release < _KERNEL_TCG_BOUND:
        return ok(f"{kernel} on QEMU {_dotted(host.qemu)}")
    message = f"{kernel} panics when emulated by QEMU {_dotted(host.qemu)}"
    mend = await install(host, "qemu-system-x86", backports=True)
    if mend.fixable:
        return fail(message, mend)
    return fail(
        message,
        "QEMU 8 or newer (bookworm-backports has it), or an older kernel: "
        "`banger kernel pull generic-6.1` and default_kernel_name = "
        f'"generic-6.1" in {config_path(host.paths.config_dir)}',
    )


def _kernel_release(host: Host, name: str) -> tuple[int, int]:
    """Return the version of an installed kernel, or what the name of another one says."""
    text = name
    try:
        manifest = json.loads((host.layout.data / "kernels" / name / "manifest.json").read_text())
        text = str(manifest.get("release") or name)
    except (OSError, ValueError, AttributeError):
        pass  # not installed, or damaged, which `banger kernel list` says
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


async def _qemu_version(commands: HostCommands, binary: str) -> tuple[int, int] | None:
    if commands.find(binary) is None:
        return None
    try:
        done = await commands.run([binary, "--version"], timeout_s=PROBE_TIMEOUT_S, check=False)
    except (BangerError, OSError):
        return None
    found = re.search(rb"QEMU emulator version (\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else None


async def _first_words(host: Host, argv: list[str]) -> set[str]:
    done = await host.commands.run(argv, timeout_s=PROBE_TIMEOUT_S, check=False)
    lines = done.stdout.decode(errors="replace").splitlines()
    return {line.split()[0] for line in lines if line.strip()}


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


# -- what images and kernels are made with


async def _check_ext4(host: Host) -> Check:
    if host.commands.find("mke2fs") is None or host.commands.find("e2fsck") is None:
        return fail("mke2fs or e2fsck is not installed", await install(host, "e2fsprogs"))
    if await probe_strategy(host.commands) == "tar":
        return ok("mke2fs reads a tar from stdin")
    mend = await install(host, "e2fsprogs", backports=True)
    return warning(
        "mke2fs takes no tar (e2fsprogs before 1.47.1, or without libarchive): images are staged "
        "on disk first, which takes longer",
        mend if mend.fixable else "",
    )


async def _check_mmdebstrap(host: Host) -> Check:
    if host.commands.find("mmdebstrap") is None:
        return fail("mmdebstrap is not installed", await install(host, "mmdebstrap"))
    if not _DEBIAN_KEYRING.exists():
        return fail(
            "the keyring of Debian's archive is not installed",
            await install(host, "debian-archive-keyring"),
        )
    return ok("mmdebstrap and Debian's keyring are here")


async def _check_namespaces(host: Host) -> Check:
    if host.is_root:
        return ok("not needed: banger runs as root")
    if host.commands.find("newuidmap") is None:
        return fail(
            "newuidmap is not installed: without root, images are built in a user namespace",
            await install(host, "uidmap"),
        )
    user = pwd.getpwuid(os.getuid()).pw_name
    for file in _SUBORDINATE_IDS:
        if not _has_subordinate_ids(file, user):
            first = _free_subordinate_id()
            ids = f"{first}-{first + _SUBORDINATE_COUNT - 1}"
            return fail(
                f"{file} has no line for {user}",
                Mend(
                    f"sudo usermod --add-subuids {ids} --add-subgids {ids} {shlex.quote(user)}",
                    fixable=True,
                ),
            )
    done = await host.commands.run(
        ["unshare", "--user", "--map-root-user", "true"], timeout_s=PROBE_TIMEOUT_S, check=False
    )
    if done.exit_status == 0:
        return ok(f"{user} may make user namespaces")
    if Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").exists():
        # Ubuntu lets mmdebstrap in by a profile of its own; `unshare` has none.
        return warning("AppArmor restricts user namespaces; mmdebstrap's own profile may allow it")
    return fail(
        f"user namespaces are not allowed here: {done.stderr.strip()[-200:]}",
        "sudo sysctl -w kernel.unprivileged_userns_clone=1",
    )


def _subordinate_lines(path: Path) -> list[list[str]]:
    try:
        return [line.split(":") for line in path.read_text().splitlines()]
    except OSError:
        return []


def _has_subordinate_ids(path: Path, user: str) -> bool:
    return any(words[0] in (user, str(os.getuid())) for words in _subordinate_lines(path))


def _free_subordinate_id() -> int:
    """Return where a range begins that no user has: ids of two users would be one user's."""
    ends = [
        int(words[1]) + int(words[2])
        for path in _SUBORDINATE_IDS
        for words in _subordinate_lines(path)
        if len(words) == 3 and words[1].isdecimal() and words[2].isdecimal()
    ]
    return max([100_000, *ends])  # SUB_UID_MIN of login.defs(5)


async def _check_npm(host: Host) -> Check:
    for program in ("npm", "uvx"):
        if host.commands.find(program) is not None:
            return ok(f"{program} fetches the image's pinned npm extras")
    return warning(
        "neither npm nor uv is installed: debian-bookworm is built without mise",
        await install(host, "npm"),
    )


# -- programs and files


async def _check_ssh(host: Host) -> Check:
    missing = [name for name in ("ssh", "ssh-keygen") if host.commands.find(name) is None]
    if missing:
        return fail(f"{' and '.join(missing)} not installed", await install(host, "openssh-client"))
    return ok("ssh and ssh-keygen are here")


async def _check_git(host: Host) -> Check:
    if host.commands.find("git") is None:
        return fail("git is not installed: no workspaces", await install(host, "git"))
    return ok("git is here")


async def _check_agent(_host: Host) -> Check:
    try:
        path = agent_binary()
    except Unavailable as error:
        return fail(error.message, f"{error.hint} (in banger's source), then `make install`")
    return ok(f"{path.name}, {format_size(path.stat().st_size)}")


async def _check_space(host: Host) -> Check:
    directory = _existing(host.layout.data)
    free = shutil.disk_usage(directory).free
    detail = f"{format_size(free)} free for {host.layout.data}"
    if not os.access(directory, os.W_OK | os.X_OK):
        return fail(f"{directory} is not writable for this user")
    if free < _SPACE_FAIL_BYTES:
        return fail(f"only {detail}: an image does not fit", "banger vm prune")
    if free < _SPACE_WARN_BYTES:
        return warning(f"only {detail}", "banger vm prune")
    return ok(detail)


def _existing(path: Path) -> Path:
    """Return the nearest directory above that exists, for a check makes none."""
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


async def _check_runtime(host: Host) -> Check:
    runtime = host.layout.runtime
    for path in (runtime.parent, runtime):
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue
        private = (
            stat.S_ISDIR(found.st_mode)
            and found.st_uid == os.getuid()
            and not stat.S_IMODE(found.st_mode) & 0o077
        )
        if not private:
            return fail(
                f"{path} is not a private directory of yours",
                f"rm -r {shlex.quote(str(path))}, or set XDG_RUNTIME_DIR",
            )
    return ok(f"{runtime} is private" if runtime.exists() else f"{runtime} is made when needed")


# -- banger's own state


async def _check_config(host: Host) -> Check:
    path = config_path(host.paths.config_dir)
    try:
        load_config(host.paths.config_dir)
    except BangerError as error:
        return fail(error.message, error.hint)
    return ok(f"{path} is valid" if os.path.exists(path) else f"no {path}: defaults")


async def _check_daemon(host: Host) -> Check:
    socket = host.layout.api_socket
    try:
        async with asyncio.timeout(_DAEMON_TIMEOUT_S):
            info = await _ask_daemon(socket)
    except (FileNotFoundError, ConnectionRefusedError):
        return ok("not running; any command that needs it starts it")
    except (OSError, TimeoutError, ValueError):
        return warning(f"it does not answer on {socket}", "banger daemon stop")
    version = str(info.get("version"))
    if version != __version__:
        return warning(
            f"version {version} runs, this is {__version__}; the next command replaces it",
            "banger daemon stop --if-idle",
        )
    return ok(f"version {version} runs, pid {info.get('pid')}")


async def _ask_daemon(socket: Path) -> dict[str, Any]:
    """Return `GET /v1/daemon`; services stand below `client`, so this asks by itself."""
    reader, writer = await asyncio.open_unix_connection(str(socket))
    try:
        # HTTP/1.0: the body ends where the connection does.
        writer.write(b"GET /v1/daemon HTTP/1.0\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        await writer.drain()
        answer = b""
        while len(answer) < _ANSWER_LIMIT_BYTES and (part := await reader.read(4096)):
            answer += part
    finally:
        writer.close()
    info = json.loads(answer.partition(b"\r\n\r\n")[2])
    if not isinstance(info, dict):
        raise ValueError("not an object")
    return info


async def _check_database(host: Host) -> Check:
    path = host.layout.database
    if not path.exists():
        return ok("none yet")
    try:
        verdict = await asyncio.to_thread(_quick_check, path)
    except sqlite3.DatabaseError as error:
        verdict = str(error)
    if verdict == "ok":
        return ok(f"{path} reads back whole")
    if "locked" in verdict or "unable to open" in verdict:
        return warning(f"{path} cannot be read now: {verdict}")
    name = shlex.quote(str(path))
    # Never by itself: the VMs in it are lost to banger when it goes.
    return fail(f"{path} is damaged: {verdict}", f"banger daemon stop; mv {name} {name}.damaged")


def _quick_check(path: Path) -> str:
    log, index = (path.with_name(f"{path.name}{suffix}") for suffix in ("-wal", "-shm"))
    if log.exists() and not index.exists():
        return f"locked: {log.name} is for the daemon's next start to read"
    # Read-only would still make -shm and -wal beside a WAL database that nobody has open;
    # `immutable` makes nothing, and is right as long as there is no -wal to be read.
    mode = "mode=ro" if log.exists() else "mode=ro&immutable=1"
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, timeout=5)
    try:
        row = connection.execute("PRAGMA quick_check(1)").fetchone()
    finally:
        connection.close()
    return str(row[0])


_CHECKS: tuple[tuple[str, Callable[[Host], Awaitable[Check]]], ...] = (
    ("kvm", _check_kvm),
    ("vmm", _check_vmm),
    ("kernel and vmm", _check_pair),
    ("firecracker", firecracker.check_firecracker),
    ("jailer", firecracker.check_jailer),
    ("passt", network.check_passt),
    ("bridge", network.check_bridge),
    ("names", network.check_names),
    ("e2fsprogs", _check_ext4),
    ("mmdebstrap", _check_mmdebstrap),
    ("user namespaces", _check_namespaces),
    ("ssh", _check_ssh),
    ("git", _check_git),
    ("npm", _check_npm),
    ("agent", _check_agent),
    ("disk space", _check_space),
    ("runtime directory", _check_runtime),
    ("config", _check_config),
    ("daemon", _check_daemon),
    ("database", _check_database),
)
