"""Kernels: what is installed, where they come from, what they can do."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from banger.cli import output
from banger.cli.context import Context
from banger.cli.deletion import delete_each
from banger.cli.parsing import Parser, add_json, add_quiet
from banger.cli.progress import Progress, follow
from banger.errors import BangerError

if TYPE_CHECKING:
    from banger.api.models import KernelCheck, KernelImport

EXIT_LACKING = 1


# -- list


def build_list(parser: Parser) -> None:
    """Arguments of `kernel list`."""
    parser.description = "List installed kernels. JSON always has the catalog's too."
    parser.add_argument("-q", "--quiet", action="store_true", help="names only")
    parser.add_argument(
        "-a", "--available", action="store_true", help="also those the catalog could make"
    )
    add_json(parser)
    parser.examples(
        ("banger kernel list", "what is installed"),
        ("banger kernel list --available", "and what `kernel pull` takes"),
    )


def run_list(context: Context, args: argparse.Namespace) -> int:
    """List kernels."""
    found = context.client.list_kernels()
    if context.json:
        output.write_json(found)
        return 0
    shown = [entry for entry in found if entry["installed"] or args.available]
    if args.quiet:
        for entry in shown:
            output.write_line(entry["name"])
        return 0
    if not shown:
        output.notice(
            "no kernel is installed: the first VM takes one, `banger kernel list --available` "
            "shows which there are"
        )
        return 0
    rows = [
        [
            entry["name"],
            entry["release"] or "-",
            "yes" if entry["installed"] else "no",
            output.format_bytes(entry["disk_bytes"]) if entry["installed"] else "-",
            str(len(entry["used_by"])) if entry["used_by"] else "-",
            entry["description"],
        ]
        for entry in shown
    ]
    header = ["NAME", "RELEASE", "INSTALLED", "ON DISK", "USED BY", "DESCRIPTION"]
    output.write_table(header, rows, right=("ON DISK", "USED BY"))
    return 0


# -- show


def build_show(parser: Parser) -> None:
    """Arguments of `kernel show`."""
    parser.description = "Show everything about a kernel."
    parser.add_argument("name", metavar="NAME")
    parser.add_argument(
        "--config", dest="whole_config", action="store_true", help="print its build configuration"
    )
    add_json(parser)
    parser.examples(
        ("banger kernel show generic-6.12", ""),
        ("banger kernel show generic-6.12 --config | grep VSOCK", "one option of it"),
    )


def run_show(context: Context, args: argparse.Namespace) -> int:
    """Show a kernel."""
    if args.whole_config:
        return _show_config(context, args.name)
    entry = context.client.get_kernel(args.name)
    check: KernelCheck | None = None
    if entry["installed"]:
        try:
            check = context.client.check_kernel(args.name)
        except BangerError as error:  # damaged: what is known of it is shown all the same
            output.warn(error.message)
    if context.json:
        output.write_json({**entry, "check": check})
        return 0
    fields = [("name", entry["name"]), ("installed", "yes" if entry["installed"] else "no")]
    if entry["release"]:
        fields.append(("release", entry["release"]))
    fields.append(("description", entry["description"]))
    if entry["installed"]:
        users = [*entry["used_by"], *(f"image {image}" for image in _image_users(entry))]
        fields += [
            ("digest", entry["digest"]),
            ("size", output.format_bytes(entry["size_bytes"])),
            ("on disk", output.format_bytes(entry["disk_bytes"])),
            ("created", entry["created_at"]),
            ("used by", ", ".join(users) or "nobody"),
        ]
    fields.append(("origin", entry["origin"]))
    if check is not None:
        fields += [
            (label, " ".join(f["option"] for f in check["features"] if f["state"] == state) or "-")
            for label, state in (
                ("built in", "built in"),
                ("as modules", "module"),
                ("missing", "missing"),
            )
        ]
    output.write_fields(fields)
    return 0


def _image_users(entry: Any) -> list[str]:
    found: list[str] = entry.get("used_by_images", [])
    return found


def _show_config(context: Context, name: str) -> int:
    found = context.client.kernel_config(name)
    if context.json:
        output.write_json(found)
        return 0
    if not found["config"].strip():
        output.notice(f"the configuration of {name} is not known")
        return EXIT_LACKING
    for line in found["config"].splitlines():
        output.write_line(line)
    return 0


# -- pull, import, rm


def build_pull(parser: Parser) -> None:
    """Arguments of `kernel pull`."""
    parser.description = "Make a kernel from its catalog entry. An installed one is left alone."
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("-f", "--force", action="store_true", help="make it anew")
    add_quiet(parser)
    add_json(parser)
    parser.examples(
        ("banger kernel pull generic-6.12", "Debian 13's"),
        ("banger kernel pull generic-6.1", "Debian 12's, for hosts whose QEMU is older than 10"),
    )


def run_pull(context: Context, args: argparse.Namespace) -> int:
    """Pull a kernel."""
    with Progress(quiet=args.quiet) as progress:
        operation = context.client.pull_kernel(args.name, {"force": args.force})
        entry = follow(context.client, operation, progress)
    return _made(context, entry)


def build_import(parser: Parser) -> None:
    """Arguments of `kernel import`."""
    parser.description = (
        "Make a kernel of files on this host: a vmlinux, bzImage or vmlinuz, its modules\n"
        "(lib/modules/RELEASE) and its configuration. They are looked for in a directory;\n"
        "links in it are not followed."
    )
    parser.add_argument("name", metavar="NAME")
    parser.add_argument(
        "--from", dest="directory", metavar="DIR", required=True, help="where the kernel is"
    )
    parser.add_argument(
        "--kernel",
        "--vmlinux",
        dest="kernel_file",
        metavar="FILE",
        help="its image: an ELF, or a bzImage of any compression",
    )
    parser.add_argument(
        "--modules", dest="modules_dir", metavar="DIR", help="its modules: lib/modules/RELEASE"
    )
    parser.add_argument(
        "--config", dest="config_file", metavar="FILE", help="its configuration (the .config)"
    )
    parser.add_argument(
        "-f",
        "--force",
        action="store_true",
        help="take it though it lacks what a machine needs, and replace one of that name",
    )
    add_quiet(parser)
    add_json(parser)
    parser.examples(
        ("banger kernel import mine --from ./linux", "a build tree with its lib/modules"),
        ("banger kernel import host --from /", "this host's own, of /boot and /lib/modules"),
        ("banger kernel import mine --from . --kernel arch/x86/boot/bzImage", ""),
    )


def run_import(context: Context, args: argparse.Namespace) -> int:
    """Import a kernel."""
    # The daemon has another working directory.
    request: KernelImport = {"directory": os.path.abspath(args.directory)}
    if args.kernel_file is not None:
        request["kernel"] = os.path.abspath(args.kernel_file)
    if args.modules_dir is not None:
        request["modules"] = os.path.abspath(args.modules_dir)
    if args.config_file is not None:
        request["config"] = os.path.abspath(args.config_file)
    if args.force:
        request["force"] = True
    with Progress(quiet=args.quiet) as progress:
        operation = context.client.import_kernel(args.name, request)
        entry = follow(context.client, operation, progress)
    return _made(context, entry)


def _made(context: Context, entry: Any) -> int:
    if context.json:
        output.write_json(entry)
    else:
        output.write_line(entry["name"])
    return 0


def build_rm(parser: Parser) -> None:
    """Arguments of `kernel rm`."""
    parser.description = "Delete kernels that no VM and no image uses."
    parser.add_argument("names", nargs="+", metavar="NAME")
    add_json(parser)


def run_rm(context: Context, args: argparse.Namespace) -> int:
    """Delete kernels; report each, 125 when any failed."""
    return delete_each(context, args.names, context.client.delete_kernel)


# -- check


def build_check(parser: Parser) -> None:
    """Arguments of `kernel check`."""
    parser.description = (
        "Compare a kernel with what a machine, its VMM and Docker need of it.\n"
        "A module counts when its file is there. Exits with 1 when something required is missing."
    )
    parser.add_argument("name", metavar="NAME")
    add_json(parser)


def run_check(context: Context, args: argparse.Namespace) -> int:
    """Check a kernel."""
    found = context.client.check_kernel(args.name)
    status = 0 if found["ok"] else EXIT_LACKING
    if context.json:
        output.write_json(found)
        return status
    rows = [
        [
            feature["group"],
            feature["option"],
            feature["need"],
            feature["state"],
            feature["note"] or feature["why"],
        ]
        for feature in found["features"]
    ]
    output.write_table(["FOR", "OPTION", "NEED", "STATE", "WHAT FOR"], rows)
    sys.stdout.flush()  # before what goes to stderr
    if not found["config_known"]:
        output.warn("its configuration is not known: what is built in counts as missing")
    missing = [f["option"] for f in found["features"] if _lacks(f, "required")]
    wished = [f["option"] for f in found["features"] if _lacks(f, "recommended")]
    if missing:
        output.notice(f"{args.name} lacks what is required: {' '.join(missing)}")
    else:
        output.notice(f"{args.name} has all that is required")
    if wished:
        output.notice(f"recommended, and missing: {' '.join(wished)}")
    return status


def _lacks(feature: Any, need: str) -> bool:
    lacks: bool = feature["state"] == "missing" and feature["need"] == need
    return lacks


VERBS = {
    "list": (build_list, run_list),
    "show": (build_show, run_show),
    "pull": (build_pull, run_pull),
    "import": (build_import, run_import),
    "check": (build_check, run_check),
    "rm": (build_rm, run_rm),
}
