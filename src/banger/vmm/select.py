"""Which VMM and which isolation this host can give, and why.

Pure: takes what was probed once, returns the choice or a designed error. What was asked for
is never silently lowered.
"""

from __future__ import annotations

from dataclasses import dataclass

from banger.errors import InvalidInput, Unavailable, nearest
from banger.vmm.probe import KvmProbe

VMM_NAMES = ("auto", "qemu")


@dataclass(frozen=True, slots=True)
class VmmChoice:
    """The VMM to start a VM with, the isolation it gives, and why it is not a better one."""

    vmm: str
    accel: str  # kvm | tcg
    reason: str


def choose_vmm(wanted: str, kvm: KvmProbe) -> VmmChoice:
    """Return what `wanted` (auto or a VMM's name) means on a host with this KVM.

    Raises InvalidInput for an unknown name.
    """
    if wanted == "firecracker":
        raise Unavailable(
            "this banger does not run Firecracker yet",
            hint="use `--vmm qemu` or leave --vmm out",
        )
    if wanted not in VMM_NAMES:
        close = nearest(wanted, list(VMM_NAMES))
        raise InvalidInput(
            f"no VMM is named {wanted!r}",
            hint=f"did you mean {close}?" if close else f"choose one of {', '.join(VMM_NAMES)}",
        )
    if kvm.usable:
        return VmmChoice("qemu", "kvm", kvm.reason)
    return VmmChoice("qemu", "tcg", kvm.reason)
