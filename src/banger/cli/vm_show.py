"""Looking at VMs: list, show, stats, ports."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from banger.cli import output
from banger.cli.context import Context, endpoint_of
from banger.cli.parsing import Parser, add_json
from banger.errors import BangerError

if TYPE_CHECKING:
    from banger.api.models import Vm, VmStats


def elapsed_since(timestamp: str | None) -> float:
    """Return the seconds since an RFC 3339 time in UTC; 0 when it is None or unreadable.

    By hand: datetime, strptime and calendar are 5 ms that every `vm list` would pay.
    """
    text = timestamp or ""
    try:
        year, month, day = int(text[0:4]), int(text[5:7]), int(text[8:10])
        hour, minute, second = int(text[11:13]), int(text[14:16]), int(text[17:19])
    except ValueError:
        return 0.0
    # Days since 1970 in the proleptic Gregorian calendar, years beginning in March.
    year -= month < 3
    day_of_year = (153 * ((month + 9) % 12) + 2) // 5 + day - 1
    days = 365 * year + year // 4 - year // 100 + year // 400 + day_of_year - 719468
    return max(0.0, time.time() - (days * 86400 + hour * 3600 + minute * 60 + second))


def uptime(vm: Vm) -> str:
    """Return how long a VM has run, or a dash."""
    if vm["state"] != "running" or not vm["started_at"]:
        return "-"
    return output.format_duration(elapsed_since(vm["started_at"]))


# -- list


def build_list(parser: Parser) -> None:
    """Arguments of `vm list`."""
    parser.description = "List VMs. ISOLATION tells what runs them: kvm, or tcg (emulated)."
    parser.add_argument("-q", "--quiet", action="store_true", help="names only")
    add_json(parser)
    parser.examples(
        ("banger vm list", "a table of every VM"),
        ("banger vm list -q", "names only, one per line"),
        ("banger vm list --json | jq '.[].name'", "for scripts"),
    )


def run_list(context: Context, args: argparse.Namespace) -> int:
    """List VMs."""
    vms = context.client.list_vms()
    if context.json:
        output.write_json(vms)
    elif args.quiet:
        for vm in vms:
            output.write_line(vm["name"])
    elif not vms:
        output.notice("no VMs yet; `banger vm run` makes one")
    else:
        header = (
            *("NAME", "STATE", "ISOLATION", "IMAGE", "NETWORK"),
            *("VCPU", "MEMORY", "DISK", "UPTIME"),
        )
        rows = [
            (
                vm["name"],
                vm["state"],
                vm["accel"],
                vm["image"],
                vm["address"] or vm["network"],
                str(vm["vcpu"]),
                output.format_bytes(vm["memory_bytes"]),
                output.format_bytes(vm["disk_used_bytes"]),
                uptime(vm),
            )
            for vm in vms
        ]
        output.write_table(header, rows, right=("VCPU", "MEMORY", "DISK"))
    return 0


# -- show


def build_show(parser: Parser) -> None:
    """Arguments of `vm show`."""
    parser.description = "Show everything about VMs."
    parser.add_argument("names", nargs="+", metavar="NAME")
    add_json(parser)


def run_show(context: Context, args: argparse.Namespace) -> int:
    """Show VMs."""
    vms = [context.client.get_vm(name) for name in args.names]
    if context.json:
        output.write_json(vms[0] if len(vms) == 1 else vms)
        return 0
    for number, vm in enumerate(vms):
        if number:
            output.write_line()
        output.write_fields(_fields(vm))
    return 0


def _fields(vm: Vm) -> list[tuple[str, str]]:
    reason = f" ({vm['state_reason']})" if vm["state_reason"] else ""
    isolation = vm["accel"] + (f" ({vm['accel_reason']})" if vm["accel_reason"] else "")
    used = output.format_bytes(vm["disk_used_bytes"])
    fields = [
        ("name", vm["name"]),
        ("id", vm["id"]),
        ("state", vm["state"] + reason),
        ("uptime", uptime(vm)),
        ("isolation", isolation),
        ("vmm", vm["vmm"] + (f", pid {vm['pid']}" if vm["pid"] else "")),
        ("image", vm["image"]),
        ("kernel", vm["kernel"]),
        ("vcpu", str(vm["vcpu"])),
        ("memory", output.format_bytes(vm["memory_bytes"])),
        ("disk", f"{output.format_bytes(vm['disk_size_bytes'])}, {used} in use on the host"),
        ("network", _network(vm)),
        *([("published", " ".join(vm["publish"]))] if vm["publish"] else []),
        ("files", _files(vm)),
        ("created", vm["created_at"]),
        ("directory", vm["directory"]),
        ("console", vm["console_log"]),
        ("vmm log", vm["vmm_log"]),
    ]
    if vm["ephemeral"]:
        fields.insert(4, ("ephemeral", "deleted when its command line ends"))
    return fields


def _files(vm: Vm) -> str:
    if vm["synced_files"]:
        return " ".join(vm["synced_files"])
    return "none of yours" if vm["credentials"] else "none of yours, by --no-credentials"


def _network(vm: Vm) -> str:
    if vm["network"] != "bridge":
        return vm["network"]
    nat = "nat" if vm["nat"] else "no nat"
    isolated = "isolated" if vm["isolated"] else "open to other open VMs"
    return f"bridge, {vm['address']} ({vm['dns_name']}), {nat}, {isolated}"


# -- stats


def build_stats(parser: Parser) -> None:
    """Arguments of `vm stats`."""
    parser.description = "Show what VMs cost the host (CPU, memory, disk) and the guest's own view."
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: every running VM")
    parser.add_argument(
        "-w", "--watch", action="store_true", help="again every two seconds, until Ctrl-C"
    )
    add_json(parser)


def run_stats(context: Context, args: argparse.Namespace) -> int:
    """Show statistics once, or again and again."""
    before: dict[str, tuple[float, float]] = {}
    while True:
        rows = _collect(context, args.names)
        if args.watch and output.is_terminal(sys.stdout) and not context.json:
            sys.stdout.write("\x1b[H\x1b[J")
        _show_stats(context, rows, before)
        if not args.watch:
            return 0
        sys.stdout.flush()
        time.sleep(2.0)


def _collect(context: Context, names: list[str]) -> list[tuple[VmStats, dict[str, Any] | None]]:
    chosen = names or [vm["name"] for vm in context.client.list_vms() if vm["state"] == "running"]
    return [(context.client.vm_stats(name), _guest_stats(context, name)) for name in chosen]


def _guest_stats(context: Context, name: str) -> dict[str, Any] | None:
    """Ask the agent; a guest that does not answer has no own view, and that is no failure."""
    from banger.guest import agent

    try:
        return agent.stats(endpoint_of(context.client.connect_vm(name)))
    except (BangerError, OSError):
        return None


def _show_stats(
    context: Context,
    rows: list[tuple[VmStats, dict[str, Any] | None]],
    before: dict[str, tuple[float, float]],
) -> None:
    if context.json:
        output.write_json([{**host, "guest": guest} for host, guest in rows])
        return
    now = time.monotonic()
    cells = []
    for host, guest in rows:
        name = host["name"]
        previous = before.get(name)
        if previous is not None and now > previous[0]:
            share = (host["cpu_seconds"] - previous[1]) / (now - previous[0])
        else:
            share = host["cpu_seconds"] / host["uptime_s"] if host["uptime_s"] else 0.0
        before[name] = (now, host["cpu_seconds"])
        cells.append(
            (
                name,
                host["state"],
                f"{100 * share:.0f}%",
                f"{host['cpu_seconds']:.1f}s",
                output.format_bytes(host["memory_bytes"]),
                _guest_memory(guest),
                output.format_bytes(host["disk_used_bytes"]),
                _guest_load(guest),
                output.format_duration(host["uptime_s"]),
            )
        )
    header = (
        "NAME", "STATE", "CPU", "CPU TIME", "MEMORY", "GUEST MEMORY", "DISK", "LOAD", "UPTIME",
    )  # fmt: skip
    output.write_table(header, cells, right=header[2:])


def _guest_memory(guest: dict[str, Any] | None) -> str:
    memory = guest.get("memory") if guest else None
    try:
        total, available = int(memory["total"]), int(memory["available"])  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        return "-"  # a guest may answer anything
    return f"{output.format_bytes(total - available)} of {output.format_bytes(total)}"


def _guest_load(guest: dict[str, Any] | None) -> str:
    load = guest.get("load") if guest else None
    if isinstance(load, list) and load and isinstance(load[0], int | float):
        return f"{load[0]:.2f}"
    return "-"


# -- ports


def build_ports(parser: Parser) -> None:
    """Arguments of `vm ports`."""
    parser.description = "List the ports that listen inside a running VM."
    parser.add_argument("name", metavar="NAME")
    add_json(parser)


def run_ports(context: Context, args: argparse.Namespace) -> int:
    """List a guest's listening ports."""
    from banger.cli.vm_ssh import connect_running
    from banger.guest import agent

    rows = agent.listening_ports(endpoint_of(connect_running(context, args.name)))
    if context.json:
        output.write_json(rows)
    elif not rows:
        output.notice(f"nothing listens in {args.name}")
    else:
        cells = [
            tuple(str(row.get(key) or "-") for key in ("port", "proto", "address", "pid", "comm"))
            for row in rows
        ]
        header = ("PORT", "PROTO", "ADDRESS", "PID", "PROCESS")
        output.write_table(header, cells, right=("PORT", "PID"))
    return 0


VERBS = {
    "list": (build_list, run_list),
    "show": (build_show, run_show),
    "stats": (build_stats, run_stats),
    "ports": (build_ports, run_ports),
}
