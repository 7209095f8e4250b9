"""The local sockets of sessions, from the command line's side: have one, and say its path.

Starts `guest.session_sockets` where none serves the VM. Owns the name of its directory and the
mark it is found by; both are as the daemon makes them for its own (tests hold them equal).
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import sys
from typing import TYPE_CHECKING

from banger.cli import output
from banger.cli.context import Context
from banger.errors import BangerError, Unavailable

if TYPE_CHECKING:
    from banger.cli.session_target import Target

# A Python that starts on a busy, emulated host; its first line is there within 0.2 s usually.
_START_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 15.0


def directory_of(context: Context, vm_id: str) -> str:
    """Return where the sockets of a VM's sessions are: beside its VMM's, which end with it.

    One letter, for a socket's path has 107 bytes.
    """
    return os.path.join(context.paths.runtime_dir, "vms", vm_id, "s")


def mark_of(context: Context, vm_id: str) -> str:
    """Return what stands in the command line of each process of a VM (`vmm.base.mark_of`)."""
    return f"banger-vm-{vm_id}-{os.path.basename(context.paths.runtime_dir)}"


def ensure_or_warn(context: Context, target: Target, session: str) -> str | None:
    """Return the path of a session's socket, which listens; without one, say why on stderr."""
    try:
        return ensure(context, target, session)
    except (BangerError, OSError) as error:
        why = error.message if isinstance(error, BangerError) else error.strerror or str(error)
        output.warn(f"{session} has no socket on this host: {why}")
        return None


def ensure(context: Context, target: Target, session: str) -> str:
    """Return the path of a session's socket once it listens. Raises Unavailable, OSError."""
    from banger.guest.session_sockets import CONTROL, socket_path

    vm = target.connection["vm"]
    directory = directory_of(context, vm["id"])
    _make_private(directory)
    control = os.path.join(directory, CONTROL)
    said = _ask(control, session)
    if said is None:
        lock = os.open(os.path.join(directory, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC,
                       0o600)  # fmt: skip
        try:
            # Held by who starts one, for at most as long as that takes.
            fcntl.flock(lock, fcntl.LOCK_EX)
            said = _ask(control, session)
            if said is None:
                _start(context, target, directory)
                said = _ask(control, session)
        finally:
            os.close(lock)
    if said != "ok":
        raise Unavailable(said or "the process that serves it does not answer")
    return socket_path(directory, session)


def _make_private(directory: str) -> None:
    """Make the directory inside the VM's own; it must be ours alone."""
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        found = os.lstat(directory)
        if (
            not stat.S_ISDIR(found.st_mode)
            or found.st_uid != os.getuid()
            or stat.S_IMODE(found.st_mode) & 0o077
        ):
            raise Unavailable(f"{directory} is not a private directory of yours") from None


def _ask(control: str, session: str) -> str | None:
    """Ask for a session's socket and return the answer; None when nobody serves."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(_ANSWER_TIMEOUT_S)
        try:
            asking.connect(control)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        asking.sendall(session.encode() + b"\n")
        said = b""
        while len(said) < 500 and not said.endswith(b"\n") and (more := asking.recv(500)):
            said += more
    return said.decode(errors="replace").strip()


def _start(context: Context, target: Target, directory: str) -> None:
    """Start the process, which lives on by itself, and return once it serves."""
    import json

    from banger.guest.carrier import start_beside
    from banger.guest.transport import endpoint_to_wire

    vm = target.connection["vm"]
    if vm["pid"] is None:
        raise Unavailable(f"{target.vm} does not run")
    argv = [
        *(sys.executable, "-I", "-m", "banger.guest.session_sockets"),
        *("--mark", mark_of(context, vm["id"])),
        *("--pid", str(vm["pid"])),
        *("--endpoint", json.dumps(endpoint_to_wire(target.endpoint))),
        directory,
    ]
    child, said = start_beside(argv, _START_TIMEOUT_S)
    if child is None:
        raise Unavailable(f"the process for it did not start: {said}")
    # Not ours to wait for any more: it ends with the VM, and init reaps it.
    child.returncode = 0
