"""The carrier of published ports, as a process between real sockets and the real agent."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest

from banger.guest import carrier
from banger.guest.boot import agent_binary
from banger.network.publish import Forward, check_free
from tests.support.listeners import served
from tests.support.ports import free_port

WAIT_S = 30.0


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that something listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


class Carrier:
    """The carrier as the daemon starts it, for a VM that is a sleeping process."""

    def __init__(
        self,
        *forwards: Forward,
        to: tuple[str, str] = ("--address", "127.0.0.1"),
        limit: int = 0,
    ) -> None:
        self.vmm = subprocess.Popen(["sleep", "600"])
        self.process = _start(
            *("--mark", "banger-vm-test", "--pid", str(self.vmm.pid), *to),
            *(str(forward) for forward in forwards),
            limit=limit,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self.vmm, self.process):
            process.kill()
            process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


def _start(*words: str, limit: int = 0) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-I", "-m", "banger.guest.carrier", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if limit:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, limit))
    return process


@contextlib.contextmanager
def guest(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server in the guest's place; each connection is `talk`'s in a thread."""
    server = socket.create_server(("127.0.0.1", 0), backlog=512)
    port = server.getsockname()[1]
    with served(server, talk):
        yield port


def _echo(connection: socket.socket) -> None:
    while data := connection.recv(65536):
        connection.sendall(data)


def _echo_at_the_end(connection: socket.socket) -> None:
    """Answer only when the other side has said all: without half close nothing comes."""
    connection.sendall(_read_all(connection)[::-1])


def _read_all(connection: socket.socket) -> bytes:
    data = b""
    while chunk := connection.recv(65536):
        data += chunk
    return data


def _read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (chunk := connection.recv(count - len(data))):
        data += chunk
    return data


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)


@contextlib.contextmanager
def carried(talk: Callable[[socket.socket], None], *, limit: int = 0) -> Iterator[int]:
    """A port of the host that leads to a guest that talks so."""
    port = free_port()
    with guest(talk) as inside, Carrier(Forward("127.0.0.1", port, inside), limit=limit):
        yield port


def test_bytes_go_both_ways() -> None:
    with carried(_echo) as port, _connect(port) as client:
        for data in (b"hello", b"\0" * 1000, bytes(range(256))):
            client.sendall(data)
            assert _read(client, len(data)) == data


def test_half_a_close_is_passed_on_and_the_answer_still_comes() -> None:
    with carried(_echo_at_the_end) as port, _connect(port) as client:
        data = os.urandom(1 << 20)
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        assert _read_all(client) == data[::-1]


def test_a_guest_that_closes_first_still_hears_the_rest() -> None:
    heard: list[bytes] = []
    done = threading.Event()

    def hang_up_and_listen(connection: socket.socket) -> None:
        connection.shutdown(socket.SHUT_WR)
        heard.append(_read_all(connection))
        done.set()

    with carried(hang_up_and_listen) as port, _connect(port) as client:
        assert client.recv(1) == b""
        client.sendall(b"late")
        client.shutdown(socket.SHUT_WR)
        assert done.wait(WAIT_S)
    assert heard == [b"late"]


def test_twenty_connections_at_once_do_not_mix() -> None:
    with carried(_echo) as port:
        clients = [_connect(port) for _ in range(20)]
        words = [f"client {number};".encode() * 10_000 for number in range(20)]
        for client, data in zip(clients, words, strict=True):
            threading.Thread(target=client.sendall, args=(data,), daemon=True).start()
        got = [_read(client, len(data)) for client, data in zip(clients, words)]
        for client in clients:
            client.close()
    assert got == words


def test_a_reader_that_does_not_read_holds_up_nobody_else() -> None:
    def flood(connection: socket.socket) -> None:
        if connection.recv(1) == b"f":
            while True:
                connection.sendall(b"x" * 65536)
        connection.sendall(b"quick")

    with carried(flood) as port, _connect(port) as lazy, _connect(port) as other:
        lazy.sendall(b"f")
        lazy.recv(1)
        other.sendall(b"q")
        assert _read(other, 5) == b"quick"


