"""The bridge network for real: ip, bridge and nft, each test in a network namespace of its own.

A test runs in a thread that has left the host's namespace for a new one: its sockets, taps and
child processes are there, and all of it goes with the thread. Guests are a few lines that speak
raw Ethernet on their tap, so they can lie as no kernel would.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import functools
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Self

import pytest

from banger.errors import BangerError, Conflict, InvalidInput, Unavailable
from banger.host.commands import HostCommands
from banger.network import bridge as bridge_module
from banger.network import plan
from banger.network.bridge import BridgeNetwork, find_trusted_helper
from banger.network.plan import Bridge, Port

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and taps need root"),
    pytest.mark.skipif(
        not (shutil.which("nft", path="/usr/sbin:/sbin") and os.path.exists("/dev/net/tun")),
        reason="needs nftables and /dev/net/tun",
    ),
]

CLONE_NEWNET = 0x40000000
BRIDGE = plan.parse_bridge("br-banger", "172.16.0.1", "172.16.0.0/24")
A = "aaaaaaaaaaaa"
B = "bbbbbbbbbbbb"
BROADCAST = "ff:ff:ff:ff:ff:ff"
# A frame that arrives does so in under a millisecond; one that must not is waited for this long.
SILENCE_S = 0.3
ANSWER_S = 5.0


def in_namespace(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in a thread with a network namespace of its own."""

    @functools.wraps(test)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        raised: list[BaseException] = []

        def body() -> None:
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                assert libc.unshare(CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
                assert ["lo"] == [name for _, name in socket.if_nameindex()]
                sh("ip", "link", "set", "lo", "up")
                pass_bridged_packets_to_iptables(False)
                asyncio.run(test(*args, **kwargs))
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if raised:
            raise raised[0]

    return wrapper


def pass_bridged_packets_to_iptables(does: bool) -> None:
    """Say whether rules for what is routed see what is bridged, too, as on hosts with Docker.

    They are a second net below that of `netdev` there, so a test of that one is without.
    """
    key = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")  # there is none without br_netfilter
    if key.exists():
        key.write_text(str(int(does)))


def sh(*argv: str, stdin: str | None = None) -> str:
    done = subprocess.run(
        argv, input=stdin, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


def interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


def tables() -> set[tuple[str, str]]:
    rows = json.loads(sh("nft", "-j", "list", "tables"))["nftables"]
    return {(row["table"]["family"], row["table"]["name"]) for row in rows if "table" in row}


def alias(name: str) -> str:
    return str(json.loads(sh("ip", "-json", "link", "show", "dev", name))[0].get("ifalias", ""))


def taps() -> set[str]:
    return {name for name in interfaces() if name.startswith("bt")}


@contextlib.asynccontextmanager
async def network(pool_size: int = 0, bridge: Bridge = BRIDGE) -> AsyncIterator[BridgeNetwork]:
    made = BridgeNetwork(HostCommands(), bridge, pool_size=pool_size, tap_uid=os.getuid())
    try:
        yield made
    finally:
        await made.close()


def mac_bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def ethernet(to: str, source: str, kind: int, payload: bytes) -> bytes:
    return mac_bytes(to) + mac_bytes(source) + struct.pack("!H", kind) + payload


def arp(operation: int, mac: str, address: str, target_mac: str, target: str) -> bytes:
    return struct.pack(
        "!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, operation,
        mac_bytes(mac), socket.inet_aton(address), mac_bytes(target_mac), socket.inet_aton(target),
    )  # fmt: skip


def ip(source: str, target: str, protocol: int, payload: bytes) -> bytes:
    def header(total: int) -> bytes:
        return struct.pack(
            "!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, total,
            socket.inet_aton(source), socket.inet_aton(target),
        )  # fmt: skip

    return header(checksum(header(0))) + payload


def echo(kind: int, payload: bytes) -> bytes:
    head = struct.pack("!BBHHH", kind, 0, 0, 7, 1)
    return struct.pack("!BBHHH", kind, 0, checksum(head + payload), 7, 1) + payload


def udp(source_port: int, target_port: int, payload: bytes) -> bytes:
    return struct.pack("!HHHH", source_port, target_port, 8 + len(payload), 0) + payload


def tcp_syn(source: str, target: str, port: int) -> bytes:
    segment = struct.pack("!HHIIBBHHH", 40000, port, 1, 0, 5 << 4, 2, 1000, 0, 0)
    pseudo = socket.inet_aton(source) + socket.inet_aton(target) + struct.pack("!BBH", 0, 6, 20)
    return segment[:16] + struct.pack("!H", checksum(pseudo + segment)) + segment[18:]


class Guest:
    """A machine on a tap: it answers ARP and pings for its address, and sends what it is told."""

    def __init__(self, port: Port, vnet_hdr: bool = False) -> None:
        self._tap, self.mac, self.address = port.tap, port.mac, str(port.address)
        self.frames: list[bytes] = []
        self._arrived = asyncio.Event()
        self._head = 10 if vnet_hdr else 0  # struct virtio_net_hdr
        self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        flags = 0x0002 | 0x1000 | (0x4000 if vnet_hdr else 0)  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
        fcntl.ioctl(self.fd, 0x400454CA, struct.pack("16sH22x", port.tap.encode(), flags))
        asyncio.get_running_loop().add_reader(self.fd, self._read)

    def __enter__(self) -> Self:
        # The kernel tells the bridge of a tap's carrier when it likes, once a second; a frame
        # before that is lost, and a test that waits for silence would pass for that alone.
        deadline_s = time.monotonic() + ANSWER_S
        while "state forwarding" not in sh("bridge", "link", "show", "dev", self._tap):
            assert time.monotonic() < deadline_s, "the bridge does not see the guest"
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self.fd)
        os.close(self.fd)

    def strangers(self) -> list[bytes]:
        """What arrived from anyone but the host."""
        return [frame for frame in self.frames if frame[6:12] != mac_bytes(BRIDGE.mac)]

    def send(self, frame: bytes) -> None:
        os.write(self.fd, bytes(self._head) + frame)

    def send_ip(self, target: str, protocol: int, payload: bytes, **lie: str) -> None:
        """Send one packet, by way of the gateway unless told otherwise."""
        self.send(
            ethernet(
                lie.get("to", BRIDGE.mac),
                lie.get("mac", self.mac),
                0x0800,
                ip(lie.get("address", self.address), target, protocol, payload),
            )
        )

    def send_arp(self, target: str, **lie: str) -> None:
        mac, address = lie.get("arp_mac", self.mac), lie.get("address", self.address)
        body = arp(1, mac, address, "00:00:00:00:00:00", target)
        self.send(ethernet(lie.get("to", BROADCAST), lie.get("mac", self.mac), 0x0806, body))

    async def wait(self, kind: int, needle: bytes, timeout_s: float = ANSWER_S) -> bytes | None:
        """Return the first frame of this EtherType that has `needle`, or None in that time."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    for frame in self.frames:
                        if frame[12:14] == struct.pack("!H", kind) and needle in frame:
                            self.frames.remove(frame)
                            return frame
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            return None

    def _read(self) -> None:
        try:
            frame = os.read(self.fd, 65536)[self._head :]
        except OSError:
            return
        if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\x01":
            if frame[38:42] == socket.inet_aton(self.address):
                asker, asker_address = frame[22:28].hex(":"), socket.inet_ntoa(frame[28:32])
                body = arp(2, self.mac, self.address, asker, asker_address)
                self.send(ethernet(asker, self.mac, 0x0806, body))
        elif frame[12:14] == b"\x08\0" and frame[23] == 1 and frame[34] == 8:
            source = socket.inet_ntoa(frame[26:30])
            answer = echo(0, frame[42:])
            answer = answer[:4] + frame[38:42] + answer[8:]
            answer = answer[:2] + b"\0\0" + answer[4:]
            answer = answer[:2] + struct.pack("!H", checksum(answer)) + answer[4:]
            self.send_ip(source, 1, answer, to=frame[6:12].hex(":"))
        self.frames.append(frame)
        self._arrived.set()


async def connect(
    net: BridgeNetwork, vm_id: str, last: int, *, nat: bool = True, isolated: bool = True
) -> Port:
    mac, address = f"02:00:00:00:00:{last:02x}", IPv4Address("172.16.0.0") + last
    tap = await net.take(vm_id, mac, address, uid=os.getuid(), isolated=isolated)
    return Port(vm_id, tap, mac, address, nat, isolated)


async def host_pings(address: str) -> bool:
    """Whether an echo request of the host's comes back."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_sendto(raw, echo(8, b"from the host"), (address, 0))
        try:
            async with asyncio.timeout(SILENCE_S * 4):
                while True:
                    answer, (source, _) = await loop.sock_recvfrom(raw, 2048)
                    if source == address and answer[20] == 0:
                        return True
        except TimeoutError:
            return False


@contextlib.contextmanager
def outside() -> Iterator[subprocess.Popen[bytes]]:
    """A second namespace behind the host, 192.0.2.2, which sends each UDP packet's source back."""
    code = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "s.bind(('0.0.0.0', 7)); print('up', flush=True)\n"
        "while True:\n"
        "    data, peer = s.recvfrom(2048); s.sendto(data + b' from ' + peer[0].encode(), peer)"
    )
    argv = ["unshare", "-n", sys.executable, "-I", "-c", code]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"up\n"
            inside = ["nsenter", f"--net=/proc/{process.pid}/ns/net", "ip"]
            sh(
                "ip",
                "link",
                "add",
                "up0",
                "type",
                "veth",
                "peer",
                "name",
                "up1",
                "netns",
                str(process.pid),
            )
            sh("ip", "address", "add", "192.0.2.1/24", "dev", "up0")
            sh("ip", "link", "set", "up0", "up")
            sh(*inside, "address", "add", "192.0.2.2/24", "dev", "up1")
            sh(*inside, "link", "set", "up1", "up")
            # It knows a way to the VMs, so what keeps it out is the rules.
            sh(*inside, "route", "add", "172.16.0.0/24", "via", "192.0.2.1")
            yield process
        finally:
            process.kill()


