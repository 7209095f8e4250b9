"""What a VM boots from: its disk, its initramfs, its kernel command line.

Owns the facts of a boot (serial console, clock, addresses of QEMU's user network); leaves the
formats to `images.ext4` and `guest.boot`.
"""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass
from pathlib import Path

from banger.guest.boot import GuestNetwork, base_segment, boot_config, write_initramfs
from banger.host.commands import HostCommands
from banger.images.ext4 import make_disk
from banger.store.layout import Layout, VmFiles
from banger.store.vms import VmRow
from banger.vmm.base import NetworkSpec, VmSpec
from banger.vmm.select import VmmChoice

# QEMU's user network: docs/system/devices/net.rst, "Using the user mode network stack".
_USER_NETWORK = GuestNetwork("10.0.2.15/24", gateway="10.0.2.2", dns=("10.0.2.3",))


@dataclass(frozen=True, slots=True)
class BootFiles:
    """Makes the files of a boot."""

    layout: Layout
    commands: HostCommands
    dns: tuple[str, ...]  # empty: the network's own

    async def make_disk(self, path: Path, size_bytes: int) -> None:
        """Make a VM's own sparse ext4 disk."""
        await make_disk(path, size_bytes, cache_dir=self.layout.cache, commands=self.commands)

    async def grow_disk(self, path: Path, size_bytes: int) -> None:
        """Grow a stopped VM's disk; the guest's agent grows the file system at the next boot.

        Not resize2fs: a file system that a guest wrote is hostile input, and stays the guest's.
        """
        await asyncio.to_thread(os.truncate, path, size_bytes)

    async def prepare(
        self, row: VmRow, vm_files: VmFiles, choice: VmmChoice, authorized_key: str
    ) -> VmSpec:
        """Write the initramfs of one boot and return the machine to start."""
        kernel = self.layout.data / "kernels" / row.kernel
        segment = await asyncio.to_thread(base_segment, kernel, cache_dir=self.layout.cache)
        network = _USER_NETWORK._replace(dns=self.dns or _USER_NETWORK.dns)
        keys = (vm_files.host_key, vm_files.host_key.with_suffix(".pub"))
        config = boot_config(
            hostname=row.name,
            machine_id=row.machine_id,
            network=network if row.network == "user" else None,
            authorized_key=authorized_key,
            host_keys={key.name: key.read_bytes() for key in keys},
        )
        await asyncio.to_thread(write_initramfs, vm_files.initramfs, segment, config)
        return VmSpec(
            id=row.id,
            vcpu=row.vcpu,
            memory_bytes=row.memory_bytes,
            accel=choice.accel,
            kernel=kernel / "vmlinux",
            initramfs=vm_files.initramfs,
            command_line=kernel_command_line(choice.accel),
            base_disk=self.layout.data / "images" / row.image / "rootfs.ext4",
            own_disk=vm_files.disk,
            modules_disk=kernel / "modules.ext4",
            runtime=vm_files.runtime,
            console_log=vm_files.console_log,
            vmm_log=vm_files.vmm_log,
            network=NetworkSpec(mac=row.mac) if row.network == "user" else None,
        )


def kernel_command_line(accel: str, cpuinfo: str | None = None) -> str:
    """Return the guest kernel's command line.

    `reboot=k` makes a reboot end the VMM; `net.ifnames=0` keeps eth0 eth0 for the agent and
    for udev alike. Under TCG the TSC's rate is told, never calibrated: see DESIGN.md, trap 1.
    """
    words = ["console=ttyS0", "reboot=k", "panic=-1", "quiet", "loglevel=4", "net.ifnames=0"]
    if accel == "tcg":
        text = Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo
        found = re.search(r"^bogomips\s*:\s*([0-9.]+)", text, re.MULTILINE)
        if found:
            words.append(f"tsc_early_khz={round(float(found[1]) * 500)}")
        # Else a busy host makes the watchdog mark it unstable, and the guest's timers fall behind.
        words.append("tsc=reliable")
    return " ".join(words)
