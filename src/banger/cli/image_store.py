"""`image register`, `export`, `delete` and `catalog`."""

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
from banger.errors import UsageError

if TYPE_CHECKING:
    from banger.api.models import ImageDelete, ImageRegister
    from banger.services.catalogs import CatalogReport, Finding

_CHUNK_BYTES = 1 << 20


def build_register(parser: Parser) -> None:
    """Arguments of `image register`."""
    parser.description = (
        "Make an image of an ext4 file system in a file, copied or linked. It must be clean and\n"
        "not mounted; root is not needed. VMs never write to it: each has a disk of its own.\n"
        "With --link the file stays where it is and must not change: a VM does not start from\n"
        "one that did. An initrd is not needed and not used; banger boots every kernel with its\n"
        "agent's own."
    )
    parser.add_argument("--name", required=True, metavar="NAME", help="what the image is called")
    parser.add_argument("--rootfs", required=True, metavar="FILE", help="the ext4")
    parser.add_argument("--link", action="store_true", help="do not copy it")
    parser.add_argument("--description", metavar="TEXT", help="a line for `image list`")
    kernels = parser.add_argument_group("the kernel of its VMs (default: the one of the config)")
    kernels.add_argument("--kernel-ref", metavar="NAME", help="one of `banger kernel list`")
    kernels.add_argument(
        "--kernel", metavar="FILE", dest="kernel_file", help="a vmlinux or bzImage"
    )
    kernels.add_argument("--modules", metavar="DIR", help="its modules, as /lib/modules/RELEASE")
    kernels.add_argument("--initrd", metavar="FILE", help="taken for compatibility, not used")
    parser.add_argument("-f", "--force", action="store_true", help="replace an installed image")
    add_quiet(parser)
    add_json(parser)
    parser.examples(
        ("banger image register --name base --rootfs ./rootfs.ext4", ""),
        (
            "banger image register --name base --rootfs ./rootfs.ext4 --kernel-ref generic-6.12",
            "with the kernel its VMs get",
        ),
        ("banger image register --name big --rootfs /srv/big.ext4 --link", "without a copy"),
    )


def run_register(context: Context, args: argparse.Namespace) -> int:
    """Register an image."""
    request: ImageRegister = {
        "name": args.name,
        "rootfs": os.path.abspath(args.rootfs),
        "link": args.link,
        "force": args.force,
    }
    for field, value in (
        ("kernel_ref", args.kernel_ref),
        ("description", args.description),
        ("kernel", args.kernel_file and os.path.abspath(args.kernel_file)),
        ("modules", args.modules and os.path.abspath(args.modules)),
        ("initrd", args.initrd and os.path.abspath(args.initrd)),
    ):
        if value:
            request[field] = value  # type: ignore[literal-required]  # a field of ImageRegister
    with Progress(quiet=args.quiet) as progress:
        entry = follow(context.client, context.client.register_image(request), progress)
    if context.json:
        output.write_json(entry)
    else:
        output.write_line(entry["name"])
    return 0


def build_export(parser: Parser) -> None:
    """Arguments of `image export`."""
    parser.description = (
        "Write an installed image to one file, a bundle, and print the file's sha256.\n"
        "Equal images give equal files. `banger image pull bundle:FILE` takes it elsewhere;\n"
        "docs/image-catalog.md tells how to publish one."
    )
    parser.add_argument("name", metavar="NAME")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="such as base.tar.zst; - is stdout, with the sha256 on stderr",
    )
    parser.add_argument("-f", "--force", action="store_true", help="replace an existing file")
    add_quiet(parser)
    add_json(parser)
    parser.examples(
        ("banger image export base -o base.tar.zst", ""),
        ("banger image export base -o - | ssh host 'cat > base.tar.zst'", ""),
    )


def run_export(context: Context, args: argparse.Namespace) -> int:
    """Export an image."""
    if args.output == "-":
        return _export_to_stdout(context, args)
    path = os.path.abspath(args.output)
    found = _export(context, args, path, force=args.force)
    if context.json:
        output.write_json(found)
    else:
        # As sha256sum prints it, so that `sha256sum -c` takes it.
        output.write_line(f"{found['sha256']}  {args.output}")
    return 0


def _export(context: Context, args: argparse.Namespace, path: str, *, force: bool) -> Any:
    with Progress(quiet=args.quiet) as progress:
        operation = context.client.export_image(args.name, {"path": path, "force": force})
        return follow(context.client, operation, progress)


