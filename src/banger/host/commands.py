"""The one door to host programs.

Owns finding, starting, bounding and killing them; every other module asks a
`HostCommands` value, so a test can put a recording one in its place. Children get their
own process group and die as a group: on a timeout, on cancellation, and when the daemon
that runs them is killed (PR_SET_PDEATHSIG), so no build outlives the daemon unnoticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from banger.errors import CommandFailed, TimedOut, Unavailable

STDERR_TAIL_BYTES = 16 * 1024
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Completed:
    """What a finished command left: `stdout` whole, `stderr` its last 16 KiB."""

    argv: tuple[str, ...]
    exit_status: int
    stdout: bytes
    stderr: str


class HostCommands:
    """Runs host programs by name through PATH, with a C.UTF-8 environment."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        base = dict(os.environ if environment is None else environment)
        # /usr/sbin holds mke2fs and friends and is not on every user's PATH.
        path = base.get("PATH", "/usr/local/bin:/usr/bin:/bin")
        # What `make install` put beside our interpreter (uvx) is on nobody's PATH.
        own = os.path.dirname(sys.executable)
        for extra in ("/usr/local/sbin", "/usr/sbin", "/sbin", own):
            if extra not in path.split(":"):
                path = f"{path}:{extra}"
        self.environment = {**base, "PATH": path, "LC_ALL": "C.UTF-8", "LANG": "C.UTF-8"}

    def find(self, program: str) -> str | None:
        """Return the absolute path of `program`, or None."""
        return shutil.which(program, path=self.environment["PATH"])

    def need(self, program: str, *, hint: str = "banger doctor --fix") -> str:
        """Return the absolute path of `program`; raise Unavailable with a hint when absent."""
        found = self.find(program)
        if found is None:
            raise Unavailable(f"the program {program} is not installed", hint=hint)
        return found

    async def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | IO[bytes] | int | None = None,
        stdout: IO[bytes] | int | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 600,
        check: bool = True,
        pass_fds: Sequence[int] = (),
    ) -> Completed:
        """Run one command to its end and return what it left.

        `stdin` is bytes to feed, or a file/fd; `stdout` a file/fd to write to (else it is
        collected). A status other than 0 raises CommandFailed when `check`; running over
        `timeout_s` kills the group and raises TimedOut; cancellation kills the group too.
        """
        program = self.need(argv[0])
        process = await asyncio.create_subprocess_exec(
            program,
            *argv[1:],
            stdin=asyncio.subprocess.PIPE
            if isinstance(stdin, bytes)
            else (asyncio.subprocess.DEVNULL if stdin is None else stdin),
            stdout=asyncio.subprocess.PIPE if stdout is None else stdout,
            stderr=asyncio.subprocess.PIPE,
            cwd=cwd,
            env={**self.environment, **(env or {})},
            start_new_session=True,
            preexec_fn=_die_with_parent,
            pass_fds=tuple(pass_fds),
        )
        try:
            async with asyncio.timeout(timeout_s):
                out, tail = await asyncio.gather(
                    _feed_and_collect(process, stdin if isinstance(stdin, bytes) else None),
                    _tail(process.stderr),
                )
                status = await process.wait()
        except BaseException as error:
            await kill_group(process)
            # A child that has left the group (pasta becomes a daemon) may hold our pipes, and
            # asyncio keeps them open until it ends; only its transport can be told otherwise.
            process._transport.close()  # type: ignore[attr-defined]
            if isinstance(error, TimeoutError):
                message = f"{argv[0]} did not finish within {timeout_s:.0f} s"
                raise TimedOut(message) from error
            raise
        completed = Completed(tuple(argv), status, out, tail.decode(errors="replace"))
        if check and status != 0:
            raise failed(completed)
        return completed


def failed(completed: Completed) -> CommandFailed:
    """Turn a finished command into the error that shows its last line."""
    lines = [line for line in completed.stderr.strip().splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "it said nothing"
    return CommandFailed(
        f"{os.path.basename(completed.argv[0])} failed with status {completed.exit_status}: {last}",
        exit_status=completed.exit_status,
        stderr_tail="\n".join(lines[-20:]),
    )


async def kill_group(process: asyncio.subprocess.Process) -> None:
    """End a process group: SIGTERM, five seconds, SIGKILL; returns when the leader is reaped.

    The last SIGKILL is for children that outlived their leader: the group keeps its number as
    long as one of them lives.
    """
    for number, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await asyncio.shield(process.wait())
                break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


async def _feed_and_collect(process: asyncio.subprocess.Process, data: bytes | None) -> bytes:
    async def feed() -> None:
        if data is not None and process.stdin is not None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                process.stdin.write(data)
                await process.stdin.drain()
            process.stdin.close()

    async def collect() -> bytes:
        return b"" if process.stdout is None else await process.stdout.read()

    _, out = await asyncio.gather(feed(), collect())
    return out


async def _tail(stream: asyncio.StreamReader | None) -> bytes:
    kept = b""
    while stream is not None and (chunk := await stream.read(65536)):
        kept = (kept + chunk)[-STDERR_TAIL_BYTES:]
    return kept