# ---- bridge and pool


@in_namespace
async def test_ensure_makes_the_bridge_and_its_rules_once() -> None:
    async with network() as net:
        await net.check()
        await net.ensure()
        shown = json.loads(sh("ip", "-json", "-details", "address", "show", "dev", "br-banger"))[0]
        assert f"banger {os.getuid()}" == shown["ifalias"]
        assert BRIDGE.mac == shown["address"]
        assert 0 == shown["linkinfo"]["info_data"]["stp_state"]
        assert ["172.16.0.1"] == [address["local"] for address in shown["addr_info"]]
        assert "1" == sh("cat", "/proc/sys/net/ipv4/ip_forward").strip()
        assert {("inet", "banger"), ("netdev", "banger")} == tables()
        before = sh("nft", "-a", "list", "ruleset")
        await net.ensure()
        await net.check()
        assert before == sh("nft", "-a", "list", "ruleset")


@in_namespace
async def test_the_pool_fills_gives_and_refills() -> None:
    async with network(pool_size=2) as net:
        await net.ensure()
        await net.fill()
        pooled = taps()
        assert 2 == len(pooled)
        assert {f"banger {os.getuid()} idle"} == {alias(tap) for tap in pooled}
        port = await connect(net, A, 2)
        assert port.tap in pooled
        assert f"banger {os.getuid()} {A}" == alias(port.tap)
        await net.fill()
        assert 3 == len(taps())
        await net.give_back(port.tap)
        await net.give_back(port.tap)
        assert port.tap not in taps()
        assert 2 == len(taps())


