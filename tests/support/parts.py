"""The daemon's parts over the fake VMM: all real but the machine and the artifacts' content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from banger.errors import NotFound
from banger.events import EventSink
from banger.guest.boot import GuestNetwork
from banger.host.commands import HostCommands
from banger.network.bridge import BridgeNetwork
from banger.network.plan import parse_bridge
from banger.paths import Paths
from banger.services.artifacts import ArtifactService, Wire
from banger.services.boot import BootFiles
from banger.services.file_sync import UserFiles
from banger.services.identity import IdentityService
from banger.services.networks import NetworkService
from banger.services.vms import VmDefaults, VmService
from banger.store.database import Database
from banger.store.layout import Layout, VmFiles
from banger.store.vms import VmRepository, VmRow
from banger.types import HostLimits
from banger.vmm.base import Vmm, VmSpec
from banger.vmm.firecracker import Firecracker
from banger.vmm.probe import KvmProbe
from banger.vmm.select import VmmChoice
from tests.support.fake_vmm import FakeVmm


class StubSource:
    """Artifacts by name only; `pulled` counts what was made."""

    def __init__(self, kind: str, installed: list[str]) -> None:
        self.kind = kind
        self.pulled: list[str] = []
        self.said: dict[str, Wire] = {}  # more of the shape, by name
        self._installed = installed

    def catalog(self) -> list[str]:
        return ["from-catalog"]

    def installed(self) -> list[str]:
        return sorted(self._installed)

    def wire(self, name: str) -> Wire:
        return {"name": name, "installed": name in self._installed, **self.said.get(name, {})}

    async def pull(self, name: str, sink: EventSink, *, force: bool) -> None:
        sink.stage(f"pull {name}")
        self.pulled.append(name)
        self._installed.append(name)

    def delete(self, name: str) -> None:
        if name not in self._installed:
            raise NotFound(name)
        self._installed.remove(name)


class PlainBoot(BootFiles):
    """Boot files without a kernel: the fake VMM only looks that they are there."""

    async def prepare(
        self,
        row: VmRow,
        vm_files: VmFiles,
        choice: VmmChoice,
        authorized_key: str,
        *,
        guest_network: GuestNetwork | None,
        drives_by_serial: bool,
        environment: Mapping[str, str],
    ) -> VmSpec:
        return self._plain(row, vm_files, choice)

    async def prepare_export(
        self,
        row: VmRow,
        vm_files: VmFiles,
        choice: VmmChoice,
        authorized_key: str,
        *,
        drives_by_serial: bool,
    ) -> VmSpec:
        return self._plain(row, vm_files, choice)

    def _plain(self, row: VmRow, vm_files: VmFiles, choice: VmmChoice) -> VmSpec:
        present = vm_files.directory / "present"
        present.write_bytes(b"")
        vm_files.initramfs.write_bytes(b"")
        return VmSpec(
            directory=vm_files.directory,
            id=row.id,
            vcpu=row.vcpu,
            memory_bytes=row.memory_bytes,
            accel=choice.accel,
            kernel=present,
            initramfs=vm_files.initramfs,
            command_line="",
            base_disk=present,
            own_disk=vm_files.disk,
            modules_disk=present,
            runtime=vm_files.runtime,
            console_log=vm_files.console_log,
            vmm_log=vm_files.vmm_log,
            network=None,
        )


def _no_firecracker(commands: HostCommands) -> Firecracker:
    return Firecracker(commands, lambda: None, lambda: None, jailed=False)


class Parts:
    """One life of a daemon: make another one over the same directory to restart it."""

    def __init__(self, root: Path, vmm: Vmm | None = None) -> None:
        # As the product's, the last directory says whose: tests that run beside each other must
        # not take each other's processes for a crash's orphans.
        whose = hashlib.blake2b(os.fsencode(root), digest_size=5).hexdigest()
        self.layout = Layout.of(
            Paths(*(str(root / name) for name in ("config", "data", "state", "cache", whose)))
        )
        for directory in (self.layout.vms, self.layout.runtime_vms, self.layout.state):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.commands = HostCommands()
        self.database = Database(self.layout.database)
        self.rows = VmRepository(self.database)
        self.vmm = vmm or FakeVmm()
        self.image_source = StubSource("image", ["tiny"])
        self.kernel_source = StubSource("kernel", ["tiny"])

        async def image_users(name: str) -> list[str]:
            return await self.vms.used_by("image", name)

        async def kernel_users(name: str) -> list[str]:
            return await self.vms.used_by("kernel", name)

        plan = parse_bridge("br-banger", "172.16.0.1", "172.16.0.0/29")
        self.networks = NetworkService(
            self.commands,
            BridgeNetwork(self.commands, plan, pool_size=0, tap_uid=os.getuid()),
            plan,
            self.rows.all,
            (),
        )
        self.images = ArtifactService(self.image_source, image_users)
        self.kernels = ArtifactService(self.kernel_source, kernel_users)
        self.vms = VmService(
            rows=self.rows,
            layout=self.layout,
            # `auto` chooses qemu: the fake stands in its place.
            vmms={"qemu": self.vmm, "firecracker": _no_firecracker(self.commands)},
            kvm=KvmProbe(False, "a test has none"),
            networks=self.networks,
            images=self.images,
            kernels=self.kernels,
            boot=PlainBoot(self.layout, self.commands),
            identity=IdentityService(self.layout, self.commands, self.layout.default_ssh_key),
            user_files=UserFiles(self.layout.data.parent / "home", logins=True),
            defaults=VmDefaults(
                image="tiny",
                kernel="tiny",
                vcpu=1,
                memory_bytes=256 << 20,
                disk_size_bytes=256 << 20,
                vmm="auto",
                network="none",
                nat=True,
                isolated=True,
                boot_timeout_s=None,
            ),
            limits=HostLimits(cpus=2, memory_bytes=8 << 30, disk_free_bytes=1 << 40),
            jailer_uid_base=1_900_000_000,
        )

    async def open(self) -> Parts:
        """Open the database."""
        await self.database.open()
        return self

    async def close(self) -> None:
        """End as a daemon that is told to; VMs go on."""
        await self.vms.close()
        await self.database.close()
