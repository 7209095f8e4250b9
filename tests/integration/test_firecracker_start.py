"""A start of Firecracker that goes wrong, at each of its steps and in each of its ways.

The adapter is real, and so are the namespaces, pasta and, where the jailer is asked for, jailer and
Firecracker. The machine is not: no test lets the real one power on as a user who may open
/dev/kvm, for on a paravirtual KVM that crashes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from banger.errors import VmmFailed
from banger.events import NullSink
from banger.host import process as processes
from banger.host.commands import HostCommands
from banger.host.process import find_by_argument
from banger.services.reconcile import reconcile
from banger.vmm import children, firecracker, jail, launch
from banger.vmm import firecracker_api as api
from banger.vmm.base import NetworkSpec, VmSpec
from banger.vmm.firecracker import Firecracker
from tests.support.artifacts import need_firecracker
from tests.support.fake_firecracker import FakeFirecracker
from tests.support.parts import Parts
from tests.support.specs import plain_spec

SINK = NullSink()
NOBODY = 65534
CLONE_NEWNET = 0x40000000
CLONE_NEWNS = 0x00020000
# Nobody's: neither a user of the host nor in the range the product hands out.
JAIL_UID = 1_800_000_001
MAC = "02:00:00:00:00:01"
USER = NetworkSpec(MAC)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="the jailer needs root")
needs_pasta = pytest.mark.skipif(
    shutil.which("pasta") is None or not os.access("/dev/net/tun", os.R_OK | os.W_OK),
    reason="needs pasta and /dev/net/tun",
)


def _can_make_namespaces() -> bool:
    words = ["unshare", "--user", "--map-root-user", "--net", "--", "true"]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not _can_make_namespaces(), reason="no user namespaces here"),
]


@pytest.fixture
def root() -> Iterator[Path]:
    """A short directory on the disk; a process left over with it in its words fails the test.

    Who keeps a console's log, or the shell's child that has yet to become `ip`, ends by itself.
    """
    with tempfile.TemporaryDirectory(prefix="bng-") as name:
        yield Path(name)
        deadline = time.monotonic() + 10
        while (left := find_by_argument(name)) and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in left:
            process.kill()
        assert left == []


@pytest.fixture
def spec(root: Path) -> Iterator[VmSpec]:
    """A machine whose files are there, as small as files can be."""
    vm_id = os.urandom(6).hex()  # the mark is in the table of all processes of the host
    runtime = root / "c0ffee0001" / "vms" / vm_id
    runtime.mkdir(parents=True, mode=0o700)
    directory = root / "vm"
    directory.mkdir(mode=0o700)
    for name in ("vmlinux", "initramfs.img", "base.ext4", "own.ext4", "mods.ext4"):
        (directory / name).touch(mode=0o600)
    made = plain_spec(directory, id=vm_id, runtime=runtime, metrics_log=directory / "metrics.json")
    yield made
    for process in find_by_argument(made.mark):  # a test that failed
        process.kill()


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


def in_namespaces(flags: int, body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run in a thread that has left the host's network or mounts for its own."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.unshare(flags) == 0, os.strerror(ctypes.get_errno())
            if flags & CLONE_NEWNS:
                subprocess.run(["mount", "--make-rprivate", "/"], check=True)
            asyncio.run(body())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def open_tun_to_all(root: Path) -> None:
    """Put a /dev/net/tun in place that has the mode udev gives it; in a mount namespace only."""
    node = root / "tun"
    os.mknod(node, 0o666 | stat.S_IFCHR, os.stat("/dev/net/tun").st_rdev)
    node.chmod(0o666)
    subprocess.run(["mount", "--bind", str(node), "/dev/net/tun"], check=True)
    with open("/dev/net/tun", "rb"):
        pass


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


@needs_pasta
async def test_pasta_that_does_not_start_leaves_nothing(root: Path, spec: VmSpec) -> None:
    broken = root / "bin" / "pasta"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho no more sockets >&2\nexit 1\n")
    broken.chmod(0o755)
    commands = HostCommands({**os.environ, "PATH": f"{broken.parent}:{os.environ['PATH']}"})
    program = str(FakeFirecracker(root / "fc").program)
    vmm = Firecracker(commands, lambda: program, lambda: None, jailed=False)
    with nothing_left(spec):
        with pytest.raises(VmmFailed, match="pasta did not start: no more sockets") as caught:
            await vmm.start(replace(spec, network=USER))
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
            assert "pasta" in {_program(p.pid) for p in running}
        await vmm.kill(process)
        assert not process.alive()
        assert not await vmm.adopt(spec.runtime, process)
        await vmm.kill(process)
        await vmm.sweep(spec.id, spec.runtime, spec.directory)
        await vmm.sweep(spec.id, spec.runtime, spec.directory)
        assert not any(p.alive() for p in running)


def _program(pid: int) -> str:
    return Path(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()).name


def _has_no_rights(pid: int) -> None:
    status = _status(pid)
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
async def test_the_user_network_has_a_tap_joined_to_pasta(root: Path, spec: VmSpec) -> None:
    spec = replace(spec, network=USER)
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
        await vmm.kill(process)
        await vmm.sweep(spec.id, spec.runtime, spec.directory)


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
    made: list[subprocess.Popen[bytes]] = []

    def slow(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        loop.call_soon_threadsafe(begun.set)
        time.sleep(0.5)  # a busy host, at the worst of all moments
        made.append(popen(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(children.subprocess, "Popen", slow)
    fake = FakeFirecracker(root / "fc", silent=True)
    with nothing_left(spec):
        task = asyncio.create_task(adapter(fake.program).start(spec))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    # It was waited for, with its logs still open, and ended.
    assert [child.returncode for child in made] == [-signal.SIGKILL]


# A driver that becomes nobody when it has read all it needs; what it says is JSON on stdout.
_AS_NOBODY = """
import asyncio, json, os, sys
from pathlib import Path
import httpx2, httpcore2, anyio._backends._asyncio
from banger.errors import BangerError
from banger.host.commands import HostCommands
from banger.vmm.base import NetworkSpec, VmSpec
from banger.vmm.firecracker import Firecracker
os.setgroups([]); os.setgid(65534); os.setuid(65534)
what, program, fields = json.loads(sys.argv[1])
for name, value in fields.items():
    if isinstance(value, str) and value.startswith("/"):
        fields[name] = Path(value)
