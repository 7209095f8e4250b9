"""Files are whole or absent, copies stay sparse, processes are never mistaken for others."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from banger.errors import CommandFailed, NoSpace, TimedOut, Unavailable
from banger.host import files
from banger.host.commands import HostCommands
from banger.host.locks import try_lock
from banger.host.process import ProcessIdentity, end_by_root, find_by_argument, find_by_root
from banger.host.threads import run_uncut
from banger.paths import Paths, find_paths, make_runtime_dir


def test_write_atomic_replaces_whole_and_leaves_no_staging(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, b"old")
    files.write_atomic(path, b"new", mode=0o644)
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_copy_sparse_keeps_holes_and_bytes(tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    with open(source, "wb") as file:
        file.truncate(64 << 20)
        file.seek(10 << 20)
        file.write(b"x" * 5000)
        file.seek(60 << 20)
        file.write(b"end")
    files.copy_sparse(source, copy)
    assert copy.stat().st_size == 64 << 20
    assert files.allocated_bytes(copy) <= files.allocated_bytes(source) + 65536
    assert copy.read_bytes() == source.read_bytes()


def test_a_full_file_system_is_named(tmp_path: Path) -> None:
    with pytest.raises(NoSpace, match=str(tmp_path)), files.no_space_named(tmp_path):
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")


def test_trim_log_keeps_the_end_and_its_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with open(path, "ab", buffering=0) as writer:
        writer.write(b"a" * 5000 + b"tail")
        files.trim_log(path, 4000, 100)
        writer.write(b"more")
    text = path.read_bytes()
    assert text.startswith(b"[earlier lines were cut]\n")
    assert text.endswith(b"tailmore")
    assert len(text) < 200


def test_last_lines_hold_no_control_characters(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"first\n\n\x1b]0;owned\x07second\n")
    assert files.last_lines(path) == "first / ]0;owned second"


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    script = (
        "import time; from pathlib import Path; from banger.host.locks import try_lock;"
        f"try_lock(Path({str(path)!r})); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    assert try_lock(path) is None
    holder.kill()
    holder.wait()
    holder.stdout.close()
    fd = try_lock(path)
    assert fd is not None
    os.close(fd)


def test_a_process_is_known_by_start_time_not_by_pid_alone() -> None:
    child = subprocess.Popen(["sleep", "60"])
    identity = ProcessIdentity.of(child.pid)
    assert identity is not None and identity.alive()
    assert not replace(identity, start_ticks=identity.start_ticks + 1).alive()
    assert not replace(identity, boot_id="another boot").alive()
    replace(identity, start_ticks=1).kill()  # must not hit the child
    assert child.poll() is None
    identity.kill()
    child.wait()
    assert not identity.alive()
    assert ProcessIdentity.of(child.pid) is None


async def test_wait_returns_when_the_process_ends() -> None:
    child = subprocess.Popen(["sleep", "60"])
    identity = ProcessIdentity.of(child.pid)
    assert identity is not None
    waiting = asyncio.create_task(identity.wait())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    child.kill()
    await asyncio.wait_for(waiting, 10)
    child.wait()


def test_processes_are_found_by_a_fragment_of_their_command_line() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "mark-3f81"])
    deadline = time.monotonic() + 10
    found: list[ProcessIdentity] = []
    while not found and time.monotonic() < deadline:  # the exec is not instant
        found = find_by_argument("mark-3f81")
    child.kill()
    child.wait()
    assert [identity.pid for identity in found] == [child.pid]


@pytest.mark.skipif(os.geteuid() != 0, reason="chroot(2) needs root")
async def test_processes_with_a_root_of_their_own_are_found_and_ended(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    leave = "import os, sys, time; os.chroot(sys.argv[1]); print('in', flush=True); time.sleep(60)"
    child = subprocess.Popen(
        [sys.executable, "-c", leave, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "in\n"
        assert [found.pid for found in find_by_root(tmp_path)] == [child.pid]
        assert find_by_root(other) == find_by_root(tmp_path / "absent") == []
        await end_by_root(tmp_path)
        assert child.poll() == -signal.SIGKILL
        await end_by_root(tmp_path)  # nobody is left
    finally:
        child.kill()
        child.communicate()


async def test_work_in_a_thread_is_waited_for_though_its_caller_is_cancelled_twice() -> None:
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait(10)
        done.set()
        raise ValueError("nobody asks for it")

    task = asyncio.create_task(run_uncut(work))
    await asyncio.to_thread(begun.wait, 10)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.01)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done.is_set()


async def test_a_failing_command_shows_its_last_line() -> None:
    with pytest.raises(CommandFailed, match=r"sh failed with status 3: the reason"):
        await HostCommands().run(["sh", "-c", "echo noise >&2; echo the reason >&2; exit 3"])


async def test_a_missing_program_is_named() -> None:
    with pytest.raises(Unavailable, match="no-such-program"):
        await HostCommands().run(["no-such-program"])


async def test_a_command_over_its_time_is_ended_with_its_children() -> None:
    mark = f"{time.time_ns()}"
    script = f"sleep 60 & sleep 60; : {mark}"
    with pytest.raises(TimedOut):
        await HostCommands().run(["sh", "-c", script], timeout_s=0.3)
    assert find_by_argument(mark) == []


async def test_a_cancelled_command_is_ended() -> None:
    mark = f"mark-{time.time_ns()}"
    task = asyncio.create_task(HostCommands().run(["sh", "-c", f"sleep 60; : {mark}"]))
    await asyncio.sleep(0.2)
    assert len(find_by_argument(mark)) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert find_by_argument(mark) == []


async def test_pipes_that_a_daemon_holds_are_closed_with_the_command() -> None:
    def pipes() -> list[str]:
        found = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        return sorted(path for path in found if "pipe:" in path)

    await HostCommands().run(["true"])  # asyncio's own are there from now on
    before = pipes()
    mark = f"{time.time_ns()}"
    script = f"setsid sleep 3600.{mark} & sleep 60"
    with pytest.raises(TimedOut):
        await HostCommands().run(["sh", "-c", script], timeout_s=0.3)
    await asyncio.sleep(0)
    (left,) = find_by_argument(mark)
    left.kill()
    assert pipes() == before


async def test_stdin_and_stdout_are_binary_safe() -> None:
    data = bytes(range(256)) * 1000
    assert (await HostCommands().run(["cat"], stdin=data)).stdout == data


def test_two_homes_never_share_a_runtime_directory() -> None:
    first = find_paths({"HOME": "/home/a", "XDG_RUNTIME_DIR": "/run/x"})
    second = find_paths({"HOME": "/home/b", "XDG_RUNTIME_DIR": "/run/x"})
    assert first.runtime_dir != second.runtime_dir
    assert first.config_dir == "/home/a/.config/banger"


def test_a_runtime_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "banger").mkdir(mode=0o755)
    paths = find_paths({"HOME": "/home/a", "XDG_RUNTIME_DIR": str(tmp_path)})._replace(
        runtime_dir=str(tmp_path / "banger" / "x")
    )
    with pytest.raises(Unavailable, match="not a private directory"):
        make_runtime_dir(paths)
    (tmp_path / "banger").chmod(0o700)
    assert Path(make_runtime_dir(paths)).stat().st_mode & 0o777 == 0o700
    assert isinstance(paths, Paths)


def test_a_symlink_as_runtime_directory_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    (tmp_path / "banger").symlink_to(target)
    paths = find_paths({"HOME": "/home/a"})._replace(runtime_dir=str(tmp_path / "banger" / "x"))
    with pytest.raises(Unavailable):
        make_runtime_dir(paths)
