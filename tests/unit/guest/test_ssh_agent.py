"""The host's end of a forwarded ssh-agent, against guests and ssh-agents of every kind."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.errors import BangerError, Unavailable
from banger.guest import frames, ssh_agent
from banger.guest.ssh_agent import (
    ForwardedAgent,
    Messages,
    Nonsense,
    count_keys,
    find_agent,
    is_allowed,
    message_of,
)
from banger.guest.transport import UnixListener
from tests.support.listeners import Talk, served

WAIT_S = 20.0
LIST = message_of(11)
KEYS = message_of(12, b"\0\0\0\0")
REFUSED = message_of(5)


def named(name: bytes, rest: bytes = b"") -> bytes:
    return message_of(27, len(name).to_bytes(4, "big") + name + rest)


# -- what a guest may ask


def test_a_guest_may_list_and_sign_and_nothing_else_that_has_a_number() -> None:
    allowed = [kind for kind in range(256) if kind != 27 and is_allowed(message_of(kind, b"x"))]
    assert allowed == [11, 13]


@pytest.mark.parametrize(
    ("message", "allowed"),
    [
        (named(b"session-bind@openssh.com", b"rest"), True),
        (named(b"query"), True),
        (named(b""), False),
        (named(b"restrict-destination-v00@openssh.com"), False),
        (named(b"query\0"), False),
        (named(b"Query"), False),
        (message_of(27), False),
        (message_of(27, b"\0\0\0"), False),
        (message_of(27, b"\xff\xff\xff\xffquery"), True),  # longer than it is: theirs to refuse
    ],
)
def test_of_extensions_only_those_that_make_it_safer(message: bytes, allowed: bool) -> None:
    assert is_allowed(message) is allowed


@given(st.lists(st.binary(min_size=1, max_size=300)), st.integers(1, 50))
def test_messages_come_out_as_they_went_in(bodies: list[bytes], size: int) -> None:
    wanted = [len(body).to_bytes(4, "big") + body for body in bodies]
    data, reader, found = b"".join(wanted), Messages(), []
    for at in range(0, len(data), size):
        reader.feed(data[at : at + size])
        while (message := reader.next_message()) is not None:
            found.append(message)
    assert found == wanted
    assert len(reader) == 0


@pytest.mark.parametrize("length", [0, (256 << 10) + 1, 0xFFFFFFFF])
def test_a_length_that_no_message_has_is_nonsense(length: int) -> None:
    reader = Messages()
    reader.feed(length.to_bytes(4, "big"))
    with pytest.raises(Nonsense):
        reader.next_message()


# -- finding the user's


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bng-") as made:  # short: sun_path is 108 bytes
        yield Path(made)


@contextlib.contextmanager
def listening(path: Path, talk: Talk) -> Iterator[str]:
    """A listener; each connection is `talk`'s in a thread."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen(64)
    with served(server, talk):
        yield str(path)


def read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionResetError("over")
        data += part
    return data


def read_message(connection: socket.socket) -> bytes:
    head = read(connection, 4)
    return head + read(connection, int.from_bytes(head, "big"))


def test_no_variable_is_an_error_with_the_next_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        if value is None:
            monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        else:
            monkeypatch.setenv("SSH_AUTH_SOCK", value)
        with pytest.raises(Unavailable) as raised:
            find_agent()
        assert raised.value.hint == 'start one: `eval "$(ssh-agent)"; ssh-add`'


@pytest.mark.parametrize(
    "answer",
    [b"", b"\0\0\0\0", b"\xff\xff\xff\xff", REFUSED, message_of(12, b"\0"), message_of(6)],
    ids=["hangs up", "empty", "too long", "refuses", "cut off", "something else"],
)
def test_what_does_not_list_its_keys_is_no_ssh_agent(directory: Path, answer: bytes) -> None:
    def talk(connection: socket.socket) -> None:
        read_message(connection)
        connection.sendall(answer)

    with listening(directory / "agent", talk) as path, pytest.raises(Unavailable):
        count_keys(path)


