"""Everything that crosses to root is one of banger's names, addresses or ids, and nothing else."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.errors import InvalidInput, Unavailable
from banger.network import plan
from banger.network.plan import Port

BRIDGE = plan.parse_bridge("br-banger", "172.16.0.1", "172.16.0.0/24")
TAP = plan.tap_name(BRIDGE, "00c0ffee")
LINE = f"0123456789ab {TAP} 02:00:00:00:00:01 172.16.0.2 nat isolated"

HOSTILE_NAMES = [
    "", "lo", "eth0", "docker0", "-x", "--help", "br-", "br-bange", "br-bangerABC", "br-banger1234567",
    "br-banger/../x", "br-banger\n", "br-banger\0", "br-banger ", "br-banger\u0661", "br-bänger", "br-banger;id",
]  # fmt: skip
HOSTILE_TAPS = [
    "", "lo", "eth0", "tap0", "-x", "bt", TAP[:-1], TAP + "0", TAP.upper(), TAP + "\n", TAP[:-1] + "\n", TAP[:-1] + "g",
    TAP[:-1] + "\u0661", TAP[:-1] + "\0", TAP[:-3] + "/..", "bt" + "0" * 13,
]  # fmt: skip
HOSTILE_MACS = [
    "", "ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "03:00:00:00:00:01", "00:00:00:00:00:00", "52-54-00-00-00-01",
    "02:00:00:00:00:0G", "02:00:00:00:00:AB", "02:00:00:00:00:1", "02:00:00:00:00:01:02", "02:00:00:00:00:01\n",
    "00:1b:21:00:00:01", BRIDGE.mac,
]  # fmt: skip
HOSTILE_ADDRESSES = [
    "", "172.16.0.0", "172.16.0.1", "172.16.0.255", "172.16.1.2", "8.8.8.8", "127.0.0.1", "172.16.0.2/24", "172.16.0.2\n",
    "172.16.0.02", "2886729730", "::1", "172.16.0.\u0662", "0.0.0.0", "255.255.255.255", "172.16.0.999",
]  # fmt: skip
HOSTILE_IDS = [
    "",
    "0123456789a",
    "0123456789abc",
    "0123456789AB",
    "0123456789a\n",
    "../../../../x",
    "-" * 12,
    "\u0661" * 12,
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_only_bangers_bridge_names_are_taken(name: str) -> None:
    with pytest.raises(InvalidInput):
        plan.parse_bridge(name, "172.16.0.1", "172.16.0.0/24")
    with pytest.raises(InvalidInput):
        plan.parse_bridge_name(name)


@pytest.mark.parametrize("name", ["br-banger", "br-banger7", "br-bangerabcdef"])
def test_bridge_names_fit_an_interface(name: str) -> None:
    assert len(plan.parse_bridge_name(name)) <= 15


@pytest.mark.parametrize(
    ("address", "cidr"),
    [
        ("8.8.8.1", "8.8.8.0/24"),
        ("127.0.0.1", "127.0.0.0/24"),
        ("169.254.0.1", "169.254.0.0/16"),
        ("192.0.2.1", "192.0.2.0/24"),
        ("0.0.0.1", "0.0.0.0/16"),
        ("240.0.0.1", "240.0.0.0/24"),
        ("172.16.0.0", "172.16.0.0/24"),
        ("172.16.0.255", "172.16.0.0/24"),
        ("172.16.1.1", "172.16.0.0/24"),
        ("10.0.0.1", "10.0.0.0/15"),
        ("10.0.0.1", "10.0.0.0/30"),
        ("10.0.0.1", "10.0.0.1/24"),
    ],
)
def test_a_network_is_private_and_of_a_size(address: str, cidr: str) -> None:
    with pytest.raises(InvalidInput):
        plan.parse_bridge("br-banger", address, cidr)


@pytest.mark.parametrize("text", ["172.16.0.1", "172.16.0.1/", "172.16.0.1/24/1", "172.16.0.1/024", "/24", "172.16.0.1/33",
                                  "172.16.0.1/255.255.255.0", "172.16.0.1/24\n", "300.16.0.1/24"])  # fmt: skip
def test_an_interface_is_an_address_and_a_prefix(text: str) -> None:
    with pytest.raises(InvalidInput):
        plan.parse_bridge_interface("br-banger", text)


def test_an_interface_reads_back() -> None:
    assert plan.parse_bridge_interface("br-banger", str(BRIDGE.interface)) == BRIDGE


@pytest.mark.parametrize("name", HOSTILE_TAPS)
def test_only_the_bridges_own_taps_are_taken(name: str) -> None:
    with pytest.raises(InvalidInput):
        plan.parse_tap("br-banger", name)


@given(
    st.from_regex(r"[0-9a-f]{8}", fullmatch=True), st.from_regex(r"[a-z0-9]{0,6}", fullmatch=True)
)
def test_a_taps_name_fits_an_interface_and_belongs_to_one_bridge(token: str, suffix: str) -> None:
    other = plan.parse_bridge(f"br-banger{suffix}", "172.16.0.1", "172.16.0.0/24")
    name = plan.tap_name(other, token)
    assert len(name) <= 15
    assert plan.parse_tap(other.name, name) == name
    if suffix:
        with pytest.raises(InvalidInput):
            plan.parse_tap("br-banger", name)


@pytest.mark.parametrize("token", ["", "0", "zzzzzzzz", "00000000\n", "ABCDEF01"])
def test_a_taps_token_is_hex(token: str) -> None:
    with pytest.raises(InvalidInput):
        plan.tap_name(BRIDGE, token)


def test_a_port_reads_back() -> None:
    port = Port("0123456789ab", TAP, "02:00:00:00:00:01", IPv4Address("172.16.0.2"), True, True)
    assert port == plan.parse_port(BRIDGE, LINE)
    assert str(port) == LINE


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (0, HOSTILE_IDS),
        (1, HOSTILE_TAPS),
        (2, HOSTILE_MACS),
        (3, HOSTILE_ADDRESSES),
        (4, ["", "NAT", "nat\n", "yes"]),
        (5, ["", "isolated\n", "closed"]),
    ],
)
def test_a_port_with_one_bad_word_is_refused(index: int, words: list[str]) -> None:
    for word in words:
        parts = LINE.split(" ")
        parts[index] = word
        with pytest.raises(InvalidInput):
            plan.parse_port(BRIDGE, " ".join(parts))


@given(st.text(max_size=120))
def test_any_text_is_a_port_that_reads_back_or_refused_on_one_line(text: str) -> None:
    try:
        assert str(plan.parse_port(BRIDGE, text)) == text
    except InvalidInput as error:
        assert error.message.isascii() and error.message.isprintable()


@pytest.mark.parametrize("separator", ["  ", "\t", "\n", "\u00a0"])
def test_words_of_a_port_have_one_space_between(separator: str) -> None:
    with pytest.raises(InvalidInput):
        plan.parse_port(BRIDGE, LINE.replace(" ", separator, 1))


def ports(count: int) -> list[Port]:
    return [
        Port(
            vm_id=f"{index:012x}",
            tap=plan.tap_name(BRIDGE, f"{index:08x}"),
            mac=f"02:00:00:00:{index >> 8:02x}:{index & 255:02x}",
            address=IPv4Address("172.16.0.2") + index,
            nat=index % 2 == 0,
            isolated=index % 3 == 0,
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_two_ports_share_nothing(index: int) -> None:
    one, other = (str(port).split(" ") for port in ports(2))
    other[index] = one[index]
    both = [plan.parse_port(BRIDGE, " ".join(words)) for words in (one, other)]
    with pytest.raises(InvalidInput, match="two VMs"):
        plan.check_ports(both)
    with pytest.raises(InvalidInput, match="two VMs"):
        plan.ruleset(BRIDGE, both, 0)


def test_a_bridge_takes_a_bounded_number_of_ports() -> None:
    with pytest.raises(InvalidInput, match="1024"):
        plan.check_ports(ports(1025))


def test_addresses_are_given_from_the_lowest_to_the_last() -> None:
    small = plan.parse_bridge("br-banger", "10.0.0.2", "10.0.0.0/29")
    taken: set[IPv4Address] = set()
    for expected in ("10.0.0.1", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"):
        given_address = plan.allocate_address(small, taken)
        assert IPv4Address(expected) == given_address
        taken.add(given_address)
    with pytest.raises(Unavailable) as raised:
        plan.allocate_address(small, taken)
    assert "10.0.0.0/29" in raised.value.message
    assert "cidr" in raised.value.hint
    taken.remove(IPv4Address("10.0.0.4"))
    assert IPv4Address("10.0.0.4") == plan.allocate_address(small, taken)


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        ({"dst": "default", "dev": "eth0"}, None),
        ({"dst": "0.0.0.0/1", "dev": "tun0"}, None),
        ({"dst": "172.16.0.0/24", "dev": "br-banger"}, None),
        ({"dst": "10.0.0.0/8", "dev": "eth0"}, None),
        ({"dst": "172.17.0.0/16", "dev": "docker0"}, None),
        ({"dst": "fe80::/64", "dev": "eth0"}, None),
        ({"dst": "172.16.0.0/12", "type": "blackhole"}, None),
        ({"dst": "172.16.0.0/16", "type": "unreachable", "dev": "lo"}, None),
        ({}, None),
        ({"dst": 7}, None),
        ({"dst": "172.16.0.0/24", "dev": "eth0"}, "172.16.0.0/24 dev eth0"),
        ({"dst": "172.16.0.0/12", "dev": "tun0"}, "172.16.0.0/12 dev tun0"),
        ({"dst": "172.16.0.9", "dev": "eth1"}, "172.16.0.9 dev eth1"),
        ({"dst": "172.16.0.9", "dev": "eth1", "type": "local"}, "local 172.16.0.9 dev eth1"),
        ({"dst": "172.16.0.64/26", "type": "blackhole"}, "blackhole 172.16.0.64/26"),
        ({"dst": "172.16.0.0/24", "type": "prohibit"}, "prohibit 172.16.0.0/24"),
    ],
)
def test_an_overlap_with_a_route_is_named(route: dict[str, object], expected: str | None) -> None:
    assert expected == plan.find_overlap(BRIDGE, [{"dst": "default"}, route])


def test_the_rules_are_one_script_that_names_only_their_own_tables() -> None:
    script = plan.ruleset(BRIDGE, ports(7), 1000)
    heads = [
        line for line in script.splitlines() if line.startswith(("table", "delete", "flush", "add"))
    ]
    assert [
        "table inet banger",
        "delete table inet banger",
        "table inet banger {",
        "table netdev banger",
        "delete table netdev banger",
        "table netdev banger {",
    ] == heads
    assert 7 == script.count("type filter hook ingress device")
    assert 2 == script.count(f"chain {plan.owner_chain(1000)} ")


def test_bridges_of_two_instances_share_no_name() -> None:
    other = plan.parse_bridge("br-banger2", "172.16.1.1", "172.16.1.0/24")
    assert BRIDGE.mac != other.mac
    assert BRIDGE.instance != other.instance
    assert "banger2" not in plan.ruleset(BRIDGE, [], 0)
