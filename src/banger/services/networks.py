"""How VMs are joined to the world: leases, taps, rules and published ports.

Owns the order of these steps around a VM's start and end. Leaves the host's interfaces and rules
to `network.bridge`, passt to the VMMs, and the rows to who calls.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address

from banger.errors import BangerError, Conflict, InvalidInput, VmmFailed, nearest
from banger.guest.boot import GuestNetwork
from banger.guest.carrier import start_beside
from banger.guest.transport import Endpoint, endpoint_to_wire
from banger.host.commands import HostCommands
from banger.host.process import ProcessIdentity, end_by_argument
from banger.network import usermode
from banger.network.bridge import BridgeNetwork
from banger.network.dns import NameAnswer
from banger.network.plan import Bridge, Port, allocate_address
from banger.network.publish import Forward, check_free, parse_publishes
from banger.store.vms import VmRow
from banger.types import NETWORK_MODES
from banger.vmm.base import NetworkSpec

log = logging.getLogger(__name__)

_USER_NETWORK = GuestNetwork(
    f"{usermode.GUEST_ADDRESS}/{usermode.GUEST_PREFIX}",
    gateway=usermode.GATEWAY,
    dns=(usermode.NAME_SERVER,),
)
_CARRIER_START_TIMEOUT_S = 20.0
_PORT_FREE_TIMEOUT_S = 2.0

Rows = Callable[[], Awaitable[list[VmRow]]]


@dataclass(frozen=True, slots=True)
class Joined:
    """A VM's place on a network: what its row says now, and what its VMM is told."""

    row: VmRow
    spec: NetworkSpec | None


class NetworkService:
    """Joins VMs to networks and takes them off again."""

    def __init__(
        self,
        commands: HostCommands,
        bridge: BridgeNetwork,
        plan: Bridge,
        rows: Rows,
        dns: Sequence[str],
    ) -> None:
        self._commands = commands
        self._bridge = bridge
        self._plan = plan
        self._rows = rows
        self._dns = tuple(dns)
        self._rules = asyncio.Lock()
        # Reaped when they have ended; after a restart of the daemon init does it.
        self._carriers: dict[int, subprocess.Popen[bytes]] = {}
        self._names_listen = ""
        self._telling: asyncio.Task[None] | None = None

    async def check(self, network: str) -> None:
        """Raise what stands against this network on this host, before anything is made."""
        if network == "bridge":
            await self._bridge.check()
        elif network == "user":
            usermode.check(self._commands)

    async def check_ports(self, row: VmRow) -> None:
        """Raise Conflict when a port that the VM is to publish is somebody else's now."""
        await asyncio.to_thread(check_free, forwards_of(row))

    def lease(self, row: VmRow, rows: Iterable[VmRow]) -> VmRow:
        """Return the row with an address where it needs one; raise Unavailable when none is left.

        A lease stays with its VM until the VM or its network changes. The caller holds the lock
        under which rows get addresses.
        """
        if row.network != "bridge":
            return replace(row, address=None)
        if row.address is not None and IPv4Address(row.address) in self._plan.network:
            return row
        taken = {IPv4Address(other.address) for other in rows if other.address and other != row}
        return replace(row, address=str(allocate_address(self._plan, taken)))

    def guest_network(self, row: VmRow) -> GuestNetwork | None:
        """Return what the guest's interface is set to."""
        if row.network == "none":
            return None
        if row.network == "user":
            return _USER_NETWORK._replace(dns=self._dns or _USER_NETWORK.dns)
        prefix = self._plan.network.prefixlen
        return GuestNetwork(
            f"{row.address}/{prefix}",
            gateway=str(self._plan.gateway),
            dns=self._dns or host_name_servers(),
        )

    async def join(self, row: VmRow, commit: Callable[[VmRow], Awaitable[VmRow]]) -> Joined:
        """Give a VM that is about to start its place on its network.

        The tap is named in the row before anything runs on it; rules are in force before the
        guest can send. `leave` undoes it, also after half of it.
        """
        await _wait_until_free(forwards_of(row))
        if row.network == "none":
            return Joined(row, None)
        if row.network == "user":
            return Joined(row, NetworkSpec(row.mac))
        assert row.address is not None
        await self._bridge.ensure()
        self._tell_names()
        tap = await self._bridge.take(
            row.id,
            row.mac,
            IPv4Address(row.address),
            uid=os.getuid() if row.jail_uid is None else row.jail_uid,
            isolated=row.isolated,
        )
        try:
            row = await commit(replace(row, tap=tap))
            await self._apply()
        except BaseException:
            await self._bridge.give_back(tap)
            raise
        return Joined(row, NetworkSpec(row.mac, tap=tap))

    async def publish(
        self, row: VmRow, process: ProcessIdentity, endpoint: Endpoint, mark: str
    ) -> None:
        """Open the published ports of a VM that has just started.

        On the bridge they lead to its address, else through its agent. Raises VmmFailed when
        the carrier does not start.
        """
        forwards = forwards_of(row)
        if not forwards:
            return
        to = ["--endpoint", json.dumps(endpoint_to_wire(endpoint))]
        if row.network == "bridge" and row.address is not None:
            to = ["--address", row.address]
        argv = [
            *(sys.executable, "-I", "-m", "banger.guest.carrier"),
            *("--mark", mark),
            *("--pid", str(process.pid)),
            *to,
            *(str(forward) for forward in forwards),
        ]
        carrier, said = await asyncio.to_thread(start_beside, argv, _CARRIER_START_TIMEOUT_S)
        if carrier is None:
            raise VmmFailed(f"the ports of {row.name} could not be published: {said}")
        self._carriers[carrier.pid] = carrier

    async def leave(self, row: VmRow, mark: str) -> None:
        """Take a VM that has ended off its network; idempotent."""
        if row.publish:
            await end_by_argument(mark)
            for pid in [pid for pid, child in self._carriers.items() if child.poll() is not None]:
                del self._carriers[pid]
        if row.tap is None:
            return
        try:
            await self._bridge.give_back(row.tap)
            await self._apply(without=row.id)
        except BangerError as error:
            # The VM has ended all the same; reconcile removes the tap when the helper answers.
            log.warning("%s: its tap stays for now: %s", row.name, error.message)

    async def reconcile(self) -> None:
        """After a restart of the daemon or the host: make interfaces and rows agree."""
        if not any(row.network == "bridge" for row in await self._rows()):
            return
        try:
            async with self._rules:
                for removed in await self._bridge.reconcile(await self._ports("")):
                    log.warning("removed %s, which no VM owns", removed)
        except BangerError as error:
            log.warning("the bridge could not be set up: %s", error.message)

    async def find_name(self, name: str) -> NameAnswer:
        """Answer for `<name>.vm`."""
        for row in await self._rows():
            if row.name == name:
                address = None if row.address is None else IPv4Address(row.address)
                return NameAnswer(exists=True, address=address)
        return NameAnswer(exists=False, address=None)

    async def register_names(self, listen: str) -> None:
        """Have the host's resolver ask `listen` for `.vm`, as soon as there is a bridge."""
        self._names_listen = listen
        if any(row.network == "bridge" for row in await self._rows()):
            self._tell_names()

    def _tell_names(self) -> None:
        """Tell the resolver, once; the start of a VM does not wait for it."""
        if self._names_listen and self._telling is None:
            self._telling = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        try:
            known = await self._bridge.register_names(self._names_listen)
            log.info("names are %s", "known to systemd-resolved" if known else "answered only")
        except BangerError as error:
            log.warning("systemd-resolved was not told of the names: %s", error.message)
            self._telling = None

    async def close(self) -> None:
        """End background work; bridge, taps and carriers stay."""
        if self._telling is not None:
            self._telling.cancel()
        await self._bridge.close()

    async def _apply(self, *, without: str = "") -> None:
        # One at a time, and the rows read inside: the last to write knows of all before it.
        async with self._rules:
            await self._bridge.apply(await self._ports(without))

    async def _ports(self, without: str) -> list[Port]:
        return [
            Port(
                vm_id=row.id,
                tap=row.tap,
                mac=row.mac,
                address=IPv4Address(row.address),
                nat=row.nat,
                isolated=row.isolated,
            )
            for row in await self._rows()
            if row.tap is not None and row.address is not None and row.id != without
        ]


