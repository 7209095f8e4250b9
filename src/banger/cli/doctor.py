"""`doctor`: the host's checks, in this process: it must work when the daemon does not."""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import TYPE_CHECKING, Any

from banger.cli import output
from banger.cli.context import Context
from banger.cli.parsing import Parser, add_json
from banger.errors import BangerError

if TYPE_CHECKING:
    from banger.services.doctor import Check

_COLOURS = {"ok": "32", "warning": "33", "fail": "31"}


def build_doctor(parser: Parser) -> None:
    """Arguments of `doctor`."""
    parser.description = (
        "Check this host: one line each, ok, warning or fail, and the command that mends it.\n"
        "Exits with 1 when a check fails."
    )
    parser.add_argument("--fix", action="store_true", help="run the commands that mend")
    add_json(parser)


def run_doctor(context: Context, args: argparse.Namespace) -> int:
    """Check, mend when asked, and check again."""
    checks = asyncio.run(_examine(context, mend=args.fix))
    failed = any(found.status == "fail" for found in checks)
    if context.json:
        output.write_json({"ok": not failed, "checks": [_as_dict(found) for found in checks]})
    else:
        for found in checks:
            _show(found)
    return 1 if failed else 0


async def _examine(context: Context, *, mend: bool) -> list[Check]:
    from banger import config
    from banger.host.commands import HostCommands
    from banger.services import doctor

    commands = HostCommands()
    try:
        settings = config.load_config(context.paths.config_dir)
    except BangerError:
        settings = config.Config()  # its own check says what is wrong with the file
    checks = await doctor.run_checks(commands, context.paths, settings)
    if not mend:
        return checks
    mended = False
    for found in checks:
        if found.status == "ok" or not found.fixable:
            continue
        output.notice(f"{found.name}: {found.fix}")
        try:
            mended = await doctor.fix(found, commands) or mended
        except BangerError as error:
            output.write_error(error, found.name)
    return await doctor.run_checks(commands, context.paths, settings) if mended else checks


def _as_dict(check: Check) -> dict[str, Any]:
    return {
        "name": check.name,
        "status": check.status,
        "message": check.message,
        "fix": check.fix,
        "fixable": check.fixable,
    }


def _show(check: Check) -> None:
    status = output.paint(f"{check.status:<8}", _COLOURS.get(check.status, "0"), sys.stdout)
    sys.stdout.write(f"{status} {output.escape(check.name)}: {output.escape(check.message)}\n")
    if check.status != "ok" and check.fix:
        sys.stdout.write(f"{'':<8} mend it: {output.escape(str(check.fix))}\n")


VERBS = {"doctor": (build_doctor, run_doctor)}
