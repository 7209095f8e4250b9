"""`vm forward`: ports of a running VM on this host's loopback, for as long as the command runs."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from typing import TYPE_CHECKING

from banger.cli import output
from banger.cli.context import Context, endpoint_of
from banger.cli.parsing import Parser, add_json, add_quiet
from banger.errors import BangerError, Conflict, InvalidInput, UsageError

if TYPE_CHECKING:
    from banger.guest.carrier import Carrier
    from banger.guest.transport import Endpoint

_HOST = "127.0.0.1"
_LOOK_EVERY_S = 1.0
_SSH_PORT = 22  # `vm ssh` is there for it
_LOWEST_FREE_PORT = 1024
_AUTO_LIMIT = 64  # a guest may open thousands; it decides what listens here only this far


def build_forward(parser: Parser) -> None:
    """Arguments of `vm forward`."""
    parser.usage = "banger vm forward NAME PORT[:HOSTPORT]... | --auto"
    parser.description = (
        "Let ports that listen inside a running VM answer on this host's 127.0.0.1, until Ctrl-C\n"
        "or until the VM stops. It goes through the VM's agent: on any VMM and network, none too.\n"
        "A port that is taken here, or below 1024, gets another one unless HOSTPORT names it."
    )
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("ports", metavar="PORT[:HOSTPORT]", nargs="*")
    parser.add_argument(
        "--auto", action="store_true", help="every TCP port that listens, as they come and go"
    )
    add_quiet(parser)
    add_json(parser, "say each port as a line of JSON on stdout")
    parser.examples(
        ("banger vm forward box 8000", "127.0.0.1:8000 leads to the guest's port 8000"),
        ("banger vm forward box 80:8080 5432", "two, the first elsewhere"),
        ("banger vm forward box --auto", "whatever a dev server opens"),
    )


def run_forward(context: Context, args: argparse.Namespace) -> int:
    """Carry ports until interrupted."""
    from banger.cli.vm_ssh import connect_running
    from banger.guest.carrier import agent_carrier

    if args.auto == bool(args.ports):
        raise UsageError(
            "which ports", hint=f"banger vm forward {args.name} 8000, or --auto for all that listen"
        )
    wanted = dict(_parse(text) for text in args.ports)
    connection = connect_running(context, args.name)
    pid = connection["vm"]["pid"]
    if pid is None:
        raise Conflict(f"{args.name} does not run", hint=f"banger vm start {args.name}")
    endpoint = endpoint_of(connection)
    carrier = agent_carrier(endpoint)
    forwarder = _Forwarder(context, args, carrier, endpoint)
    for guest_port, host_port in wanted.items():
        forwarder.begin(guest_port, host_port)
    with contextlib.suppress(ProcessLookupError):  # it stopped just now
        ended = os.pidfd_open(pid)
        if args.auto:
            carrier.run(ended, every_s=_LOOK_EVERY_S, look=forwarder.look)
        else:
            carrier.run(ended)
    output.notice(f"{args.name} has stopped")
    return 0


def _parse(text: str) -> tuple[int, int | None]:
    """Return the guest's port and the host's, None when it is not said."""
    guest, colon, host = text.partition(":")
    ports = []
    for part in (guest, host) if colon else (guest,):
        if not part.isascii() or not part.isdigit() or not 0 < int(part) < 65536:
            raise InvalidInput(f"{text!r} is not PORT or PORT:HOSTPORT", hint="for example 80:8080")
        ports.append(int(part))
    return ports[0], ports[1] if colon else None


class _Forwarder:
    """Begins and ends forwards, and says so."""

    def __init__(
        self, context: Context, args: argparse.Namespace, carrier: Carrier, endpoint: Endpoint
    ) -> None:
        self._json = context.json
        self._quiet = args.quiet
        self._name = args.name
        self._carrier = carrier
        self._endpoint = endpoint
        self._open: dict[int, int] = {}

    def begin(self, guest_port: int, host_port: int | None) -> None:
        """Listen for a port; raise Conflict when the one that was named is taken."""
        from banger.network.publish import Forward

        low = guest_port < _LOWEST_FREE_PORT
        tries = [host_port] if host_port is not None else [0] if low else [guest_port, 0]
        for number in tries:
            try:
                port = self._carrier.listen(Forward(_HOST, number, guest_port))
                break
            except OSError as error:
                if number == tries[-1]:
                    why = "is taken" if error.errno == errno.EADDRINUSE else str(error.strerror)
                    raise Conflict(
                        f"port {number} of {_HOST} {why}",
                        hint=f"choose another: {guest_port}:HOSTPORT",
                    ) from error
        self._open[guest_port] = port
        self._say("open", guest_port, f"{_HOST}:{port} leads to port {guest_port} of {self._name}")

    def look(self) -> None:
        """Begin what listens by now and end what does not any more."""
        from banger.guest import agent

        try:
            rows = agent.listening_ports(self._endpoint)
        except BangerError:
            return  # busy, or about to stop: the next look tells
        listening = {
            port
            for row in rows
            if str(row.get("proto", "")).startswith("tcp")
            and isinstance(port := row.get("port"), int)
            and 0 < port < 65536
            and port != _SSH_PORT
        }
        for port in sorted(listening - self._open.keys()):
            if len(self._open) >= _AUTO_LIMIT:
                break
            try:
                self.begin(port, None)
            except Conflict as error:
                self._open[port] = 0
                output.warn(error.message)
        for port in sorted(self._open.keys() - listening):
            self._carrier.forget(port)
            self._say("closed", port, f"port {port} of {self._name} has closed")
            del self._open[port]

    def _say(self, event: str, guest_port: int, text: str) -> None:
        if self._json:
            port = self._open[guest_port]
            said = {"type": event, "host": _HOST, "port": port, "guest_port": guest_port}
            output.write_json_line(said, sys.stdout)
        elif not self._quiet:
            output.notice(text)


VERBS = {"forward": (build_forward, run_forward)}