spec = VmSpec(**fields)
vmm = Firecracker(HostCommands(), lambda: program, lambda: None, jailed=False)
try:
    if what == "sweep":
        asyncio.run(vmm.sweep(spec.id, spec.runtime, spec.directory))
    else:
        asyncio.run(vmm.start(spec))
    print(json.dumps({}))
except BangerError as error:
    print(json.dumps({"message": error.message, "hint": error.hint}))
"""


def _as_nobody(what: str, program: Path, spec: VmSpec) -> dict[str, str]:
    fields = {name: getattr(spec, name) for name in spec.__slots__}
    words = json.dumps([what, str(program), fields], default=str)
    done = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, words],
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
        cwd="/",
    )
    said: dict[str, str] = json.loads(done.stdout)
    return said


def _give_to_nobody(root: Path) -> None:
    for path in (root, *root.rglob("*")):
        os.chown(path, NOBODY, NOBODY)


@needs_root
def test_another_users_process_with_our_mark_holds_nothing_up(root: Path, spec: VmSpec) -> None:
    """Any user can read a VM's mark in the process table, and give it to a process of theirs."""
    _give_to_nobody(root)
    with subprocess.Popen(["sh", "-c", "read line", spec.mark], stdin=subprocess.PIPE) as stranger:
        while not find_by_argument(spec.mark):  # until the kernel is done with its exec
            assert stranger.poll() is None
        assert _as_nobody("sweep", Path("/nonexistent"), spec) == {}
        assert stranger.poll() is None
        stranger.kill()


# --- through the service


@pytest.fixture
async def parts(root: Path) -> AsyncIterator[Callable[..., Coroutine[Any, Any, Parts]]]:
    """Make a daemon's parts over a fake Firecracker that behaves as planned."""
    made: list[Parts] = []

    async def make(**plan: Any) -> Parts:
        program = FakeFirecracker(root / "fc", **plan).program
        made.append(await Parts(root, adapter(program)).open())
        return made[-1]

    yield make
    for one in made:
        await one.close()


