"""The life of a VM: create, start, stop, kill, delete, and what is known of it.

Owns the order of steps (intent in the database, then the resource, then the commit) and the
watch over running VMMs. Leaves processes to `vmm`, rows to `store`, boot files to `guest`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import secrets
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from banger.api.models import Endpoint, Pruned, Vm, VmConnection, VmCreate, VmSet, VmStats
from banger.errors import (
    BangerError,
    Cancelled,
    Conflict,
    Corrupted,
    InvalidInput,
    NotFound,
    TimedOut,
    Unavailable,
    VmmFailed,
)
from banger.events import EventSink, NullSink
from banger.guest import agent
from banger.guest.transport import Endpoint as AgentEndpoint
from banger.guest.transport import endpoint_to_wire
from banger.host import files
from banger.host.process import ProcessIdentity, boot_id
from banger.host.tasks import together
from banger.services import file_sync
from banger.services.artifacts import ArtifactService, Wire
from banger.services.boot import BootFiles
from banger.services.file_sync import UserFiles
from banger.services.identity import IdentityService
from banger.services.networks import NetworkService, check_network, publish_text
from banger.services.vm_states import check_transition
from banger.store.layout import Layout, VmFiles
from banger.store.vms import VmRepository, VmRow, name_taken
from banger.types import (
    HostLimits,
    check_disk_size,
    check_memory,
    check_vcpu,
    check_vm_name,
    generate_name,
)
from banger.vmm.base import Vmm, mark_of
from banger.vmm.probe import KvmProbe
from banger.vmm.select import VmmChoice, choose_vmm

log = logging.getLogger(__name__)

# A full Debian answers in 3-6 s under TCG on an idle host and 1 s under KVM; tests run several
# at once on two cores. A boot past its limit is tried once more (DESIGN.md, known trap 1).
BOOT_TIMEOUT_S = {"kvm": 45.0, "tcg": 180.0}
STOP_TIMEOUT_S = {"kvm": 30.0, "tcg": 90.0}
_BOOT_TRIES = 2
_LOG_CHECK_INTERVAL_S = 5.0
_LOG_LIMIT_BYTES = 4 << 20
_LOG_KEPT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class VmDefaults:
    """What a new VM gets where nothing is asked for."""

    image: str
    kernel: str
    vcpu: int
    memory_bytes: int
    disk_size_bytes: int
    vmm: str
    network: str
    nat: bool
    isolated: bool
    boot_timeout_s: float | None


class VmService:
    """Use cases on VMs. Every public method takes a VM by name or id."""

    def __init__(
        self,
        *,
        rows: VmRepository,
        layout: Layout,
        vmms: Mapping[str, Vmm],
        kvm: KvmProbe,
        networks: NetworkService,
        images: ArtifactService,
        kernels: ArtifactService,
        boot: BootFiles,
        identity: IdentityService,
        user_files: UserFiles,
        defaults: VmDefaults,
        limits: HostLimits,
        jailer_uid_base: int,
    ) -> None:
        self._rows = rows
        self._layout = layout
        self._vmms = vmms
        self._kvm = kvm
        self._networks = networks
        self._images = images
        self._kernels = kernels
        self._boot = boot
        self._identity = identity
        self._user_files = user_files
        self.defaults = defaults
        self._limits = limits
        self._jailer_uid_base = jailer_uid_base
        # Held while what is unique among rows (addresses, uids) is chosen and committed.
        self._unique = asyncio.Lock()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._read: set[str] = set()  # VMs whose VMM serves an image's making, and nobody else

    # --- reading ---

    async def all(self) -> list[Vm]:
        """Return every VM, oldest first."""
        return [self._wire(row) for row in await self._rows.all()]

    async def get(self, name: str) -> Vm:
        """Return one VM."""
        return self._wire(await self._rows.find(name))

    async def connection(self, name: str) -> VmConnection:
        """Return how to reach a running VM's agent; raise Conflict when it does not run."""
        row = await self._rows.find(name)
        usable = row.state == "running" or (row.state == "stopping" and row.id not in self._read)
        if not usable or row.running_vmm is None:
            raise Conflict(
                f"{row.name} is {row.state}" + (f" ({row.state_reason})" * bool(row.state_reason)),
                hint=f"start it with `banger vm start {row.name}`",
                code="not_running",
            )
        endpoint = self._vmms[row.running_vmm].endpoint(self._layout.vm(row.id).runtime)
        wire = cast("Endpoint", endpoint_to_wire(endpoint))
        return {"vm": self._wire(row), "endpoint": wire}

    async def stats(self, name: str) -> VmStats:
        """Return what a VM costs the host now."""
        row = await self._rows.find(name)
        usage = row.process.usage() if row.process else None
        started = datetime.fromisoformat(row.started_at) if row.started_at else None
        return {
            "name": row.name,
            "state": row.state,  # type: ignore[typeddict-item]  # the table checks it
            "cpu_seconds": usage.cpu_seconds if usage else 0.0,
            "memory_bytes": usage.memory_bytes if usage else 0,
            "disk_used_bytes": _allocated(self._layout.vm(row.id)),
            "uptime_s": (datetime.now(UTC) - started).total_seconds() if started else 0.0,
        }

    async def used_by(self, column: str, artifact: str, *, running: bool = False) -> list[str]:
        """Return the names of VMs whose `image` or `kernel` is this artifact.

        With `running` those only that have a VMM, or are about to.
        """
        rows = [row for row in await self._rows.all() if getattr(row, column) == artifact]
        return [row.name for row in rows if not running or row.state != "stopped"]

    @property
    def choice(self) -> VmmChoice:
        """What a VM of the default VMM runs with on this host."""
        return self._choose(self.defaults.vmm)

    def _choose(self, wanted: str) -> VmmChoice:
        # Asked each time: `banger firecracker install` needs no new daemon.
        no_firecracker = ""
        try:
            self._vmms["firecracker"].check()
        except Unavailable as error:
            no_firecracker = error.message
        return choose_vmm(wanted, self._kvm, no_firecracker)

    # --- making and unmaking ---

    async def create(self, request: VmCreate, sink: EventSink) -> Vm:
        """Make a VM, pulling what is absent, and start it when asked; see `api.models.VmCreate`."""
        taken = {row.name for row in await self._rows.all()}
        name = request.get("name") or generate_name(taken)
        check_vm_name(name)
        if name in taken:
            raise name_taken(name)
        row = VmRow(
            id=secrets.token_hex(6),
            name=name,
            state="creating",
            image=request.get("image", self.defaults.image),
            kernel=request.get("kernel", self.defaults.kernel),
            vcpu=check_vcpu(request.get("vcpu", self.defaults.vcpu), self._limits),
            memory_bytes=check_memory(
                request.get("memory_bytes", self.defaults.memory_bytes), self._limits
            ),
            disk_size_bytes=check_disk_size(
                request.get("disk_size_bytes", self.defaults.disk_size_bytes)
            ),
            vmm=request.get("vmm", self.defaults.vmm),
            network=check_network(request.get("network", self.defaults.network)),
            nat=request.get("nat", self.defaults.nat),
            isolated=request.get("isolated", self.defaults.isolated),
            publish=publish_text(request.get("publish", [])),
            credentials=request.get("credentials", True),
            machine_id=secrets.token_hex(16),
            mac=_random_mac(),
            created_at=_now(),
            owner_pid=request.get("owner_pid"),
            owner_start=_owner_start(request.get("owner_pid")),
        )
        # Before minutes of pulling: can this host run it at all.
        self._vmms[self._choose(row.vmm).vmm].check()
        await self._networks.check(row.network)
        if request.get("start", False):
            await self._networks.check_ports(row)
        row = await self._ensure_artifacts(row, request, sink)
        sink.stage(f"create {name}")
        async with self._locks[row.id]:
            row = await self._make(row)
        self._watch_owner(row)
        if not request.get("start", False):
            return self._wire(row)
        try:
            return await self.start(row.id, sink)
        except BaseException as error:
            # A `vm run` that did not come up leaves nothing behind but what tells why.
            await asyncio.to_thread(self._keep_logs, self._layout.vm(row.id))
            if isinstance(error, VmmFailed | TimedOut):
                # Where its logs are now; what else a hint says stays.
                kept = str(self._layout.last_failed_boot)
                error.hint = error.hint.replace(str(self._layout.vm(row.id).directory), kept)
                error.hint = error.hint or f"its console and log: {kept}"
            with contextlib.suppress(NotFound):  # deleted by somebody else meanwhile
                await self.delete(row.id)
            raise

    async def _ensure_artifacts(self, row: VmRow, request: VmCreate, sink: EventSink) -> VmRow:
        """Have a VM's image and kernel installed, and give its row what the image decides."""
        name = row.image

        async def have_image() -> None:
            nonlocal name
            name = await self._images.ensure_source(row.image, sink)

        if not await self._images.is_installed(row.image):
            # Both at once: the kernel is small and waits for nobody.
            await together(have_image(), self._kernels.ensure(row.kernel, sink))
        image = await self._images.read(name)
        row = replace(row, image=name, kernel=_kernel_for(row, request, image))
        await self._kernels.ensure(row.kernel, sink)
        # An imported image knows its platform. Those of the catalog have an sshd of their own.
        imported = bool(image.get("platform"))
        return replace(row, with_sshd=request.get("with_sshd", imported))

    def _keep_logs(self, vm_files: VmFiles) -> None:
        kept = files.make_private_directory(self._layout.last_failed_boot)
        for log_file in (vm_files.console_log, vm_files.vmm_log):
            with contextlib.suppress(OSError):
                os.replace(log_file, kept / log_file.name)

    async def _make(self, row: VmRow) -> VmRow:
        """Make a VM's files under a row that says so; on failure neither is left."""
        vm_files = self._layout.vm(row.id)
        async with self._unique:
            row = self._networks.lease(row, await self._rows.all())
            await self._rows.insert(row)
        try:
            with files.no_space_named(self._layout.vms):
                files.make_private_directory(vm_files.directory)
                await together(
                    self._boot.make_disk(vm_files.disk, row.disk_size_bytes),
                    self._identity.make_host_key(vm_files.host_key),
                )
            row = await self._rows.update(replace(row, state="stopped"))
        except BaseException:
            await self._unmake(row)
            raise
        self._identity.write_known_hosts(await self._rows.all())
        return row

    async def _unmake(self, row: VmRow) -> None:
        vm_files = self._layout.vm(row.id)
        await self._clear(row)
        await asyncio.to_thread(files.remove_tree, vm_files.directory)
        await self._rows.delete(row.id)
        self._identity.write_known_hosts(await self._rows.all())

    async def delete(self, name: str) -> None:
        """Delete a VM and everything of it, killing it when it runs."""
        row = await self._rows.find(name)
        await self._interrupt(row)
        async with self._locked(row.id) as row:
            check_transition(row.name, row.state, "deleting")
            row = await self._rows.update(replace(row, state="deleting"))
            await self.finish_delete(row)
        self._locks.pop(row.id, None)

    async def finish_delete(self, row: VmRow) -> None:
        """Carry out a deletion that is on record."""
        if row.process is not None and row.running_vmm is not None:
            await self._vmms[row.running_vmm].kill(row.process)
        await self._unmake(row)

    async def set(self, name: str, request: VmSet) -> Vm:
        """Change a VM: its name at any time, its sizes and network while it is stopped."""
        row = await self._rows.find(name)
        async with self._locked(row.id) as row:
            changed = row
            if "name" in request:
                changed = replace(changed, name=check_vm_name(request["name"]))
            if "vcpu" in request:
                changed = replace(changed, vcpu=check_vcpu(request["vcpu"], self._limits))
            if "memory_bytes" in request:
                memory = check_memory(request["memory_bytes"], self._limits)
                changed = replace(changed, memory_bytes=memory)
            if "network" in request:
                changed = replace(changed, network=check_network(request["network"]))
                await self._networks.check(changed.network)
            changed = replace(
                changed,
                nat=request.get("nat", changed.nat),
                isolated=request.get("isolated", changed.isolated),
                publish=publish_text(request.get("publish", changed.publish.split())),
            )
            if "disk_size_bytes" in request:
                size = check_disk_size(request["disk_size_bytes"])
                changed = replace(changed, disk_size_bytes=size)
            if replace(changed, name=row.name) != row and row.state != "stopped":
                raise Conflict(
                    f"{row.name} is {row.state}: only its name can change now",
                    hint=f"stop it first: `banger vm stop {row.name}`",
                )
            if changed.disk_size_bytes < row.disk_size_bytes:
                raise Conflict(
                    f"the disk of {row.name} cannot shrink", hint="make a new VM with --disk-size"
                )
            if changed.disk_size_bytes > row.disk_size_bytes:
                await self._boot.grow_disk(self._layout.vm(row.id).disk, changed.disk_size_bytes)
            async with self._unique:
                changed = self._networks.lease(changed, await self._rows.all())
                row = await self._rows.update(changed)
            self._identity.write_known_hosts(await self._rows.all())
        return self._wire(row)

    async def prune(self, *, everything: bool, dry_run: bool, sink: EventSink) -> Pruned:
        """Delete stopped VMs, or all of them; report their names and the bytes freed."""
        doomed = [r for r in await self._rows.all() if everything or r.state == "stopped"]
        freed = sum(_allocated(self._layout.vm(row.id)) for row in doomed)
        for row in doomed if not dry_run else []:
            sink.stage(f"delete {row.name}")
            with contextlib.suppress(NotFound):
                await self.delete(row.id)
        return {"vms": [row.name for row in doomed], "freed_bytes": freed}

    # --- running ---

    async def start(self, name: str, sink: EventSink) -> Vm:
        """Boot a VM and return once its agent answers; running already is fine."""
        row = await self._rows.find(name)
        async with self._locked(row.id) as row:
            if row.state == "running":
                return self._wire(row)
            check_transition(row.name, row.state, "starting")
            vm_files = self._layout.vm(row.id)
            if not vm_files.disk.exists():
                raise Corrupted(
                    f"the disk of {row.name} is gone: {vm_files.disk}",
                    hint=f"put it back, or `banger vm delete {row.name}`",
                )
            choice = self._choose(row.vmm)
            image = await self._images.read(row.image)
            await self._kernels.check(row.kernel)
            authorized_key = await self._identity.authorized_key()
            row = await self._make_unique(row, jailed=self._vmms[choice.vmm].capabilities.jailed)
            for attempt in range(1, _BOOT_TRIES + 1):
                row = await self._rows.update(
                    replace(
                        row.without_process("starting", ""),
                        running_vmm=choice.vmm,
                        accel=choice.accel,
                        accel_reason=choice.reason,
                    )
                )
                sink.stage(f"boot {row.name} ({choice.vmm}, {choice.accel})")
                try:
                    row = await self._boot_once(row, choice, authorized_key, image, sink)
                    break
                except TimedOut:
                    if attempt == _BOOT_TRIES:
                        raise
                    sink.warning(f"{row.name} did not come up in time; trying once more")
        self._watch(row)
        return self._wire(row)

    async def _boot_once(
        self, row: VmRow, choice: VmmChoice, authorized_key: str, image: Wire, sink: EventSink
    ) -> VmRow:
        vm_files = self._layout.vm(row.id)
        vmm = self._vmms[choice.vmm]
        process: ProcessIdentity | None = None
        try:
            with files.no_space_named(self._layout.vms):
                files.make_private_directory(vm_files.runtime)
                vm_files.console_log.write_bytes(b"")
                vm_files.vmm_log.write_bytes(b"")
                spec = await self._boot.prepare(
                    row,
                    vm_files,
                    choice,
                    authorized_key,
                    guest_network=self._networks.guest_network(row),
                    drives_by_serial=vmm.capabilities.drives_by_serial,
                    environment=image.get("env", {}),
                )
            joined = await self._networks.join(row, self._rows.update)
            row = joined.row
            process = await vmm.start(replace(spec, network=joined.spec))
            row = await self._rows.update(
                replace(
                    row,
                    boot_id=process.boot_id,
                    pid=process.pid,
                    pid_start=process.start_ticks,
                    started_at=_now(),
                )
            )
            endpoint = vmm.endpoint(vm_files.runtime)
            await self._networks.publish(row, process, endpoint, spec.mark)
            return await self.await_agent(row, sink)
        except BaseException as error:
            if process is not None:
                await vmm.kill(process)
            await self._release(row, _reason(error))
            raise

    async def _make_unique(self, row: VmRow, *, jailed: bool) -> VmRow:
        """Give a VM that starts the address and the uid it needs, for good."""
        async with self._unique:
            rows = await self._rows.all()
            changed = self._networks.lease(row, rows)
            if jailed and changed.jail_uid is None:
                taken = {other.jail_uid for other in rows}
                free = (n for n in itertools.count(self._jailer_uid_base) if n not in taken)
                changed = replace(changed, jail_uid=next(free))
            elif not jailed:
                changed = replace(changed, jail_uid=None)
            return row if changed == row else await self._rows.update(changed)

    async def await_agent(self, row: VmRow, sink: EventSink) -> VmRow:
        """Wait for a starting VM's agent, give it the user's files and commit it as running.

        Raises TimedOut past the boot limit and VmmFailed when the VMM ends before; the caller
        ends the VMM.
        """
        process, vmm_name = row.process, row.running_vmm
        if process is None or vmm_name is None:
            raise RuntimeError(f"{row.name} has no process to wait for")
        await self._agent_answers(row, process)
        self._layout.vm(row.id).initramfs.unlink(missing_ok=True)
        if row.credentials:
            row = await self._sync_files(row, vmm_name, sink)
        return await self._rows.update(replace(row, state="running", state_reason=""))

    async def _sync_files(self, row: VmRow, vmm_name: str, sink: EventSink) -> VmRow:
        """Write the user's files into a guest that answers; what fails is a warning."""
        found, warnings = await asyncio.to_thread(self._user_files.read)
        for warning in warnings:
            sink.warning(warning)
        if not found:
            return row
        # On record first, and also when it fails half way: what may be in the guest must not get
        # into an image that is made of it.
        paths = {*json.loads(row.synced), *(file.guest for file in found)}
        row = await self._rows.update(replace(row, synced=json.dumps(sorted(paths))))
        endpoint = self._vmms[vmm_name].endpoint(self._layout.vm(row.id).runtime)
        failed = await asyncio.to_thread(file_sync.write, endpoint, found)
        for guest, why in failed.items():
            sink.warning(f"{row.name} did not get {guest}: {why}")
        return row

    async def _agent_answers(self, row: VmRow, process: ProcessIdentity) -> None:
        vm_files = self._layout.vm(row.id)
        gave_up = threading.Event()

        def stop_waiting() -> bool:
            return gave_up.is_set() or not process.alive()

        waiting = asyncio.create_task(
            asyncio.to_thread(
                agent.wait_ready,
                self._vmms[row.running_vmm or ""].endpoint(vm_files.runtime),
                timeout_s=self._boot_timeout_s(row),
                cancelled=stop_waiting,
            )
        )
        try:
            await asyncio.shield(waiting)
        except asyncio.CancelledError:
            gave_up.set()
            await asyncio.wait([waiting])
            raise
        except (Cancelled, Unavailable) as error:
            raise VmmFailed(
                f"{row.name} ended while booting: {_last_words(vm_files)}",
                hint=f"its console: {vm_files.console_log}",
            ) from error
        except TimedOut as error:
            raise TimedOut(
                f"{row.name} did not answer within {self._boot_timeout_s(row):.0f} s of boot: "
                f"{_last_words(vm_files)}",
                hint="see `banger doctor`; on a slow host set vm.boot_timeout_s in the config",
            ) from error

    def _boot_timeout_s(self, row: VmRow) -> float:
        return self.defaults.boot_timeout_s or BOOT_TIMEOUT_S[row.accel or "tcg"]

    async def stop(self, name: str, sink: EventSink, timeout_s: float | None = None) -> Vm:
        """Shut a VM down through its own init, killing it past the deadline; stopped is fine."""
        row = await self._rows.find(name)
        async with self._locked(row.id) as row:
            if row.state == "stopped":
                return self._wire(row)
            check_transition(row.name, row.state, "stopping")
            row = await self._rows.update(replace(row, state="stopping"))
            limit = STOP_TIMEOUT_S[row.accel or "tcg"] if timeout_s is None else timeout_s
            sink.stage(f"stop {row.name}")
            row = await self.finish_stop(row, limit, sink)
        return self._wire(row)

    async def finish_stop(self, row: VmRow, timeout_s: float, sink: EventSink) -> VmRow:
        """Carry out a stop that is on record."""
        process, vmm_name = row.process, row.running_vmm
        killed = ""
        if process is not None and vmm_name is not None:
            vmm = self._vmms[vmm_name]
            try:
                async with asyncio.timeout(timeout_s):
                    await asyncio.to_thread(
                        agent.shutdown,
                        vmm.endpoint(self._layout.vm(row.id).runtime),
                        timeout_s=min(timeout_s, 15.0),
                    )
                    await process.wait()
            except TimeoutError:
                killed = f"killed: it did not stop within {timeout_s:g} s"
            except BangerError as error:
                killed = f"killed: its agent did not take the request ({error.message})"
            if not process.alive():
                killed = ""  # it was faster than its own answer
            if killed:
                sink.warning(f"{row.name} was {killed}")
            await vmm.kill(process)
        return await self._release(row, killed or "stopped on request")

    async def restart(self, name: str, sink: EventSink, timeout_s: float | None = None) -> Vm:
        """Stop and start a VM."""
        vm = await self.stop(name, sink, timeout_s)
        return await self.start(vm["id"], sink)

    async def kill(self, name: str) -> Vm:
        """End a VM's VMM at once; stopped is fine."""
        row = await self._rows.find(name)
        await self._interrupt(row)
        async with self._locked(row.id) as row:
            if row.state == "stopped":
                return self._wire(row)
            if row.process is not None and row.running_vmm is not None:
                await self._vmms[row.running_vmm].kill(row.process)
            row = await self._release(row, "killed on request")
        return self._wire(row)

    async def _interrupt(self, row: VmRow) -> None:
        """End the VMM outside the lock, so that a start or stop in flight lets go of it."""
        if row.process is not None and row.state in ("starting", "stopping"):
            row.process.kill()

    async def _release(self, row: VmRow, reason: str) -> VmRow:
        """Commit that a VM has no VMM any more and remove its sockets."""
        await self._clear(row)
        row = await self._rows.update(row.without_process("stopped", reason))
        log.info("%s stopped: %s", row.name, reason, extra={"vm": row.id})
        return row

    async def _clear(self, row: VmRow) -> None:
        """Remove what a VM has only while it runs; idempotent."""
        vm_files = self._layout.vm(row.id)
        if row.running_vmm is not None:
            await self._vmms[row.running_vmm].sweep(row.id, vm_files.runtime, vm_files.directory)
        await self._networks.leave(row, mark_of(row.id, vm_files.runtime))
        await asyncio.to_thread(files.remove_tree, vm_files.runtime)
        vm_files.initramfs.unlink(missing_ok=True)

    # --- read while stopped ---

    @asynccontextmanager
    async def read_stopped(self, name: str, sink: EventSink) -> AsyncIterator[AgentEndpoint]:
        """Boot a stopped VM's disks to be read, by an agent that runs nothing of theirs.

        No network, no init; the root file system, freed of the machine's identity, is at
        `boot.EXPORT_ROOT`. The VM is as it was afterwards. Meanwhile its row says stopping: whoever
        finds it so, after a crash too, ends the VMM.
        """
        row = await self._rows.find(name)
        async with self._locked(row.id) as row:
            if row.state != "stopped":
                raise Conflict(
                    f"{row.name} is {row.state}",
                    hint=f"stop it first: `banger vm stop {row.name}`",
                )
            check_transition(row.name, row.state, "stopping")
            vm_files = self._layout.vm(row.id)
            choice = self._choose(row.vmm)
            vmm = self._vmms[choice.vmm]
            await self._images.read(row.image)
            await self._kernels.check(row.kernel)
            row = await self._make_unique(row, jailed=vmm.capabilities.jailed)
            reading = replace(
                row.without_process("stopping", "its disk is read, to make an image of it"),
                running_vmm=choice.vmm,
                accel=choice.accel,
                accel_reason=choice.reason,
            )
            process: ProcessIdentity | None = None
            self._read.add(row.id)
            try:
                await self._rows.update(reading)
                sink.stage(f"boot the disks of {row.name} ({choice.vmm}, {choice.accel})")
                for attempt in range(1, _BOOT_TRIES + 1):
                    try:
                        process, reading = await self._boot_for_reading(reading, vm_files, choice)
                        break
                    except TimedOut:
                        if attempt == _BOOT_TRIES:
                            raise
                        sink.warning(f"{row.name} did not come up in time; trying once more")
                yield vmm.endpoint(vm_files.runtime)
            finally:
                # Nothing was mounted for writing: there is nothing to shut down.
                if process is not None:
                    await vmm.kill(process)
                await self._clear(reading)
                await self._rows.update(row)
                self._read.discard(row.id)

    async def _boot_for_reading(
        self, row: VmRow, vm_files: VmFiles, choice: VmmChoice
    ) -> tuple[ProcessIdentity, VmRow]:
        vmm = self._vmms[choice.vmm]
        with files.no_space_named(self._layout.vms):
            files.make_private_directory(vm_files.runtime)
            vm_files.console_log.write_bytes(b"")
            vm_files.vmm_log.write_bytes(b"")
            spec = await self._boot.prepare_export(
                row,
                vm_files,
                choice,
                await self._identity.authorized_key(),
                drives_by_serial=vmm.capabilities.drives_by_serial,
            )
        process = await vmm.start(spec)
        try:
            row = await self._rows.update(
                replace(
                    row,
                    boot_id=process.boot_id,
                    pid=process.pid,
                    pid_start=process.start_ticks,
                    started_at=_now(),
                )
            )
            await self._agent_answers(row, process)
        except BaseException:
            await vmm.kill(process)
            await self._clear(row)
            raise
        return process, row

    # --- watching ---

    def _watch(self, row: VmRow) -> None:
        """Follow a running VM until its VMM ends."""
        if row.id not in self._watches and row.process is not None:
            self._background(row.id, self._follow(row.id, row.process))

    async def _follow(self, vm_id: str, process: ProcessIdentity) -> None:
        vm_files = self._layout.vm(vm_id)
        ended = asyncio.create_task(process.wait())
        try:
            while not ended.done():
                await asyncio.wait([ended], timeout=_LOG_CHECK_INTERVAL_S)
                # The console, which is the guest's to fill, has a keeper of its own.
                for path in (vm_files.vmm_log, vm_files.metrics_log):
                    await asyncio.to_thread(files.trim_log, path, _LOG_LIMIT_BYTES, _LOG_KEPT_BYTES)
        finally:
            ended.cancel()
        with contextlib.suppress(NotFound):
            async with self._locked(vm_id) as row:
                if row.state == "running" and row.process == process:
                    if row.running_vmm is not None:
                        await self._vmms[row.running_vmm].kill(process)  # reaps it
                    await self._release(row, _why_ended(vm_files))

    def _watch_owner(self, row: VmRow) -> None:
        """Delete an ephemeral VM when the command line that made it is gone."""
        if row.owner_pid is None or row.owner_start is None:
            return
        owner = ProcessIdentity(boot_id(), row.owner_pid, row.owner_start)

        async def follow() -> None:
            await owner.wait()
            with contextlib.suppress(NotFound):
                await self.delete(row.id)
                log.info("%s deleted: its owner is gone", row.name, extra={"vm": row.id})

        self._background(f"{row.id} owner", follow())

    async def close(self) -> None:
        """Stop watching; VMs go on."""
        tasks = list(self._watches.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- after a restart of the daemon ---

    async def readopt(self, row: VmRow) -> None:
        """Take a VM on record as running, starting or stopping up again, or roll it back."""
        process, vmm_name = row.process, row.running_vmm
        if process is None or vmm_name is None or not process.alive():
            await self._release(row, "ended while banger's daemon was away")
        elif row.state == "running":
            self._watch(row)
            self._background(f"{row.id} adopt", self._tell_adopted(row, process, vmm_name))
        else:
            # A start or stop that was under way: carry it through behind the first requests.
            self._background(f"{row.id} step", self._resume_step(row, process, vmm_name))
        self._watch_owner(row)

    async def _tell_adopted(self, row: VmRow, process: ProcessIdentity, vmm_name: str) -> None:
        # Boot id, pid and start time say that it is ours. One that is too busy for its control
        # socket is no reason to end a machine somebody works in.
        answers = await self._vmms[vmm_name].adopt(self._layout.vm(row.id).runtime, process)
        said = "" if answers else "; its VMM does not answer on the control socket"
        log.info("%s adopted%s", row.name, said, extra={"vm": row.id})

    def _background(self, key: str, step: Coroutine[None, None, None]) -> None:
        """Run a step that `close` ends."""
        task = asyncio.create_task(step)
        self._watches[key] = task
        task.add_done_callback(lambda _: self._watches.pop(key, None))

    async def readopt_stopped(self, row: VmRow) -> None:
        """Take up a VM on record as stopped: an ephemeral one still has an owner to watch."""
        self._watch_owner(row)

    async def _resume_step(self, row: VmRow, process: ProcessIdentity, vmm_name: str) -> None:
        async with self._locks[row.id]:
            if row.state == "stopping":
                await self.finish_stop(row, STOP_TIMEOUT_S[row.accel or "tcg"], NullSink())
                return
            try:
                row = await self.await_agent(row, NullSink())
            except BangerError as error:
                await self._vmms[vmm_name].kill(process)
                await self._release(row, _reason(error))
                return
        self._watch(row)

    @asynccontextmanager
    async def _locked(self, vm_id: str) -> AsyncIterator[VmRow]:
        """Hold a VM's lock and its row as it is under that lock."""
        async with self._locks[vm_id]:
            yield await self._rows.find(vm_id)

    def _would_run_with(self, row: VmRow) -> VmmChoice:
        try:
            return self._choose(row.vmm)
        except Unavailable as error:  # what it was made with is gone: say so, list on
            return VmmChoice(row.vmm, row.accel or "kvm", error.message)

    def _wire(self, row: VmRow) -> Vm:
        vm_files = self._layout.vm(row.id)
        choice = self._would_run_with(row)
        return {
            "id": row.id,
            "name": row.name,
            "state": row.state,  # type: ignore[typeddict-item]  # the table checks it
            "state_reason": row.state_reason,
            "vmm": row.running_vmm or choice.vmm,
            "accel": row.accel or choice.accel,  # type: ignore[typeddict-item]
            "accel_reason": row.accel_reason or choice.reason,
            "image": row.image,
            "kernel": row.kernel,
            "vcpu": row.vcpu,
            "memory_bytes": row.memory_bytes,
            "disk_size_bytes": row.disk_size_bytes,
            "disk_used_bytes": _allocated(vm_files),
            "network": row.network,
            "nat": row.nat,
            "isolated": row.isolated,
            "publish": row.publish.split(),
            "address": row.address,
            "dns_name": None if row.address is None else f"{row.name}.vm",
            "with_sshd": row.with_sshd,
            "credentials": row.credentials,
            "synced_files": json.loads(row.synced),
            "ephemeral": row.owner_pid is not None,
            "pid": row.pid,
            "created_at": row.created_at,
            "started_at": row.started_at,
            "directory": str(vm_files.directory),
            "console_log": str(vm_files.console_log),
            "vmm_log": str(vm_files.vmm_log),
        }


def _kernel_for(row: VmRow, request: VmCreate, image: Wire) -> str:
    """Return the kernel asked for, else the one the image names, else the default."""
    return request.get("kernel") or image.get("kernel") or row.kernel


def _random_mac() -> str:
    # 02: locally administered, unicast.
    return ":".join(f"{byte:02x}" for byte in (2, *secrets.token_bytes(5)))


def _owner_start(pid: int | None) -> int | None:
    """Return the start time of an ephemeral VM's owner; raise InvalidInput when it is gone."""
    if pid is None:
        return None
    owner = ProcessIdentity.of(pid)
    if owner is None:
        raise InvalidInput(f"the owner process {pid} is gone")
    return owner.start_ticks


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _reason(error: BaseException) -> str:
    if isinstance(error, BangerError):
        return error.message
    return "cancelled" if isinstance(error, asyncio.CancelledError) else type(error).__name__


def _last_words(vm_files: VmFiles) -> str:
    """Return what explains an end best: the VMM's own words, else the console's."""
    path = vm_files.vmm_log if _size(vm_files.vmm_log) else vm_files.console_log
    return files.last_lines(path)


def _why_ended(vm_files: VmFiles) -> str:
    """Say why a running VM ended: a guest's own shutdown needs no console lines to explain it."""
    if _size(vm_files.vmm_log):
        return f"its VMM ended: {files.last_lines(vm_files.vmm_log)}"
    console = files.last_lines(vm_files.console_log, count=40)
    panic = console.find("Kernel panic")
    return f"its kernel: {console[panic:][:200]}" if panic >= 0 else "the guest shut down by itself"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _allocated(vm_files: VmFiles) -> int:
    try:
        return files.allocated_bytes(vm_files.disk)
    except FileNotFoundError:
        return 0