@in_namespace
async def test_the_pool_refills_in_the_background() -> None:
    async with network(pool_size=1) as net:
        await net.ensure()
        await net.fill()
        await connect(net, A, 2)
        async with asyncio.timeout(ANSWER_S):
            await asyncio.gather(*net._tasks)
        assert 2 == len(taps())


@in_namespace
async def test_taps_are_taken_at_once_by_many_and_none_twice() -> None:
    async with network(pool_size=2) as net:
        await net.ensure()
        await net.fill()
        ids = [f"{index:012x}" for index in range(5)]
        made = await asyncio.gather(*(connect(net, id_, 10 + i) for i, id_ in enumerate(ids)))
        assert 5 == len({port.tap for port in made})
        assert [f"banger {os.getuid()} {id_}" for id_ in ids] == [alias(port.tap) for port in made]


@in_namespace
async def test_a_pooled_tap_that_vanished_is_replaced() -> None:
    async with network(pool_size=1) as net:
        await net.ensure()
        await net.fill()
        (gone,) = taps()
        sh("ip", "link", "del", gone)
        assert (await connect(net, A, 2)).tap != gone


@in_namespace
async def test_a_taken_tap_has_its_owner_its_entries_and_no_ipv6() -> None:
    async with network() as net:
        await net.ensure()
        tap = await net.take(
            A, "02:00:00:00:00:02", IPv4Address("172.16.0.2"), uid=1_900_000_007, isolated=True
        )
        row = json.loads(sh("ip", "-json", "-details", "link", "show", "dev", tap))[0]
        port = row["linkinfo"]["info_slave_data"]
        assert "1900000007" == str(row["linkinfo"]["info_data"]["user"])
        assert {"learning": False, "flood": False, "mcast_flood": False, "isolated": True} == {
            key: port[key] for key in ("learning", "flood", "mcast_flood", "isolated")
        }
        assert "02:00:00:00:00:02 master br-banger static" in sh(
            "bridge", "fdb", "show", "brport", tap
        )
        assert "172.16.0.2 lladdr 02:00:00:00:00:02" in sh(
            "ip", "neigh", "show", "dev", "br-banger"
        )
        for name in (tap, "br-banger"):
            assert "" == sh("ip", "-6", "address", "show", "dev", name)
        await net.give_back(tap)
        assert "" == sh("ip", "neigh", "show", "dev", "br-banger")


@in_namespace
async def test_a_tap_in_use_is_not_taken() -> None:
    async with network(pool_size=1) as net:
        await net.ensure()
        await net.fill()
        (tap,) = taps()
        port = Port(A, tap, "02:00:00:00:00:02", IPv4Address("172.16.0.2"), True, True)
        with Guest(port):
            assert tap != (await connect(net, B, 3)).tap


@in_namespace
async def test_a_cancelled_take_leaves_no_tap() -> None:
    async with network() as net:
        await net.ensure()
        task = asyncio.create_task(connect(net, A, 2))
        async with asyncio.timeout(ANSWER_S):
            while not taps():
                await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()
        # One cancelled while it was being made stays as an idle tap, which the pool takes over.
        assert not [tap for tap in taps() if A in alias(tap)]


# ---- what is not ours


@in_namespace
async def test_a_bridge_of_that_name_that_is_not_ours_is_left_alone() -> None:
    sh("ip", "link", "add", "br-banger", "type", "bridge")
    before = sh("ip", "-details", "link", "show", "dev", "br-banger")
    async with network() as net:
        for step in (net.check, net.ensure):
            with pytest.raises(Conflict) as raised:
                await step()
            assert "br-banger" in raised.value.message
            assert "bridge_name" in raised.value.hint
    assert before == sh("ip", "-details", "link", "show", "dev", "br-banger")
    assert set() == tables()


@in_namespace
async def test_another_users_bridge_is_left_alone() -> None:
    sh("ip", "link", "add", "br-banger", "type", "bridge")
    sh("ip", "link", "set", "br-banger", "alias", "banger 4242")
    async with network() as net:
        with pytest.raises(Conflict, match="4242"):
            await net.check()
        with pytest.raises(Conflict, match="4242"):
            await net.ensure()
        with pytest.raises(Conflict, match="4242"):
            await net.take(A, "02:00:00:00:00:02", IPv4Address("172.16.0.2"), uid=0, isolated=True)


