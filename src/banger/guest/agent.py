"""The agent's requests as functions: one call, one stream.

Owns the JSON of requests and answers. The byte pump of an interactive exec is `cli.attach`;
ports and HELLO are `guest.transport`. Nothing the agent says is trusted.
"""

from __future__ import annotations

import os
import select
import time
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable, Iterable
from typing import BinaryIO, NamedTuple, Self

from banger.errors import (
    BangerError,
    Conflict,
    InvalidInput,
    NoSpace,
    NotFound,
    TimedOut,
    Unavailable,
)
from banger.guest import frames
from banger.guest.transport import Endpoint, Stream, open_stream, wait_for, wait_for_hello

# Opening a stream takes ms; a guest that swaps or an emulated one under load has taken seconds.
OPEN_TIMEOUT_S = 15.0
_ANSWER_TIMEOUT_S = 30.0


class AgentInfo(NamedTuple):
    """What HELLO_OK said."""

    version: int
    agent_version: str
    boot_id: str
    mode: str
    uptime_s: float


class ExecRequest(NamedTuple):
    """A process to run in the guest; argv, env and cwd are bytes and arrive as they are."""

    argv: list[bytes]
    env: dict[bytes, bytes] = {}  # noqa: RUF012 - never mutated
    cwd: bytes | None = None
    user: str = "root"
    tty: tuple[int, int, str] | None = None
    stdin: str = "pipe"  # pipe | null
    timeout_s: float | None = None
    detach: bool = False


class Shell(NamedTuple):
    """What one who comes in finds: the shell (None: the image has none), and how sshd is doing.

    `sshd` is up, coming (the guest's init is set to start it) or none.
    """

    argv: list[bytes] | None
    sshd: str


class ExitStatus(NamedTuple):
    """How a process ended: by a code or by a signal."""

    code: int | None
    signal: int | None
    timed_out: bool = False

    @property
    def exit_code(self) -> int:
        """The status a shell would give: 128 + signal, 124 after a timeout."""
        if self.timed_out:
            return 124
        if self.code is not None:
            return self.code
        return 128 + (self.signal or 0)


def b64(value: bytes) -> str:
    """Return standard base64 text."""
    return b2a_base64(value, newline=False).decode("ascii")


def agent_error(payload: bytes) -> BangerError:
    """Turn an ERROR frame into a designed error."""
    body = frames.decode_object(payload)
    code, message = body.get("code"), body.get("message")
    if not isinstance(code, str) or not isinstance(message, str):
        return frames.ProtocolError("the agent sent an ERROR without code and message")
    # The text is the guest's: no control characters of it reach a terminal.
    text = "".join(c if c.isprintable() else "?" for c in message[:2000])
    classes: dict[str, type[BangerError]] = {
        "not_found": NotFound,
        "exists": Conflict,
        "no_space": NoSpace,
        "timed_out": TimedOut,
        "bad_request": InvalidInput,
        "no_user": InvalidInput,
        "bad_cwd": InvalidInput,
        "not_a_directory": InvalidInput,
    }
    kind = classes.get(code, Unavailable)
    name = "".join(c for c in code[:40] if c.isalnum() or c == "_")
    return kind(f"in the guest: {text}", code=f"agent_{name}")


def expect(stream: Stream, wanted: int, *, timeout_s: float | None) -> bytes:
    """Return the payload of the next frame, which must be of this type."""
    kind, payload = stream.receive(timeout_s=timeout_s)
    if kind == frames.ERROR:
        raise agent_error(payload)
    if kind != wanted:
        raise frames.ProtocolError(f"the agent sent frame 0x{kind:02x} instead of 0x{wanted:02x}")
    return payload


def _ask(
    endpoint: Endpoint,
    kind: str,
    fields: dict[str, object],
    *,
    timeout_s: float = _ANSWER_TIMEOUT_S,
) -> dict[str, object]:
    with open_stream(endpoint, timeout_s=min(timeout_s, OPEN_TIMEOUT_S)) as stream:
        stream.send_request(kind, fields)
        return frames.decode_object(expect(stream, frames.END, timeout_s=timeout_s))


