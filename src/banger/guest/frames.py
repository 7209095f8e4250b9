"""The frames of agent/PROTOCOL.md, as a codec that knows no socket.

Owns frame types, limits, the encoder, the incremental decoder and the search for HELLO_OK.
Treats every byte of the agent as hostile: whatever comes, the result is frames or ProtocolError.
"""

from __future__ import annotations

import json
import struct

from banger.errors import Unavailable

VERSION = 1
MAX_PAYLOAD = 65536
MAX_REQUEST = 8 << 20
MAX_HELLO_OK = 4096
STDIN_WINDOW = 256 << 10
MAGIC = b"\xf5BANGER\n"
HEADER_BYTES = 5

HELLO = 0x01
HELLO_OK = 0x02
REQUEST_PART = 0x03
REQUEST = 0x04
END = 0x05
ERROR = 0x06
BYE = 0x07
BYE_OK = 0x08
STDIN = 0x10
STDIN_EOF = 0x11
RESIZE = 0x12
SIGNAL = 0x13
STDOUT = 0x20
STDERR = 0x21
STDIN_CREDIT = 0x22
EXIT = 0x23
STARTED = 0x24
TAR_DATA = 0x30
TAR_EOF = 0x31
DATA = 0x40
DATA_EOF = 0x41
FORWARD_OK = 0x42
MISSED = 0x50
RESTARTED = 0x51

FROM_AGENT = frozenset(
    (
        HELLO_OK,
        END,
        ERROR,
        BYE_OK,
        STDOUT,
        STDERR,
        STDIN_CREDIT,
        EXIT,
        STARTED,
        TAR_DATA,
        TAR_EOF,
        DATA,
        DATA_EOF,
        FORWARD_OK,
        MISSED,
        RESTARTED,
    )
)
# What a program at a session's socket on this host may send.
FROM_VIEWER = frozenset((STDIN, STDIN_EOF, RESIZE, SIGNAL))
_HEADER = struct.Struct(">BI")
_CREDIT = struct.Struct(">I")


class ProtocolError(Unavailable):
    """The agent sent bytes that make no sense."""

    code = "agent_protocol"


def encode(kind: int, payload: bytes | bytearray | memoryview = b"") -> bytes:
    """Return one frame; raises ValueError when the payload is too long for one."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a frame's payload has at most {MAX_PAYLOAD} bytes, not {len(payload)}")
    return _HEADER.pack(kind, len(payload)) + bytes(payload)


def encode_json(kind: int, value: object) -> bytes:
    """Return one frame of compact JSON."""
    return encode(kind, json.dumps(value, separators=(",", ":")).encode())


def encode_hello(nonce: str) -> bytes:
    """Return the HELLO that begins a stream; `nonce` is 32 hex digits."""
    return encode(HELLO, MAGIC + json.dumps({"version": VERSION, "nonce": nonce}).encode())


def encode_request(request: dict[str, object]) -> bytes:
    """Return REQUEST_PART frames and the REQUEST frame; raises ValueError above the limit."""
    raw = json.dumps(request, separators=(",", ":")).encode()
    if len(raw) > MAX_REQUEST:
        raise ValueError(f"a request has at most {MAX_REQUEST} bytes, not {len(raw)}")
    parts = [raw[i : i + MAX_PAYLOAD] for i in range(0, len(raw), MAX_PAYLOAD)]
    frames = [encode(REQUEST_PART, part) for part in parts[:-1]]
    frames.append(encode(REQUEST, parts[-1]))
    return b"".join(frames)


def decode_object(payload: bytes) -> dict[str, object]:
    """Parse a control frame's JSON object."""
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the agent sent a control frame that is not JSON") from error
    if not isinstance(value, dict):
        raise ProtocolError("the agent sent a control frame that is not an object")
    return value


def decode_credit(payload: bytes) -> int:
    """Return the bytes of a STDIN_CREDIT frame."""
    if len(payload) != _CREDIT.size:
        raise ProtocolError("the agent sent a STDIN_CREDIT of a wrong length")
    credit: int = _CREDIT.unpack(payload)[0]
    if credit > STDIN_WINDOW:
        raise ProtocolError("the agent gave back more credit than there is")
    return credit


class Decoder:
    """Turns the bytes of the agent, or of another `sender` of the `known` types, into frames.

    `feed` takes what arrived, `next_frame` returns a whole frame or None. Memory is bounded by the
    caller: it feeds no more while frames are there, so at most one frame and one read is held.
    """

    __slots__ = ("_buffer", "_known", "_sender", "_start")

    def __init__(
        self, rest: bytes = b"", *, known: frozenset[int] = FROM_AGENT, sender: str = "the agent"
    ) -> None:
        self._buffer = bytearray(rest)
        self._start = 0
        self._known = known
        self._sender = sender

    def feed(self, data: bytes) -> None:
        """Append what arrived."""
        if self._start:
            del self._buffer[: self._start]
            self._start = 0
        self._buffer += data

    def next_frame(self) -> tuple[int, bytes] | None:
        """Return (type, payload) of the next whole frame, or None. Raises ProtocolError."""
        available = len(self._buffer) - self._start
        if available < HEADER_BYTES:
            return None
        kind, length = _HEADER.unpack_from(self._buffer, self._start)
        if kind not in self._known:
            raise ProtocolError(f"{self._sender} sent a frame of type 0x{kind:02x}")
        if length > MAX_PAYLOAD:
            raise ProtocolError(f"{self._sender} sent a frame of {length} bytes")
        if available < HEADER_BYTES + length:
            return None
        begin = self._start + HEADER_BYTES
        self._start = begin + length
        return kind, bytes(memoryview(self._buffer)[begin : self._start])

    def pending(self) -> bytes:
        """Return the bytes that are not yet a frame."""
        return bytes(memoryview(self._buffer)[self._start :])


class HelloScanner:
    """Finds the HELLO_OK of our nonce among whatever an earlier stream left on the port."""

    __slots__ = ("_buffer", "_nonce", "rest")

    def __init__(self, nonce: str) -> None:
        self._nonce = nonce
        self._buffer = bytearray()
        self.rest = b""

    def feed(self, data: bytes) -> dict[str, object] | None:
        """Return HELLO_OK's body once it is there; `rest` then holds what came behind it.

        Every other byte is dropped. Of unfinished candidates no more than 64 KiB are kept.
        """
        buffer = self._buffer
        buffer += data
        keep = max(0, len(buffer) - (HEADER_BYTES + len(MAGIC) - 1))
        at = buffer.find(MAGIC, HEADER_BYTES)
        first_unfinished = None
        while at >= 0:
            start = at - HEADER_BYTES
            kind, length = _HEADER.unpack_from(buffer, start)
            if kind == HELLO_OK and len(MAGIC) <= length <= MAX_HELLO_OK:
                end = at + length
                if end > len(buffer):
                    if first_unfinished is None:
                        first_unfinished = start
                else:
                    body = self._match(bytes(buffer[at + len(MAGIC) : end]))
                    if body is not None:
                        self.rest = bytes(buffer[end:])
                        buffer.clear()
                        return body
            at = buffer.find(MAGIC, at + 1)
        if first_unfinished is not None:
            keep = min(keep, first_unfinished)
        del buffer[:keep]
        return None

    def _match(self, raw: bytes) -> dict[str, object] | None:
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            return None
        if isinstance(body, dict) and body.get("nonce") == self._nonce:
            return body
        return None
