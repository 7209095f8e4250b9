"""What the actions of `vm session` share: which VM, which session, and errors in their words."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from banger.cli.context import Context, endpoint_of
from banger.cli.progress import Progress, follow
from banger.errors import BangerError, Conflict, InvalidInput, NotFound, Unavailable, nearest

if TYPE_CHECKING:
    from banger.api.models import VmConnection
    from banger.guest.sessions import Session
    from banger.guest.transport import Endpoint

EXIT_FAILURE = 125  # as `cli.main` has it: what banger itself cannot do


class Target:
    """A running VM whose sessions are meant."""

    def __init__(self, connection: VmConnection) -> None:
        self.connection = connection
        self.endpoint: Endpoint = endpoint_of(connection)
        self.vm: str = connection["vm"]["name"]

    @contextlib.contextmanager
    def named(self, session: str) -> Iterator[None]:
        """Tell errors of the agent about a session in our words, with the next command."""
        try:
            yield
        except BangerError as error:
            told = self._told(error, session)
            if told is None:
                raise
            raise told from error

    def _told(self, error: BangerError, session: str) -> BangerError | None:
        if error.code == "agent_not_found":
            return self._missing(session)
        if error.code == "agent_ended":
            return Conflict(
                f"the session {session} of {self.vm} runs no more",
                hint=f"banger vm session logs {self.vm} {session}",
                code="session_ended",
            )
        if error.code == "agent_unsupported":
            return Unavailable(
                f"the agent in {self.vm} is of a banger before sessions",
                hint=f"banger vm restart {self.vm}",
                code=error.code,
            )
        return None

    def _missing(self, session: str) -> NotFound:
        from banger.guest import sessions

        close = None
        with contextlib.suppress(BangerError):
            known = [found.name for found in sessions.list_all(self.endpoint)]
            close = nearest(session, known)
        return NotFound(
            f"{self.vm} has no session {session!r}",
            hint=f"did you mean {close}?" if close else f"banger vm session list {self.vm}",
            code="session_not_found",
        )


def reach(context: Context, vm: str | None, *, progress: Progress | None = None) -> Target:
    """Return the VM that is named, or the only one that runs.

    With `progress` a stopped one is started; else it is an error.
    """
    from banger.cli.vm_ssh import connect_running

    name = _only_running(context) if vm is None else vm
    if progress is not None:
        found = context.client.get_vm(name)
        if found["state"] != "running":
            name = follow(context.client, context.client.start_vm(name), progress)["name"]
    return Target(connect_running(context, name))


def _only_running(context: Context) -> str:
    running = [vm["name"] for vm in context.client.list_vms() if vm["state"] == "running"]
    if len(running) == 1:
        return running[0]
    if not running:
        raise NotFound("no VM runs", hint="name one to start, or make one: banger vm run --detach")
    raise InvalidInput(
        f"{len(running)} VMs run: {', '.join(sorted(running))}", hint="say which, as the first word"
    )


def parse_period(option: str, text: str) -> float:
    """Parse seconds (`90`, `1.5`, `5m`) of an option."""
    from banger.cli.vm_lifecycle import parse_seconds

    try:
        return parse_seconds(text)
    except InvalidInput as error:
        message, hint = (part.replace("--timeout", option) for part in (error.message, error.hint))
        raise InvalidInput(message, hint=hint) from error


def command_line(session: Session) -> str:
    """Return a session's command as one would type it."""
    return shlex.join(word.decode(errors="replace") for word in session.argv)


def describe_state(session: Session) -> str:
    """Return a session's state and what is worth knowing: `running`, `ended 3`, `ended SIGTERM`."""
    if session.state == "running":
        return f"running, restarted {session.restarts}x" if session.restarts else "running"
    words = [session.state]
    if session.reason == "machine":
        words.append("with its machine")
    elif session.exit is not None:
        words.append(describe_exit(session))
    elif session.reason:
        words.append(session.reason.replace("_", " "))
    return " ".join(words)


def describe_exit(session: Session) -> str:
    """Return how a session ended: a code, or a signal's name."""
    import signal

    if session.exit is None:
        return "without a status"
    if session.exit.signal is None:
        return str(session.exit.code)
    try:
        return signal.Signals(session.exit.signal).name
    except ValueError:
        return f"signal {session.exit.signal}"


def exit_code(session: Session) -> int:
    """Return the status of a session that has ended; one that has none counts as our failure."""
    return EXIT_FAILURE if session.exit is None else session.exit.exit_code
