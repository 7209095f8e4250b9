"""`internal connect`: what ssh's ProxyCommand runs. Hot: it is in the way of every session."""

from __future__ import annotations

import argparse

from banger.cli.context import Context, endpoint_of
from banger.cli.parsing import Parser
from banger.errors import UsageError

WAIT_S = 60.0  # sshd of a guest that has just booted; emulated ones take their time


def build_connect(parser: Parser) -> None:
    """Arguments of `internal connect`."""
    parser.description = "Carry a TCP port of a VM over stdin and stdout."
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("port", metavar="PORT")


def run_connect(context: Context, args: argparse.Namespace) -> int:
    """Pump bytes between stdin/stdout and a port inside the VM until both ends closed."""
    from banger.guest import agent

    # ssh hands over the host name as typed; NAME.vm is how it names a VM.
    name = args.name.lower().removesuffix(".vm")
    if not args.port.isascii() or not args.port.isdigit() or not 0 < int(args.port) < 65536:
        raise UsageError(f"not a port: {args.port}", hint="banger internal connect NAME 22")
    connection = context.client.connect_vm(name)
    agent.forward(endpoint_of(connection), int(args.port), wait_s=WAIT_S, in_fd=0, out_fd=1)
    return 0


VERBS = {"connect": (build_connect, run_connect)}
