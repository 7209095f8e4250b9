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
import resource
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from ipaddress import IPv4Address

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
_POLL_S = 0.1
# Descriptors: what we hold ourselves, and what a connection may need at once (both its ends, a
# stream's lease, a socket's path).
_OWN_DESCRIPTORS = 16
_EACH_DESCRIPTORS = 5

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
        agent.forward(
            endpoint,
            port,
            wait_s=0,  # nobody listens: closed at once, as on the bridge
            in_fd=client.fileno(),
            out_fd=client.fileno(),
            # Closed by who accepted it: a number closed twice is somebody else's the second time.
            end_out=lambda _: client.shutdown(socket.SHUT_WR),
        )

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
    # Nobody reads what we say from here on: a full pipe would stop us.
    with open(os.devnull, "wb") as nothing:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nothing.fileno(), stream.fileno())

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
            # Without room the next ones wait in the kernel's backlog, for a while.
            if not room.acquire(timeout=_POLL_S):
                continue
            listener, port = listeners[fd]
            try:
                client, _ = listener.accept()
                threading.Thread(target=carry, args=(client, port), daemon=True).start()
            except (OSError, RuntimeError):  # no descriptor or no thread is left: some will be
                room.release()
                time.sleep(_POLL_S)


def _pid(text: str) -> int:
    if not 1 <= int(text) <= 1 << 22:  # PID_MAX_LIMIT (linux/threads.h)
        raise ValueError(text)
    return int(text)


def _endpoint(text: str) -> Endpoint:
    return endpoint_from_wire(json.loads(text))


def _forward(text: str) -> Forward:
    try:
        return parse_publish(text)
    except BangerError as error:
        raise argparse.ArgumentTypeError(error.message) from error


def _affordable(connections: int) -> int:
    """Return how many connections there are descriptors for, at most `connections`.

    One that is accepted and then lacks a descriptor for its other end would be dropped.
    """
    wanted = _OWN_DESCRIPTORS + _EACH_DESCRIPTORS * connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return min(connections, max(1, (soft - _OWN_DESCRIPTORS) // _EACH_DESCRIPTORS))
    return connections


def main() -> int:
    """Run the carrier of one VM until its process is gone."""
    parser = argparse.ArgumentParser(prog="banger-carrier")
    parser.add_argument("--mark", required=True, help="says whose this is, in the process table")
    parser.add_argument("--pid", type=_pid, required=True, help="ends with this process")
    other = parser.add_mutually_exclusive_group(required=True)
    other.add_argument("--address", type=IPv4Address, help="the guest's, on the bridge")
    other.add_argument("--endpoint", type=_endpoint, help="the guest's agent, as in the API")
    parser.add_argument("forwards", nargs="+", type=_forward)
    options = parser.parse_args()
    limit = _CONNECTIONS
    if options.address is not None:
        join = join_address(str(options.address))
    else:
        join = join_agent(options.endpoint)
        if isinstance(options.endpoint, VirtioSerial):
            limit = _SERIAL_CONNECTIONS
    try:
        serve(options.forwards, join, _affordable(limit), options.pid)
    except OSError as error:
        print(f"banger-carrier: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
