"""`make bench-lab`: what Firecracker costs under banger, measured where there is KVM.

Runs on a host with a usable KVM and Firecracker, as root: in the lab, where all is emulated and
only the ratios mean anything. Prints the page that scripts/bench-lab.sh keeps.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import IPv4Address
from pathlib import Path

from banger.client import connection
from banger.guest import agent
from banger.guest.transport import HybridVsock
from banger.host.commands import HostCommands
from banger.network.bridge import BridgeNetwork
from banger.network.plan import parse_bridge
from banger.services.boot import BootFiles
from banger.store.database import Database
from banger.store.vms import VmRepository
from banger.vmm import firecracker, firecracker_api
from banger.vmm.base import VmSpec
from banger.vmm.probe import probe_kvm
from banger.vmm.select import choose_vmm
from benchmarks.table import Row, at_most, faster, render, shown_time, within
from tests.support.sandbox import Sandbox

IMAGE = "debian-bookworm-minimal"
MEMORY = 512 << 20
ROUNDS = 5
_READY_S = 300


async def spec_of(user: Sandbox, name: str) -> VmSpec:
    """Return what banger would boot the VM with, outside of any jail, its disk never used."""
    layout = user.layout
    database = Database(layout.database)
    await database.open()
    row = await VmRepository(database).find(name)
    await database.close()
    vm_files = layout.vm(row.id)
    vm_files.runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
    boot = BootFiles(layout, HostCommands())
    choice = choose_vmm("firecracker", probe_kvm(), "")
    spec = await boot.prepare(
        row,
        vm_files,
        choice,
        "ssh-ed25519 AA",
        guest_network=None,
        drives_by_serial=False,
        environment={},
    )
    spec = replace(spec, own_disk=vm_files.directory / "fresh.ext4", jail_uid=None)
    spec.own_disk.unlink(missing_ok=True)
    await boot.make_disk(spec.own_disk, row.disk_size_bytes)
    return spec


class _UnixConnection(http.client.HTTPConnection):
    """A connection to a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("firecracker")
        self._path = path

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


def bare_boot(user: Sandbox, name: str) -> float:
    """Boot with Firecracker alone and its API; return seconds to the agent's answer."""
    spec = asyncio.run(spec_of(user, name))
    sockets = spec.runtime
    for old in sockets.glob("*.sock"):
        old.unlink()
    calls = firecracker.configuration(spec, firecracker._place(spec, Path("/unused")))
    with open(spec.console_log, "ab") as console:
        begin = time.perf_counter()
        vmm = subprocess.Popen(
            ["firecracker", "--api-sock", str(sockets / "fc.sock")],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
        )
        while not (sockets / "fc.sock").is_socket():
            time.sleep(0.005)
        api = _UnixConnection(sockets / "fc.sock")
        for call in calls:
            api.request(
                call.method, call.path, json.dumps(call.body), {"Content-Type": "application/json"}
            )
            answer = api.getresponse()
            assert answer.status < 300, answer.read()
            answer.read()
        agent.wait_ready(
            HybridVsock(str(sockets / "v.sock")),
            timeout_s=_READY_S,
            cancelled=lambda: vmm.poll() is not None,
        )
        spent = time.perf_counter() - begin
    api.close()
    vmm.kill()
    vmm.wait()
    return spent


def start(user: Sandbox, name: str) -> float:
    """Start a VM through the daemon and return the seconds to the end of that operation."""
    socket_path = str(user.layout.api_socket)
    begin = time.perf_counter()
    answer = connection.send(socket_path, "POST", f"/v1/vms/{name}/start")
    events = list(connection.stream(socket_path, f"/v1/operations/{answer.body['id']}/events"))
    spent = time.perf_counter() - begin
    assert events[-1]["type"] == "result", events[-1]
    return spent


def start_row(user: Sandbox) -> Row:
    """Cold start against bare Firecracker, the jailer included on our side only."""
    options = ("--image", IMAGE, "--vcpu", "1", "--memory", str(MEMORY), "--network", "none")
    ours, peer = [], []
    user.ok("vm", "create", "--no-start", "--name", "bare", *options)
    for number in range(ROUNDS):
        name = f"cold-{number}"
        user.ok("vm", "create", "--no-start", "--name", name, *options)
        ours.append(start(user, name))
        user.ok("vm", "delete", name)
        peer.append(bare_boot(user, "bare"))
    return at_most(
        "cold start to the agent's first answer, jailed", statistics.median(ours),
        "bare Firecracker, same requests, kernel and disks", statistics.median(peer), 1.15,
    )  # fmt: skip


