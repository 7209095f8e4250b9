"""`vm workspace`: what changed in a VM's copy of a repository, and bringing it home.

The way there, `prepare` and `sync`, is `cli.workspace_sync`.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING

from banger.cli import output
from banger.cli.context import Context, endpoint_of
from banger.cli.parsing import Parser, add_json, add_quiet
from banger.cli.progress import Progress
from banger.errors import InvalidInput, NotFound, UsageError

if TYPE_CHECKING:
    from banger.services.guest_copies import Copy, Pulled, State

_SHOWN_COMMITS = 20


def build_workspace(parser: Parser) -> None:
    """Arguments of `vm workspace`."""
    parser.usage = "banger vm workspace prepare|sync|status|diff|export|pull VM [PATH] [OPTIONS]"
    parser.description = (
        "A repository's copy in a VM: what changed there, bringing it home, and bringing it up\n"
        "to date.\n"
        "  prepare  copy the repository in, or send what changed here since\n"
        "  sync     send what changed here since; with --watch, as it happens\n"
        "  status   commits that are not here, and what is not committed\n"
        "  diff     from the last commit both have to the files there, for `git apply`\n"
        "  export   the same into a file, or the commits as a git bundle\n"
        "  pull     its branches become banger/VM/BRANCH here; nothing is merged\n"
        "PATH is the repository here (default: the one you are in)."
    )
    parser.add_argument(
        "action",
        choices=("prepare", "sync", "status", "diff", "export", "pull"),
        metavar="prepare|sync|status|diff|export|pull",
    )
    parser.add_argument("name", metavar="VM")
    parser.add_argument("path", metavar="PATH", nargs="?", default=".")
    parser.add_argument(
        "--guest-path", metavar="DIR", help="where the copy is (default: /root/<its name>)"
    )
    parser.add_argument("--stat", action="store_true", help="diff: names and sizes only")
    parser.add_argument("-o", "--output", metavar="FILE", help="export: write here, not to stdout")
    parser.add_argument(
        "--format", choices=("patch", "bundle"), help="export: a diff (default) or a git bundle"
    )
    parser.add_argument(
        "--uncommitted",
        action="store_true",
        help="pull, export as bundle: what is not committed comes as one commit more",
    )
    there = parser.add_argument_group("prepare and sync")
    there.add_argument("--watch", action="store_true", help="sync: go on until Ctrl-C")
    there.add_argument(
        "--overwrite",
        action="store_true",
        help="prepare: what changed on both sides becomes what it is here",
    )
    there.add_argument(
        "--mode",
        choices=("full", "shallow"),
        help="prepare: the whole history (default), or the newest commit",
    )
    there.add_argument(
        "--include-untracked",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="prepare: untracked files that are not ignored too (default: yes)",
    )
    there.add_argument(
        "--branch", metavar="NAME", help="prepare: check out this branch there; a new one is begun"
    )
    there.add_argument("--from", dest="from_ref", metavar="REF", help="where a new one begins")
    there.add_argument(
        "--no-bootstrap", action="store_true", help="prepare: leave the `mise install` out"
    )
    add_quiet(parser)
    add_json(parser)
    parser.examples(
        ("banger vm workspace prepare box ./repo", "a copy at /root/repo, or the newest of it"),
        ("banger vm workspace sync box --watch", "edit here, run there"),
        ("banger vm workspace status box", "what is there that is not here"),
        ("banger vm workspace pull box", "then: git merge banger/box/main"),
        ("banger vm workspace diff box | git apply", "its changes, in the files here"),
        ("banger vm workspace export box ./repo -o box.bundle --format bundle", ""),
    )


def run_workspace(context: Context, args: argparse.Namespace) -> int:
    """Show or fetch what a copy has."""
    from banger.cli.vm_ssh import connect_running
    from banger.services.guest_copies import Copy
    from banger.services.workspaces import open_workspace

    _check(args)
    if args.action in ("prepare", "sync"):
        from banger.cli.workspace_sync import run_prepare, run_sync

        return (run_prepare if args.action == "prepare" else run_sync)(context, args)
    workspace = open_workspace(args.path)
    connection = connect_running(context, args.name)
    directory = args.guest_path or workspace.guest_directory
    copy = Copy(connection["vm"]["name"], endpoint_of(connection), directory, workspace)
    with Progress(quiet=args.quiet, json_lines=False) as progress:
        if args.action == "status":
            return _status(context, copy, progress)
        if args.action == "diff":
            progress.stage("asking git in the VM")
            return _diff(copy, progress, stat=args.stat)
        if args.action == "export":
            return _export(context, copy, args, progress)
        return _pull(context, copy, args, progress)


def _check(args: argparse.Namespace) -> None:
    for option, actions in (
        ("stat", ("diff",)),
        ("output", ("export",)),
        ("format", ("export",)),
        ("uncommitted", ("pull", "export")),
        ("watch", ("sync",)),
        ("overwrite", ("prepare",)),
        ("mode", ("prepare",)),
        ("include_untracked", ("prepare",)),
        ("branch", ("prepare",)),
        ("from_ref", ("prepare",)),
        ("no_bootstrap", ("prepare",)),
    ):
        value = getattr(args, option)
        # --no-include-untracked is False, and given.
        given = value is not None if option == "include_untracked" else bool(value)
        if given and args.action not in actions:
            name = "from" if option == "from_ref" else option.replace("_", "-")
            raise UsageError(f"--{name} is for {' and '.join(actions)}")
    if args.from_ref and not args.branch:
        raise UsageError("--from says where a new branch begins", hint="add --branch NAME")
    if args.json and args.action == "diff":
        raise UsageError("a diff is text", hint="`vm workspace status --json` lists what changed")
    if args.uncommitted and args.action == "export" and args.format != "bundle":
        raise UsageError("a patch holds what is not committed anyway", hint="leave it out")
    if args.guest_path is not None and not args.guest_path.startswith("/"):
        raise UsageError("--guest-path is an absolute path in the VM", hint="as /root/repo")


def _status(context: Context, copy: Copy, progress: Progress) -> int:
    from banger.services import guest_copies

    progress.stage("asking git in the VM")
    state = guest_copies.read_state(copy)
    progress.close()
    if context.json:
        output.write_json(
            {
                "vm": copy.vm,
                "guest_path": copy.directory,
                "branch": state.branch,
                "base": state.base,
                "commits": [commit._asdict() for commit in state.commits],
                "changes": [change._asdict() for change in state.changes],
            }
        )
        return 0
    _show(copy, state)
    return 0


def _show(copy: Copy, state: State) -> None:
    where = f"on {state.branch}" if state.branch else "on no branch"
    output.write_line(f"{copy.vm}:{copy.directory}, {where}")
    if not state.commits and not state.changes:
        output.write_line("nothing that is not here")
        return
    if state.commits:
        output.write_line(f"{_count(len(state.commits))} not here:")
        for commit in state.commits[:_SHOWN_COMMITS]:
            output.write_line(f"  {commit.id[:12]} {commit.subject}")
        if len(state.commits) > _SHOWN_COMMITS:
            output.write_line(f"  and {len(state.commits) - _SHOWN_COMMITS} more")
    if state.changes:
        output.write_line("not committed:")
        for change in state.changes:
            output.write_line(f"  {change.status} {change.path}")
    uncommitted = " --uncommitted" if state.changes else ""
    elsewhere = copy.directory != copy.workspace.guest_directory
    there = f" --guest-path {copy.directory}" if elsewhere else ""
    output.notice(f"`banger vm workspace pull{uncommitted}{there} {copy.vm}` brings it here")


def _diff(copy: Copy, progress: Progress, *, stat: bool) -> int:
    from banger.services import guest_copies

    guest_copies.write_diff(copy, _to_stdout(progress), stat=stat)
    sys.stdout.buffer.flush()
    return 0


def _to_stdout(progress: Progress) -> Callable[[bytes], object]:
    """Return what writes a guest's bytes: as they are into a pipe, escaped to a terminal."""
    # A character may be cut in two between pieces.
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def take(data: bytes) -> None:
        progress.close()
        if output.is_terminal(sys.stdout):
            sys.stdout.write(output.escape(decoder.decode(data), keep="\n\t"))
        else:
            sys.stdout.buffer.write(data)

    return take


