"""The one part of banger that runs as root: it makes the bridge, its taps and its rules.

Owns the grammar of what may be asked of root, and everything done with it. Leaves what to ask to
`network.bridge`, and every value's check to `network.plan`. It takes words and, for `rules`, lines
of words, never a path, a rule or a command; it touches no interface or table without banger's mark
of the user who asks: an interface's ifalias, a chain's name in a table.

Run as `python -I -m banger.network.helper VERB ...` or `banger-net-helper VERB ...`. The answer is
JSON on stdout. Status 2: refused, nothing was done; 1: it failed; 3: this host has no
systemd-resolved. One line on stderr says why, and `{"error": {code, message, hint}}` on stdout.

A kill between any two steps leaves nothing unknown: a tap lasts only once it carries its mark, the
bridge is known by its MAC until it does, and the rules are one transaction.
"""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from banger.errors import BangerError, Conflict, InvalidInput, Unavailable
from banger.network import plan

PROGRAM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
LOCK_PATH = "/run/banger-net.lock"
# Under the daemon's 30 s for a call, so that the helper says itself what it waited for.
TIME_LIMIT_S = 29
# The uids banger's config gives to jailed VMMs: no user has them.
JAILED_UIDS = range(1_879_048_192, 1 << 31)

_STDIN_LIMIT_BYTES = 256 * 1024  # PORTS_LIMIT lines of at most 90 bytes, and room
_WORD_LIMIT_BYTES = 64
_UID = re.compile(r"0|[1-9][0-9]{0,9}")
_LISTEN = re.compile(r"(127(?:\.[0-9]{1,3}){3}):([1-9][0-9]{0,4})")
_ALIAS = re.compile(r"banger (0|[1-9][0-9]{0,9})(?: (idle|[0-9a-f]{12}))?")

# linux/if_tun.h
_TUNSETIFF = 0x400454CA
_TUNSETPERSIST = 0x400454CB
_TUNSETOWNER = 0x400454CC
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_TUN_EXCL = 0x8000

_HINT_RESOLVED = "install systemd-resolved, or use the VMs' addresses: banger vm list"
_USAGE = """\
bridge-up BRIDGE ADDRESS/PREFIX
bridge-down BRIDGE
tap-add BRIDGE TAP UID
tap-take BRIDGE TAP VM_ID UID MAC ADDRESS isolated|open
tap-del BRIDGE TAP
rules BRIDGE ADDRESS/PREFIX   < lines of VM_ID TAP MAC ADDRESS nat|no-nat isolated|open
names BRIDGE 127.0.0.1:PORT
names-off BRIDGE
show BRIDGE"""

Action = Callable[[int], dict[str, Any]]
"""What is done once all words are parsed: with the asking user's uid, giving the answer."""


class NoResolved(Unavailable):
    """This host has no systemd-resolved: status 3."""

    code = "no_resolved"


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the words ask and return the exit status; see the module's docstring."""
    os.umask(0o077)
    sudo_uid = os.environ.get("SUDO_UID", "")
    os.environ.clear()
    os.chdir("/")
    # It bounds all that waits: stdin, the lock, a program.
    signal.signal(signal.SIGALRM, _on_alarm)
    signal.alarm(TIME_LIMIT_S)
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        action = parse(words)
        owner = _owner(sudo_uid)
        answer = action(owner)
    except BangerError as error:
        return _say(error)
    except _OutOfTime:
        return _say(Unavailable(f"it was not done within {TIME_LIMIT_S} s"))
    except OSError as error:
        return _say(Unavailable(str(error)))
    except (LookupError, TypeError, ValueError) as error:
        return _say(Unavailable(f"ip, bridge or nft answers in an unknown shape: {error!r}"))
    finally:
        signal.alarm(0)
    print(json.dumps(answer))
    return 0


