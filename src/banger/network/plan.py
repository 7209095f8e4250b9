"""What the bridge network is, as values: names, addresses, rules. Pure, and stdlib only.

The root helper (`network.helper`) imports this module and nothing else of banger's but `errors`,
so all that crosses the privilege boundary is checked by the same few lines on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from banger.errors import InvalidInput, Unavailable

PORTS_LIMIT = 1024  # BR_MAX_PORTS (net/bridge/br_private.h): no bridge takes more interfaces

# IFNAMSIZ is 16 with the closing NUL (linux/if.h); `br-banger` leaves six.
_BRIDGE_NAME = re.compile(r"br-(banger[a-z0-9]{0,6})")
_TAP_NAME = re.compile(r"bt[0-9a-f]{13}")
_TAP_TOKEN = re.compile(r"[0-9a-f]{8}")
_VM_ID = re.compile(r"[0-9a-f]{12}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_DOTTED = r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}"
_ADDRESS = re.compile(_DOTTED)
_INTERFACE = re.compile(rf"({_DOTTED})/([0-9]{{1,2}})")

_PRIVATE = (
    IPv4Network("10.0.0.0/8"),  # RFC 1918
    IPv4Network("172.16.0.0/12"),
    IPv4Network("192.168.0.0/16"),
    IPv4Network("100.64.0.0/10"),  # RFC 6598
)
# Where clouds answer with credentials: link-local for most, the other for Alibaba.
_METADATA = "169.254.0.0/16, 100.100.100.200"
_MULTICAST_AND_RESERVED = "224.0.0.0/3"  # 224/4 and 240/4, the limited broadcast included
_DISCARDING_ROUTES = frozenset({"blackhole", "unreachable", "prohibit", "throw"})
# VPNs divide the default route into halves (0.0.0.0/1) or finer, to win over it; the widest
# private network is a /8.
_DEFAULT_ROUTE_PREFIX_LIMIT = 8


@dataclass(frozen=True, slots=True)
class Bridge:
    """The host's bridge: its name, and its address with the network's prefix."""

    name: str
    interface: IPv4Interface

    @property
    def gateway(self) -> IPv4Address:
        """The host's address on it."""
        return self.interface.ip

    @property
    def network(self) -> IPv4Network:
        """The network of host and VMs."""
        return self.interface.network

    @property
    def instance(self) -> str:
        """`banger` for `br-banger`: the name of the nftables tables."""
        return self.name.removeprefix("br-")

    @property
    def mac(self) -> str:
        """Its own MAC, by which the rules know the gateway."""
        return bridge_mac(self.name)


@dataclass(frozen=True, slots=True)
class Port:
    """One VM's place on the bridge: what its tap may send, and whom it may reach."""

    vm_id: str
    tap: str
    mac: str
    address: IPv4Address
    nat: bool
    isolated: bool

    def __str__(self) -> str:
        """The notation `parse_port` reads."""
        nat = "nat" if self.nat else "no-nat"
        isolated = "isolated" if self.isolated else "open"
        return f"{self.vm_id} {self.tap} {self.mac} {self.address} {nat} {isolated}"


def parse_bridge(name: str, address: str, cidr: str) -> Bridge:
    """Return a bridge from its parts as text; raise InvalidInput unless it is one of banger's.

    The name begins with br-banger, the network is private (RFC 1918, RFC 6598) with a prefix of 16
    to 29, and the address is a host's in it.
    """
    parse_bridge_name(name)
    try:
        network = IPv4Network(cidr)
        gateway = IPv4Address(address)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    if not any(network.subnet_of(private) for private in _PRIVATE):
        raise InvalidInput(f"{network} is not a private network")
    if not 16 <= network.prefixlen <= 29:
        raise InvalidInput(f"{network}: the prefix has to be 16 to 29")
    if gateway not in network or gateway in (network.network_address, network.broadcast_address):
        raise InvalidInput(f"{gateway} is not a host's address in {network}")
    return Bridge(name, IPv4Interface(f"{gateway}/{network.prefixlen}"))


def bridge_mac(name: str) -> str:
    """Return the MAC a bridge is made with.

    Without one the kernel gives a bridge the lowest of its taps' and changes it with them.
    """
    digest = _digest(name)
    return f"02:62:67:{digest[0:2]}:{digest[2:4]}:{digest[4:6]}"


def parse_bridge_name(text: str) -> str:
    """Return a bridge's name; raise InvalidInput unless it is one banger may make."""
    if not _BRIDGE_NAME.fullmatch(text):
        raise InvalidInput(
            f"{_shown(text)} is not a bridge of banger's: "
            "br-banger, or that and up to six of a-z, 0-9"
        )
    return text


def parse_bridge_interface(name: str, text: str) -> Bridge:
    """Return a bridge from its name and ADDRESS/PREFIX; raise InvalidInput as `parse_bridge`."""
    parse_bridge_name(name)
    found = _INTERFACE.fullmatch(text)
    if found is None:
        raise InvalidInput(f"{_shown(text)} is not an address with a prefix, as 172.16.0.1/24")
    try:
        network = IPv4Network(text, strict=False)
    except ValueError as error:
        raise InvalidInput(f"{_shown(text)} is not an IPv4 address with a prefix") from error
    return parse_bridge(name, found[1], str(network))


