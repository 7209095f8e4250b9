"""What a guest starts from: the initramfs, and the boot configuration in it.

Owns the cpio format (newc), the segment that every VM of a kernel shares (agent and boot
modules), the small segment of one VM, and the values the agent reads from it. Leaves
reading them to the agent (agent/boot) and the kernel's files to `kernels`.

An initramfs here is uncompressed: the kernel under emulation takes longer to decompress
than the host to read 5 MB.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from banger.errors import Corrupted, InvalidInput, Unavailable
from banger.host.files import make_private_directory, no_space_named

BOOT_CONFIG_VERSION = 1
BOOT_CONFIG_PATH = "banger/boot.json"
# Base, own, modules: by the serial a VMM gives them, or in the order it was given them.
DRIVES_BY_SERIAL = ("serial:banger-base", "serial:banger-own", "serial:banger-mods")
DRIVES_BY_ORDER = ("/dev/vda", "/dev/vdb", "/dev/vdc")
# The kernel refuses a single file of 4 GiB; our own files are far below.
_MAX_FILE_BYTES = (1 << 32) - 1
_MAX_NAME_BYTES = 4096  # PATH_MAX, which init/initramfs.c enforces
_TRAILER = b"TRAILER!!!"
_PAGE_BYTES = 4096
SSHD_LOG = "/var/log/banger-sshd.log"
_SHELL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_IMAGE_SAYS = "Written by banger at each boot: the environment that the image names."

_Look = tuple[tuple[str, int, int, int, int], ...]
# Reading and hashing 10 MB at each start is 8 ms of it, and 100 in an emulated host. A daemon knows
# a handful of kernels.
_SEGMENTS: dict[tuple[Path, _Look], Path] = {}


class CpioEntry(NamedTuple):
    """One member of a cpio archive; `mode` has the file type bits (stat.S_IFREG and so on)."""

    name: bytes
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def file_entry(name: str, data: bytes, mode: int = 0o644) -> CpioEntry:
    """Return a regular file."""
    return CpioEntry(os.fsencode(name), stat.S_IFREG | mode, data)


def directory_entry(name: str, mode: int = 0o755) -> CpioEntry:
    """Return a directory."""
    return CpioEntry(os.fsencode(name), stat.S_IFDIR | mode)


def cpio_archive(entries: Iterable[CpioEntry]) -> bytes:
    """Return a newc archive of root-owned entries, padded so that another may follow it.

    The format is the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
    Parents come before children; that is the caller's to see to. Raises InvalidInput for a
    name the kernel would not unpack.
    """
    out = bytearray()
    for number, entry in enumerate(entries, start=1):
        _append(out, entry, number)
    _append(out, CpioEntry(_TRAILER, 0), 0)
    out += bytes(-len(out) % 512)
    return bytes(out)


def _append(out: bytearray, entry: CpioEntry, number: int) -> None:
    name = entry.name
    if not name or b"\0" in name or len(name) >= _MAX_NAME_BYTES or name.startswith(b"/"):
        raise InvalidInput(f"{name!r} is not a name for a cpio archive")
    if name == _TRAILER and number:
        raise InvalidInput("a cpio archive ends at a file of that name")
    if len(entry.data) > _MAX_FILE_BYTES:
        raise InvalidInput(f"{name!r} is too large for a cpio archive")
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # magic, then 13 fields of 8 hexadecimal digits: inode, mode, uid, gid, links, mtime,
    # size, device (2), rdev (2), length of the name, checksum (unused)
    fields = (
        number, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name) + 1, 0,
    )  # fmt: skip
    out += b"070701" + b"".join(b"%08X" % field for field in fields) + name + b"\0"
    out += bytes(-len(out) % 4)
    out += entry.data
    out += bytes(-len(out) % 4)


def agent_binary() -> Path:
    """Return the path of the guest agent; raise Unavailable when it has not been built."""
    path = Path(str(resources.files("banger.guest"))) / "bin" / "banger-agent-x86_64"
    if not path.is_file():
        raise Unavailable("the guest agent is not built", hint="make agent")
    return path


def base_segment(kernel_directory: Path, *, cache_dir: Path, agent: Path | None = None) -> Path:
    """Return the initramfs segment that all VMs with this kernel and agent share.

    It is made once and kept below the cache directory under the digest of what is in it.
    Blocks for some milliseconds: call it in a thread. Raises Corrupted when the kernel's
    boot modules do not read.
    """
    agent = agent or agent_binary()
    parts = _look_of(agent, kernel_directory / "boot-modules")
    known = _SEGMENTS.get((cache_dir, parts))
    if known is not None and known.exists():
        return known
    agent_data = agent.read_bytes()
    modules = _read_boot_modules(kernel_directory / "boot-modules")
    digest = hashlib.sha256(agent_data)
    for name, data in modules:
        digest.update(b"\0%s\0%d\0" % (name.encode(), len(data)))
        digest.update(data)
    directory = make_private_directory(cache_dir / "initramfs")
    segment = directory / f"{digest.hexdigest()[:32]}.cpio"
    # Before the files were read: a later change gives them another look.
    _SEGMENTS[cache_dir, parts] = segment
    if segment.exists():
        return segment
    archive = cpio_archive(
        [
            directory_entry("dev"),
            # The kernel opens it for /init before anything is mounted.
            CpioEntry(b"dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
            directory_entry("banger", 0o700),
            directory_entry("banger/modules", 0o700),
            *(file_entry(f"banger/modules/{name}.ko", data, 0o600) for name, data in modules),
            file_entry(
                "banger/modules.list", "".join(f"{name}\n" for name, _ in modules).encode(), 0o600
            ),
            file_entry("init", agent_data, 0o755),
        ]
    )
    _write_whole(segment, [archive])
    return segment


def _look_of(*tops: Path) -> _Look:
    """Return what of files and directories changes when any content does: inodes, sizes, times."""
    paths = [path for top in tops for path in (sorted(top.iterdir()) if top.is_dir() else [top])]
    found = [(path, path.stat()) for path in paths]
    return tuple((str(p), s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in found)


def _read_boot_modules(directory: Path) -> list[tuple[str, bytes]]:
    try:
        names = (directory / "list").read_text("utf-8").split()
        return [(name, (directory / f"{name}.ko").read_bytes()) for name in names]
    except OSError as error:
        name = directory.parent.name
        raise Corrupted(
            f"kernel {name} is corrupted: its boot modules do not read: {error}",
            hint=f"`banger kernel pull --force {name}` takes it anew",
        ) from error


def write_initramfs(output: Path, base: Path, boot: Mapping[str, Any]) -> None:
    """Write a VM's initramfs: the shared segment followed by the VM's own.

    It holds the machine's private keys, hence mode 0600 here and for the file in it.
    """
    own = cpio_archive([file_entry(BOOT_CONFIG_PATH, json.dumps(boot).encode(), 0o600)])
    shared = base.read_bytes()
    # QEMU's microvm puts the initramfs at the top of low memory, rounded down to a page, and the
    # firmware its ACPI tables into the last page: a size that is no multiple of a page reaches
    # into them, and the kernel hangs after "ACPI: Core revision" (docs/debugging.md).
    padding = bytes(-(len(shared) + len(own)) % _PAGE_BYTES)
    _write_whole(output, [shared, own, padding])


def _write_whole(path: Path, parts: Sequence[bytes]) -> None:
    # Not durable on purpose: it can be made again, and an fsync costs more than the copy.
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with no_space_named(path.parent):
            fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                for part in parts:
                    file.write(part)
            os.rename(staged, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            staged.unlink()
        raise


class GuestNetwork(NamedTuple):
    """How the guest's interface is set up: `address_cidr` such as 10.0.2.15/24."""

    address_cidr: str
    gateway: str
    dns: tuple[str, ...]
    interface: str = "eth0"