@in_namespace
async def test_an_interface_with_another_name_of_that_name_is_left_alone() -> None:
    sh("ip", "link", "add", "other", "type", "bridge")
    sh("ip", "link", "property", "add", "dev", "other", "altname", "br-banger")
    async with network() as net:
        with pytest.raises(Conflict, match="other"):
            await net.ensure()


@in_namespace
async def test_a_table_of_that_name_that_is_not_ours_is_left_alone() -> None:
    sh("nft", "add", "table", "netdev", "banger")
    async with network() as net:
        with pytest.raises(Conflict, match="netdev banger"):
            await net.ensure()
    assert {"lo"} == interfaces()
    assert {("netdev", "banger")} == tables()


@in_namespace
async def test_a_tap_of_that_name_that_is_not_ours_is_left_alone() -> None:
    async with network() as net:
        await net.ensure()
        foreign = plan.tap_name(BRIDGE, "0badcafe")
        sh("ip", "tuntap", "add", foreign, "mode", "tap")
        with pytest.raises(Conflict, match=foreign):
            await net.give_back(foreign)
        sh("ip", "link", "set", foreign, "alias", "banger 4242 idle")
        with pytest.raises(Conflict, match=foreign):
            await net.give_back(foreign)
        await net.fill()
        assert [] == await net.reconcile([])
        assert foreign in taps()


@in_namespace
async def test_a_network_that_overlaps_a_route_is_refused_and_nothing_made() -> None:
    sh("ip", "link", "add", "vpn0", "type", "bridge")
    sh("ip", "link", "set", "vpn0", "up")
    sh("ip", "route", "add", "172.16.0.0/12", "dev", "vpn0", "table", "77")
    async with network() as net:
        for step in (net.check, net.ensure):
            with pytest.raises(Conflict, match="172.16.0.0/12 dev vpn0") as raised:
                await step()
            assert "cidr" in raised.value.hint
    assert {"lo", "vpn0"} == interfaces()
    assert set() == tables()


@in_namespace
async def test_two_instances_live_side_by_side_and_other_tables_stay() -> None:
    sh("nft", "-f", "-", stdin="table inet mine {\n chain c {\n counter\n }\n}\n")
    other = plan.parse_bridge("br-banger2", "172.16.1.1", "172.16.1.0/24")
    async with network(1) as net, network(1, other) as second:
        await net.ensure()
        await second.ensure()
        await asyncio.gather(net.fill(), second.fill())
        theirs = await second.take(
            B, "02:00:00:00:01:02", IPv4Address("172.16.1.2"), uid=0, isolated=True
        )
        assert [] == await net.reconcile([])
        assert theirs in taps()
        await net._call(["bridge-down", "br-banger"])
        assert "br-banger" not in interfaces()
        assert {("inet", "mine"), ("inet", "banger2"), ("netdev", "banger2")} == tables()
        assert theirs in taps()


@in_namespace
async def test_an_address_outside_the_bridge_is_refused_and_no_tap_is_left() -> None:
    async with network() as net:
        await net.ensure()
        for address in ("172.16.0.1", "172.16.0.255", "172.16.1.2", "8.8.8.8"):
            with pytest.raises(InvalidInput):
                await net.take(A, "02:00:00:00:00:02", IPv4Address(address), uid=0, isolated=True)
        with pytest.raises(InvalidInput):
            await net.take(A, BROADCAST, IPv4Address("172.16.0.2"), uid=0, isolated=True)
        with pytest.raises(InvalidInput):
            await net.take(
                A, "02:00:00:00:00:02", IPv4Address("172.16.0.2"), uid=1000, isolated=True
            )
        assert set() == taps()


# ---- rules


@in_namespace
async def test_rules_are_replaced_in_one_step() -> None:
    async with network() as net:
        await net.ensure()
        one = await connect(net, A, 2)
        await net.apply([one])
        assert f"vm_{A}" in sh("nft", "list", "ruleset")
        two = await connect(net, B, 3)
        before = generation()
        await net.apply([two])
        assert before + 1 == generation(), "more than one commit: in between were other rules"
        after = sh("nft", "list", "ruleset")
        assert f"vm_{A}" not in after
        assert f"vm_{B}" in after


def generation() -> int:
    """Return how many commits nftables has seen in this namespace."""
    # NFNL_SUBSYS_NFTABLES 10, NFT_MSG_GETGEN 16; the answer's first attribute is NFTA_GEN_ID.
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netlink:
        netlink.send(struct.pack("=IHHIIBBH", 20, 10 << 8 | 16, 1, 1, 0, 0, 0, 0))
        return int(struct.unpack("!I", netlink.recv(4096)[24:28])[0])


@in_namespace
async def test_refused_rules_leave_those_in_force() -> None:
    async with network() as net:
        await net.ensure()
        port = await connect(net, A, 2)
        await net.apply([port])
        before = sh("nft", "-a", "list", "ruleset")
        with pytest.raises(InvalidInput):
            await net.apply([port, port])
        with pytest.raises(Conflict, match=port.tap):
            await net.apply([replace(port, vm_id=B)])
        assert before == sh("nft", "-a", "list", "ruleset")


@in_namespace
async def test_a_vm_whose_tap_is_gone_does_not_hold_up_the_others() -> None:
    async with network() as net:
        await net.ensure()
        one, two = await connect(net, A, 2), await connect(net, B, 3)
        sh("ip", "link", "del", one.tap)
        await net.apply([one, two])
        assert f"vm_{B}" in sh("nft", "list", "ruleset")


