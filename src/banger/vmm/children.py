"""VMM processes: spawned so that they outlive the daemon, and reaped while it lives."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from banger.errors import VmmFailed
from banger.guest.boot import agent_binary
from banger.host.commands import HostCommands
from banger.host.process import ProcessIdentity
from banger.host.threads import run_uncut

# Enough for a long boot with every message, and for a panic behind a day of chatter.
_CONSOLE_LIMIT_BYTES = 4 << 20
_CONSOLE_KEPT_BYTES = 1 << 20


class Children:
    """The VMMs that this daemon started; after a restart of the daemon init reaps them."""

    def __init__(self, commands: HostCommands) -> None:
        self._commands = commands
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._keepers: list[int] = []

    def open_console(self, path: Path) -> int:
        """Return the writing end of a VM's console log; the caller closes it.

        A process of its own keeps the end of what comes in `path`, so that a guest cannot fill the
        disk, whether a daemon runs or not. It ends when nobody can write any more.
        """
        reading, writing = os.pipe()
        try:
            # Not subprocess: nobody waits for a keeper, and its handle would complain of that.
            keeper = os.posix_spawn(
                agent_binary(),
                [
                    *("banger-agent", "keep-log", str(path)),
                    *(str(_CONSOLE_LIMIT_BYTES), str(_CONSOLE_KEPT_BYTES)),
                ],
                {},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, reading, 0),
                    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                ],
                setsid=True,
            )
        except OSError as error:
            os.close(writing)
            raise VmmFailed(f"cannot keep a console log: {error.strerror}") from error
        except BaseException:
            os.close(writing)
            raise
        finally:
            os.close(reading)
        # Reaped some time: those of VMs that have ended.
        self._keepers = [pid for pid in self._keepers if not _has_ended(pid)] + [keeper]
        return writing

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        log: Path,
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = None,
        pass_fds: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a program in a session of its own; stderr, and stdout unless given, go to `log`.

        Raises VmmFailed when it cannot be started.
        """
        # O_APPEND, so that trimming a log from outside works while it is written to.
        log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        started: list[subprocess.Popen[bytes]] = []

        def start() -> None:
            started.append(
                subprocess.Popen(
                    argv,
                    stdin=stdin,
                    stdout=log_fd if stdout is None else stdout,
                    stderr=log_fd,
                    cwd="/",
                    env={"PATH": self._commands.environment["PATH"], "LC_ALL": "C.UTF-8"},
                    start_new_session=True,
                    umask=0o077,
                    pass_fds=tuple(pass_fds),
                )
            )

        try:
            # Uncut: who cancels must find neither a process that comes up behind its sweep, nor
            # descriptors closed while they are inherited.
            await run_uncut(start)
        except asyncio.CancelledError:
            for child in started:
                await self.end(child)
            raise
        except OSError as error:
            raise VmmFailed(f"cannot start {argv[0]}: {error.strerror}") from error
        finally:
            os.close(log_fd)
        (child,) = started
        self._children[child.pid] = child
        return child

    async def end(self, child: subprocess.Popen[bytes]) -> None:
        """Kill and reap a child."""
        self._children.pop(child.pid, None)
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await asyncio.to_thread(child.wait)

    async def kill(self, process: ProcessIdentity) -> None:
        """SIGKILL a VMM, this daemon's or an earlier one's, and wait until it is gone."""
        process.kill(signal.SIGKILL)
        child = self._children.pop(process.pid, None)
        if child is not None:
            await asyncio.to_thread(child.wait)
        else:
            await process.wait()


def _has_ended(pid: int) -> bool:
    """Tell whether a child has ended, and reap it then."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True
