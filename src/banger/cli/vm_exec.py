"""`vm exec`: a command in a running VM, through the agent; and what `vm run -- CMD` shares."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from banger.cli import output
from banger.cli.context import Context, endpoint_of
from banger.cli.parsing import Parser, add_execution, add_forward_agent, add_json, add_quiet
from banger.cli.progress import Progress
from banger.errors import InvalidInput, TimedOut, UsageError

if TYPE_CHECKING:
    from banger.api.models import VmConnection
    from banger.guest.agent import ExecRequest, ExitStatus

# The full image needs 40 s under emulation on an idle host, minutes on a busy one.
_SERVICES_TIMEOUT_S = 600.0
_RETRY_S = 0.2


def build_exec(parser: Parser) -> None:
    """Arguments of `vm exec`."""
    parser.description = (
        "Run a command in a running VM and exit with its status (128+n when signal n ended it,\n"
        "126 and 127 as a shell, 124 past --timeout, 125 when banger itself failed).\n"
        "Stdin is passed when it is not a terminal, or with -i. Stdout and stderr stay apart\n"
        "and are binary-safe; nothing of banger's is ever written to stdout."
    )
    parser.takes_command = True
    parser.command_after = 1
    parser.add_argument("name", metavar="NAME")
    add_execution(parser)
    add_forward_agent(parser)
    add_quiet(parser)
    add_json(parser, "write the result as a line of JSON to stderr")
    parser.examples(
        ("banger vm exec box -- make test", "run it, exit with its status"),
        ("banger vm exec -it box -- bash", "a shell without ssh"),
        ("tar c . | banger vm exec box -- tar x -C /srv", "stdin goes along"),
        ("banger vm exec -d box -- ./serve", "start it and return"),
        ("banger vm exec --forward-agent box -- git push", "with the keys of your ssh-agent"),
    )


def run_exec(context: Context, args: argparse.Namespace) -> int:
    """Run a command in a running VM."""
    from banger.cli.vm_ssh import connect_running

    if args.command is None:
        raise UsageError("no command given", hint=f"banger vm exec {args.name} -- COMMAND")
    # Before the daemon is asked: a bad value is told at once.
    request = make_request(args, args.command)
    check_forwarding(args)
    connection = connect_running(context, args.name)
    if args.wait:
        with Progress(quiet=args.quiet) as progress:
            wait_for_services(connection, progress)
    with ssh_agent_for(connection, request, wanted=args.forward_agent) as request:
        return execute(connection, request, json=context.json)


def check_forwarding(args: argparse.Namespace) -> None:
    """Tell at once, before a VM is made or asked, when --forward-agent cannot be had."""
    if not args.forward_agent:
        return
    if getattr(args, "detach", False):
        raise InvalidInput(
            "--forward-agent lasts as long as this command, and -d ends it at once",
            hint="leave one of them out",
        )
    from banger.guest import ssh_agent

    if ssh_agent.count_keys(ssh_agent.find_agent()):
        return
    text = "your ssh-agent holds no key yet: `ssh-add` gives it one"
    if getattr(args, "json", False):
        output.write_json_line({"type": "warning", "message": text}, sys.stderr)
    else:
        output.warn(text)


@contextlib.contextmanager
def ssh_agent_for(
    connection: VmConnection, request: ExecRequest, *, wanted: bool
) -> Iterator[ExecRequest]:
    """Forward our user's ssh-agent for as long as the context; yield the request that uses it."""
    if not wanted:
        yield request
        return
    from banger.guest.ssh_agent import ForwardedAgent, find_agent

    forwarded = ForwardedAgent(endpoint_of(connection), user=request.user, agent_path=find_agent())
    with forwarded:
        yield request._replace(env={**request.env, b"SSH_AUTH_SOCK": forwarded.guest_path})
    if forwarded.error is not None:
        output.warn(f"the ssh-agent was not forwarded to the end: {forwarded.error.message}")


