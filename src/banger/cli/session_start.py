"""`vm session start`: a process that the guest keeps, and the wait until it is ready."""

from __future__ import annotations

import argparse
import os
import re
from typing import TYPE_CHECKING

from banger.cli import output
from banger.cli.context import Context
from banger.cli.progress import Progress
from banger.cli.session_target import Target, describe_exit, parse_period, reach
from banger.errors import BangerError, Conflict, InvalidInput, TimedOut, Unavailable, UsageError

if TYPE_CHECKING:
    from banger.guest.sessions import Session, SessionRequest

_SUFFIXES = 100
_NAME_LENGTH = 60  # and a suffix
_LOG_LIMITS = (64 << 10, 1 << 30)  # agent/PROTOCOL.md, log_limit
_LAST_LINES = 5
_LAST_BYTES = 4096


def run_start(context: Context, args: argparse.Namespace) -> int:
    """Start a session and print its name."""
    from banger.cli.session_socket import ensure_or_warn
    from banger.guest import sessions

    request = make_request(args)
    timeout_s = parse_period("--ready-timeout", args.ready_timeout)
    with Progress(quiet=args.quiet) as progress:
        target = reach(context, args.vm, progress=progress)
        session = _start(target, request, chosen=args.session is not None)
        if request.ready is not None:
            progress.stage(f"wait until {session.name} is ready")
            session = _until_ready(target, session, timeout_s)
    socket = ensure_or_warn(context, target, session.name)
    if context.json:
        output.write_json({"vm": target.vm, **sessions.to_json(session), "socket": socket})
    else:
        output.write_line(session.name)
    return 0


def make_request(args: argparse.Namespace) -> SessionRequest:
    """Turn the words into a request; what is wrong is told before anybody is asked."""
    from banger.cli.vm_exec import parse_environment, terminal
    from banger.guest.agent import ExecRequest
    from banger.guest.sessions import SessionRequest, check_name

    if args.command is None:
        raise UsageError("no command given", hint="banger vm session start VM -- COMMAND")
    log_limit = None
    if args.log_limit is not None:
        from banger.types import parse_size

        log_limit = parse_size(args.log_limit)
        if not _LOG_LIMITS[0] <= log_limit <= _LOG_LIMITS[1]:
            raise InvalidInput("--log-limit is from 64K to 1G", hint="for example --log-limit 64M")
    process = ExecRequest(
        argv=[os.fsencode(word) for word in args.command],
        env=parse_environment(args.env),
        cwd=None if args.cwd is None else os.fsencode(args.cwd),
        user=args.user or "root",
        tty=terminal() if args.stdin_mode == "pty" else None,
    )
    name = name_after(args.command[0]) if args.session is None else check_name(args.session)
    return SessionRequest(
        name,
        process,
        stdin_mode=args.stdin_mode,
        restart=args.restart,
        ready=_ready_check(args),
        log_limit=log_limit,
    )


def name_after(program: str) -> str:
    """Return the name of a session that got none: what the program is called."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", os.path.basename(program))
    return plain.lstrip("._-")[:_NAME_LENGTH] or "session"


def _ready_check(args: argparse.Namespace) -> dict[str, object] | None:
    from banger.guest.agent import b64

    if args.ready_port is not None:
        text = args.ready_port
        if not text.isascii() or not text.isdigit() or len(text) > 5 or not 0 < int(text) < 65536:
            raise InvalidInput(f"--ready-port is a port from 1 to 65535, not {text!r}")
        return {"port": int(text)}
    if args.ready_file is not None:
        if not args.ready_file.startswith("/"):
            raise InvalidInput("--ready-file is an absolute path in the VM", hint="as /run/up")
        return {"file": b64(os.fsencode(args.ready_file))}
    if args.ready_command is not None:
        return {"command": [b64(word) for word in (b"sh", b"-c", os.fsencode(args.ready_command))]}
    return None


def _start(target: Target, request: SessionRequest, *, chosen: bool) -> Session:
    """Start it; a name of our making gives way to one that is free."""
    from banger.guest import sessions

    base = request.name
    for suffix in range(1, _SUFFIXES + 1):
        if suffix > 1:
            request = request._replace(name=f"{base}-{suffix}")
        try:
            return sessions.start(target.endpoint, request)
        except Conflict as error:
            if chosen:
                raise Conflict(
                    f"{target.vm} has a session {base} already",
                    hint=f"banger vm session rm {target.vm} {base}, or another --name",
                    code="session_exists",
                ) from error
        except BangerError as error:
            if error.code == "agent_unsupported":
                with target.named(base):
                    raise
            raise
    raise Conflict(
        f"{target.vm} has {_SUFFIXES} sessions named {base}", hint="choose one with --name"
    )


def _until_ready(target: Target, session: Session, timeout_s: float) -> Session:
    from banger.guest import sessions

    with target.named(session.name):
        now, in_time = sessions.wait(
            target.endpoint, session.name, until="ready", timeout_s=timeout_s
        )
    if now.ready:
        return now
    last = _last_words(target, now)
    told = f": {last}" if last else ""
    hint = f"banger vm session logs {target.vm} {now.name}"
    if in_time:
        raise Unavailable(
            f"{now.name} ended ({describe_exit(now)}) before it was ready{told}",
            hint=hint,
            code="session_ended",
        )
    raise TimedOut(
        f"{now.name} was not ready within {timeout_s:g} s, and goes on{told}",
        hint=hint,
        code="session_not_ready",
    )


def _last_words(target: Target, session: Session) -> str:
    """Return the last lines of its stderr (its terminal's, where that is one), in one."""
    from banger.cli.session_logs import read_kept

    stream = "stdout" if session.stdin_mode == "pty" else "stderr"
    kept = session.stdout if stream == "stdout" else session.stderr
    try:
        text = read_kept(target, session.name, stream, max(kept.start, kept.end - _LAST_BYTES))
    except BangerError:
        return ""  # it is about a failure that is told anyway
    lines = [line.strip() for line in text.decode(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-_LAST_LINES:])
