"""Ways to the guest agent: endpoints, leases of virtio-serial ports, and streams.

Owns connecting, HELLO, BYE and the lock files beside the ports (agent/PROTOCOL.md, "Leases").
Leaves what a request says to `guest.agent`. No daemon takes part: a stream is between the client
and the VMM's socket.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

from banger.errors import BangerError, Cancelled, TimedOut, Unavailable
from banger.guest import frames

# The agent answers HELLO within a few ms; a busy host under emulation has taken 0.3 s.
_HELLO_TIMEOUT_S = 1.0
# The guest must see a hang-up as one; it is woken by an interrupt, so ms would do on an idle host.
_HANG_UP_PAUSE_S = 0.15
_POLL_S = 0.02
_BYE_TIMEOUT_S = 2.0
_READ_BYTES = 256 << 10


class VirtioSerial(NamedTuple):
    """A pool of ports: sockets DIR/pNN and their leases DIR/pNN.lock."""

    directory: str
    ports: int


class HybridVsock(NamedTuple):
    """Firecracker's Unix socket onto the guest's AF_VSOCK."""

    path: str
    port: int = 1024


class UnixListener(NamedTuple):
    """A listening Unix socket, for tests."""

    path: str


Endpoint = VirtioSerial | HybridVsock | UnixListener


def endpoint_from_wire(value: dict[str, object]) -> Endpoint:
    """Parse an endpoint of the API; raises ValueError."""
    match value:
        case {"kind": "virtio-serial", "directory": str(directory), "ports": int(ports)}:
            return VirtioSerial(directory, ports)
        case {"kind": "vsock", "path": str(path)}:
            port = value.get("port", 1024)
            if isinstance(port, int):
                return HybridVsock(path, port)
        case {"kind": "unix", "path": str(path)}:
            return UnixListener(path)
    raise ValueError(f"not an endpoint: {value!r}")


def endpoint_to_wire(endpoint: Endpoint) -> dict[str, object]:
    """Return an endpoint as the API says it."""
    if isinstance(endpoint, VirtioSerial):
        return {
            "kind": "virtio-serial",
            "directory": endpoint.directory,
            "ports": endpoint.ports,
        }
    if isinstance(endpoint, HybridVsock):
        return {"kind": "vsock", "path": endpoint.path, "port": endpoint.port}
    return {"kind": "unix", "path": endpoint.path}


class Lease:
    """A locked port. The kernel drops the lock with this process, however it ends."""

    __slots__ = ("fd", "number")

    def __init__(self, fd: int, number: int) -> None:
        self.fd = fd
        self.number = number

    def clean(self) -> bool:
        """Tell whether the last stream ended with BYE_OK (or there was none)."""
        return os.pread(self.fd, 1, 0) in (b"", b"C")

    def mark(self, state: bytes) -> None:
        """Write D (dirty) or C (clean)."""
        os.pwrite(self.fd, state, 0)

    def release(self) -> None:
        """Drop the lock; idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def try_lease(directory: str, number: int) -> Lease | None:
    """Lock a port without waiting; None when another client holds it.

    Raises Unavailable when the VM's directory is gone: then it does not run.
    """
    try:
        fd = os.open(
            f"{directory}/p{number:02d}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
    except FileNotFoundError as error:
        raise _not_running() from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return None
        raise
    return Lease(fd, number)


def _not_running() -> Unavailable:
    return Unavailable(
        "the VM's agent cannot be reached: the VM does not run",
        hint="see `banger vm list`; start it with `banger vm start NAME`",
        code="agent_unreachable",
    )


class Stream:
    """One stream to the agent, after HELLO: one request, then `close`.

    As a context manager it says BYE when END or ERROR has come (`finished`), else hangs up. The
    socket does not block; the methods wait by themselves.
    """

    __slots__ = ("_decoder", "_lease", "_sock", "finished", "hello")

    def __init__(
        self, sock: socket.socket, lease: Lease | None, hello: dict[str, object], rest: bytes
    ) -> None:
        self._sock = sock
        self._lease = lease
        self._decoder = frames.Decoder(rest)
        self.hello = hello
        self.finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the socket, for poll. Frames may be buffered: ask `buffered_frame` first."""
        return self._sock.fileno()

    def send_request(self, kind: str, fields: dict[str, object]) -> None:
        """Send a request."""
        self.send_raw(frames.encode_request({"kind": kind, **fields}))

    def send(self, kind: int, payload: bytes | memoryview = b"") -> None:
        """Send one frame, waiting for room."""
        self.send_raw(frames.encode(kind, payload))

    def send_raw(self, data: bytes) -> None:
        """Send encoded frames, waiting for room."""
        view = memoryview(data)
        while view:
            sent = self.send_some(view)
            if sent:
                view = view[sent:]
            else:
                wait_for(self._sock.fileno(), select.POLLOUT, None)

    def send_some(self, data: memoryview) -> int:
        """Send what there is room for and return how much that was."""
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise _lost() from error

    def buffered_frame(self) -> tuple[int, bytes] | None:
        """Return the next frame if it has arrived in whole, without reading."""
        return self._checked(self._decoder.next_frame())

    def receive_ready(self) -> bool:
        """Read what has arrived; False when there was nothing. Raises Unavailable at the end."""
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            raise _lost() from error
        if not data:
            raise _lost()
        self._decoder.feed(data)
        return True

    def receive(self, *, timeout_s: float | None = None) -> tuple[int, bytes]:
        """Wait for the next frame. Raises TimedOut, Unavailable, ProtocolError."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            frame = self.buffered_frame()
            if frame is not None:
                return frame
            if self.receive_ready():
                continue
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimedOut("the agent did not answer in time", code="agent_timeout")
            wait_for(self._sock.fileno(), select.POLLIN, left)

    def _checked(self, frame: tuple[int, bytes] | None) -> tuple[int, bytes] | None:
        if frame is not None and frame[0] in (frames.END, frames.ERROR):
            self.finished = True
        return frame

    def say_bye(self, *, timeout_s: float = _BYE_TIMEOUT_S) -> bool:
        """Say BYE and skip frames until BYE_OK; False when that fails. Bounded."""
        deadline = time.monotonic() + timeout_s
        try:
            self.send(frames.BYE)
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                if self.receive(timeout_s=left)[0] == frames.BYE_OK:
                    return True
        except (BangerError, OSError):
            return False

    def close(self) -> None:
        """End the stream: by BYE when it has finished, else by hanging up; idempotent."""
        if self._sock.fileno() < 0:
            return
        try:
            if self.finished and self.say_bye() and self._lease is not None:
                self._sock.close()  # before the lock: the next client must find a free socket
                self._lease.mark(b"C")
        finally:
            self._sock.close()
            if self._lease is not None:
                self._lease.release()


def _lost() -> Unavailable:
    return Unavailable(
        "the connection to the VM's agent was lost",
        hint="see `banger vm list`: the VM may have stopped",
        code="agent_lost",
    )


def wait_for(fd: int, events: int, timeout_s: float | None) -> int:
    """Wait until a descriptor is ready and return poll's events, 0 when the time is over.

    poll, not select: a daemon may hold descriptors above select's 1023.
    """
    poll = select.poll()
    poll.register(fd, events)
    ready = poll.poll(None if timeout_s is None else max(0, int(timeout_s * 1000 + 0.999)))
    return ready[0][1] if ready else 0


def connect_unix(path: str) -> socket.socket:
    """Connect to a Unix socket; the socket does not block from then on. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Non-blocking from the start: a full backlog is EAGAIN, not a wait without end.
        sock.setblocking(False)
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def socket_path(path: str) -> Iterator[str]:
    """Yield a path that connects to the very socket at `path`, however long that is.

    A jailed VMM can write to the directory of its sockets: it could put a link to some other
    program's socket there, and have us connect to that with our rights. So the last component
    is opened without following, and has to be a socket. Raises OSError.
    """
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise OSError(errno.ENOTSOCK, "not a socket", path)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def say_hello(
    sock: socket.socket, *, timeout_s: float, cancelled: Callable[[], bool] | None = None
) -> tuple[dict[str, object], bytes]:
    """Send HELLO and return (HELLO_OK's body, bytes behind it).

    Raises TimedOut, Cancelled, or Unavailable when the other side hangs up.
    """
    nonce = os.urandom(16).hex()
    scanner = frames.HelloScanner(nonce)
    deadline = time.monotonic() + timeout_s
    try:
        sock.send(frames.encode_hello(nonce))
    except OSError as error:
        raise _lost() from error
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimedOut("the VM's agent does not answer", code="agent_timeout")
        if cancelled is not None:
            if cancelled():
                raise Cancelled("cancelled while waiting for the VM's agent")
            left = min(left, 0.05)
        if not wait_for(sock.fileno(), select.POLLIN, left):
            continue
        try:
            data = sock.recv(_READ_BYTES)
        except BlockingIOError:
            continue
        except OSError as error:
            raise _lost() from error
        if not data:
            raise _lost()
        body = scanner.feed(data)
        if body is not None:
            if body.get("version") != frames.VERSION:
                raise Unavailable(
                    "the VM's agent speaks another protocol version",
                    hint="restart the VM: `banger vm restart NAME`",
                    code="agent_version",
                )
            return body, scanner.rest


def _connect_vsock(endpoint: HybridVsock, *, timeout_s: float) -> socket.socket:
    """Connect through Firecracker's socket. Raises OSError, TimedOut."""
    with socket_path(endpoint.path) as path:
        sock = connect_unix(path)
    try:
        sock.send(f"CONNECT {endpoint.port}\n".encode())
        deadline = time.monotonic() + timeout_s
        answer = b""
        # Byte by byte: what follows the line is the stream's.
        while not answer.endswith(b"\n"):
            left = max(0.0, deadline - time.monotonic())
            if not wait_for(sock.fileno(), select.POLLIN, left):
                raise TimedOut("the VMM does not answer CONNECT", code="agent_timeout")
            byte = sock.recv(1)
            if not byte or len(answer) > 32:
                raise ConnectionResetError(errno.ECONNRESET, "no agent listens yet")
            answer += byte
        if not answer.startswith(b"OK "):
            raise ConnectionResetError(errno.ECONNRESET, "the VMM refused CONNECT")
    except BaseException:
        sock.close()
        raise
    return sock


def open_stream(endpoint: Endpoint, *, timeout_s: float) -> Stream:
    """Open a stream: leased where ports are leased, HELLO done.

    Raises Unavailable when the VM does not run, TimedOut when its agent does not answer in time or
    every port stays in use.
    """
    deadline = time.monotonic() + timeout_s
    if isinstance(endpoint, VirtioSerial):
        return _open_port(endpoint, deadline)
    try:
        if isinstance(endpoint, HybridVsock):
            sock = _connect_vsock(endpoint, timeout_s=timeout_s)
        else:
            sock = connect_unix(endpoint.path)
    except ConnectionResetError as error:
        raise Unavailable(
            "the VM's agent takes no connection: the guest is booting, or its agent has ended",
            hint="see `banger vm logs NAME`",
            code="agent_unreachable",
        ) from error
    except OSError as error:
        raise _not_running() from error
    try:
        hello, rest = say_hello(sock, timeout_s=max(0.1, deadline - time.monotonic()))
    except BaseException:
        sock.close()
        raise
    return Stream(sock, None, hello, rest)


def _open_port(endpoint: VirtioSerial, deadline: float) -> Stream:
    refused: set[int] = set()
    while True:
        lease, dirty = _choose_port(endpoint, refused)
        try:
            if lease is not None:
                stream = _hello_on(endpoint, lease, deadline)
                if stream is not None:
                    return _reclaim(stream, dirty, deadline)
                refused.add(lease.number)
            elif dirty:
                stream = _hello_on_dirty(endpoint, dirty, deadline)
                if stream is not None:
                    return stream
        finally:
            for left in dirty:
                left.release()
        if time.monotonic() >= deadline:
            if lease is None and not dirty:
                raise TimedOut(
                    f"all {endpoint.ports} streams into the VM are in use",
                    hint="end one of the commands that run in it",
                    code="agent_busy",
                )
            raise TimedOut(
                "the VM's agent does not answer",
                hint="see `banger vm logs NAME`",
                code="agent_timeout",
            )
        if lease is None:
            time.sleep(_POLL_S)


def _choose_port(endpoint: VirtioSerial, refused: set[int]) -> tuple[Lease | None, list[Lease]]:
    """Lock the lowest clean port; return it and the locked dirty ones passed on the way."""
    dirty: list[Lease] = []
    try:
        for number in range(endpoint.ports):
            lease = try_lease(endpoint.directory, number)
            if lease is None:
                continue
            if lease.clean() and number not in refused:
                return lease, dirty
            dirty.append(lease)
    except BaseException:
        for lease in dirty:
            lease.release()
        raise
    return None, dirty


def _hello_on(endpoint: VirtioSerial, lease: Lease, deadline: float) -> Stream | None:
    """Begin a stream on a locked port; None (and the lock dropped) when nobody answers."""
    sock = None
    try:
        lease.mark(b"D")
        try:
            sock = connect_unix(f"{endpoint.directory}/p{lease.number:02d}")
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise _not_running() from error
        except BlockingIOError:
            lease.release()
            return None
        # A clean port's agent waits for HELLO: silence is a slow host, not a broken port.
        hello, rest = say_hello(sock, timeout_s=max(0.1, deadline - time.monotonic()))
    except TimedOut:
        _close(sock, lease)
        return None
    except BaseException:
        _close(sock, lease)
        raise
    return Stream(sock, lease, hello, rest)


def _close(sock: socket.socket | None, lease: Lease) -> None:
    if sock is not None:
        sock.close()
    lease.release()


def _hello_on_dirty(endpoint: VirtioSerial, dirty: list[Lease], deadline: float) -> Stream | None:
    """Try each dirty port for a second; a hang-up and a pause make its agent let go."""
    for lease in list(dirty):
        if time.monotonic() >= deadline:
            return None
        until = min(deadline, time.monotonic() + _HELLO_TIMEOUT_S)
        duplicate = Lease(os.dup(lease.fd), lease.number)  # shares the lock
        stream = _hello_on(endpoint, duplicate, until)
        if stream is not None:
            return stream
        time.sleep(min(_HANG_UP_PAUSE_S, max(0.0, deadline - time.monotonic())))
    return None


def _reclaim(stream: Stream, dirty: list[Lease], deadline: float) -> Stream:
    """Mark those dirty ports clean of which the agent says that it waits for HELLO."""
    if not dirty:
        return stream
    lease = stream._lease
    try:
        stream.send_request("streams", {})
        timeout_s = max(0.1, deadline - time.monotonic())
        kind, payload = stream.receive(timeout_s=timeout_s)
        idle = _idle_ports(payload) if kind == frames.END else set()
        for passed in dirty:
            if passed.number in idle:
                passed.mark(b"C")
        if not stream.say_bye(timeout_s=timeout_s):
            raise TimedOut("the VM's agent does not answer", code="agent_timeout")
        hello, rest = say_hello(stream._sock, timeout_s=max(0.1, deadline - time.monotonic()))
    except BaseException:
        stream.finished = False
        stream.close()
        raise
    return Stream(stream._sock, lease, hello, rest)


def _idle_ports(payload: bytes) -> set[int]:
    idle = set()
    states = frames.decode_object(payload).get("streams")
    for state in states if isinstance(states, list) else []:
        if isinstance(state, dict) and state.get("state") == "idle":
            name = state.get("name")
            with contextlib.suppress(ValueError):
                if isinstance(name, str) and name.startswith("banger."):
                    idle.add(int(name[len("banger.") :]))
    return idle


def wait_for_hello(
    endpoint: Endpoint, *, timeout_s: float, cancelled: Callable[[], bool]
) -> Stream:
    """Return a stream the instant the agent of a booting VM answers.

    On virtio-serial HELLO is sent at once: QEMU holds the bytes until the guest opens the port.
    Raises TimedOut, Cancelled.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        if cancelled():
            raise Cancelled("cancelled while waiting for the VM's agent")
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimedOut(
                f"the VM's agent did not answer within {timeout_s:.0f} s",
                hint="see `banger vm logs NAME`",
                code="boot_timeout",
            )
        lease: Lease | None = None
        sock: socket.socket | None = None
        try:
            if isinstance(endpoint, VirtioSerial):
                lease = _any_lease(endpoint)
                if lease is not None:
                    lease.mark(b"D")
                    sock = connect_unix(f"{endpoint.directory}/p{lease.number:02d}")
            elif isinstance(endpoint, HybridVsock):
                sock = _connect_vsock(endpoint, timeout_s=min(left, 1.0))
            else:
                sock = connect_unix(endpoint.path)
            if sock is not None:
                # Bounded, though the bytes are held: a guest that resets its device may lose them.
                hello, rest = say_hello(sock, timeout_s=min(left, 5.0), cancelled=cancelled)
                return Stream(sock, lease, hello, rest)
        except Cancelled:
            _drop(sock, lease)
            raise
        except (OSError, TimedOut, Unavailable):
            pass
        _drop(sock, lease)
        time.sleep(_POLL_S)


def _drop(sock: socket.socket | None, lease: Lease | None) -> None:
    if sock is not None:
        sock.close()
    if lease is not None:
        lease.release()


def _any_lease(endpoint: VirtioSerial) -> Lease | None:
    for number in range(endpoint.ports):
        lease = try_lease(endpoint.directory, number)
        if lease is not None:
            return lease
    return None
