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
from banger.host.commands import HostCommands
from banger.host.process import ProcessIdentity


class Children:
    """The VMMs that this daemon started; after a restart of the daemon init reaps them."""

    def __init__(self, commands: HostCommands) -> None:
        self._commands = commands
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        log: Path,
        output: Path | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = None,
        pass_fds: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a program in a session of its own.

        stderr goes to `log`; stdout to the descriptor given, else to `output`, else to `log`.
        Raises VmmFailed when it cannot be started.
        """
        # O_APPEND, so that trimming a log from outside works while it is written to.
        fds = [
            os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            for path in (output or log, log)
        ]
        starting = asyncio.create_task(
            asyncio.to_thread(
                subprocess.Popen,
                argv,
                stdin=stdin,
                stdout=fds[0] if stdout is None else stdout,
                stderr=fds[1],
                cwd="/",
                env={"PATH": self._commands.environment["PATH"], "LC_ALL": "C.UTF-8"},
                start_new_session=True,
                umask=0o077,
                pass_fds=tuple(pass_fds),
            )
        )
        try:
            child = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The thread goes on: who cancels must find neither a process that comes up behind
            # its sweep, nor descriptors closed while they are inherited.
            await asyncio.wait([starting])
            if starting.exception() is None:
                await self.end(starting.result())
            raise
        except OSError as error:
            raise VmmFailed(f"cannot start {argv[0]}: {error.strerror}") from error
        finally:
            for fd in fds:
                os.close(fd)
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