def _export_to_stdout(context: Context, args: argparse.Namespace) -> int:
    if output.is_terminal(sys.stdout):
        raise UsageError("a bundle is nothing for a terminal", hint="-o FILE.tar.zst, or a pipe")
    import tempfile

    os.makedirs(context.paths.cache_dir, mode=0o700, exist_ok=True)
    # Beside the store: /tmp may be memory, and a bundle is large.
    with tempfile.TemporaryDirectory(prefix="export-", dir=context.paths.cache_dir) as directory:
        found = _export(context, args, os.path.join(directory, "bundle.tar.zst"), force=False)
        with open(found["path"], "rb") as file:
            while piece := file.read(_CHUNK_BYTES):
                sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    if context.json:
        output.write_json_line({**found, "path": "-"}, sys.stderr)
    elif not args.quiet:
        output.notice(f"sha256 {found['sha256']}")
    return 0


def build_delete(parser: Parser) -> None:
    """Arguments of `image delete`."""
    parser.description = (
        "Delete images that no VM uses. --force deletes one although stopped VMs are made of it:\n"
        "these keep their disks, but do not start until the same image is back (pulled, imported\n"
        "or registered under its name). One that a running VM uses stays in any case."
    )
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument(
        "-f", "--force", action="store_true", help="also when stopped VMs are made of it"
    )
    add_json(parser)


def run_delete(context: Context, args: argparse.Namespace) -> int:
    """Delete images; report each, 125 when any failed."""
    delete = context.client.delete_image
    request: ImageDelete | None = {"force": True} if args.force else None
    return delete_each(context, args.names, lambda name: delete(name, request))


def build_catalog(parser: Parser) -> None:
    """Arguments of `image catalog`."""
    parser.description = (
        "`list` shows what `banger image pull` makes by name, and from which catalog.\n"
        "`check` reads a catalog as banger would and names all that is wrong with it; without\n"
        "FILE those of the configuration. It needs no daemon, and exits with 1 on problems."
    )
    parser.usage = (
        "banger image catalog list [--json]\n"
        "       banger image catalog check [--offline] [--json] [FILE-or-URL ...]"
    )
    parser.add_argument("action", choices=("list", "check"), metavar="list|check")
    parser.add_argument("locations", nargs="*", metavar="FILE-or-URL", help="catalogs to check")
    parser.add_argument(
        "--offline", action="store_true", help="check: do not ask whether bundles are there"
    )
    add_json(parser)
    parser.examples(
        ("banger image catalog list", ""),
        ("banger image catalog check ./images.toml", "before it is published"),
        ("banger image catalog check https://images.example/images.toml", "and after"),
    )


def run_catalog(context: Context, args: argparse.Namespace) -> int:
    """List or check catalogs."""
    if args.action == "check":
        return _check(context, args)
    if args.locations or args.offline:
        raise UsageError("`image catalog list` takes no FILE", hint="`check` does")
    found = context.client.image_catalog()
    if context.json:
        output.write_json(found)
        return 0
    rows = [
        [
            entry["name"],
            entry["kind"],
            entry["catalog"],
            "yes" if entry["pinned"] else "-",
            entry["description"],
        ]
        for entry in found["entries"]
    ]
    output.write_table(["NAME", "KIND", "CATALOG", "PINNED", "DESCRIPTION"], rows)
    for warning in found["warnings"]:
        output.warn(warning)
    return 0


def _check(context: Context, args: argparse.Namespace) -> int:
    from banger.services.catalogs import check_builtin, check_catalog

    if args.locations:
        reports = [check_catalog(one, online=not args.offline) for one in args.locations]
    else:
        from banger.config import load_config

        configured = load_config(context.paths.config_dir).catalogs
        reports = [
            check_builtin(),
            *(
                check_catalog(os.path.expanduser(one), online=not args.offline)
                for one in configured
            ),
        ]
    if context.json:
        output.write_json([_as_dict(report) for report in reports])
    else:
        for report in reports:
            for finding in report.findings:
                _tell(finding)
            images = "1 image" if len(report.names) == 1 else f"{len(report.names)} images"
            output.write_line(f"{report.location}: {'ok' if report.ok else 'wrong'}, {images}")
    return 0 if all(report.ok for report in reports) else 1


def _tell(finding: Finding) -> None:
    at = f"{finding.where}:{finding.line}" if finding.line else finding.where
    key = f"{finding.key}: " if finding.key else ""
    hint = f" ({finding.hint})" if finding.hint else ""
    note = "" if finding.is_problem else "note: "
    output.write_line(f"{at}: {note}{key}{finding.message}{hint}")


def _as_dict(report: CatalogReport) -> dict[str, Any]:
    return {
        "location": report.location,
        "ok": report.ok,
        "names": list(report.names),
        "findings": [
            {
                "line": finding.line,
                "key": finding.key,
                "message": finding.message,
                "hint": finding.hint,
                "problem": finding.is_problem,
            }
            for finding in report.findings
        ],
    }


VERBS = {
    "register": (build_register, run_register),
    "export": (build_export, run_export),
    "delete": (build_delete, run_delete),
    "catalog": (build_catalog, run_catalog),
}
