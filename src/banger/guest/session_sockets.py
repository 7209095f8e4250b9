"""Unix sockets of this host that lead to a VM's sessions: `python -m banger.guest.session_sockets`.

A process of its own beside the VM's, as the carrier of its ports is: it needs neither the daemon
nor the command line, and ends with the VMM's process. It owns a directory: `.control` takes the
name of a session that is to have a socket, `NAME.sock` joins a program to it (docs/sessions.md has
what is said there). The sessions are the agent's; who starts this is `cli.session_socket`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import select
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from banger.errors import BangerError, InvalidInput, NotFound, Unavailable
from banger.guest import frames, sessions
from banger.guest.agent import parse_exit
from banger.guest.carrier import Acceptor, add_whose, parse_endpoint, say_ready
from banger.guest.transport import Endpoint, VirtioSerial

CONTROL = ".control"
# sockaddr_un.sun_path has 108 bytes, the closing NUL among them (unix(7)).
_SUN_PATH_BYTES = 107
# Programs that are connected, most of which may still be about to say what they want.
_CONNECTIONS = 64
# Under QEMU each viewer takes one of the VM's 12 streams, and exec, ssh and ports need some too.
_SERIAL_VIEWERS = 8
# The agent keeps 64 sessions; sockets of those that are gone stay until somebody asks for one.
_SOCKETS = 512
_LINE_BYTES = 4096
_LINE_TIMEOUT_S = 10.0
_QUEUE_BYTES = 256 << 10
_READ_BYTES = 64 << 10
# A program that has sent its last and left: so long may pass before the process takes more of it.
_LAST_BYTES_S = 10.0
_MAX_POSITION = 1 << 62
_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid (unix(7), SO_PEERCRED)


def socket_path(directory: str, name: str) -> str:
    """Return the path of a session's socket; a name too long for one gives way to its digest."""
    path = f"{directory}/{name}.sock"
    if len(os.fsencode(path)) <= _SUN_PATH_BYTES:
        return path
    return f"{directory}/~{hashlib.blake2b(name.encode(), digest_size=6).hexdigest()}.sock"


class Wish(NamedTuple):
    """What a program asks for in its first line; a position of None is none of that stream."""

    read_only: bool
    stdout: int | None
    stderr: int | None
    raw: bool


def parse_wish(line: bytes) -> Wish:
    """Parse a program's first line; an empty one is the defaults. Raises InvalidInput."""
    try:
        body = json.loads(line) if line.strip() else {}
    except (ValueError, RecursionError) as error:
        raise InvalidInput("the first line is not JSON") from error
    if not isinstance(body, dict):
        raise InvalidInput("the first line is not a JSON object")
    read_only, raw = body.get("read_only", False), body.get("raw", False)
    if not isinstance(read_only, bool) or not isinstance(raw, bool):
        raise InvalidInput("read_only and raw are true or false")
    begin = body.get("from", "end")
    if isinstance(begin, dict):
        stdout, stderr = _position(begin.get("stdout")), _position(begin.get("stderr"))
    elif begin == "start":
        stdout = stderr = 0
    else:
        stdout = _position(None if begin == "end" else begin)
        stderr = sessions.END_OF_OUTPUT
    return Wish(read_only, stdout, None if raw else stderr, raw)


def _position(value: object) -> int:
    if value is None:
        return sessions.END_OF_OUTPUT
    if type(value) is not int or not 0 <= value <= _MAX_POSITION:
        raise InvalidInput('from is "start", "end", a position, or {"stdout": N, "stderr": N}')
    return value