def parse(words: Sequence[str]) -> Action:
    """Return what the words ask for, every one of them parsed; raise InvalidInput otherwise.

    Only `rules` reads stdin, and here, to its end.
    """
    for word in words:
        if len(word) > _WORD_LIMIT_BYTES or not word.isascii() or not word.isprintable():
            raise InvalidInput("a word is too long, or not printable ASCII")
    match words:
        case ["bridge-up", name, interface]:
            bridge = plan.parse_bridge_interface(name, interface)
            return lambda owner: _bridge_up(bridge, owner)
        case ["bridge-down", name]:
            plan.parse_bridge_name(name)
            return lambda owner: _bridge_down(name, owner)
        case ["tap-add", name, tap, uid]:
            plan.parse_bridge_name(name)
            plan.parse_tap(name, tap)
            tap_uid = _parse_uid(uid)
            return lambda owner: _tap_add(name, tap, tap_uid, owner)
        case ["tap-take", name, tap, vm_id, uid, mac, address, reach]:
            return _parse_tap_take(name, tap, vm_id, uid, mac, address, reach)
        case ["tap-del", name, tap]:
            plan.parse_bridge_name(name)
            plan.parse_tap(name, tap)
            return lambda owner: _tap_del(name, tap, owner)
        case ["rules", name, interface]:
            bridge = plan.parse_bridge_interface(name, interface)
            ports = _read_ports(bridge)
            return lambda owner: _rules(bridge, ports, owner)
        case ["names", name, listen]:
            plan.parse_bridge_name(name)
            address = _parse_listen(listen)
            return lambda owner: _names(name, address, owner)
        case ["names-off", name]:
            plan.parse_bridge_name(name)
            return lambda owner: _names_off(name, owner)
        case ["show", name]:
            plan.parse_bridge_name(name)
            return lambda owner: _show(name, owner)
    raise InvalidInput("not in the grammar", hint=_USAGE)


# ---- words


def _owner(sudo_uid: str) -> int:
    """The user who asks: sudo's word for it, which is sudo's alone to give, or our real uid."""
    if os.geteuid() != 0:
        raise Unavailable("it has to run as root")
    return _parse_uid(sudo_uid) if sudo_uid else os.getuid()


def _parse_uid(text: str) -> int:
    if not _UID.fullmatch(text) or int(text) >= 1 << 31:
        raise InvalidInput(f"{text!r} is not a uid")
    return int(text)


def _parse_listen(text: str) -> str:
    found = _LISTEN.fullmatch(text)
    if found is None or int(found[2]) > 65535 or any(int(n) > 255 for n in found[1].split(".")):
        raise InvalidInput(f"{text!r} is not a loopback address with a port")
    return text


def _parse_tap_take(
    name: str, tap: str, vm_id: str, uid: str, mac: str, address: str, reach: str
) -> Action:
    plan.parse_bridge_name(name)
    plan.parse_tap(name, tap)
    plan.parse_vm_id(vm_id)
    tap_uid = _parse_uid(uid)
    plan.parse_choice(reach, yes="isolated", no="open")
    # What of an address and a MAC shows without the bridge is refused before it is asked for.
    widest = plan.parse_bridge(name, "10.0.0.1", "10.0.0.0/16")
    plan.parse_mac(widest, mac)

    def action(owner: int) -> dict[str, Any]:
        bridge = _our_bridge(name, owner)
        words = f"{vm_id} {tap} {mac} {address} no-nat {reach}"
        return _tap_take(bridge, plan.parse_port(bridge, words), tap_uid, owner)

    return action


def _read_ports(bridge: plan.Bridge) -> list[plan.Port]:
    data = sys.stdin.buffer.read(_STDIN_LIMIT_BYTES + 1)
    if len(data) > _STDIN_LIMIT_BYTES:
        raise InvalidInput(f"stdin has more than {_STDIN_LIMIT_BYTES} bytes")
    if data and not data.endswith(b"\n"):
        raise InvalidInput("stdin does not end with a newline")
    if not data.isascii():
        raise InvalidInput("stdin is not ASCII")
    # Not splitlines(): that takes more than "\n" for an end.
    lines = data.decode("ascii").split("\n")[:-1]
    if len(lines) > plan.PORTS_LIMIT:
        raise InvalidInput(f"stdin has more than {plan.PORTS_LIMIT} lines")
    ports = [plan.parse_port(bridge, line) for line in lines]
    plan.check_ports(ports)
    return ports


def _check_tap_uid(tap_uid: int, owner: int) -> None:
    if tap_uid != owner and not (owner == 0 and tap_uid in JAILED_UIDS):
        raise InvalidInput(f"uid {owner} may not give a tap to uid {tap_uid}")


