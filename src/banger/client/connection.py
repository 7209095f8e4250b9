"""One request to the daemon over its Unix socket, and its event streams.

Owns HTTP over AF_UNIX, JSON in and out, and the mapping of error answers back to the
error hierarchy. Leaves starting the daemon to `client.autostart` and the routes to
`client.api`.
"""

from __future__ import annotations

import http.client
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
_LINE_LIMIT_BYTES = 16 * 1024 * 1024

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


class _UnixHTTPConnection(http.client.HTTPConnection):
    """HTTP/1.1 to a Unix socket."""

    def __init__(self, socket_path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._socket_path = socket_path
        self._timeout_s = timeout_s

    def connect(self) -> None:
        """Connect, waiting while the daemon's accept queue is full."""
        if len(self._socket_path.encode()) > _SUN_PATH_BYTES:
            raise Unavailable(
                f"the socket path {self._socket_path} is longer than the kernel takes",
                hint="set XDG_RUNTIME_DIR to a shorter directory",
            )
        deadline = time.monotonic() + _BUSY_CONNECT_S
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(self._timeout_s)
                sock.connect(self._socket_path)
            except BlockingIOError:
                sock.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            except BaseException:
                sock.close()
                raise
            else:
                self.sock = sock
                return


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
    connection = _UnixHTTPConnection(socket_path, timeout_s)
    try:
        response = _exchange(connection, method, path, body)
        raw = _reading(response.read)
        return Answer(response.status, response.headers.get("X-Banger-Version"), _decode(raw))
    finally:
        connection.close()


def stream(
    socket_path: str, path: str, *, silence_s: float = STREAM_SILENCE_S
) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a newline-delimited stream as they arrive.

    Ends when the peer closes the stream; raises the mapped error for an error status.
    """
    connection = _UnixHTTPConnection(socket_path, silence_s)
    try:
        response = _exchange(connection, "GET", path, None)
        if response.status >= 400:
            raise error_from_body(_decode(_reading(response.read)), response.status)
        while line := _reading(lambda: response.readline(_LINE_LIMIT_BYTES)):
            if line.strip():
                event = _decode(line)
                if isinstance(event, dict):
                    yield event
    finally:
        connection.close()


def _exchange(
    connection: _UnixHTTPConnection, method: str, path: str, body: Any
) -> http.client.HTTPResponse:
    payload = None if body is None else json.dumps(body).encode()
    headers = {"X-Banger-Version": __version__, "Connection": "close"}
    if payload is not None:
        headers["Content-Type"] = "application/json"
    try:
        connection.connect()
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise DaemonGone(
            "the daemon is not running", hint="see `banger daemon logs`", started=False
        ) from error
    except TimeoutError as error:
        raise _silent() from error
    except PermissionError as error:
        raise Unavailable(
            "the daemon's socket may not be opened by this user",
            hint="run banger as the user who started it",
        ) from error
    except BlockingIOError as error:
        raise Unavailable("the daemon is too busy to answer", hint="try again") from error
    try:
        connection.request(method, path, payload, headers)
        return connection.getresponse()
    except TimeoutError as error:
        raise _silent() from error
    except (OSError, http.client.HTTPException) as error:
        raise _hung_up() from error


def _reading(read: Any) -> bytes:
    try:
        found: bytes = read()
    except TimeoutError as error:
        raise _silent() from error
    except (OSError, http.client.HTTPException) as error:
        raise _hung_up() from error
    return found


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
