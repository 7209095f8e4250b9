"""Making, starting, stopping, changing and deleting VMs, one or several at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from banger.cli import output
from banger.cli.context import Context
from banger.cli.parsing import (
    CREATION_FIELDS,
    NETWORK_FIELDS,
    Parser,
    add_creation,
    add_json,
    add_network,
    add_quiet,
)
from banger.cli.progress import Progress, cancel, follow
from banger.errors import BangerError, InvalidInput, UsageError

if TYPE_CHECKING:
    from banger.api.models import Operation, StopRequest, VmCreate, VmSet


# -- create


def creation_request(args: argparse.Namespace) -> VmCreate:
    """Turn the creation options given into a request; raise InvalidInput for a bad value."""
    request: dict[str, Any] = {}
    for field in CREATION_FIELDS:
        value = getattr(args, field)
        if value is None:
            continue
        if field == "vcpu":
            request["vcpu"] = parse_count(value, "--vcpu")
        elif field in ("memory", "disk_size"):
            option = "--" + field.replace("_", "-")
            request[f"{field}_bytes"] = parse_bytes(value, option)
        elif field == "name":
            from banger.types import check_vm_name

            check_vm_name(value)
            request["name"] = value
        elif field == "image" and ":" in value:
            from banger.cli.images import absolute_source

            request["image"] = absolute_source(value)
        else:
            request[field] = value
    return cast("VmCreate", request)


def parse_count(text: str, option: str) -> int:
    """Parse a number of virtual CPUs; the daemon knows which are possible."""
    try:
        return int(text)
    except ValueError:
        raise InvalidInput(
            f"{option} must be a whole number, not {text!r}", hint=f"for example {option} 2"
        ) from None


def parse_bytes(text: str, option: str) -> int:
    """Parse a size such as 4G or 512M; the daemon knows which are possible."""
    from banger.types import parse_size

    try:
        return parse_size(text)
    except BangerError as error:
        raise InvalidInput(f"{option}: {error.message}", hint=error.hint) from error


def build_create(parser: Parser) -> None:
    """Arguments of `vm create`."""
    parser.description = "Make a VM and start it, without entering it. Prints its name."
    add_creation(parser)
    parser.add_argument("--no-start", action="store_true", help="leave it stopped")
    add_quiet(parser)
    add_json(parser)
    parser.examples(
        ("banger vm create --name build --vcpu 4 --memory 8G", "make and start it"),
        ("banger vm create --no-start", "make it only"),
    )


def run_create(context: Context, args: argparse.Namespace) -> int:
    """Make a VM."""
    request = creation_request(args)
    request["start"] = not args.no_start
    with Progress(quiet=args.quiet, json_lines=False) as progress:
        vm = follow(context.client, context.client.create_vm(request), progress)
    if context.json:
        output.write_json(vm)
        return 0
    output.write_line(vm["name"])
    if not args.quiet and output.is_terminal(sys.stdout):
        verb = "start" if args.no_start else "ssh"
        output.notice(f"enter it with `banger vm {verb} {vm['name']}`")
    return 0


# -- several at once


def _build_many(parser: Parser, description: str, all_help: str, verb: str) -> None:
    parser.description = description
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("-a", "--all", action="store_true", help=all_help)
    add_quiet(parser)
    add_json(parser)
    parser.examples(
        (f"banger vm {verb} one two", "both at the same time"),
        (f"banger vm {verb} --all", all_help),
    )


def _chosen(context: Context, args: argparse.Namespace, states: tuple[str, ...]) -> list[str]:
    """Return the names given, once each, or those of every VM in one of `states`."""
    if args.all and args.names:
        raise UsageError("give names or --all, not both", hint="banger vm list")
    if args.all:
        return [
            vm["name"] for vm in context.client.list_vms() if not states or vm["state"] in states
        ]
    if not args.names:
        raise UsageError("no VM named", hint="give one or more names, or --all")
    return list(dict.fromkeys(args.names))


def run_many(
    context: Context,
    names: list[str],
    begin: Callable[[str], Operation],
    *,
    past: str,
    quiet: bool,
) -> int:
    """Begin one operation per name, follow them all, report each; 125 when any failed.

    They run side by side in the daemon: every one is begun before the first is followed.
    """
    results: list[dict[str, Any]] = []
    begun: list[tuple[str, Operation]] = []
    failed = False
    with Progress(quiet=quiet) as progress:

        def report(name: str, result: Any = None, error: BangerError | None = None) -> None:
            nonlocal failed
            failed = failed or error is not None
            if context.json:
                body = output.error_body(error) if error is not None else {"result": result}
                results.append({"name": name, "ok": error is None, **body})
                return
            progress.close()
            if error is not None:
                output.write_error(error, name if name not in error.message else "")
            elif not quiet:
                output.write_line(f"{name} {past}")

        for name in names:
            try:
                begun.append((name, begin(name)))
            except BangerError as error:
                report(name, error=error)
        left = list(begun)
        try:
            for name, operation in begun:
                try:
                    result = context.client.wait(operation, progress.handle)
                except BangerError as error:
                    report(name, error=error)
                else:
                    report(name, result)
                left.pop(0)
        except KeyboardInterrupt:
            cancel(context.client, [operation for _, operation in left], progress)
            raise
    if context.json:
        output.write_json(results)
    return 125 if failed else 0


def build_start(parser: Parser) -> None:
    """Arguments of `vm start`."""
    _build_many(
        parser, "Start stopped VMs and wait until they answer.", "every stopped VM", "start"
    )


def run_start(context: Context, args: argparse.Namespace) -> int:
    """Start VMs."""
    names = _chosen(context, args, ("stopped",))
    return run_many(context, names, context.client.start_vm, past="started", quiet=args.quiet)


def _add_stop_timeout(parser: Parser) -> None:
    parser.add_argument(
        "--timeout", metavar="SECONDS", help="how long a guest may take before it is killed"
    )


def _stop_request(args: argparse.Namespace) -> StopRequest:
    return {} if args.timeout is None else {"timeout_s": parse_seconds(args.timeout)}


def parse_seconds(text: str) -> float:
    """Parse a positive number of seconds (`90`, `1.5`, also `2m`, `1h`)."""
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:], 0)
    try:
        seconds = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise InvalidInput(
            f"--timeout must be a number of seconds above 0, not {text!r}",
            hint="for example --timeout 90, or --timeout 5m",
        )
    return seconds


def build_stop(parser: Parser) -> None:
    """Arguments of `vm stop`."""
    _build_many(parser, "Shut VMs down; their disks stay.", "every running VM", "stop")
    _add_stop_timeout(parser)


def run_stop(context: Context, args: argparse.Namespace) -> int:
    """Stop VMs."""
    request = _stop_request(args)
    names = _chosen(context, args, ("running", "starting"))
    return run_many(
        context,
        names,
        lambda name: context.client.stop_vm(name, request),
        past="stopped",
        quiet=args.quiet,
    )


def build_restart(parser: Parser) -> None:
    """Arguments of `vm restart`."""
    _build_many(parser, "Stop VMs and start them again.", "every running VM", "restart")
    _add_stop_timeout(parser)


def run_restart(context: Context, args: argparse.Namespace) -> int:
    """Restart VMs."""
    request = _stop_request(args)
    names = _chosen(context, args, ("running",))
    return run_many(
        context,
        names,
        lambda name: context.client.restart_vm(name, request),
        past="restarted",
        quiet=args.quiet,
    )


def build_kill(parser: Parser) -> None:
    """Arguments of `vm kill`."""
    _build_many(
        parser, "End VMs at once; what was not written is lost.", "every running VM", "kill"
    )


def run_kill(context: Context, args: argparse.Namespace) -> int:
    """Kill VMs."""
    names = _chosen(context, args, ("running", "starting", "stopping"))
    return run_many(context, names, context.client.kill_vm, past="killed", quiet=args.quiet)


def build_delete(parser: Parser) -> None:
    """Arguments of `vm delete`."""
    _build_many(
        parser,
        "Delete VMs and their disks, killing those that run. There is no way back.",
        "every VM, running ones too (asks first)",
        "delete",
    )
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask (with --all)")
    parser.add_argument("-f", "--force", action="store_true", help=argparse.SUPPRESS)


def run_delete(context: Context, args: argparse.Namespace) -> int:
    """Delete VMs."""
    names = _chosen(context, args, ())
    if args.all and names and not (args.yes or args.force):
        ask_first(f"delete {len(names)} VM(s): {', '.join(names)}?")
    return run_many(context, names, context.client.delete_vm, past="deleted", quiet=args.quiet)


def ask_first(question: str) -> None:
    """Ask before something is lost; raise when the answer is no, or nobody is there to ask."""
    if not (output.is_terminal(sys.stdin) and output.is_terminal(sys.stderr)):
        raise InvalidInput(
            "this deletes without a way back, and nobody is here to ask", hint="add --yes"
        )
    if not output.confirm(question):
        raise InvalidInput("nothing was deleted", hint="")


# -- prune


def build_prune(parser: Parser) -> None:
    """Arguments of `vm prune`."""
    parser.description = "Delete every stopped VM, and say how much room that freed."
    parser.add_argument("-a", "--all", action="store_true", help="running VMs too")
    parser.add_argument("-n", "--dry-run", action="store_true", help="only name them")
    parser.add_argument("-y", "--yes", "-f", "--force", action="store_true", help="do not ask")
    add_quiet(parser)
    add_json(parser)


def run_prune(context: Context, args: argparse.Namespace) -> int:
    """Delete stopped VMs."""
    client = context.client
    with Progress(quiet=args.quiet or context.json) as progress:
        if args.dry_run or not args.yes:
            preview = follow(client, client.prune_vms({"dry_run": True, "all": args.all}), progress)
            names = preview["vms"]
            if args.dry_run or not names:
                progress.close()
                return _show_pruned(context, preview, done=not args.dry_run)
            progress.close()
            ask_first(f"delete {len(names)} VM(s): {', '.join(names)}?")
        pruned = follow(client, client.prune_vms({"dry_run": False, "all": args.all}), progress)
    return _show_pruned(context, pruned, done=True)


def _show_pruned(context: Context, pruned: Any, *, done: bool) -> int:
    if context.json:
        output.write_json(pruned)
        return 0
    for name in pruned["vms"]:
        output.write_line(name)
    if not pruned["vms"]:
        output.notice("nothing to delete")
    else:
        room = output.format_bytes(pruned["freed_bytes"])
        output.notice(f"freed {room}" if done else f"would free {room}")
    return 0


# -- set


def build_set(parser: Parser) -> None:
    """Arguments of `vm set`."""
    parser.description = (
        "Rename a VM at any time; resize it while it is stopped. A disk only grows."
    )
    parser.add_argument("vm", metavar="NAME")
    parser.add_argument("--name", metavar="NEW", help="its new name")
    parser.add_argument("--vcpu", metavar="N", help="virtual CPUs")
    parser.add_argument("--memory", metavar="SIZE", help="memory, such as 4G")
    parser.add_argument("--disk-size", metavar="SIZE", help="its own disk, such as 40G")
    add_network(parser)
    add_json(parser)
    parser.examples(
        ("banger vm set build --memory 8G", "takes effect at its next start"),
        ("banger vm set web -p 8080:80 -p 8443:443", "these ports, in place of those before"),
        ("banger vm set web -p none", "none"),
    )


def run_set(context: Context, args: argparse.Namespace) -> int:
    """Change a VM."""
    request: dict[str, Any] = {}
    if args.name is not None:
        from banger.types import check_vm_name

        check_vm_name(args.name)
        request["name"] = args.name
    if args.vcpu is not None:
        request["vcpu"] = parse_count(args.vcpu, "--vcpu")
    if args.memory is not None:
        request["memory_bytes"] = parse_bytes(args.memory, "--memory")
    if args.disk_size is not None:
        request["disk_size_bytes"] = parse_bytes(args.disk_size, "--disk-size")
    for field in NETWORK_FIELDS:
        if getattr(args, field) is not None:
            request[field] = getattr(args, field)
    if request.get("publish") == ["none"]:
        request["publish"] = []
    if not request:
        raise UsageError("nothing to change", hint="`banger vm set --help` lists what can be set")
    vm = context.client.set_vm(args.vm, cast("VmSet", request))
    if context.json:
        output.write_json(vm)
    else:
        output.write_line(f"{vm['name']} changed")
    return 0


VERBS = {
    "create": (build_create, run_create),
    "start": (build_start, run_start),
    "stop": (build_stop, run_stop),
    "restart": (build_restart, run_restart),
    "kill": (build_kill, run_kill),
    "delete": (build_delete, run_delete),
    "prune": (build_prune, run_prune),
    "set": (build_set, run_set),
}
