"""Steps that run side by side in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable, Coroutine
from typing import Any

_PIPE_BYTES = 1 << 20  # fs.pipe-max-size, what a user may have


async def together(*steps: Coroutine[Any, Any, object]) -> None:
    """Run steps side by side; the first failure cancels the others and is raised once they ended.

    (asyncio.gather lets the others go on unseen, a TaskGroup wraps the error.)
    """
    tasks = [asyncio.create_task(step) for step in steps]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            # gather passes our own cancellation on; a second one would end what a task does
            # because of the first, such as waiting for a killed child.
            if not task.cancelling():
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def piped(
    produce: Callable[[int], Coroutine[Any, Any, object]],
    consume: Callable[[int], Coroutine[Any, Any, object]],
) -> None:
    """Run a writer and a reader over one pipe; each sees the end when the other is done.

    Raised is the first failure: a dead reader fails the writer, an early end the reader.
    """
    read_fd, write_fd = os.pipe()
    # 64 KiB, the default, makes two processes wait for each other sixteen times as often. A user
    # over the limit of fs.pipe-user-pages-soft keeps the default.
    with contextlib.suppress(OSError):
        fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    async def writer() -> None:
        try:
            await produce(write_fd)
        finally:
            os.close(write_fd)

    async def reader() -> None:
        try:
            await consume(read_fd)
        finally:
            os.close(read_fd)

    await together(writer(), reader())
