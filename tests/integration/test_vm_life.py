"""The life of a VM and the start-up after a crash, over the fake VMM with the real agent."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from banger.errors import Conflict, Corrupted, InvalidInput, NotFound, Unavailable, VmmFailed
from banger.events import NullSink
from banger.guest import agent
from banger.host.process import ProcessIdentity, find_by_argument, start_ticks
from banger.services.reconcile import reconcile
from banger.vmm.base import VmSpec
from tests.support.fake_vmm import FakeVmm
from tests.support.parts import Parts

SINK = NullSink()


@pytest.fixture
async def root() -> AsyncIterator[Path]:
    """A short directory; what is left of its VMMs is ended."""
    with tempfile.TemporaryDirectory(prefix="bng-") as name:
        yield Path(name)
        for process in find_by_argument(name):
            process.kill()
            await process.wait()


@pytest.fixture
async def parts(root: Path) -> AsyncIterator[Parts]:
    """A daemon's parts."""
    made = await Parts(root).open()
    yield made
    await made.close()


async def _restart(parts: Parts) -> Parts:
    """Forget everything in memory, as kill -9 does, and start anew over the same directory."""
    root = parts.layout.data.parent
    await parts.close()
    later = await Parts(root).open()
    await reconcile(later.rows, later.vms, later.networks, later.layout)
    return later


def _left(parts: Parts) -> list[str]:
    """Return what exists of any VM: directories, sockets, processes."""
    found = [entry.name for entry in parts.layout.vms.iterdir()]
    found += [entry.name for entry in parts.layout.runtime_vms.iterdir()]
    found += [str(process.pid) for process in find_by_argument(f"{parts.layout.runtime_vms}/")]
    return found


async def test_create_start_stop_delete_leaves_nothing(parts: Parts) -> None:
    vm = await parts.vms.create({"name": "box", "start": True}, SINK)
    assert (vm["state"], vm["accel"]) == ("running", "tcg")
    assert "box.vm" in parts.layout.known_hosts.read_text()
    assert not (Path(vm["directory"]) / "initramfs.img").exists()
    stopped = await parts.vms.stop("box", SINK)
    assert (stopped["state"], stopped["pid"]) == ("stopped", None)
    assert find_by_argument(f"{parts.layout.runtime_vms}/") == []
    await parts.vms.delete("box")
    assert _left(parts) == []
    assert await parts.vms.all() == []
    assert parts.layout.known_hosts.read_text() == ""


async def test_a_generated_name_is_taken_when_none_is_given(parts: Parts) -> None:
    first = await parts.vms.create({}, SINK)
    second = await parts.vms.create({}, SINK)
    assert first["name"] != second["name"]


@pytest.mark.parametrize(
    "request_",
    [
        {"name": "UPPER"},
        {"name": "a" * 64},
        {"name": "-x"},
        {"vcpu": 0},
        {"vcpu": 1000},
        {"memory_bytes": -1},
        {"memory_bytes": 1 << 50},
        {"disk_size_bytes": 1},
        {"vmm": "qmu"},
        {"network": "usr"},
    ],
)
async def test_absurd_values_are_refused_and_leave_nothing(
    parts: Parts, request_: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInput) as caught:
        await parts.vms.create(request_, SINK)  # type: ignore[arg-type]
    assert caught.value.hint
    assert _left(parts) == []


async def test_an_unknown_image_is_refused_with_the_nearest(parts: Parts) -> None:
    with pytest.raises(NotFound) as caught:
        await parts.vms.create({"image": "from-catalo"}, SINK)
    assert "from-catalog" in caught.value.hint


async def test_an_unknown_kernel_ends_the_pull_of_the_image_too(parts: Parts) -> None:
    begun = asyncio.Event()
    ended = False

    async def pull(name: str, sink: object, *, force: bool) -> None:
        nonlocal ended
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended = True

    parts.image_source.pull = pull  # type: ignore[method-assign,assignment]
    with pytest.raises(NotFound, match="no kernel"):
        await parts.vms.create({"image": "from-catalog", "kernel": "nothing"}, SINK)
    assert ended == begun.is_set()
    assert _left(parts) == []


