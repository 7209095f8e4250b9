"""Sessions of a guest: processes that the agent keeps, and what they wrote.

Owns the JSON of the `session` request and the stream of one who is attached. Every value is the
guest's: it is checked here, once, and is a `Session` from then on. The terminal is `cli`'s, the
sockets for programs of this host are `guest.session_sockets`'.
"""

from __future__ import annotations

import math
import re
import select
import time
from binascii import a2b_base64
from typing import Any, NamedTuple, Self

from banger.errors import InvalidInput, TimedOut
from banger.guest import frames
from banger.guest.agent import (
    OPEN_TIMEOUT_S,
    ExecRequest,
    ExitStatus,
    agent_error,
    exec_fields,
    expect,
)
from banger.guest.transport import Endpoint, Stream, open_stream, wait_for

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
STDIN_MODES = ("pipe", "pty", "null")
RESTARTS = ("no", "on-failure")
STATES = ("running", "restarting", "ended")
END_OF_OUTPUT = -1  # as a position: what is written from now on
_REASONS = ("", "stopped", "killed", "machine", "not_started")
# As for every answer: a guest that swaps, or is emulated under load, takes seconds.
_ANSWER_TIMEOUT_S = 30.0
# The agent waits for processes that SIGKILL did not end yet, and for the end of their output.
_ENDING_TIMEOUT_S = 45.0
_MAX_TEXT = 4096
_MAX_SESSIONS = 1024
_MAX_POSITION = 1 << 62
_MAX_TIME = 1e11
_MAX_PID = 1 << 22  # PID_MAX_LIMIT (linux/threads.h)


class Kept(NamedTuple):
    """What is kept of one stream: positions, in bytes since the session's first start."""

    start: int
    end: int


class Session(NamedTuple):
    """A session as the guest says it is; texts hold no control characters.

    `exit` is how it ended last, also while it runs again; `ready` is None without a check. Times
    are Unix seconds of the guest's clock.
    """

    name: str
    id: str
    argv: tuple[bytes, ...]
    cwd: bytes
    user: str
    stdin_mode: str
    restart: str
    state: str
    pid: int | None
    ready: bool | None
    started_at: float
    began_at: float
    ended_at: float | None
    exit: ExitStatus | None
    reason: str
    message: str
    restarts: int
    viewers: int
    writer: bool
    stdin_closed: bool
    stdout: Kept
    stderr: Kept
    log_limit: int

    @property
    def takes_input(self) -> bool:
        """Tell whether there is anything to write to."""
        return self.stdin_mode != "null"


class SessionRequest(NamedTuple):
    """A session to start: `process` says argv, env, cwd, user, and for a pty its size.

    `ready` is `{"port": N}`, `{"file": b64}`, `{"command": [b64]}` or None; `log_limit` bytes are
    kept of each stream (None: the agent's default).
    """

    name: str
    process: ExecRequest
    stdin_mode: str = "pipe"
    restart: str = "no"
    ready: dict[str, object] | None = None
    log_limit: int | None = None


def check_name(name: str) -> str:
    """Return a name a session may have; raise InvalidInput."""
    if NAME.fullmatch(name) is None:
        raise InvalidInput(
            f"{name!r} cannot be a session's name",
            hint="1 to 64 of letters, digits, '.', '_' and '-', beginning with a letter or digit",
        )
    return name


def clean(text: str) -> str:
    """Return a guest's text without control characters."""
    return "".join(c if c.isprintable() else "?" for c in text)


# -- parsing


def parse_session(value: object) -> Session:
    """Check a session object of the agent; raises ProtocolError."""
    if not isinstance(value, dict):
        raise _bad("is no object")
    name = value.get("name")
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise _bad("has no name")
    argv = value.get("argv")
    if not isinstance(argv, list):
        raise _bad("has no argv")
    ready = value.get("ready")
    if ready is not None and not isinstance(ready, bool):
        raise _bad("has a ready that is no boolean")
    return Session(
        name=name,
        id=_text(value, "id"),
        argv=tuple(_bytes(word, "argv") for word in argv),
        cwd=_bytes(value.get("cwd"), "cwd"),
        user=_text(value, "user"),
        stdin_mode=_one_of(value, "stdin_mode", STDIN_MODES),
        restart=_one_of(value, "restart", RESTARTS),
        state=_one_of(value, "state", STATES),
        pid=None if value.get("pid") is None else _count(value, "pid", _MAX_PID),
        ready=ready,
        started_at=_time(value, "started_at"),
        began_at=_time(value, "began_at"),
        ended_at=None if value.get("ended_at") is None else _time(value, "ended_at"),
        exit=_exit(value.get("exit")),
        reason=_one_of(value, "reason", _REASONS),
        message=_text(value, "message"),
        restarts=_count(value, "restarts", _MAX_POSITION),
        viewers=_count(value, "viewers", _MAX_POSITION),
        writer=value.get("writer") is True,
        stdin_closed=value.get("stdin_closed") is True,
        stdout=_kept(value.get("stdout")),
        stderr=_kept(value.get("stderr")),
        log_limit=_count(value, "log_limit", _MAX_POSITION),
    )


