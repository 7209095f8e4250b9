"""What a kernel must have: for our machines, for their VMMs, for Docker in them.

Owns the table and the comparison of one kernel with it. Reads no file. The rows come from what
the agent does at boot (agent/boot), from what Firecracker and QEMU's microvm give a guest, and
from the list that Docker's own contrib/check-config.sh goes through.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

Need = Literal["required", "recommended"]
State = Literal["built in", "module", "missing"]

MACHINE, VMM, DOCKER = "machine", "vmm", "docker"
PVH_NOTE = "PVH"


class Feature(NamedTuple):
    """One row. Any of `options` will do: (CONFIG_ option, name of its module or empty).

    An `early` one has to be there before the modules' disk is: built in, or in the initramfs.
    """

    group: str
    need: Need
    why: str
    options: tuple[tuple[str, str], ...]
    early: bool = False


class Finding(NamedTuple):
    """How one kernel meets one row; `option` is the one found, or the first that would do."""

    option: str
    group: str
    need: Need
    state: State
    why: str
    note: str


def _row(group: str, need: Need, words: str, why: str, *, early: bool = False) -> list[Feature]:
    """Make a row of each word; `A:a|B:b` is option A, module a, or option B, module b."""
    return [
        Feature(
            group,
            need,
            why,
            tuple((option, module) for option, _, module in _alternatives(word)),
            early,
        )
        for word in words.split()
    ]


def _alternatives(word: str) -> list[tuple[str, str, str]]:
    return [part.partition(":") for part in word.split("|")]


FEATURES: tuple[Feature, ...] = (
    # What agent/boot does before an init runs, in its order.
    *_row(MACHINE, "required", "X86_64", "banger's machines are x86-64"),
    *_row(MACHINE, "required", "BLK_DEV_INITRD", "the agent starts from the initramfs"),
    *_row(MACHINE, "required", "BINFMT_ELF FUTEX EPOLL", "the agent is a Go program"),
    *_row(MACHINE, "required", "PROC_FS SYSFS DEVTMPFS", "the agent mounts them"),
    *_row(MACHINE, "required", "TMPFS UNIX98_PTYS", "/run, /dev/shm and terminals"),
    *_row(MACHINE, "required", "VIRTIO:virtio", "every device is one of virtio", early=True),
    *_row(MACHINE, "required", "VIRTIO_MMIO:virtio_mmio", "the bus of both VMMs", early=True),
    *_row(MACHINE, "required", "VIRTIO_BLK:virtio_blk", "the disks", early=True),
    *_row(MACHINE, "required", "EXT4_FS:ext4", "what is on the disks", early=True),
    *_row(MACHINE, "required", "OVERLAY_FS:overlay", "joins image and own disk", early=True),
    *_row(MACHINE, "required", "NET INET UNIX:unix", "the agent brings up lo", early=True),
    *_row(MACHINE, "required", "VIRTIO_NET:virtio_net", "the network", early=True),
    *_row(
        MACHINE,
        "required",
        "VIRTIO_CONSOLE:virtio_console",
        "how the agent is reached under QEMU",
        early=True,
    ),
    *_row(
        MACHINE,
        "required",
        "VSOCKETS:vsock VIRTIO_VSOCKETS:vmw_vsock_virtio_transport",
        "how the agent is reached under Firecracker",
        early=True,
    ),
    *_row(MACHINE, "required", "CGROUPS NAMESPACES", "systemd does not start without"),
    *_row(MACHINE, "recommended", "HW_RANDOM_VIRTIO:virtio_rng", "random numbers at boot"),
    *_row(MACHINE, "recommended", "MODULES", "loads what is not built in"),
    *_row(MACHINE, "recommended", "BINFMT_SCRIPT:binfmt_script", "scripts that begin with #!"),
    *_row(MACHINE, "recommended", "PRINTK", "the kernel's log, and the agent's lines in it"),
    *_row(MACHINE, "recommended", "IPV6:ipv6 PACKET:af_packet", "DHCP clients, IPv6"),
    *_row(
        MACHINE,
        "recommended",
        "EVENTFD SIGNALFD TIMERFD INOTIFY_USER FHANDLE",
        "systemd and common programs",
    ),
    *_row(
        MACHINE,
        "recommended",
        "EXT4_FS_POSIX_ACL EXT4_FS_SECURITY TMPFS_POSIX_ACL TMPFS_XATTR",
        "ACLs and file capabilities of images",
    ),
    *_row(MACHINE, "recommended", "FUSE_FS:fuse TUN:tun BLK_DEV_LOOP:loop", "common programs"),
    # What the VMMs give a guest, and how they start it.
    *_row(VMM, "required", PVH_NOTE, "QEMU's microvm starts the ELF by its PVH entry"),
    *_row(VMM, "required", "ACPI", "how QEMU's microvm and Firecracker announce devices"),
    *_row(VMM, "required", "SERIAL_8250 SERIAL_8250_CONSOLE", "the console log (ttyS0)"),
    *_row(VMM, "recommended", "SMP", "more than one virtual CPU"),
    *_row(
        VMM,
        "recommended",
        "HYPERVISOR_GUEST PARAVIRT KVM_GUEST",
        "KVM's clock; QEMU's KVM has no other",
    ),
    *_row(VMM, "recommended", "PTP_1588_CLOCK_KVM:ptp_kvm", "the host's time"),
    *_row(
        VMM,
        "recommended",
        "SERIO_I8042:i8042 KEYBOARD_ATKBD:atkbd",
        "Firecracker's keyboard controller: Ctrl-Alt-Del",
    ),
    # Docker's "generally necessary"; legacy iptables may be replaced by nftables' own.
    *_row(DOCKER, "required", "NET_NS PID_NS IPC_NS UTS_NS", "containers' namespaces"),
    *_row(
        DOCKER,
        "required",
        "CGROUP_SCHED CGROUP_BPF CPUSETS MEMCG CGROUP_PIDS CGROUP_FREEZER",
        "controllers of cgroup v2",
    ),
    *_row(DOCKER, "required", "KEYS POSIX_MQUEUE", "containers' keyrings and /dev/mqueue"),
    *_row(DOCKER, "required", "SECCOMP SECCOMP_FILTER", "Docker's default profile"),
    *_row(
        DOCKER,
        "required",
        "VETH:veth BRIDGE:bridge BRIDGE_NETFILTER:br_netfilter",
        "the bridge network",
    ),
    *_row(
        DOCKER,
        "required",
        "NF_NAT:nf_nat IP_NF_FILTER:iptable_filter|NFT_COMPAT:nft_compat "
        "IP_NF_NAT:iptable_nat|NFT_COMPAT:nft_compat "
        "IP_NF_MANGLE:iptable_mangle|NFT_COMPAT:nft_compat "
        "IP_NF_RAW:iptable_raw|NFT_COMPAT:nft_compat "
        "IP_NF_TARGET_MASQUERADE:ipt_MASQUERADE|NETFILTER_XT_TARGET_MASQUERADE:xt_MASQUERADE "
        "NETFILTER_XT_MATCH_ADDRTYPE:xt_addrtype NETFILTER_XT_MATCH_CONNTRACK:xt_conntrack "
        "NETFILTER_XT_MARK:xt_mark",
        "addresses and published ports of containers",
    ),
    *_row(
        DOCKER,
        "recommended",
        "IP6_NF_FILTER:ip6table_filter|NFT_COMPAT:nft_compat "
        "IP6_NF_NAT:ip6table_nat|NFT_COMPAT:nft_compat "
        "IP6_NF_MANGLE:ip6table_mangle|NFT_COMPAT:nft_compat "
        "IP6_NF_RAW:ip6table_raw|NFT_COMPAT:nft_compat",
        "IPv6 in containers",
    ),
    *_row(DOCKER, "recommended", "NF_TABLES:nf_tables", "nftables in the guest"),
    *_row(DOCKER, "recommended", "USER_NS", "rootless containers"),
    *_row(
        DOCKER,
        "recommended",
        "BLK_CGROUP BLK_DEV_THROTTLING CFS_BANDWIDTH FAIR_GROUP_SCHED CGROUP_PERF",
        "limits on CPU and disk",
    ),
    *_row(DOCKER, "recommended", "SECURITY_APPARMOR|SECURITY_SELINUX", "confinement"),
    *_row(
        DOCKER,
        "recommended",
        "VXLAN:vxlan IP_VS:ip_vs NETFILTER_XT_MATCH_IPVS:xt_ipvs BRIDGE_VLAN_FILTERING "
        "CRYPTO_GCM:gcm INET_ESP:esp4 XFRM_USER:xfrm_user",
        "overlay networks of a swarm",
    ),
    *_row(
        DOCKER, "recommended", "IPVLAN:ipvlan MACVLAN:macvlan DUMMY:dummy", "its network drivers"
    ),
)


def check_features(
    config: Mapping[str, str],
    *,
    early_modules: frozenset[str],
    modules: frozenset[str],
    pvh: bool,
) -> list[Finding]:
    """Compare a kernel with the table.

    `early_modules` are those the initramfs loads, `modules` those on the modules' disk: an
    option set to `m` counts only when its module really is there.
    """
    return [_judge(row, config, early_modules, modules, pvh) for row in FEATURES]


def _judge(
    row: Feature,
    config: Mapping[str, str],
    early_modules: frozenset[str],
    modules: frozenset[str],
    pvh: bool,
) -> Finding:
    first = row.options[0][0]
    if first == PVH_NOTE:
        # What the image itself has counts, not what was asked of its build.
        return _finding(row, first, "built in" if pvh else "missing")
    there = early_modules if row.early else early_modules | modules
    for option, _ in row.options:
        if config.get(option) == "y":
            return _finding(row, option, "built in")
    note = ""
    for option, module in row.options:
        if module and module in there:
            return _finding(row, option, "module")
        if config.get(option) == "m" and not note:
            place = "not among those the initramfs loads" if row.early else "not there"
            note = f"set to m, but the module {module or 'of it'} is {place}"
    return _finding(row, first, "missing", note)


def _finding(row: Feature, option: str, state: State, note: str = "") -> Finding:
    return Finding(option, row.group, row.need, state, row.why, note)


def missing_required(findings: list[Finding], *groups: str) -> list[Finding]:
    """Return what is required and missing, of some groups or (without any) of all."""
    return [
        finding
        for finding in findings
        if finding.need == "required"
        and finding.state == "missing"
        and (not groups or finding.group in groups)
    ]


def builtin_modules(config: Mapping[str, str]) -> frozenset[str]:
    """Return the modules of the table's rows that are built into a kernel."""
    return frozenset(
        module
        for row in FEATURES
        for option, module in row.options
        if module and config.get(option) == "y"
    )