def test_a_guest_where_nobody_listens_closes_the_connection() -> None:
    port = free_port()
    with Carrier(Forward("127.0.0.1", port, free_port())):
        for _ in range(2):  # and goes on
            with _connect(port) as client:
                assert client.recv(1) == b""


def test_one_that_breaks_off_takes_both_sides_along() -> None:
    ended = threading.Event()

    def listen(connection: socket.socket) -> None:
        try:
            _read_all(connection)
        finally:
            ended.set()

    with carried(listen) as port:
        client = _connect(port)
        client.sendall(b"x")
        # A reset, not an end.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        assert ended.wait(WAIT_S)


def test_more_than_the_bound_wait_until_there_is_room() -> None:
    with carried(_echo) as port:
        clients = [_connect(port) for _ in range(carrier._CONNECTIONS)]
        for client in clients:
            client.sendall(b"1")
            assert client.recv(1) == b"1"
        with _connect(port) as one_more:
            one_more.sendall(b"2")
            one_more.settimeout(0.5)
            with pytest.raises(TimeoutError):
                one_more.recv(1)
            clients.pop().close()
            one_more.settimeout(WAIT_S)
            assert one_more.recv(1) == b"2"
        for client in clients:
            client.close()


def test_two_forwards_lead_to_two_ports() -> None:
    one, two = free_port(), free_port()
    with guest(lambda c: c.sendall(b"one")) as first, guest(lambda c: c.sendall(b"two")) as second:
        with Carrier(Forward("127.0.0.1", one, first), Forward("127.0.0.1", two, second)):
            with _connect(one) as client:
                assert _read_all(client) == b"one"
            with _connect(two) as client:
                assert _read_all(client) == b"two"


def test_it_ends_when_the_vmm_ends_with_connections_open() -> None:
    port = free_port()
    with guest(_echo) as inside, Carrier(Forward("127.0.0.1", port, inside)) as running:
        with _connect(port) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            running.vmm.kill()
            assert running.process.wait(WAIT_S) == 0
            assert running.process.stderr is not None
            assert running.process.stderr.read() == b""
            assert client.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            _connect(port)


def test_a_pipe_nobody_reads_stops_nothing() -> None:
    """The daemon keeps stderr and does not read it."""
    port = free_port()
    with guest(_echo) as inside, Carrier(Forward("127.0.0.1", port, inside), limit=32) as running:
        clients = []
        for _ in range(100):  # more than it has descriptors for
            clients.append(_connect(port))
        stderr = running.process.stderr
        assert stderr is not None
        said = select.select([stderr], [], [], 2.0)[0]
        assert not said or os.read(stderr.fileno(), 500) == b""
        for client in clients:
            client.close()
        with _connect(port) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"


def _end(*words: str) -> tuple[int, str, str]:
    process = _start(*words)
    out, err = process.communicate(timeout=WAIT_S)
    return process.returncode, out.decode(), err.decode()


def test_a_taken_port_ends_it_with_a_line(taken: int) -> None:
    pid = str(os.getpid())
    words = ["--mark", "m", "--pid", pid, "--address", "127.0.0.1", f"127.0.0.1:{taken}:80"]
    status, out, err = _end(*words)
    assert (status, out) == (1, "")
    assert err.startswith("banger-carrier: ")
    assert "address already in use" in err.lower()
    assert err.count("\n") == 1


def test_a_vmm_that_is_gone_already_ends_it_with_a_line() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    words = ["--mark", "m", "--pid", str(gone.pid), "--address", "127.0.0.1"]
    assert _end(*words, f"{free_port()}:80") == (1, "", "banger-carrier: No such process\n")