@in_namespace
async def test_flushed_rules_come_back_as_they_were() -> None:
    async with network() as net:
        await net.ensure()
        await net.apply([await connect(net, A, 2)])
        before = sh("nft", "list", "ruleset")
        sh("nft", "flush", "ruleset")
        await net.ensure()
        assert before == sh("nft", "list", "ruleset")


@in_namespace
async def test_a_ruleset_of_a_full_network_loads() -> None:
    async with network() as net:
        await net.ensure()
        ports = [
            Port(f"{i:012x}", plan.tap_name(BRIDGE, f"{i:08x}"), f"02:00:00:00:01:{i:02x}", IPv4Address("172.16.0.0") + i, i % 2 == 0, i % 3 == 0)
            for i in range(2, 250)
        ]  # fmt: skip
        lines = "".join(f"tuntap add {port.tap} mode tap\n" for port in ports)
        sh("ip", "-batch", "-", stdin=lines)
        sh("nft", "-c", "-f", "-", stdin=plan.ruleset(BRIDGE, ports, 0))
        sh("nft", "-f", "-", stdin=plan.ruleset(BRIDGE, ports, 0))


# ---- traffic


@in_namespace
@pytest.mark.parametrize("vnet_hdr", [False, True], ids=["plain", "vnet_hdr"])
async def test_host_and_guest_ping_each_other(vnet_hdr: bool) -> None:
    async with network() as net:
        await net.ensure()
        port = await connect(net, A, 2)
        await net.apply([port])
        with Guest(port, vnet_hdr) as guest:
            assert await host_pings(guest.address)
            guest.send_arp("172.16.0.1")
            answer = await guest.wait(0x0806, socket.inet_aton("172.16.0.1"))
            assert answer is not None and mac_bytes(BRIDGE.mac) == answer[22:28]
            guest.send_ip("172.16.0.1", 1, echo(8, b"to the host"))
            assert await guest.wait(0x0800, b"to the host")


@in_namespace
async def test_the_host_reaches_a_service_of_the_guests() -> None:
    async with network() as net:
        await net.ensure()
        port = await connect(net, A, 2)
        await net.apply([port])
        with Guest(port) as guest, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.setblocking(False)
            client.connect((guest.address, 53))
            client.send(b"question")
            question = await guest.wait(0x0800, b"question")
            assert question is not None
            guest.send_ip(
                "172.16.0.1", 17, udp(53, struct.unpack("!H", question[34:36])[0], b"answer")
            )
            async with asyncio.timeout(ANSWER_S):
                assert b"answer" == await asyncio.get_running_loop().sock_recv(client, 100)


@in_namespace
async def test_a_guest_reaches_no_service_of_the_hosts() -> None:
    async with network() as net:
        await net.ensure()
        port = await connect(net, A, 2)
        await net.apply([port])
        sh("ip", "address", "add", "192.0.2.1/32", "dev", "lo")
        with Guest(port) as guest, socket.create_server(("0.0.0.0", 80)) as server:
            server.setblocking(False)
            for target in ("172.16.0.1", "192.0.2.1"):
                guest.send_ip(target, 6, tcp_syn(guest.address, target, 80))
                answer = await guest.wait(0x0800, socket.inet_aton(target))
                assert answer is not None and answer[47] & 0x04, "not a TCP reset"
            guest.send_ip("172.16.0.1", 17, udp(40000, 53, b"question"))
            refused = await guest.wait(0x0800, b"question")
            assert refused is not None and (3, 13) == (refused[34], refused[35]), "admin prohibited"
            with pytest.raises(BlockingIOError):
                server.accept()


@in_namespace
@pytest.mark.parametrize(
    ("a_isolated", "b_isolated", "br_netfilter"),
    [
        (True, True, False),
        (True, False, False),
        (False, True, False),
        (False, False, False),
        (False, False, True),
    ],
)
async def test_guests_reach_each_other_only_when_both_are_open(
    a_isolated: bool, b_isolated: bool, br_netfilter: bool
) -> None:
    pass_bridged_packets_to_iptables(br_netfilter)
    async with network() as net:
        await net.ensure()
        ports = [
            await connect(net, A, 2, isolated=a_isolated),
            await connect(net, B, 3, isolated=b_isolated),
        ]
        await net.apply(ports)
        is_open = not (a_isolated or b_isolated)
        with Guest(ports[0]) as a, Guest(ports[1]) as b:
            for one, other in ((a, b), (b, a)):
                one.send_arp(other.address)
                wait_s = ANSWER_S if is_open else SILENCE_S
                answer = await one.wait(0x0806, socket.inet_aton(other.address), wait_s)
                assert is_open == (answer is not None)
                for way in (other.mac, BRIDGE.mac, BROADCAST):
                    text = f"{one.address} by {way}".encode()
                    one.send_ip(other.address, 17, udp(9, 9, text), to=way)
                # What has to arrive is waited for; the rest is there by then, or would be.
                if is_open:
                    assert await other.wait(0x0800, f"{one.address} by {other.mac}".encode())
                    assert await other.wait(0x0800, f"{one.address} by {BRIDGE.mac}".encode())
                assert await other.wait(0x0800, f"{one.address} by ".encode(), SILENCE_S) is None
                # By the other's MAC to an address outside: a way past rules on addresses alone.
                one.send_ip("198.51.100.1", 17, udp(9, 9, b"past"), to=other.mac)
                assert await other.wait(0x0800, b"past", SILENCE_S) is None