def parse_vm_id(text: str) -> str:
    """Return a VM's id; raise InvalidInput unless it is 12 of 0-9, a-f."""
    if not _VM_ID.fullmatch(text):
        raise InvalidInput(f"{_shown(text)} is not a VM's id")
    return text


def parse_mac(bridge: Bridge, text: str) -> str:
    """Return a VM's MAC; raise InvalidInput unless it is a unicast, locally administered one.

    Lower case, with colons. The bridge's own is refused: it is what rules know the gateway by.
    """
    # IEEE 802: in the first octet bit 0 is multicast, bit 1 locally administered.
    if not _MAC.fullmatch(text) or int(text[:2], 16) & 3 != 2 or text == bridge.mac:
        raise InvalidInput(f"{_shown(text)} is not a VM's MAC")
    return text


def parse_address(bridge: Bridge, text: str) -> IPv4Address:
    """Return a VM's address; raise InvalidInput unless a VM on `bridge` may have it."""
    try:
        address = IPv4Address(text if _ADDRESS.fullmatch(text) else "")
    except ValueError as error:
        raise InvalidInput(f"{_shown(text)} is not an IPv4 address") from error
    network = bridge.network
    if (
        address not in network
        or address == bridge.gateway
        or address in (network.network_address, network.broadcast_address)
    ):
        raise InvalidInput(f"{address} is not a VM's address in {network}")
    return address


def tap_name(bridge: Bridge, token: str) -> str:
    """Return the tap's name for a token of 8 hex digits; taps of two bridges never share one."""
    if not _TAP_TOKEN.fullmatch(token):
        raise InvalidInput(f"{_shown(token)} is not a tap's token")
    return _tap_prefix(bridge.name) + token


def parse_tap(bridge_name: str, text: str) -> str:
    """Return a tap's name; raise InvalidInput unless it is one `tap_name` makes for the bridge."""
    if not _TAP_NAME.fullmatch(text) or not text.startswith(_tap_prefix(bridge_name)):
        raise InvalidInput(f"{_shown(text)} is not a tap of {bridge_name}")
    return text


def parse_port(bridge: Bridge, text: str) -> Port:
    """Return a port from `VM_ID TAP MAC ADDRESS nat|no-nat isolated|open`, one space between.

    Raises InvalidInput on anything else.
    """
    words = text.split(" ")
    if len(words) != 6:
        raise InvalidInput(f"{_shown(text)} is not VM_ID TAP MAC ADDRESS nat|no-nat isolated|open")
    return Port(
        vm_id=parse_vm_id(words[0]),
        tap=parse_tap(bridge.name, words[1]),
        mac=parse_mac(bridge, words[2]),
        address=parse_address(bridge, words[3]),
        nat=parse_choice(words[4], yes="nat", no="no-nat"),
        isolated=parse_choice(words[5], yes="isolated", no="open"),
    )


def parse_choice(text: str, *, yes: str, no: str) -> bool:
    """Return whether `text` is `yes`; raise InvalidInput when it is neither."""
    if text not in (yes, no):
        raise InvalidInput(f"{_shown(text)} is neither {yes} nor {no}")
    return text == yes


def check_ports(ports: Sequence[Port]) -> None:
    """Raise InvalidInput when two ports share an id, tap, MAC or address, or there are too many."""
    if len(ports) > PORTS_LIMIT:
        raise InvalidInput(f"{len(ports)} VMs are more than a bridge takes ({PORTS_LIMIT})")
    for field in ("vm_id", "tap", "mac", "address"):
        seen: set[object] = set()
        for port in ports:
            value = getattr(port, field)
            if value in seen:
                raise InvalidInput(f"two VMs have the {field} {value}")
            seen.add(value)


def allocate_address(bridge: Bridge, taken: AbstractSet[IPv4Address]) -> IPv4Address:
    """Return the lowest address of the network that no VM has; raise Unavailable when all do."""
    for address in bridge.network.hosts():
        if address != bridge.gateway and address not in taken:
            return address
    raise Unavailable(
        f"every address of {bridge.network} belongs to a VM",
        hint="delete VMs (banger vm prune), or give a wider `cidr` in the config",
    )


def find_overlap(bridge: Bridge, routes: Iterable[Mapping[str, object]]) -> str | None:
    """Return the host's route that the bridge's network would cut into or hide, or None.

    `routes` are rows of `ip -json route show table all`. Default routes, divided ones too, and the
    bridge's own do not count. A discarding route (blackhole, unreachable) that is wider than the
    network only catches what has no route of its own; one inside it would take VMs' addresses away.
    """
    for route in routes:
        destination = route.get("dst")
        if not isinstance(destination, str) or route.get("dev") == bridge.name:
            continue
        try:
            network = IPv4Network(destination, strict=False)
        except ValueError:
            continue  # `default`, or IPv6
        kind = route.get("type", "unicast")
        if network.prefixlen < _DEFAULT_ROUTE_PREFIX_LIMIT or not network.overlaps(bridge.network):
            continue
        if kind in _DISCARDING_ROUTES and network.prefixlen < bridge.network.prefixlen:
            continue
        words = [] if kind == "unicast" else [str(kind)]
        words.append(destination)
        if "dev" in route:
            words += ["dev", str(route["dev"])]
        return " ".join(words)
    return None