# ---- verbs


def _bridge_up(bridge: plan.Bridge, owner: int) -> dict[str, Any]:
    with _locked():
        row = _find_link(bridge.name)
        if row is not None and not _is_half_made(row):
            _check_bridge(row, owner)
        overlap = plan.find_overlap(bridge, _ip_json("route", "show", "table", "all"))
        if overlap is not None:
            raise Conflict(
                f"the VMs' network {bridge.network} overlaps the host's route {overlap}",
                hint="give another `cidr` (and `bridge_ip`) in banger's config",
            )
        for family in ("inet", "netdev"):
            _check_table(family, bridge.instance, owner)
        name = bridge.name
        if row is None:
            # One request, MAC and all: without its alias yet, the MAC tells that it is ours.
            _run(
                "ip", "link", "add", "name", name, "address", plan.bridge_mac(name),
                "type", "bridge", "stp_state", "0",
            )  # fmt: skip
        _run("ip", "link", "set", "dev", name, "alias", f"banger {owner}")
        stale = [address for address in _addresses(name) if address != str(bridge.interface)]
        if stale and any(vm_id for _, vm_id in _taps(name, owner)):
            raise Conflict(
                f"{name} has the address {stale[0]}, and VMs",
                hint="stop the VMs on the bridge before changing `bridge_ip` or `cidr`",
            )
        _write_sysctl(f"ipv6/conf/{name}/disable_ipv6", "1")
        for address in stale:
            _run("ip", "address", "del", address, "dev", name)
        _run("ip", "address", "replace", str(bridge.interface), "dev", name)
        _run("ip", "link", "set", "dev", name, "up")
        _write_sysctl("ipv4/ip_forward", "1")
    return {}


def _bridge_down(name: str, owner: int) -> dict[str, Any]:
    with _locked():
        row = _find_link(name)
        if row is not None and not _is_half_made(row):
            _check_bridge(row, owner)
        for tap, _ in _taps(name, owner):
            _run("ip", "link", "del", "dev", tap)
        if row is not None:
            _run("ip", "link", "del", "dev", name)
        # The rules last: no tap is ever without them.
        instance = name.removeprefix("br-")
        for family in ("inet", "netdev"):
            if _check_table(family, instance, owner):
                _run("nft", "delete", "table", family, instance)
    return {}


def _tap_add(name: str, tap: str, tap_uid: int, owner: int) -> dict[str, Any]:
    _check_tap_uid(tap_uid, owner)
    with _locked():
        _our_bridge(name, owner)
        if _find_link(tap) is not None:
            raise Conflict(f"there is an interface {tap} already")
        # The tap lasts as long as this descriptor, until it is whole and made persistent.
        with _attached(tap, _IFF_TUN_EXCL) as fd:
            fcntl.ioctl(fd, _TUNSETOWNER, tap_uid)
            _write_sysctl(f"ipv6/conf/{tap}/disable_ipv6", "1")
            _run(
                "ip", "link", "set", "dev", tap, "alias", f"banger {owner} idle", "master", name,
            )  # fmt: skip
            # The rules answer for what a VM sends; this for what arrives, and for a tap that has
            # no rules yet. Broadcast stays on: the host may ask for an address.
            _run(
                "bridge", "link", "set", "dev", tap, "learning", "off", "flood", "off",
                "mcast_flood", "off", "isolated", "on",
            )  # fmt: skip
            _run("ip", "link", "set", "dev", tap, "up")
            fcntl.ioctl(fd, _TUNSETPERSIST, 1)
    return {}


