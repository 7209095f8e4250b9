"""The zone `vm.`: a query's bytes in, an answer's bytes out. No socket, no clock, no table of VMs.

Owns what is answered to whom, by RFC 1035, 2308, 6891, 8482, 8906 and 9619. dnspython takes the
messages apart; importing it costs 120 ms, so `network.dns` imports this module when it starts.
There is nothing below a VM: `x.box.vm` does not exist, whatever runs in `box`.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset

# A machine's address is another's a minute later, and a question costs 0.2 ms: what is asked
# again within one page load is cached, and nothing longer.
ADDRESS_TTL_S = 5
# Shorter still: who asked for a VM a moment too early asks again.
NEGATIVE_TTL_S = 1
MESSAGE_LIMIT_BYTES = 4096  # no question is longer; it also bounds what parsing one may cost
_UDP_PAYLOAD_BYTES = 1232  # what DNS Flag Day 2020 agreed on; our answers take less than 512
_PLAIN_UDP_BYTES = 512  # RFC 1035, 4.2.1
_HEADER = struct.Struct("!6H")
_ORIGIN = dns.name.from_text("vm.")
_VM_NAME = re.compile(rb"[a-z0-9-]{1,63}")
# RFC 6303, 3: the form of a zone that is served locally; nobody transfers it.
_SOA = dns.rdata.from_text(
    dns.rdataclass.IN, dns.rdatatype.SOA, f"vm. nobody.invalid. 1 3600 1200 604800 {NEGATIVE_TTL_S}"
)
_NS = dns.rdata.from_text(dns.rdataclass.IN, dns.rdatatype.NS, "vm.")


@dataclass(frozen=True, slots=True)
class Question:
    """A well-formed question about one VM, by its name without `.vm`."""

    vm: str
    message: dns.message.Message


def read(wire: bytes, *, tcp: bool) -> Question | bytes | None:
    """Return the VM a query asks for, or the answer when it needs no VM, or None for silence.

    Raises nothing, whatever the bytes are.
    """
    if len(wire) < _HEADER.size:
        return None
    number, flags, *_ = _HEADER.unpack_from(wire)
    if flags & dns.flags.QR:
        return None  # answering answers is how two servers never stop
    if dns.opcode.from_flags(flags) != dns.opcode.QUERY:
        return _bare(number, flags, dns.rcode.NOTIMP)
    if len(wire) > MESSAGE_LIMIT_BYTES:
        return _bare(number, flags, dns.rcode.FORMERR)
    try:
        query = dns.message.from_wire(wire)
        return _read(query, tcp=tcp)
    except Exception:  # noqa: BLE001 - dnspython raises ValueError and others beside its own
        return _bare(number, flags, dns.rcode.FORMERR)


def answer(question: Question, exists: bool, address: IPv4Address | None, *, tcp: bool) -> bytes:
    """Return the answer about a VM: its address, no data, or no such name."""
    query = question.message
    asked = query.question[0]
    response = _response(query)
    response.flags |= dns.flags.AA
    if not exists:
        response.set_rcode(dns.rcode.NXDOMAIN)
    elif address is not None and asked.rdtype in (dns.rdatatype.A, dns.rdatatype.ANY):
        # The owner is spelled as it was asked for: resolvers that mix the case check it.
        data = dns.rdata.from_text(dns.rdataclass.IN, dns.rdatatype.A, str(address))
        response.answer.append(dns.rrset.from_rdata(asked.name, ADDRESS_TTL_S, data))
        return _to_wire(response, tcp=tcp)
    _say_negative(response)
    return _to_wire(response, tcp=tcp)


def failure(question: Question, *, tcp: bool) -> bytes:
    """Return SERVFAIL: whether the VM exists could not be found out."""
    response = _response(question.message)
    response.set_rcode(dns.rcode.SERVFAIL)
    return _to_wire(response, tcp=tcp)


def _read(query: dns.message.Message, *, tcp: bool) -> Question | bytes:
    if query.edns > 0:
        response = _response(query)
        response.set_rcode(dns.rcode.BADVERS)
        return _to_wire(response, tcp=tcp)
    if len(query.question) != 1 or len(query.question[0]) > 1:
        return _refuse(query, dns.rcode.FORMERR, tcp=tcp)
    asked = query.question[0]
    if asked.rdclass != dns.rdataclass.IN:
        return _refuse(query, dns.rcode.REFUSED, tcp=tcp)
    if asked.rdtype in (dns.rdatatype.AXFR, dns.rdatatype.IXFR):
        return _refuse(query, dns.rcode.REFUSED, tcp=tcp)
    if not asked.name.is_subdomain(_ORIGIN):
        return _refuse(query, dns.rcode.REFUSED, tcp=tcp)
    labels = [label.lower() for label in asked.name.relativize(_ORIGIN).labels]
    if not labels:
        return _apex(query, tcp=tcp)
    if len(labels) == 1 and _VM_NAME.fullmatch(labels[0]):
        return Question(labels[0].decode(), query)
    response = _response(query)
    response.flags |= dns.flags.AA
    response.set_rcode(dns.rcode.NXDOMAIN)
    _say_negative(response)
    return _to_wire(response, tcp=tcp)


def _apex(query: dns.message.Message, *, tcp: bool) -> bytes:
    asked = query.question[0]
    response = _response(query)
    response.flags |= dns.flags.AA
    if asked.rdtype in (dns.rdatatype.SOA, dns.rdatatype.ANY):
        response.answer.append(dns.rrset.from_rdata(asked.name, NEGATIVE_TTL_S, _SOA))
    elif asked.rdtype == dns.rdatatype.NS:
        response.answer.append(dns.rrset.from_rdata(asked.name, ADDRESS_TTL_S, _NS))
    else:
        _say_negative(response)
    return _to_wire(response, tcp=tcp)


def _say_negative(response: dns.message.Message) -> None:
    # RFC 2308: the SOA in the authority section says how long "no" holds.
    response.authority.append(dns.rrset.from_rdata(_ORIGIN, NEGATIVE_TTL_S, _SOA))


def _refuse(query: dns.message.Message, rcode: dns.rcode.Rcode, *, tcp: bool) -> bytes:
    response = _response(query)
    response.set_rcode(rcode)
    return _to_wire(response, tcp=tcp)


def _response(query: dns.message.Message) -> dns.message.Message:
    response = dns.message.make_response(query, our_payload=_UDP_PAYLOAD_BYTES, pad=0)
    if query.edns >= 0 and query.ednsflags & dns.flags.DO:
        response.ednsflags |= dns.flags.DO  # RFC 3225: copied, signed or not
    return response


def _to_wire(response: dns.message.Message, *, tcp: bool) -> bytes:
    limit = 65535
    if not tcp:
        payload = response.request_payload if response.edns >= 0 else _PLAIN_UDP_BYTES
        limit = min(max(payload, _PLAIN_UDP_BYTES), _UDP_PAYLOAD_BYTES)
    return response.to_wire(max_size=limit, prefer_truncation=True)


def _bare(number: int, flags: int, rcode: dns.rcode.Rcode) -> bytes:
    """Return an answer of a header alone, to what could not be taken apart."""
    kept = flags & (0x7800 | dns.flags.RD)  # the opcode, and RD as RFC 1035 wants it
    return _HEADER.pack(number, dns.flags.QR | kept | rcode, 0, 0, 0, 0)
