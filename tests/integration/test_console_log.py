"""A guest's console log is bounded by a process of its own, daemon or not."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from banger.host.commands import HostCommands
from banger.vmm.children import _CONSOLE_LIMIT_BYTES, Children

pytestmark = pytest.mark.integration


async def _write(log: Path, script: str) -> None:
    """Run a script in a VMM's place, its stdout the console, and wait until all of it is kept."""
    children = Children(HostCommands())
    console = children.open_console(log)
    try:
        child = await children.spawn(
            ["/bin/sh", "-c", script], log=log.with_name("vmm.log"), stdout=console
        )
    finally:
        os.close(console)
    await asyncio.to_thread(child.wait)
    (keeper,) = children._keepers
    # It ends by itself with its writer, though nobody tells it to.
    await asyncio.to_thread(os.waitpid, keeper, 0)
    await children.end(child)


async def test_what_a_guest_says_is_kept_in_order(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    await _write(log, "echo one; echo two")
    await _write(log, "echo three")
    assert log.read_bytes() == b"one\ntwo\nthree\n"
    assert log.stat().st_mode & 0o777 == 0o600


async def test_a_flood_leaves_its_end_in_a_bounded_file(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    await _write(log, "yes 'a line of the guest' | head -c 30000000; echo; echo the last words")
    assert log.stat().st_size <= _CONSOLE_LIMIT_BYTES + (64 << 10)
    said = log.read_bytes()
    assert said.startswith(b"[earlier lines were cut]\n")
    assert said.endswith(b"\nthe last words\n")


async def test_a_keeper_outlives_who_started_it_and_ends_with_the_console(tmp_path: Path) -> None:
    """What a killed daemon leaves behind goes on, and goes with the VM."""
    log = tmp_path / "console.log"
    children = Children(HostCommands())
    console = children.open_console(log)
    (keeper,) = children._keepers
    assert os.getsid(keeper) == keeper  # no signal to our group or terminal reaches it
    os.write(console, b"still here\n")
    deadline = time.monotonic() + 30
    while not log.exists() or log.read_bytes() != b"still here\n":
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    os.close(console)
    assert await asyncio.to_thread(os.waitpid, keeper, 0) == (keeper, 0)