def wait_ready(
    endpoint: Endpoint, *, timeout_s: float, cancelled: Callable[[], bool] = lambda: False
) -> AgentInfo:
    """Wait for the agent of a booting VM and return the instant it answers.

    Raises TimedOut, Cancelled.
    """
    with wait_for_hello(endpoint, timeout_s=timeout_s, cancelled=cancelled) as stream:
        stream.finished = True  # nothing is in flight: BYE leaves the port clean
        return agent_info(stream.hello)


def agent_info(hello: dict[str, object]) -> AgentInfo:
    """Parse HELLO_OK's body."""
    uptime = hello.get("uptime")
    return AgentInfo(
        version=frames.VERSION,
        agent_version=str(hello.get("agent_version", ""))[:64],
        boot_id=str(hello.get("boot_id", ""))[:64],
        mode=str(hello.get("mode", ""))[:16],
        uptime_s=float(uptime) if isinstance(uptime, int | float) else 0.0,
    )


def exec_fields(request: ExecRequest) -> dict[str, object]:
    """Return the JSON of an exec request."""
    tty = request.tty
    return {
        "argv": [b64(word) for word in request.argv],
        "env": {b64(name): b64(value) for name, value in request.env.items()},
        "env_mode": "add",
        "cwd": None if request.cwd is None else b64(request.cwd),
        "user": request.user,
        "tty": None if tty is None else {"rows": tty[0], "cols": tty[1], "term": tty[2]},
        "stdin": request.stdin,
        "detach": request.detach,
        "timeout_s": request.timeout_s,
    }


def parse_exit(payload: bytes) -> ExitStatus:
    """Parse an EXIT frame: exactly one of code and signal."""
    body = frames.decode_object(payload)
    code, signal = body.get("code"), body.get("signal")
    if isinstance(code, int) and signal is None and 0 <= code <= 255:
        return ExitStatus(code, None, body.get("timed_out") is True)
    if isinstance(signal, int) and code is None and 1 <= signal <= 64:
        return ExitStatus(None, signal, body.get("timed_out") is True)
    raise frames.ProtocolError("the agent sent an EXIT without a code or a signal")


def start_detached(endpoint: Endpoint, request: ExecRequest) -> dict[str, object]:
    """Start a process that nobody waits for; return {pid, id, log}."""
    with open_stream(endpoint, timeout_s=OPEN_TIMEOUT_S) as stream:
        stream.send_request("exec", exec_fields(request._replace(detach=True, tty=None)))
        started = frames.decode_object(expect(stream, frames.STARTED, timeout_s=_ANSWER_TIMEOUT_S))
        expect(stream, frames.END, timeout_s=_ANSWER_TIMEOUT_S)
        return started


def capture_exec(
    endpoint: Endpoint,
    argv: list[bytes],
    *,
    input: bytes = b"",  # noqa: A002 - the name that subprocess gave it
    timeout_s: float,
    limit_bytes: int = 64 << 20,
) -> tuple[ExitStatus, bytes, bytes]:
    """Run a program and return its status, stdout and stderr.

    `timeout_s` bounds the run in the guest, and a little later here. Raises TimedOut only when the
    agent itself is silent; a program that ran too long has `timed_out` in its status.
    """
    request = ExecRequest(argv, stdin="pipe" if input else "null", timeout_s=timeout_s)
    output: dict[int, bytearray] = {frames.STDOUT: bytearray(), frames.STDERR: bytearray()}
    status: ExitStatus | None = None
    rest = memoryview(input)
    credit = frames.STDIN_WINDOW
    deadline = time.monotonic() + timeout_s + 10.0
    with open_stream(endpoint, timeout_s=OPEN_TIMEOUT_S) as stream:
        stream.send_request("exec", exec_fields(request))
        ended = not input
        while True:
            while rest and credit and status is None:
                part = rest[: min(credit, frames.MAX_PAYLOAD)]
                stream.send(frames.STDIN, part)
                rest, credit = rest[len(part) :], credit - len(part)
            if not rest and not ended:
                stream.send(frames.STDIN_EOF)
                ended = True
            kind, payload = stream.receive(timeout_s=max(0.1, deadline - time.monotonic()))
            if kind in output:
                output[kind] += payload
                if len(output[kind]) > limit_bytes:
                    raise Unavailable(f"the program wrote more than {limit_bytes} bytes")
            elif kind == frames.STDIN_CREDIT:
                credit = min(credit + frames.decode_credit(payload), frames.STDIN_WINDOW)
            elif kind == frames.EXIT:
                status = parse_exit(payload)
            elif kind == frames.ERROR:
                raise agent_error(payload)
            elif kind == frames.END:
                break
    if status is None:
        raise frames.ProtocolError("the agent ended an exec without EXIT")
    return status, bytes(output[frames.STDOUT]), bytes(output[frames.STDERR])


