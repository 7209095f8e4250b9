"""`version` with options; without any, `main` answers before this is imported."""

from __future__ import annotations

import argparse

from banger import __version__
from banger.cli import output
from banger.cli.context import Context
from banger.cli.parsing import Parser, add_json


def build_version(parser: Parser) -> None:
    """Arguments of `version`."""
    parser.description = "Print the version."
    add_json(parser)


def run_version(context: Context, _args: argparse.Namespace) -> int:
    """Print the version."""
    if context.json:
        output.write_json({"version": __version__})
    else:
        output.write_line(f"banger {__version__}")
    return 0


VERBS = {"version": (build_version, run_version)}
