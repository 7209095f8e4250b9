from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.errors import Cancelled, TimedOut, Unavailable
from banger.guest import frames, transport
from banger.guest.transport import (
    HybridVsock,
    UnixListener,
    VirtioSerial,
    endpoint_from_wire,
    endpoint_to_wire,
    open_stream,
    socket_path,
    try_lease,
    wait_for_hello,
)


@pytest.fixture
def short() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="bgt") as directory:
        yield directory


@pytest.mark.parametrize("endpoint", [VirtioSerial("/d", 3), HybridVsock("/s"), UnixListener("/u")])
def test_endpoints_pass_the_wire(endpoint: transport.Endpoint) -> None:
    assert endpoint_from_wire(endpoint_to_wire(endpoint)) == endpoint


@pytest.mark.parametrize(
    "value",
    [{}, {"kind": "x"}, {"kind": "vsock"}, {"kind": "virtio-serial", "directory": 1, "ports": 2}],
)
def test_what_is_no_endpoint_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not an endpoint"):
        endpoint_from_wire(value)


def test_lease_is_exclusive_and_dies_with_its_holder(short: str) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from banger.guest.transport import try_lease\n"
        "lease = try_lease(sys.argv[2], 0); lease.mark(b'D'); print(flush=True); sys.stdin.read()\n"
    )
    source = str(Path(transport.__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", program, source, short],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert try_lease(short, 0) is None
        holder.kill()
    lease = try_lease(short, 0)
    assert lease is not None
    assert not lease.clean()
    lease.mark(b"C")
    assert lease.clean()
    lease.release()
    lease.release()


def test_new_port_is_clean(short: str) -> None:
    lease = try_lease(short, 7)
    assert lease is not None
    assert lease.clean()
    lease.release()


@pytest.mark.parametrize("kind", [VirtioSerial, HybridVsock, UnixListener])
def test_vm_that_does_not_run_is_unavailable(short: str, kind: type) -> None:
    endpoint = kind(short + "/none", 2) if kind is VirtioSerial else kind(short + "/none")
    with pytest.raises(Unavailable) as caught:
        open_stream(endpoint, timeout_s=1)
    assert caught.value.code == "agent_unreachable"


class FakeVmm:
    """A listening socket that answers a script: what it expects and what it sends."""

    def __init__(self, path: str, script: list[bytes | int], *, hold: bool = False) -> None:
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(path)
        self.server.listen()
        self.script = script
        self.hold = hold
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        connection = self.server.accept()[0]
        with connection:
            for step in self.script:
                if isinstance(step, int):
                    connection.recv(step)
                else:
                    connection.sendall(step)
            if self.hold:
                while connection.recv(65536):
                    pass
            else:
                # What is unread would turn the close into a reset and take the bytes sent with it.
                connection.settimeout(0.2)
                try:
                    while connection.recv(65536):
                        pass
                except OSError:
                    pass
        self.server.close()


def test_vsock_handshake_leaves_the_streams_bytes_alone(
    short: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nonce = bytes(16)
    monkeypatch.setattr(os, "urandom", lambda count: nonce[:count])
    body = frames.MAGIC + b'{"version":1,"nonce":"' + nonce.hex().encode() + b'"}'
    hello = frames.encode(frames.HELLO_OK, body)
    FakeVmm(short + "/v", [64, b"OK 42\n" + hello + frames.encode(frames.END, b"{}")])
    stream = open_stream(HybridVsock(short + "/v"), timeout_s=5)
    assert stream.receive(timeout_s=2) == (frames.END, b"{}")
    stream.finished = False
    stream.close()


@pytest.mark.parametrize("answer", [b"", b"FAIL\n", b"O" * 100])
def test_vsock_refusal_is_unavailable(short: str, answer: bytes) -> None:
    FakeVmm(short + "/v", [64, answer])
    with pytest.raises(Unavailable):
        open_stream(HybridVsock(short + "/v"), timeout_s=5)


def test_silence_times_out(short: str) -> None:
    FakeVmm(short + "/v", [64, b"OK 1\n"], hold=True)
    with pytest.raises(TimedOut):
        open_stream(HybridVsock(short + "/v"), timeout_s=0.3)


def test_other_protocol_version_says_so(short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", bytes)
    body = frames.MAGIC + b'{"version":2,"nonce":"' + b"0" * 32 + b'"}'
    FakeVmm(short + "/u", [1024, frames.encode(frames.HELLO_OK, body)])
    with pytest.raises(Unavailable) as caught:
        open_stream(UnixListener(short + "/u"), timeout_s=2)
    assert caught.value.code == "agent_version"


# --- a VMM that its guest took over, in the directory of its sockets


@pytest.fixture
def others(short: str) -> Iterator[socket.socket]:
    """Another program's socket, which the VMM itself may not connect to."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(short + "/other")
        server.listen()
        server.setblocking(False)
        yield server


def _nobody_came(server: socket.socket) -> bool:
    try:
        server.accept()[0].close()
    except BlockingIOError:
        return True
    return False


def _put_in_place(short: str, kind: str) -> str:
    path = short + "/v.sock"
    if kind == "link":
        os.symlink(short + "/other", path)
    elif kind == "relative-link":
        os.symlink("other", path)
    elif kind == "link-to-nothing":
        os.symlink(short + "/nothing", path)
    elif kind == "file":
        Path(path).write_text("OK 52\n")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        os.mkdir(path)
    elif kind == "device":
        path = "/dev/null"
    return path


NO_SOCKETS = [
    *("link", "relative-link", "link-to-nothing", "file", "fifo", "directory", "device", "nothing")
]


@pytest.mark.parametrize("kind", NO_SOCKETS)
def test_what_is_no_socket_of_the_vmms_own_is_not_connected_to(
    short: str, others: socket.socket, kind: str
) -> None:
    path = _put_in_place(short, kind)
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError):
        with socket_path(path):
            pass
    with pytest.raises(Unavailable):
        open_stream(HybridVsock(path), timeout_s=2)
    with pytest.raises((TimedOut, Cancelled)):
        wait_for_hello(HybridVsock(path), timeout_s=0.2, cancelled=lambda: False)
    assert _nobody_came(others)
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_socket_that_is_replaced_meanwhile_is_still_the_one_that_was_looked_at(
    short: str, others: socket.socket
) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(short + "/v.sock")
        server.listen()
        server.settimeout(10)
        with socket_path(short + "/v.sock") as path:
            os.unlink(short + "/v.sock")
            os.symlink(short + "/other", short + "/v.sock")
            with transport.connect_unix(path):
                server.accept()[0].close()
    assert _nobody_came(others)


def test_a_socket_behind_a_path_of_any_length_is_reached(short: str) -> None:
    deep = Path(short, *["d" * 50] * 4)
    deep.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(deep, os.O_PATH)
        server.bind(f"/proc/self/fd/{here}/v.sock")
        os.close(here)
        server.listen()
        with socket_path(str(deep / "v.sock")) as path, transport.connect_unix(path):
            server.accept()[0].close()