def test_a_silent_ssh_agent_is_told_in_time(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_agent, "_CHECK_TIMEOUT_S", 0.1)
    over = threading.Event()
    with listening(directory / "agent", lambda _: over.wait(WAIT_S)) as path:
        with pytest.raises(Unavailable, match="does not answer"):
            count_keys(path)
        over.set()
    with pytest.raises(Unavailable, match="does not answer"):
        count_keys(str(directory / ("long" * 50)))


# -- the channels


class Guest:
    """The other end of the stream, which says what it likes."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def frame(self) -> tuple[int, bytes]:
        head = read(self.connection, frames.HEADER_BYTES)
        return head[0], read(self.connection, int.from_bytes(head[1:], "big"))

    def send(self, number: int, data: bytes = b"") -> None:
        payload = number.to_bytes(4, "big") + data
        self.connection.sendall(frames.encode(frames.DATA, payload))

    def receive(self) -> tuple[int, bytes]:
        kind, payload = self.frame()
        assert kind == frames.DATA
        return int.from_bytes(payload[:4], "big"), payload[4:]


class User:
    """A user with an ssh-agent that writes down what it is asked."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.connections: list[list[bytes]] = []
        self.answer = KEYS
        self.served_by: Talk = self.talk

    def talk(self, connection: socket.socket) -> None:
        asked: list[bytes] = []
        self.connections.append(asked)
        while True:
            asked.append(read_message(connection))
            connection.sendall(REFUSED if asked[-1][4] == 27 else self.answer)

    @contextlib.contextmanager
    def forwarding(
        self, talk: Callable[[Guest], None], started: object = None
    ) -> Iterator[ForwardedAgent]:
        """Forward to a guest that is `talk`; what fails there fails the test."""
        failed: list[BaseException] = []
        over = threading.Event()

        def guest(connection: socket.socket) -> None:
            side = Guest(connection)
            hello = json.loads(side.frame()[1][len(frames.MAGIC) :])
            body = json.dumps({"version": 1, "nonce": hello["nonce"]}).encode()
            connection.sendall(frames.encode(frames.HELLO_OK, frames.MAGIC + body))
            assert json.loads(side.frame()[1]) == {"kind": "ssh_agent", "user": "me"}
            answer = {"path": "/run/x/agent"} if started is None else started
            connection.sendall(frames.encode_json(frames.STARTED, answer))
            try:
                talk(side)
            except BaseException as error:
                failed.append(error)
            finally:
                over.set()
            with contextlib.suppress(OSError):
                while side.frame()[0] != frames.BYE:
                    pass
                connection.sendall(frames.encode(frames.BYE_OK))

        with (
            listening(self.directory / "ssh-agent", self.served_by) as path,
            listening(self.directory / "guest", guest) as endpoint,
            ForwardedAgent(UnixListener(endpoint), user="me", agent_path=path) as forwarded,
        ):
            yield forwarded
            assert over.wait(WAIT_S)
        if failed:
            raise failed[0]


@pytest.fixture
def user(directory: Path) -> User:
    return User(directory)


def test_every_channel_is_a_connection_that_is_told_where_it_comes_from(user: User) -> None:
    def talk(guest: Guest) -> None:
        for number in (1, 2):
            guest.send(number, LIST[:3])
            guest.send(number, LIST[3:])
            assert guest.receive() == (number, KEYS)

    with user.forwarding(talk) as forwarded:
        assert forwarded.guest_path == b"/run/x/agent"
    assert forwarded.error is None
    assert len(user.connections) == 2
    for bind, asked in user.connections:
        assert asked == LIST
        assert bind.startswith(named(b"session-bind@openssh.com")[4:33], 4)
        assert bind.endswith(b"\x01")  # forwarded