@in_namespace
async def test_no_broadcast_of_a_guest_arrives_at_another() -> None:
    async with network() as net:
        await net.ensure()
        ports = [
            await connect(net, A, 2, isolated=False),
            await connect(net, B, 3, isolated=False),
        ]
        await net.apply(ports)
        with Guest(ports[0]) as a, Guest(ports[1]) as b:
            a.send_arp("172.16.0.1")
            assert await a.wait(0x0806, socket.inet_aton("172.16.0.1"))
            for target in ("172.16.0.255", "255.255.255.255", "224.0.0.1"):
                a.send_ip(target, 17, udp(9, 9, b"all"), to=BROADCAST)
                a.send_ip(target, 17, udp(9, 9, b"all"))
            a.send(ethernet(BROADCAST, a.mac, 0x88B5, b"all of you, an EtherType of no use" * 2))
            assert await b.wait(0x0800, b"all", SILENCE_S) is None
            assert [] == b.strangers()


@in_namespace
async def test_a_guest_cannot_speak_for_another() -> None:
    async with network() as net:
        await net.ensure()
        port = await connect(net, A, 2, isolated=False)
        victim = await connect(net, B, 3, isolated=False)
        await net.apply([port, victim])
        with Guest(port) as guest, Guest(victim) as other, sniffer() as seen:
            stolen = str(victim.address)
            for lie in (
                {"mac": victim.mac},
                {"address": stolen},
                {"address": stolen, "mac": victim.mac},
                {"address": "172.16.0.1"},
                {"address": "127.0.0.1"},
                {"address": "172.16.0.77"},
            ):
                guest.send_ip("172.16.0.1", 1, echo(8, b"lie"), **lie)
                guest.send_ip(stolen, 17, udp(9, 9, b"lie"), to=victim.mac, **lie)
                guest.send_arp("172.16.0.1", **lie)
            guest.send_arp("172.16.0.1", arp_mac=victim.mac)
            # An announcement that the gateway, or the other, lives here.
            for address in ("172.16.0.1", stolen):
                body = arp(2, guest.mac, address, BROADCAST, address)
                guest.send(ethernet(BROADCAST, guest.mac, 0x0806, body))
                guest.send(ethernet(victim.mac, guest.mac, 0x0806, body))
            # A VLAN tag, and IPv6.
            tagged = struct.pack("!HH", 5, 0x0800) + ip(
                guest.address, stolen, 17, udp(9, 9, b"lie")
            )
            guest.send(ethernet(victim.mac, guest.mac, 0x8100, tagged))
            guest.send(
                ethernet(victim.mac, guest.mac, 0x86DD, b"\x60" + bytes(6) + b"\x40" + bytes(32))
            )
            guest.send_ip("172.16.0.1", 1, echo(8, b"truth"))
            assert await guest.wait(0x0800, b"truth")
            assert [] == other.strangers()
            frames = seen()
            assert 1 == len([frame for frame in frames if b"truth" in frame]), "the sniffer is deaf"
            assert 1 == len(frames)
        assert f"{stolen} lladdr {victim.mac}" in sh("ip", "neigh", "show", "dev", "br-banger")


