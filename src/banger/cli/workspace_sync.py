"""`vm workspace prepare` and `sync`: a copy of a repository in a VM, and keeping it up to date."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from banger.cli import output
from banger.cli.context import Context, endpoint_of
from banger.cli.progress import Progress
from banger.errors import BangerError, Conflict

if TYPE_CHECKING:
    from banger.api.models import VmConnection
    from banger.services.guest_paths import Target
    from banger.services.workspace_sync import Problem, Report
    from banger.services.workspaces import Workspace

_SHOWN = 20
_EVERY_S = 1.0
_SHARE = 20  # of looks at a repository: at most this part of a processor
_AGAIN_S = 10.0  # the guest may have settled a conflict by itself
_MAX_FAILURES = 5
_LASTING = ("not_found", "agent_unreachable", "banger_manifest", "conflict")
_MISE_FILES = (b".mise.toml", b"mise.toml", b".tool-versions")


def run_prepare(context: Context, args: argparse.Namespace) -> int:
    """Make a copy, or bring it up to date; 1 when conflicts are left."""
    from banger.cli.vm_run import begin_tooling, check_out, need_git
    from banger.cli.vm_ssh import connect_running
    from banger.services import workspace_sync
    from banger.services.workspaces import check_branch

    workspace = _workspace(args)
    if args.branch:
        check_branch(workspace, args.branch, args.from_ref)
    connection = connect_running(context, args.name)
    target = _target(connection, workspace)
    with Progress(quiet=args.quiet or args.json) as progress:
        if args.branch:
            need_git(connection)
        options = workspace_sync.Options(
            overwrite=args.overwrite,
            shallow=None if args.mode is None else args.mode == "shallow",
            untracked=args.include_untracked,
            warn=progress.warning,
            progress=progress.progress,
            stage=progress.stage,
        )
        report = workspace_sync.bring_up_to_date(target, options)
        if args.branch and not report.conflicts:
            progress.stage(f"check out {args.branch}")
            if report.fresh or not _go_to_branch(target, args.branch, args.from_ref):
                check_out(connection, workspace, args.branch, args.from_ref)
        told = report.fresh or any(path in _MISE_FILES for path in report.paths)
        if told and not args.no_bootstrap:
            begin_tooling(connection, workspace, progress)
    return _tell(context, args, target, report, _worth_a_hint(args, report))


def run_sync(context: Context, args: argparse.Namespace) -> int:
    """Send what changed here; 1 when conflicts are left. With --watch, until told to end."""
    from banger.cli.vm_ssh import connect_running
    from banger.services import workspace_sync

    workspace = _workspace(args)
    connection = connect_running(context, args.name)
    target = _target(connection, workspace)
    if args.watch:
        return _Watch(context, args, connection, target).run()
    with Progress(quiet=args.quiet or args.json) as progress:
        options = workspace_sync.Options(
            warn=progress.warning, progress=progress.progress, stage=progress.stage
        )
        report = workspace_sync.bring_up_to_date(target, options, make=False)
    return _tell(context, args, target, report, _worth_a_hint(args, report))


def _workspace(args: argparse.Namespace) -> Workspace:
    from banger.services.guest_paths import check_guest_path
    from banger.services.workspaces import open_workspace

    directory = None if args.guest_path is None else check_guest_path(args.guest_path)
    return open_workspace(args.path)._replace(directory=directory)


def _target(connection: VmConnection, workspace: Workspace) -> Target:
    from banger.services.guest_paths import Target

    return Target(connection["vm"]["name"], endpoint_of(connection), workspace)


def _go_to_branch(target: Target, name: str, ref: str | None) -> bool:
    """Check out a branch that an earlier run, or the guest itself, has begun there."""
    from banger.guest import agent

    words = ["git", "-C", target.workspace.guest_directory]

    def ask(*more: str) -> tuple[int, bytes]:
        argv = [os.fsencode(word) for word in [*words, *more]]
        status, _, stderr = agent.capture_exec(target.endpoint, argv, timeout_s=600)
        return status.exit_code, stderr

    if ask("rev-parse", "-q", "--verify", f"refs/heads/{name}")[0] != 0:
        return False
    if ref is not None:
        raise Conflict(
            f"the branch {name} exists already in {target.vm}",
            hint="leave --from out to check it out, or choose another name",
        )
    code, stderr = ask("checkout", "-q", name, "--")
    if code != 0:
        lines = stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        raise Conflict(f"--branch {name}: git says: {lines[-1]}", hint="commit or stash it there")
    return True


# -- what is said


def _tell(
    context: Context, args: argparse.Namespace, target: Target, report: Report, hint: str
) -> int:
    if context.json:
        output.write_json(_body(target, report))
    else:
        for line in _lines(report.conflicts):
            output.warn(line)
        if not args.quiet:
            output.notice(_summary(target, report))
        if report.conflicts:
            output.notice(hint)
    return 1 if report.conflicts else 0


def _body(target: Target, report: Report) -> dict[str, object]:
    return {
        "vm": target.vm,
        "guest_path": target.workspace.guest_directory,
        "sent": report.sent,
        "deleted": report.deleted,
        "bytes": report.size_bytes,
        "git": report.git,
        "conflicts": [_conflict(problem) for problem in report.conflicts],
    }


def _conflict(problem: Problem) -> dict[str, str]:
    return {"path": os.fsdecode(problem.path), "reason": problem.reason}


def _lines(problems: list[Problem]) -> Iterator[str]:
    for problem in problems[:_SHOWN]:
        yield f"{os.fsdecode(problem.path)} stays as it is there: {problem.reason}"
    if len(problems) > _SHOWN:
        yield f"and {len(problems) - _SHOWN} more of these"


def _summary(target: Target, report: Report) -> str:
    where = f"{target.vm}:{target.workspace.guest_directory}"
    parts = []
    if report.sent or report.fresh:
        parts.append("1 file sent" if report.sent == 1 else f"{report.sent} files sent")
    if report.deleted:
        parts.append(f"{report.deleted} deleted")
    if report.git == "sent" and not report.fresh:
        parts.append(".git sent")
    if not parts:
        return f"{where}: nothing to send"
    return f"{where}: {', '.join(parts)} ({output.format_bytes(report.size_bytes)})"


def _worth_a_hint(args: argparse.Namespace, report: Report) -> str:
    path = f" {args.path}" if args.path != "." else ""
    there = f" --guest-path {args.guest_path}" if args.guest_path else ""
    rest = f"{args.name}{path}{there}"
    if any(problem.path.rpartition(b"/")[2] == b".git" for problem in report.conflicts):
        return (
            f"`banger vm workspace pull {rest}` brings its commits here; "
            f"`banger vm workspace prepare {rest} --overwrite` replaces what conflicts"
        )
    return (
        f"`banger vm workspace diff {rest}` shows what it has; "
        f"`banger vm workspace prepare {rest} --overwrite` replaces what conflicts"
    )


# -- watching


class _Watch:
    """Looks at the repository every second and sends what changed, until the VM or we end."""

    def __init__(
        self, context: Context, args: argparse.Namespace, connection: VmConnection, target: Target
    ) -> None:
        self._json = context.json
        self._args = args
        self._target = target
        self._pid = connection["vm"]["pid"]
        self._told: set[Problem] = set()
        self._warned: set[str] = set()

    def run(self) -> int:
        """Return 0 when the VM has stopped; Ctrl-C ends it in `main`."""
        from banger.services.workspace_snapshot import take_snapshot
        from banger.services.workspaces import FULL

        workspace = self._target.workspace
        workspace = workspace._replace(include_untracked=self._send().untracked)
        self._say(f"watching {workspace.top}; Ctrl-C ends it")
        sent: dict[bytes, bytes] = {}
        again_at = time.monotonic()
        failures = 0
        wait = self._wait()
        while True:
            begin = time.monotonic()
            entries = take_snapshot(workspace, FULL, self._warn).rows
            looked_s = time.monotonic() - begin
            if entries != sent or (self._told and begin >= again_at):
                try:
                    self._send()
                    sent, failures = entries, 0
                except BangerError as error:
                    # A guest at work may be in the way of one run; of many in turn, something is.
                    failures += 1
                    if wait(0.0):
                        break
                    if error.code in _LASTING or failures >= _MAX_FAILURES:
                        raise
                    self._warn(f"tried again soon: {error.message}")
                again_at = time.monotonic() + _AGAIN_S
            if wait(max(_EVERY_S, looked_s * _SHARE)):
                break
        self._say(f"{self._target.vm} has stopped")
        return 0

    def _wait(self) -> Callable[[float], bool]:
        """Return what waits for some seconds, and tells whether the VM ended meanwhile."""
        ended = -1
        if self._pid:
            with contextlib.suppress(OSError):  # another user's, or gone: the agent will tell
                ended = os.pidfd_open(self._pid)
        poll = select.poll()
        if ended >= 0:
            poll.register(ended, select.POLLIN)
        return lambda seconds: bool(poll.poll(int(seconds * 1000)))

    def _send(self) -> Report:
        """Send what changed, and tell it."""
        from banger.services import workspace_sync

        options = workspace_sync.Options(warn=self._warn)
        report = workspace_sync.bring_up_to_date(self._target, options, make=False)
        new = sorted(set(report.conflicts) - self._told)
        self._told = set(report.conflicts)
        done = bool(report.sent or report.deleted or report.git == "sent")
        if self._json:
            if done or new:
                body = {**_body(self._target, report), "conflicts": [*map(_conflict, new)]}
                output.write_json_line({"type": "sync", **body}, sys.stdout)
            return report
        for line in _lines(new):
            output.warn(line)
        if new:
            output.notice(_worth_a_hint(self._args, report))
        if done:
            self._say(_summary(self._target, report))
        return report

    def _say(self, text: str) -> None:
        if not self._args.quiet and not self._json:
            output.notice(text)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            output.warn(message)
