"""Processes that outlive us, named so that a reused pid is never taken for them.

A process is (boot id, pid, start time): what /proc says of it must match all three.
Owns reading /proc and pidfds; leaves spawning VMMs to their adapters.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# A program that forks while it starts may show one of two processes at the first look.
_LOOKS = 5


def boot_id() -> str:
    """Return the kernel's id of this boot: pids of another boot mean nothing."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _stat_fields(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Field 2 is the command in parentheses and may hold anything, also parentheses.
    return text[text.rindex(")") + 2 :].split()


def start_ticks(pid: int) -> int | None:
    """Return field 22 of /proc/PID/stat (clock ticks since boot), or None; a zombie is gone."""
    fields = _stat_fields(pid)
    if fields is None or fields[0] in ("Z", "X"):
        return None
    return int(fields[19])


@dataclass(frozen=True, slots=True)
class ProcessUsage:
    """What a process has cost so far."""

    cpu_seconds: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process of one boot."""

    boot_id: str
    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """Return the identity of a live process, or None."""
        started = start_ticks(pid)
        return None if started is None else cls(boot_id(), pid, started)

    def alive(self) -> bool:
        """Tell whether this very process runs."""
        return self.boot_id == boot_id() and start_ticks(self.pid) == self.start_ticks

    def open_pidfd(self) -> int | None:
        """Return a pidfd of this very process (the caller closes it), or None when it is gone."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if self.alive():  # checked after the open: from here on the fd cannot be another's
            return fd
        os.close(fd)
        return None

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Signal this very process; gone is fine, and so is somebody else's."""
        fd = self.open_pidfd()
        if fd is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(fd, number)
            os.close(fd)

    def may_signal(self) -> bool:
        """Tell whether it is there and ours to signal."""
        try:
            os.kill(self.pid, 0)
        except OSError:
            return False
        return True

    async def wait(self) -> None:
        """Return when this process has ended (at once when it is gone)."""
        fd = self.open_pidfd()
        if fd is None:
            return
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(fd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(fd)
            os.close(fd)

    def usage(self) -> ProcessUsage | None:
        """Return CPU time and resident memory so far, or None when it is gone."""
        fields = _stat_fields(self.pid)
        if fields is None or not self.alive():
            return None
        return ProcessUsage(
            cpu_seconds=(int(fields[11]) + int(fields[12])) / _TICKS_PER_S,
            memory_bytes=int(fields[21]) * _PAGE_BYTES,
        )


async def end_by_argument(fragment: str, *, timeout_s: float = 10.0) -> None:
    """Kill the processes whose command line holds `fragment`, and wait until they are gone.

    Those of others that we may not signal are left alone: anybody can give theirs our words.
    A killed process is gone within milliseconds, one that waits for its disk is not, hence
    `timeout_s`.
    """
    await _end_found(partial(find_by_argument, fragment), timeout_s)


async def end_by_root(directory: Path, *, timeout_s: float = 10.0) -> None:
    """Kill the processes whose root is `directory`, and wait until they are gone."""
    await _end_found(partial(find_by_root, directory), timeout_s)


async def _end_found(find: Callable[[], list[ProcessIdentity]], timeout_s: float) -> None:
    for _ in range(_LOOKS):
        ours = [process for process in await asyncio.to_thread(find) if process.may_signal()]
        if not ours:
            return
        await end_all(ours, timeout_s=timeout_s)


async def end_all(processes: Iterable[ProcessIdentity], *, timeout_s: float = 10.0) -> None:
    """Kill processes and wait until they are gone, at most `timeout_s`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            for process in processes:
                if process.may_signal():
                    process.kill()
                    await process.wait()


def find_by_argument(fragment: str) -> list[ProcessIdentity]:
    """Return the processes whose command line holds `fragment`, for sweeping after a crash.

    Of whatever user: a jailed VMM has a uid of its own, and a process that is not dumpable (pasta)
    looks like root's.
    """
    wanted = os.fsencode(fragment)
    return _find(lambda process: wanted in Path(process, "cmdline").read_bytes())


def find_by_root(directory: Path) -> list[ProcessIdentity]:
    """Return the processes whose root is `directory`, in whatever mount namespace.

    Of those that root alone may look at, as jailed ones are, only root is told.
    """
    try:
        wanted = os.lstat(directory)
    except FileNotFoundError:
        return []
    return _find(lambda process: os.path.samestat(os.stat(f"{process}/root"), wanted))


def _find(matches: Callable[[str], bool]) -> list[ProcessIdentity]:
    """Return the processes but our own of whose directory in /proc `matches` is true."""
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if matches(entry.path):
                identity = ProcessIdentity.of(int(entry.name))
                if identity is not None:
                    found.append(identity)
    return found