def test_what_is_refused_never_reaches_the_ssh_agent(user: User) -> None:
    refused = [message_of(kind) for kind in range(256) if not is_allowed(message_of(kind))]

    def talk(guest: Guest) -> None:
        guest.send(1, b"".join(refused))
        answers = b""
        while len(answers) < len(REFUSED) * len(refused):
            answers += guest.receive()[1]
        assert answers == REFUSED * len(refused)

    with user.forwarding(talk):
        pass
    assert [len(asked) for asked in user.connections] == [1]


def test_an_answer_longer_than_a_frame_arrives_whole(user: User) -> None:
    user.answer = message_of(12, os.urandom((256 << 10) - 1))

    def talk(guest: Guest) -> None:
        guest.send(1, LIST)
        answer = b""
        while len(answer) < len(user.answer):
            answer += guest.receive()[1]
        assert answer == user.answer

    with user.forwarding(talk):
        pass


def test_more_channels_than_there_may_be_are_closed(user: User) -> None:
    def talk(guest: Guest) -> None:
        for number in range(1, ssh_agent.MAX_CHANNELS + 1):
            guest.send(number, LIST)
            assert guest.receive() == (number, KEYS)
        guest.send(100, LIST)
        assert guest.receive() == (100, b"")
        guest.send(1)
        guest.send(1, LIST)  # never opened again
        guest.send(101, LIST)
        assert guest.receive() == (101, KEYS)

    with user.forwarding(talk):
        pass
    assert len(user.connections) == ssh_agent.MAX_CHANNELS + 1


def test_a_guest_that_asks_far_ahead_loses_its_channel(user: User) -> None:
    hold = threading.Event()
    user.served_by = lambda _: hold.wait(WAIT_S)

    def talk(guest: Guest) -> None:
        for _ in range(20):
            guest.send(1, b"\0\0\0\1\x0b" * 12000)
        assert guest.receive() == (1, b"")

    with user.forwarding(talk):
        pass
    hold.set()


def test_a_guest_that_does_not_read_costs_bounded_memory(user: User) -> None:
    def talk(guest: Guest) -> None:
        guest.connection.settimeout(0.5)
        sent = 0
        with contextlib.suppress(TimeoutError):
            for number in range(1, 2000):  # each refusal is longer than what it refuses
                guest.send(number, b"\0\0\0\1\x13" * 12000)
                sent += 60000
        assert sent < 20 << 20  # then nothing more was taken
        guest.connection.settimeout(WAIT_S)

    with user.forwarding(talk):
        pass


@pytest.mark.parametrize(
    "data",
    [
        frames.encode(frames.DATA, b"\0\0\0"),
        frames.encode(frames.STDOUT, b"x"),
        frames.encode(frames.END, b"{}"),
        frames.encode_json(frames.ERROR, {"code": "io", "message": "no more"}),
        b"\xff" * 32,
        None,
    ],
    ids=["no channel", "stdout", "end", "error", "no frame", "hang-up"],
)
def test_a_broken_stream_ends_the_forwarding_and_says_so(user: User, data: bytes | None) -> None:
    def talk(guest: Guest) -> None:
        if data is None:
            guest.connection.shutdown(socket.SHUT_RDWR)
        else:
            guest.connection.sendall(data)

    with user.forwarding(talk) as forwarded:
        deadline = time.monotonic() + WAIT_S
        while forwarded.error is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert isinstance(forwarded.error, BangerError)


@pytest.mark.parametrize("started", [{}, {"path": 1}, {"path": "x"}, {"path": "/\0"}, []])
def test_a_path_that_is_none_is_an_error(user: User, started: object) -> None:
    with (
        pytest.raises(frames.ProtocolError),
        user.forwarding(lambda _: None, started),
    ):
        pass


def test_an_ssh_agent_that_talks_unasked_is_cut_off(user: User) -> None:
    user.answer = KEYS + KEYS

    def talk(guest: Guest) -> None:
        guest.send(1, LIST)
        assert guest.receive() == (1, b"")

    with user.forwarding(talk):
        pass
