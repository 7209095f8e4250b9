"""Images and kernels: the same four verbs over two kinds of artifact."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from banger.cli import output
from banger.cli.context import Context
from banger.cli.parsing import Parser, add_json, add_quiet
from banger.cli.progress import Progress, follow
from banger.errors import BangerError


def _kind(parser: Parser) -> str:
    """Tell which noun a parser was made for: `banger image pull` -> image."""
    return parser.prog.split()[1]


def _remember_kind(parser: Parser) -> str:
    kind = _kind(parser)
    parser.set_defaults(kind=kind)
    return kind


def _calls(context: Context, kind: str) -> dict[str, Callable[..., Any]]:
    client = context.client
    if kind == "image":
        return {
            "list": client.list_images,
            "get": client.get_image,
            "pull": client.pull_image,
            "delete": client.delete_image,
        }
    return {
        "list": client.list_kernels,
        "get": client.get_kernel,
        "pull": client.pull_kernel,
        "delete": client.delete_kernel,
    }


def build_list(parser: Parser) -> None:
    """Arguments of `image list` and `kernel list`."""
    kind = _remember_kind(parser)
    parser.description = f"List installed {kind}s, and those the catalog could make."
    parser.add_argument("-q", "--quiet", action="store_true", help="names of installed ones only")
    add_json(parser)


def run_list(context: Context, args: argparse.Namespace) -> int:
    """List artifacts."""
    found = _calls(context, args.kind)["list"]()
    if context.json:
        output.write_json(found)
        return 0
    if args.quiet:
        for entry in found:
            if entry["installed"]:
                output.write_line(entry["name"])
        return 0
    header = ["NAME", "INSTALLED", "ON DISK", "USED BY", "DESCRIPTION"]
    if args.kind == "kernel":
        header.insert(1, "RELEASE")
    rows = []
    for entry in found:
        row = [
            entry["name"],
            "yes" if entry["installed"] else "no",
            output.format_bytes(entry["disk_bytes"]) if entry["installed"] else "-",
            str(len(entry["used_by"])) if entry["used_by"] else "-",
            entry["description"],
        ]
        if args.kind == "kernel":
            row.insert(1, entry["release"] or "-")
        rows.append(row)
    output.write_table(header, rows, right=("ON DISK", "USED BY"))
    return 0


def build_show(parser: Parser) -> None:
    """Arguments of `image show` and `kernel show`."""
    kind = _remember_kind(parser)
    parser.description = f"Show everything about a {kind}."
    parser.add_argument("name", metavar="NAME")
    add_json(parser)


def run_show(context: Context, args: argparse.Namespace) -> int:
    """Show an artifact."""
    entry = _calls(context, args.kind)["get"](args.name)
    if context.json:
        output.write_json(entry)
        return 0
    fields = [("name", entry["name"]), ("installed", "yes" if entry["installed"] else "no")]
    if entry.get("release"):
        fields.append(("release", entry["release"]))
    fields.append(("description", entry["description"]))
    if entry["installed"]:
        fields += [
            ("digest", entry["digest"]),
            ("size", output.format_bytes(entry["size_bytes"])),
            ("on disk", output.format_bytes(entry["disk_bytes"])),
            ("created", entry["created_at"]),
            ("used by", ", ".join(entry["used_by"]) or "nobody"),
        ]
    fields.append(("origin", entry["origin"]))
    output.write_fields(fields)
    return 0


def build_pull(parser: Parser) -> None:
    """Arguments of `image pull` and `kernel pull`."""
    kind = _remember_kind(parser)
    parser.description = f"Make a {kind} from its catalog entry. An installed one is left alone."
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("-f", "--force", action="store_true", help="make it anew")
    add_quiet(parser)
    add_json(parser)


def run_pull(context: Context, args: argparse.Namespace) -> int:
    """Pull an artifact."""
    with Progress(quiet=args.quiet) as progress:
        operation = _calls(context, args.kind)["pull"](args.name, {"force": args.force})
        entry = follow(context.client, operation, progress)
    if context.json:
        output.write_json(entry)
    else:
        output.write_line(entry["name"])
    return 0


def build_delete(parser: Parser) -> None:
    """Arguments of `image delete` and `kernel rm`."""
    kind = _remember_kind(parser)
    parser.description = f"Delete {kind}s that no VM uses."
    parser.add_argument("names", nargs="+", metavar="NAME")
    add_json(parser)


def run_delete(context: Context, args: argparse.Namespace) -> int:
    """Delete artifacts; report each, 125 when any failed."""
    delete = _calls(context, args.kind)["delete"]
    results: list[dict[str, Any]] = []
    failed = False
    for name in dict.fromkeys(args.names):
        try:
            delete(name)
        except BangerError as error:
            failed = True
            results.append({"name": name, "ok": False, **output.error_body(error)})
            if not context.json:
                output.write_error(error, name if name not in error.message else "")
        else:
            results.append({"name": name, "ok": True, "result": {"ok": True}})
            if not context.json:
                output.write_line(f"{name} deleted")
    if context.json:
        output.write_json(results)
    return 125 if failed else 0


VERBS = {
    "list": (build_list, run_list),
    "show": (build_show, run_show),
    "pull": (build_pull, run_pull),
    "delete": (build_delete, run_delete),
    "rm": (build_delete, run_delete),
}