def _left(parts: Parts) -> list[str]:
    """Return what a VM has only while it runs."""
    found = [str(path) for path in parts.layout.runtime_vms.iterdir()]
    mine = f"-{parts.layout.runtime.name}"
    return found + [str(process.pid) for process in find_by_argument(mine)]


@pytest.mark.parametrize("network", ["none", pytest.param("user", marks=needs_pasta)])
@pytest.mark.parametrize("at", [1, 4, 8])
async def test_a_vm_whose_start_was_refused_is_stopped_and_says_why(
    parts: Callable[..., Coroutine[Any, Any, Parts]], network: str, at: int
) -> None:
    made = await parts(at=at, fault="no luck")
    vm = await made.vms.create({"name": "box", "network": network}, SINK)
    with pytest.raises(VmmFailed, match="no luck"):
        await made.vms.start("box", SINK)
    assert _left(made) == []
    after = await made.vms.get("box")
    assert (after["state"], after["pid"]) == ("stopped", None)
    assert after["state_reason"].endswith("no luck")
    kept = {path.name for path in Path(vm["directory"]).iterdir()}
    assert "initramfs.img" not in kept
    await made.vms.delete("box")
    assert list(made.layout.vms.iterdir()) == []


async def test_a_vm_that_is_made_and_does_not_start_is_not_there(
    parts: Callable[..., Coroutine[Any, Any, Parts]],
) -> None:
    made = await parts(exit_saying="no seccomp")
    with pytest.raises(VmmFailed, match="no seccomp"):
        await made.vms.create({"name": "box", "start": True}, SINK)
    assert await made.vms.all() == []
    assert _left(made) == []
    assert list(made.layout.vms.iterdir()) == []
    assert "no seccomp" in (made.layout.last_failed_boot / "vmm.log").read_text()


@needs_root
@pytest.mark.skipif(
    not (shutil.which("nft", path="/usr/sbin:/sbin") and os.path.exists("/dev/net/tun")),
    reason="needs nftables and /dev/net/tun",
)
@pytest.mark.parametrize("at", [1, 8, 9])
def test_a_start_refused_on_the_bridge_gives_the_tap_back(root: Path, at: int) -> None:
    async def body() -> None:
        made = await Parts(
            root, adapter(FakeFirecracker(root / "fc", at=at, fault="no luck").program)
        ).open()
        taps: list[str] = []
        take = made.networks._bridge.take

        async def spy(*args: Any, **kwargs: Any) -> str:
            taps.append(await take(*args, **kwargs))
            assert taps[-1] in dict(map(reversed, socket.if_nameindex()))
            return taps[-1]

        made.networks._bridge.take = spy  # type: ignore[method-assign]
        try:
            await made.vms.create({"name": "box", "network": "bridge"}, SINK)
            with pytest.raises(VmmFailed, match="no luck"):
                await made.vms.start("box", SINK)
            row = await made.rows.find("box")
            assert (row.state, row.tap) == ("stopped", None)
            assert len(taps) == 1
            assert [name for _, name in socket.if_nameindex() if name.startswith("bt")] == []
            assert _left(made) == []
        finally:
            await made.networks.close()
            await made.close()

    in_namespaces(CLONE_NEWNET, body)


_DAEMON = """
import asyncio, sys
from pathlib import Path
from banger.events import NullSink
from tests.integration.test_firecracker_start import adapter
from tests.support.parts import Parts

async def main():
    root = Path(sys.argv[1])
    parts = await Parts(root, adapter(root / "fc" / "firecracker")).open()
    await parts.vms.create({"name": "box", "network": sys.argv[2]}, NullSink())
    await parts.vms.start("box", NullSink())

asyncio.run(main())
"""


