"""Hostile and honest bytes against the frame codec."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from banger.guest import frames

KINDS = st.sampled_from(sorted(frames.FROM_AGENT))
NONCE = "0123456789abcdef" * 2


def decode_all(pieces: list[bytes]) -> list[tuple[int, bytes]]:
    decoder = frames.Decoder()
    out = []
    for piece in pieces:
        decoder.feed(piece)
        while (frame := decoder.next_frame()) is not None:
            out.append(frame)
    assert decoder.pending() == b""
    return out


@given(st.lists(st.tuples(KINDS, st.binary(max_size=300))), st.integers(1, 50))
def test_frames_survive_any_cut(sent: list[tuple[int, bytes]], step: int) -> None:
    raw = b"".join(frames.encode(kind, payload) for kind, payload in sent)
    assert sent == decode_all([raw[i : i + step] for i in range(0, len(raw), step)])


@given(st.binary(max_size=2000))
def test_any_bytes_are_frames_or_a_protocol_error(raw: bytes) -> None:
    decoder = frames.Decoder()
    decoder.feed(raw)
    total = 0
    try:
        while (frame := decoder.next_frame()) is not None:
            total += frames.HEADER_BYTES + len(frame[1])
            assert frame[0] in frames.FROM_AGENT
    except frames.ProtocolError:
        pass
    assert total <= len(raw)


@given(st.binary(max_size=500), st.binary(max_size=100), st.integers(1, 60))
def test_hello_ok_is_found_behind_any_bytes(junk: bytes, rest: bytes, step: int) -> None:
    body = frames.MAGIC + b'{"version":1,"nonce":"' + NONCE.encode() + b'"}'
    raw = junk + frames.encode(frames.HELLO_OK, body) + rest
    scanner = frames.HelloScanner(NONCE)
    for start in range(0, len(raw), step):
        found = scanner.feed(raw[start : start + step])
        if found is not None:
            assert found["nonce"] == NONCE
            assert scanner.rest + raw[start + step :] == rest
            return
    raise AssertionError("not found")


@given(st.binary(max_size=1000))
def test_no_hello_ok_comes_out_of_nothing(raw: bytes) -> None:
    assert frames.HelloScanner(NONCE).feed(raw) is None


@given(st.binary(max_size=200))
def test_control_frames_are_objects_or_a_protocol_error(raw: bytes) -> None:
    try:
        assert isinstance(frames.decode_object(raw), dict)
    except frames.ProtocolError:
        pass