async def test_an_absent_image_is_pulled_once_for_two_vms_at_once(parts: Parts) -> None:
    await asyncio.gather(
        parts.vms.create({"image": "from-catalog"}, SINK),
        parts.vms.create({"image": "from-catalog"}, SINK),
    )
    assert parts.image_source.pulled == ["from-catalog"]


async def test_an_image_names_its_kernel_and_an_imported_one_gets_an_sshd(parts: Parts) -> None:
    parts.image_source.said["tiny"] = {"kernel": "from-catalog", "platform": "linux/amd64"}
    named = await parts.vms.create({"name": "named"}, SINK)
    asked = await parts.vms.create({"name": "asked", "kernel": "tiny", "with_sshd": False}, SINK)
    parts.image_source.said.clear()
    plain = await parts.vms.create({"name": "plain"}, SINK)
    assert (named["kernel"], named["with_sshd"]) == ("from-catalog", True)
    assert parts.kernel_source.pulled == ["from-catalog"]
    assert (asked["kernel"], asked["with_sshd"]) == ("tiny", False)
    assert (plain["kernel"], plain["with_sshd"]) == ("tiny", False)


async def test_an_image_that_is_pulled_first_names_its_kernel_too(parts: Parts) -> None:
    parts.image_source.said["from-catalog"] = {"kernel": "from-catalog"}
    vm = await parts.vms.create({"image": "from-catalog"}, SINK)
    assert vm["kernel"] == "from-catalog"


async def test_a_taken_name_is_refused(parts: Parts) -> None:
    await parts.vms.create({"name": "box"}, SINK)
    with pytest.raises(Conflict, match="box exists"):
        await parts.vms.create({"name": "box"}, SINK)
    assert len(await parts.vms.all()) == 1


async def test_two_creations_of_one_name_make_one_vm(parts: Parts) -> None:
    both = await asyncio.gather(
        *(parts.vms.create({"name": "box"}, SINK) for _ in range(2)), return_exceptions=True
    )
    assert sorted(type(result) for result in both if isinstance(result, Exception)) == [Conflict]
    assert len(await parts.vms.all()) == 1
    assert len(list(parts.layout.vms.iterdir())) == 1


async def test_used_artifacts_are_not_deleted(parts: Parts) -> None:
    await parts.vms.create({"name": "box"}, SINK)
    with pytest.raises(Conflict, match="used by box"):
        await parts.images.delete("tiny")
    await parts.vms.delete("box")
    await parts.images.delete("tiny")


class _DyingVmm(FakeVmm):
    """A VMM that ends before its guest answers."""

    async def start(self, spec: VmSpec) -> ProcessIdentity:
        process = await super().start(spec)
        process.kill()
        return process


async def test_a_vmm_that_dies_at_start_leaves_nothing_and_shows_its_log(root: Path) -> None:
    parts = await Parts(root, _DyingVmm()).open()
    with pytest.raises(VmmFailed, match="ended while booting") as caught:
        await parts.vms.create({"name": "box", "start": True}, SINK)
    assert str(parts.layout.last_failed_boot) in caught.value.hint
    assert (parts.layout.last_failed_boot / "console.log").read_text() == "fake console\n"
    assert await parts.vms.all() == []
    assert _left(parts) == []
    await parts.close()


async def test_a_cancelled_start_leaves_nothing(root: Path) -> None:
    class SilentVmm(FakeVmm):
        async def start(self, spec: VmSpec) -> ProcessIdentity:
            process = await super().start(spec)
            await self.pause(spec.runtime)  # never answers
            return process

    parts = await Parts(root, SilentVmm()).open()
    task = asyncio.create_task(parts.vms.create({"name": "box", "start": True}, SINK))
    while not find_by_argument(f"{parts.layout.runtime_vms}/"):
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.2)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert await parts.vms.all() == []
    assert _left(parts) == []
    await parts.close()