@pytest.mark.parametrize(
    ("pid", "guest_address", "forward"),
    [
        ("0", "127.0.0.1", "8080:80"),
        ("-1", "127.0.0.1", "8080:80"),
        ("9" * 30, "127.0.0.1", "8080:80"),
        ("1x", "127.0.0.1", "8080:80"),
        ("1", "localhost", "8080:80"),
        ("1", "127.0.0.1;id", "8080:80"),
        ("1", "", "8080:80"),
        ("1", "127.0.0.1", ""),
        ("1", "127.0.0.1", "80"),
        ("1", "127.0.0.1", "000001999999:80"),
        ("1", "127.0.0.1", "--help"),
        ("1", "127.0.0.1", "-x"),
    ],
)
def test_hostile_arguments_end_it_without_a_trace(
    pid: str, guest_address: str, forward: str
) -> None:
    status, out, err = _end("--mark", "m", "--pid", pid, "--address", guest_address, forward)
    if forward == "--help":
        assert (status, err) == (0, "")
        return
    assert status in (1, 2)
    assert out == ""
    assert "Traceback" not in err
    assert err.strip()


def test_a_terminated_one_lets_its_port_go() -> None:
    port = free_port()
    with Carrier(Forward("127.0.0.1", port, 1)) as running:
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(WAIT_S)
        check_free([Forward("127.0.0.1", port, 1)])


# --- through the agent


@pytest.fixture
def agent_ports() -> Iterator[dict[str, object]]:
    """The real agent on Unix sockets, as QEMU's virtio-serial ports are: its host is this one."""
    with tempfile.TemporaryDirectory(prefix="bng-") as directory:
        running = subprocess.Popen([agent_binary(), "serve-unix", directory, "12"])
        try:
            while not Path(directory, "p11").exists():
                assert running.poll() is None
                select.select([], [], [], 0.01)
            yield {"kind": "virtio-serial", "directory": directory, "ports": 12}
        finally:
            running.kill()
            running.wait()


@contextlib.contextmanager
def carried_by_agent(
    endpoint: dict[str, object], talk: Callable[[socket.socket], None]
) -> Iterator[int]:
    """A port of the host that leads through the agent to a guest that talks so."""
    port = free_port()
    to = ("--endpoint", json.dumps(endpoint))
    with guest(talk) as inside, Carrier(Forward("127.0.0.1", port, inside), to=to):
        yield port


def test_the_agent_carries_both_ways_and_passes_the_end_on(agent_ports: dict[str, object]) -> None:
    with carried_by_agent(agent_ports, _echo_at_the_end) as port, _connect(port) as client:
        data = os.urandom(1 << 20)
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        assert _read_all(client) == data[::-1]


def test_a_service_that_speaks_first_is_heard_through_the_agent(
    agent_ports: dict[str, object],
) -> None:
    with carried_by_agent(agent_ports, lambda c: c.sendall(b"SSH-2.0")) as port:
        for _ in range(20):  # each lets its stream go
            with _connect(port) as client:
                assert _read_all(client) == b"SSH-2.0"


def test_twenty_at_once_take_turns_over_the_agents_streams(agent_ports: dict[str, object]) -> None:
    answers: list[bytes] = []

    def ask(port: int) -> None:
        with _connect(port) as client:
            client.sendall(b"hello")
            client.shutdown(socket.SHUT_WR)
            answers.append(_read_all(client))

    with carried_by_agent(agent_ports, _echo) as port:
        threads = [threading.Thread(target=ask, args=(port,)) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
    assert answers == [b"hello"] * 20


def test_a_guest_where_nobody_listens_closes_the_connection_at_once_through_the_agent(
    agent_ports: dict[str, object],
) -> None:
    port = free_port()
    to = ("--endpoint", json.dumps(agent_ports))
    with Carrier(Forward("127.0.0.1", port, free_port()), to=to), _connect(port) as client:
        client.settimeout(8)  # far below what a wait for a listener would be
        assert client.recv(1) == b""


def test_an_agent_that_is_not_there_closes_the_connection() -> None:
    port = free_port()
    nowhere = json.dumps({"kind": "vsock", "path": "/nonexistent/v.sock"})
    with Carrier(Forward("127.0.0.1", port, 80), to=("--endpoint", nowhere)):
        for _ in range(2):
            with _connect(port) as client:
                assert client.recv(1) == b""


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "vsock"}', '{"kind": "x", "path": "y"}'])
def test_a_hostile_endpoint_ends_it_without_a_trace(text: str) -> None:
    status, out, err = _end("--mark", "m", "--pid", "1", "--endpoint", text, "8080:80")
    assert (status, out) == (2, "")
    assert "Traceback" not in err
