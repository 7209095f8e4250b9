"""Carries published ports of the host into a VM: `python -m banger.guest.carrier`.

A process of its own beside the VM's, so that the daemon is not in the way of a byte and may die.
It listens where it was told and nowhere else, needs no root and no rule, and ends with the VMM's
process. The other end is an address (a VM on the bridge) or the VM's agent (any VM, also one
without a network).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import socket
import sys
import threading
from collections.abc import Callable

from banger.errors import BangerError
from banger.guest import agent
from banger.guest.transport import Endpoint, VirtioSerial, endpoint_from_wire
from banger.network.publish import Forward, parse_publish

_CHUNK_BYTES = 256 << 10
_CONNECT_TIMEOUT_S = 10.0
# A busy page opens six; a bound, so that nobody on the host can make us hold endless sockets.
_CONNECTIONS = 256
# Under QEMU each takes one of the VM's 12 streams, and exec and ssh need some too.
_SERIAL_CONNECTIONS = 8

Join = Callable[[socket.socket, int], None]
"""Carries one accepted connection to a port of the guest, to its end."""


def join_address(address: str) -> Join:
    """Return how to reach a guest by its address."""

    def join(client: socket.socket, port: int) -> None:
        with socket.create_connection((address, port), timeout=_CONNECT_TIMEOUT_S) as guest:
            guest.settimeout(None)
            back = threading.Thread(target=_pump, args=(guest, client), daemon=True)
            back.start()
            _pump(client, guest)
            back.join()

    return join


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Copy one direction and pass its end on; a broken one ends both."""
    try:
        while data := source.recv(_CHUNK_BYTES):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def join_agent(endpoint: Endpoint) -> Join:
    """Return how to reach a guest through its agent."""

    def join(client: socket.socket, port: int) -> None:
        out = os.dup(client.fileno())
        try:
            agent.forward(
                endpoint, port, wait_s=_CONNECT_TIMEOUT_S, in_fd=client.fileno(), out_fd=out
            )
        finally:
            with contextlib.suppress(OSError):  # closed already where the guest ended first
                os.close(out)

    return join


def serve(forwards: list[Forward], join: Join, limit: int, pid: int) -> None:
    """Listen, say `ready`, and carry connections until the process `pid` ends.

    Raises OSError when a port is taken or there is no such process.
    """
    room = threading.BoundedSemaphore(limit)
    ended = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    listeners = {}
    for forward in forwards:
        listener = socket.create_server((forward.host, forward.host_port), backlog=128)
        listeners[listener.fileno()] = (listener, forward.guest_port)
        poll.register(listener, select.POLLIN)
    print("ready", flush=True)

    def carry(client: socket.socket, port: int) -> None:
        try:
            # A guest that refuses, or is gone, shows as a connection that closes.
            with client, contextlib.suppress(OSError, BangerError):
                join(client, port)
        finally:
            room.release()

    while True:
        for fd, _ in poll.poll():
            if fd == ended:
                return
            # Waiting here leaves the next ones in the kernel's backlog.
            if not room.acquire(timeout=1):
                continue
            listener, port = listeners[fd]
            client, _ = listener.accept()
            threading.Thread(target=carry, args=(client, port), daemon=True).start()


def main() -> int:
    """Run the carrier of one VM until its process is gone."""
    parser = argparse.ArgumentParser(prog="banger-carrier")
    parser.add_argument("--mark", required=True, help="says whose this is, in the process table")
    parser.add_argument("--pid", type=int, required=True, help="ends with this process")
    parser.add_argument("--address", help="the guest's, on the bridge")
    parser.add_argument("--endpoint", type=json.loads, help="the guest's agent, as in the API")
    parser.add_argument("forwards", nargs="+", type=parse_publish)
    options = parser.parse_args()
    limit = _CONNECTIONS
    if options.address is not None:
        join = join_address(options.address)
    else:
        endpoint = endpoint_from_wire(options.endpoint)
        join = join_agent(endpoint)
        if isinstance(endpoint, VirtioSerial):
            limit = _SERIAL_CONNECTIONS
    try:
        serve(options.forwards, join, limit, options.pid)
    except OSError as error:
        print(f"banger-carrier: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
