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
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from ipaddress import IPv4Address

from banger.errors import BangerError
from banger.guest import agent
from banger.guest.transport import Endpoint, VirtioSerial, endpoint_from_wire, wait_for
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
Serve = Callable[[socket.socket], None]
"""Serves one accepted connection to its end."""


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


class Acceptor:
    """Takes connections of several listeners, at most `limit` at a time, each in a thread.

    Listeners may be added and removed at any time, from any thread.
    """

    def __init__(self, limit: int) -> None:
        self._room = threading.BoundedSemaphore(_affordable(limit))
        # Not poll: epoll sees at once what another thread adds.
        self._poll = select.epoll()
        self._listeners: dict[int, tuple[socket.socket, Serve]] = {}

    def add(self, listener: socket.socket, serve: Serve) -> None:
        """Begin to take connections; `serve` has each until it returns, and does not close it."""
        self._listeners[listener.fileno()] = (listener, serve)
        self._poll.register(listener, select.EPOLLIN)

    def remove(self, listener: socket.socket) -> None:
        """Take no more connections of a listener and close it; those there are go on."""
        if self._listeners.pop(listener.fileno(), None) is not None:
            self._poll.unregister(listener)
            listener.close()

    def run(
        self, ended: int, *, every_s: float | None = None, look: Callable[[], None] | None = None
    ) -> None:
        """Take connections until the process of the pidfd `ended` has ended.

        `look` is called every `every_s` seconds.
        """
        self._poll.register(ended, select.EPOLLIN)
        due = time.monotonic()
        while True:
            if look is not None and every_s is not None and time.monotonic() >= due:
                look()
                due = time.monotonic() + every_s
            wait_s = None if every_s is None else max(0.0, due - time.monotonic())
            for fd, _ in self._poll.poll(wait_s):
                if fd == ended:
                    return
                self._accept(fd)

    def _accept(self, fd: int) -> None:
        # Without room the next ones wait in the kernel's backlog, for a while.
        if not self._room.acquire(timeout=_POLL_S):
            return
        try:
            listener, serve = self._listeners[fd]
            client, _ = listener.accept()
            threading.Thread(target=self._serve, args=(client, serve), daemon=True).start()
        except KeyError:  # removed just now
            self._room.release()
        except (OSError, RuntimeError):  # no descriptor or no thread is left: some will be
            self._room.release()
            time.sleep(_POLL_S)

    def _serve(self, client: socket.socket, serve: Serve) -> None:
        try:
            # A guest that refuses, or is gone, shows as a connection that closes.
            with client, contextlib.suppress(OSError, BangerError):
                serve(client)
        finally:
            self._room.release()


class Carrier(Acceptor):
    """Listens on ports of this host and carries each connection into the guest by `join`."""

    def __init__(self, join: Join, limit: int) -> None:
        super().__init__(limit)
        self._join = join
        self._ports: dict[socket.socket, int] = {}

    def listen(self, forward: Forward) -> int:
        """Begin to carry a port and return the host's (0 asked for a free one); raise OSError."""
        listener = socket.create_server((forward.host, forward.host_port), backlog=128)
        guest_port = forward.guest_port
        self._ports[listener] = guest_port
        self.add(listener, lambda client: self._join(client, guest_port))
        port: int = listener.getsockname()[1]
        return port

    def forget(self, guest_port: int) -> None:
        """Take no more connections for a port of the guest; those there are go on."""
        for listener, port in list(self._ports.items()):
            if port == guest_port:
                del self._ports[listener]
                self.remove(listener)


def agent_carrier(endpoint: Endpoint) -> Carrier:
    """Return a carrier through a guest's agent."""
    limit = _SERIAL_CONNECTIONS if isinstance(endpoint, VirtioSerial) else _CONNECTIONS
    return Carrier(join_agent(endpoint), limit)


def serve(forwards: list[Forward], carrier: Carrier, pid: int) -> None:
    """Listen, say `ready`, and carry connections until the process `pid` ends.

    Raises OSError when a port is taken or there is no such process.
    """
    ended = os.pidfd_open(pid)
    for forward in forwards:
        carrier.listen(forward)
    say_ready()
    carrier.run(ended)


def start_beside(argv: list[str], timeout_s: float) -> tuple[subprocess.Popen[bytes] | None, str]:
    """Start a process like this one, which lives on by itself; return it once it says it is ready.

    Else None, and its last words. Not asyncio's: that one kills what it started when its handle
    goes.
    """
    child = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert child.stdout is not None
    with child.stdout as said:
        line = ""
        if wait_for(said.fileno(), select.POLLIN, timeout_s):
            line = said.readline(500).decode(errors="replace").strip()
    if line == "ready":
        return child, line
    child.kill()
    child.wait()
    # As main says it: its program's name, and why.
    words = line.partition(": ")[2] if line.startswith("banger-") else line
    return None, words or "it did not answer"


def say_ready() -> None:
    """Tell who started us that we serve; nothing is said from here on."""
    print("ready", flush=True)
    # Nobody reads what we say any more: a full pipe would stop us.
    with open(os.devnull, "wb") as nothing:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nothing.fileno(), stream.fileno())


def add_whose(parser: argparse.ArgumentParser) -> None:
    """Add whose process this is: the mark of the VM, and the VMM it ends with."""
    parser.add_argument("--mark", required=True, help="says whose this is, in the process table")
    parser.add_argument("--pid", type=_pid, required=True, help="ends with this process")


def _pid(text: str) -> int:
    if not 1 <= int(text) <= 1 << 22:  # PID_MAX_LIMIT (linux/threads.h)
        raise ValueError(text)
    return int(text)


def parse_endpoint(text: str) -> Endpoint:
    """Parse an endpoint of a command line; raises ValueError."""
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
    add_whose(parser)
    other = parser.add_mutually_exclusive_group(required=True)
    other.add_argument("--address", type=IPv4Address, help="the guest's, on the bridge")
    other.add_argument("--endpoint", type=parse_endpoint, help="the guest's agent, as in the API")
    parser.add_argument("forwards", nargs="+", type=_forward)
    options = parser.parse_args()
    if options.address is not None:
        carrier = Carrier(join_address(str(options.address)), _CONNECTIONS)
    else:
        carrier = agent_carrier(options.endpoint)
    try:
        serve(options.forwards, carrier, options.pid)
    except OSError as error:
        print(f"banger-carrier: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
