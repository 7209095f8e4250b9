"""The contract every VMM adapter keeps, and the values that cross it.

Owns no process. The contract suite (tests/contract/test_vmm.py) runs over every adapter.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from banger.errors import Unavailable
from banger.guest.transport import Endpoint
from banger.host.process import ProcessIdentity

# Every process that belongs to a VM carries this in its command line, id behind it: that is
# how start-up finds what a crash left between the fork and the commit of its pid.
PROCESS_MARK = "banger-vm-"


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """How a VM's eth0 is joined to the world; None in a VmSpec means no interface at all.

    With a `tap` it is on the bridge; without, the VMM joins it to passt's user network.
    """

    mac: str
    tap: str | None = None


@dataclass(frozen=True, slots=True)
class VmSpec:
    """All that a VMM needs to boot one VM. Paths are absolute; the disks exist."""

    id: str
    vcpu: int
    memory_bytes: int
    accel: str  # kvm | tcg
    kernel: Path  # ELF vmlinux
    initramfs: Path
    command_line: str
    base_disk: Path  # read-only, serial banger-base
    own_disk: Path  # read-write, serial banger-own
    modules_disk: Path  # read-only, serial banger-mods
    directory: Path  # the VM's own; private; on the disks' file system
    runtime: Path  # sockets; private; exists
    console_log: Path
    vmm_log: Path
    network: NetworkSpec | None
    metrics_log: Path | None = None
    jail_uid: int | None = None  # the uid and gid for which a VMM of root's gives root up

    @property
    def mark(self) -> str:
        """What stands in the command line of each of its processes."""
        return mark_of(self.id, self.runtime)


@dataclass(frozen=True, slots=True)
class VmmCapabilities:
    """What an adapter can do, as data, so that services ask no adapter by name."""

    snapshots: bool
    accelerators: tuple[str, ...]
    drives_by_serial: bool  # else by their order: vda, vdb, vdc
    jailed: bool = False  # confines a VMM of root's under a uid of its own


class Vmm(Protocol):
    """One VMM program. A machine is a process of its own that outlives the daemon."""

    name: str
    capabilities: VmmCapabilities

    def check(self) -> None:
        """Raise Unavailable when the VMM's program is not installed."""

    async def start(self, spec: VmSpec) -> ProcessIdentity:
        """Start a VMM and return its process as soon as its sockets answer.

        Raises VmmFailed with the VMM's last words; then no process and no socket is left.
        """

    def endpoint(self, runtime: Path) -> Endpoint:
        """Return how to reach the agent of the VM whose sockets are in `runtime`."""

    async def adopt(self, runtime: Path, process: ProcessIdentity) -> bool:
        """Tell whether this process still runs this VM and its control socket answers."""

    async def pause(self, runtime: Path) -> None:
        """Stop the vCPUs; idempotent."""

    async def resume(self, runtime: Path) -> None:
        """Let the vCPUs go on; idempotent."""

    async def kill(self, process: ProcessIdentity) -> None:
        """End the VMM at once and return when it is gone; idempotent."""

    async def sweep(self, vm_id: str, runtime: Path, directory: Path) -> None:
        """Remove what a VMM that is gone left behind; idempotent.

        `runtime` and `directory` are those of its VmSpec.
        """


def mark_of(vm_id: str, runtime: Path) -> str:
    """Return what stands in the command line of each process of a VM, however it is confined.

    The id says which VM, the directory of its owner's sockets says whose: two HOMEs on one host
    must not take each other's VMMs for a crash's orphans.
    """
    return f"{PROCESS_MARK}{vm_id}-{runtime.parent.parent.name}"


# sockaddr_un.sun_path has 108 bytes, the closing NUL among them (unix(7)).
_SUN_PATH_BYTES = 107


def check_socket_path(path: Path) -> None:
    """Raise Unavailable when a Unix socket cannot have this path."""
    if len(os.fsencode(path)) > _SUN_PATH_BYTES:
        raise Unavailable(
            f"the socket path {path} is longer than {_SUN_PATH_BYTES} bytes",
            hint="set XDG_RUNTIME_DIR to a shorter directory",
        )
