"""Files of the user's that a VM gets at each of its starts: logins of coding agents, and more.

Owns which files, and how they are read here and written there. Never logs, and never lets an error
hold, a byte of what is in them. Whether a VM gets them, and what it got, is `services.vms`'.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from banger.config import FileSync
from banger.errors import BangerError, NoSpace, TimedOut
from banger.guest import agent
from banger.guest.transport import Endpoint
from banger.services.workspaces import GUEST_HOME

# Of opencode, Claude Code and pi: the login alone, never a history. The same places under /root.
LOGINS = (
    ".local/share/opencode/auth.json",
    ".claude/.credentials.json",
    ".pi/agent/auth.json",
)
MAX_BYTES = 1 << 20  # of one file; logins are some KB
_ANSWER_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Found:
    """A file as it is here now; `guest` is an absolute path there."""

    guest: str
    mode: int
    mtime: int
    data: bytes = field(repr=False)


class UserFiles:
    """The files of one configuration; each is looked up anew at every start."""

    def __init__(self, home: Path, *, logins: bool, more: Sequence[FileSync] = ()) -> None:
        chosen = [FileSync(f"~/{name}", f"~/{name}") for name in LOGINS] if logins else []
        # By place in the guest: the configuration's word stands above ours.
        self._files = {_in_guest(file.guest): file for file in (*chosen, *more)}
        self._home = home

    def read(self) -> tuple[list[Found], list[str]]:
        """Return the files that are there, and a warning for each that cannot be had."""
        found, warnings = [], []
        for guest, file in self._files.items():
            host = self._home / file.host[2:] if file.host.startswith("~/") else Path(file.host)
            try:
                read = _read(host)
            except OSError as error:
                warnings.append(f"{file.host} is not synced: {error.strerror}")
                continue
            if read is not None:
                data, mtime = read
                found.append(Found(guest, int(file.mode, 8), mtime, data))
        return found, warnings


def write(endpoint: Endpoint, files: Iterable[Found]) -> dict[str, str]:
    """Write files into a running guest, as root's; return why not for each place that failed.

    The agent resolves below `/` and follows no symlink: a planted one makes that file fail. Each
    goes alone, so that one that fails takes no other with it.
    """
    failed = {}
    for file in files:
        try:
            agent.put_tar(endpoint, b"/", io.BytesIO(_tar(file)), timeout_s=_ANSWER_TIMEOUT_S)
        except NoSpace:
            failed[file.guest] = "its disk is full"
        except TimedOut:
            failed[file.guest] = "its agent does not answer"
        except (BangerError, OSError):
            # Not the guest's own words: it has the file, and ours go to a log.
            failed[file.guest] = "it refuses; is there a symlink on the way?"
    return failed


def _in_guest(path: str) -> str:
    return f"{GUEST_HOME}/{path[2:]}" if path.startswith("~/") else path


def _read(path: Path) -> tuple[bytes, int] | None:
    """Return a file's content and its time in whole seconds; None when there is none.

    Raises OSError, also for what is no plain file or above MAX_BYTES. A link of the user's own is
    followed: dotfiles are kept so.
    """
    try:
        # Not blocking: a FIFO nobody writes to would hold every start.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "not a plain file")
        with open(handle, "rb", closefd=False) as file:
            data = file.read(MAX_BYTES + 1)
    finally:
        os.close(handle)
    if len(data) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"larger than {MAX_BYTES >> 10} KiB")
    return data, int(info.st_mtime)


def _tar(file: Found) -> bytes:
    """Return one file as a tar from the root; its directories below root's home become 0700."""
    name = file.guest.lstrip("/")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        home = f"{GUEST_HOME}/".lstrip("/")
        if name.startswith(home):
            parts = name.split("/")
            for depth in range(2, len(parts)):
                archive.addfile(_entry("/".join(parts[:depth]), tarfile.DIRTYPE, 0o700, file.mtime))
        entry = _entry(name, tarfile.REGTYPE, file.mode, file.mtime)
        entry.size = len(file.data)
        archive.addfile(entry, io.BytesIO(file.data))
    return packed.getvalue()


def _entry(name: str, kind: bytes, mode: int, mtime: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.mtime = kind, mode, mtime
    return entry