class SessionSockets:
    """The sockets of one VM's sessions, all in one directory."""

    def __init__(self, directory: str, endpoint: Endpoint) -> None:
        self._directory = directory
        self._endpoint = endpoint
        self._acceptor = Acceptor(_CONNECTIONS)
        serial = isinstance(endpoint, VirtioSerial)
        self._viewers = threading.BoundedSemaphore(_SERIAL_VIEWERS if serial else _CONNECTIONS)
        self._changing = threading.Lock()
        self._open: dict[str, socket.socket] = {}

    def begin(self) -> None:
        """Listen for names, and for the sessions that one of us before this one listened for."""
        for entry in sorted(os.listdir(self._directory)):
            name = entry.removesuffix(".sock")
            if name != entry and sessions.NAME.fullmatch(name) is not None:
                with contextlib.suppress(OSError):
                    self.open(name)
        self._acceptor.add(_listen(f"{self._directory}/{CONTROL}"), self._control)

    def run(self, ended: int) -> None:
        """Serve until the process of the pidfd `ended` has ended."""
        self._acceptor.run(ended)

    def open(self, name: str) -> None:
        """Have a socket for a session; it may be there already."""
        path = socket_path(self._directory, name)
        with self._changing:
            listener = self._open.get(name)
            if listener is not None:
                if _is_socket(path):
                    return
                self._acceptor.remove(listener)
                del self._open[name]
            if len(self._open) >= _SOCKETS:
                raise Unavailable(f"there are {_SOCKETS} sockets of sessions")
            listener = self._open[name] = _listen(path)
            self._acceptor.add(listener, lambda client: self._serve(name, client))

    def _forget(self, name: str) -> None:
        with self._changing:
            listener = self._open.pop(name, None)
            if listener is not None:
                # The name first: who finds it must find somebody behind it.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(socket_path(self._directory, name))
                self._acceptor.remove(listener)

    def _control(self, client: socket.socket) -> None:
        if not _is_ours(client):
            return
        line, _ = _read_line(client)
        try:
            self.open(sessions.check_name(line.decode(errors="replace")))
            client.sendall(b"ok\n")
        except BangerError as error:
            client.sendall(f"{error.message}\n".encode())
        except OSError as error:
            client.sendall(f"{error.strerror or error}\n".encode())

    def _serve(self, name: str, client: socket.socket) -> None:
        if not _is_ours(client):
            return
        try:
            line, rest = _read_line(client)
            wish = parse_wish(line)
            with self._place(), _attached(self._endpoint, name, wish) as attachment:
                _answer(client, {"ok": True, "session": sessions.to_json(attachment.session)})
                client.setblocking(False)
                _Joint(client, rest, attachment, raw=wish.raw).run()
        except NotFound as error:
            self._forget(name)
            _refuse(client, error)
        except BangerError as error:
            _refuse(client, error)

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        if not self._viewers.acquire(blocking=False):
            raise Unavailable("too many programs are connected to this VM's sessions", code="busy")
        try:
            yield
        finally:
            self._viewers.release()


def _attached(endpoint: Endpoint, name: str, wish: Wish) -> sessions.Attachment:
    return sessions.attach(
        endpoint, name, read_only=wish.read_only, stdout=wish.stdout, stderr=wish.stderr
    )


def _listen(path: str) -> socket.socket:
    # Of one that ended; a name of ours in a directory of ours.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)  # 0600: main has set the umask
        listener.listen(_CONNECTIONS)
    except BaseException:
        listener.close()
        raise
    return listener


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return False


def _is_ours(client: socket.socket) -> bool:
    """Tell whether the program at the other end is this user's, and bound its silence."""
    client.settimeout(_LINE_TIMEOUT_S)
    credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return bool(_PEER.unpack(credentials)[1] == os.getuid())


def _read_line(client: socket.socket) -> tuple[bytes, bytes]:
    """Return a program's first line and what came behind it. Raises InvalidInput, OSError."""
    deadline = time.monotonic() + _LINE_TIMEOUT_S
    data = b""
    while b"\n" not in data:
        left_s = deadline - time.monotonic()
        if len(data) > _LINE_BYTES or left_s <= 0:
            raise InvalidInput(f"the first line is one of JSON, of at most {_LINE_BYTES} bytes")
        client.settimeout(left_s)
        more = client.recv(_LINE_BYTES)
        if not more:
            break
        data += more
    line, _, rest = data.partition(b"\n")
    client.settimeout(_LINE_TIMEOUT_S)
    return line, rest


def _answer(client: socket.socket, body: dict[str, object]) -> None:
    client.sendall(json.dumps(body).encode() + b"\n")


def _refuse(client: socket.socket, error: BangerError) -> None:
    """Say why, where nothing has been said yet; else the end of the connection is all there is."""
    if client.getblocking():
        code = error.code.removeprefix("agent_")
        _answer(client, {"ok": False, "code": code, "error": error.message})


