"""The composition root: every part is built here, once, from config and probes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from banger.config import Config, load_config, size_of
from banger.daemon.handlers import Handlers, Services
from banger.errors import BangerError
from banger.host.commands import HostCommands
from banger.images.artifacts import sweep_staging
from banger.network.bridge import BridgeNetwork
from banger.network.dns import NameServer
from banger.network.plan import parse_bridge
from banger.services.artifact_sources import ImageSource, KernelSource
from banger.services.artifacts import ArtifactService
from banger.services.boot import BootFiles
from banger.services.identity import IdentityService
from banger.services.networks import NetworkService
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
from banger.vmm.firecracker import Firecracker
from banger.vmm.firecracker_release import find_firecracker, find_jailer
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
    networks: NetworkService
    names: NameServer
    names_listen: str
    operations: OperationManager
    handlers: Handlers

    async def reconcile(self) -> None:
        """Make what is on record and what exists agree."""
        for name in sweep_staging(self.layout.data):
            log.warning("removed half an artifact: %s", name)
        await reconcile(self.rows, self.vms, self.networks, self.layout)

    async def answer_names(self) -> None:
        """Begin to answer `<vm>.vm`; a taken address is worth a warning, not the daemon."""
        if not self.names_listen:
            return
        try:
            await self.names.start(self.names_listen)
            await self.networks.register_names(self.names_listen)
        except BangerError as error:
            log.warning("names are not answered: %s", error.message)

    async def cancel_operations(self) -> None:
        """Cancel what runs; each sweeps what it began."""
        await self.operations.close()

    async def close(self) -> None:
        """End everything but the VMs."""
        await self.operations.close()
        await self.names.close()
        await self.vms.close()
        await self.networks.close()
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
    vmms: dict[str, Vmm] = {
        "qemu": Qemu(commands, config.qemu_bin),
        "firecracker": Firecracker(
            commands,
            lambda: find_firecracker(commands, config.firecracker_bin, layout.data),
            lambda: find_jailer(commands, config.jailer_bin, layout.data),
            jailed=os.getuid() == 0 and config.jailer_enabled,
        ),
    }
    plan = parse_bridge(config.bridge_name, config.bridge_ip, config.cidr)
    bridge = BridgeNetwork(commands, plan, pool_size=config.tap_pool_size, tap_uid=os.getuid())
    networks = NetworkService(commands, bridge, plan, rows.all, config.default_dns)
    ssh_key = Path(config.ssh_key_path).expanduser() if config.ssh_key_path else None
    vms = VmService(
        rows=rows,
        layout=layout,
        vmms=vmms,
        kvm=probe_kvm(),
        networks=networks,
        images=images,
        kernels=kernels,
        boot=BootFiles(layout, commands),
        identity=IdentityService(layout, commands, ssh_key or layout.default_ssh_key),
        defaults=_defaults(config, limits),
        limits=limits,
        jailer_uid_base=config.jailer_uid_base,
    )
    operations = OperationManager()
    services = Services(vms, images, kernels, operations, str(layout.data), stop_daemon)
    return Daemon(
        layout=layout,
        log_level=config.log_level,
        database=database,
        rows=rows,
        vms=vms,
        networks=networks,
        names=NameServer(networks.find_name),
        names_listen=config.dns_listen_addr,
        operations=operations,
        handlers=Handlers(services),
    )


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
        nat=config.bridge_nat,
        isolated=config.bridge_isolation,
        boot_timeout_s=vm.boot_timeout_s,
    )
