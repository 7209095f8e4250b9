"""Which VMM and which isolation this host can give, and why.

Pure: takes what was probed once, returns the choice or a designed error. What was asked for
is never silently lowered.
"""

from __future__ import annotations

from dataclasses import dataclass

from banger.errors import InvalidInput, Unavailable, nearest
from banger.vmm.probe import KvmProbe

VMM_NAMES = ("auto", "firecracker", "qemu")


@dataclass(frozen=True, slots=True)
class VmmChoice:
    """The VMM to start a VM with, the isolation it gives, and why it is not a better one."""

    vmm: str
    accel: str  # kvm | tcg
    reason: str


def choose_vmm(wanted: str, kvm: KvmProbe, no_firecracker: str) -> VmmChoice:
    """Return what `wanted` (auto or a VMM's name) means on a host with this KVM.

    `no_firecracker` says why Firecracker cannot run here but for KVM; empty where it can.
    Raises InvalidInput for an unknown name, Unavailable for a VMM that cannot run here.
    """
    if wanted not in VMM_NAMES:
        close = nearest(wanted, list(VMM_NAMES))
        raise InvalidInput(
            f"no VMM is named {wanted!r}",
            hint=f"did you mean {close}?" if close else f"choose one of {', '.join(VMM_NAMES)}",
        )
    if wanted == "firecracker":
        if not kvm.usable:
            raise Unavailable(
                f"Firecracker needs KVM, and {kvm.reason}",
                hint="leave --vmm out to emulate with QEMU; `banger doctor` tells more",
            )
        if no_firecracker:
            raise Unavailable(
                no_firecracker, hint="get it: `banger firecracker install`; or `--vmm qemu`"
            )
    if kvm.usable and wanted != "qemu" and not no_firecracker:
        return VmmChoice("firecracker", "kvm", kvm.reason)
    if kvm.usable:
        passed_over = f"; {no_firecracker}" if wanted == "auto" else ""
        return VmmChoice("qemu", "kvm", f"{kvm.reason}{passed_over}")
    return VmmChoice("qemu", "tcg", kvm.reason)
