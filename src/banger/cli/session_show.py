"""`vm session list`, `show`, `wait`, `signal`, `stop`, `kill` and `rm`: what the agent keeps."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from banger.cli import output
from banger.cli.context import Context
from banger.cli.session_target import (
    EXIT_FAILURE,
    Target,
    command_line,
    describe_exit,
    describe_state,
    exit_code,
    parse_period,
    reach,
)
from banger.errors import BangerError, Conflict, InvalidInput, Unavailable, nearest

if TYPE_CHECKING:
    from banger.guest.sessions import Session

_COMMAND_WIDTH = 60
_EXIT_TIMED_OUT = 124
_READY = {True: "yes", False: "no", None: "-"}


def run_list(context: Context, args: argparse.Namespace) -> int:
    """List sessions."""
    from banger.guest import sessions

    target = reach(context, args.vm)
    with target.named(""):
        found = sessions.list_all(target.endpoint)
    if context.json:
        output.write_json([sessions.to_json(session) for session in found])
        return 0
    output.write_table(
        ("NAME", "STATE", "READY", "PID", "SINCE", "COMMAND"),
        [
            (
                session.name,
                describe_state(session),
                _READY[session.ready],
                "-" if session.pid is None else str(session.pid),
                _since(session),
                _shortened(command_line(session)),
            )
            for session in found
        ],
        right=("PID",),
    )
    return 0


def _since(session: Session) -> str:
    at = session.began_at if session.ended_at is None else session.ended_at
    return output.format_duration(time.time() - at)


def _shortened(text: str) -> str:
    return text if len(text) <= _COMMAND_WIDTH else f"{text[: _COMMAND_WIDTH - 3]}..."


def run_show(context: Context, args: argparse.Namespace) -> int:
    """Show one session."""
    from banger.cli.session_socket import ensure_or_warn
    from banger.guest import sessions

    target = reach(context, args.vm)
    with target.named(args.session):
        session = sessions.show(target.endpoint, args.session)
    socket = ensure_or_warn(context, target, session.name)
    if context.json:
        output.write_json({"vm": target.vm, **sessions.to_json(session), "socket": socket})
        return 0
    kept = [
        f"{name} {output.format_bytes(of.end - of.start)} of {output.format_bytes(of.end)}"
        for name, of in (("stdout", session.stdout), ("stderr", session.stderr))
    ]
    writer = "and a writer" if session.writer else "no writer"
    fields = [
        ("name", session.name),
        ("vm", target.vm),
        ("state", describe_state(session)),
        ("command", command_line(session)),
        ("cwd", session.cwd.decode(errors="replace")),
        ("user", session.user),
        ("pid", "-" if session.pid is None else str(session.pid)),
        ("stdin", session.stdin_mode + (", closed" if session.stdin_closed else "")),
        ("restart", session.restart),
        ("ready", "no check was asked for" if session.ready is None else _READY[session.ready]),
        ("started", _moment(session.started_at)),
        ("began", _moment(session.began_at)),
        ("ended", "-" if session.ended_at is None else _moment(session.ended_at)),
        ("last status", "-" if session.exit is None else describe_exit(session)),
        ("ended by", session.reason.replace("_", " ") or "-"),
        ("message", session.message or "-"),
        ("attached", f"{session.viewers}, {writer}"),
        ("kept", f"{', '.join(kept)}; at most {output.format_bytes(session.log_limit)} of each"),
        ("socket", socket or "-"),
    ]
    output.write_fields(fields)
    return 0


def _moment(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))


def run_wait(context: Context, args: argparse.Namespace) -> int:
    """Wait for a session."""
    from banger.guest import sessions

    timeout_s = None if args.timeout is None else parse_period("--timeout", args.timeout)
    target = reach(context, args.vm)
    with target.named(args.session):
        session, in_time = sessions.wait(
            target.endpoint, args.session, until=args.until, timeout_s=timeout_s
        )
    if context.json:
        shown = {**sessions.to_json(session), "timed_out": not in_time}
        output.write_json({"vm": target.vm, **shown})
    if not in_time:
        return _EXIT_TIMED_OUT
    if args.until == "ready":
        return _ready_status(context, target, session)
    return exit_code(session)


def _ready_status(context: Context, target: Target, session: Session) -> int:
    if session.ready:
        return 0
    if session.ready is None:
        error: BangerError = InvalidInput(
            f"{session.name} was started without a ready check",
            hint="banger vm session start --ready-port, --ready-file or --ready-command",
        )
    else:
        error = Unavailable(
            f"{session.name} ended ({describe_exit(session)}) before it was ready",
            hint=f"banger vm session logs {target.vm} {session.name}",
        )
    if context.json:  # the session has been printed
        return EXIT_FAILURE
    raise error


def run_signal(context: Context, args: argparse.Namespace) -> int:
    """Signal a session."""
    from banger.guest import sessions

    number = parse_signal(args.signal)
    target = reach(context, args.vm)
    with target.named(args.session):
        session = sessions.signal(target.endpoint, args.session, number)
    if context.json:
        output.write_json({"vm": target.vm, **sessions.to_json(session)})
    return 0


def parse_signal(text: str) -> int:
    """Return the number of a signal; raise InvalidInput."""
    import signal

    if text.isascii() and text.isdigit() and len(text) <= 2 and 1 <= int(text) <= 64:
        return int(text)
    known = {one.name.removeprefix("SIG"): one.value for one in signal.Signals}
    name = text.upper().removeprefix("SIG")
    if name in known:
        return known[name]
    close = nearest(name, list(known))
    raise InvalidInput(
        f"{text!r} is no signal",
        hint=f"did you mean {close}?" if close else "a name as TERM, or a number from 1 to 64",
    )


def run_stop(context: Context, args: argparse.Namespace) -> int:
    """End sessions, with patience."""
    from banger.guest import sessions

    grace_s = parse_period("--grace", args.grace)

    def stop(target: Target, name: str) -> Session:
        return sessions.stop(target.endpoint, name, grace_s=grace_s)

    return _each(context, args, stop, "ended")


def run_kill(context: Context, args: argparse.Namespace) -> int:
    """End sessions at once."""
    from banger.guest import sessions

    def kill(target: Target, name: str) -> Session:
        return sessions.kill(target.endpoint, name)

    return _each(context, args, kill, "ended")


def run_rm(context: Context, args: argparse.Namespace) -> int:
    """Forget sessions."""
    from banger.guest import sessions

    def remove(target: Target, name: str) -> None:
        try:
            sessions.remove(target.endpoint, name, force=args.force)
        except Unavailable as error:
            if error.code != "agent_busy" or args.force:
                raise
            raise Conflict(
                f"the session {name} of {target.vm} runs",
                hint=f"banger vm session stop {target.vm} {name}, or rm --force",
                code="session_runs",
            ) from error

    return _each(context, args, remove, "removed")


def _each(
    context: Context,
    args: argparse.Namespace,
    act: Callable[[Target, str], Session | None],
    done: str,
) -> int:
    """Do something to each session that is named; what fails is told, and the rest is done."""
    from banger.guest import sessions

    target = reach(context, args.vm)
    results = []
    failed = False
    for name in dict.fromkeys(args.sessions):
        try:
            with target.named(name):
                session = act(target, name)
        except BangerError as error:
            failed = True
            results.append({"name": name, **output.error_body(error)})
            if not context.json:
                output.write_error(error)
            continue
        if session is None:
            results.append({"name": name, done: True})
        else:
            results.append(sessions.to_json(session))
        if not context.json:
            how = "" if session is None else f" ({describe_exit(session)})"
            output.write_line(f"{name} {done}{how}")
    if context.json:
        output.write_json(results)
    return EXIT_FAILURE if failed else 0