class _Joint:
    """One program and one session: frames (or plain bytes) both ways, each at its own pace.

    Of the session no more is read while the program takes nothing: the agent drops what comes
    meanwhile and says so. Of the program no more is read than the process has taken.
    """

    def __init__(
        self, client: socket.socket, rest: bytes, attachment: sessions.Attachment, *, raw: bool
    ) -> None:
        self._client = client
        self._attachment = attachment
        self._raw = raw
        self._decoder = frames.Decoder(
            b"" if raw else rest, known=frames.FROM_VIEWER, sender="the program"
        )
        self._input = bytearray(rest if raw else b"")  # the process's, waiting for credit
        self._output = bytearray()
        self._more_input = True
        self._gone_at: float | None = None
        self._over = False

    def run(self) -> None:
        """Carry bytes until the session has ended, or the program has left."""
        while True:
            self._take_output()
            self._take_input()
            if self._over and not self._output:
                return
            if self._gone_at is not None and self._is_done():
                return
            self._wait()

    def _is_done(self) -> bool:
        waiting = self._input or self._more_input or self._attachment.sending
        late = self._gone_at is not None and time.monotonic() - self._gone_at > _LAST_BYTES_S
        return self._over or not waiting or late

    def _take_output(self) -> None:
        while not self._over and (self._gone_at is not None or len(self._output) < _QUEUE_BYTES):
            frame = self._attachment.next_frame()
            if frame is None:
                return
            kind, payload = frame
            if kind == frames.END:
                self._over = True
                self._attachment.close()  # the stream is free, however slow the program is
            if self._gone_at is not None:
                continue
            if not self._raw:
                self._output += _passed_on(kind, payload)
            elif kind == frames.STDOUT:
                self._output += payload

    def _take_input(self) -> None:
        """Queue what may be sent now: as much as there is credit for, in the order it came."""
        attachment = self._attachment
        while not self._over and not attachment.sending:
            if self._input:
                part = bytes(self._input[: min(attachment.credit, frames.MAX_PAYLOAD)])
                if not part:
                    return
                attachment.write(part)
                del self._input[: len(part)]
                if self._gone_at is not None:
                    self._gone_at = time.monotonic()  # a slow process is not one that takes nothing
                continue
            frame = None if self._raw else self._decoder.next_frame()
            if frame is None:
                return
            kind, payload = frame
            if kind == frames.STDIN:
                self._input += payload
            elif kind == frames.STDIN_EOF:
                attachment.queue(kind)
            else:
                attachment.queue(kind, _checked(kind, payload))

    def _wait(self) -> None:
        attachment = self._attachment
        poll = select.poll()
        reading = len(self._output) < _QUEUE_BYTES or self._gone_at is not None
        events = (select.POLLIN if reading else 0) | (select.POLLOUT if attachment.sending else 0)
        if not self._over:
            poll.register(attachment, events)
        wants = self._more_input and not self._input and not attachment.sending and not self._over
        if self._output or wants or self._gone_at is None:
            # Hang-up is told without being asked for.
            events = (select.POLLIN if wants else 0) | (select.POLLOUT if self._output else 0)
            poll.register(self._client, events)
        ready = dict(poll.poll(1000 if self._gone_at is not None else None))
        at_client = ready.get(self._client.fileno(), 0)
        if at_client & (select.POLLHUP | select.POLLERR) and self._gone_at is None:
            self._leave()
        if at_client & select.POLLOUT and self._output:
            self._send()
        if wants and at_client & (select.POLLIN | select.POLLHUP):
            self._read()
        at_agent = ready.get(attachment.fileno(), 0)
        if at_agent & select.POLLOUT:
            attachment.send_some()
        if at_agent & ~select.POLLOUT and reading:
            attachment.receive_ready()

    def _leave(self) -> None:
        """Note that nobody reads any more; what was sent before is still the process's."""
        self._gone_at = time.monotonic()
        self._output.clear()

    def _send(self) -> None:
        try:
            sent = self._client.send(memoryview(self._output)[:_QUEUE_BYTES])
        except BlockingIOError:
            return
        except OSError:
            self._leave()
            return
        del self._output[:sent]

    def _read(self) -> None:
        try:
            data = self._client.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._more_input = False
        elif self._raw:
            self._input += data
        else:
            self._decoder.feed(data)


def _passed_on(kind: int, payload: bytes) -> bytes:
    """Return an agent's frame for a program, which need not check it again."""
    if kind == frames.MISSED:
        stream, count = sessions.parse_missed(payload)
        return frames.encode_json(kind, {"stream": stream, "bytes": count})
    if kind == frames.EXIT:
        status = parse_exit(payload)
        return frames.encode_json(kind, {"code": status.code, "signal": status.signal})
    if kind in (frames.RESTARTED, frames.END):
        body = frames.decode_object(payload)
        session = body if kind == frames.RESTARTED else body.get("session")
        shown = sessions.to_json(sessions.parse_session(session))
        return frames.encode_json(kind, shown if kind == frames.RESTARTED else {"session": shown})
    return frames.encode(kind, payload)


def _checked(kind: int, payload: bytes) -> bytes:
    """Return a program's RESIZE or SIGNAL as the agent takes it; raises InvalidInput."""
    body = frames.decode_object(payload)
    limits = {"number": 64} if kind == frames.SIGNAL else {"rows": 65535, "cols": 65535}
    found = {name: body.get(name) for name in limits}
    for name, most in limits.items():
        value = found[name]
        if type(value) is not int or not 1 <= value <= most:
            raise InvalidInput(f"{name} is a number from 1 to {most}")
    return json.dumps(found).encode()


def main() -> int:
    """Serve the sockets of one VM's sessions until its VMM is gone."""
    parser = argparse.ArgumentParser(prog="banger-sessions")
    add_whose(parser)
    parser.add_argument("--endpoint", type=parse_endpoint, required=True, help="the guest's agent")
    parser.add_argument("directory", help="private to this user; the sockets are made in it")
    options = parser.parse_args()
    os.umask(0o177)
    try:
        ended = os.pidfd_open(options.pid)
        served = SessionSockets(options.directory, options.endpoint)
        served.begin()
    except (OSError, BangerError) as error:
        print(f"banger-sessions: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 1
    say_ready()
    served.run(ended)
    return 0


if __name__ == "__main__":
    sys.exit(main())
