"""What a VM boots from: its disk, its initramfs, its kernel command line.

Owns the facts of a boot (serial console, clock, names of the drives); leaves the formats to
`images.ext4` and `guest.boot`, addresses to `services.networks`.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from banger.guest.boot import (
    DRIVES_BY_ORDER,
    DRIVES_BY_SERIAL,
    GuestNetwork,
    base_segment,
    boot_config,
    export_config,
    write_initramfs,
)
from banger.host.commands import HostCommands
from banger.images.ext4 import make_disk
from banger.images.pull import rootfs_path
from banger.store.layout import Layout, VmFiles
from banger.store.vms import VmRow
from banger.vmm.base import VmSpec
from banger.vmm.select import VmmChoice

# Where a guest that was booted for reading (`prepare_export`) has the root file system.
EXPORT_ROOT = b"/newroot"


@dataclass(frozen=True, slots=True)
class BootFiles:
    """Makes the files of a boot."""

    layout: Layout
    commands: HostCommands

    async def make_disk(self, path: Path, size_bytes: int) -> None:
        """Make a VM's own sparse ext4 disk."""
        await make_disk(path, size_bytes, cache_dir=self.layout.cache, commands=self.commands)

    async def grow_disk(self, path: Path, size_bytes: int) -> None:
        """Grow a stopped VM's disk; the guest's agent grows the file system at the next boot.

        Not resize2fs: a file system that a guest wrote is hostile input, and stays the guest's.
        """
        await asyncio.to_thread(os.truncate, path, size_bytes)

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
        """Write the initramfs of one boot and return the machine to start.

        `environment` is what the image says its processes get.
        """
        keys = (vm_files.host_key, vm_files.host_key.with_suffix(".pub"))
        config = boot_config(
            hostname=row.name,
            machine_id=row.machine_id,
            network=guest_network,
            drives=DRIVES_BY_SERIAL if drives_by_serial else DRIVES_BY_ORDER,
            authorized_key=authorized_key,
            host_keys={key.name: key.read_bytes() for key in keys},
            environment=environment,
            with_sshd=row.with_sshd,
        )
        return await self._spec(row, vm_files, choice, config)

    async def prepare_export(
        self,
        row: VmRow,
        vm_files: VmFiles,
        choice: VmmChoice,
        authorized_key: str,
        *,
        drives_by_serial: bool,
    ) -> VmSpec:
        """Write the initramfs of a boot for reading the disks; see `guest.boot.export_config`."""
        config = export_config(
            hostname=row.name,
            authorized_key=authorized_key,
            drives=DRIVES_BY_SERIAL if drives_by_serial else DRIVES_BY_ORDER,
            remove=json.loads(row.synced),
        )
        return await self._spec(row, vm_files, choice, config)

    async def _spec(
        self, row: VmRow, vm_files: VmFiles, choice: VmmChoice, config: dict[str, Any]
    ) -> VmSpec:
        kernel = self.layout.data / "kernels" / row.kernel
        segment = await asyncio.to_thread(base_segment, kernel, cache_dir=self.layout.cache)
        await asyncio.to_thread(write_initramfs, vm_files.initramfs, segment, config)
        return VmSpec(
            id=row.id,
            vcpu=row.vcpu,
            memory_bytes=row.memory_bytes,
            accel=choice.accel,
            kernel=kernel / "vmlinux",
            initramfs=vm_files.initramfs,
            command_line=kernel_command_line(choice.accel, choice.vmm),
            base_disk=await asyncio.to_thread(rootfs_path, self.layout.data, row.image),
            own_disk=vm_files.disk,
            modules_disk=kernel / "modules.ext4",
            directory=vm_files.directory,
            runtime=vm_files.runtime,
            console_log=vm_files.console_log,
            vmm_log=vm_files.vmm_log,
            network=None,
            metrics_log=vm_files.metrics_log,
            jail_uid=row.jail_uid,
        )


def kernel_command_line(accel: str, vmm: str = "qemu", cpuinfo: str | None = None) -> str:
    """Return the guest kernel's command line.

    `reboot=k` makes a reboot end the VMM; `net.ifnames=0` keeps eth0 eth0 for the agent and
    for udev alike. Under TCG the TSC's rate is told, never calibrated: see DESIGN.md, trap 1.
    """
    words = ["console=ttyS0", "reboot=k", "panic=-1", "quiet", "loglevel=4", "net.ifnames=0"]
    if vmm == "firecracker":
        # It has a keyboard controller for the reboot alone, and no PCI: do not look for more.
        words += ["pci=off", "i8042.noaux", "i8042.nomux", "i8042.dumbkbd"]
    if accel == "tcg":
        text = Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo
        found = re.search(r"^bogomips\s*:\s*([0-9.]+)", text, re.MULTILINE)
        if found:
            words.append(f"tsc_early_khz={round(float(found[1]) * 500)}")
        # Else a busy host makes the watchdog mark it unstable, and the guest's timers fall behind.
        words.append("tsc=reliable")
    return " ".join(words)