def _tap_take(bridge: plan.Bridge, port: plan.Port, tap_uid: int, owner: int) -> dict[str, Any]:
    _check_tap_uid(tap_uid, owner)
    tap = port.tap
    with _locked():
        row = _find_link(tap)
        if row is None:
            raise Conflict(f"there is no interface {tap}")
        holder = _check_tap(row, bridge.name, owner)
        if holder not in (None, port.vm_id):
            raise Conflict(f"{tap} belongs to the VM {holder}")
        if holder is None and "LOWER_UP" in row["flags"]:
            raise Conflict(f"a process is attached to {tap}, which is idle")
        _run("ip", "link", "set", "dev", tap, "alias", f"banger {owner} {port.vm_id}")
        if not _is_owned_by(row, tap_uid):
            # Attaching makes the carrier come and go, of which the kernel tells the bridge once a
            # second: only where it has to be.
            with _attached(tap) as fd:
                fcntl.ioctl(fd, _TUNSETOWNER, tap_uid)
        isolated = "on" if port.isolated else "off"
        _run("bridge", "link", "set", "dev", tap, "isolated", isolated)
        _run("bridge", "fdb", "replace", port.mac, "dev", tap, "master", "static")
        _run(
            "ip", "neighbour", "replace", str(port.address), "lladdr", port.mac,
            "dev", bridge.name, "nud", "permanent",
        )  # fmt: skip
    return {}


def _tap_del(name: str, tap: str, owner: int) -> dict[str, Any]:
    with _locked():
        row = _find_link(tap)
        if row is None:
            return {}
        _check_tap(row, name, owner)
        # Its forwarding entries go with the tap; the neighbours are the bridge's, and go first.
        macs = {
            entry["mac"]
            for entry in _json("bridge", "-json", "fdb", "show", "brport", tap)
            if entry.get("state") == "static"
        }
        if _find_link(name) is not None:
            for entry in _ip_json("neighbour", "show", "dev", name, "nud", "permanent"):
                if entry.get("lladdr") in macs:
                    _run("ip", "neighbour", "del", entry["dst"], "dev", name)
        _run("ip", "link", "del", "dev", tap)
    return {}


def _rules(bridge: plan.Bridge, ports: Sequence[plan.Port], owner: int) -> dict[str, Any]:
    with _locked():
        if _our_bridge(bridge.name, owner) != bridge:
            raise Conflict(f"{bridge.name} has another address than {bridge.interface}")
        for family in ("inet", "netdev"):
            _check_table(family, bridge.instance, owner)
        holders = dict(_taps(bridge.name, owner))
        # A chain cannot be bound to a tap that is gone; nothing passes one either.
        missing = [port.tap for port in ports if port.tap not in holders]
        for port in ports:
            if port.tap not in missing and holders[port.tap] != port.vm_id:
                raise Conflict(f"{port.tap} does not belong to the VM {port.vm_id}")
        present = [port for port in ports if port.tap not in missing]
        _run("nft", "-f", "-", stdin=plan.ruleset(bridge, present, owner))
    return {"missing": missing}


def _names(name: str, listen: str, owner: int) -> dict[str, Any]:
    with _locked():
        _our_bridge(name, owner)
        try:
            _run("resolvectl", "dns", name, listen)
            _run("resolvectl", "domain", name, "~vm")
            _run("resolvectl", "default-route", name, "false")
        except Unavailable as error:
            raise NoResolved(f"systemd-resolved: {error}", hint=_HINT_RESOLVED) from error
    return {}


def _names_off(name: str, owner: int) -> dict[str, Any]:
    with _locked():
        if _find_link(name) is None:
            return {}
        _our_bridge(name, owner)
        try:
            _run("resolvectl", "revert", name)
        except Unavailable as error:
            raise NoResolved(f"systemd-resolved: {error}", hint=_HINT_RESOLVED) from error
    return {}


def _show(name: str, owner: int) -> dict[str, Any]:
    row = _find_link(name)
    bridge = None
    if row is not None and not _is_half_made(row):
        mark = _ALIAS.fullmatch(row.get("ifalias") or "")
        bridge = {
            "up": "UP" in row["flags"],
            "owner": int(mark[1]) if mark and _kind(row) == "bridge" else None,
            "addresses": _addresses(name),
        }
    tables = _tables()
    instance = name.removeprefix("br-")
    return {
        "bridge": bridge,
        "taps": [{"name": tap, "vm_id": vm_id} for tap, vm_id in _taps(name, owner)],
        "nft": tables is not None,
        "rules": {("inet", instance), ("netdev", instance)} <= (tables or set()),
        "forward_policy_drop": None if tables is None else _is_forward_dropped(name, tables),
    }


# ---- the host


