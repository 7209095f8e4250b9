"""`make bench`: every row compares banger with a peer or a limit in one run.

Writes docs/benchmarks.md. Seconds differ between machines and hours; a ratio of two things
measured in turns on one machine is what a budget can hold on to.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from banger.catalog import image_entry
from banger.client import connection
from banger.events import NullSink
from banger.guest import agent, transport
from banger.guest.boot import GuestNetwork
from banger.host.commands import HostCommands
from banger.host.files import allocated_bytes
from banger.images.debian import write_debian_tar
from banger.network import usermode
from banger.services.artifact_sources import ImageSource
from banger.services.boot import BootFiles
from banger.store.database import Database
from banger.store.vms import VmRepository
from banger.vmm.base import NetworkSpec
from banger.vmm.probe import probe_kvm
from banger.vmm.qemu import Qemu
from banger.vmm.select import VmmChoice, choose_vmm
from benchmarks.imports import import_rows
from benchmarks.sessions import session_rows
from benchmarks.table import Row, at_most, faster, in_turns, render, shown_time, timed, within
from benchmarks.workspace import FILES, make_repository, sync_rows
from tests.support.artifacts import cache_root, need_image, need_kernel
from tests.support.sandbox import Sandbox

ROOT = Path(__file__).parents[1]
IMAGE = "debian-bookworm"


def cli_rows(user: Sandbox) -> Iterator[Row]:
    """Start of the command line against a bare interpreter."""

    def run(*argv: str) -> Callable[[], object]:
        return lambda: subprocess.run(argv, env=user.environment, check=True, capture_output=True)

    bare = run(sys.executable, "-c", "pass")
    script = shutil.which("banger", path=user.environment["PATH"])
    if script is None:
        raise SystemExit("banger is not in this environment: make venv")
    user.ok("vm", "list")
    for words, limit in ((("version",), 3.0), (("vm", "list"), 5.0)):
        ours, peer = in_turns(run(script, *words), bare, 30)
        yield at_most(f"`banger {' '.join(words)}`", ours, "`python3 -c pass`", peer, limit)


def create_rows(user: Sandbox) -> Iterator[Row]:
    """A VM without start: daemon time and disk."""
    socket_path = str(user.layout.api_socket)

    def create(name: str) -> None:
        request = {"name": name, "image": IMAGE}
        answer = connection.send(socket_path, "POST", "/v1/vms", request)
        events = list(connection.stream(socket_path, f"/v1/operations/{answer.body['id']}/events"))
        assert events[-1]["type"] == "result", events[-1]

    create("warm-up")  # makes the disk template, once per size
    spent = statistics.median(timed(lambda n=n: create(f"bench-{n}")) for n in range(7))  # type: ignore[misc]
    yield within(
        "VM create without start, asked and answered", spent, shown_time(spent), 0.050, "<= 50 ms"
    )
    used = allocated_bytes(Path(user.json("vm", "show", "bench-0")["directory"]))
    shown = f"{used / 2**20:.2f} MiB"
    yield within("its disk and boot files", used, shown, 2 << 20, "<= 2 MiB")
    user.ok("vm", "delete", "warm-up", *(f"bench-{n}" for n in range(7)))


class BareVm:
    """The VMM as banger starts it, without banger around it: the peer of a cold run."""

    def __init__(self, user: Sandbox) -> None:
        self.user = user
        self.qemu = Qemu(HostCommands())
        user.ok("vm", "create", "--no-start", "--name", "bare", "--image", IMAGE)

    def boot(self) -> float:
        """Boot to the agent's first answer and return the seconds from the VMM's start on."""
        return asyncio.run(self._boot())

    async def _boot(self) -> float:
        layout = self.user.layout
        database = Database(layout.database)
        await database.open()
        row = await VmRepository(database).find("bare")
        await database.close()
        vm_files = layout.vm(row.id)
        vm_files.runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
        boot = BootFiles(layout, HostCommands())
        spec = await boot.prepare(
            row,
            vm_files,
            _choice(),
            "ssh-ed25519 AA",
            guest_network=GuestNetwork(
                f"{usermode.GUEST_ADDRESS}/{usermode.GUEST_PREFIX}",
                usermode.GATEWAY,
                (usermode.NAME_SERVER,),
            ),
            drives_by_serial=True,
            environment={},
        )
        # A disk that was never booted, as the cold run has.
        fresh = replace(
            spec, own_disk=vm_files.directory / "fresh.ext4", network=NetworkSpec(row.mac)
        )
        fresh.own_disk.unlink(missing_ok=True)
        await boot.make_disk(fresh.own_disk, row.disk_size_bytes)
        begin = time.perf_counter()
        process = await self.qemu.start(fresh)
        endpoint = self.qemu.endpoint(fresh.runtime)
        await asyncio.to_thread(
            agent.wait_ready, endpoint, timeout_s=300, cancelled=lambda: not process.alive()
        )
        spent = time.perf_counter() - begin
        await self.qemu.kill(process)
        return spent


def cold_rows(user: Sandbox, rounds: int) -> Iterator[Row]:
    """A cold `vm run -- true` against the bare VMM with the same kernel, initramfs and disks."""
    bare = BareVm(user)
    ours, peer = [], []
    for number in range(rounds):
        name = f"cold-{number}"
        ours.append(timed(lambda: user.ok("vm", "run", "--name", name, "--", "true")))  # noqa: B023
        user.ok("vm", "delete", name)
        peer.append(bare.boot())
    user.ok("vm", "delete", "bare")
    yield at_most(
        "cold `banger vm run -- true`", statistics.median(ours),
        "bare QEMU to the agent's first answer", statistics.median(peer), 1.15,
    )  # fmt: skip


def exec_rows(user: Sandbox) -> Iterator[Row]:
    """Exec of `true`, whole processes on both sides, and the floor of the transport."""
    user.ok("ssh-config", "--install")
    config = user.home / ".ssh" / "config"
    ssh = ["ssh", "-F", str(config), "-o", "BatchMode=yes", "bench.vm", "true"]
    user.ok("vm", "ssh", "bench", "--", "true")
    endpoint = _endpoint(user, "bench")

    def over_ssh() -> None:
        subprocess.run(ssh, env=user.environment, check=True, capture_output=True)

    def over_agent() -> None:
        agent.capture_exec(endpoint, [b"true"], timeout_s=60)

    ours, peer = in_turns(over_agent, over_ssh, 7)
    yield faster("exec of `true` over the agent", ours, "`ssh bench.vm true`", peer, 10)
    whole, peer = in_turns(lambda: user.ok("vm", "exec", "bench", "--", "true"), over_ssh, 7)
    text = "whole `banger vm exec bench -- true`, interpreter included"
    yield replace(faster(text, whole, "`ssh bench.vm true`", peer, 1), budget="(none)", holds=None)
    floor = statistics.median(timed(lambda: agent.stats(endpoint)) for _ in range(20))
    text = "its floor: one request and answer, no process"
    yield Row(
        text, shown_time(floor), f"exec: {shown_time(ours)}", f"{ours / floor:.1f}x", "(none)", None
    )


def workspace_rows(user: Sandbox) -> Iterator[Row]:
    """10,000 files in, by one tar stream of ours and by tar over ssh into the same VM."""
    repo = make_repository(user.root / "many")
    config = user.home / ".ssh" / "config"

    from banger.services import workspace_sync, workspaces

    endpoint = _endpoint(user, "bench")

    def ours() -> None:
        found = workspaces.open_workspace(str(repo))
        agent.put_tar(endpoint, b"/root/many", workspace_sync.iter_copy(found))

    def peer() -> None:
        line = (
            f"tar -C {shlex.quote(str(repo.parent))} -c many | "
            f"ssh -F {shlex.quote(str(config))} -o BatchMode=yes bench.vm 'tar -C /root -x'"
        )
        subprocess.run(["bash", "-o", "pipefail", "-c", line], env=user.environment, check=True)

    def clean() -> None:
        user.ok("vm", "exec", "bench", "--", "rm", "-rf", "/root/many")

    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        for step, seconds in zip((ours, peer), spent, strict=True):
            clean()
            seconds.append(timed(step))
    yield at_most(
        f"workspace of {FILES} files in", statistics.median(spent[0]),
        "`tar c` into `ssh tar x`", statistics.median(spent[1]), 1.0,
    )  # fmt: skip


def memory_row(user: Sandbox) -> Row:
    """The daemon's resident memory."""
    pid = user.daemon_pid()
    status = Path(f"/proc/{pid}/status").read_text()
    rss = next(int(line.split()[1]) << 10 for line in status.splitlines() if "VmRSS" in line)
    return within("daemon's resident memory", rss, f"{rss / 2**20:.1f} MiB", 80 << 20, "<= 80 MiB")


