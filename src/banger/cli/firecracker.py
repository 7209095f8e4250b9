"""`firecracker install`, `list` and `remove`: in this process, with or without a daemon.

The daemon looks for Firecracker anew whenever it starts a VM, so there is nothing to tell it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from banger.cli import output
from banger.cli.context import Context
from banger.cli.parsing import Parser, add_json, add_quiet
from banger.cli.progress import Progress

if TYPE_CHECKING:
    from banger.vmm.firecracker_release import Installed


def build_install(parser: Parser) -> None:
    """Arguments of `firecracker install`."""
    parser.description = (
        "Download a release of Firecracker with its jailer, check its sha256, and use it for VMs\n"
        "that start from now on. One that is installed already is only made the current one."
    )
    parser.add_argument("--version", metavar="V", help="the release (default: the pinned one)")
    parser.add_argument(
        "--sha256", metavar="HEX", help="of the archive; needed for releases not pinned in banger"
    )
    parser.add_argument(
        "--base-url", metavar="URL", help="http, https or file (default: firecracker_base_url)"
    )
    add_quiet(parser)
    add_json(parser)
    parser.examples(
        ("banger firecracker install", "the pinned release, from upstream"),
        ("banger firecracker install --base-url file:///srv/firecracker", "from a directory"),
    )


def run_install(context: Context, args: argparse.Namespace) -> int:
    """Install a release."""
    from banger.config import load_config
    from banger.vmm import firecracker_release as release

    version = release.DEFAULT if args.version is None else release.version_of(args.version)
    base_url = args.base_url or load_config(context.paths.config_dir).firecracker_base_url
    with Progress(quiet=args.quiet) as progress:
        found = release.install(
            version, base_url, args.sha256, Path(context.paths.data_dir), progress
        )
    if context.json:
        output.write_json(_as_dict(found))
    else:
        output.write_line(str(found.version))
        if not args.quiet:
            output.notice(f"VMs that start from now on can run in Firecracker {found.version}")
    return 0


def build_list(parser: Parser) -> None:
    """Arguments of `firecracker list`."""
    parser.description = "List the releases that `banger firecracker install` put in place."
    add_json(parser)


def run_list(context: Context, _args: argparse.Namespace) -> int:
    """List releases."""
    from banger.vmm import firecracker_release as release

    found = release.list_installed(Path(context.paths.data_dir))
    if context.json:
        output.write_json([_as_dict(entry) for entry in found])
        return 0
    if not found:
        output.notice("none installed; `banger firecracker install` gets one")
        return 0
    output.write_table(
        ["VERSION", "CURRENT", "DIRECTORY"],
        [
            [str(entry.version), "yes" if entry.current else "no", str(entry.directory)]
            for entry in found
        ],
    )
    return 0


def build_remove(parser: Parser) -> None:
    """Arguments of `firecracker remove`."""
    parser.description = "Remove an installed release. VMs that run in it go on."
    parser.add_argument("version", metavar="VERSION")
    add_json(parser)


def run_remove(context: Context, args: argparse.Namespace) -> int:
    """Remove a release."""
    from banger.vmm import firecracker_release as release

    version = release.version_of(args.version)
    was_current = release.remove(version, Path(context.paths.data_dir))
    if context.json:
        output.write_json({"ok": True, "was_current": was_current})
        return 0
    output.write_line(f"Firecracker {version} removed")
    if was_current:
        output.notice("none is current now: `banger firecracker install --version V` makes one")
    return 0


def _as_dict(found: Installed) -> dict[str, object]:
    return {
        "version": str(found.version),
        "current": found.current,
        "directory": str(found.directory),
    }


VERBS = {
    "install": (build_install, run_install),
    "list": (build_list, run_list),
    "remove": (build_remove, run_remove),
}