def _our_bridge(name: str, owner: int) -> plan.Bridge:
    """The bridge as it stands on the host; Conflict when it is not there, or not the user's."""
    row = _find_link(name)
    if row is None:
        raise Conflict(f"there is no bridge {name}")
    _check_bridge(row, owner)
    addresses = _addresses(name)
    if len(addresses) != 1:
        raise Conflict(f"{name} has {len(addresses)} addresses, not the one banger gave it")
    return plan.parse_bridge_interface(name, addresses[0])


def _check_bridge(row: dict[str, Any], owner: int) -> None:
    name = row["ifname"]
    mark = _ALIAS.fullmatch(row.get("ifalias") or "")
    hint = "give another `bridge_name` (and `cidr`) in banger's config"
    if _kind(row) != "bridge" or mark is None or mark[2] is not None:
        raise Conflict(f"the interface {name} is not banger's", hint=hint)
    if int(mark[1]) != owner:
        raise Conflict(f"the bridge {name} belongs to the user {mark[1]}", hint=hint)


def _check_tap(row: dict[str, Any], bridge: str, owner: int) -> str | None:
    """The id of the VM that holds a tap, or None of an idle one; Conflict when it is not ours."""
    mark = _ALIAS.fullmatch(row.get("ifalias") or "")
    if (
        _kind(row) != "tun"
        or mark is None
        or mark[2] is None
        or int(mark[1]) != owner
        or row.get("master") not in (None, bridge)
    ):
        raise Conflict(f"the interface {row['ifname']} is not a tap of yours on {bridge}")
    return None if mark[2] == "idle" else mark[2]


def _is_owned_by(row: dict[str, Any], uid: int) -> bool:
    user = str(row["linkinfo"].get("info_data", {}).get("user", ""))
    try:
        return user in (str(uid), pwd.getpwuid(uid).pw_name)
    except KeyError:
        return user == str(uid)


def _is_half_made(row: dict[str, Any]) -> bool:
    """Whether it is what a kill left between the bridge's making and its mark."""
    return (
        _kind(row) == "bridge"
        and "ifalias" not in row
        and row.get("address") == plan.bridge_mac(row["ifname"])
        and "UP" not in row["flags"]
    )


def _taps(bridge: str, owner: int) -> list[tuple[str, str | None]]:
    """The user's taps that are named for the bridge, in it or not, with the VM that holds each."""
    found = []
    for row in _ip_json("-details", "link", "show", "type", "tun"):
        with suppress(InvalidInput, Conflict):
            name = plan.parse_tap(bridge, row.get("ifname", ""))
            found.append((name, _check_tap(row, bridge, owner)))
    return found


def _find_link(name: str) -> dict[str, Any] | None:
    done = _start("ip", "-json", "-details", "link", "show", "dev", name)
    if done.returncode != 0:
        if "does not exist" in done.stderr:
            return None
        raise _failed("ip", done)
    row: dict[str, Any] = json.loads(done.stdout)[0]
    if row["ifname"] != name:
        # `ip` also takes an interface's other names for it.
        raise Conflict(f"{name} is another name of the interface {row['ifname']}")
    return row


def _kind(row: dict[str, Any]) -> str:
    return str(row.get("linkinfo", {}).get("info_kind", ""))


def _addresses(name: str) -> list[str]:
    return [
        f"{entry['local']}/{entry['prefixlen']}"
        for row in _ip_json("-4", "address", "show", "dev", name)
        for entry in row.get("addr_info", [])
    ]


def _tables() -> set[tuple[str, str]] | None:
    """The family and name of every nftables table, or None when nft cannot say."""
    try:
        rows = _json("nft", "-j", "list", "tables")["nftables"]
    except Unavailable:
        return None
    return {(row["table"]["family"], row["table"]["name"]) for row in rows if "table" in row}


def _check_table(family: str, instance: str, owner: int) -> bool:
    """Whether the table is there; Conflict when it is, and not the user's."""
    tables = _tables()
    if tables is None:
        raise Unavailable("nft does not work on this host", hint="banger doctor")
    if (family, instance) not in tables:
        return False
    rows = _json("nft", "-j", "list", "table", family, instance)["nftables"]
    chains = {row["chain"]["name"] for row in rows if "chain" in row}
    if plan.owner_chain(owner) not in chains:
        raise Conflict(
            f"the nftables table {family} {instance} is not banger's, or another user's",
            hint="give another `bridge_name` (and `cidr`) in banger's config",
        )
    return True


