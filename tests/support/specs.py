"""A VmSpec over files of made-up content, for tests that boot nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from banger.vmm.base import VmSpec

VM_ID = "c0ffee000001"


def plain_spec(place: Path, **changes: Any) -> VmSpec:
    """Return a machine whose files all lie, or would lie, in `place`."""
    fields: dict[str, Any] = {
        "id": VM_ID,
        "vcpu": 1,
        "memory_bytes": 128 << 20,
        "accel": "kvm",
        "kernel": place / "vmlinux",
        "initramfs": place / "initramfs.img",
        "command_line": "console=ttyS0",
        "base_disk": place / "base.ext4",
        "own_disk": place / "own.ext4",
        "modules_disk": place / "mods.ext4",
        "directory": place,
        "runtime": place / "run",
        "console_log": place / "console.log",
        "vmm_log": place / "vmm.log",
        "network": None,
    }
    return VmSpec(**{**fields, **changes})