@pytest.mark.parametrize("network", ["none", pytest.param("user", marks=needs_pasta)])
async def test_a_daemon_killed_before_it_wrote_the_pid_leaves_nothing_to_the_next(
    root: Path, network: str
) -> None:
    fake = FakeFirecracker(root / "fc", at=8 if network == "none" else 9, hang=True)
    daemon = subprocess.Popen(
        [sys.executable, "-c", _DAEMON, str(root), network], cwd=Path(__file__).parents[2]
    )
    try:
        async with asyncio.timeout(60):
            while not [row for row in fake.requests if row["path"] == "/actions"]:
                assert daemon.poll() is None
                await asyncio.sleep(0.01)
    finally:
        daemon.kill()
        daemon.wait()
    later = await Parts(root, adapter(fake.program)).open()
    orphans = find_by_argument(f"-{later.layout.runtime.name}")
    programs = {_program(process.pid) for process in orphans}
    assert len(orphans) == (1 if network == "none" else 2)
    assert ("pasta" in programs) == (network == "user")
    assert (await later.rows.find("box")).process is None
    await reconcile(later.rows, later.vms, later.networks, later.layout)
    assert not any(process.alive() for process in orphans)
    assert _left(later) == []
    assert (await later.vms.get("box"))["state"] == "stopped"
    await later.vms.delete("box")
    assert list(later.layout.vms.iterdir()) == []
    await later.close()


# --- the real one, never powered on by who may open /dev/kvm


