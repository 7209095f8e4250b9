"""`daemon status` and `daemon stop`: neither starts one."""

from __future__ import annotations

import argparse

from banger.cli import output
from banger.cli.context import Context
from banger.cli.parsing import Parser, add_json


def build_status(parser: Parser) -> None:
    """Arguments of `daemon status`."""
    parser.description = "Tell whether the daemon runs. Exits with 1 when it does not."
    add_json(parser)


def run_status(context: Context, _args: argparse.Namespace) -> int:
    """Show the daemon, without starting it."""
    from banger.client import autostart
    from banger.client.api import Client
    from banger.client.connection import DaemonGone

    try:
        info = Client(autostart.Daemon(context.paths, start=False)).daemon_info()
    except DaemonGone:
        if context.json:
            output.write_json({"running": False})
        else:
            output.write_line("the daemon is not running; any command that needs it starts it")
        return 1
    if context.json:
        output.write_json({"running": True, **info})
        return 0
    output.write_fields(
        [
            ("running", f"yes, pid {info['pid']}"),
            ("version", info["version"]),
            ("since", info["started_at"]),
            ("VMs running", str(info["running_vms"])),
            ("operations", str(info["running_operations"])),
            ("data", info["data_dir"]),
            ("socket", autostart.socket_path(context.paths)),
            ("log", autostart.log_path(context.paths)),
        ]
    )
    return 0


def build_stop(parser: Parser) -> None:
    """Arguments of `daemon stop`."""
    parser.description = "Stop the daemon. VMs go on; the next command starts it again."
    parser.add_argument(
        "--if-idle", action="store_true", help="refuse while an operation runs (a pull, a start)"
    )
    add_json(parser)


def run_stop(context: Context, args: argparse.Namespace) -> int:
    """Stop the daemon."""
    from banger.client import autostart

    stopped = autostart.stop_daemon(context.paths, only_if_idle=args.if_idle)
    if context.json:
        output.write_json({"ok": True, "was_running": stopped})
    else:
        output.write_line("the daemon stopped" if stopped else "the daemon was not running")
    return 0


VERBS = {"status": (build_status, run_status), "stop": (build_stop, run_stop)}
