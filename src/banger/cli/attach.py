"""The byte pump of an attached exec: terminal, pipes and signals on one side, frames on the other.

Owns raw mode, window size, signal forwarding and back-pressure. No event loop: one poll.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import stat
import threading
from collections.abc import Callable
from types import FrameType

from banger.guest import frames
from banger.guest.agent import (
    OPEN_TIMEOUT_S,
    ExecRequest,
    ExitStatus,
    agent_error,
    exec_fields,
    parse_exit,
)
from banger.guest.transport import Endpoint, Stream, open_stream

_QUEUE_LIMIT_BYTES = 256 << 10
_PATIENCE_INTERRUPTS = 3
_FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")


def run_exec(
    endpoint: Endpoint,
    request: ExecRequest,
    *,
    stdin_fd: int | None,
    stdout_fd: int,
    stderr_fd: int,
    on_started: Callable[[], object] | None = None,
) -> ExitStatus:
    """Run a process in the guest, joined to these descriptors, and return how it ended.

    `stdin_fd` None gives it no input. With `request.tty` and a terminal on `stdin_fd` the terminal
    is raw for as long. Without a tty SIGINT, SIGTERM, SIGHUP and SIGQUIT go to the process; the
    third SIGINT hangs up. When nobody reads our stdout any more the process is hung up on and the
    status is SIGPIPE's. Signals are handled only when called in the main thread.
    """
    if stdin_fd is None:
        request = request._replace(stdin="null")
    with open_stream(endpoint, timeout_s=OPEN_TIMEOUT_S) as stream:
        stream.send_request("exec", exec_fields(request))
        pump = _Pump(
            stream,
            request,
            stdin_fd=stdin_fd,
            outputs=(stdout_fd, stderr_fd),
            on_started=on_started,
        )
        with _Terminal(stdin_fd if request.tty is not None else None), _Signals(pump):
            return pump.run()


class _Output:
    """Bytes on their way to one of our descriptors."""

    __slots__ = ("chunk", "fd", "pending")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.pending = bytearray()
        mode = os.fstat(fd).st_mode
        # Of a blocking pipe poll promises room for PIPE_BUF only; a longer write could wait, and
        # then neither stdin nor a signal would get through.
        small = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
        self.chunk = select.PIPE_BUF if small else 65536

    def write_some(self) -> None:
        try:
            written = os.write(self.fd, memoryview(self.pending)[: self.chunk])
        except BlockingIOError:
            return
        del self.pending[:written]


class _Pump:
    def __init__(
        self,
        stream: Stream,
        request: ExecRequest,
        *,
        stdin_fd: int | None,
        outputs: tuple[int, int],
        on_started: Callable[[], object] | None,
    ) -> None:
        self.stream = stream
        self.tty = request.tty is not None
        self.stdin_fd = stdin_fd
        self.outputs = {
            frames.STDOUT: _Output(outputs[0]),
            frames.STDERR: _Output(outputs[1]),
        }
        self.on_started = on_started
        self.credit = frames.STDIN_WINDOW
        self.sending = bytearray()
        self.status: ExitStatus | None = None
        self.over = False
        self.wake_fd = -1
        self.received: list[int] = []
        self.interrupts = 0

    def run(self) -> ExitStatus:
        # select, not epoll: epoll refuses regular files. poll has no limit on descriptors.
        while True:
            self.take_frames()
            self.forward_signals()
            if self.interrupts >= _PATIENCE_INTERRUPTS:
                return ExitStatus(None, int(signal.SIGINT))
            if self.over and not any(output.pending for output in self.outputs.values()):
                break
            try:
                self.step()
            except OSError as error:
                if error.errno in (errno.EPIPE, errno.ECONNRESET):
                    return ExitStatus(None, int(signal.SIGPIPE))
                raise
        if self.status is None:
            raise frames.ProtocolError("the agent ended an exec without EXIT")
        return self.status

    def full(self) -> bool:
        return any(len(output.pending) > _QUEUE_LIMIT_BYTES for output in self.outputs.values())

    def take_frames(self) -> None:
        while not self.full() and not self.over:
            frame = self.stream.buffered_frame()
            if frame is None:
                return
            kind, payload = frame
            if kind in self.outputs:
                self.outputs[kind].pending += payload
            elif kind == frames.STDIN_CREDIT:
                self.credit = min(self.credit + frames.decode_credit(payload), frames.STDIN_WINDOW)
            elif kind == frames.EXIT:
                self.status = parse_exit(payload)
                self.stdin_fd = None
            elif kind == frames.END:
                self.over = True
            elif kind == frames.ERROR:
                raise agent_error(payload)
            elif kind == frames.STARTED:
                if self.on_started is not None:
                    self.on_started()
            else:
                raise frames.ProtocolError(f"the agent sent frame 0x{kind:02x} in an exec")

    def step(self) -> None:
        poll = select.poll()
        events: dict[int, int] = {}

        def watch(fd: int, event: int) -> None:
            events[fd] = events.get(fd, 0) | event

        stream_fd = self.stream.fileno()
        if not self.over and not self.full():
            watch(stream_fd, select.POLLIN)
        if self.sending and not self.over:
            watch(stream_fd, select.POLLOUT)
        reading = self.stdin_fd is not None and self.credit > 0 and not self.sending
        if reading and self.stdin_fd is not None:
            watch(self.stdin_fd, select.POLLIN)
        for output in self.outputs.values():
            if output.pending:
                watch(output.fd, select.POLLOUT)
        if self.wake_fd >= 0:
            watch(self.wake_fd, select.POLLIN)
        for fd, event in events.items():
            poll.register(fd, event)
        ready = dict(poll.poll())
        if self.wake_fd in ready:
            os.read(self.wake_fd, 4096)
        for output in self.outputs.values():
            if output.pending and output.fd in ready:
                output.write_some()
        if stream_fd in ready:
            if self.sending:
                sent = self.stream.send_some(memoryview(self.sending))
                del self.sending[:sent]
            if not self.over and not self.full():
                self.stream.receive_ready()
        if reading and self.stdin_fd in ready:
            self.read_stdin()

    def read_stdin(self) -> None:
        if self.stdin_fd is None:
            return
        try:
            data = os.read(self.stdin_fd, min(self.credit, frames.MAX_PAYLOAD))
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal that has gone, or is not ours to read
                raise
            data = b""
        if data:
            self.credit -= len(data)
            self.sending += frames.encode(frames.STDIN, data)
        else:
            self.stdin_fd = None
            self.sending += frames.encode(frames.STDIN_EOF)

    def forward_signals(self) -> None:
        while self.received:
            number = self.received.pop(0)
            if number == signal.SIGWINCH:
                size = terminal_size(self.outputs[frames.STDOUT].fd)
                if self.tty and size is not None:
                    body = {"rows": size[0], "cols": size[1]}
                    self.sending += frames.encode_json(frames.RESIZE, body)
                continue
            if number == signal.SIGINT:
                self.interrupts += 1
            self.sending += frames.encode_json(frames.SIGNAL, {"number": number})


def terminal_size(fd: int) -> tuple[int, int] | None:
    """Return (rows, columns) of a terminal, None where it is none."""
    try:
        size = os.get_terminal_size(fd)
    except OSError:
        return None
    return size.lines, size.columns


class _Terminal:
    """Raw mode for as long as the context; nothing when the descriptor is no terminal."""

    def __init__(self, fd: int | None) -> None:
        self.fd = fd if fd is not None and os.isatty(fd) else None
        self.saved: list[object] = []

    def __enter__(self) -> None:
        if self.fd is not None:
            import termios
            import tty

            self.saved = termios.tcgetattr(self.fd)
            tty.setraw(self.fd, termios.TCSADRAIN)

    def __exit__(self, *_: object) -> None:
        if self.fd is not None:
            import termios

            try:
                termios.tcsetattr(self.fd, termios.TCSADRAIN, self.saved)  # type: ignore[arg-type]
            except termios.error:
                pass  # the terminal has gone


class _Signals:
    """Hands signals to the pump for as long as the context."""

    def __init__(self, pump: _Pump) -> None:
        self.pump = pump
        self.saved: dict[int, object] = {}
        self.fds: tuple[int, int] | None = None
        self.saved_wakeup = -1

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self.fds = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.pump.wake_fd = self.fds[0]
        self.saved_wakeup = signal.set_wakeup_fd(self.fds[1], warn_on_full_buffer=False)
        names = _FORWARDED + (("SIGWINCH",) if self.pump.tty else ())
        for name in names:
            number = getattr(signal, name)
            # What our caller ignores (nohup) stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.saved[number] = signal.signal(number, self.handle)

    def handle(self, number: int, _: FrameType | None) -> None:
        self.pump.received.append(number)

    def __exit__(self, *_: object) -> None:
        if self.fds is None:
            return
        for number, handler in self.saved.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self.saved_wakeup)
        for fd in self.fds:
            os.close(fd)