@pytest.fixture
def real(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The real programs, under an adapter that configures a machine and stops before its start."""
    whole = firecracker.configuration

    def but_the_start(spec: VmSpec, files: Any) -> list[api.Call]:
        *calls, start = whole(spec, files)
        assert start == api.instance_start()
        return calls

    monkeypatch.setattr(firecracker, "configuration", but_the_start)
    return need_firecracker()


@pytest.mark.parametrize("network", [None, pytest.param(USER, marks=needs_pasta)])
async def test_the_real_one_takes_a_configuration_without_rights(
    real: tuple[Path, Path], spec: VmSpec, network: NetworkSpec | None
) -> None:
    vmm = adapter(real[0])
    spec = replace(spec, network=network)
    with nothing_left(spec):
        process = await vmm.start(spec)
        _has_no_rights(process.pid)
        assert network_of(process.pid) != network_of("self")
        assert await vmm.adopt(spec.runtime, process)
        await vmm.kill(process)
        await vmm.sweep(spec.id, spec.runtime, spec.directory)
    assert spec.vmm_log.read_text() == ""


@needs_root
@pytest.mark.parametrize("network", [None, pytest.param(USER, marks=needs_pasta)])
def test_the_jailer_confines_the_real_one(
    real: tuple[Path, Path], root: Path, spec: VmSpec, network: NetworkSpec | None
) -> None:
    spec = replace(spec, network=network, jail_uid=JAIL_UID)

    async def body() -> None:
        if network is not None:
            open_tun_to_all(root)
        await _confines(adapter(*real), adapter(*real), spec)

    in_namespaces(CLONE_NEWNS, body)


async def _confines(vmm: Firecracker, later: Firecracker, spec: VmSpec) -> None:
    with nothing_left(spec):
        process = await vmm.start(spec)
        status = _status(process.pid)
        assert set(status["Uid"].split()) == set(status["Gid"].split()) == {str(JAIL_UID)}
        assert status["Groups"].strip() in ("", str(JAIL_UID))
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(status[name], 16) == 0, name
        assert status["NSpid"].split()[1:] == ["1"]
        for kind in ("pid", "mnt", "net"):
            theirs = os.readlink(f"/proc/{process.pid}/ns/{kind}")
            assert theirs != os.readlink(f"/proc/self/ns/{kind}"), kind
        _check_chroot(spec, Path(f"/proc/{process.pid}/root"))
        assert await vmm.adopt(spec.runtime, process)
        assert await later.adopt(spec.runtime, process)
        running = find_by_argument(spec.mark)
        assert "pasta" in {_program(p.pid) for p in running} or spec.network is None
        assert all(_status(p.pid)["Uid"].split()[0] == str(JAIL_UID) for p in running)
        await vmm.kill(process)
        assert not process.alive()
        await vmm.sweep(spec.id, spec.runtime, spec.directory)
        await vmm.sweep(spec.id, spec.runtime, spec.directory)
    # What was linked into the chroot is still there outside of it.
    assert all(path.exists() for path in jail.readable_files(spec).values())
    assert all(path.exists() for path in jail.writable_files(spec).values())


def _status(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/status").read_text()
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def _check_chroot(spec: VmSpec, inside: Path) -> None:
    root = jail.chroot_of(spec, Path("/x/firecracker"))
    # Its root is a file system of its own, whose top is our directory.
    assert {p.name for p in inside.iterdir()} == {p.name for p in root.iterdir()}
    assert spec.runtime.joinpath("jail").readlink() == root
    shared, own = jail.readable_files(spec), jail.writable_files(spec)
    for name, path in (shared | own).items():
        assert (inside / name).samefile(path), name
        assert path.stat().st_nlink == 2, name
    for path in shared.values():
        assert path.stat().st_uid == 0
        assert not path.stat().st_mode & 0o022
    for path in own.values():
        assert (path.stat().st_uid, path.stat().st_mode & 0o077) == (JAIL_UID, 0)
    assert root.stat().st_uid == JAIL_UID
    assert root.parent.stat().st_uid == 0
    assert {p.name for p in root.iterdir()} - set(shared) - set(own) == {
        *("dev", "run", "firecracker", "firecracker.pid", "fc.sock", "v.sock")
    } - ({"run"} - {p.name for p in root.iterdir()})


@needs_root
async def test_a_jailed_one_of_an_earlier_daemon_is_swept_while_it_runs(
    real: tuple[Path, Path], spec: VmSpec
) -> None:
    spec = replace(spec, jail_uid=JAIL_UID)
    first = adapter(*real)
    with nothing_left(spec):
        process = await first.start(spec)
        await adapter(*real).sweep(spec.id, spec.runtime, spec.directory)
        assert not process.alive()
    await first.kill(process)  # reaps the jailer


@needs_root
@pytest.mark.parametrize("field", ["own_disk", "initramfs", "base_disk"])
@pytest.mark.parametrize("jailed", [True, False])
async def test_a_missing_file_is_named_and_not_made(
    real: tuple[Path, Path], spec: VmSpec, jailed: bool, field: str
) -> None:
    missing: Path = getattr(spec, field)
    missing.unlink()
    spec = replace(spec, jail_uid=JAIL_UID if jailed else None)
    with nothing_left(spec):
        with pytest.raises(VmmFailed) as caught:
            await adapter(*real).start(spec) if jailed else await adapter(real[0]).start(spec)
    assert "No such file" in caught.value.message
    # The real one names a kernel's or an initramfs's fault without its path.
    assert missing.name in caught.value.message or field == "initramfs"
    assert not missing.exists()


@needs_root
async def test_one_that_ends_at_once_in_its_jail_is_quoted_at_once(
    real: tuple[Path, Path], spec: VmSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The jailer has ended well by then: only the process behind it tells."""
    own_words = firecracker._own_words
    monkeypatch.setattr(firecracker, "_own_words", lambda *args: [*own_words(*args), "--bogus"])
    spec = replace(spec, jail_uid=JAIL_UID)
    begun = time.monotonic()
    with nothing_left(spec):
        with pytest.raises(VmmFailed, match="ended at once: .*bogus"):
            await adapter(*real).start(spec)
    assert time.monotonic() - begun < firecracker._START_TIMEOUT_S / 2


@needs_root
async def test_a_jailer_that_fails_is_quoted(real: tuple[Path, Path], spec: VmSpec) -> None:
    odd = spec.directory / "fire"  # a name the jailer does not take
    shutil.copy(real[0], odd)
    spec = replace(spec, jail_uid=JAIL_UID)
    with nothing_left(spec):
        with pytest.raises(VmmFailed, match=r"ended with status -?\d+: .*fire"):
            await adapter(odd, real[1]).start(spec)


@needs_root
@pytest.mark.parametrize("network", [None, pytest.param(USER, marks=needs_pasta)])
@pytest.mark.parametrize("patience_s", [0.0, 0.01, 0.03, 0.06, 0.1, 0.2])
def test_a_jailed_start_cancelled_at_any_time_leaves_nothing(
    real: tuple[Path, Path],
    root: Path,
    spec: VmSpec,
    network: NetworkSpec | None,
    patience_s: float,
) -> None:
    spec = replace(spec, network=network, jail_uid=JAIL_UID)

    async def body() -> None:
        open_tun_to_all(root)
        vmm = adapter(*real)
        task = asyncio.create_task(vmm.start(spec))
        await asyncio.sleep(patience_s)
        task.cancel()
        try:
            await vmm.kill(await task)  # it was faster
            await vmm.sweep(spec.id, spec.runtime, spec.directory)
        except asyncio.CancelledError:
            pass

    with nothing_left(spec):
        in_namespaces(CLONE_NEWNS, body)


@needs_root
async def test_a_jailed_start_cancelled_while_its_chroot_is_made_leaves_nothing(
    real: tuple[Path, Path], spec: VmSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()
    place = firecracker._place

    def slow(*args: Any) -> Any:
        loop.call_soon_threadsafe(begun.set)
        time.sleep(0.5)  # a busy disk
        return place(*args)

    monkeypatch.setattr(firecracker, "_place", slow)
    spec = replace(spec, jail_uid=JAIL_UID)
    with nothing_left(spec):
        task = asyncio.create_task(adapter(*real).start(spec))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@needs_root
async def test_what_has_no_command_line_yet_does_not_survive_a_start_that_failed(
    real: tuple[Path, Path], spec: VmSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within execve(2) it has none; on a host that stands still that may take long."""
    find = processes.find_by_argument

    def blind(fragment: str) -> list[processes.ProcessIdentity]:
        (chroot,) = jail.chroots_in(spec.directory) or [spec.directory]
        return [one for one in find(fragment) if one not in processes.find_by_root(chroot)]

    async def refuse(*_: Any) -> None:
        assert [one for one in find(spec.mark) if one not in blind(spec.mark)]
        raise VmmFailed("refused")

    monkeypatch.setattr(processes, "find_by_argument", blind)
    monkeypatch.setattr(firecracker, "_configure", refuse)
    spec = replace(spec, jail_uid=JAIL_UID)
    # Another HOME's daemon may have given a VM of its own the same uid.
    bystander = subprocess.Popen(["sleep", "60"], user=JAIL_UID)
    try:
        with nothing_left(spec):
            with pytest.raises(VmmFailed, match="refused"):
                await adapter(*real).start(spec)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@needs_root
async def test_a_chroot_on_another_file_system_is_refused_with_a_way_out(
    real: tuple[Path, Path], spec: VmSpec
) -> None:
    if os.stat("/dev/shm").st_dev == spec.kernel.stat().st_dev:
        pytest.skip("/dev/shm is no file system of its own")
    with tempfile.TemporaryDirectory(prefix="bng-", dir="/dev/shm") as name:
        directory = Path(name)
        moved = {
            field: directory / getattr(spec, field).name
            for field in ("initramfs", "own_disk", "vmm_log", "metrics_log", "console_log")
        }
        for path in moved.values():
            path.touch()
        spec = replace(spec, directory=directory, jail_uid=JAIL_UID, **moved)
        with nothing_left(spec):
            with pytest.raises(VmmFailed) as caught:
                await adapter(*real).start(spec)
        assert f"{spec.kernel} cannot be linked into the VM's chroot" in caught.value.message
        chroot = jail.chroot_of(spec, real[0])
        assert f"{spec.kernel} has to be on the file system of {chroot}" in caught.value.hint
        assert "jailer_enabled = false" in caught.value.hint


@needs_root
def test_who_may_not_open_kvm_is_told_of_its_group(root: Path, spec: VmSpec) -> None:
    if not os.path.exists("/dev/kvm") or os.stat("/dev/kvm").st_mode & 0o006:
        pytest.skip("nobody may open /dev/kvm, or there is none")
    # Where nobody can read it, whatever the modes of the cache.
    program = Path(shutil.copy(need_firecracker()[0], root))
    _give_to_nobody(root)
    with nothing_left(spec):
        said = _as_nobody("start", program, spec)
    assert said["message"].startswith("Firecracker refused to start the machine: ")
    assert "Permission denied" in said["message"]
    assert "usermod -aG kvm" in said["hint"]
