"""The composition root: every part is built here, once, from config and probes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from banger.config import Config, load_config, size_of
from banger.daemon.handlers import Handlers, Services
from banger.host.commands import HostCommands
from banger.images.artifacts import sweep_staging
from banger.services.artifact_sources import ImageSource, KernelSource
from banger.services.artifacts import ArtifactService
from banger.services.boot import BootFiles
from banger.services.identity import IdentityService
from banger.services.operations import OperationManager
from banger.services.reconcile import reconcile
from banger.services.vms import VmDefaults, VmService
from banger.store.database import Database
from banger.store.layout import Layout
from banger.store.vms import VmRepository
from banger.types import (
    HostLimits,
    default_disk_size_bytes,
    default_memory_bytes,
    default_vcpu,
    host_limits,
)
from banger.vmm.base import Vmm
from banger.vmm.probe import probe_kvm
from banger.vmm.qemu import Qemu

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Daemon:
    """All parts, and the order in which they end."""

    layout: Layout
    log_level: str
    database: Database
    rows: VmRepository
    vms: VmService
    operations: OperationManager
    handlers: Handlers

    async def reconcile(self) -> None:
        """Make what is on record and what exists agree."""
        for name in sweep_staging(self.layout.data):
            log.warning("removed half an artifact: %s", name)
        await reconcile(self.rows, self.vms, self.layout)

    async def cancel_operations(self) -> None:
        """Cancel what runs; each sweeps what it began."""
        await self.operations.close()

    async def close(self) -> None:
        """End everything but the VMs."""
        await self.operations.close()
        await self.vms.close()
        await self.database.close()


async def wire(layout: Layout, stop_daemon: Callable[[], None]) -> Daemon:
    """Build the daemon's parts; raises what a damaged config or database raises."""
    config = load_config(str(layout.config))
    commands = HostCommands()
    database = Database(layout.database)
    await database.open()
    rows = VmRepository(database)
    mirror = config.debian_mirror or None

    async def image_users(name: str) -> list[str]:
        return await vms.used_by("image", name)

    async def kernel_users(name: str) -> list[str]:
        return await vms.used_by("kernel", name)

    images = ArtifactService(ImageSource(layout.data, layout.cache, commands, mirror), image_users)
    kernels = ArtifactService(
        KernelSource(layout.data, layout.cache, commands, mirror), kernel_users
    )
    limits = host_limits(str(layout.data))
    vmms: dict[str, Vmm] = {"qemu": Qemu(commands, config.qemu_bin)}
    ssh_key = Path(config.ssh_key_path).expanduser() if config.ssh_key_path else None
    vms = VmService(
        rows=rows,
        layout=layout,
        vmms=vmms,
        kvm=probe_kvm(),
        images=images,
        kernels=kernels,
        boot=BootFiles(layout, commands, tuple(config.default_dns)),
        identity=IdentityService(layout, commands, ssh_key or layout.default_ssh_key),
        defaults=_defaults(config, limits),
        limits=limits,
    )
    operations = OperationManager()
    services = Services(vms, images, kernels, operations, str(layout.data), stop_daemon)
    return Daemon(layout, config.log_level, database, rows, vms, operations, Handlers(services))


def _defaults(config: Config, limits: HostLimits) -> VmDefaults:
    vm = config.vm
    return VmDefaults(
        image=config.default_image_name,
        kernel=config.default_kernel_name,
        vcpu=vm.vcpu or default_vcpu(limits),
        memory_bytes=size_of(vm.memory) if vm.memory else default_memory_bytes(limits),
        disk_size_bytes=size_of(vm.disk_size) if vm.disk_size else default_disk_size_bytes(limits),
        vmm=config.vmm,
        network=config.network,
    )
