"""Ports of the host that lead into a VM: their notation, and the carrier for the bridge.

On the user network passt carries them itself. On the bridge a small process of our own does
(`python -m banger.network.publish`): it needs no root, no rule and no daemon, listens where it was
told and nowhere else, and ends with the VM's process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address

from banger.errors import Conflict, InvalidInput

DEFAULT_HOST = "127.0.0.1"
_CHUNK_BYTES = 256 << 10
_CONNECT_TIMEOUT_S = 10.0
# A busy page opens six. Each takes two descriptors, of which a process has 1024 where nobody says
# otherwise: beyond the bound a connection is closed at once, and the others go on.
_CONNECTIONS = 256


@dataclass(frozen=True, slots=True)
class Forward:
    """A TCP port of the host that leads to a port of a VM."""

    host: str
    host_port: int
    guest_port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.host_port}:{self.guest_port}"


def parse_publish(text: str) -> Forward:
    """Return the forward that `[HOST_IP:]PORT:GUEST_PORT` means; raise InvalidInput."""
    words = text.split(":")
    if len(words) == 2:
        words = [DEFAULT_HOST, *words]
    if len(words) != 3:
        raise InvalidInput(
            f"--publish {text!r} is not [HOST_IP:]PORT:GUEST_PORT",
            hint="for example --publish 8080:80",
        )
    try:
        host = str(IPv4Address(words[0]))
    except AddressValueError as error:
        raise InvalidInput(
            f"--publish {text!r}: {words[0]!r} is not an IPv4 address of this host",
            hint="leave it out for 127.0.0.1; 0.0.0.0 opens the port to everybody",
        ) from error
    return Forward(host, _port(words[1], text), _port(words[2], text))


def parse_publishes(texts: Iterable[str]) -> tuple[Forward, ...]:
    """Return the forwards of one VM; raise InvalidInput when two want one port of the host."""
    forwards = tuple(parse_publish(text) for text in texts)
    taken: set[int] = set()
    for forward in forwards:
        if forward.host_port in taken:
            raise InvalidInput(
                f"--publish: port {forward.host_port} of the host is asked for twice",
                hint="give each its own",
            )
        taken.add(forward.host_port)
    return forwards


def _port(text: str, whole: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535:
        return int(text)
    raise InvalidInput(
        f"--publish {whole!r}: {text!r} is not a port (1 to 65535)",
        hint="for example --publish 8080:80",
    )


def check_free(forwards: Iterable[Forward]) -> None:
    """Raise Conflict when a port of the host cannot be listened on; binds and lets go."""
    for forward in forwards:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # As who listens does: a connection that is closing is no reason to refuse.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((forward.host, forward.host_port))
                # Linux lets two bind one port with SO_REUSEADDR as long as neither listens.
                probe.listen(1)
            except OSError as error:
                raise _cannot_listen(forward, error) from error


def _cannot_listen(forward: Forward, error: OSError) -> Conflict:
    why = {
        errno.EADDRINUSE: "something listens there already",
        errno.EACCES: "ports below 1024 are root's",
        errno.EADDRNOTAVAIL: "this host does not have that address",
    }.get(error.errno or 0, error.strerror or str(error))
    other = forward.host_port + 10000 if forward.host_port < 50000 else 8080
    return Conflict(
        f"port {forward.host}:{forward.host_port} cannot be published: {why}",
        hint=f"choose another: --publish {other}:{forward.guest_port}",
        code="port_taken",
    )


# -- the carrier


async def serve(forwards: Iterable[Forward], guest: str, ended: asyncio.Event) -> None:
    """Carry connections to `guest` until `ended`; raises OSError when a port is taken."""
    room = asyncio.Semaphore(_CONNECTIONS)

    def carrier(port: int):  # type: ignore[no-untyped-def]  # asyncio's own callback shape
        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.closing(writer), contextlib.suppress(OSError, TimeoutError):
                if room.locked():
                    return
                async with room:
                    async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                        back, forth = await asyncio.open_connection(guest, port)
                    with contextlib.closing(forth):
                        await asyncio.gather(_pump(reader, forth), _pump(back, writer))

        return carry

    servers = [
        await asyncio.start_server(carrier(f.guest_port), f.host, f.host_port) for f in forwards
    ]
    print("ready", flush=True)
    await ended.wait()
    for server in servers:
        server.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy one direction and pass its end on; a broken one ends both."""
    while data := await reader.read(_CHUNK_BYTES):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        with contextlib.suppress(OSError):
            writer.write_eof()


def main() -> int:
    """Run the carrier of one VM until its process is gone."""
    parser = argparse.ArgumentParser(prog="banger-publish")
    parser.add_argument("--mark", required=True, help="says whose this is, in the process table")
    parser.add_argument("--pid", type=int, required=True, help="ends with this process")
    parser.add_argument("--guest", type=IPv4Address, required=True)
    parser.add_argument("forwards", nargs="+", type=_forward)
    options = parser.parse_args()

    async def run() -> None:
        ended = asyncio.Event()
        pidfd = os.pidfd_open(options.pid)
        loop = asyncio.get_running_loop()
        loop.add_reader(pidfd, ended.set)
        # Nobody reads our stderr once we serve: asyncio's complaints would fill the pipe in the
        # end, and the write that blocks then would stop every connection.
        loop.set_exception_handler(lambda *_: None)
        await serve(options.forwards, str(options.guest), ended)

    try:
        asyncio.run(run())
    except (OSError, OverflowError) as error:
        said = error.strerror if isinstance(error, OSError) else None
        print(f"banger-publish: {said or error}", file=sys.stderr)
        return 1
    return 0


def _forward(text: str) -> Forward:
    try:
        return parse_publish(text)
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(error.message) from error


if __name__ == "__main__":
    sys.exit(main())