async def test_a_missing_disk_is_named(parts: Parts) -> None:
    vm = await parts.vms.create({"name": "box"}, SINK)
    (Path(vm["directory"]) / "disk.ext4").unlink()
    with pytest.raises(Corrupted, match="disk of box is gone"):
        await parts.vms.start("box", SINK)


async def test_a_vm_that_ends_by_itself_is_seen_as_stopped(parts: Parts) -> None:
    vm = await parts.vms.create({"name": "box", "start": True}, SINK)
    row = await parts.rows.find("box")
    assert row.process is not None
    row.process.kill()
    async with asyncio.timeout(20):
        while (await parts.vms.get("box"))["state"] != "stopped":
            await asyncio.sleep(0.02)
    assert "its VMM ended: ready" in (await parts.vms.get("box"))["state_reason"]
    assert not (parts.layout.runtime_vms / vm["id"]).exists()


async def test_a_disk_grows_and_never_shrinks(parts: Parts) -> None:
    vm = await parts.vms.create({"name": "box"}, SINK)
    await parts.vms.set("box", {"disk_size_bytes": 512 << 20, "name": "bigger"})
    assert (Path(vm["directory"]) / "disk.ext4").stat().st_size == 512 << 20
    with pytest.raises(Conflict, match="cannot shrink"):
        await parts.vms.set("bigger", {"disk_size_bytes": 256 << 20})


async def test_an_ephemeral_vm_goes_with_its_owner(parts: Parts) -> None:
    owner = subprocess.Popen(["sleep", "600"])
    await parts.vms.create({"name": "box", "start": True, "owner_pid": owner.pid}, SINK)
    owner.kill()
    owner.wait()
    async with asyncio.timeout(20):
        while await parts.vms.all():
            await asyncio.sleep(0.02)
    assert _left(parts) == []


async def test_prune_takes_stopped_vms_only(parts: Parts) -> None:
    await parts.vms.create({"name": "idle"}, SINK)
    await parts.vms.create({"name": "busy", "start": True}, SINK)
    dry = await parts.vms.prune(everything=False, dry_run=True, sink=SINK)
    assert dry["vms"] == ["idle"]
    await parts.vms.prune(everything=False, dry_run=False, sink=SINK)
    assert [vm["name"] for vm in await parts.vms.all()] == ["busy"]


# --- start-up after a crash ---


async def test_a_running_vm_is_adopted_and_still_watched(parts: Parts) -> None:
    before = await parts.vms.create({"name": "box", "start": True}, SINK)
    later = await _restart(parts)
    after = await later.vms.get("box")
    assert (after["state"], after["pid"]) == ("running", before["pid"])
    connection = await later.vms.connection("box")
    assert connection["endpoint"]["kind"] == "virtio-serial"
    row = await later.rows.find("box")
    assert row.process is not None
    row.process.kill()
    async with asyncio.timeout(20):
        while (await later.vms.get("box"))["state"] != "stopped":
            await asyncio.sleep(0.02)
    await later.close()


async def test_a_vm_that_ended_meanwhile_is_stopped(parts: Parts) -> None:
    await parts.vms.create({"name": "box", "start": True}, SINK)
    row = await parts.rows.find("box")
    await parts.vms.close()
    assert row.process is not None
    row.process.kill()
    later = await _restart(parts)
    assert (await later.vms.get("box"))["state"] == "stopped"
    await later.close()


async def test_a_reused_pid_is_not_taken_for_the_vm(parts: Parts) -> None:
    await parts.vms.create({"name": "box", "start": True}, SINK)
    row = await parts.rows.find("box")
    stranger = subprocess.Popen(["sleep", "600"])
    while start_ticks(stranger.pid) == row.pid_start:  # a tick is 10 ms
        stranger.kill()
        stranger.wait()
        stranger = subprocess.Popen(["sleep", "600"])
    await parts.rows.update(replace(row, pid=stranger.pid))
    later = await _restart(parts)
    assert (await later.vms.get("box"))["state"] == "stopped"
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()
    # The real one belonged to nobody any more, and was ended.
    assert row.process is not None and not row.process.alive()
    await later.close()


