"""One suite over every VMM adapter: what services rely on."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from banger.errors import VmmFailed
from banger.guest import agent
from banger.guest.boot import base_segment, boot_config, write_initramfs
from banger.host.commands import HostCommands
from banger.host.process import ProcessIdentity, find_by_argument
from banger.images.ext4 import make_disk
from banger.services.boot import kernel_command_line
from banger.vmm.base import NetworkSpec, Vmm, VmSpec
from banger.vmm.qemu import Qemu
from tests.support.artifacts import cache_root, need_kernel
from tests.support.fake_vmm import FakeVmm
from tests.support.tiny import make_tiny_image

_READY_S = 180


def _new(name: str) -> Vmm:
    return FakeVmm() if name == "fake" else Qemu(HostCommands())


@pytest.fixture(params=["fake", "qemu"])
def vmm(request: pytest.FixtureRequest) -> Vmm:
    """Each adapter in turn."""
    return _new(request.param)


@pytest.fixture(scope="session")
def tiny_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest image."""
    return make_tiny_image(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def kernel() -> Path:
    """The kernel of the catalog."""
    return need_kernel()


@pytest.fixture
async def spec(kernel: Path, tiny_image: Path, tmp_path: Path) -> AsyncIterator[VmSpec]:
    """A machine ready to be started."""
    with tempfile.TemporaryDirectory(prefix="bng-") as base:
        # As the product's: BASE/<whose>/vms/<id>; `whose` makes the mark in the process table.
        runtime = Path(base, "c0ffee", "vms", "c0ffee000001")
        runtime.mkdir(parents=True, mode=0o700)
        commands = HostCommands()
        own = tmp_path / "own.ext4"
        await make_disk(own, 64 << 20, cache_dir=cache_root() / "cache", commands=commands)
        segment = base_segment(kernel, cache_dir=cache_root() / "cache")
        config = boot_config(
            hostname="contract",
            machine_id="0" * 32,
            network=None,
            authorized_key="ssh-ed25519 AAAA test",
            host_keys={"ssh_host_ed25519_key": b"private"},
        )
        initramfs = tmp_path / "initramfs.img"
        write_initramfs(initramfs, segment, config)
        yield VmSpec(
            id="c0ffee000001",
            vcpu=1,
            memory_bytes=256 << 20,
            accel="tcg",
            kernel=kernel / "vmlinux",
            initramfs=initramfs,
            command_line=kernel_command_line("tcg"),
            base_disk=tiny_image,
            own_disk=own,
            modules_disk=kernel / "modules.ext4",
            directory=tmp_path,
            runtime=runtime,
            console_log=tmp_path / "console.log",
            vmm_log=tmp_path / "vmm.log",
            network=NetworkSpec(mac="02:00:00:00:00:01"),
        )


@pytest.fixture
async def started(vmm: Vmm, spec: VmSpec) -> AsyncIterator[ProcessIdentity]:
    """A machine whose agent answered; gone afterwards."""
    process = await vmm.start(spec)
    try:
        await _ready(vmm, spec, process)
        yield process
    finally:
        await vmm.kill(process)


async def _ready(vmm: Vmm, spec: VmSpec, process: ProcessIdentity) -> None:
    await asyncio.to_thread(
        agent.wait_ready,
        vmm.endpoint(spec.runtime),
        timeout_s=_READY_S,
        cancelled=lambda: not process.alive(),
    )


def _echo(vmm: Vmm, spec: VmSpec, timeout_s: float = 30) -> bytes:
    endpoint = vmm.endpoint(spec.runtime)
    status, out, _ = agent.capture_exec(endpoint, [b"echo", b"hello"], timeout_s=timeout_s)
    assert status.exit_code == 0
    return out


async def test_a_started_machine_runs_commands_and_logs_its_console(
    vmm: Vmm, spec: VmSpec, started: ProcessIdentity
) -> None:
    assert started.alive()
    assert await asyncio.to_thread(_echo, vmm, spec) == b"hello\n"
    assert spec.console_log.exists()


async def test_a_new_adapter_adopts_it_as_after_a_daemon_restart(
    vmm: Vmm, spec: VmSpec, started: ProcessIdentity
) -> None:
    later = _new(vmm.name)
    assert await later.adopt(spec.runtime, started)
    assert not await later.adopt(spec.runtime, replace(started, start_ticks=1))
    assert await asyncio.to_thread(_echo, later, spec) == b"hello\n"
    await later.kill(started)
    assert not started.alive()
    assert not await later.adopt(spec.runtime, started)


async def test_a_paused_machine_stands_still_until_resumed(
    vmm: Vmm, spec: VmSpec, started: ProcessIdentity
) -> None:
    await vmm.pause(spec.runtime)
    waiting = asyncio.create_task(asyncio.to_thread(_echo, vmm, spec))
    done, _ = await asyncio.wait([waiting], timeout=1)
    assert not done
    await vmm.resume(spec.runtime)
    assert await waiting == b"hello\n"


async def test_a_guest_that_shuts_down_ends_its_vmm(
    vmm: Vmm, spec: VmSpec, started: ProcessIdentity
) -> None:
    await asyncio.to_thread(agent.shutdown, vmm.endpoint(spec.runtime), timeout_s=30)
    await asyncio.wait_for(started.wait(), 60)
    assert not started.alive()


async def test_kill_is_idempotent(vmm: Vmm, spec: VmSpec, started: ProcessIdentity) -> None:
    await vmm.kill(started)
    await vmm.kill(started)
    assert not started.alive()


async def test_a_start_that_cannot_work_says_why_and_leaves_no_process(
    vmm: Vmm, spec: VmSpec
) -> None:
    missing = spec.own_disk.with_name("missing.ext4")
    with pytest.raises(VmmFailed, match=r"missing\.ext4"):
        await vmm.start(replace(spec, own_disk=missing))
    assert find_by_argument(str(spec.runtime)) == []


async def test_a_killed_vmm_does_not_hold_up_a_waiting_client(
    vmm: Vmm, spec: VmSpec, started: ProcessIdentity
) -> None:
    endpoint = vmm.endpoint(spec.runtime)
    waiting = asyncio.create_task(
        asyncio.to_thread(agent.capture_exec, endpoint, [b"sleep", b"600"], timeout_s=300)
    )
    await asyncio.sleep(0.5)
    await vmm.kill(started)
    with pytest.raises(Exception):  # noqa: B017,PT011 - which one is the transport's affair
        await asyncio.wait_for(waiting, 30)
