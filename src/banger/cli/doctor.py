"""`doctor`: the host's checks, in this process: it must work when the daemon does not."""

from __future__ import annotations

import argparse
import asyncio
import inspect
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
    from banger import config
    from banger.host.commands import HostCommands
    from banger.services import doctor

    commands = HostCommands()
    settings = config.load_config(context.paths.config_dir)

    def check() -> list[Check]:
        found: list[Check] = _finished(doctor.run_checks(commands, context.paths, settings))
        return found

    checks = check()
    if args.fix:
        mended = 0
        for found in checks:
            if found.status == "ok":
                continue
            try:
                _finished(doctor.fix(found))
                mended += 1
            except BangerError as error:
                output.write_error(error, found.name)
        if mended:
            checks = check()
    failed = any(found.status == "fail" for found in checks)
    if context.json:
        output.write_json({"ok": not failed, "checks": [_as_dict(found) for found in checks]})
    else:
        for found in checks:
            _show(found)
    return 1 if failed else 0


def _finished(value: Any) -> Any:
    return asyncio.run(value) if inspect.iscoroutine(value) else value


def _as_dict(check: Check) -> dict[str, Any]:
    from banger.cli.config import _as_dict as plain

    found: dict[str, Any] = plain(check)
    return found


def _show(check: Check) -> None:
    status = output.paint(f"{check.status:<8}", _COLOURS.get(check.status, "0"), sys.stdout)
    sys.stdout.write(f"{status} {output.escape(check.name)}: {output.escape(check.message)}\n")
    if check.status != "ok" and check.fix:
        sys.stdout.write(f"{'':<8} mend it: {output.escape(str(check.fix))}\n")


VERBS = {"doctor": (build_doctor, run_doctor)}