def wait_for_services(connection: VmConnection, progress: Progress) -> None:
    """Wait until the guest's systemd has started what it starts; no systemd, no wait.

    A unit that failed is not waited for and is no error here. Raises TimedOut.
    """
    from banger.guest import agent

    endpoint = endpoint_of(connection)
    progress.stage("wait for the guest's services")
    deadline = time.monotonic() + _SERVICES_TIMEOUT_S
    argv = [b"systemctl", b"is-system-running", b"--wait"]
    while (left_s := deadline - time.monotonic()) > 0:
        status, said, _ = agent.capture_exec(endpoint, argv, timeout_s=left_s)
        if status.code == 127 or said.strip() in (b"running", b"degraded"):
            return
        time.sleep(_RETRY_S)  # systemd is not PID 1 yet, or its socket is not there
    name = connection["vm"]["name"]
    raise TimedOut(
        f"the services of {name} were not up within {_SERVICES_TIMEOUT_S:.0f} s",
        hint=f"banger vm exec {name} -- systemctl list-jobs",
    )


def make_request(
    args: argparse.Namespace, command: list[str], *, directory: str | None = None
) -> ExecRequest:
    """Turn the options of `add_execution` into a request; `directory` is the default cwd."""
    from banger.guest.agent import ExecRequest

    timeout_s = None
    if args.timeout is not None:
        from banger.cli.vm_lifecycle import parse_seconds

        timeout_s = parse_seconds(args.timeout)
    if args.detach and (args.tty or args.interactive):
        raise InvalidInput("-d goes with neither -t nor -i: nobody is attached to what it starts")
    cwd = args.cwd if args.cwd is not None else directory
    passes_stdin = args.interactive or not output.is_terminal(sys.stdin)
    return ExecRequest(
        argv=[os.fsencode(word) for word in command],
        env=parse_environment(args.env),
        cwd=None if cwd is None else os.fsencode(cwd),
        user=args.user or "root",
        tty=terminal() if args.tty else None,
        stdin="pipe" if passes_stdin and not args.detach else "null",
        timeout_s=timeout_s,
        detach=args.detach,
    )


def parse_environment(pairs: list[str]) -> dict[bytes, bytes]:
    """Parse `K=V` (or `K`: the host's own value, when it has one)."""
    found: dict[bytes, bytes] = {}
    for pair in pairs:
        name, separator, value = os.fsencode(pair).partition(b"=")
        if not name:
            raise InvalidInput(f"--env takes K=V, not {pair!r}", hint="for example --env CI=1")
        if separator:
            found[name] = value
        elif name in os.environb:
            found[name] = os.environb[name]
    return found


def terminal() -> tuple[int, int, str]:
    """Return rows, columns and kind of our terminal; the usual ones where there is none."""
    for fd in (0, 1, 2):
        try:
            columns, rows = os.get_terminal_size(fd)
        except OSError:
            continue
        if columns and rows:
            return rows, columns, os.environ.get("TERM") or "xterm-256color"
    return 24, 80, os.environ.get("TERM") or "xterm-256color"


def execute(connection: VmConnection, request: ExecRequest, *, json: bool) -> int:
    """Run a request over our own stdin, stdout and stderr and return the exit status.

    A detached one is only started: its output is in a file of the guest, named on stderr.
    """
    from banger.cli import attach

    endpoint = endpoint_of(connection)
    if request.detach:
        return _start(connection, request, json=json)
    sys.stdout.flush()
    sys.stderr.flush()
    status = attach.run_exec(
        endpoint,
        request,
        stdin_fd=0 if request.stdin == "pipe" else None,
        stdout_fd=1,
        stderr_fd=2,
    )
    code = status.exit_code
    if json:
        output.write_json_line(_result(connection, status, code), sys.stderr)
    return code


def _start(connection: VmConnection, request: ExecRequest, *, json: bool) -> int:
    from banger.guest import agent

    started = agent.start_detached(endpoint_of(connection), request)
    name = connection["vm"]["name"]
    if json:
        result = {"name": name, "pid": started.get("pid"), "log": started.get("log")}
        output.write_json_line({"type": "result", "result": result}, sys.stderr)
    else:
        log = started.get("log")
        output.notice(f"started in {name} (pid {started.get('pid')}); its output is in {log}")
    return 0


def _result(connection: VmConnection, status: ExitStatus, code: int) -> dict[str, Any]:
    return {
        "type": "result",
        "result": {
            "name": connection["vm"]["name"],
            "exit_code": code,
            "signal": status.signal,
            "timed_out": status.timed_out,
        },
    }


VERBS = {"exec": (build_exec, run_exec)}
