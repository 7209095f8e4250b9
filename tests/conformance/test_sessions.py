"""Sessions of PROTOCOL.md through the real client against the real agent."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from banger.errors import BangerError, Conflict, NotFound, Unavailable
from banger.guest import frames, sessions
from banger.guest.agent import ExecRequest, ExitStatus, b64
from banger.guest.sessions import Session, SessionRequest
from banger.guest.transport import Endpoint, open_stream

WAIT_S = 30.0
SMALL_LOG = 64 << 10


@contextmanager
def session(
    endpoint: Endpoint, *argv: bytes, name: str = "it", **options: object
) -> Iterator[Session]:
    request = SessionRequest(name, ExecRequest(list(argv)), **options)  # type: ignore[arg-type]
    yield sessions.start(endpoint, request)
    sessions.remove(endpoint, name, force=True)


def read_all(endpoint: Endpoint, name: str = "it", **options: object) -> dict[int, bytes]:
    """Return what is kept, by frame type; what was missed counts as b'?' each."""
    got = {frames.STDOUT: b"", frames.STDERR: b""}
    wanted: dict[str, object] = {"stdout": 0, "stderr": 0, **options}
    with sessions.attach(endpoint, name, read_only=True, **wanted) as attached:  # type: ignore[arg-type]
        while True:
            kind, payload = attached.receive(timeout_s=WAIT_S)
            if kind in got:
                got[kind] += payload
            elif kind == frames.MISSED:
                stream, count = sessions.parse_missed(payload)
                got[frames.STDOUT if stream == "stdout" else frames.STDERR] += b"?" * count
            elif kind == frames.END:
                return got


def test_output_and_status_stay_after_the_end(endpoint: Endpoint) -> None:
    script = rb'printf "out\377\000"; printf err >&2; exit 7'
    with session(endpoint, b"sh", b"-c", script):
        ended, in_time = sessions.wait(endpoint, "it", timeout_s=WAIT_S)
        assert (True, "ended", ExitStatus(7, None), "") == (
            in_time,
            ended.state,
            ended.exit,
            ended.reason,
        )
        assert {frames.STDOUT: b"out\xff\0", frames.STDERR: b"err"} == read_all(endpoint)
        assert {frames.STDOUT: b"t\xff\0", frames.STDERR: b""} == read_all(
            endpoint, stdout=2, stderr=-1
        )
        assert ["it"] == [one.name for one in sessions.list_all(endpoint)]
        with pytest.raises(Conflict):
            sessions.start(endpoint, SessionRequest("it", ExecRequest([b"true"])))
    with pytest.raises(NotFound):
        sessions.show(endpoint, "it")


def test_megabytes_pass_both_ways_byte_for_byte(endpoint: Endpoint) -> None:
    data = os.urandom(3_000_000)
    with (
        session(endpoint, b"cat"),
        sessions.attach(endpoint, "it", read_only=False, stdout=0) as attached,
    ):
        assert attached.credit == frames.STDIN_WINDOW
        back = bytearray()
        rest = memoryview(data)
        while len(back) < len(data):
            while rest and attached.credit and not attached.sending:
                part = rest[: min(attached.credit, frames.MAX_PAYLOAD)]
                attached.write(part)
                rest = rest[len(part) :]
                attached.send_some()
            kind, payload = attached.receive(timeout_s=WAIT_S) if not rest else _turn(attached)
            if kind == frames.STDOUT:
                back += payload
        assert bytes(back) == data
        attached.queue(frames.STDIN_EOF)
        while attached.receive(timeout_s=WAIT_S)[0] != frames.END:
            pass
        assert ExitStatus(0, None) == sessions.show(endpoint, "it").exit


def _turn(attached: sessions.Attachment) -> tuple[int, bytes]:
    attached.send_some()
    attached.receive_ready()
    frame = attached.next_frame()
    if frame is None:
        time.sleep(0.001)
        return 0, b""
    return frame


def test_one_writer_and_what_it_sent_outlives_it(endpoint: Endpoint) -> None:
    with session(endpoint, b"cat"):
        with sessions.attach(endpoint, "it", read_only=False) as writer:
            with pytest.raises(Unavailable) as busy:
                sessions.attach(endpoint, "it", read_only=False)
            assert busy.value.code == "agent_busy"
            with sessions.attach(endpoint, "it", read_only=True):
                assert (2, True) == (
                    sessions.show(endpoint, "it").viewers,
                    sessions.show(endpoint, "it").writer,
                )
            writer.write(b"first\n")
            writer.send_some()
        with sessions.attach(endpoint, "it", read_only=False, stdout=0, wait_s=WAIT_S) as writer:
            writer.write(b"second\n")
            assert writer.wait_until_taken(WAIT_S)
        with sessions.attach(endpoint, "it", read_only=True, stdout=0) as viewer:
            got = b""
            while got != b"first\nsecond\n":
                kind, payload = viewer.receive(timeout_s=WAIT_S)
                got += payload if kind == frames.STDOUT else b""


def test_a_slow_viewer_is_told_and_nobody_waits_for_it(endpoint: Endpoint) -> None:
    script = b"read go; head -c 3000000 /dev/zero; echo end"
    with session(endpoint, b"sh", b"-c", script, log_limit=SMALL_LOG):
        with sessions.attach(endpoint, "it", read_only=True, stdout=0) as slow:
            with sessions.attach(endpoint, "it", read_only=False) as writer:
                writer.write(b"\n")
                assert writer.wait_until_taken(WAIT_S)
            # It reads nothing, and the process comes to its end.
            sessions.wait(endpoint, "it", timeout_s=WAIT_S)
            got, missed = b"", 0
            while True:
                kind, payload = slow.receive(timeout_s=WAIT_S)
                if kind == frames.STDOUT:
                    got += payload
                elif kind == frames.MISSED:
                    missed += sessions.parse_missed(payload)[1]
                elif kind == frames.END:
                    break
        assert missed > 0
        assert len(got) + missed == 3_000_004
        assert got.endswith(b"end\n")
        kept = sessions.show(endpoint, "it").stdout
        assert kept.end == 3_000_004
        assert kept.end - kept.start <= SMALL_LOG


def test_a_crash_begins_it_again_and_viewers_are_told(endpoint: Endpoint) -> None:
    script = b"read word; echo got $word; kill -9 $$"
    with (
        session(endpoint, b"sh", b"-c", script, restart="on-failure"),
        sessions.attach(endpoint, "it", read_only=False, stdout=0) as attached,
    ):
        for number, word in enumerate((b"one", b"two")):
            attached.write(word + b"\n")
            while True:
                kind, payload = attached.receive(timeout_s=WAIT_S)
                if kind == frames.STDOUT:
                    assert payload == b"got " + word + b"\n"
                elif kind == frames.RESTARTED:
                    break
            now = sessions.show(endpoint, "it")
            assert (number + 1, ExitStatus(None, 9)) == (now.restarts, now.exit)
        stopped = sessions.stop(endpoint, "it", grace_s=WAIT_S)
        assert ("ended", "stopped") == (stopped.state, stopped.reason)


def test_ready_checks(endpoint: Endpoint, tmp_path: object) -> None:
    path = os.fsencode(str(tmp_path)) + b"/up"
    script = b'read go; touch "$1"; sleep 1000'
    for ready in ({"file": b64(path)}, {"command": [b64(b"test"), b64(b"-e"), b64(path)]}):
        with session(endpoint, b"sh", b"-c", script, b"sh", path, ready=ready) as started:
            assert started.ready is False
            assert (False, False) == _ready(
                sessions.wait(endpoint, "it", until="ready", timeout_s=0.3)
            )
            with sessions.attach(endpoint, "it", read_only=False) as writer:
                writer.write(b"\n")
                writer.wait_until_taken(WAIT_S)
            assert (True, True) == _ready(
                sessions.wait(endpoint, "it", until="ready", timeout_s=WAIT_S)
            )
        os.unlink(path)


def _ready(answer: tuple[Session, bool]) -> tuple[bool | None, bool]:
    return answer[0].ready, answer[1]


def test_a_pty_has_a_size_and_takes_ctrl_d(endpoint: Endpoint) -> None:
    process = ExecRequest([b"sh", b"-c", b"stty size; cat"], tty=(11, 33, "xterm"))
    sessions.start(endpoint, SessionRequest("it", process, stdin_mode="pty"))
    try:
        with sessions.attach(endpoint, "it", read_only=False, stdout=0) as attached:
            got = b""
            while b"11 33" not in got:
                got += attached.receive(timeout_s=WAIT_S)[1]
            attached.queue(frames.STDIN_EOF)
            while attached.receive(timeout_s=WAIT_S)[0] != frames.END:
                pass
        assert ExitStatus(0, None) == sessions.show(endpoint, "it").exit
    finally:
        sessions.remove(endpoint, "it", force=True)


def test_a_shell_at_a_terminal_need_not_be_killed(endpoint: Endpoint) -> None:
    process = ExecRequest([b"bash", b"--norc", b"-i"], tty=(24, 80, "dumb"))
    sessions.start(endpoint, SessionRequest("it", process, stdin_mode="pty"))
    try:
        with sessions.attach(endpoint, "it", read_only=True, stdout=0) as attached:
            got = b""
            while b"$ " not in got and b"# " not in got:
                got += attached.receive(timeout_s=WAIT_S)[1]
        stopped = sessions.stop(endpoint, "it", grace_s=WAIT_S)
        assert ExitStatus(None, 1) == stopped.exit  # SIGHUP
    finally:
        sessions.remove(endpoint, "it", force=True)


def test_whoever_watches_is_told_of_a_removal(endpoint: Endpoint) -> None:
    with (
        session(endpoint, b"sleep", b"1000"),
        sessions.attach(endpoint, "it", read_only=True) as viewer,
    ):
        thread = threading.Thread(
            target=sessions.remove, args=(endpoint, "it"), kwargs={"force": True}
        )
        thread.start()
        while viewer.receive(timeout_s=WAIT_S)[0] != frames.END:
            pass
        thread.join()
        sessions.start(endpoint, SessionRequest("it", ExecRequest([b"true"])))


@pytest.mark.parametrize(
    "fields",
    [
        {"op": "start", "name": "../up", "argv": [b64(b"true")]},
        {"op": "start", "name": "a", "argv": []},
        {"op": "start", "name": "a", "argv": [b64(b"true")], "log_limit": 1},
        {"op": "start", "name": "a", "argv": [b64(b"true")], "restart": "always"},
        {"op": "start", "name": "a", "argv": [b64(b"true")], "stdin_mode": "tty"},
        {"op": "start", "name": "a", "argv": [b64(b"true")], "ready": {"port": 70000}},
        {"op": "start", "name": "a", "argv": [b64(b"true")], "ready": {}},
        {"op": "start", "name": "a", "argv": [b64(b"no-such-program")]},
        {"op": "stop", "name": "absent"},
        {"op": "attach", "name": "absent", "stdout": -7},
        {"op": "dance", "name": "absent"},
        {"op": "start", "name": 7},
    ],
)
def test_a_request_that_makes_no_sense_leaves_nothing(
    endpoint: Endpoint, fields: dict[str, object]
) -> None:
    with open_stream(endpoint, timeout_s=5) as stream:
        stream.send_request("session", fields)
        kind, _ = stream.receive(timeout_s=WAIT_S)
    assert kind == frames.ERROR
    assert sessions.list_all(endpoint) == []


def test_stdin_of_nobody(endpoint: Endpoint) -> None:
    with (
        session(endpoint, b"sh", b"-c", b"cat; exec sleep 1000", stdin_mode="null"),
        sessions.attach(endpoint, "it", read_only=False) as writer,
    ):
        writer.write(b"dropped")
        assert writer.wait_until_taken(WAIT_S)
        with pytest.raises(BangerError):
            sessions.remove(endpoint, "it")


def test_a_stdin_that_is_closed_says_so(endpoint: Endpoint) -> None:
    with session(endpoint, b"sh", b"-c", b"cat; exec sleep 1000"):
        with sessions.attach(endpoint, "it", read_only=False) as writer:
            writer.write(b"last")
            writer.queue(frames.STDIN_EOF)
            assert writer.wait_until_taken(WAIT_S)
        deadline = time.monotonic() + WAIT_S
        while not sessions.show(endpoint, "it").stdin_closed and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sessions.show(endpoint, "it").stdin_closed


def test_what_a_process_did_not_live_to_take_is_not_called_taken(endpoint: Endpoint) -> None:
    with (
        session(endpoint, b"sleep", b"1000"),
        sessions.attach(endpoint, "it", read_only=False) as writer,
    ):
        for _ in range(3):  # more than the pipe holds
            writer.write(bytes(frames.MAX_PAYLOAD))
        while writer.sending:
            writer.send_some()
        thread = threading.Timer(0.2, sessions.kill, args=(endpoint, "it"))
        thread.start()
        assert not writer.wait_until_taken(WAIT_S)
        thread.join()
