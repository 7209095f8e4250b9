"""A start of Firecracker that goes wrong, at each of its steps and in each of its ways.

The adapter is real, and so are the namespaces, pasta and, where the jailer is asked for, jailer and
Firecracker. The machine is not: no test lets the real one power on as a user who may open
/dev/kvm, for on a paravirtual KVM that crashes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from banger.errors import VmmFailed
from banger.events import NullSink
from banger.host.commands import HostCommands
from banger.host.process import find_by_argument
from banger.network.publish import Forward
from banger.vmm import children, firecracker, jail, launch
from banger.vmm import firecracker_api as api
from banger.vmm.base import NetworkSpec, VmSpec
from banger.vmm.firecracker import Firecracker
from tests.support.artifacts import need_firecracker
from tests.support.fake_firecracker import FakeFirecracker

SINK = NullSink()
NOBODY = 65534
# Nobody's: neither a user of the host nor in the range the product hands out.
JAIL_UID = 1_800_000_001
MAC = "02:00:00:00:00:01"
USER = NetworkSpec(MAC)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="the jailer needs root")
needs_pasta = pytest.mark.skipif(
    shutil.which("pasta") is None or not os.access("/dev/net/tun", os.R_OK | os.W_OK),
    reason="needs pasta and /dev/net/tun",
)
pytestmark = pytest.mark.integration


def _can_make_namespaces() -> bool:
    words = ["unshare", "--user", "--map-root-user", "--net", "--", "true"]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


if not _can_make_namespaces():
    pytestmark = [pytest.mark.integration, pytest.mark.skip(reason="no user namespaces here")]


@pytest.fixture
def root() -> Iterator[Path]:
    """A short directory on the disk; a process left over with it in its words fails the test."""
    with tempfile.TemporaryDirectory(prefix="bng-") as name:
        yield Path(name)
        left = find_by_argument(name)
        for process in left:
            process.kill()
        assert left == []


@pytest.fixture
def spec(root: Path) -> VmSpec:
    """A machine whose files are there, as small as files can be."""
    vm_id = os.urandom(6).hex()  # the mark is in the table of all processes of the host
    runtime = root / "c0ffee0001" / "vms" / vm_id
    runtime.mkdir(parents=True, mode=0o700)
    directory = root / "vm"
    directory.mkdir(mode=0o700)
    for name in ("vmlinux", "initramfs.img", "base.ext4", "own.ext4", "mods.ext4"):
        (directory / name).write_bytes(b"")
    return VmSpec(
        id=vm_id,
        vcpu=1,
        memory_bytes=128 << 20,
        accel="kvm",
        kernel=directory / "vmlinux",
        initramfs=directory / "initramfs.img",
        command_line="console=ttyS0",
        base_disk=directory / "base.ext4",
        own_disk=directory / "own.ext4",
        modules_disk=directory / "mods.ext4",
        directory=directory,
        runtime=runtime,
        console_log=directory / "console.log",
        vmm_log=directory / "vmm.log",
        network=None,
        metrics_log=directory / "metrics.json",
    )


def adapter(program: Path, jailer: Path | None = None) -> Firecracker:
    return Firecracker(
        HostCommands(),
        lambda: str(program),
        lambda: None if jailer is None else str(jailer),
        jailed=jailer is not None,
    )


def tree(*tops: Path) -> set[str]:
    return {str(path) for top in tops for path in top.rglob("*")}


def network_of(pid: int | str) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def who_is_in(namespace: str) -> list[str]:
    """Return the processes that keep a network namespace."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if network_of(entry.name) == namespace:
                    found.append(entry.name)
    return found


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The network namespaces of the VM's processes, as they were before it was configured."""
    seen: set[str] = set()
    configure = firecracker._configure

    async def look(sockets: Path, spec: VmSpec, files: Any) -> None:
        seen.update(network_of(process.pid) for process in find_by_argument(spec.mark))
        await configure(sockets, spec, files)

    monkeypatch.setattr(firecracker, "_configure", look)
    return seen


def cgroups(mark: str) -> list[Path]:
    return [path for path in Path("/sys/fs/cgroup").glob("**/banger*") if mark in str(path)]


# What a start may leave in the VM's own directory, whatever becomes of it: its logs.
LOGS = {"console.log", "vmm.log", "metrics.json"}


@contextlib.contextmanager
def nothing_left(spec: VmSpec) -> Iterator[None]:
    """Check that what is inside leaves no process, no socket, no chroot, no cgroup, no file."""
    before = tree(spec.directory, spec.runtime)
    yield
    assert find_by_argument(spec.mark) == []
    assert list(spec.runtime.iterdir()) == []
    new = tree(spec.directory, spec.runtime) - before
    assert {Path(path).name for path in new} <= LOGS
    assert not jail.base_of(spec.directory).exists()
    assert cgroups(spec.mark) == []