def build_row() -> Row:
    """The image built by banger against the bare mmdebstrap of the same entry to a tar."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=cache_root()) as name:
        work = Path(name)
        commands = HostCommands()
        source = ImageSource(work / "data", cache_root() / "cache", commands, None)

        def ours() -> None:
            asyncio.run(source.pull(IMAGE, NullSink(), force=True))

        async def bare() -> None:
            with open(work / "bare.tar", "wb") as tar:
                await write_debian_tar(
                    image_entry(IMAGE), tar.fileno(), commands=commands, sink=NullSink(),
                    mirror=None, work=work, cache_dir=cache_root() / "cache",
                )  # fmt: skip

        ours()  # both with the packages already downloaded
        spent = in_turns(ours, lambda: asyncio.run(bare()), 1)
    return at_most(f"image {IMAGE} built", spent[0], "mmdebstrap to a tar", spent[1], 1.25)


def _endpoint(user: Sandbox, name: str) -> transport.Endpoint:
    answer = connection.send(str(user.layout.api_socket), "GET", f"/v1/vms/{name}/connection")
    return transport.endpoint_from_wire(answer.body["endpoint"])


def rows(user: Sandbox, rounds: int, *, build: bool) -> Iterator[Row]:
    """Yield every row, cheapest first."""
    yield from cli_rows(user)
    yield from create_rows(user)
    yield from cold_rows(user, rounds)
    user.ok("vm", "create", "--name", "bench", "--image", IMAGE)
    yield from exec_rows(user)
    yield from workspace_rows(user)
    yield from sync_rows(_endpoint(user, "bench"), user.root / "many")
    config = str(user.home / ".ssh" / "config")
    ssh = ["ssh", "-F", config, "-o", "BatchMode=yes", "bench.vm"]
    yield from session_rows(user, _endpoint(user, "bench"), ssh)
    yield memory_row(user)
    user.ok("vm", "delete", "bench")
    if build:
        yield build_row()


def rows_of_imports(user: Sandbox) -> Iterator[Row]:
    """Yield every row about imports of images."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=cache_root()) as work:
        yield from import_rows(user, Path(work))


