"""The name server of `<vm>.vm`, asked by the real `dig`, by dnspython, and by hostile bytes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from ipaddress import IPv4Address

import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdatatype
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from banger.errors import Conflict, InvalidInput
from banger.network import dns as server_module
from banger.network import zone
from banger.network.dns import NameAnswer, NameServer, recipe

BOX = IPv4Address("172.16.0.7")
KNOWN = {
    "box": NameAnswer(True, BOX),
    "a-1": NameAnswer(True, IPv4Address("172.16.0.8")),
    "asleep": NameAnswer(True, None),
}


async def lookup(name: str) -> NameAnswer:
    if name == "broken":
        raise RuntimeError("no database")
    if name == "slow":
        await asyncio.sleep(3600)
    return KNOWN.get(name, NameAnswer(False, None))


@pytest.fixture
async def server() -> AsyncIterator[NameServer]:
    made = NameServer(lookup)
    await made.start("127.0.0.1:0")
    yield made
    await made.close()


def port_of(server: NameServer) -> int:
    assert server.endpoint is not None
    return server.endpoint[1]


async def dig(server: NameServer, *words: str) -> str:
    process = await asyncio.create_subprocess_exec(
        "dig", "@127.0.0.1", "-p", str(port_of(server)), "+time=5", "+tries=1", "+norecurse",
        *words, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 0, out
    return out.decode()


async def udp(server: NameServer, wire: bytes, timeout_s: float = 5) -> bytes | None:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", port_of(server)))
        await loop.sock_sendall(sock, wire)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return await loop.sock_recv(sock, 65535)
    return None


async def ask(server: NameServer, query: dns.message.Message) -> dns.message.Message:
    answer = await udp(server, query.to_wire())
    assert answer is not None
    return dns.message.from_wire(answer)


# -- dig


@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
async def test_dig_gets_the_address_with_a_short_life(server: NameServer, transport: str) -> None:
    out = await dig(server, transport, "box.vm", "A")
    assert "status: NOERROR" in out
    assert "flags: qr aa;" in out
    assert "EDNS: version: 0" in out
    line = next(line for line in out.splitlines() if line.startswith("box.vm."))
    assert line.split() == ["box.vm.", "5", "IN", "A", str(BOX)]
    assert "WARNING" not in out


@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["box.vm", "AAAA"], "NOERROR"),
        (["box.vm", "TXT"], "NOERROR"),
        (["asleep.vm", "A"], "NOERROR"),
        (["vm", "A"], "NOERROR"),
        (["nobody.vm", "A"], "NXDOMAIN"),
        (["x.box.vm", "A"], "NXDOMAIN"),
        (["under_score.vm", "A"], "NXDOMAIN"),
        ([r"b\.ox.vm", "A"], "NXDOMAIN"),
        (["\\000\\255.vm", "A"], "NXDOMAIN"),
    ],
)
async def test_no_data_and_no_name_come_with_the_soa(
    server: NameServer, words: list[str], status: str, transport: str
) -> None:
    out = await dig(server, transport, *words)
    assert f"status: {status}" in out
    assert " aa" in out
    assert "ANSWER: 0, AUTHORITY: 1" in out
    assert "vm. nobody.invalid. 1 3600 1200 604800 1" in out


@pytest.mark.parametrize("words", [["SOA"], ["NS"], ["ANY", "+tcp"]])
async def test_the_zone_itself_has_soa_and_ns(server: NameServer, words: list[str]) -> None:
    out = await dig(server, "vm", *words)
    assert "status: NOERROR" in out
    assert "ANSWER: 1" in out


@pytest.mark.parametrize(
    "words",
    [
        ["example.org", "A"],
        ["box.vm.example.org", "A"],
        ["boxvm", "A"],
        ["xvm", "A"],
        [".", "NS"],
        ["version.bind", "TXT", "CH"],
        ["box.vm", "A", "CH"],
        ["7.0.16.172.in-addr.arpa", "PTR"],
    ],
)
@pytest.mark.parametrize("recursion", ["+norecurse", "+recurse"])
async def test_what_is_outside_is_refused(
    server: NameServer, words: list[str], recursion: str
) -> None:
    out = await dig(server, recursion, *words)
    assert "status: REFUSED" in out
    assert " ra" not in out
    assert " aa" not in out
    assert "ANSWER: 0" in out


async def test_the_zone_is_not_handed_out(server: NameServer) -> None:
    assert "Transfer failed" in await dig(server, "vm", "AXFR")


async def test_dig_speaks_plain_dns_and_unknown_edns(server: NameServer) -> None:
    plain = await dig(server, "+noedns", "box.vm")
    assert str(BOX) in plain
    assert "EDNS" not in plain
    assert "status: BADVERS" in await dig(server, "+edns=1", "+noednsneg", "box.vm")
    assert str(BOX) in await dig(server, "+ednsopt=100:00ff", "+ednsflags=0x0080", "box.vm")
    assert "flags: do" in await dig(server, "+dnssec", "box.vm")
    assert "status: NOTIMP" in await dig(server, "+opcode=15", "+noedns", "box.vm")


async def test_mixed_case_is_answered_as_it_was_asked(server: NameServer) -> None:
    query = dns.message.make_query("BoX.vM.", "A")
    answer = await udp(server, query.to_wire())
    assert answer is not None
    found = dns.message.from_wire(answer)
    assert found.question[0].name.labels == (b"BoX", b"vM", b"")
    assert found.answer[0].name.labels == (b"BoX", b"vM", b"")
    assert found.answer[0][0].address == str(BOX)  # type: ignore[attr-defined]


async def test_any_gets_the_address(server: NameServer) -> None:
    found = await ask(server, dns.message.make_query("box.vm.", "ANY"))
    assert [rrset.rdtype for rrset in found.answer] == [dns.rdatatype.A]


async def test_failing_lookup_is_servfail_and_bounded(
    server: NameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_LOOKUP_S", 0.05)
    for name in ("broken.vm.", "slow.vm."):
        found = await ask(server, dns.message.make_query(name, "A"))
        assert found.rcode() == dns.rcode.SERVFAIL
        assert not found.flags & dns.flags.AA


# -- malformed


def header(flags: int = 0, counts: tuple[int, int, int, int] = (1, 0, 0, 0)) -> bytes:
    return struct.pack("!6H", 4711, flags, *counts)


QUESTION = b"\x03box\x02vm\x00\x00\x01\x00\x01"


@pytest.mark.parametrize(
    "wire",
    [
        header() + b"\x03bo",
        header(),
        header() + b"\xc0\x0c\x00\x01\x00\x01",  # a name that points at itself
        header() + b"\xff" + QUESTION,
        header(counts=(2, 0, 0, 0)) + QUESTION + QUESTION,
        header(counts=(2, 0, 0, 0)) + QUESTION + b"\x01x\x02vm\x00\x00\x01\x00\x01",
        header(counts=(0, 0, 0, 0)),
        header() + QUESTION + b"trailing",
        header(counts=(1, 0, 0, 2))
        + QUESTION
        + b"\x00\x00\x29\x04\xd0\x00\x00\x00\x00\x00\x00" * 2,
        header() + QUESTION + bytes(5000),
    ],
)
async def test_malformed_query_is_formerr(server: NameServer, wire: bytes) -> None:
    answer = await udp(server, wire)
    assert answer is not None
    number, flags = struct.unpack_from("!2H", answer)
    assert (number, flags & 0x8000, flags & 15) == (4711, 0x8000, dns.rcode.FORMERR)
    assert len(answer) <= len(wire)


async def test_other_opcodes_are_not_implemented(server: NameServer) -> None:
    for opcode in (1, 2, 4, 5, 6, 15):
        answer = await udp(server, header(opcode << 11) + QUESTION)
        assert answer is not None
        flags = struct.unpack_from("!2H", answer)[1]
        assert (flags >> 11 & 15, flags & 15) == (opcode, dns.rcode.NOTIMP)


async def test_answers_and_fragments_of_headers_get_silence(server: NameServer) -> None:
    for wire in (header(0x8000) + QUESTION, b"", b"x" * 11):
        assert await udp(server, wire, timeout_s=0.2) is None
    assert (await ask(server, dns.message.make_query("box.vm.", "A"))).answer


def query_bytes() -> bytes:
    return dns.message.make_query("box.vm.", "A", use_edns=0, payload=1232).to_wire()


_VALID = query_bytes()


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    wire = bytearray(_VALID)
    for _ in range(draw(st.integers(1, 6))):
        if not wire:
            break
        at = draw(st.integers(0, len(wire) - 1))
        kind = draw(st.sampled_from(["set", "cut", "insert", "repeat"]))
        if kind == "set":
            wire[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del wire[at : at + draw(st.integers(1, 8))]
        elif kind == "insert":
            wire[at:at] = draw(st.binary(max_size=8))
        else:
            wire[at:at] = wire[: draw(st.integers(0, len(wire)))]
    return bytes(wire)


def check_wire(wire: bytes, *, tcp: bool) -> None:
    found = zone.read(wire, tcp=tcp)
    if isinstance(found, zone.Question):
        assert 1 <= len(found.vm) <= 63
        for exists, address in ((True, BOX), (True, None), (False, None)):
            check_answer(wire, zone.answer(found, exists, address, tcp=tcp))
        check_answer(wire, zone.failure(found, tcp=tcp))
    elif found is not None:
        check_answer(wire, found)


def check_answer(wire: bytes, answer: bytes) -> None:
    assert answer[:2] == wire[:2]
    parsed = dns.message.from_wire(answer)
    assert parsed.flags & dns.flags.QR
    assert not parsed.flags & dns.flags.RA
    assert len(answer) <= 1232


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=600), st.booleans())
def test_any_bytes_are_answered_well_or_not_at_all(wire: bytes, tcp: bool) -> None:
    check_wire(wire, tcp=tcp)
    check_wire(header() + wire, tcp=tcp)


@settings(max_examples=600, deadline=None)
@given(mutated(), st.booleans())
def test_mutated_queries_are_answered_well_or_not_at_all(wire: bytes, tcp: bool) -> None:
    check_wire(wire, tcp=tcp)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=80), mutated()), max_size=50))
def test_server_survives_a_burst_of_hostile_packets(packets: list[bytes]) -> None:
    async def run() -> None:
        made = NameServer(lookup)
        await made.start("127.0.0.1:0")
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                for packet in packets:
                    sock.sendto(packet, ("127.0.0.1", port_of(made)))
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(made))
            for packet in packets:
                writer.write(len(packet).to_bytes(2) + packet)
            with contextlib.suppress(OSError):
                await writer.drain()
            writer.close()
            for _ in range(3):  # the burst may push one question out
                answer = await udp(made, _VALID, timeout_s=2)
                if answer is not None:
                    break
            assert answer is not None
            assert dns.message.from_wire(answer).answer
        finally:
            await made.close()

    asyncio.run(run())


# -- TCP


async def talk(server: NameServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port_of(server))


async def receive(reader: asyncio.StreamReader) -> dns.message.Message:
    async with asyncio.timeout(5):
        length = int.from_bytes(await reader.readexactly(2))
        return dns.message.from_wire(await reader.readexactly(length))


async def test_one_connection_carries_several_queries(server: NameServer) -> None:
    reader, writer = await talk(server)
    names = ["box.vm.", "nobody.vm.", "a-1.vm."]
    queries = [dns.message.make_query(name, "A") for name in names]
    stream = b"".join(
        len(wire).to_bytes(2) + wire for wire in (query.to_wire() for query in queries)
    )
    for byte in stream:  # in pieces, as a network may bring it
        writer.write(bytes([byte]))
        await asyncio.sleep(0)
    assert [(await receive(reader)).id for _ in names] == [query.id for query in queries]
    writer.close()


async def test_oversized_query_ends_the_connection(server: NameServer) -> None:
    reader, writer = await talk(server)
    writer.write(b"\xff\xff")
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    writer.close()
    assert (await ask(server, dns.message.make_query("box.vm.", "A"))).answer


async def test_idle_connection_is_ended(
    server: NameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_IDLE_S", 0.1)
    reader, writer = await talk(server)
    writer.write(b"\x00")  # half a length
    async with asyncio.timeout(5):
        assert await reader.read() == b""
    writer.close()


async def test_seventeenth_connection_is_refused_until_one_goes(server: NameServer) -> None:
    held = []
    for _ in range(16):
        reader, writer = await talk(server)
        writer.write(len(_VALID).to_bytes(2) + _VALID)
        assert (await receive(reader)).answer
        held.append(writer)
    reader, writer = await talk(server)
    writer.write(len(_VALID).to_bytes(2) + _VALID)
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(5):
            assert await reader.read() == b""
    writer.close()
    held.pop().close()
    async with asyncio.timeout(5):
        while True:
            reader, writer = await talk(server)
            writer.write(len(_VALID).to_bytes(2) + _VALID)
            with contextlib.suppress(OSError, EOFError):
                assert (await receive(reader)).answer
                break
            writer.close()
    for each in [*held, writer]:
        each.close()


# -- start and close


async def test_taken_port_is_a_designed_error_and_leaves_nothing(server: NameServer) -> None:
    other = NameServer(lookup)
    with pytest.raises(Conflict, match="in use") as caught:
        await other.start(f"127.0.0.1:{port_of(server)}")
    assert "dns_listen_addr" in caught.value.hint
    await other.close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        with pytest.raises(Conflict):  # UDP alone is taken: TCP is let go of again
            await other.start(f"127.0.0.1:{port}")
    await other.start(f"127.0.0.1:{port}")
    assert other.endpoint == ("127.0.0.1", port)
    await other.close()


@pytest.mark.parametrize("listen", ["", "127.0.0.1", "0.0.0.0:5353", "127.0.0.1:x", "::1:53", ":1"])
async def test_only_loopback_is_listened_on(listen: str) -> None:
    with pytest.raises(InvalidInput):
        await NameServer(lookup).start(listen)


async def test_closed_server_frees_its_port_at_once(server: NameServer) -> None:
    port = port_of(server)
    reader, writer = await talk(server)
    writer.write(b"\x00")
    await server.close()
    await server.close()
    assert server.endpoint is None
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    writer.close()
    await server.start(f"127.0.0.1:{port}")
    await server.start(f"127.0.0.1:{port}")
    assert (await ask(server, dns.message.make_query("box.vm.", "A"))).answer


def test_recipe_is_one_line_for_both_dnsmasqs() -> None:
    text = recipe("127.0.0.1:15353")
    assert "server=/vm/127.0.0.1#15353" in text
    assert "/etc/dnsmasq.d/" in text
    assert "/etc/NetworkManager/dnsmasq.d/" in text
    assert "\n" not in text