def steps(network: NetworkSpec | None) -> int:
    return 8 if network is None else 9


# --- the fake is like the real one


REFUSED = {
    "start-first": [api.instance_start()],
    "pause-first": [api.vm_state("Paused")],
    "flush-first": [api.flush_metrics()],
    "no-such-path": [api.Call("x", "PUT", "/bogus", {})],
    "wrong-method": [api.instance_start()._replace(method="PATCH")],
    "unknown-field": [
        api.Call("x", "PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 9, "smtt": True})
    ],
    "missing-field": [api.Call("x", "PUT", "/machine-config", {"vcpu_count": 1})],
    "wrong-type": [api.Call("x", "PUT", "/machine-config", {"vcpu_count": "1", "mem_size_mib": 9})],
    "no-vcpu": [api.machine_config(0, 128)],
    "no-kernel": [api.boot_source("/nonexistent", "/etc/hostname", "")],
    "no-initramfs": [api.boot_source("/etc/hostname", "/nonexistent", "")],
    "no-drive": [api.drive("base", "/nonexistent", read_only=True)],
    "other-id": [api.drive("base", "/etc/hostname", read_only=True)._replace(path="/drives/own")],
    "odd-entropy": [api.Call("x", "PUT", "/entropy", {"x": 1})],
}


@pytest.fixture(params=["fake", "real"])
async def listening(
    request: pytest.FixtureRequest, root: Path, spec: VmSpec
) -> AsyncIterator[Path]:
    """The API socket of a Firecracker that nothing has been asked yet."""
    program = (
        FakeFirecracker(root / "fc").program if request.param == "fake" else need_firecracker()[0]
    )
    spec.vmm_log.touch()
    assert spec.metrics_log is not None
    spec.metrics_log.touch()
    words = firecracker._own_words(spec, program, firecracker._place(spec, program))
    child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        async with asyncio.timeout(30):
            while not firecracker._listens(spec.runtime / "fc.sock"):
                assert child.poll() is None
                await asyncio.sleep(0.01)
        yield spec.runtime / "fc.sock"
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("name", REFUSED)
async def test_fake_and_real_refuse_alike(listening: Path, name: str) -> None:
    async with api.FirecrackerApi(listening) as client:
        for call in REFUSED[name]:
            with pytest.raises(VmmFailed) as caught:
                await client.call(call)
            assert caught.value.code == "vmm_refused"
            # ... and go on.
            assert (await client.call(api.instance_info()))["state"] == "Not started"


async def test_fake_and_real_take_our_configuration_alike(listening: Path, spec: VmSpec) -> None:
    files = firecracker._place(spec, Path("/firecracker"))
    *calls, start = firecracker.configuration(spec, files)
    assert start == api.instance_start()
    async with api.FirecrackerApi(listening) as client:
        for call in calls:
            assert await client.call(call) == {}
        info = await client.call(api.instance_info())
    assert info["id"] == spec.mark
    assert info["state"] == "Not started"
    assert (spec.runtime / "v.sock").is_socket()
    assert spec.vmm_log.read_text() == ""


# --- each step, refused


@pytest.mark.parametrize("network", [None, pytest.param(USER, marks=needs_pasta)])
@pytest.mark.parametrize("at", range(1, 10))
async def test_a_refused_step_is_named_and_leaves_nothing(
    root: Path, spec: VmSpec, networks: set[str], network: NetworkSpec | None, at: int
) -> None:
    if at > steps(network):
        pytest.skip("no such step without a network")
    fake = FakeFirecracker(root / "fc", at=at, fault="no luck\nat all\u001b[2J")
    spec = replace(spec, network=network)
    expected = firecracker.configuration(spec, firecracker._place(spec, fake.program))[at - 1]
    with nothing_left(spec):
        with pytest.raises(VmmFailed) as caught:
            await adapter(fake.program).start(spec)
    assert caught.value.message == f"Firecracker refused to {expected.name}: no luck at all [2J"
    assert str(spec.vmm_log) in caught.value.hint
    assert len(fake.requests) == at
    networks.discard(network_of("self"))  # pasta's own: it stays in the host's
    assert len(networks) == 1
    assert who_is_in(networks.pop()) == []


# --- other ways to go wrong


async def _fails(spec: VmSpec, fake: FakeFirecracker) -> VmmFailed:
    with nothing_left(spec):
        with pytest.raises(VmmFailed) as caught:
            await asyncio.wait_for(adapter(fake.program).start(spec), 60)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 1000
    assert caught.value.hint
    return caught.value


async def test_one_that_ends_at_start_is_quoted(root: Path, spec: VmSpec) -> None:
    fake = FakeFirecracker(root / "fc", exit_saying="\u001b[31mno seccomp", exit_status=3)
    error = await _fails(spec, fake)
    assert error.message == "Firecracker ended with status 3: [31mno seccomp"


@needs_pasta
async def test_one_that_ends_at_start_takes_pasta_along(root: Path, spec: VmSpec) -> None:
    fake = FakeFirecracker(root / "fc", exit_saying="no seccomp", exit_status=3)
    error = await _fails(replace(spec, network=USER), fake)
    assert error.message == "Firecracker ended with status 3: no seccomp"


async def test_one_that_never_opens_its_socket_is_ended(
    root: Path, spec: VmSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firecracker, "_START_TIMEOUT_S", 1.0)
    error = await _fails(spec, FakeFirecracker(root / "fc", silent=True))
    assert error.message == "Firecracker did not answer within 1 s: it said nothing"


async def test_one_that_hangs_up_in_the_middle_is_a_failure(root: Path, spec: VmSpec) -> None:
    error = await _fails(spec, FakeFirecracker(root / "fc", at=4, hang_up=True))
    assert error.message.startswith("Firecracker did not add the drive own: ")


async def test_ten_megabytes_of_an_answer_are_not_read(root: Path, spec: VmSpec) -> None:
    error = await _fails(spec, FakeFirecracker(root / "fc", at=2, body_bytes=10 << 20))
    assert error.message == (
        "Firecracker did not set the kernel: it answered with more than 64 KiB"
    )


async def test_one_that_does_not_answer_is_ended(
    root: Path, spec: VmSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "_REQUEST_TIMEOUT_S", 1.0)
    error = await _fails(spec, FakeFirecracker(root / "fc", at=8, hang=True))
    assert error.message.startswith("Firecracker did not start the machine")


async def test_a_program_that_is_none_is_named(root: Path, spec: VmSpec) -> None:
    program = root / "firecracker"
    program.write_text("no ELF, no script")
    with nothing_left(spec):
        with pytest.raises(VmmFailed, match="firecracker"):
            await adapter(program).start(spec)


async def test_pasta_that_does_not_start_leaves_nothing(
    root: Path, spec: VmSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("ip") is None and not Path("/usr/sbin/ip").exists():
        pytest.skip("needs iproute2")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        forward = Forward("127.0.0.1", taken.getsockname()[1], 80)
        spec = replace(spec, network=NetworkSpec(MAC, forwards=(forward,)))
        with nothing_left(spec):
            with pytest.raises(VmmFailed, match="pasta did not start") as caught:
                await adapter(FakeFirecracker(root / "fc").program).start(spec)
    assert "--network none" in caught.value.hint


async def test_a_network_namespace_that_cannot_be_made_says_so(
    root: Path, spec: VmSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_USER_NAMESPACE", ("sh", "-c", "echo no more of them >&2", "--"))
    spec = replace(spec, network=USER)
    with nothing_left(spec):
        with pytest.raises(VmmFailed, match="could not be made: no more of them"):
            await adapter(FakeFirecracker(root / "fc").program).start(spec)


async def test_a_network_namespace_that_is_not_there_in_time_says_so(
    root: Path, spec: VmSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_MAKE_NETWORK", "cat >/dev/null")
    monkeypatch.setattr(firecracker, "_START_TIMEOUT_S", 1.0)
    spec = replace(spec, network=USER)
    with nothing_left(spec):
        with pytest.raises(VmmFailed, match="namespace was not there within 1 s"):
            await adapter(FakeFirecracker(root / "fc").program).start(spec)


# --- one that works


@pytest.mark.parametrize("network", [None, pytest.param(USER, marks=needs_pasta)])
async def test_a_start_configures_then_powers_on_and_is_swept_whole(
    root: Path, spec: VmSpec, networks: set[str], network: NetworkSpec | None
) -> None:
    fake = FakeFirecracker(root / "fc")
    vmm = adapter(fake.program)
    spec = replace(spec, network=network)
    with nothing_left(spec):
        process = await vmm.start(spec)
        assert process.alive()
        files = firecracker._place(spec, fake.program)
        assert [api.Call("", row["method"], row["path"], row["body"]) for row in fake.requests] == [
            call._replace(name="") for call in firecracker.configuration(spec, files)
        ]
        assert {row["status"] for row in fake.requests} == {204}
        assert network_of(process.pid) != network_of("self")
        _has_no_rights(process.pid)
        assert await vmm.adopt(spec.runtime, process)
        assert await adapter(fake.program).adopt(spec.runtime, process)
        assert not await vmm.adopt(spec.runtime, replace(process, start_ticks=1))
        await vmm.pause(spec.runtime)
        await vmm.resume(spec.runtime)
        running = find_by_argument(spec.mark)
        if network is not None:
            names = {Path(f"/proc/{p.pid}/comm").read_text().strip() for p in running}
            assert any(name.startswith("pasta") for name in names), names
        await vmm.kill(process)
        assert not process.alive()
        assert not await vmm.adopt(spec.runtime, process)
        await vmm.kill(process)
        await vmm.sweep(spec.id, spec.runtime, spec.directory)
        await vmm.sweep(spec.id, spec.runtime, spec.directory)
        assert not any(p.alive() for p in running)


def _has_no_rights(pid: int) -> None:
    text = Path(f"/proc/{pid}/status").read_text()
    status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert status["NoNewPrivs"].strip() == "1"


async def test_a_socket_bound_and_not_yet_listened_on_is_waited_for(
    root: Path, spec: VmSpec
) -> None:
    vmm = adapter(FakeFirecracker(root / "fc", deaf_s=0.5).program)
    with nothing_left(spec):
        await vmm.kill(await vmm.start(spec))
        await vmm.sweep(spec.id, spec.runtime, spec.directory)


@needs_pasta
async def test_the_user_network_has_a_tap_joined_to_pasta_and_the_forwards(
    root: Path, spec: VmSpec
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    spec = replace(spec, network=NetworkSpec(MAC, forwards=(Forward("127.0.0.1", port, 80),)))
    vmm = adapter(FakeFirecracker(root / "fc").program)
    with nothing_left(spec):
        process = await vmm.start(spec)
        enter = ["nsenter", "--target", str(process.pid), "--user", "--net", "--"]
        shown = subprocess.run(
            [*enter, "ip", "-json", "link"], capture_output=True, text=True, check=True
        ).stdout
        links = {link["ifname"]: link for link in json.loads(shown)}
        assert set(links) == {"lo", "br0", "tap0", "pasta0"}
        assert links["tap0"]["master"] == links["pasta0"]["master"] == "br0"
        # pasta listens for the forward; nobody is behind it.
        with socket.create_connection(("127.0.0.1", port), timeout=10):
            pass
        await vmm.kill(process)
        await vmm.sweep(spec.id, spec.runtime, spec.directory)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=10)


# --- cancelled, killed, and other people's processes


@pytest.mark.parametrize("network", [None, pytest.param(USER, marks=needs_pasta)])
@pytest.mark.parametrize("patience_s", [0.0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4])
async def test_a_start_cancelled_at_any_time_leaves_nothing(
    root: Path, spec: VmSpec, network: NetworkSpec | None, patience_s: float
) -> None:
    fake = FakeFirecracker(root / "fc", at=steps(network), hang=True)
    spec = replace(spec, network=network)
    with nothing_left(spec):
        task = asyncio.create_task(adapter(fake.program).start(spec))
        await asyncio.sleep(patience_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_start_cancelled_while_a_program_is_being_started_leaves_nothing(
    root: Path, spec: VmSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()
    popen = subprocess.Popen

    def slow(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        loop.call_soon_threadsafe(begun.set)
        time.sleep(0.5)  # a busy host, at the worst of all moments
        return popen(*args, **kwargs)

    monkeypatch.setattr(children.subprocess, "Popen", slow)
    fake = FakeFirecracker(root / "fc", silent=True)
    with nothing_left(spec):
        task = asyncio.create_task(adapter(fake.program).start(spec))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(1.0)  # what came up behind the cancellation would be there by now


@needs_root
async def test_another_users_process_with_our_mark_holds_nothing_up(
    root: Path, spec: VmSpec
) -> None:
    """Any user can read a VM's mark in the process table, and give it to a process of theirs."""
    stranger = subprocess.Popen(["sleep", "600"], start_new_session=True)
    program = (
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "from banger.host.commands import HostCommands\n"
        "from banger.vmm.firecracker import Firecracker\n"
        "mark, runtime = sys.argv[1:]\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "none = lambda: None\n"
        "vmm = Firecracker(HostCommands(), none, none, jailed=False)\n"
        "asyncio.run(vmm.sweep(mark, Path(runtime), Path(runtime)))\n"
    )
    stranger.kill()
    stranger.wait()
    runtime = root / "c0ffee0001" / "vms" / spec.id
    with subprocess.Popen(["sh", "-c", "sleep 600 & wait", spec.mark]) as stranger:
        try:
            subprocess.run(
                [sys.executable, "-c", program, spec.id, str(runtime)],
                check=True,
                timeout=60,
                env={**os.environ, "PYTHONPATH": str(Path(jail.__file__).parents[2])},
            )
            assert stranger.poll() is None
        finally:
            for process in find_by_argument(spec.mark):
                process.kill()
            subprocess.run(["pkill", "-P", str(stranger.pid)], check=False)