def boot_config(
    *,
    hostname: str,
    machine_id: str,
    network: GuestNetwork | None,
    authorized_key: str,
    host_keys: Mapping[str, bytes],
    environment: Mapping[str, str] | None = None,
    with_sshd: bool = False,
    init: Sequence[str] | None = None,
    time_unix_ns: int | None = None,
    drives: tuple[str, str, str] = (
        "serial:banger-base",
        "serial:banger-own",
        "serial:banger-mods",
    ),
) -> dict[str, Any]:
    """Return the boot configuration of a VM, as the agent reads it.

    `host_keys` maps file names below /etc/ssh (ssh_host_ed25519_key and its .pub) to their
    content. `init` is a command line in place of the image's own init. `environment` is the
    image's: the agent gives it to every process, and files of ours to ssh's. `with_sshd` has
    the agent see to an sshd in the background; it needs a network. `drives` name base, own and
    modules by serial or device.
    """
    files = [
        _file("/etc/hostname", f"{hostname}\n"),
        _file("/etc/hosts", hosts_file(hostname), keep_lines=True),
        _file("/etc/machine-id", f"{machine_id}\n", mode=0o444),
        # Without a network the image's own stays.
        *([_file("/etc/resolv.conf", resolv_conf(network.dns))] if network else []),
        _file(
            "/root/.ssh/authorized_keys",
            f"{authorized_key.strip()}\n",
            mode=0o600,
            keep_lines=True,
        ),
        *(
            _file(f"/etc/ssh/{name}", content, mode=0o644 if name.endswith(".pub") else 0o600)
            for name, content in sorted(host_keys.items())
        ),
    ]
    if environment:
        files += [
            _file("/etc/profile.d/banger-image.sh", profile_script(environment)),
            _file("/etc/ssh/sshd_config.d/20-banger-image.conf", sshd_environment(environment)),
        ]
    return {
        "version": BOOT_CONFIG_VERSION,
        "hostname": hostname,
        "drives": dict(zip(("base", "own", "modules"), drives, strict=True)),
        "network": None
        if network is None
        else {
            "interface": network.interface,
            "address_cidr": network.address_cidr,
            "gateway": network.gateway,
            "dns": list(network.dns),
        },
        "directories": [
            {"path": "/etc/ssh", "mode": 0o755, "uid": 0, "gid": 0},
            {"path": "/root", "mode": 0o700, "uid": 0, "gid": 0},
            {"path": "/root/.ssh", "mode": 0o700, "uid": 0, "gid": 0},
        ],
        "files": files,
        "time_unix_ns": time.time_ns() if time_unix_ns is None else time_unix_ns,
        "init": None if init is None else list(init),
        "environment": dict(environment or {}),
        "once": _sshd_script() if with_sshd and network is not None else None,
    }


