"""The byte pump of who is attached: terminal, pipes and signals on one side, frames on the other.

Owns raw mode, window size, signals and back-pressure, and how an exec uses them; a session's way is
`cli.session_attach`. No event loop: one poll.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import stat
import threading
from abc import ABC, abstractmethod
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
        pump = _ExecPump(
            stream,
            tty=request.tty is not None,
            stdin_fd=stdin_fd,
            outputs=(stdout_fd, stderr_fd),
        )
        pump.on_started = on_started
        status = pump.run_on_terminal()
    if status is None:
        raise frames.ProtocolError("the agent ended an exec without EXIT")
    return status


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


class Pump(ABC):
    """Joins a stream with our descriptors until its end.

    What differs between what may be attached to is in the methods of a subclass: other frames, the
    end of our input, what is typed, and signals.
    """

    passes_end = True  # whether the end of our input is the process's

    def __init__(
        self,
        stream: Stream,
        *,
        tty: bool,
        stdin_fd: int | None,
        outputs: tuple[int, int],
        credit: int = frames.STDIN_WINDOW,
    ) -> None:
        self.stream = stream
        self.tty = tty
        self.stdin_fd = stdin_fd
        self.outputs = {
            frames.STDOUT: _Output(outputs[0]),
            frames.STDERR: _Output(outputs[1]),
        }
        self.credit = credit
        self.sending = bytearray()
        self.status: ExitStatus | None = None
        self.over = False
        self.end = b""  # what was said at the end
        self.left = False
        self.kept = 0  # bytes of our input that `filter_input` holds back
        self.wake_fd = -1
        self.received: list[int] = []

    @abstractmethod
    def take_other(self, kind: int, payload: bytes) -> None:
        """Take a frame that is neither output nor credit nor an end."""

    @abstractmethod
    def take_signal(self, number: int) -> None:
        """Do what one of our signals is to do; `leave` ends the pump."""

    def filter_input(self, data: bytes) -> bytes:
        """Return what of our input goes to the process."""
        return data

    def leave(self, status: ExitStatus | None) -> None:
        """Stop here, whatever the process does."""
        self.left = True
        self.status = status

    def run_on_terminal(self) -> ExitStatus | None:
        """Run with our terminal raw, where the process has one, and our signals taken."""
        with _Terminal(self.stdin_fd if self.tty else None), _Signals(self):
            return self.run()

    def run(self) -> ExitStatus | None:
        """Return how the process ended, None when it is not said."""
        # select, not epoll: epoll refuses regular files. poll has no limit on descriptors.
        while True:
            self._take_frames()
            self._take_signals()
            if self.left:
                break
            if self.over and not any(output.pending for output in self.outputs.values()):
                break
            try:
                self._step()
            except OSError as error:
                if error.errno in (errno.EPIPE, errno.ECONNRESET):
                    return ExitStatus(None, int(signal.SIGPIPE))
                raise
        return self.status

    def _full(self) -> bool:
        return any(len(output.pending) > _QUEUE_LIMIT_BYTES for output in self.outputs.values())

    def _take_frames(self) -> None:
        while not self._full() and not self.over:
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
                self.end = payload
            elif kind == frames.ERROR:
                raise agent_error(payload)
            else:
                self.take_other(kind, payload)

    def _step(self) -> None:
        poll = select.poll()
        events: dict[int, int] = {}

        def watch(fd: int, event: int) -> None:
            events[fd] = events.get(fd, 0) | event

        stream_fd = self.stream.fileno()
        if not self.over and not self._full():
            watch(stream_fd, select.POLLIN)
        if self.sending and not self.over:
            watch(stream_fd, select.POLLOUT)
        reading = self.stdin_fd is not None and self.credit > self.kept and not self.sending
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
            if not self.over and not self._full():
                self.stream.receive_ready()
        if reading and self.stdin_fd in ready:
            self._read_stdin()

    def _read_stdin(self) -> None:
        if self.stdin_fd is None:
            return
        try:
            data = os.read(self.stdin_fd, min(self.credit, frames.MAX_PAYLOAD) - self.kept)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal that has gone, or is not ours to read
                raise
            data = b""
        if not data:
            self.stdin_fd = None
            if self.passes_end:
                self.sending += frames.encode(frames.STDIN_EOF)
        elif data := self.filter_input(data):
            self.credit -= len(data)
            self.sending += frames.encode(frames.STDIN, data)

    def _take_signals(self) -> None:
        while self.received:
            number = self.received.pop(0)
            if number == signal.SIGWINCH:
                self.send_size()
            else:
                self.take_signal(number)

    def send_size(self) -> None:
        """Tell the process the size of our terminal, where both have one."""
        size = terminal_size(self.outputs[frames.STDOUT].fd)
        if self.tty and size is not None and all(size):
            body = {"rows": size[0], "cols": size[1]}
            self.sending += frames.encode_json(frames.RESIZE, body)


class _ExecPump(Pump):
    """An exec: its end of input and its signals are ours."""

    on_started: Callable[[], object] | None = None
    interrupts = 0

    def take_other(self, kind: int, payload: bytes) -> None:
        del payload
        if kind != frames.STARTED:
            raise frames.ProtocolError(f"the agent sent frame 0x{kind:02x} in an exec")
        if self.on_started is not None:
            self.on_started()

    def take_signal(self, number: int) -> None:
        if number == signal.SIGINT:
            self.interrupts += 1
        if self.interrupts >= _PATIENCE_INTERRUPTS:
            self.leave(ExitStatus(None, int(signal.SIGINT)))
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

    def __init__(self, pump: Pump) -> None:
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
