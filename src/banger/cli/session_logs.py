"""`vm session logs`: what is kept of a session's output, and what comes."""

from __future__ import annotations

import argparse
import sys
import time
from typing import IO, TYPE_CHECKING

from banger.cli import output
from banger.cli.context import Context
from banger.cli.session_attach import Missed
from banger.cli.session_target import Target, parse_period, reach
from banger.errors import InvalidInput, UsageError
from banger.guest import frames, sessions

if TYPE_CHECKING:
    from banger.guest.sessions import Attachment, Kept

_FIRST_BLOCK_BYTES = 256 << 10
_STREAMS = ("stdout", "stderr")
_SILENCE_TIMEOUT_S = 60.0  # of an agent that has only to read its own files


def run_logs(context: Context, args: argparse.Namespace) -> int:
    """Show a session's output."""
    lines = _parse_lines(args.tail)
    moment = None if args.since is None else parse_moment(args.since)
    if context.json and args.follow:
        raise UsageError("--json prints what is there", hint="leave out --json, or -f")
    target = reach(context, args.vm)
    wanted = _STREAMS if args.stream is None else (args.stream,)
    with target.named(args.session):
        begin = _beginnings(target, args.session, wanted, lines, moment)
        if context.json:
            texts = {
                stream: None
                if (position := begin.get(stream)) is None
                else read_kept(target, args.session, stream, position).decode(errors="replace")
                for stream in _STREAMS
            }
            output.write_json({"vm": target.vm, "name": args.session, **texts})
            return 0
        positions = (begin["stdout"], begin["stderr"])
        with _reading(target, args.session, positions, follow=args.follow) as attachment:
            _show(attachment, Missed(attachment.session, positions), args.stream)
    return 0


def _beginnings(
    target: Target, name: str, wanted: tuple[str, ...], lines: int | None, moment: int | None
) -> dict[str, int | None]:
    """Return the position at which each stream begins, None for one that is not wanted."""
    session = sessions.show(target.endpoint, name)
    kept = {"stdout": session.stdout, "stderr": session.stderr}
    begin: dict[str, int | None] = dict.fromkeys(_STREAMS)
    at = None if moment is None else sessions.since(target.endpoint, name, moment)
    for stream in wanted:
        span = kept[stream]
        first = span.start if at is None else max(span.start, at[_STREAMS.index(stream)])
        if lines is not None:
            span = span._replace(start=min(first, span.end))
            first = _start_of_last_lines(target, name, stream, span, lines)
        begin[stream] = first
    return begin


def _start_of_last_lines(target: Target, name: str, stream: str, kept: Kept, lines: int) -> int:
    """Return the position of the last lines, reading backwards in blocks that double."""
    if lines == 0:
        return kept.end
    size = _FIRST_BLOCK_BYTES
    while True:
        begin = max(kept.start, kept.end - size)
        block = read_kept(target, name, stream, begin)[: kept.end - begin]
        at = len(block) - 1 if block.endswith(b"\n") else len(block)
        for _ in range(lines):
            at = block.rfind(b"\n", 0, at)
            if at < 0:
                break
        if at >= 0:
            return begin + at + 1
        if begin == kept.start:
            return begin
        size *= 2


def read_kept(target: Target, name: str, stream: str, position: int) -> bytes:
    """Return what is kept of one stream of a session from a position on."""
    positions = (position, None) if stream == "stdout" else (None, position)
    found = bytearray()
    with _reading(target, name, positions, follow=False) as attachment:
        while True:
            kind, payload = attachment.receive(_SILENCE_TIMEOUT_S)
            if kind in (frames.STDOUT, frames.STDERR):
                found += payload
            elif kind == frames.END:
                return bytes(found)


def _reading(
    target: Target, name: str, positions: tuple[int | None, int | None], *, follow: bool
) -> Attachment:
    stdout, stderr = positions
    return sessions.attach(
        target.endpoint, name, read_only=True, follow=follow, stdout=stdout, stderr=stderr
    )


def _show(attachment: Attachment, missed: Missed, only: str | None) -> None:
    sinks = {
        frames.STDOUT: _Sink(sys.stdout),
        frames.STDERR: _Sink(sys.stdout if only == "stderr" else sys.stderr),
    }
    while True:
        kind, payload = attachment.receive()
        if kind in sinks:
            sinks[kind].write(payload)
        elif kind == frames.MISSED:
            output.notice(missed.tell(payload))
        elif kind == frames.END:
            return


class _Sink:
    """One of our streams: bytes as they are into a pipe, harmless on a terminal."""

    def __init__(self, stream: IO[str]) -> None:
        self._out = stream.buffer  # type: ignore[attr-defined]
        self._clean = None
        if output.is_terminal(stream):
            from banger.cli.logs import Cleaner

            self._clean = Cleaner()

    def write(self, data: bytes) -> None:
        self._out.write(data if self._clean is None else self._clean.feed(data))
        self._out.flush()


def _parse_lines(text: str | None) -> int | None:
    if text is None or text == "all":
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        raise InvalidInput(f"--tail must be a number, not {text!r}", hint="for example --tail 100")
    return int(text)


def parse_moment(text: str) -> int:
    """Return the Unix seconds of `10m` (ago), of an ISO time (ours without an offset), or as is."""
    if text.isascii() and text.isdigit() and len(text) < 12:
        return int(text)
    if text[-1:] in "smhd" and text[:1].isdigit():
        return int(time.time() - parse_period("--since", text))
    from datetime import datetime

    try:
        return int(datetime.fromisoformat(text).astimezone().timestamp())
    except (ValueError, OverflowError, OSError) as error:
        raise InvalidInput(
            f"--since takes 10m, an ISO time or Unix seconds, not {text!r}",
            hint="for example --since 2026-01-31T10:00",
        ) from error