def follow_exec(
    endpoint: Endpoint, request: ExecRequest, take: Callable[[int, bytes], object]
) -> ExitStatus:
    """Run a program without input and hand its output to `take` as it comes; return how it ended.

    `take` gets frames.STDOUT or frames.STDERR and the bytes. What it raises ends the program.
    """
    fields = exec_fields(request._replace(stdin="null", tty=None, detach=False))
    status: ExitStatus | None = None
    with open_stream(endpoint, timeout_s=OPEN_TIMEOUT_S) as stream:
        stream.send_request("exec", fields)
        while True:
            kind, payload = stream.receive()
            if kind in (frames.STDOUT, frames.STDERR):
                take(kind, payload)
            elif kind == frames.EXIT:
                status = parse_exit(payload)
            elif kind == frames.ERROR:
                raise agent_error(payload)
            elif kind == frames.END:
                break
    if status is None:
        raise frames.ProtocolError("the agent ended an exec without EXIT")
    return status


def put_tar(
    endpoint: Endpoint,
    path: bytes,
    source: Iterable[bytes] | BinaryIO,
    *,
    mode: str = "merge",
    timeout_s: float | None = None,
    progress: Callable[[int], None] | None = None,
    owner: tuple[int, int] | None = None,
) -> dict[str, object]:
    """Extract a tar stream below a directory of the guest; return {files, bytes, warnings}.

    `mode` is "merge", or "create" to refuse a target that is not empty. `timeout_s` bounds each
    wait for the guest, not the whole. `progress` gets the bytes sent so far. Raises what the first
    failure in the guest was, and stops reading `source` then.
    """
    fields: dict[str, object] = {
        "path": b64(path),
        "mode": mode,
        "owner": None if owner is None else {"uid": owner[0], "gid": owner[1]},
    }
    sent = 0
    with open_stream(endpoint, timeout_s=OPEN_TIMEOUT_S) as stream:
        stream.send_request("put", fields)
        for chunk in _chunks(source):
            if not _send_patiently(stream, frames.encode(frames.TAR_DATA, chunk), timeout_s):
                break
            sent += len(chunk)
            if progress is not None:
                progress(sent)
        else:
            _send_patiently(stream, frames.encode(frames.TAR_EOF), timeout_s)
        return frames.decode_object(expect(stream, frames.END, timeout_s=timeout_s))


def _chunks(source: Iterable[bytes] | BinaryIO) -> Iterable[bytes]:
    """Yield pieces of at most one frame; small ones are joined."""
    read = getattr(source, "read", None)
    pieces: Iterable[bytes] = iter(lambda: read(frames.MAX_PAYLOAD), b"") if read else source
    pending = bytearray()
    for piece in pieces:
        pending += piece
        while len(pending) >= frames.MAX_PAYLOAD:
            yield bytes(memoryview(pending)[: frames.MAX_PAYLOAD])
            del pending[: frames.MAX_PAYLOAD]
    if pending:
        yield bytes(pending)


def _send_patiently(stream: Stream, data: bytes, timeout_s: float | None) -> bool:
    """Send while watching for an early ERROR; False when one has come (it is left to `expect`)."""
    view = memoryview(data)
    while view:
        ready = wait_for(stream.fileno(), select.POLLIN | select.POLLOUT, timeout_s)
        if ready & ~select.POLLOUT:
            return False
        if not ready:
            raise TimedOut("the agent takes no more data", code="agent_timeout")
        view = view[stream.send_some(view) :]
    return True


