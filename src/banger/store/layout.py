"""Every file name on disk, in one place.

<data>/                               $XDG_DATA_HOME/banger, 0700
  banger.db                           SQLite, WAL: VMs and their facts; written by bangerd only
  images/<name>/                      whole or absent: written beside, fsynced, renamed
  kernels/<name>/                     likewise
  staging/<kind>-<name>-<token>/      an artifact in the making; its holder has a flock on it,
                                      so a sweep removes only what a crash left
  firecracker/<version>/              what `banger firecracker install` put in place
  vms/<id>/                           one VM; made after its row says `creating`,
                                      removed before the row goes
    disk.ext4                         its own disk, sparse
    ssh_host_ed25519_key{,.pub}       made by us before the first boot
    console.log                       the end of the guest's serial console: vmm.children keeps it
    vmm.log                           what the VMM said on stderr
    metrics.json                      Firecracker's counters, a line a minute; capped
    jail/                             only while a jailed Firecracker runs: see vmm.jail
    initramfs.img                     only between start and the agent's first answer
<runtime>/                            short private directory (sun_path is 108 bytes)
  bangerd.sock  bangerd.lock          the API; the flock of the one daemon
  autostart.lock                      ten command lines start one daemon
  vms/<id>/                           sockets of a running VM
    qmp.sock  p00 p00.lock ...        QEMU's control; agent streams and their leases
    fc.sock v.sock                    Firecracker's API and vsock; jailed, they are in
    jail ->                           its chroot
<config>/config.toml
<config>/ssh/                         id_ed25519{,.pub}, known_hosts, config
<state>/bangerd.log                   JSON lines, rotated at 4 MiB, one old file kept
<state>/last-failed-boot/             console.log and vmm.log of the last VM that was made and
                                      did not come up: the VM itself is gone
<cache>/                              all of it can be made again
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from banger.paths import Paths


@dataclass(frozen=True, slots=True)
class VmFiles:
    """The files of one VM."""

    directory: Path
    runtime: Path

    @property
    def disk(self) -> Path:
        """The VM's own ext4 disk."""
        return self.directory / "disk.ext4"

    @property
    def host_key(self) -> Path:
        """The private ssh host key; the public half has `.pub` behind it."""
        return self.directory / "ssh_host_ed25519_key"

    @property
    def console_log(self) -> Path:
        """What the guest wrote to its serial console."""
        return self.directory / "console.log"

    @property
    def vmm_log(self) -> Path:
        """What the VMM wrote to stderr."""
        return self.directory / "vmm.log"

    @property
    def metrics_log(self) -> Path:
        """Firecracker's counters."""
        return self.directory / "metrics.json"

    @property
    def initramfs(self) -> Path:
        """The per-boot initramfs; holds private keys, so it goes once the agent answered."""
        return self.directory / "initramfs.img"


@dataclass(frozen=True, slots=True)
class Layout:
    """All paths of one user's banger."""

    config: Path
    data: Path
    state: Path
    cache: Path
    runtime: Path

    @classmethod
    def of(cls, paths: Paths) -> Layout:
        """Return the layout below the given base directories."""
        return cls(
            config=Path(paths.config_dir),
            data=Path(paths.data_dir),
            state=Path(paths.state_dir),
            cache=Path(paths.cache_dir),
            runtime=Path(paths.runtime_dir),
        )

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.data / "banger.db"

    @property
    def vms(self) -> Path:
        """The directory of VM directories."""
        return self.data / "vms"

    @property
    def runtime_vms(self) -> Path:
        """The directory of VM socket directories."""
        return self.runtime / "vms"

    def vm(self, vm_id: str) -> VmFiles:
        """Return the files of the VM with this id."""
        return VmFiles(directory=self.vms / vm_id, runtime=self.runtime_vms / vm_id)

    @property
    def api_socket(self) -> Path:
        """The daemon's API socket."""
        return self.runtime / "bangerd.sock"

    @property
    def daemon_lock(self) -> Path:
        """Held by the one daemon as long as it lives."""
        return self.runtime / "bangerd.lock"

    @property
    def daemon_log(self) -> Path:
        """The daemon's log."""
        return self.state / "bangerd.log"

    @property
    def last_failed_boot(self) -> Path:
        """Where the logs of a VM go that did not survive its making."""
        return self.state / "last-failed-boot"

    @property
    def known_hosts(self) -> Path:
        """Host keys of all VMs, kept by the daemon."""
        return self.config / "ssh" / "known_hosts"

    @property
    def default_ssh_key(self) -> Path:
        """The user's key into every VM unless `ssh_key_path` names another."""
        return self.config / "ssh" / "id_ed25519"