def _bad(what: str) -> frames.ProtocolError:
    return frames.ProtocolError(f"the agent sent a session that {what}")


def _text(value: dict[str, Any], name: str) -> str:
    found = value.get(name)
    if not isinstance(found, str) or len(found) > _MAX_TEXT:
        raise _bad(f"has no {name}")
    return clean(found)


def _one_of(value: dict[str, Any], name: str, known: tuple[str, ...]) -> str:
    found = value.get(name)
    if found not in known:
        raise _bad(f"has an unknown {name}")
    return str(found)


def _count(value: dict[str, Any], name: str, most: int) -> int:
    found = value.get(name)
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found <= most:
        raise _bad(f"has no {name}")
    return found


def _time(value: dict[str, Any], name: str) -> float:
    found = value.get(name)
    # A large integer would not convert, and a float may be no number at all.
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= _MAX_TIME:
        raise _bad(f"has no {name}")
    return float(found) if math.isfinite(found) else 0.0


def _bytes(value: object, name: str) -> bytes:
    if not isinstance(value, str):
        raise _bad(f"has no {name}")
    try:
        return a2b_base64(value)
    except ValueError as error:
        raise _bad(f"has an {name} that does not read") from error


def _kept(value: object) -> Kept:
    if not isinstance(value, dict):
        raise _bad("does not say what is kept")
    kept = Kept(_count(value, "start", _MAX_POSITION), _count(value, "end", _MAX_POSITION))
    if kept.start > kept.end:
        raise _bad("keeps less than nothing")
    return kept


def _exit(value: object) -> ExitStatus | None:
    if value is None:
        return None
    if isinstance(value, dict):
        code, signal = value.get("code"), value.get("signal")
        if signal is None and type(code) is int and 0 <= code <= 255:
            return ExitStatus(code, None)
        if code is None and type(signal) is int and 1 <= signal <= 64:
            return ExitStatus(None, signal)
    raise _bad("ended in no way there is")


def parse_missed(payload: bytes) -> tuple[str, int]:
    """Return (stream, bytes) of a MISSED frame."""
    body = frames.decode_object(payload)
    stream = body.get("stream")
    if stream not in ("stdout", "stderr"):
        raise frames.ProtocolError("the agent sent a MISSED of no stream")
    return str(stream), _count(body, "bytes", _MAX_POSITION)


def to_json(session: Session) -> dict[str, Any]:
    """Return a session as `--json` and the sockets say it; bytes that are no UTF-8 are replaced."""
    ended = session.exit
    return {
        **session._asdict(),
        "argv": [word.decode(errors="replace") for word in session.argv],
        "cwd": session.cwd.decode(errors="replace"),
        "exit": None if ended is None else {"code": ended.code, "signal": ended.signal},
        "stdout": session.stdout._asdict(),
        "stderr": session.stderr._asdict(),
    }


# -- requests


def _ask(
    endpoint: Endpoint,
    op: str,
    fields: dict[str, object],
    *,
    timeout_s: float | None = _ANSWER_TIMEOUT_S,
) -> dict[str, object]:
    open_s = OPEN_TIMEOUT_S if timeout_s is None else min(timeout_s, OPEN_TIMEOUT_S)
    with open_stream(endpoint, timeout_s=open_s) as stream:
        stream.send_request("session", {"op": op, **fields})
        return frames.decode_object(expect(stream, frames.END, timeout_s=timeout_s))


