"""git on this host, in a repository that may be hostile.

Owns how it is run: no hook, filter, fsmonitor or pager of the repository's, no transport, no lazy
fetch, no prompt, and no index refresh. What is asked of it is the callers'.
"""

from __future__ import annotations

import os
import subprocess
from typing import IO

from banger.errors import InvalidInput, Unavailable

_TIMEOUT_S = 300.0
_SAFE_OPTIONS = (
    "-c", "core.fsmonitor=false",
    "-c", "core.hooksPath=/dev/null",
    "-c", "core.pager=cat",
    "-c", "core.sshCommand=false",
    "-c", "core.untrackedCache=keep",
    "-c", "protocol.allow=never",
)  # fmt: skip
# What says which configuration is whose stays; what redirects git to another repository
# (a git hook that runs banger has GIT_DIR and GIT_INDEX_FILE set) goes.
_KEPT_VARIABLES = ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM")


def _environment() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_") or name in _KEPT_VARIABLES
    }
    return {
        **kept,
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_ALLOW_PROTOCOL": "none",
        "LC_ALL": "C",
    }


def git(
    directory: bytes | str,
    *arguments: str | bytes,
    check: bool = True,
    stdin: bytes | IO[bytes] = b"",
) -> bytes:
    """Run git and return its stdout; empty when it fails and `check` is false.

    A file as `stdin` is read from where its descriptor stands. Raises Unavailable and InvalidInput.
    """
    try:
        done = subprocess.run(
            ["git", *_SAFE_OPTIONS, *arguments],
            cwd=directory,
            env=_environment(),
            input=stdin if isinstance(stdin, bytes) else None,
            stdin=None if isinstance(stdin, bytes) else stdin,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise Unavailable("git is not installed", hint="apt install git") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"git did not finish in {_TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        if not check:
            return b""
        raise failure(os.fsdecode(directory), done.stderr.decode(errors="replace"))
    return done.stdout


def failure(directory: str, stderr: str) -> Exception:
    """Return the error for what git said of a repository."""
    lines = stderr.strip().splitlines() or ["it said nothing"]
    if "dubious ownership" in stderr:
        return InvalidInput(
            f"git does not trust {directory}: it belongs to another user",
            hint=f"git config --global --add safe.directory {directory}",
        )
    if "not a git repository" in stderr:
        return InvalidInput(
            f"{directory} is not in a git repository",
            hint=f"make it one: git -C {directory} init",
        )
    return Unavailable(f"git cannot read {directory}: {lines[-1].removeprefix('fatal: ')}")
