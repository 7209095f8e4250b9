"""`vm session attach` and `send`: being a session's terminal, or its writer for a moment."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from banger.cli import output
from banger.cli.attach import Pump
from banger.cli.context import Context
from banger.cli.session_target import (
    EXIT_FAILURE,
    Target,
    describe_exit,
    exit_code,
    parse_period,
    reach,
)
from banger.errors import BangerError, Conflict, InvalidInput, TimedOut, UsageError
from banger.guest import frames, sessions
from banger.guest.agent import ExitStatus

if TYPE_CHECKING:
    from banger.guest.sessions import Attachment

# Two who send at once queue for as long.
_WRITER_WAIT_S = 5.0
_DETACH = b"\x10\x11"  # Ctrl-P Ctrl-Q
_MAX_POSITION = 1 << 62


def run_attach(context: Context, args: argparse.Namespace) -> int:
    """Be a session's stdin, stdout and stderr until it ends, or we leave."""
    stdout, stderr = parse_begin(args.begin)
    try:
        target = reach(context, args.vm)
        return _attach(context, target, args, stdout, stderr)
    except BangerError as error:
        if not context.json:
            raise
        # Our stdout is the session's.
        output.write_json_line({"type": "error", **output.error_body(error)}, sys.stderr)
        return EXIT_FAILURE


def _attach(
    context: Context, target: Target, args: argparse.Namespace, stdout: int, stderr: int
) -> int:
    from banger.cli.session_socket import ensure_or_warn

    with target.named(args.session), _one_writer(target, args.session):
        attachment = sessions.attach(
            target.endpoint, args.session, read_only=args.read_only, stdout=stdout, stderr=stderr
        )
        with attachment:
            ensure_or_warn(context, target, args.session)
            pump = _SessionPump(attachment, read_only=args.read_only, begin=(stdout, stderr))
            if pump.detachable and not args.quiet:
                output.notice("Ctrl-P Ctrl-Q leaves; the session goes on")
            sys.stdout.flush()
            pump.send_size()
            try:
                status = pump.run_on_terminal()
            finally:
                attachment.cut = bool(pump.sending)
    last = pump.last
    if last is not None:
        code = exit_code(last) if status is None else status.exit_code
        code = code if last.state == "ended" else 0  # somebody removed it
    else:
        code = 0 if status is None else status.exit_code
    if context.json:
        result = {
            "vm": target.vm,
            "name": args.session,
            "ended": last is not None,
            "exit_code": code,
            "signal": None if status is None or last is None else status.signal,
        }
        output.write_json_line({"type": "result", "result": result}, sys.stderr)
    elif last is None and not args.quiet:
        output.notice(f"left; {args.session} goes on")
    return code


@contextlib.contextmanager
def _one_writer(target: Target, name: str) -> Iterator[None]:
    try:
        yield
    except BangerError as error:
        # The transport has a code of this name too: no stream into the VM is free.
        if error.code != "agent_busy" or not error.message.startswith("in the guest"):
            raise
        raise Conflict(
            f"the session {name} of {target.vm} has a writer",
            hint="wait until that one leaves, or watch: --read-only",
            code="session_busy",
        ) from error


def parse_begin(text: str) -> tuple[int, int]:
    """Return the positions that `--from` means; raise InvalidInput."""
    if text == "start":
        return 0, 0
    if text == "end":
        return sessions.END_OF_OUTPUT, sessions.END_OF_OUTPUT
    first, comma, second = text.partition(",")
    found = []
    for part in (first, second) if comma else (first,):
        if not part.isascii() or not part.isdigit() or len(part) > 18:
            raise InvalidInput(
                f"--from is start, end, or a position, not {text!r}",
                hint="`banger vm session show --json` has the positions: --from 4096, or 4096,0",
            )
        found.append(int(part))
    return found[0], found[1] if comma else sessions.END_OF_OUTPUT


class Missed:
    """Words for output that is gone; `begin` are the positions of stdout and stderr asked for."""

    def __init__(self, session: sessions.Session, begin: tuple[int | None, int | None]) -> None:
        # What was gone before we came, of which we are told first.
        kept = {"stdout": (session.stdout, begin[0]), "stderr": (session.stderr, begin[1])}
        self._before = {
            stream
            for stream, (of, position) in kept.items()
            if position is not None and 0 <= position < of.start
        }

    def tell(self, payload: bytes) -> str:
        """Return the sentence for a MISSED frame."""
        stream, count = sessions.parse_missed(payload)
        why = "they came faster than this was read"
        if stream in self._before:
            self._before.discard(stream)
            why = "so much is kept no more"
        return f"{count} bytes of {stream} are gone: {why}"