def start(endpoint: Endpoint, request: SessionRequest) -> Session:
    """Start a session.

    Raises Conflict (the name is taken) and NotFound (the program is not there): then there is none.
    """
    process = exec_fields(request.process)
    fields = {name: process[name] for name in ("argv", "env", "env_mode", "cwd", "user", "tty")}
    fields |= {
        "name": request.name,
        "stdin_mode": request.stdin_mode,
        "restart": request.restart,
        "ready": request.ready,
    }
    if request.log_limit is not None:
        fields["log_limit"] = request.log_limit
    return parse_session(_ask(endpoint, "start", fields).get("session"))


def list_all(endpoint: Endpoint, *, timeout_s: float = _ANSWER_TIMEOUT_S) -> list[Session]:
    """Return all sessions; long command lines are cut by the agent."""
    found = _ask(endpoint, "list", {}, timeout_s=timeout_s).get("sessions")
    if not isinstance(found, list) or len(found) > _MAX_SESSIONS:
        raise frames.ProtocolError("the agent sent no list of sessions")
    return [parse_session(one) for one in found]


def show(endpoint: Endpoint, name: str) -> Session:
    """Return one session."""
    return parse_session(_ask(endpoint, "show", {"name": name}).get("session"))


def wait(
    endpoint: Endpoint, name: str, *, until: str = "end", timeout_s: float | None = None
) -> tuple[Session, bool]:
    """Wait until a session has ended, or is ready (or has ended); return it, and whether it is so.

    False when `timeout_s` was over first; None waits for ever.
    """
    answer = _ask(
        endpoint,
        "wait",
        {"name": name, "until": until, "timeout_s": timeout_s},
        timeout_s=None if timeout_s is None else timeout_s + _ANSWER_TIMEOUT_S,
    )
    return parse_session(answer.get("session")), answer.get("timed_out") is not True


def signal(endpoint: Endpoint, name: str, number: int) -> Session:
    """Signal the process group of a running session."""
    answer = _ask(endpoint, "signal", {"name": name, "number": number})
    return parse_session(answer.get("session"))


def stop(endpoint: Endpoint, name: str, *, grace_s: float) -> Session:
    """End all processes of a session and return when none is left; SIGKILL after `grace_s`."""
    answer = _ask(
        endpoint,
        "stop",
        {"name": name, "grace_s": grace_s},
        timeout_s=grace_s + _ENDING_TIMEOUT_S,
    )
    return parse_session(answer.get("session"))


def kill(endpoint: Endpoint, name: str) -> Session:
    """End all processes of a session at once."""
    answer = _ask(endpoint, "kill", {"name": name}, timeout_s=_ENDING_TIMEOUT_S)
    return parse_session(answer.get("session"))


def remove(endpoint: Endpoint, name: str, *, force: bool = False) -> None:
    """Forget a session and its output; one that runs only with `force`, which kills it first."""
    _ask(endpoint, "remove", {"name": name, "force": force}, timeout_s=_ENDING_TIMEOUT_S)


def since(endpoint: Endpoint, name: str, unix_s: int) -> tuple[int, int]:
    """Return the positions of stdout and stderr at a time of the guest's clock."""
    answer = _ask(endpoint, "since", {"name": name, "unix_s": unix_s})
    return _count(answer, "stdout", _MAX_POSITION), _count(answer, "stderr", _MAX_POSITION)


# -- being attached