def _configure_once(spec: VmSpec) -> tuple[float, float]:
    """Return the seconds of our requests up to power on, and those of one that does nothing."""
    socket = spec.runtime / "fc.sock"
    for old in spec.runtime.glob("*.sock"):
        old.unlink()
    vmm = subprocess.Popen(
        ["firecracker", "--api-sock", str(socket)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not socket.is_socket():
            time.sleep(0.01)
        return asyncio.run(_configure(spec))
    finally:
        vmm.kill()
        vmm.wait()


async def _configure(spec: VmSpec) -> tuple[float, float]:
    files = firecracker._place(spec, Path("/usr/local/bin/firecracker"))
    calls = firecracker.configuration(spec, files)[:-1]
    async with firecracker_api.FirecrackerApi(spec.runtime / "fc.sock") as client:
        await client.call(firecracker_api.instance_info())
        begin = time.perf_counter()
        for call in calls:
            await client.call(call)
        middle = time.perf_counter()
        for _ in calls:
            await client.call(firecracker_api.instance_info())
        return middle - begin, time.perf_counter() - middle


def api_row(user: Sandbox) -> Row:
    """The time the API costs a VM, against as many requests that change nothing."""
    spec = asyncio.run(spec_of(user, "bare"))
    both = [_configure_once(spec) for _ in range(2 * ROUNDS)]
    ours, floor = (statistics.median(column) for column in zip(*both, strict=True))
    return Row(
        "API configuration of a VM, 7 requests", shown_time(ours),
        f"7 requests that change nothing: {shown_time(floor)}", f"{ours / floor:.2f}x", "(none)", None,
    )  # fmt: skip


def memory_row(user: Sandbox) -> Row:
    """What the VMM itself takes beside the guest's memory: upstream promises 5 MiB."""
    user.ok("vm", "start", "bare")
    pid = user.json("vm", "show", "bare")["pid"]
    overhead, size = 0, 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            first, last = (int(word, 16) for word in line.split()[0].split("-"))
            size = last - first
        elif line.startswith("Pss:") and size < MEMORY:
            overhead += int(line.split()[1]) << 10
    user.ok("vm", "delete", "bare")
    shown = f"{overhead / 2**20:.2f} MiB"
    return within("the VMM's memory beside the guest's", overhead, shown, 5 << 20, "<= 5 MiB")


def tap_row() -> Row:
    """A tap that waits in the pool against one made when it is needed."""

    async def take(pool_size: int, token: int) -> float:
        plan = parse_bridge("br-bangerbench", "10.98.0.1", "10.98.0.0/24")
        network = BridgeNetwork(HostCommands(), plan, pool_size=pool_size, tap_uid=0)
        await network.ensure()
        await network.fill()
        address = IPv4Address(f"10.98.0.{token + 2}")
        begin = time.perf_counter()
        tap = await network.take(
            f"{token:012x}", f"02:00:00:00:00:{token:02x}", address, uid=0, isolated=True
        )
        spent = time.perf_counter() - begin
        await network.give_back(tap)
        await network.close()
        for idle in await network.reconcile([]):
            print(idle, file=sys.stderr)
        return spent

    try:
        on_demand = [asyncio.run(take(0, number)) for number in range(ROUNDS)]
        pooled = [asyncio.run(take(2, number + 100)) for number in range(ROUNDS)]
    finally:
        subprocess.run(
            [sys.executable, "-I", "-m", "banger.network.helper", "bridge-down", "br-bangerbench"],
            stdout=subprocess.DEVNULL,
            check=True,
        )
    return faster(
        "a tap from the pool", statistics.median(pooled), "made on demand",
        statistics.median(on_demand), 1,
    )  # fmt: skip


def rows(user: Sandbox) -> Iterator[Row]:
    """Yield every row."""
    yield tap_row()
    yield start_row(user)
    yield api_row(user)
    yield memory_row(user)


def main() -> int:
    """Measure and print the page; 1 when a budget does not hold."""
    user = Sandbox(artifacts=False)
    user.layout.data.mkdir(parents=True, mode=0o700)
    subprocess.run(["cp", "-al", "/var/lib/banger-artifacts/.", str(user.layout.data)], check=True)
    config = user.home / ".config" / "banger"
    config.mkdir(parents=True)
    (config / "config.toml").write_text("[vm]\nboot_timeout_s = 300\n")
    found: list[Row] = []
    try:
        for row in rows(user):
            print(
                f"{row.what}: {row.ours} / {row.against}: {row.ratio}", file=sys.stderr, flush=True
            )
            found.append(row)
    finally:
        user.close()
    version = subprocess.run(
        ["firecracker", "--version"], capture_output=True, text=True, check=True
    ).stdout
    intro = [
        "Written by `make bench-lab`; do not edit. Measured in the lab, where processor and KVM are",
        "emulated: only ratios and bytes mean anything. Medians, ours and the peer in turns.",
    ]
    facts = [
        f"when: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"lab: {os.cpu_count()} CPUs, Linux {platform.release()}, {version.splitlines()[0]}",
        f"image: {IMAGE}, {MEMORY >> 20} MiB, 1 vCPU",
    ]
    print(render("Benchmarks: Firecracker", intro, facts, found), end="")
    return int(any(row.holds is False for row in found))


if __name__ == "__main__":
    sys.exit(main())
