"""`bangerd`: takes the lock, opens the state, reconciles, answers.

There is one per user and data directory. It says over `--ready-fd` that it answers, or in one
line of JSON why it does not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import Callable

import uvicorn

from banger import __version__
from banger.daemon.logs import set_up_logging
from banger.daemon.server import make_app
from banger.daemon.wiring import Daemon, wire
from banger.errors import BangerError, Conflict
from banger.host.files import make_private_directory
from banger.host.locks import try_lock
from banger.paths import find_paths, make_runtime_dir
from banger.store.layout import Layout

log = logging.getLogger(__name__)


def main() -> int:
    """Run the daemon until it is told to stop."""
    parser = argparse.ArgumentParser(prog="bangerd", description="banger's daemon")
    parser.add_argument("--ready-fd", type=int, help="a pipe to say `ready` on")
    parser.add_argument("--version", action="version", version=__version__)
    options = parser.parse_args()
    os.umask(0o077)
    say = _teller(options.ready_fd)
    try:
        asyncio.run(_serve(say))
    except BangerError as error:
        log.error("cannot start: %s", error.message)
        body = {"code": error.code, "message": error.message, "hint": error.hint}
        say(json.dumps({"error": body}))
        print(f"bangerd: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return 1
    return 0


def _teller(ready_fd: int | None) -> Callable[[str], None]:
    """Return a function that writes one line to the readiness pipe and closes it, once."""
    state = {"fd": ready_fd}

    def say(line: str) -> None:
        fd = state["fd"]
        if fd is not None:
            state["fd"] = None
            with contextlib.suppress(OSError):  # who waited may be gone
                os.write(fd, line.encode() + b"\n")
            os.close(fd)

    return say


async def _serve(say: Callable[[str], None]) -> None:
    paths = find_paths()
    layout = Layout.of(paths)
    make_runtime_dir(paths)
    for directory in (layout.data, layout.state, layout.vms, layout.runtime_vms):
        make_private_directory(directory)
    lock = try_lock(layout.daemon_lock)
    if lock is None:
        raise Conflict(
            "another bangerd runs for this user and data directory",
            hint="see `banger daemon status`",
            code="daemon_runs",
        )
    stopping = asyncio.Event()
    daemon = await wire(layout, stopping.set)
    set_up_logging(layout.daemon_log, daemon.log_level)
    log.info("bangerd %s begins, pid %d", __version__, os.getpid())
    try:
        await daemon.reconcile()
        await _answer(layout, daemon, stopping, say)
    finally:
        await daemon.close()
        log.info("bangerd ends")
        os.close(lock)


async def _answer(
    layout: Layout, daemon: Daemon, stopping: asyncio.Event, say: Callable[[str], None]
) -> None:
    # Under the lock nobody else listens here: what is there is a dead daemon's.
    layout.api_socket.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(layout.api_socket))  # 0600 by the umask; uvicorn's own would be 0666
    listener.listen(128)
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(daemon.handlers),
            http="h11",
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            # Followers of an operation that is being cancelled get this long for its last event.
            timeout_graceful_shutdown=10,
        )
    )

    async def end_when_told() -> None:
        await stopping.wait()
        await daemon.cancel_operations()
        server.should_exit = True

    ender = asyncio.create_task(end_when_told())
    # Beside the first requests: none of them waits for a name to be answered.
    names = asyncio.create_task(daemon.answer_names())
    say("ready")
    try:
        await server.serve(sockets=[listener])
    finally:
        ender.cancel()
        names.cancel()
        layout.api_socket.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
