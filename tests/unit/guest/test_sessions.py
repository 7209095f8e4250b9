"""What the guest says of sessions is believed only when it makes sense; likewise a program's wish."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.errors import InvalidInput
from banger.guest import frames, session_sockets, sessions
from banger.guest.frames import ProtocolError

GOOD: dict[str, Any] = {
    "name": "planner", "id": "18ebaec1", "argv": ["c2g=", "LWM="], "cwd": "L3Jvb3Q=", "user": "root",
    "stdin_mode": "pipe", "restart": "no", "state": "ended", "pid": None, "ready": None,
    "started_at": 1795721024, "began_at": 1795721024, "ended_at": 1795721025,
    "exit": {"code": 3, "signal": None, "core": False, "timed_out": False}, "reason": "stopped",
    "message": "", "restarts": 0, "viewers": 0, "writer": False, "stdout": {"start": 0, "end": 5},
    "stderr": {"start": 2, "end": 2}, "log_limit": 1 << 24,
}  # fmt: skip

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def test_a_session_is_what_the_agent_said() -> None:
    session = sessions.parse_session(GOOD)
    assert (session.argv, session.cwd, session.exit) == (
        (b"sh", b"-c"), b"/root", (3, None, False),
    )  # fmt: skip
    assert session.stdout == (0, 5)
    shown = sessions.to_json(session)
    assert (shown["argv"], shown["exit"]) == (["sh", "-c"], {"code": 3, "signal": None})
    assert json.loads(json.dumps(shown)) == shown


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../x"}, {"name": ""}, {"name": "x" * 65}, {"name": None}, {"name": "a\n"},
        {"id": 1}, {"argv": None}, {"argv": [1]}, {"argv": ["é"]}, {"argv": ["abc"]}, {"cwd": None},
        {"user": "x" * 5000}, {"stdin_mode": "x"}, {"restart": []}, {"state": {}}, {"pid": -1},
        {"pid": True}, {"pid": 1 << 40}, {"ready": 1}, {"started_at": float("nan")},
        {"started_at": 10**400}, {"began_at": "1"}, {"ended_at": -1}, {"exit": {}},
        {"exit": {"code": 1, "signal": 1}}, {"exit": {"code": 256}}, {"exit": {"signal": 65}},
        {"exit": {"code": True}}, {"exit": 0}, {"reason": "x"}, {"message": 1}, {"restarts": 1.5},
        {"stdout": None}, {"stdout": {"start": 2, "end": 1}}, {"stderr": {"start": -1, "end": 1}},
        {"log_limit": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_session_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        sessions.parse_session({**GOOD, **change})


@given(st.dictionaries(st.sampled_from(sorted(GOOD)), JSON, max_size=4) | JSON)
def test_whatever_a_guest_says_is_a_session_or_an_error(said: Any) -> None:
    try:
        session = sessions.parse_session({**GOOD, **said} if isinstance(said, dict) else said)
    except ProtocolError:
        return
    assert sessions.NAME.fullmatch(session.name)
    assert session.user.isprintable() and session.message.isprintable()
    assert 0 <= session.stdout.start <= session.stdout.end
    json.loads(json.dumps(sessions.to_json(session), allow_nan=False))


def test_texts_lose_their_control_characters() -> None:
    session = sessions.parse_session({**GOOD, "message": "a\x1b[2Jb\nc", "user": "r\x07"})
    assert (session.message, session.user) == ("a?[2Jb?c", "r?")


@given(st.binary(max_size=60))
def test_missed_is_a_stream_and_a_count_or_an_error(payload: bytes) -> None:
    try:
        stream, count = sessions.parse_missed(payload)
    except ProtocolError:
        return
    assert stream in ("stdout", "stderr") and count >= 0


@pytest.mark.parametrize("name", ["", "-x", ".x", "a b", "a/b", "é", "x" * 65, "a\n"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput):
        sessions.check_name(name)


# -- the sockets


@pytest.mark.parametrize(
    ("line", "wish"),
    [
        (b"", (False, -1, -1, False)),
        (b"{}", (False, -1, -1, False)),
        (b'{"from":"end","read_only":true}', (True, -1, -1, False)),
        (b'{"from":"start"}', (False, 0, 0, False)),
        (b'{"from":7}', (False, 7, -1, False)),
        (b'{"from":{"stderr":3}}', (False, -1, 3, False)),
        (b'{"from":{"stdout":1,"stderr":3},"raw":true}', (False, 1, None, True)),
    ],
)
def test_a_wish_of_a_program(line: bytes, wish: tuple[object, ...]) -> None:
    assert session_sockets.parse_wish(line) == wish


@given(st.binary(max_size=100) | JSON.map(lambda value: json.dumps({"from": value}).encode()))
def test_whatever_a_program_wishes_is_a_wish_or_an_error(line: bytes) -> None:
    try:
        wish = session_sockets.parse_wish(line)
    except InvalidInput:
        return
    assert all(position is None or position >= -1 for position in (wish.stdout, wish.stderr))


def test_every_name_has_a_socket_of_its_own_that_fits() -> None:
    # The longest there may be: `paths` takes 48 bytes of XDG_RUNTIME_DIR.
    directory = "/" + "d" * 47 + "/banger/0123456789/vms/0123456789ab/s"
    paths = {session_sockets.socket_path(directory, "x" * size) for size in range(1, 65)}
    assert len(paths) == 64
    assert all(len(os.fsencode(path)) <= 107 for path in paths)


def test_a_program_may_send_its_own_frames_only() -> None:
    decoder = frames.Decoder(known=frames.FROM_VIEWER, sender="the program")
    decoder.feed(frames.encode(frames.STDIN, b"x") + frames.encode(frames.STDOUT, b"x"))
    assert decoder.next_frame() == (frames.STDIN, b"x")
    with pytest.raises(ProtocolError, match="the program sent"):
        decoder.next_frame()
