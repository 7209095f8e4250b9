"""The host's end of `--forward-agent`: of the user's ssh-agent, what a guest may have.

Owns the channels of an ssh_agent stream (agent/PROTOCOL.md) and the judgement of what a guest may
ask: to list keys and to sign with them. It may not add, remove or lock, and a key that its owner
bound to certain hosts (`ssh-add -h`) is not there for it. Numbers and formats are those of
draft-ietf-sshm-ssh-agent and of OpenSSH's PROTOCOL.agent. Every byte of the guest is hostile.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import socket
import struct
import threading
import time
from typing import Self

from banger.errors import BangerError, Unavailable
from banger.guest import frames
from banger.guest.agent import OPEN_TIMEOUT_S, agent_error, expect
from banger.guest.transport import Endpoint, Stream, connect_unix, open_stream, wait_for

# OpenSSH's own bound (AGENT_MAX_LEN).
MAX_MESSAGE_BYTES = 256 << 10
MAX_CHANNELS = 32
# What a guest has asked and the ssh-agent was not yet told; four of the longest messages.
_MAX_ASKED_BYTES = 1 << 20
# Above this nothing more is read or answered until the guest has taken it.
_MAX_SENDING_BYTES = 1 << 20
_ANSWER_TIMEOUT_S = 30.0
# A desktop's agent may ask its user to unlock it before it lists anything.
_CHECK_TIMEOUT_S = 20.0
# The thread is in a poll, or in BYE, which has a bound of its own.
_JOIN_TIMEOUT_S = 5.0

_FAILURE = 5
_REQUEST_IDENTITIES = 11
_IDENTITIES_ANSWER = 12
_SIGN_REQUEST = 13
_EXTENSION = 27
_EXTENSIONS = (b"session-bind@openssh.com", b"query")

_LENGTH = struct.Struct(">I")
_START = 'start one: `eval "$(ssh-agent)"; ssh-add`'


class Nonsense(ValueError):
    """What came is no message of the ssh-agent protocol."""


class Messages:
    """Turns bytes into whole messages, each with its length before it.

    The caller bounds what it feeds by `len`.
    """

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def __len__(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Append what arrived."""
        self._buffer += data

    def next_message(self) -> bytes | None:
        """Return the next whole message, or None. Raises Nonsense for an empty or too long one."""
        if len(self._buffer) < _LENGTH.size:
            return None
        length: int = _LENGTH.unpack_from(self._buffer)[0]
        if not 0 < length <= MAX_MESSAGE_BYTES:
            raise Nonsense(f"a message of {length} bytes")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        message = bytes(memoryview(self._buffer)[:end])
        del self._buffer[:end]
        return message


def message_of(kind: int, body: bytes = b"") -> bytes:
    """Return one message with its length before it."""
    return _LENGTH.pack(1 + len(body)) + bytes((kind,)) + body


def is_allowed(message: bytes) -> bool:
    """Tell whether a guest may ask this: to list, to sign, and what makes these two safer."""
    kind = message[_LENGTH.size]
    if kind != _EXTENSION:
        return kind in (_REQUEST_IDENTITIES, _SIGN_REQUEST)
    body = message[_LENGTH.size + 1 :]
    if len(body) < _LENGTH.size:
        return False
    end = _LENGTH.size + _LENGTH.unpack_from(body)[0]
    return body[_LENGTH.size : end] in _EXTENSIONS


# -- telling the ssh-agent that the one who asks is elsewhere

# A Mersenne prime as an RSA modulus: its "private" key is known to everybody, so it says of nobody
# who they are. It stands for a host that no key's owner can have meant.
_NOBODY_BITS = 2203
_NOBODY_E = 65537
_SHA512_INFO = bytes.fromhex("3051300d060960864801650304020305000440")


def bind_elsewhere() -> bytes:
    """Return the message that binds a connection as one that was forwarded to an unknown host.

    OpenSSH's ssh says the same (session-bind@openssh.com) when it forwards. Of an ssh-agent told
    so a key bound to certain hosts is not to be had; else the guest would count as this host.
    """
    modulus = (1 << _NOBODY_BITS) - 1
    size = (_NOBODY_BITS + 7) // 8
    session = os.urandom(32)
    digest = _SHA512_INFO + hashlib.sha512(session).digest()
    padded = b"\x00\x01" + b"\xff" * (size - len(digest) - 3) + b"\x00" + digest
    power = pow(_NOBODY_E, -1, modulus - 1)
    signed = pow(int.from_bytes(padded, "big"), power, modulus).to_bytes(size, "big")
    key = _string(b"ssh-rsa") + _number(_NOBODY_E) + _number(modulus)
    signature = _string(b"rsa-sha2-512") + _string(signed)
    forwarding = b"\x01"
    body = _string(_EXTENSIONS[0]) + _string(key) + _string(session) + _string(signature)
    return message_of(_EXTENSION, body + forwarding)


def _string(value: bytes) -> bytes:
    return _LENGTH.pack(len(value)) + value