class _SessionPump(Pump):
    """A session: our end of input and our signals are not its."""

    passes_end = False

    def __init__(self, attachment: Attachment, *, read_only: bool, begin: tuple[int, int]) -> None:
        session = attachment.session
        reads = session.takes_input and not read_only
        super().__init__(
            attachment.stream,
            tty=session.stdin_mode == "pty" and not read_only,
            stdin_fd=0 if reads else None,
            outputs=(1, 2),
            credit=attachment.credit,
        )
        self.detachable = self.tty and os.isatty(0)
        self._held = b""
        self._missed = Missed(session, begin)

    def take_other(self, kind: int, payload: bytes) -> None:
        if kind == frames.MISSED:
            self._say(self._missed.tell(payload))
        elif kind == frames.RESTARTED:
            session = sessions.parse_session(frames.decode_object(payload))
            self._say(f"{session.name} ended ({describe_exit(session)}) and has begun again")
        else:
            raise frames.ProtocolError(f"the agent sent frame 0x{kind:02x} in a session")

    @property
    def last(self) -> sessions.Session | None:
        """The session at its end; None when it goes on."""
        if not self.over:
            return None
        return sessions.parse_session(frames.decode_object(self.end).get("session"))

    def _say(self, text: str) -> None:
        # Behind what of stderr is on its way; a raw terminal returns the carriage for nobody.
        line = f"banger: {text}{chr(13) if self.detachable else ''}\n"
        self.outputs[frames.STDERR].pending += line.encode()

    def filter_input(self, data: bytes) -> bytes:
        """Take the keys out that mean to leave; the first of them waits for the second."""
        if not self.detachable:
            return data
        data = self._held + data
        at = data.find(_DETACH)
        if at >= 0:
            self.leave(None)
            return data[:at]
        self._held = data[-1:] if data.endswith(_DETACH[:1]) else b""
        self.kept = len(self._held)
        return data[: len(data) - self.kept]

    def take_signal(self, number: int) -> None:
        # Ctrl-C is how one leaves; the others end us, and the session goes on all the same.
        self.leave(None if number == signal.SIGINT else ExitStatus(None, number))


def run_send(context: Context, args: argparse.Namespace) -> int:
    """Write to a session's stdin and return when it has been taken."""
    from_stdin, text = _what_to_send(args)
    timeout_s = parse_period("--timeout", args.timeout)
    target = reach(context, args.vm)
    with target.named(args.session), _one_writer(target, args.session):
        attachment = sessions.attach(
            target.endpoint,
            args.session,
            read_only=False,
            stdout=None,
            stderr=None,
            wait_s=_WRITER_WAIT_S,
        )
        with attachment:
            sent = _send(target, attachment, args, text, timeout_s, from_stdin=from_stdin)
    if context.json:
        output.write_json({"vm": target.vm, "name": args.session, "sent_bytes": sent})
    return 0


def _what_to_send(args: argparse.Namespace) -> tuple[bool, bytes]:
    words = [*args.text, *(args.command or [])]
    from_stdin = args.stdin or (args.text == ["-"] and args.command is None)
    if args.stdin and words:
        raise UsageError("--stdin and a text are two inputs", hint="leave one of them out")
    if from_stdin:
        return True, b""
    if not words and not args.eof:
        raise UsageError("nothing to send", hint="a text, --stdin, or --eof")
    return False, b" ".join(os.fsencode(word) for word in words)


def _send(
    target: Target,
    attachment: Attachment,
    args: argparse.Namespace,
    text: bytes,
    timeout_s: float,
    *,
    from_stdin: bool,
) -> int:
    session = attachment.session
    if session.state == "ended":
        raise Conflict(
            f"the session {session.name} of {target.vm} has ended ({describe_exit(session)})",
            hint=f"banger vm session logs {target.vm} {session.name}",
            code="session_ended",
        )
    if not session.takes_input:
        raise Conflict(
            f"the session {session.name} of {target.vm} has no stdin",
            hint="it was started with --stdin-mode null",
        )
    if session.stdin_closed:
        raise Conflict(
            f"the stdin of {session.name} of {target.vm} is closed",
            hint=f"banger vm session logs {target.vm} {session.name}",
            code="session_stdin_closed",
        )
    if not from_stdin and (args.text or args.command) and not args.no_newline:
        # What Enter types; a terminal makes a newline of it, unless a program wants it raw.
        text += b"\r" if session.stdin_mode == "pty" else b"\n"
    sent = 0
    try:
        for piece in _pieces(text, from_stdin=from_stdin):
            rest = memoryview(piece)
            while rest:
                if not attachment.wait_for_room(timeout_s):
                    raise _ended(session.name, target)
                part = rest[: min(attachment.credit, frames.MAX_PAYLOAD)]
                attachment.write(part)
                rest, sent = rest[len(part) :], sent + len(part)
        if args.eof:
            attachment.queue(frames.STDIN_EOF)
        if not attachment.wait_until_taken(timeout_s):
            raise _ended(session.name, target)
    except TimedOut as error:
        raise TimedOut(
            f"{session.name} takes no more of its stdin: {sent} bytes were sent, and wait there",
            hint=f"banger vm session show {target.vm} {session.name}",
            code="session_not_reading",
        ) from error
    return sent


def _ended(name: str, target: Target) -> Conflict:
    return Conflict(
        f"the session {name} of {target.vm} has ended before it took all",
        hint=f"banger vm session logs {target.vm} {name}",
        code="session_ended",
    )


def _pieces(text: bytes, *, from_stdin: bool) -> Iterator[bytes]:
    if not from_stdin:
        yield text
        return
    while piece := os.read(0, frames.MAX_PAYLOAD):
        yield piece
