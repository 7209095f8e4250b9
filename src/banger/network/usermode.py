"""The user network: passt for QEMU, pasta for Firecracker. Needs no root.

Owns their command lines and the addresses of that network, which are the same under both VMMs.
Outbound only: the gateway is not mapped to the host (`--no-map-gw`), and nothing listens. Published
ports are `guest.carrier`'s: Debian 12's passt leaves a connection from outside unacknowledged until
its client sends, so that a service which speaks first, as ssh's does, is never heard.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from banger.errors import CommandFailed, Unavailable, VmmFailed
from banger.host.commands import HostCommands

# QEMU's own user network has these, so guests and habits know them.
GUEST_ADDRESS = "10.0.2.15"
GUEST_PREFIX = 24
GATEWAY = "10.0.2.2"
NAME_SERVER = "10.0.2.3"
# The gateway's link address: locally administered, and no VM's (theirs are random).
_GATEWAY_MAC = "02:62:6e:67:00:02"

# It answers within 20 ms; a busy host has been seen to take seconds.
_START_TIMEOUT_S = 20.0
_INSTALL = "install it: `banger doctor --fix` (Debian package passt)"


def common_arguments() -> list[str]:
    """Return what passt and pasta are told alike."""
    return [
        "--quiet",
        "--ipv4-only",
        "--no-map-gw",
        *("--address", GUEST_ADDRESS),
        *("--netmask", str(GUEST_PREFIX)),
        *("--gateway", GATEWAY),
        *("--mac-addr", _GATEWAY_MAC),
        *("--dns-forward", NAME_SERVER),
        "--no-dhcp",
        *("--udp-ports", "none"),
        *("--tcp-ports", "none"),
    ]


def passt_arguments(fd: int) -> list[str]:
    """Return passt's command line for a VMM at the other end of the connected socket `fd`.

    It goes when the VMM closes its end, so nothing has to sweep it.
    """
    return ["passt", *common_arguments(), "--fd", str(fd)]


def pasta_arguments(pid: int, interface: str, mark: str, *, root: bool) -> list[str]:
    """Return pasta's command line for the namespaces of `pid`; it makes `interface` there.

    Older ones stay when the namespace is left, so `mark` makes it findable: as a search domain,
    which without DHCP nobody is told. With `root` the namespaces are root's.
    """
    return [
        "pasta",
        *common_arguments(),
        # Else it becomes nobody, who may not enter them.
        *(("--runas", "0:0") if root else ()),
        *("--ns-ifname", interface),
        # Towards the host the namespace gets nothing: no port of the host's loopback.
        *("--tcp-ns", "none"),
        *("--udp-ns", "none"),
        *("--search", mark),
        str(pid),
    ]


def check(commands: HostCommands) -> None:
    """Raise Unavailable when passt or pasta is not installed; one package holds both."""
    for program in ("passt", "pasta"):
        commands.need(program, hint=_INSTALL)


async def start_passt(commands: HostCommands, fd: int) -> None:
    """Start passt on `fd` and return once it serves; raises Unavailable and VmmFailed."""
    await _start(commands, passt_arguments(fd), pass_fds=(fd,))


async def start_pasta(
    commands: HostCommands,
    pid: int,
    interface: str,
    *,
    mark: str,
    prefix: Sequence[str] = (),
) -> None:
    """Join the namespaces of `pid` to the world and return once `interface` is there.

    `prefix` are the words that make it run as who made them; none when we made them.
    """
    root = not prefix and os.geteuid() == 0
    argv = pasta_arguments(pid, interface, mark, root=root)
    await _start(commands, argv, prefix=prefix)


async def _start(
    commands: HostCommands,
    argv: list[str],
    *,
    prefix: Sequence[str] = (),
    pass_fds: tuple[int, ...] = (),
) -> None:
    commands.need(argv[0], hint=_INSTALL)
    try:
        await commands.run([*prefix, *argv], timeout_s=_START_TIMEOUT_S, pass_fds=pass_fds)
    except Unavailable as error:
        why = error.stderr_tail if isinstance(error, CommandFailed) else error.message
        said = " / ".join(line for line in why.splitlines() if "syslog" not in line)[-300:]
        raise VmmFailed(
            f"{argv[0]} did not start: {said or 'it said nothing'}",
            hint="see `banger doctor`; `--network none` starts without a network",
        ) from error
