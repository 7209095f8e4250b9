"""One request to the daemon over its Unix socket, and its event streams.

Owns HTTP over AF_UNIX, JSON in and out, and the mapping of error answers back to the
error hierarchy. Leaves starting the daemon to `client.autostart` and the routes to
`client.api`.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from banger import __version__, errors
from banger.errors import BangerError, TimedOut, Unavailable

REQUEST_TIMEOUT_S = 60.0  # every plain route answers from memory or SQLite: 60 s is a hang
STREAM_SILENCE_S = 120.0  # a stream carries heartbeats; two minutes without one is a hang
_BUSY_CONNECT_S = 10.0  # a full accept queue answers EAGAIN on AF_UNIX
_SUN_PATH_BYTES = 107  # sizeof(sockaddr_un.sun_path) less the closing NUL
_BODY_LIMIT_BYTES = 64 * 1024 * 1024
_HEAD_LINE_BYTES = 65536
_HEADER_LIMIT = 100

_ERRORS: dict[str, type[BangerError]] = {
    kind.code: kind
    for kind in (
        errors.UsageError,
        errors.InvalidInput,
        errors.NotFound,
        errors.Conflict,
        errors.Unavailable,
        errors.NoSpace,
        errors.Corrupted,
        errors.VmmFailed,
        errors.TimedOut,
        errors.Cancelled,
        errors.CommandFailed,
    )
}
_BY_STATUS: dict[int, type[BangerError]] = {
    400: errors.InvalidInput,
    404: errors.NotFound,
    409: errors.Conflict,
    503: errors.Unavailable,
    504: errors.TimedOut,
    507: errors.NoSpace,
}


class DaemonGone(Unavailable):
    """Nobody listens on the socket (`started` false) or the peer hung up half-way (true)."""

    code = "daemon_gone"

    def __init__(self, message: str, *, hint: str = "", started: bool) -> None:
        super().__init__(message, hint=hint)
        self.started = started


class Answer(NamedTuple):
    """A whole answer: `version` is the daemon's own (None when it did not say)."""

    status: int
    version: str | None
    body: Any