def get_tar(
    endpoint: Endpoint,
    path: bytes,
    sink: Callable[[bytes], object],
    *,
    timeout_s: float | None = None,
    full: bool = False,
) -> dict[str, object]:
    """Hand a file or tree of the guest to `sink` as a tar stream; return {files, bytes, warnings}.

    `timeout_s` bounds each wait for the guest. `full` asks for extended attributes and device
    nodes too.
    """
    fields: dict[str, object] = {"path": b64(path), "full": True} if full else {"path": b64(path)}
    with open_stream(endpoint, timeout_s=OPEN_TIMEOUT_S) as stream:
        stream.send_request("get", fields)
        while True:
            kind, payload = stream.receive(timeout_s=timeout_s)
            if kind == frames.TAR_DATA:
                sink(payload)
            elif kind == frames.TAR_EOF:
                return frames.decode_object(expect(stream, frames.END, timeout_s=timeout_s))
            elif kind == frames.ERROR:
                raise agent_error(payload)
            else:
                raise frames.ProtocolError(f"the agent sent frame 0x{kind:02x} in a tar stream")


def stat_path(endpoint: Endpoint, path: bytes) -> dict[str, object] | None:
    """Return what a path of the guest is (type, mode, size, ...), None when it does not exist."""
    answer = _ask(endpoint, "stat", {"path": b64(path)})
    return answer if answer.get("exists") is True else None


def find_shell(endpoint: Endpoint, *, user: str = "root") -> Shell:
    """Return the best shell of the guest for a user, and whether its sshd serves.

    An agent of before this request (a VM that outlived an upgrade) counts as one with sshd.
    """
    try:
        answer = _ask(endpoint, "shell", {"user": user})
    except Unavailable as error:
        if error.code == "agent_unsupported":
            return Shell([b"/bin/sh"], "coming")
        raise
    words, sshd = answer.get("argv"), answer.get("sshd")
    if sshd not in ("up", "coming", "none") or not (words is None or isinstance(words, list)):
        raise frames.ProtocolError("the agent sent no answer about its shell")
    try:
        argv = [a2b_base64(str(word)) for word in words or []]
    except ValueError as error:
        raise frames.ProtocolError("the agent sent a shell that does not read") from error
    return Shell(argv or None, str(sshd))


class ForwardStream:
    """A TCP connection inside the guest, with the calls of a socket."""

    __slots__ = ("_eof", "_over", "_pending", "stream")

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._pending = b""
        self._eof = False
        self._over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the descriptor to poll; `buffered` tells of data that is already here."""
        return self.stream.fileno()

    def buffered(self) -> bool:
        """Tell whether `recv_ready` has something without reading."""
        if not self._pending and not self._eof:
            self._take(self.stream.buffered_frame())
        return bool(self._pending) or self._eof

    def _take(self, frame: tuple[int, bytes] | None) -> None:
        if frame is None:
            return
        kind, payload = frame
        if kind == frames.DATA:
            self._pending += payload
        elif kind == frames.DATA_EOF:
            self._eof = True
        elif kind == frames.END:
            self._eof = self._over = True
        elif kind == frames.ERROR:
            self._over = True
            raise agent_error(payload)
        else:
            raise frames.ProtocolError(f"the agent sent frame 0x{kind:02x} in a forward")

    def recv_ready(self) -> bytes | None:
        """Return data, b"" at the end of the guest's direction, None when nothing has come yet."""
        while not self.buffered():
            if not self.stream.receive_ready():
                return None
        data, self._pending = self._pending, b""
        return data

    def recv(self, size: int = 65536) -> bytes:
        """Wait for data; b"" once the guest's side has closed."""
        while not self.buffered():
            self._take(self.stream.receive())
        data, self._pending = self._pending[:size], self._pending[size:]
        return data

    def send(self, data: bytes) -> None:
        """Send all of it, waiting for room."""
        for start in range(0, len(data), frames.MAX_PAYLOAD):
            self.stream.send(frames.DATA, data[start : start + frames.MAX_PAYLOAD])

    def send_eof(self) -> None:
        """Close our direction; the guest's stays open."""
        self.stream.send(frames.DATA_EOF)

    def close(self) -> None:
        """End the connection: orderly when both directions have closed, else at once."""
        if self._eof and not self._over:
            try:
                self._take(self.stream.receive(timeout_s=0.5))
            except BangerError:
                pass
        # BYE ends an unfinished connection too, and leaves the port clean.
        self.stream.finished = True
        self.stream.close()


