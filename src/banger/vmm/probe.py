"""Is KVM usable here, and if not, why.

Asks the kernel and /proc/cpuinfo only; never runs a vCPU, for that is what crashes on a
paravirtual KVM.
"""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

_KVM_GET_API_VERSION = 0xAE00  # linux/kvm.h: _IO(KVMIO, 0x00)
_KVM_CREATE_VM = 0xAE01  # linux/kvm.h: _IO(KVMIO, 0x01)


@dataclass(frozen=True, slots=True)
class KvmProbe:
    """Whether KVM runs stock kernels here; `reason` is a clause for a sentence either way."""

    usable: bool
    reason: str


def probe_kvm(device: str = "/dev/kvm", cpuinfo: str | None = None) -> KvmProbe:
    """Return whether KVM is usable: the node opens, makes a VM, and the CPU shows vmx or svm.

    A paravirtual KVM (KVM-PVM) passes the first two and then crashes any stock kernel, so the
    CPU's own flags decide.
    """
    flags = _cpu_flags(Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo)
    if os.path.exists(device) and not flags & {"vmx", "svm"}:
        # First: neither permission nor ioctl mends this.
        return KvmProbe(
            False,
            f"the CPU shows no vmx or svm: {device} is paravirtual and cannot run our kernels",
        )
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return KvmProbe(False, _why_not_open(device, error))
    try:
        fcntl.ioctl(fd, _KVM_GET_API_VERSION, 0)
        os.close(fcntl.ioctl(fd, _KVM_CREATE_VM, 0))
    except OSError as error:
        return KvmProbe(False, f"{device} makes no VM: {error.strerror}")
    finally:
        os.close(fd)
    return KvmProbe(True, f"{device} is usable")


def _why_not_open(device: str, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return f"there is no {device}: no virtualisation in this CPU, firmware or cloud VM"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"no permission for {device}: join its group (`sudo usermod -aG kvm $USER`)"
    return f"{device} does not open: {error.strerror}"


def _cpu_flags(cpuinfo: str) -> set[str]:
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return set(value.split())
    return set()
