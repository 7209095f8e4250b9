"""The composition root: every part is built here, once, from config and probes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from banger.catalog.extra import load as load_catalogs
from banger.config import Config, load_config, size_of
from banger.daemon.handlers import Handlers, Services
from banger.errors import BangerError
from banger.events import EventSink
from banger.host.commands import HostCommands
from banger.images.artifacts import sweep_staging
from banger.images.blobcache import BlobCache
from banger.images.credentials import Credentials
from banger.images.layers import Limits
from banger.images.oci import BlobSource
from banger.images.reference import RegistryRef
from banger.images.registry import RegistrySettings, open_registry
from banger.network.bridge import BridgeNetwork
from banger.network.dns import NameServer
from banger.network.plan import parse_bridge
from banger.services.artifact_sources import ImageSource, KernelSource
from banger.services.boot import BootFiles
from banger.services.file_sync import UserFiles
from banger.services.identity import IdentityService
from banger.services.image_store import ImageStore
from banger.services.images import ImageService, ImportParts
from banger.services.kernels import KernelService
from banger.services.networks import NetworkService
from banger.services.operations import OperationManager
from banger.services.promote import Promoter
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

    catalogs = load_catalogs(config, layout.cache)
    import_parts = _import_parts(config, layout, commands)
    images = ImageService(
        ImageSource(layout.data, layout.cache, commands, mirror, catalogs),
        image_users,
        import_parts,
    )
    kernels = KernelService(KernelSource(layout.data, layout.cache, commands, mirror), kernel_users)
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
        user_files=UserFiles(Path.home(), logins=config.credential_sync, more=config.file_sync),
        defaults=_defaults(config, limits),
        limits=limits,
        jailer_uid_base=config.jailer_uid_base,
    )
    operations = OperationManager()

    async def running_of_image(name: str) -> list[str]:
        return await vms.used_by("image", name, running=True)

    image_store = ImageStore(images, kernels, running_of_image, catalogs, layout.data, commands)
    services = Services(
        vms=vms,
        images=images,
        kernels=kernels,
        image_store=image_store,
        promoter=Promoter(vms, images, kernels, import_parts),
        operations=operations,
        data_dir=str(layout.data),
        stop_daemon=stop_daemon,
    )
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


def _import_parts(config: Config, layout: Layout, commands: HostCommands) -> ImportParts:
    settings = RegistrySettings.of(config.registries)
    blobs = BlobCache(layout.cache / "blobs", size_of(config.blob_cache_size))
    limits = config.import_limits

    def open_for(ref: RegistryRef, sink: EventSink) -> AbstractAsyncContextManager[BlobSource]:
        credentials = Credentials(os.environ, Path.home(), commands, warn=sink.warning)
        return open_registry(
            ref, settings=settings, credentials=credentials, cache=blobs, sink=sink
        )

    return ImportParts(
        data_dir=layout.data,
        commands=commands,
        limits=Limits(
            max_entries=limits.max_entries,
            max_bytes=size_of(limits.max_size),
            max_depth=limits.max_depth,
            max_expansion=limits.max_expansion,
        ),
        open_registry=open_for,
        blobs=blobs,
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