@contextlib.contextmanager
def sniffer() -> Iterator[Callable[[], list[bytes]]]:
    """What reaches the bridge itself from its taps."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as raw:
        raw.bind(("br-banger", 3))
        raw.setblocking(False)

        def seen() -> list[bytes]:
            frames = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    frame, (_, _, kind, *_) = raw.recvfrom(4096)
                    if kind != socket.PACKET_OUTGOING:
                        frames.append(frame)
            return frames

        yield seen


@in_namespace
async def test_nat_hides_a_guest_behind_the_host_and_no_nat_keeps_it_in() -> None:
    async with network() as net:
        await net.ensure()
        ports = [await connect(net, A, 2, nat=True), await connect(net, B, 3, nat=False)]
        await net.apply(ports)
        with outside(), Guest(ports[0]) as a, Guest(ports[1]) as b:
            a.send_ip("192.0.2.2", 17, udp(40000, 7, b"hello"))
            answer = await a.wait(0x0800, b"hello")
            assert answer is not None and answer.endswith(b"hello from 192.0.2.1")
            b.send_ip("192.0.2.2", 17, udp(40000, 7, b"hello"))
            refused = await b.wait(0x0800, b"hello")
            assert refused is not None and 3 == refused[34], "not an ICMP unreachable"


@in_namespace
async def test_the_outside_reaches_no_guest() -> None:
    async with network() as net:
        await net.ensure()
        port = await connect(net, A, 2)
        await net.apply([port])
        with outside() as process, Guest(port) as guest:
            code = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'%s', ('%s', 9))"
            inside = ["nsenter", f"--net=/proc/{process.pid}/ns/net", sys.executable, "-I", "-c"]
            sh(*inside, code % ("knock", guest.address))
            assert await guest.wait(0x0800, b"knock", SILENCE_S) is None
            # With the rules away the same packet arrives: it was they that kept it out.
            sh("nft", "delete", "table", "inet", "banger")
            sh(*inside, code % ("knock", guest.address))
            assert await guest.wait(0x0800, b"knock")


@in_namespace
async def test_nat_taken_away_ends_what_was_going_on() -> None:
    async with network() as net:
        await net.ensure()
        port = await connect(net, A, 2)
        await net.apply([port])
        with outside(), Guest(port) as guest:
            guest.send_ip("192.0.2.2", 17, udp(40000, 7, b"one"))
            assert await guest.wait(0x0800, b"one from 192.0.2.1")
            await net.apply([replace(port, nat=False)])
            guest.send_ip("192.0.2.2", 17, udp(40000, 7, b"two"))
            assert await guest.wait(0x0800, b"two from 192.0.2.1", SILENCE_S) is None


@in_namespace
@pytest.mark.parametrize("address", ["169.254.169.254", "169.254.1.1", "100.100.100.200"])
async def test_metadata_addresses_are_blocked(address: str) -> None:
    async with network() as net:
        await net.ensure()
        port = await connect(net, A, 2)
        await net.apply([port])
        with outside(), Guest(port) as guest:
            sh("ip", "route", "add", f"{address}/32", "via", "192.0.2.2")
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as raw:
                raw.bind(("up0", 3))
                raw.settimeout(ANSWER_S)
                guest.send_ip(address, 17, udp(40000, 80, b"credentials"))
                guest.send_ip("192.0.2.2", 17, udp(40000, 7, b"allowed"))
                frame = b""
                while b"allowed" not in frame:
                    frame = raw.recv(4096)
                    assert b"credentials" not in frame


@in_namespace
async def test_docker_like_forward_policy_is_reported() -> None:
    async with network() as net:
        await net.ensure()
        assert (await net._show())["forward_policy_drop"] is False
        sh(
            "nft",
            "-f",
            "-",
            stdin="table ip filter {\n chain FORWARD {\n type filter hook forward priority filter; policy drop;\n }\n}\n",
        )
        assert (await net._show())["forward_policy_drop"] is True
        for key in ("iifname", "oifname"):
            sh(
                "nft",
                "add",
                "rule",
                "ip",
                "filter",
                "FORWARD",
                key,
                "br-banger",
                "counter",
                "accept",
            )
        assert (await net._show())["forward_policy_drop"] is False


# ---- kills and restarts


@in_namespace
async def test_reconcile_after_a_restart_keeps_what_is_owned_and_removes_the_rest() -> None:
    async with network(pool_size=2) as net:
        await net.ensure()
        await net.fill()
        kept, orphan = await connect(net, A, 2), await connect(net, B, 3)
        await net.apply([kept, orphan])
        await net.fill()
    before = taps()
    async with network(pool_size=1) as net:
        with Guest(kept) as guest:
            removed = await net.reconcile([kept])
            assert orphan.tap in removed
            assert before - taps() == set(removed)
            assert 2 == len(taps()), "the VM's, and one idle"
            assert await host_pings(guest.address)
            rules = sh("nft", "list", "ruleset")
            assert f"vm_{A}" in rules and f"vm_{B}" not in rules
        # The idle one is the pool's: the next VM makes none.
        (idle,) = taps() - {kept.tap}
        assert idle == (await connect(net, B, 3)).tap


@in_namespace
async def test_reconcile_after_a_reboot_makes_the_bridge_only_for_vms() -> None:
    async with network(pool_size=1) as net:
        assert [] == await net.reconcile([])
        assert {"lo"} == interfaces()
        gone = plan.parse_port(
            BRIDGE, f"{A} {plan.tap_name(BRIDGE, '00000001')} 02:00:00:00:00:02 172.16.0.2 nat open"
        )
        assert [] == await net.reconcile([gone])
        assert "br-banger" in interfaces()
        assert {("inet", "banger"), ("netdev", "banger")} == tables()


@in_namespace
async def test_a_helper_killed_at_any_step_leaves_nothing_that_is_not_cleaned() -> None:
    async with network() as net:
        for verb in ("bridge-up", "tap-add", "tap-take", "rules", "tap-del"):
            for step in range(1, 12):
                tap = plan.tap_name(BRIDGE, f"{step:08x}")
                line = f"{A} {tap} 02:00:00:00:00:02 172.16.0.2 nat open\n"
                words = {
                    "bridge-up": ["br-banger", "172.16.0.1/24"],
                    "tap-add": ["br-banger", tap, "0"],
                    "tap-take": f"br-banger {tap} {A} 0 02:00:00:00:00:02 172.16.0.2 open".split(),
                    "rules": ["br-banger", "172.16.0.1/24"],
                    "tap-del": ["br-banger", tap],
                }
                if verb == "bridge-up":
                    await net._call(["bridge-down", "br-banger"])
                for earlier in list(words)[1 : list(words).index(verb)]:
                    await net._call([earlier, *words[earlier]], line.encode())
                ended = kill_at(step, [verb, *words[verb]], line)
                if tap in interfaces():
                    assert alias(tap).startswith("banger 0 "), "a tap that nobody can name"
                await net.reconcile([])
                assert set() == taps(), f"{verb} killed at step {step}"
                await net.ensure()
                assert "" == sh("ip", "neigh", "show", "dev", "br-banger", "nud", "permanent")
                if ended:
                    assert step > 1, "it was never killed"
                    break
            else:
                pytest.fail(f"{verb} has more steps than are tried")


def kill_at(step: int, words: list[str], stdin: str) -> bool:
    """Run the helper and kill it as it starts its `step`-th change; whether it ended before."""
    code = (
        "import os, signal, sys\n"
        "from banger.network import helper\n"
        "left = int(sys.argv[1]); real = {}\n"
        "def counted(name):\n"
        "    real[name] = getattr(helper, name)\n"
        "    def call(*words, **more):\n"
        "        global left\n"
        "        left -= 1\n"
        "        if left == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return real[name](*words, **more)\n"
        "    setattr(helper, name, call)\n"
        "counted('_run'); counted('_write_sysctl')\n"
        "sys.exit(helper.main(sys.argv[2:]))\n"
    )
    argv = [sys.executable, "-I", "-c", code, str(step), *words]
    done = subprocess.run(argv, input=stdin.encode(), capture_output=True, timeout=30, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode == 0


# ---- hosts that cannot


@in_namespace
async def test_a_host_without_nft_is_told(tmp_path: Path) -> None:
    for program in ("ip", "bridge"):
        (tmp_path / program).symlink_to(f"/usr/sbin/{program}")
    commands = HostCommands()
    commands.environment["PATH"] = str(tmp_path)
    net = BridgeNetwork(commands, BRIDGE, pool_size=0, tap_uid=0)
    with pytest.raises(Unavailable, match="nft is not installed"):
        await net.check()
    assert {"lo"} == interfaces()


@in_namespace
async def test_names_are_registered_where_systemd_resolved_is(tmp_path: Path) -> None:
    async with network() as net:
        await net.ensure()
        has_resolved = shutil.which("resolvectl", path="/usr/bin:/bin") is not None
        if not has_resolved:
            assert not await net.register_names("127.0.0.1:15353")
        with pytest.raises(InvalidInput):
            await net.register_names("8.8.8.8:53")
    log = tmp_path / "log"
    fake = tmp_path / "resolvectl"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    fake.chmod(0o755)
    code = (
        "import sys; from banger.network import helper\n"
        f"helper.PROGRAM_PATH = '{tmp_path}:' + helper.PROGRAM_PATH\n"
        "sys.exit(helper.main(sys.argv[1:]))"
    )
    for words in (["names", "br-banger", "127.0.0.1:15353"], ["names-off", "br-banger"]):
        sh(sys.executable, "-I", "-c", code, *words)
    assert [
        "dns br-banger 127.0.0.1:15353",
        "domain br-banger ~vm",
        "default-route br-banger false",
        "revert br-banger",
    ] == log.read_text().splitlines()


# ---- the way through sudo


@pytest.fixture
def not_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An interpreter and a helper that are root's alone, as in /opt."""
    directory = Path("/opt") / f"banger-test-{os.getpid()}"
    directory.mkdir(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(directory / "python"))
    (directory / "python").symlink_to("/usr/bin/python3")
    helper = directory / "banger-net-helper"
    helper.write_text("#!/bin/sh\n")
    helper.chmod(0o755)
    yield helper
    shutil.rmtree(directory)