def _is_forward_dropped(bridge: str, tables: set[tuple[str, str]]) -> bool:
    """Whether iptables' FORWARD drops by policy and has no rule for the bridge, both ways.

    Docker and ufw set that policy, and an accept of ours does not overrule another table's drop.
    """
    if ("ip", "filter") not in tables:
        return False
    rows = _json("nft", "-j", "list", "table", "ip", "filter")["nftables"]
    policies = {
        row["chain"].get("policy")
        for row in rows
        if "chain" in row and row["chain"]["name"] == "FORWARD"
    }
    if policies != {"drop"}:
        return False
    accepted: set[str] = set()
    for row in rows:
        rule = row.get("rule", {})
        words = rule.get("expr", [])
        if rule.get("chain") in ("FORWARD", "DOCKER-USER") and {"accept": None} in words:
            for word in words:
                match = word.get("match", {})
                if match.get("op") == "==" and match.get("right") == bridge:
                    accepted.add(str(match.get("left", {}).get("meta", {}).get("key")))
    return not {"iifname", "oifname"} <= accepted


@contextmanager
def _attached(tap: str, flags: int = 0) -> Iterator[int]:
    """Hold a tap by a descriptor; Conflict when a process holds it already.

    Without IFF_VNET_HDR: whoever attaches next chooses that anew (tun_set_iff, drivers/net/tun.c).
    """
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Unavailable(f"/dev/net/tun: {error.strerror}", hint="modprobe tun") from error
    try:
        request = struct.pack("16sH22x", tap.encode(), _IFF_TAP | _IFF_NO_PI | flags)
        try:
            fcntl.ioctl(fd, _TUNSETIFF, request)
        except OSError as error:
            raise Conflict(f"cannot take {tap}: {error.strerror}") from error
        yield fd
    finally:
        os.close(fd)


def _write_sysctl(path: str, value: str) -> None:
    """Set a key below net; one that this kernel lacks (no IPv6) is left alone."""
    with suppress(FileNotFoundError), open(f"/proc/sys/net/{path}", "r+", encoding="ascii") as file:
        if file.read().strip() != value:
            file.seek(0)
            file.write(value)


class _OutOfTime(Exception):
    pass


def _on_alarm(_number: int, _frame: object) -> NoReturn:
    raise _OutOfTime


@contextmanager
def _locked() -> Iterator[None]:
    """Hold the lock of all changes on this host."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = os.open(LOCK_PATH, flags, 0o600)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != 0:
            raise Conflict(f"{LOCK_PATH} is not root's own file")
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _start(program: str, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    path = shutil.which(program, path=PROGRAM_PATH)
    if path is None:
        raise Unavailable(f"the program {program} is not installed", hint="banger doctor --fix")
    return subprocess.run(
        [path, *words],
        input=stdin,
        capture_output=True,
        text=True,
        env={"PATH": PROGRAM_PATH, "LC_ALL": "C"},
        check=False,
    )


def _run(program: str, *words: str, stdin: str = "") -> str:
    done = _start(program, *words, stdin=stdin)
    if done.returncode != 0:
        raise _failed(program, done)
    return done.stdout


def _failed(program: str, done: subprocess.CompletedProcess[str]) -> Unavailable:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    # The first line is the cause: nft draws the place below it.
    return Unavailable(f"{program}: {lines[0] if lines else f'status {done.returncode}'}")


def _json(program: str, *words: str) -> Any:
    return json.loads(_run(program, *words) or "[]")


def _ip_json(*words: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = _json("ip", "-json", *words)
    return rows


def _say(error: BangerError) -> int:
    status, word = {
        "invalid_input": (2, "refused"),
        "conflict": (1, "conflict"),
        "no_resolved": (3, "no resolved"),
    }.get(error.code, (1, "failed"))
    message = " ".join(error.message.split())
    print(f"banger-net-helper: {word}: {message}", file=sys.stderr)
    told = {"code": error.code, "message": message, "hint": error.hint}
    print(json.dumps({"error": told}))
    return status


if __name__ == "__main__":
    sys.exit(main())