def open_forward(
    endpoint: Endpoint, port: int, *, wait_s: float, host: str = "127.0.0.1"
) -> ForwardStream:
    """Connect to a TCP port inside the guest, waiting up to `wait_s` for a listener.

    Raises Unavailable (code agent_refused) or TimedOut when there is none.
    """
    stream = open_stream(endpoint, timeout_s=OPEN_TIMEOUT_S)
    try:
        stream.send_request("forward", {"host": host, "port": port, "wait_ms": int(wait_s * 1000)})
        expect(stream, frames.FORWARD_OK, timeout_s=wait_s + _ANSWER_TIMEOUT_S)
    except BaseException:
        stream.close()
        raise
    return ForwardStream(stream)


def probe_port(endpoint: Endpoint, port: int, *, wait_s: float) -> bool:
    """Tell whether something listens on a TCP port inside the guest, waiting up to `wait_s`."""
    try:
        open_forward(endpoint, port, wait_s=wait_s).close()
    except (Unavailable, TimedOut) as error:
        if error.code in ("agent_refused", "agent_timed_out"):
            return False
        raise
    return True


def forward(
    endpoint: Endpoint,
    port: int,
    *,
    host: str = "127.0.0.1",
    wait_s: float,
    in_fd: int,
    out_fd: int,
    end_out: Callable[[int], None] = os.close,
) -> None:
    """Join two descriptors with a TCP port inside the guest until that has closed.

    Our direction's end is passed on; at the guest's, `end_out` gets `out_fd` and this returns, for
    a guest that closes one half only cannot be told from one that is gone. Returns too when
    nobody reads `out_fd`.
    """
    with open_forward(endpoint, port, wait_s=wait_s, host=host) as connection:
        poll = select.poll()
        sending = True
        while True:
            while True:
                data = connection.recv_ready()
                if data is None:
                    break
                try:
                    if not data:
                        end_out(out_fd)
                        return
                    write_all(out_fd, data)
                except BrokenPipeError:
                    return
            poll.register(connection, select.POLLIN)
            if sending:
                poll.register(in_fd, select.POLLIN)
            for fd, _ in poll.poll():
                if fd == in_fd and sending:
                    try:
                        data = os.read(in_fd, frames.MAX_PAYLOAD)
                    except BlockingIOError:
                        continue
                    if data:
                        _send_both_ways(connection, data, out_fd)
                    else:
                        sending = False
                        poll.unregister(in_fd)
                        connection.send_eof()


def _send_both_ways(connection: ForwardStream, data: bytes, out_fd: int) -> None:
    """Send while taking what comes: both sides may be full at once."""
    view = memoryview(frames.encode(frames.DATA, data))
    while view:
        ready = wait_for(connection.fileno(), select.POLLIN | select.POLLOUT, None)
        if ready & select.POLLOUT:
            view = view[connection.stream.send_some(view) :]
        else:
            got = connection.recv_ready()
            if got:
                write_all(out_fd, got)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of it, also where somebody has made the descriptor non-blocking."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            wait_for(fd, select.POLLOUT, None)


def listening_ports(endpoint: Endpoint) -> list[dict[str, object]]:
    """Return the guest's listening sockets: {proto, address, port, pid, comm}."""
    ports = _ask(endpoint, "ports", {}).get("ports")
    if not isinstance(ports, list):
        raise frames.ProtocolError("the agent sent no list of ports")
    return [port for port in ports if isinstance(port, dict)]


def stats(endpoint: Endpoint) -> dict[str, object]:
    """Return the guest's cpu, load, memory, disk, uptime and process count."""
    return _ask(endpoint, "stats", {})


def sync(endpoint: Endpoint, *, timeout_s: float = 60.0) -> None:
    """Write the guest's dirty pages to its disks."""
    _ask(endpoint, "sync", {}, timeout_s=timeout_s)


def shutdown(endpoint: Endpoint, *, force: bool = False, timeout_s: float) -> None:
    """Ask the guest to end; returns once the agent has taken the request.

    Both VMMs exit when the guest reboots. `force` skips the guest's init.
    """
    fields: dict[str, object] = {"mode": "reboot", "force": force}
    _ask(endpoint, "shutdown", fields, timeout_s=timeout_s)


def set_time(endpoint: Endpoint) -> None:
    """Set the guest's clock to the host's when it is off by more than 0.5 s."""
    _ask(endpoint, "time", {"unix_ns": time.time_ns()})