def _number(value: int) -> bytes:
    # With room for the sign: a number whose highest bit is set begins with a zero.
    return _string(value.to_bytes(value.bit_length() // 8 + 1, "big"))


# -- the user's ssh-agent


def find_agent() -> str:
    """Return the socket of the user's ssh-agent ($SSH_AUTH_SOCK); raises Unavailable."""
    path = os.environ.get("SSH_AUTH_SOCK", "")
    if not path:
        raise Unavailable(
            "there is no ssh-agent to forward: SSH_AUTH_SOCK is not set",
            hint=_START,
            code="no_ssh_agent",
        )
    return path


def count_keys(path: str) -> int:
    """Ask an ssh-agent how many keys it holds; raises Unavailable when it does not answer."""
    deadline = time.monotonic() + _CHECK_TIMEOUT_S
    answers = Messages()
    try:
        with connect_unix(path) as sock:
            sock.sendall(message_of(_REQUEST_IDENTITIES))
            while (answer := answers.next_message()) is None:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not wait_for(sock.fileno(), select.POLLIN, left_s):
                    raise TimeoutError("no answer")
                data = sock.recv(65536)
                if not data:
                    raise ConnectionResetError("it hung up")
                answers.feed(data)
    except (OSError, Nonsense) as error:
        raise Unavailable(
            f"the ssh-agent at {path} (SSH_AUTH_SOCK) does not answer: {error}",
            hint=_START,
            code="no_ssh_agent",
        ) from error
    body = answer[_LENGTH.size :]
    if body[0] != _IDENTITIES_ANSWER or len(body) < 1 + _LENGTH.size:
        raise Unavailable(
            f"the ssh-agent at {path} (SSH_AUTH_SOCK) does not list its keys",
            hint="`ssh-add -l` may tell why",
            code="no_ssh_agent",
        )
    count: int = _LENGTH.unpack_from(body, 1)[0]
    return count


# -- the channels


class _Channel:
    """One connection to the ssh-agent: one request at a time, so that answers keep their order."""

    __slots__ = ("_answers", "_asked", "_binding", "_unsent", "_waiting", "sock")

    def __init__(self, sock: socket.socket, binding: bytes) -> None:
        self.sock = sock
        self._asked = Messages()
        self._answers = Messages()
        self._unsent = bytearray(binding)
        self._waiting = True
        self._binding = True  # its answer is ours: an agent that knows no binding says FAILURE

    def events(self, *, reading: bool) -> int:
        return (select.POLLOUT if self._unsent else 0) | (select.POLLIN if reading else 0)

    def ask(self, data: bytes) -> None:
        """Take what the guest sent; raises Nonsense when it sends far ahead of the answers."""
        if len(self._asked) + len(data) > _MAX_ASKED_BYTES:
            raise Nonsense("too much at once")
        self._asked.feed(data)

    def refusal(self) -> bytes | None:
        """Begin the next request; return the answer when it is refused. Raises Nonsense."""
        if self._waiting:
            return None
        message = self._asked.next_message()
        if message is None:
            return None
        if not is_allowed(message):
            return message_of(_FAILURE)
        self._unsent += message
        self._waiting = True
        return None

    def write_some(self) -> None:
        with contextlib.suppress(BlockingIOError):
            del self._unsent[: self.sock.send(self._unsent)]

    def read_some(self) -> bytes | None:
        """Return the answer when it has come in whole. Raises OSError, Nonsense."""
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return None
        if not data:
            raise ConnectionResetError("the ssh-agent hung up")
        self._answers.feed(data)
        answer = self._answers.next_message()
        if answer is None:
            return None
        if not self._waiting or len(self._answers):
            raise Nonsense("an answer that nobody asked for")
        self._waiting = False
        if self._binding:
            self._binding = False
            return None
        return answer


class ForwardedAgent:
    """The user's ssh-agent in a guest, for as long as the context.

    `guest_path` is its socket there. A thread serves it until the context ends, or this process, or
    the VM; `error` says why it ended early.
    """

    def __init__(self, endpoint: Endpoint, *, user: str, agent_path: str) -> None:
        self._agent_path = agent_path
        self.error: BangerError | None = None
        self._stream = open_stream(endpoint, timeout_s=OPEN_TIMEOUT_S)
        try:
            self.guest_path = _begin(self._stream, user)
            self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except BaseException:
            self._stream.close()
            raise
        self._thread = threading.Thread(target=self._run, name="ssh-agent", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the forwarding: the guest's socket goes, its connections end. Bounded; idempotent."""
        if self._wake_write < 0:
            return
        os.close(self._wake_write)
        self._wake_write = -1
        self._thread.join(_JOIN_TIMEOUT_S)
        if not self._thread.is_alive():
            os.close(self._wake_read)

    def _run(self) -> None:
        server = _Server(self._stream, self._agent_path, self._wake_read)
        try:
            server.serve()
            # BYE asks the agent to give the request up; behind half a frame it would be none.
            self._stream.finished = server.has_sent_all()
        except BangerError as error:
            self.error = error
        finally:
            server.close()
            self._stream.close()


def _begin(stream: Stream, user: str) -> bytes:
    stream.send_request("ssh_agent", {"user": user})
    try:
        payload = expect(stream, frames.STARTED, timeout_s=_ANSWER_TIMEOUT_S)
    except Unavailable as error:
        if error.code == "agent_unsupported":
            raise Unavailable(
                "the VM's agent is of a banger before --forward-agent",
                hint="restart the VM: `banger vm restart NAME`",
                code=error.code,
            ) from error
        raise
    path = frames.decode_object(payload).get("path")
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path or len(path) > 4096:
        raise frames.ProtocolError("the agent sent no path of its socket")
    return os.fsencode(path)


class _Server:
    """The poll loop between one stream and the connections to the ssh-agent."""

    def __init__(self, stream: Stream, agent_path: str, wake_fd: int) -> None:
        self._stream = stream
        self._agent_path = agent_path
        self._wake_fd = wake_fd
        self._binding = bind_elsewhere()
        self._channels: dict[int, _Channel] = {}
        self._last = 0
        self._sending = bytearray()

    def close(self) -> None:
        for channel in self._channels.values():
            channel.sock.close()
        self._channels.clear()

    def serve(self) -> None:
        """Serve until the wake descriptor closes. Raises Unavailable, ProtocolError."""
        while True:
            self._take_frames()
            for number in list(self._channels):
                self._refuse(number)
            if self._step():
                return

    def has_sent_all(self) -> bool:
        """Tell whether the stream stands between two frames."""
        return not self._sending

    def _full(self) -> bool:
        return len(self._sending) > _MAX_SENDING_BYTES

    def _step(self) -> bool:
        """Wait for whatever comes next; True when it is the end."""
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        events = 0 if self._full() else select.POLLIN
        if self._sending:
            events |= select.POLLOUT
        poll.register(self._stream.fileno(), events)
        numbers: dict[int, int] = {}
        for number, channel in self._channels.items():
            events = channel.events(reading=not self._full())
            if events:
                poll.register(channel.sock.fileno(), events)
                numbers[channel.sock.fileno()] = number
        ready = dict(poll.poll())
        if self._wake_fd in ready:
            return True
        if self._stream.fileno() in ready:
            if self._sending:
                sent = self._stream.send_some(memoryview(self._sending))
                del self._sending[:sent]
            if not self._full():
                self._stream.receive_ready()
        for fd, number in numbers.items():
            if fd in ready:
                self._carry(number, ready[fd])
        return False

    # -- from the guest

    def _take_frames(self) -> None:
        while not self._full():
            frame = self._stream.buffered_frame()
            if frame is None:
                return
            kind, payload = frame
            if kind == frames.ERROR:
                raise agent_error(payload)
            if kind != frames.DATA or len(payload) < _LENGTH.size:
                raise frames.ProtocolError(f"the agent sent frame 0x{kind:02x} of an ssh-agent")
            self._take(_LENGTH.unpack_from(payload)[0], payload[_LENGTH.size :])

    def _take(self, number: int, data: bytes) -> None:
        if number not in self._channels and number > self._last:
            self._last = number
            if data:
                self._open(number)
        channel = self._channels.get(number)
        if channel is None:
            return  # closed meanwhile
        if not data:
            self._drop(number)
            return
        try:
            channel.ask(data)
        except Nonsense:
            self._cut(number)

    def _open(self, number: int) -> None:
        try:
            if len(self._channels) >= MAX_CHANNELS:
                raise OSError("too many channels")
            sock = connect_unix(self._agent_path)
        except OSError:
            self._send(number)
        else:
            self._channels[number] = _Channel(sock, self._binding)

    def _refuse(self, number: int) -> None:
        """Answer in the ssh-agent's place what it is not asked."""
        try:
            while not self._full() and (answer := self._channels[number].refusal()) is not None:
                self._send(number, answer)
        except Nonsense:
            self._cut(number)

    # -- from the ssh-agent

    def _carry(self, number: int, events: int) -> None:
        channel = self._channels[number]
        try:
            if events & select.POLLOUT:
                channel.write_some()
            if events & ~select.POLLOUT:
                answer = channel.read_some()
                if answer is not None:
                    self._send(number, answer)
        except (OSError, Nonsense):
            self._cut(number)

    # -- to the guest

    def _send(self, number: int, data: bytes = b"") -> None:
        """Queue bytes of a channel; none of them means that it is closed."""
        head = _LENGTH.pack(number)
        size = frames.MAX_PAYLOAD - len(head)
        for at in range(0, max(1, len(data)), size):
            self._sending += frames.encode(frames.DATA, head + data[at : at + size])

    def _drop(self, number: int) -> None:
        self._channels.pop(number).sock.close()

    def _cut(self, number: int) -> None:
        self._drop(number)
        self._send(number)