class Attachment:
    """The stream of one who is attached; it may be polled, and a reader may stop reading.

    `credit` is what may be written now. Leaving ends nothing: what was sent is still written.
    """

    __slots__ = ("_sending", "credit", "cut", "over", "session", "stream")

    def __init__(self, stream: Stream, session: Session, credit: int) -> None:
        self.stream = stream
        self.session = session
        self.credit = credit
        self.cut = False  # who wrote to the stream by themselves left in the middle of a frame
        self.over = False  # END has come
        self._sending = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the descriptor to poll; ask `next_frame` before."""
        return self.stream.fileno()

    def receive_ready(self) -> bool:
        """Read what has arrived; False when there was nothing."""
        return self.stream.receive_ready()

    def next_frame(self) -> tuple[int, bytes] | None:
        """Return the next frame that has arrived, but for credit, which is taken.

        One of STDOUT, STDERR, MISSED, RESTARTED, EXIT, END. Raises what ERROR says, ProtocolError.
        """
        while (frame := self.stream.buffered_frame()) is not None:
            kind, payload = frame
            if kind == frames.STDIN_CREDIT:
                self.credit = min(self.credit + frames.decode_credit(payload), frames.STDIN_WINDOW)
                continue
            if kind == frames.ERROR:
                raise agent_error(payload)
            if kind not in _WHILE_ATTACHED:
                raise frames.ProtocolError(f"the agent sent frame 0x{kind:02x} in a session")
            self.over = kind == frames.END
            return frame
        return None

    def receive(self, timeout_s: float | None = None) -> tuple[int, bytes]:
        """Wait for the next frame; what was queued is sent meanwhile. Raises TimedOut."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (frame := self.next_frame()) is None:
            self._turn(deadline)
        return frame

    def wait_until_taken(self, timeout_s: float | None) -> bool:
        """Wait until the process has taken all there is for it; False when it has ended before.

        The agent gives credit back in order, also for what a writer before us has left: all of it
        is there again when nothing waits. Raises TimedOut when that takes longer.
        """
        return self._wait_for_credit(frames.STDIN_WINDOW, timeout_s)

    def wait_for_room(self, timeout_s: float | None) -> bool:
        """Wait until something may be written; False when the session has ended."""
        return self._wait_for_credit(1, timeout_s) and not self.over

    def _wait_for_credit(self, wanted: int, timeout_s: float | None) -> bool:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            while not self.over and self.next_frame() is not None:
                continue
            if self.credit >= wanted and not self._sending:
                return True
            if self.over:
                return False
            self._turn(deadline)

    def _turn(self, deadline: float | None) -> None:
        left_s = None if deadline is None else deadline - time.monotonic()
        if left_s is not None and left_s <= 0:
            raise TimedOut("the session did not get there in time", code="session_timeout")
        events = select.POLLIN | (select.POLLOUT if self._sending else 0)
        ready = wait_for(self.fileno(), events, left_s)
        if ready & select.POLLOUT:
            self.send_some()
        if ready & ~select.POLLOUT:
            self.receive_ready()

    def write(self, data: bytes | memoryview) -> None:
        """Queue input for the process: at most `credit` bytes, and at most a frame's."""
        if len(data) > self.credit:
            raise ValueError("more input than there is credit for")
        self.credit -= len(data)
        self.queue(frames.STDIN, data)

    def queue(self, kind: int, payload: bytes | memoryview = b"") -> None:
        """Queue another frame: STDIN_EOF, RESIZE, SIGNAL."""
        self._sending += frames.encode(kind, payload)

    @property
    def sending(self) -> bool:
        """Tell whether something is queued: then poll for POLLOUT and `send_some`."""
        return bool(self._sending)

    def send_some(self) -> None:
        """Send what there is room for."""
        sent = self.stream.send_some(memoryview(self._sending))
        del self._sending[:sent]

    def close(self) -> None:
        """Leave."""
        # BYE ends an unfinished stream too; unlike a hang-up it comes behind what was sent.
        if not self._sending and not self.cut:
            self.stream.finished = True
        self.stream.close()


_WHILE_ATTACHED = frozenset(
    (
        frames.STDOUT,
        frames.STDERR,
        frames.MISSED,
        frames.RESTARTED,
        frames.EXIT,
        frames.END,
    )
)


def attach(
    endpoint: Endpoint,
    name: str,
    *,
    read_only: bool,
    follow: bool = True,
    stdout: int | None = END_OF_OUTPUT,
    stderr: int | None = END_OF_OUTPUT,
    wait_s: float = 0.0,
) -> Attachment:
    """Attach to a session from these positions on (None: none of that stream).

    Not `read_only` makes us its writer, waiting up to `wait_s` for another to leave. Raises
    Unavailable with code agent_busy when one stays.
    """
    stream = open_stream(endpoint, timeout_s=OPEN_TIMEOUT_S)
    try:
        fields: dict[str, object] = {
            "op": "attach",
            "name": name,
            "read_only": read_only,
            "follow": follow,
            "stdout": stdout,
            "stderr": stderr,
            "wait_s": wait_s,
        }
        stream.send_request("session", fields)
        payload = expect(stream, frames.STARTED, timeout_s=wait_s + _ANSWER_TIMEOUT_S)
        started = frames.decode_object(payload)
        session = parse_session(started.get("session"))
        credit = _count(started, "credit", frames.STDIN_WINDOW)
    except BaseException:
        stream.close()
        raise
    return Attachment(stream, session, credit)