async def _wait_until_free(forwards: tuple[Forward, ...]) -> None:
    """Return when the ports can be listened on; raise Conflict when somebody keeps one.

    Who carried them for this VM before a restart ends a moment after its VMM.
    """
    deadline = asyncio.get_running_loop().time() + _PORT_FREE_TIMEOUT_S
    while True:
        try:
            return await asyncio.to_thread(check_free, forwards)
        except Conflict:
            if asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(0.05)


def forwards_of(row: VmRow) -> tuple[Forward, ...]:
    """Return the published ports on record."""
    return parse_publishes(row.publish.split())


def publish_text(texts: Iterable[str]) -> str:
    """Return `--publish` values as a row keeps them; raise InvalidInput for a bad one."""
    return " ".join(str(forward) for forward in parse_publishes(texts))


def check_network(network: str) -> str:
    """Return a known network mode; raise InvalidInput."""
    if network not in NETWORK_MODES:
        close = nearest(network, list(NETWORK_MODES))
        raise InvalidInput(
            f"no network mode is named {network!r}",
            hint=f"did you mean {close}?" if close else f"choose one of {', '.join(NETWORK_MODES)}",
        )
    return network


def host_name_servers() -> tuple[str, ...]:
    """Return the host's name servers that a guest can ask: not those on its loopback.

    systemd-resolved keeps the servers behind its stub in a file of its own
    (systemd-resolved.service(8)).
    """
    for path in ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                words = [line.split() for line in file]
        except OSError:
            continue
        found = [w[1] for w in words if len(w) > 1 and w[0] == "nameserver"]
        usable = [server for server in found if _is_outside(server)]
        if usable:
            return tuple(usable[:3])  # MAXNS of resolv.conf(5)
    return ()


def _is_outside(server: str) -> bool:
    try:
        return not IPv4Address(server).is_loopback
    except ValueError:
        return False  # the bridge is IPv4 only