def ruleset(bridge: Bridge, ports: Sequence[Port], owner_uid: int) -> str:
    """Return the nft script that puts the bridge's two tables in force, in one transaction.

    Whatever they held is gone when it is loaded, and nothing else changes. `inet` decides what is
    routed and what reaches the host, `netdev` what a VM's tap may send at all: no frame, ARP
    included, leaves one that is not the VM's own and addressed, in both headers, to the gateway or
    a VM it may reach. Frames are addressed for the VM (`ether daddr set`), so that no broadcast of
    one arrives at another. Which user they belong to is the name of an empty chain, which every
    version keeps and lists. Raises InvalidInput as `check_ports`.
    """
    check_ports(ports)
    table, name, gateway = bridge.instance, bridge.name, bridge.gateway
    reachable = [port for port in ports if not port.isolated]
    # The second pair is a VM that sends by way of the gateway, which its routes may say.
    peers = [f"{port.address} . {mac}" for port in reachable for mac in (port.mac, bridge.mac)]
    owner = f"\tchain {owner_chain(owner_uid)} {{\n\t}}"
    vm_chains = "\n".join(_vm_chain(port) for port in ports)
    return f"""\
table inet {table}
delete table inet {table}
table inet {table} {{
{owner}
{_set("set nat_vms", "ipv4_addr", [str(port.address) for port in ports if port.nat])}
{_set("set open_vms", "ipv4_addr", [str(port.address) for port in reachable])}
	chain input {{
		type filter hook input priority filter; policy accept;
		iifname "{name}" jump to_host
	}}
	chain to_host {{
		ct state established,related accept
		icmp type echo-request accept
		meta l4proto tcp reject with tcp reset
		reject with icmpx admin-prohibited
	}}
	chain forward {{
		type filter hook forward priority filter; policy accept;
		iifname "{name}" jump from_vms
		oifname "{name}" jump to_vms
	}}
	chain from_vms {{
		oifname "{name}" ip saddr @open_vms ip daddr @open_vms accept
		oifname "{name}" drop
		ip daddr {{ {_METADATA} }} drop
		ip saddr @nat_vms accept
		reject with icmpx admin-prohibited
	}}
	chain to_vms {{
		ct state established,related accept
		drop
	}}
	chain postrouting {{
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr @nat_vms oifname != "{name}" masquerade
	}}
}}
table netdev {table}
delete table netdev {table}
table netdev {table} {{
{owner}
{_set("map macs", "ipv4_addr : ether_addr", [f"{p.address} : {p.mac}" for p in reachable])}
{_set("set peers", "ipv4_addr . ether_addr", peers)}
	chain arp_isolated {{
		arp daddr ip {gateway} ether daddr set {bridge.mac} accept
	}}
	chain arp_open {{
		arp daddr ip {gateway} ether daddr set {bridge.mac} accept
		ether daddr set arp daddr ip map @macs accept
	}}
	chain ip_isolated {{
		ip daddr {{ {_METADATA}, {_MULTICAST_AND_RESERVED} }} drop
		ip daddr {bridge.network} ip daddr != {gateway} drop
		ether daddr {bridge.mac} accept
	}}
	chain ip_open {{
		ip daddr . ether daddr @peers accept
		jump ip_isolated
	}}
{vm_chains}
}}
"""


def owner_chain(uid: int) -> str:
    """Return the name of the empty chain that says whose a table is."""
    return f"owner_{uid}"


def _vm_chain(port: Port) -> str:
    reach = "isolated" if port.isolated else "open"
    # The first rule reads the EtherType on the wire: a VLAN tag would hide what is behind it.
    return f"""\
	chain vm_{port.vm_id} {{
		type filter hook ingress device "{port.tap}" priority -500; policy drop;
		@ll,96,16 != {{ 0x0800, 0x0806 }} drop
		ether saddr != {port.mac} drop
		arp operation {{ request, reply }} arp saddr ether {port.mac} arp saddr ip {port.address} \
jump arp_{reach}
		ip saddr {port.address} jump ip_{reach}
	}}"""


def _set(head: str, kind: str, elements: Sequence[str]) -> str:
    # nft takes no empty list of elements.
    listed = f"\n\t\telements = {{ {', '.join(elements)} }}" if elements else ""
    return f"\t{head} {{\n\t\ttype {kind}{listed}\n\t}}"


def _tap_prefix(bridge_name: str) -> str:
    return f"bt{_digest(bridge_name)[:5]}"


def _digest(text: str) -> str:
    import hashlib  # the command line reads its config through this module, and needs no digest

    return hashlib.sha256(text.encode()).hexdigest()


def _shown(text: str) -> str:
    """What is said of a refused word: one short line of ASCII, whatever it was."""
    return ascii(text if len(text) <= 64 else text[:61] + "...")