def with_sudo(directory: Path, script: str | None) -> BridgeNetwork:
    commands = HostCommands()
    for program in ("ip", "bridge", "nft"):
        (directory / program).symlink_to(f"/usr/sbin/{program}")
    if script is not None:
        (directory / "sudo").write_text(script)
        (directory / "sudo").chmod(0o755)
    commands.environment["PATH"] = str(directory)
    return BridgeNetwork(commands, BRIDGE, pool_size=0, tap_uid=1000)


@in_namespace
async def test_a_host_without_sudo_is_told(not_root: None, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no sudo") as raised:
        await with_sudo(tmp_path, None).check()
    assert "user network" in raised.value.hint


@in_namespace
async def test_sudo_that_wants_a_password_is_told_with_the_line_to_add(
    not_root: None, trusted: Path, tmp_path: Path
) -> None:
    script = "#!/bin/sh\necho 'sudo: a password is required' >&2\nexit 1\n"
    with pytest.raises(Unavailable, match="a password is required") as raised:
        await with_sudo(tmp_path, script).check()
    assert f"root ALL=(root) NOPASSWD: {trusted}" in raised.value.hint


@in_namespace
async def test_the_helper_is_called_through_sudo_without_a_question(
    not_root: None, trusted: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    script = f'#!/bin/sh\nPATH=/usr/bin:/bin\nprintf "%s\\n" "$*" >> {log}\necho \'{{"error": {{"code": "conflict", "message": "no", "hint": "h"}}}}\'\nexit 1\n'
    with pytest.raises(Conflict, match="bridge network: no"):
        await with_sudo(tmp_path, script).check()
    assert f"-n {trusted} show br-banger\n" == log.read_text()


@pytest.mark.parametrize("spoil", ["file", "directory", "owner", "link"])
def test_a_helper_that_others_can_write_gets_no_sudo(
    spoil: str, trusted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_module.plan, "__file__", str(trusted))
    assert trusted == find_trusted_helper()
    if spoil == "file":
        trusted.chmod(0o775)
    elif spoil == "directory":
        trusted.parent.chmod(0o757)
    elif spoil == "owner":
        os.chown(trusted, 65534, -1)
    else:
        # Root's file at last, by way of a directory of another user's.
        hop = trusted.parent / "hop"
        hop.mkdir()
        (hop / "helper").symlink_to("/usr/bin/true")
        os.chown(hop, 65534, -1)
        trusted.unlink()
        trusted.symlink_to(hop / "helper")
    with pytest.raises(Unavailable, match="sudo rule") as raised:
        find_trusted_helper()
    assert "/opt" in raised.value.hint


def test_an_absent_helper_is_told(trusted: Path) -> None:
    trusted.unlink()
    with pytest.raises(BangerError, match="not installed"):
        find_trusted_helper()
