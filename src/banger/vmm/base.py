"""The contract every VMM adapter keeps, and the values that cross it.

Owns no process. The contract suite (tests/contract/test_vmm.py) runs over every adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from banger.guest.transport import Endpoint
from banger.host.process import ProcessIdentity

# Every process that belongs to a VM carries this in its command line, id behind it: that is
# how start-up finds what a crash left between the fork and the commit of its pid.
PROCESS_MARK = "banger-vm-"


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """How a VM's eth0 is joined to the world; None in a VmSpec means no interface at all."""

    mac: str


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
    runtime: Path  # sockets; private; exists
    console_log: Path
    vmm_log: Path
    network: NetworkSpec | None


@dataclass(frozen=True, slots=True)
class VmmCapabilities:
    """What an adapter can do, as data, so that services ask no adapter by name."""

    snapshots: bool
    accelerators: tuple[str, ...]


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
