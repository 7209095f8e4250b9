"""Images: what is installed, and pulling more; `cli.image_store` has the rest."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from banger.cli import output
from banger.cli.context import Context
from banger.cli.parsing import Parser, add_json, add_quiet
from banger.cli.progress import Progress, follow
from banger.errors import InvalidInput

if TYPE_CHECKING:
    from banger.api.models import Image, ImagePull

# Transports whose rest begins with a path. `bundle:` may hold a URL as well.
_PATHS = ("oci:", "oci-archive:", "docker-archive:", "rootfs:", "bundle:")
_STDIN = "docker-archive:-"


# -- list and show


def build_list(parser: Parser) -> None:
    """Arguments of `image list`."""
    parser.description = "List installed images, and those the catalog could make."
    parser.add_argument("-q", "--quiet", action="store_true", help="names of installed ones only")
    add_json(parser)


def run_list(context: Context, args: argparse.Namespace) -> int:
    """List images."""
    found = context.client.list_images()
    if context.json:
        output.write_json(found)
        return 0
    if args.quiet:
        for entry in found:
            if entry["installed"]:
                output.write_line(entry["name"])
        return 0
    rows = [
        [
            entry["name"],
            "yes" if entry["installed"] else "no",
            output.format_bytes(entry["disk_bytes"]) if entry["installed"] else "-",
            str(len(entry["used_by"])) if entry["used_by"] else "-",
            entry["description"],
        ]
        for entry in found
    ]
    header = ["NAME", "INSTALLED", "ON DISK", "USED BY", "DESCRIPTION"]
    output.write_table(header, rows, right=("ON DISK", "USED BY"))
    return 0


def build_show(parser: Parser) -> None:
    """Arguments of `image show`."""
    parser.description = "Show everything about an image."
    parser.add_argument("name", metavar="NAME")
    add_json(parser)


def run_show(context: Context, args: argparse.Namespace) -> int:
    """Show an image."""
    entry = context.client.get_image(args.name)
    if context.json:
        output.write_json(entry)
        return 0
    fields = [
        ("name", entry["name"]),
        ("installed", "yes" if entry["installed"] else "no"),
        ("description", entry["description"]),
    ]
    if entry["installed"]:
        fields += [
            ("digest", entry["digest"]),
            ("size", output.format_bytes(entry["size_bytes"])),
            ("on disk", output.format_bytes(entry["disk_bytes"])),
            ("created", entry["created_at"]),
            ("used by", ", ".join(entry["used_by"]) or "nobody"),
        ]
    fields.append(("origin", entry["origin"]))
    fields += _said(entry)
    output.write_fields(fields)
    return 0


def _said(entry: Image) -> list[tuple[str, str]]:
    """Return what an imported image says of itself, as far as it does."""
    env = " ".join(f"{name}={value}" for name, value in sorted(entry["env"].items()))
    fields = [
        ("platform", entry["platform"]),
        ("kernel", entry["kernel"]),
        ("entrypoint", _words(entry["entrypoint"])),
        ("command", _words(entry["command"])),
        ("user", entry["user"] if entry["user"] != "root" else ""),
        ("working dir", entry["working_dir"]),
        ("environment", env),
    ]
    return [(name, value) for name, value in fields if value]


def _words(words: list[str]) -> str:
    import shlex

    return shlex.join(words)


# -- pull


def build_pull(parser: Parser) -> None:
    """Arguments of `image pull`."""
    parser.usage = "banger image pull SOURCE [OPTIONS]"
    parser.description = (
        "Make an image that VMs boot from. SOURCE is one of\n"
        "  NAME                        an entry of the catalog (banger image catalog list)\n"
        "  HOST/REPOSITORY:TAG         an image of a registry; alpine:3.20 is Docker Hub's\n"
        "  oci:DIR[:TAG]               an OCI image layout; oci-archive:FILE[:TAG] a tar of one\n"
        "  docker-archive:FILE|-       what `docker save` wrote, from a file or from stdin\n"
        "  rootfs:TAR|DIR              a root file system\n"
        "  bundle:FILE|URL             what `banger image export` wrote\n"
        "An image that is installed from the same source is left alone. Private registries:\n"
        "what `docker login`, `podman login` or a credential helper left is used."
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--name", metavar="N", help="what to call it (default: from the source)")
    parser.add_argument(
        "--kernel-ref", metavar="K", help="the kernel of its VMs (default: the default one)"
    )
    parser.add_argument(
        "--platform", metavar="OS/ARCH", help="of an image for several (default: this host's)"
    )
    parser.add_argument(
        "--size", metavar="SIZE", help="of its file system, as 2G (default: what its files need)"
    )
    parser.add_argument("-f", "--force", action="store_true", help="make it anew")
    add_quiet(parser)
    add_json(parser)
    parser.examples(
        ("banger image pull alpine:3.20", "Docker Hub's, as the image alpine-3.20"),
        ("banger image pull ghcr.io/owner/app:v1 --name app", "under a name of your own"),
        ("docker save app | banger image pull docker-archive:-", "what Docker built here"),
        ("banger vm run --image alpine-3.20", "boot it"),
    )


def run_pull(context: Context, args: argparse.Namespace) -> int:
    """Pull an image."""
    request: ImagePull = {"source": absolute_source(args.source), "force": args.force}
    if args.name:
        request["name"] = args.name
    if args.kernel_ref:
        request["kernel"] = args.kernel_ref
    if args.platform:
        request["platform"] = args.platform
    if args.size:
        from banger.types import parse_size

        request["size_bytes"] = parse_size(args.size)
    with Progress(quiet=args.quiet) as progress, _spooled(request, context, progress):
        entry = follow(context.client, context.client.pull_image(request), progress)
    if context.json:
        output.write_json(entry)
    else:
        output.write_line(entry["name"])
    return 0


def absolute_source(text: str) -> str:
    """Return a source with its path made absolute: the daemon has a directory of its own."""
    for transport in _PATHS:
        rest = text.removeprefix(transport)
        if rest == text or not rest or "://" in rest or text == _STDIN or rest.startswith(_STDIN):
            continue
        # `~` is the shell's business, and it leaves it alone behind a colon.
        return transport + os.path.join(os.getcwd(), os.path.expanduser(rest))
    return text


@contextlib.contextmanager
def _spooled(request: ImagePull, context: Context, progress: Progress) -> Iterator[None]:
    """Stdin as a file, for `docker-archive:-`: an archive is read from its end."""
    source = request["source"]
    if source != _STDIN and not source.startswith(f"{_STDIN}:"):
        yield
        return
    if output.is_terminal(sys.stdin):
        raise InvalidInput(
            "docker-archive:- reads an archive from stdin, which is a terminal",
            hint="docker save IMAGE | banger image pull docker-archive:-",
        )
    from banger.cli.spool import spooled

    with spooled(context.paths) as (fd, path):
        progress.stage("reading the archive from stdin")
        done = 0
        while chunk := os.read(0, 1 << 20):
            view = memoryview(chunk)
            while view:
                view = view[os.write(fd, view) :]
            done += len(chunk)
            progress.progress(done)
        name = source.removeprefix(_STDIN)
        request["source"] = f"docker-archive:{path}{name}"
        yield


# -- the cache of downloads


def build_cache(parser: Parser) -> None:
    """Arguments of `image cache`."""
    parser.usage = "banger image cache list|prune [OPTIONS]"
    parser.description = (
        "The layers that pulls downloaded, kept for the next one (blob_cache_size in the\n"
        "configuration bounds them). Installed images need none of them."
    )
    parser.add_argument("action", choices=("list", "prune"), metavar="list|prune")
    parser.add_argument(
        "-a", "--all", action="store_true", help="prune everything, not only what is over the limit"
    )
    add_json(parser)


def run_cache(context: Context, args: argparse.Namespace) -> int:
    """List or prune kept downloads."""
    if args.action == "prune":
        pruned = context.client.prune_blobs({"all": args.all})
        if context.json:
            output.write_json(pruned)
        else:
            output.write_line(f"{output.format_bytes(pruned['freed_bytes'])} freed")
        return 0
    blobs: list[Any] = list(context.client.list_blobs())
    if context.json:
        output.write_json(blobs)
        return 0
    rows = [
        [
            blob["digest"].partition(":")[2][:12],
            output.format_bytes(blob["size_bytes"]),
            "partial" if blob["partial"] else "in use" if blob["in_use"] else "whole",
            blob["used_at"],
        ]
        for blob in blobs
    ]
    output.write_table(["DIGEST", "SIZE", "STATE", "LAST USED"], rows, right=("SIZE",))
    output.notice(f"{output.format_bytes(sum(blob['size_bytes'] for blob in blobs))} in all")
    return 0


VERBS = {
    "list": (build_list, run_list),
    "show": (build_show, run_show),
    "pull": (build_pull, run_pull),
    "cache": (build_cache, run_cache),
}