class _Exchange:
    """One HTTP/1.1 request and its answer on a Unix socket of their own.

    Not http.client: with email and ssl behind it, its import alone is a third of what
    `banger vm list` may cost. The peer is our own daemon, so this reads what HTTP/1.1
    allows a server to send (Content-Length, chunked, or until the end), within bounds.
    """

    def __init__(self, socket_path: str, timeout_s: float) -> None:
        self._socket = _connect(socket_path, timeout_s)
        self._file = self._socket.makefile("rb")
        self.status = 0
        self.headers: dict[str, str] = {}
        self._chunked = False
        self._left: int | None = None  # of the body, or of the current chunk
        self._ended = False

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._socket.close()

    def send(self, method: str, path: str, body: bytes | None) -> None:
        """Send the request and read the answer's head."""
        lines = [
            f"{method} {path} HTTP/1.1",
            "Host: localhost",
            f"X-Banger-Version: {__version__}",
            "Connection: close",
        ]
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        elif method not in ("GET", "DELETE"):
            lines.append("Content-Length: 0")
        self._socket.sendall("\r\n".join([*lines, "", ""]).encode("ascii") + (body or b""))
        self._read_head()

    def _read_head(self) -> None:
        words = self._line().split(None, 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise _BrokenAnswerError
        self.status = int(words[1])
        for _ in range(_HEADER_LIMIT):
            line = self._line()
            if not line:
                break
            name, _, value = line.partition(b":")
            self.headers[name.decode("latin-1").lower()] = value.strip().decode("latin-1")
        self._chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        length = self.headers.get("content-length")
        if not self._chunked and length is not None:
            if not length.isdigit():
                raise _BrokenAnswerError
            self._left = int(length)

    def _line(self) -> bytes:
        line = self._file.readline(_HEAD_LINE_BYTES)
        if not line.endswith(b"\n"):
            raise _BrokenAnswerError
        return line.rstrip(b"\r\n")

    def read(self) -> bytes:
        """Return the whole body."""
        parts = []
        count = 0
        while part := self._some(_BODY_LIMIT_BYTES):
            parts.append(part)
            count += len(part)
            if count > _BODY_LIMIT_BYTES:
                raise _BrokenAnswerError
        return b"".join(parts)

    def lines(self) -> Iterator[bytes]:
        """Yield the lines of the body as they arrive."""
        kept = b""
        while part := self._some(65536, whole=False):
            *lines, kept = (kept + part).split(b"\n")
            yield from lines
            if len(kept) > _BODY_LIMIT_BYTES:
                raise _BrokenAnswerError
        if kept:
            yield kept

    def _some(self, limit: int, *, whole: bool = True) -> bytes:
        """Return some bytes of the body, nothing at its end."""
        if self._ended:
            return b""
        if self._chunked and not self._left and not self._next_chunk():
            return b""
        if self._left is None:  # until the peer hangs up
            return self._file.read1(limit)
        if self._left == 0:
            return b""
        count = min(self._left, limit)
        part = self._file.read(count) if whole else self._file.read1(count)
        if not part or (whole and len(part) < count):
            raise _BrokenAnswerError
        self._left -= len(part)
        return part

    def _next_chunk(self) -> bool:
        if self._left == 0:
            self._line()  # what ends the chunk before
        try:
            self._left = int(self._line().split(b";")[0], 16)
        except ValueError:
            raise _BrokenAnswerError from None
        self._ended = self._left == 0
        return not self._ended


class _BrokenAnswerError(Exception):
    """The peer hung up in the middle, or speaks no HTTP."""


def _connect(socket_path: str, timeout_s: float) -> socket.socket:
    """Connect, waiting while the daemon's accept queue is full."""
    if len(socket_path.encode()) > _SUN_PATH_BYTES:
        raise Unavailable(
            f"the socket path {socket_path} is longer than the kernel takes",
            hint="set XDG_RUNTIME_DIR to a shorter directory",
        )
    deadline = time.monotonic() + _BUSY_CONNECT_S
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(socket_path)
        except BlockingIOError:
            sock.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        except BaseException:
            sock.close()
            raise
        else:
            return sock


def error_from_body(body: Any, status: int = 0) -> BangerError:
    """Turn an error body (or anything a broken daemon sent) into the matching error."""
    found = body.get("error", body) if isinstance(body, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("message"), str):
        return BangerError(
            f"the daemon answered {status} with no reason", hint="see `banger daemon logs`"
        )
    code = str(found.get("code", "internal"))
    kind = _ERRORS.get(code) or _BY_STATUS.get(status, BangerError)
    return kind(found["message"], hint=str(found.get("hint") or ""), code=code)


def send(
    socket_path: str,
    method: str,
    path: str,
    body: Any = None,
    *,
    timeout_s: float = REQUEST_TIMEOUT_S,
) -> Answer:
    """Send one request on a connection of its own and return the whole answer.

    Raises DaemonGone when nobody listens or the peer hung up, TimedOut when it is silent.
    An answer with an error status is returned, not raised.
    """
    with _translated():
        exchange = _open(socket_path, timeout_s)
        try:
            exchange.send(method, path, None if body is None else json.dumps(body).encode())
            raw = exchange.read()
        finally:
            exchange.close()
    return Answer(exchange.status, exchange.headers.get("x-banger-version"), _decode(raw))


def stream(
    socket_path: str, path: str, *, silence_s: float = STREAM_SILENCE_S
) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a newline-delimited stream as they arrive.

    Ends when the peer closes the stream; raises the mapped error for an error status.
    """
    with _translated():
        exchange = _open(socket_path, silence_s)
    try:
        with _translated():
            exchange.send("GET", path, None)
            if exchange.status >= 400:
                raise error_from_body(_decode(exchange.read()), exchange.status)
        lines = exchange.lines()
        while True:
            with _translated():
                line = next(lines, None)
            if line is None:
                return
            if line.strip():
                event = _decode(line)
                if isinstance(event, dict):
                    yield event
    finally:
        exchange.close()


def _open(socket_path: str, timeout_s: float) -> _Exchange:
    try:
        return _Exchange(socket_path, timeout_s)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise DaemonGone(
            "the daemon is not running", hint="see `banger daemon logs`", started=False
        ) from error
    except PermissionError as error:
        raise Unavailable(
            "the daemon's socket may not be opened by this user",
            hint="run banger as the user who started it",
        ) from error
    except BlockingIOError as error:
        raise Unavailable("the daemon is too busy to answer", hint="try again") from error


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn what a socket raises into designed errors."""
    try:
        yield
    except TimeoutError as error:
        raise _silent() from error
    except (OSError, _BrokenAnswerError) as error:
        raise _hung_up() from error


def _silent() -> TimedOut:
    return TimedOut(
        "the daemon does not answer", hint="see `banger daemon logs`, then `banger daemon stop`"
    )


def _hung_up() -> DaemonGone:
    return DaemonGone(
        "the daemon ended before it answered",
        hint="run the command again; `banger daemon logs` tells why",
        started=True,
    )


def _decode(raw: bytes) -> Any:
    if not raw:
        return None
    try:
        return json.loads(raw)
    except ValueError as error:
        raise BangerError(
            "the daemon's answer is not JSON", hint="see `banger daemon logs`"
        ) from error
