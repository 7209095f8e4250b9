"""Ports of the host that lead into a VM: their notation, and whether they are free.

`guest.carrier` carries them.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address

from banger.errors import Conflict, InvalidInput

DEFAULT_HOST = "127.0.0.1"


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