def page(found: list[Row]) -> str:
    """Return the page."""
    qemu = subprocess.run(
        ["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True
    ).stdout
    intro = [
        "Written by `make bench`; do not edit. Every row was measured in one run, ours and the peer",
        "in turns, medians. The ratio is what counts: seconds are those of this machine.",
    ]
    facts = [
        f"when: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"host: {os.cpu_count()} CPUs, Linux {platform.release()}, {_choice().accel}",
        f"VMM: {qemu.splitlines()[0]}",
        f"image: {IMAGE}; Python {platform.python_version()}",
    ]
    return render("Benchmarks", intro, facts, found)


def _choice() -> VmmChoice:
    return choose_vmm("qemu", probe_kvm(), "not measured here")


def main() -> int:
    """Measure and write the page; 1 when a budget does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="cold boots of each kind")
    parser.add_argument("--no-build", action="store_true", help="leave the image build out")
    parser.add_argument("--imports", action="store_true", help="only docs/benchmarks-imports.md")
    options = parser.parse_args()
    need_kernel()
    need_image(IMAGE)
    holds = True
    if not options.imports:
        build = not options.no_build
        holds &= _measure(lambda user: rows(user, options.rounds, build=build), "benchmarks.md")
    # Its images go: not into the store that tests share.
    holds &= _measure(rows_of_imports, "benchmarks-imports.md", artifacts=False)
    return int(not holds)


def _measure(
    measured: Callable[[Sandbox], Iterator[Row]], name: str, *, artifacts: bool = True
) -> bool:
    """Measure rows as a user of their own, write their page, and tell whether all budgets hold."""
    user = Sandbox(artifacts=artifacts)
    found: list[Row] = []
    try:
        for row in measured(user):
            print(f"{row.what}: {row.ours} / {row.against}: {row.ratio} ({row.budget})", flush=True)
            found.append(row)
    finally:
        user.close()
    (ROOT / "docs" / name).write_text(page(found))
    return all(row.holds is not False for row in found)


if __name__ == "__main__":
    sys.exit(main())
