"""The one hierarchy of designed errors.

Owns codes, messages and hints. Leaves rendering to `cli.output` (terminal) and
`daemon.server` (HTTP), each of which maps this hierarchy in one place.
"""

from __future__ import annotations


class BangerError(Exception):
    """A failure worth a sentence: what was being done, why it failed, what to do next.

    `message` is one line without a final stop, `hint` names the next command (or is
    empty), `code` is stable and appears in `--json` output and HTTP answers.
    """

    code = "internal"
    http_status = 500

    def __init__(self, message: str, *, hint: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return self.message


class UsageError(BangerError):
    """The words of the command line are wrong: exit 2."""

    code = "usage"
    http_status = 400


class InvalidInput(BangerError):
    """A value is outside what banger takes (a name, a size, a path): exit 125."""

    code = "invalid_input"
    http_status = 400


class NotFound(BangerError):
    """Something named does not exist."""

    code = "not_found"
    http_status = 404


class Conflict(BangerError):
    """The thing exists already, is in use, or is in a state that forbids the step."""

    code = "conflict"
    http_status = 409


class Unavailable(BangerError):
    """Something outside banger is missing or does not answer: a program, an archive, an agent."""

    code = "unavailable"
    http_status = 503


class CommandFailed(Unavailable):
    """A host command ended with a status other than zero; `stderr_tail` holds its last lines."""

    code = "command_failed"

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        code: str | None = None,
        exit_status: int = -1,
        stderr_tail: str = "",
    ) -> None:
        super().__init__(message, hint=hint, code=code)
        self.exit_status = exit_status
        self.stderr_tail = stderr_tail


class NoSpace(BangerError):
    """A file system is full."""

    code = "no_space"
    http_status = 507


class Corrupted(BangerError):
    """State on disk does not read back as it was written."""

    code = "corrupted"
    http_status = 500


class VmmFailed(BangerError):
    """The VMM did not start, died, or refused a request; the message carries its own last words."""

    code = "vmm_failed"
    http_status = 502


class TimedOut(BangerError):
    """A bounded wait ran out."""

    code = "timed_out"
    http_status = 504


class Cancelled(BangerError):
    """An operation was cancelled on request; what it had begun is swept."""

    code = "cancelled"
    http_status = 499


def nearest(name: str, known: list[str]) -> str | None:
    """Return the known name most like `name`, or None when nothing is close."""
    import difflib  # only on the error path: difflib costs 8 ms of the command line's start

    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return found[0] if found else None