def _export(context: Context, copy: Copy, args: argparse.Namespace, progress: Progress) -> int:
    from banger.services import guest_copies

    progress.stage("asking git in the VM")
    if args.output is None and args.format != "bundle":
        if context.json:
            raise UsageError("--json says what was written to a file", hint="add -o FILE")
        return _diff(copy, progress, stat=False)
    if args.output is None:
        raise UsageError("a bundle is for a file", hint="add -o FILE")
    with _written(args.output) as file:
        if args.format == "bundle":
            if not guest_copies.write_bundle(copy, file, uncommitted=args.uncommitted):
                raise NotFound(
                    f"{copy.vm} has no commit that is not here",
                    hint="--uncommitted makes one of what is not committed, --format patch a diff",
                )
        else:
            guest_copies.write_diff(copy, file.write)
        size = file.tell()
    progress.close()
    if context.json:
        output.write_json({"path": os.path.abspath(args.output), "size_bytes": size})
    else:
        output.notice(f"{args.output}: {output.format_bytes(size)}")
    return 0


@contextlib.contextmanager
def _written(path: str) -> Iterator[IO[bytes]]:
    """Yield a file that takes the place of `path` when all of it is there."""
    from pathlib import Path

    from banger.host.files import no_space_named

    if os.path.lexists(path) and not os.path.isfile(path):
        # A device of root's would become a file.
        raise InvalidInput(f"{path} is no plain file", hint="leave -o out, and redirect stdout")
    path = os.path.realpath(path)
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        raise NotFound(f"{directory} does not exist")
    try:
        handle, name = tempfile.mkstemp(prefix=".banger-", dir=directory)
    except OSError as error:
        raise InvalidInput(f"cannot write in {directory}: {error.strerror}") from error
    try:
        with no_space_named(Path(directory)), os.fdopen(handle, "wb") as file:
            yield file
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _pull(context: Context, copy: Copy, args: argparse.Namespace, progress: Progress) -> int:
    from banger.services import guest_copies

    progress.stage(f"pull {copy.directory} of {copy.vm}")
    pulled = guest_copies.pull(copy, uncommitted=args.uncommitted, progress=progress.progress)
    progress.close()
    if context.json:
        output.write_json([one._asdict() for one in pulled])
    elif not pulled:
        output.notice(f"{copy.vm} has nothing that is not here")
    else:
        for one in pulled:
            output.write_line(_line(one))
    return 0


def _line(one: Pulled) -> str:
    name = one.ref.removeprefix("refs/remotes/")
    was = "new" if one.old is None else f"was {one.old[:12]}"
    return f"{name} {one.new[:12]} ({was}; {_count(one.commits)} not here before)"


def _count(commits: int) -> str:
    return "1 commit" if commits == 1 else f"{commits} commits"


VERBS = {"workspace": (build_workspace, run_workspace)}