@pytest.mark.parametrize("state", ["creating", "deleting"])
async def test_half_made_and_half_deleted_vms_are_removed(parts: Parts, state: str) -> None:
    await parts.vms.create({"name": "box", "start": state == "deleting"}, SINK)
    row = await parts.rows.find("box")
    await parts.rows.update(replace(row, state=state))
    later = await _restart(parts)
    assert await later.vms.all() == []
    assert _left(later) == []
    await later.close()


async def test_a_start_cut_off_before_its_pid_was_committed_is_rolled_back(parts: Parts) -> None:
    await parts.vms.create({"name": "box", "start": True}, SINK)
    row = await parts.rows.find("box")
    await parts.rows.update(
        replace(row, state="starting", pid=None, pid_start=None, boot_id=None, started_at=None)
    )
    later = await _restart(parts)
    assert (await later.vms.get("box"))["state"] == "stopped"
    assert find_by_argument(f"{later.layout.runtime_vms}/") == []
    await later.vms.start("box", SINK)
    await later.close()


async def test_a_start_cut_off_behind_its_pid_is_carried_through(parts: Parts) -> None:
    await parts.vms.create({"name": "box", "start": True}, SINK)
    row = await parts.rows.find("box")
    await parts.rows.update(replace(row, state="starting"))
    later = await _restart(parts)
    async with asyncio.timeout(20):
        while (await later.vms.get("box"))["state"] != "running":
            await asyncio.sleep(0.02)
    await later.close()


async def test_a_stop_cut_off_is_carried_through(parts: Parts) -> None:
    await parts.vms.create({"name": "box", "start": True}, SINK)
    row = await parts.rows.find("box")
    await parts.rows.update(replace(row, state="stopping"))
    later = await _restart(parts)
    async with asyncio.timeout(60):
        while (await later.vms.get("box"))["state"] != "stopped":
            await asyncio.sleep(0.02)
    assert row.process is not None and not row.process.alive()
    await later.close()


async def test_directories_nobody_owns_are_removed(parts: Parts) -> None:
    await parts.vms.create({"name": "box"}, SINK)
    for directory in (parts.layout.vms, parts.layout.runtime_vms):
        (directory / "deadbeef0000").mkdir()
        (directory / "deadbeef0000" / "file").write_text("left by a crash")
    later = await _restart(parts)
    assert not (later.layout.vms / "deadbeef0000").exists()
    assert not (later.layout.runtime_vms / "deadbeef0000").exists()
    assert [vm["name"] for vm in await later.vms.all()] == ["box"]
    await later.close()


async def test_an_exec_goes_on_while_the_daemon_restarts(parts: Parts) -> None:
    await parts.vms.create({"name": "box", "start": True}, SINK)
    endpoint = parts.vmm.endpoint(parts.layout.vm((await parts.rows.find("box")).id).runtime)
    running = asyncio.create_task(
        asyncio.to_thread(
            agent.capture_exec, endpoint, [b"sh", b"-c", b"sleep 1; echo done"], timeout_s=30
        )
    )
    await asyncio.sleep(0.3)
    later = await _restart(parts)
    status, out, _ = await running
    assert (status.exit_code, out) == (0, b"done\n")
    await later.close()


async def test_two_first_starts_at_once_make_one_key_and_both_come_up(parts: Parts) -> None:
    """The key's lock is held over an await: waited for in the loop, it stopped the whole daemon."""
    both = await asyncio.wait_for(
        asyncio.gather(*(parts.vms.create({"name": n, "start": True}, NullSink()) for n in "ab")),
        60,
    )
    assert [vm["state"] for vm in both] == ["running", "running"]


async def test_a_network_that_cannot_be_is_told_before_anything_is_made(parts: Parts) -> None:
    parts.commands.environment["PATH"] = "/nonexistent"
    for network, program in (("user", "passt"), ("bridge", "ip")):
        with pytest.raises(Unavailable, match=f"program {program} is not installed"):
            await parts.vms.create({"name": "box", "network": network}, SINK)
    assert await parts.rows.all() == []
    assert _left(parts) == []
