"""Published ports: their notation, and the carrier as a process between real sockets."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.errors import Conflict, InvalidInput
from banger.network import publish
from banger.network.publish import Forward, check_free, parse_publish, parse_publishes

WAIT_S = 30.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8080:80", Forward("127.0.0.1", 8080, 80)),
        ("1:65535", Forward("127.0.0.1", 1, 65535)),
        ("0.0.0.0:8080:80", Forward("0.0.0.0", 8080, 80)),
        ("192.168.1.2:65535:1", Forward("192.168.1.2", 65535, 1)),
        ("00080:080", Forward("127.0.0.1", 80, 80)),
    ],
)
def test_a_forward_is_read(text: str, expected: Forward) -> None:
    assert parse_publish(text) == expected
    assert parse_publish(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "::", ":::", "80", "80:", ":80", "1:2:3:4", "127.0.0.1:80", "127.0.0.1:80:"),
        *(
            "0:80",
            "80:0",
            "65536:80",
            "80:65536",
            "-1:80",
            "+1:80",
            "80:80/tcp",
            "80:80 ",
            " 80:80",
        ),
        *("8 0:80", "8_0:80", "0x50:80", "8e1:80", "８０:80", "²:80", "1" * 5000 + ":80"),
        *("000001999999:80", "80:0000065536"),  # what stands behind the sixth digit counts too
        *("localhost:8080:80", "[::1]:8080:80", "::1:8080:80", "256.0.0.1:1:1", "1.2.3:1:1"),
        *("01.2.3.4:1:1", "*:1:1", "1.2.3.4/24:1:1", "80:80\n", "80\0:80", "\ud800:80:80"),
    ],
)
def test_what_is_no_forward_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_publish(text)
    assert caught.value.hint
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith("--publish ")


@given(st.text(alphabet="0123456789.:", max_size=40))
def test_whatever_is_read_can_be_listened_on(text: str) -> None:
    try:
        forward = parse_publish(text)
    except InvalidInput:
        return
    assert 1 <= forward.host_port <= 65535
    assert 1 <= forward.guest_port <= 65535
    socket.inet_aton(forward.host)


def test_one_port_of_the_host_leads_to_one_place() -> None:
    assert len(parse_publishes(["80:80", "81:80"])) == 2
    assert parse_publishes([]) == ()
    for other in ("80:81", "80:80", "0.0.0.0:80:22"):
        with pytest.raises(InvalidInput, match="port 80 of the host is asked for twice"):
            parse_publishes(["80:80", other])


# --- is it free


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that something listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_a_taken_port_is_a_conflict_that_names_another(taken: int) -> None:
    with pytest.raises(Conflict) as caught:
        check_free([Forward("127.0.0.1", _free_port(), 80), Forward("127.0.0.1", taken, 80)])
    assert caught.value.code == "port_taken"
    assert caught.value.message == (
        f"port 127.0.0.1:{taken} cannot be published: something listens there already"
    )
    other = re.search(r"--publish (\d+):80", caught.value.hint)
    assert other is not None
    assert parse_publish(f"{other[1]}:80").host_port != taken


def test_a_free_port_is_free_again_afterwards() -> None:
    forward = Forward("127.0.0.1", _free_port(), 80)
    check_free([forward])
    check_free([forward])


def test_a_connection_that_is_closing_keeps_no_port(taken: int) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    client = socket.create_connection(("127.0.0.1", port))
    accepted = server.accept()[0]
    accepted.close()  # first, so that the server's side is the one in TIME_WAIT
    client.close()
    server.close()
    check_free([Forward("127.0.0.1", port, 80)])


def test_an_address_of_another_host_is_a_conflict() -> None:
    # 192.0.2.0/24 is nobody's (RFC 5737).
    with pytest.raises(Conflict, match="this host does not have that address"):
        check_free([Forward("192.0.2.1", _free_port(), 80)])


def test_a_port_of_roots_is_refused_to_others() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if lowest < 2:
        pytest.skip("every port is anybody's here")
    program = (
        "import os, sys\n"
        "from banger.network.publish import Forward, check_free\n"
        "if os.geteuid() == 0:\n"
        "    os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "check_free([Forward('127.0.0.1', int(sys.argv[1]), 80)])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(lowest - 1)],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert f"127.0.0.1:{lowest - 1} cannot be published: ports below 1024 are root's" in done.stderr


# --- the carrier


class Carrier:
    """The carrier as the daemon starts it, for a VM that is a sleeping process."""

    def __init__(self, *forwards: Forward, guest: str = "127.0.0.1", limit: int = 0) -> None:
        self.vmm = subprocess.Popen(["sleep", "600"])
        self.process = _start(
            *("--mark", "banger-vm-test", "--pid", str(self.vmm.pid), "--guest", guest),
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
        [sys.executable, "-I", "-m", "banger.network.publish", *words],
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
    threads: list[threading.Thread] = []

    def run(connection: socket.socket) -> None:
        connection.settimeout(WAIT_S)
        with connection, contextlib.suppress(OSError):
            talk(connection)

    def accept() -> None:
        while True:
            try:
                connection = server.accept()[0]
            except OSError:
                return
            threads.append(threading.Thread(target=run, args=(connection,), daemon=True))
            threads[-1].start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield server.getsockname()[1]
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()
        accepting.join(WAIT_S)
        assert not accepting.is_alive()


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
    port = _free_port()
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
    port = _free_port()
    with Carrier(Forward("127.0.0.1", port, _free_port())):
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


def test_more_than_the_bound_are_closed_at_once_and_the_others_go_on() -> None:
    with carried(_echo, limit=1024) as port:
        clients = [_connect(port) for _ in range(publish._CONNECTIONS)]
        for client in clients:
            client.sendall(b"1")
            assert client.recv(1) == b"1"
        with _connect(port) as one_more:
            assert one_more.recv(1) == b""
        clients[0].sendall(b"2")
        assert clients[0].recv(1) == b"2"
        clients.pop().close()
        for _ in range(1000):  # until its end has come through
            with _connect(port) as again, contextlib.suppress(ConnectionError):
                again.sendall(b"3")
                if again.recv(1) == b"3":
                    break
        else:
            pytest.fail("room that was made is not given")
        for client in clients:
            client.close()


def test_two_forwards_lead_to_two_ports() -> None:
    one, two = _free_port(), _free_port()
    with guest(lambda c: c.sendall(b"one")) as first, guest(lambda c: c.sendall(b"two")) as second:
        with Carrier(Forward("127.0.0.1", one, first), Forward("127.0.0.1", two, second)):
            with _connect(one) as client:
                assert _read_all(client) == b"one"
            with _connect(two) as client:
                assert _read_all(client) == b"two"


def test_it_ends_when_the_vmm_ends_with_connections_open() -> None:
    port = _free_port()
    with guest(_echo) as inside, Carrier(Forward("127.0.0.1", port, inside)) as carrier:
        with _connect(port) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            carrier.vmm.kill()
            assert carrier.process.wait(WAIT_S) == 0
            assert carrier.process.stderr is not None
            assert carrier.process.stderr.read() == b""
            assert client.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            _connect(port)


def test_a_pipe_nobody_reads_stops_nothing() -> None:
    """The daemon keeps stderr and does not read it."""
    port = _free_port()
    with guest(_echo) as inside, Carrier(Forward("127.0.0.1", port, inside), limit=32) as carrier:
        clients = []
        for _ in range(100):  # more than it has descriptors for
            clients.append(_connect(port))
        stderr = carrier.process.stderr
        assert stderr is not None
        assert not select.select([stderr], [], [], 2.0)[0], os.read(stderr.fileno(), 500)
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
    words = ["--mark", "m", "--pid", pid, "--guest", "127.0.0.1", f"127.0.0.1:{taken}:80"]
    status, out, err = _end(*words)
    assert (status, out) == (1, "")
    assert err.startswith("banger-publish: ")
    assert "address already in use" in err.lower()
    assert err.count("\n") == 1


def test_a_vmm_that_is_gone_already_ends_it_with_a_line() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    words = ["--mark", "m", "--pid", str(gone.pid), "--guest", "127.0.0.1"]
    assert _end(*words, f"{_free_port()}:80") == (1, "", "banger-publish: No such process\n")


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
    status, out, err = _end("--mark", "m", "--pid", pid, "--guest", guest_address, forward)
    if forward == "--help":
        assert (status, err) == (0, "")
        return
    assert status in (1, 2)
    assert out == ""
    assert "Traceback" not in err
    assert err.strip()


def test_a_terminated_one_lets_its_port_go() -> None:
    port = _free_port()
    with Carrier(Forward("127.0.0.1", port, 1)) as carrier:
        carrier.process.send_signal(signal.SIGTERM)
        carrier.process.wait(WAIT_S)
        check_free([Forward("127.0.0.1", port, 1)])