# What makes a machine this one besides what `boot_config` writes; the last component is a pattern.
_IDENTITY = (
    "/etc/ssh/ssh_host_*",
    "/var/lib/dbus/machine-id",
    "/var/lib/systemd/random-seed",
    "/var/lib/systemd/credential.secret",
    "/etc/profile.d/banger-image.sh",
    "/etc/ssh/sshd_config.d/20-banger-image.conf",
    SSHD_LOG,
)


def export_config(
    *, hostname: str, authorized_key: str, drives: tuple[str, str, str], remove: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the configuration of a boot whose root file system is only read.

    It says what is taken back of what `boot_config` wrote, and what else is one machine's own;
    `remove` are more files to leave out.
    """
    config = boot_config(
        hostname="",
        machine_id="",
        network=None,
        authorized_key="",
        host_keys={},
        drives=drives,
    )
    own_line = f"127.0.1.1\t{hostname}\n"
    return {
        **config,
        "directories": [],
        "files": [
            _file("/etc/hostname", "localhost\n"),
            _file("/etc/machine-id", "", mode=0o444),
            _file("/etc/resolv.conf", ""),
        ],
        "export": {
            "remove": [*_IDENTITY, *(_literal(path) for path in remove)],
            "empty": ["/var/lib/banger/sessions"],  # what others said there
            "drop_lines": [
                _lines("/etc/hosts", own_line),
                _lines("/root/.ssh/authorized_keys", f"{authorized_key.strip()}\n"),
            ],
        },
    }


def _literal(path: str) -> str:
    """Return a pattern of Go's path.Match whose last component matches itself alone."""
    above, _, name = path.rpartition("/")
    return f"{above}/" + re.sub(r"([\\*?\[])", r"\\\1", name)


def _lines(path: str, lines: str) -> dict[str, str]:
    return {"path": path, "content_b64": base64.b64encode(lines.encode()).decode()}


def _sshd_script() -> dict[str, str]:
    script = (resources.files("banger.guest") / "with-sshd.sh").read_bytes()
    return {"script_b64": base64.b64encode(script).decode(), "log": SSHD_LOG}


def profile_script(environment: Mapping[str, str]) -> str:
    """Return lines for /etc/profile.d: a login shell's own profile sets another PATH."""
    lines = [f"# {_IMAGE_SAYS}"]
    for name, value in sorted(environment.items()):
        if _SHELL_NAME.fullmatch(name) and "\0" not in value:
            quoted = value.replace("'", "'\\''")
            lines.append(f"export {name}='{quoted}'")
    return "\n".join(lines) + "\n"


def sshd_environment(environment: Mapping[str, str]) -> str:
    """Return an sshd_config that gives sessions this environment, as far as it can say it."""
    words = [
        f'"{name}={value}"'
        for name, value in sorted(environment.items())
        if _SHELL_NAME.fullmatch(name)
        and value.isprintable()
        and not any(special in value for special in '"\\')
    ]
    # Of several SetEnv lines sshd reads the first only.
    return f"# {_IMAGE_SAYS}\n" + (f"SetEnv {' '.join(words)}\n" if words else "")


def hosts_file(hostname: str) -> str:
    """Return /etc/hosts as Debian writes it, with the machine's own name."""
    return (
        "127.0.0.1\tlocalhost\n"
        f"127.0.1.1\t{hostname}\n"
        "::1\tlocalhost ip6-localhost ip6-loopback\n"
        "ff02::1\tip6-allnodes\n"
        "ff02::2\tip6-allrouters\n"
    )


def resolv_conf(dns: Sequence[str]) -> str:
    """Return /etc/resolv.conf for these servers, with no search domain."""
    return "search .\n" + "".join(f"nameserver {server}\n" for server in dns)


def _file(
    path: str, content: str | bytes, *, mode: int = 0o644, keep_lines: bool = False
) -> dict[str, Any]:
    """Return a file to write; `keep_lines` only adds what a file there lacks."""
    data = content.encode() if isinstance(content, str) else content
    return {
        "path": path,
        "mode": mode,
        "uid": 0,
        "gid": 0,
        "content_b64": base64.b64encode(data).decode(),
        "keep_lines": keep_lines,
    }
