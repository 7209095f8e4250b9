"""The jailer's side of a VMM: its chroot, its cgroup, and their end.

The jailer makes a chroot, drops root for a uid of the VM's own, and never cleans up: that is
ours. Files reach the chroot as hard links, so nothing is copied or mounted, and what is left
after a crash is a directory to be removed.

<directory>/jail/firecracker/<id>/root/      the chroot, made by us, filled by the jailer
  vmlinux initramfs.img                 hard links; read-only for the VM's uid
  base.ext4 own.ext4 mods.ext4          likewise; own.ext4 belongs to it
  console.log is the jailer's stdout    vmm.log, metrics.json: hard links of the VM's files
  fc.sock v.sock firecracker.pid        made by Firecracker and the jailer
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from pathlib import Path

from banger.errors import VmmFailed
from banger.vmm.base import VmSpec

CGROUP_ROOT = Path("/sys/fs/cgroup")
PARENT_CGROUP = "banger"
# Firecracker itself, its buffers and page tables; upstream says 5 MiB, virtio queues come on top.
_MEMORY_OVERHEAD_BYTES = 64 << 20
# A VMM has one thread per vCPU and three more; more would be somebody else's.
_THREADS_OVERHEAD = 16
_CGROUP_GONE_TIMEOUT_S = 2.0


def base_of(directory: Path) -> Path:
    """Return the jailer's base directory of the VM in `directory`."""
    return directory / "jail"


def chroot_of(spec: VmSpec, executable: Path) -> Path:
    """Return the chroot the jailer will use."""
    return base_of(spec.directory) / executable.name / spec.mark / "root"


def chroots_in(directory: Path) -> list[Path]:
    """Return the chroots that are in the VM's `directory`, whatever Firecracker was called."""
    return list(base_of(directory).glob("*/*/root"))


def build_chroot(spec: VmSpec, uid: int, executable: Path) -> Path:
    """Make the chroot with the VM's files in it and return it; replaces what is left of one.

    The files are there, the logs too. Raises VmmFailed where one cannot be hard-linked.
    """
    shutil.rmtree(base_of(spec.directory), ignore_errors=True)
    root = chroot_of(spec, executable)
    root.mkdir(parents=True, mode=0o700)
    os.chown(root, uid, uid)
    for name, path in readable_files(spec).items():
        # All VMs share its inode. What keeps other users off is the 0700 of the directories above.
        if not path.stat().st_mode & 0o004:
            path.chmod(0o444)
        _link(path, root / name)
    for name, path in writable_files(spec).items():
        os.chown(path, uid, uid)
        _link(path, root / name)
    return root


def readable_files(spec: VmSpec) -> dict[str, Path]:
    """Return what the VMM may read, by its name in the chroot."""
    return {
        "vmlinux": spec.kernel,
        "base.ext4": spec.base_disk,
        "mods.ext4": spec.modules_disk,
    }


def writable_files(spec: VmSpec) -> dict[str, Path]:
    """Return what belongs to the VM alone, by its name in the chroot."""
    files = {"initramfs.img": spec.initramfs, "own.ext4": spec.own_disk, "vmm.log": spec.vmm_log}
    if spec.metrics_log is not None:
        files["metrics.json"] = spec.metrics_log
    return files


def take_back(spec: VmSpec) -> None:
    """Make root the owner again of what a jailed run of the VM was given.

    For a run without the jailer: its user namespace has no right to another uid's files.
    """
    if os.geteuid() == 0:
        for path in writable_files(spec).values():
            with contextlib.suppress(FileNotFoundError):
                os.chown(path, 0, 0)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        hint = "set `jailer_enabled = false` in the config to go without the jailer"
        if error.errno == errno.EXDEV:
            hint = f"{source} has to be on the file system of {target.parent}; or {hint}"
        raise VmmFailed(
            f"{source} cannot be linked into the VM's chroot: {error.strerror}", hint=hint
        ) from error


def cgroup_arguments(spec: VmSpec) -> list[str]:
    """Return the jailer's words for the VM's limits; none where cgroup v2 sets none of them."""
    available = CGROUP_ROOT / "cgroup.controllers"
    try:
        controllers = available.read_text().split()
    except OSError:
        return []
    limits = {
        "memory": f"memory.max={spec.memory_bytes + _MEMORY_OVERHEAD_BYTES}",
        "pids": f"pids.max={spec.vcpu + _THREADS_OVERHEAD}",
        # One vCPU's worth more than the guest has, for the VMM's own threads.
        "cpu": f"cpu.max={(spec.vcpu + 1) * 100_000} 100000",
    }
    set_here = [limit for controller, limit in limits.items() if controller in controllers]
    if not set_here:
        return []  # with a parent alone the jailer wants it to exist already
    words = [*("--cgroup-version", "2"), *("--parent-cgroup", PARENT_CGROUP)]
    for limit in set_here:
        words += ["--cgroup", limit]
    return words


def cgroup_of(mark: str) -> Path:
    """Return the VM's cgroup directory."""
    return CGROUP_ROOT / PARENT_CGROUP / mark


def sweep_jail(directory: Path, mark: str) -> None:
    """Remove chroot and cgroup of the VM in `directory`, whose VMM is gone; idempotent."""
    shutil.rmtree(base_of(directory), ignore_errors=True)
    cgroup = cgroup_of(mark)
    deadline = time.monotonic() + _CGROUP_GONE_TIMEOUT_S
    while True:
        try:
            cgroup.rmdir()
            break
        except OSError as error:
            # Never made; or root's, who may not let us look; or EBUSY until the kernel has let go
            # of the last thread of a killed process.
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                return
            time.sleep(0.01)
    with contextlib.suppress(OSError):  # others' VMs are in it, or it never was
        cgroup.parent.rmdir()
