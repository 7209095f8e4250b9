"""How a Firecracker begins: in namespaces of its own, with nothing of its starter's rights.

With root, the jailer confines it (chroot, uid, pid and mount namespaces, cgroup). Without root a
user namespace does what it can: no capability, no new privileges. On every network but the
bridge it has a network namespace that holds nothing but its tap. Owns the command lines only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

# The tap and pasta's end in the VM's network namespace, joined by a bridge there: pasta then
# speaks to the guest itself, as passt does to QEMU's.
TAP = "tap0"
PASTA_END = "pasta0"

# Says `ready` when pasta may come, and goes on when its stdin ends; then becomes its arguments.
# No IPv6 in there: nothing routes it, and a link-local address is one more way in.
_MAKE_NETWORK = f"""
set -eu
ip link set lo up
ip link add br0 type bridge
ip tuntap add dev {TAP} mode tap
ip link set {TAP} master br0 up
ip link set br0 up
echo 1 2>/dev/null >/proc/sys/net/ipv6/conf/all/disable_ipv6 || true
echo ready
cat >/dev/null
ip link set {PASTA_END} master br0 up
output=$1
shift
exec "$@" </dev/null >>"$output"
"""

_DROP = ("setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--")
_USER_NAMESPACE = ("unshare", "--user", "--map-root-user")


def as_user(uid: int) -> list[str]:
    """Return the words that make root run the rest as a uid that is nobody else's."""
    who = [*("--reuid", str(uid)), *("--regid", str(uid)), "--clear-groups"]
    return ["setpriv", *who, "--no-new-privs", "--"]


def network_holder(argv: Sequence[str], output: Path) -> list[str]:
    """Return how to make the user network's namespaces and become `argv` in them.

    It writes `ready` to stdout, waits for the end of stdin, and needs pasta's interface then.
    The program's own stdout is appended to `output`.
    """
    script = ["/bin/sh", "-c", _MAKE_NETWORK, "banger-network", str(output), *argv]
    return [*_USER_NAMESPACE, "--net", "--", *script]


def unprivileged(argv: Sequence[str], *, own_network: bool) -> list[str]:
    """Return how a user without root starts `argv` where no network has to be made.

    `own_network` puts it into an empty network namespace; else it stays in the host's, where
    the tap on the bridge is.
    """
    return [*_USER_NAMESPACE, *(["--net"] if own_network else []), "--", *without_rights(argv)]


def probe() -> list[str]:
    """Return a command that succeeds where the namespaces of this module can be made."""
    return [*_USER_NAMESPACE, "--net", "--", "ip", "link", "set", "lo", "up"]


def without_rights(argv: Sequence[str]) -> list[str]:
    """Return how to exec `argv` with no capability left, though the namespace's root runs it."""
    return [*_DROP, *argv]


def jailer(
    program: str,
    firecracker: Path,
    *,
    mark: str,
    uid: int,
    base: Path,
    cgroup: Sequence[str],
    network: str | None,
) -> list[str]:
    """Return the jailer's words up to the `--` that begins Firecracker's own.

    `network` is the path of a network namespace to join.
    """
    return [
        program,
        *("--id", mark),
        *("--exec-file", str(firecracker)),
        *("--uid", str(uid)),
        *("--gid", str(uid)),
        *("--chroot-base-dir", str(base)),
        *([] if network is None else ["--netns", network]),
        *cgroup,
        "--new-pid-ns",
        "--",
    ]


def resolve(program: str) -> Path:
    """Return the file behind a program's name: the jailer copies it, and refuses a link."""
    return Path(os.path.realpath(program))
