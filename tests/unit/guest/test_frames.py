from __future__ import annotations

import json

import pytest

from banger.guest import agent, frames


def test_request_of_several_frames_joins_to_its_json() -> None:
    request = {"kind": "exec", "argv": ["x" * 200_000]}
    raw = frames.encode_request(request)
    joined, kinds = b"", []
    while raw:
        length = int.from_bytes(raw[1:5], "big")
        kinds.append(raw[0])
        joined += raw[5 : 5 + length]
        raw = raw[5 + length :]
    assert kinds == [frames.REQUEST_PART] * 3 + [frames.REQUEST]
    assert json.loads(joined) == request


def test_request_beyond_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="at most"):
        frames.encode_request({"kind": "x" * frames.MAX_REQUEST})
    with pytest.raises(ValueError, match="at most"):
        frames.encode(frames.STDIN, bytes(frames.MAX_PAYLOAD + 1))


def test_scanner_memory_is_bounded() -> None:
    scanner = frames.HelloScanner("0" * 32)
    for _ in range(200):
        scanner.feed(bytes([frames.HELLO_OK, 0, 0, 15, 255]) + frames.MAGIC + bytes(60_000))
        assert len(scanner._buffer) < 70_000


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"code": 1, "signal": 9},
        {"code": None, "signal": None},
        {"code": "0", "signal": None},
        {"code": 256, "signal": None},
        {"code": None, "signal": 65},
        {"code": None, "signal": 0},
    ],
)
def test_exit_must_have_exactly_one_ending(body: dict[str, object]) -> None:
    with pytest.raises(frames.ProtocolError):
        agent.parse_exit(json.dumps(body).encode())


def test_agent_error_carries_no_control_characters() -> None:
    raw = json.dumps({"code": "io\x1b", "message": "a\x1b[31mb\nc"}).encode()
    error = agent.agent_error(raw)
    assert (error.message, error.code) == ("in the guest: a?[31mb?c", "agent_io")


def test_exit_codes_are_those_of_a_shell() -> None:
    assert agent.ExitStatus(3, None).exit_code == 3
    assert agent.ExitStatus(None, 15).exit_code == 143
    assert agent.ExitStatus(None, 15, timed_out=True).exit_code == 124


def test_credit_is_checked() -> None:
    assert frames.decode_credit(b"\0\0\1\0") == 256
    for bad in (b"", b"\0\0\0", b"\xff\xff\xff\xff"):
        with pytest.raises(frames.ProtocolError):
            frames.decode_credit(bad)
