"""`vm run`: make a VM, copy a repository in, then a shell or a command."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from banger.cli import output
from banger.cli.context import Context, endpoint_of
from banger.cli.parsing import (
    CREATION_FIELDS,
    Parser,
    add_creation,
    add_execution,
    add_forward_agent,
    add_json,
    add_quiet,
)
from banger.cli.progress import Progress, follow
from banger.errors import (
    BangerError,
    Conflict,
    InvalidInput,
    NotFound,
    Unavailable,
    UsageError,
)

if TYPE_CHECKING:
    from banger.api.models import Image, Vm, VmConnection, VmCreate
    from banger.guest.agent import ExecRequest
    from banger.services.workspaces import Workspace

_MARKER = "told-about-emulation"
_MISE_FILES = (".mise.toml", "mise.toml", ".tool-versions")
# Of log and directory. Half an hour is a toolchain from source on a slow, emulated machine.
_TOOLING = (
    'mkdir -p "${1%/*}"; exec >"$1" 2>&1; cd "$2" || exit; '
    'echo "mise install in $2"; command -v mise || { echo "this image has no mise"; exit; }; '
    'MISE_YES=1 MISE_TRUSTED_CONFIG_PATHS="$2" timeout 1800 mise install; echo "ended with $?"'
)


def build_run(parser: Parser) -> None:
    """Arguments of `vm run`."""
    parser.usage = "banger vm run [PATH] [OPTIONS] [-- COMMAND...]"
    parser.description = (
        "Make a VM and enter it. With PATH, the git repository there is copied to\n"
        "/root/<its name> first (tracked files, and untracked ones that are not ignored).\n"
        "With a command, run that instead of a shell and exit with its status; with\n"
        "--entrypoint, what the image says it is for.\n"
        "The VM stays until you delete it, unless --rm is given."
    )
    parser.takes_command = True
    parser.add_argument("path", nargs="?", metavar="PATH", help="a git repository to copy in")
    add_creation(parser)
    group = parser.add_argument_group("what happens to it")
    group.add_argument("--rm", action="store_true", help="delete the VM when this command ends")
    # A flag: the image's own words run, and what follows `--` takes the place of its command.
    group.add_argument(
        "--entrypoint",
        action="store_true",
        help="run the image's entrypoint and command as its user, in its directory; "
        "-- ARGS in place of the command",
    )
    group.add_argument(
        "--branch", metavar="NAME", help="check out this branch in the copy; a new one is begun"
    )
    group.add_argument("--from", dest="from_ref", metavar="REF", help="where a new one begins")
    group.add_argument(
        "--include-untracked",
        action=argparse.BooleanOptionalAction,
        help="copy untracked files that are not ignored too (default: yes)",
    )
    group.add_argument(
        "--no-bootstrap",
        action="store_true",
        help="leave out the `mise install` that begins in the background where the repository "
        "has a .mise.toml, mise.toml or .tool-versions",
    )
    add_execution(parser)
    add_forward_agent(parser)
    add_quiet(parser)
    add_json(
        parser,
        "print the VM as JSON and open no shell; with a command, write events and the "
        "result as lines of JSON to stderr",
    )
    parser.examples(
        ("banger vm run", "a clean shell"),
        ("banger vm run ./repo", "a shell in a copy of the repository"),
        ("banger vm run ./repo -- make test", "run it there, exit with its status"),
        ("banger vm run --rm -- uname -a", "and leave nothing behind"),
        ("banger vm run --name box", "make `box`, or enter it again"),
        ("banger vm run -d --name web ./site -- ./serve", "start it and return"),
        ("banger vm run --wait ./repo -- docker compose up", "once the guest's Docker is there"),
        ("banger vm run --image app --entrypoint", "what an imported image is for"),
    )


def run_run(context: Context, args: argparse.Namespace) -> int:
    """Make a VM, fill it, and run what was asked for."""
    from banger.cli.vm_exec import check_forwarding

    _check_combination(args)
    check_forwarding(args)
    if _may_enter_again(args):
        vm = _existing(context, args.name)
        if vm is not None:
            return _enter_again(context, vm, args)
    request = _creation(args)
    workspace = _open_workspace(args)
    directory = None if workspace is None else workspace.guest_directory
    execution = None
    if args.entrypoint:
        _check_entrypoint(context, args)
    elif args.command is not None:
        from banger.cli.vm_exec import make_request

        execution = make_request(args, args.command, directory=directory)

    with Progress(quiet=args.quiet, json_lines=args.json) as progress:
        vm = create(context, request, progress)
        with _deleted_at_end(context, vm["name"], wanted=args.rm):
            _tell_emulation(context, vm, progress)
            with deleted_on_failure(context, vm["name"], wanted=not args.rm):
                connection = context.client.connect_vm(vm["name"])
                if workspace is not None:
                    copy_in(connection, workspace, progress, branch=args.branch, ref=args.from_ref)
                    if not args.no_bootstrap:
                        begin_tooling(connection, workspace, progress)
                if args.entrypoint:
                    execution = _entrypoint(args, context.client.get_image(vm["image"]))
                    if not args.cwd:
                        _make_directory(connection, execution.cwd)
            return _finish(
                context,
                connection,
                args,
                execution=execution,
                directory=directory,
                progress=progress,
            )


def _check_combination(args: argparse.Namespace) -> None:
    if args.path is None and (args.branch or args.from_ref):
        raise InvalidInput(
            "--branch and --from need a repository", hint="banger vm run ./repo --branch NAME"
        )
    if args.from_ref and not args.branch:
        raise InvalidInput("--from needs --branch", hint="add --branch NAME")
    if args.path is None and args.include_untracked is not None:
        raise InvalidInput(
            "--include-untracked needs a repository",
            hint="banger vm run ./repo --include-untracked",
        )
    if args.rm and args.detach:
        raise InvalidInput(
            "--rm deletes the VM when this command ends, and -d ends it at once",
            hint="leave one of them out",
        )
    if args.command is None and not args.entrypoint:
        given = [
            name
            for name in ("cwd", "user", "timeout", "tty", "interactive", "wait")
            if getattr(args, name)
        ]
        if given or args.env:
            option = f"--{given[0]}" if given else "--env"
            raise UsageError(f"{option} is for a command", hint="banger vm run ... -- COMMAND")
        if args.forward_agent and args.json:
            raise UsageError(
                "--forward-agent is for a shell or a command, and --json alone runs neither",
                hint="banger vm run ... -- COMMAND",
            )


# -- entering again


def _may_enter_again(args: argparse.Namespace) -> bool:
    creation = [field for field in CREATION_FIELDS if field != "name"]
    given = [field for field in creation if getattr(args, field) is not None]
    asks_more = (
        *(args.path, args.command is not None, args.entrypoint),
        *(args.rm, args.detach, args.json),
    )
    return bool(args.name) and not given and not any(asks_more)


def _existing(context: Context, name: str) -> Vm | None:
    try:
        return context.client.get_vm(name)
    except (NotFound, InvalidInput):
        return None


def _enter_again(context: Context, vm: Vm, args: argparse.Namespace) -> int:
    name = vm["name"]
    with Progress(quiet=args.quiet) as progress:
        if vm["state"] == "running":
            _say(args, f"{name} exists and runs: entering it again")
        else:
            _say(args, f"{name} exists and is {vm['state']}: starting it")
            vm = follow(context.client, context.client.start_vm(name), progress)
        _tell_emulation(context, vm, progress)
        connection = context.client.connect_vm(name)
        return _shell(context, connection, None, args, progress)


# -- making


def _creation(args: argparse.Namespace) -> VmCreate:
    from banger.cli.vm_lifecycle import creation_request

    request = creation_request(args)
    request["start"] = True
    if args.rm:
        request["owner_pid"] = os.getpid()
        if args.command is not None or args.entrypoint:
            # Nobody will enter it: no work for a moment's machine.
            request.setdefault("with_sshd", False)
    return request


def create(context: Context, request: VmCreate, progress: Progress) -> Vm:
    """Make a VM; a name that is taken is an error that says how to enter that one."""
    try:
        vm: Vm = follow(context.client, context.client.create_vm(request), progress)
    except Conflict as error:
        name = request.get("name")
        if error.hint or name is None:
            raise
        hint = f"enter it with `banger vm ssh {name}`, or `banger vm delete {name}` first"
        raise Conflict(error.message, hint=hint, code=error.code) from error
    return vm


@contextlib.contextmanager
def _deleted_at_end(context: Context, name: str, *, wanted: bool) -> Any:
    """Delete the VM however the block ends; the daemon does it when we are killed."""
    try:
        yield
    finally:
        if wanted:
            _delete(context, name)


@contextlib.contextmanager
def deleted_on_failure(context: Context, name: str, *, wanted: bool) -> Any:
    """Delete a VM we made when it could not be filled: nobody asked for half of one."""
    try:
        yield
    except BaseException:
        if wanted:
            _delete(context, name)
        raise


def _delete(context: Context, name: str) -> None:
    try:
        context.client.wait(context.client.delete_vm(name), lambda _: None)
    except NotFound:
        return
    except BangerError as error:
        output.warn(f"{name} was not deleted: {error.message}")


def _tell_emulation(context: Context, vm: Vm, progress: Progress) -> None:
    """Say once per user that VMs are emulated here, and why."""
    marker = os.path.join(context.paths.state_dir, _MARKER)
    if vm["accel"] != "tcg" or progress.quiet or os.path.exists(marker):
        return
    reason = f": {vm['accel_reason']}" if vm["accel_reason"] else ""
    progress.notice(
        f"no usable KVM here, so VMs are emulated (tcg) and several times slower{reason}. "
        "This is said once; `banger doctor` tells more",
    )
    with contextlib.suppress(OSError):
        os.makedirs(context.paths.state_dir, mode=0o700, exist_ok=True)
        os.close(os.open(marker, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))


# -- what the image is for


def _check_entrypoint(context: Context, args: argparse.Namespace) -> None:
    """Tell at once, before a VM is made, that an image which is here has nothing to run."""
    from banger.cli.vm_exec import make_request

    make_request(args, [""])  # a bad value is told at once too
    if args.image is None:
        return
    try:
        image = context.client.get_image(args.image)
    except (NotFound, InvalidInput):
        return  # creation pulls it, or says why not
    if image["installed"]:
        _entrypoint(args, image)


def _entrypoint(args: argparse.Namespace, image: Image) -> ExecRequest:
    """Return what `docker run IMAGE [ARGS]` would run, and as whom and where."""
    from banger.cli.vm_exec import make_request

    words = image["entrypoint"] + (image["command"] if args.command is None else args.command)
    if not words:
        raise InvalidInput(
            f"the image {image['name']} names neither an entrypoint nor a command",
            hint=f"say what to run: banger vm run --image {image['name']} -- COMMAND",
        )
    request = make_request(args, words, directory=image["working_dir"] or "/")
    return request if args.user else request._replace(user=image["user"] or "root")


def _make_directory(connection: VmConnection, path: bytes | None) -> None:
    """Make a directory of the guest when it is absent: an image may name one that it lacks."""
    from banger.guest import agent

    endpoint = endpoint_of(connection)
    if path and agent.stat_path(endpoint, path) is None:
        agent.put_tar(endpoint, path, [bytes(1024)])  # a tar of nothing


# -- the repository


def _open_workspace(args: argparse.Namespace) -> Workspace | None:
    if args.path is None:
        return None
    from banger.services import workspaces

    workspace = workspaces.open_workspace(args.path)
    if args.include_untracked is False:
        workspace = workspace._replace(include_untracked=False)
    if args.branch:
        workspaces.check_branch(workspace, args.branch, args.from_ref)
    return workspace


def copy_in(
    connection: VmConnection,
    workspace: Workspace,
    progress: Progress,
    *,
    branch: str | None = None,
    ref: str | None = None,
) -> None:
    """Copy a repository into a running VM, and check out `branch` there, begun at `ref`."""
    from banger.guest import agent
    from banger.services.workspace_sync import iter_copy

    if branch:
        need_git(connection)
    progress.stage(f"copy {workspace.name} to {workspace.guest_directory}")
    agent.put_tar(
        endpoint_of(connection),
        os.fsencode(workspace.guest_directory),
        iter_copy(workspace, warn=progress.warning),
        progress=progress.progress,
    )
    if branch:
        check_out(connection, workspace, branch, ref)


def check_out(connection: VmConnection, workspace: Workspace, branch: str, ref: str | None) -> None:
    """Check out `branch` in the copy; where neither side has it, begin it at `ref`."""
    from banger.guest import agent
    from banger.services import workspaces

    argv = workspaces.branch_argv(workspace, branch, ref)
    status, _, stderr = agent.capture_exec(endpoint_of(connection), argv, timeout_s=600)
    if status.exit_code != 0:
        lines = stderr.decode(errors="replace").strip().splitlines()
        raise InvalidInput(
            f"--branch {branch}: git says: {lines[-1] if lines else 'nothing'}",
            hint="commit or stash what conflicts, or leave --from out",
        )


def begin_tooling(connection: VmConnection, workspace: Workspace, progress: Progress) -> None:
    """Begin to install what the repository asks of mise: in the guest, and waited for by nobody."""
    if not any(os.path.lexists(os.path.join(workspace.top, name)) for name in _MISE_FILES):
        return
    from banger.guest import agent

    log = f"/root/.cache/banger/vm-run-tooling-{workspace.name}.log"
    words = ["sh", "-c", _TOOLING, "sh", log, workspace.guest_directory]
    try:
        agent.start_detached(
            endpoint_of(connection), agent.ExecRequest([os.fsencode(word) for word in words])
        )
    except BangerError as error:
        progress.warning(f"mise was not begun: {error.message}")
    else:
        progress.notice(f"mise installs its tools in the background: {log}")


def need_git(connection: VmConnection) -> None:
    """Raise Unavailable for a guest that cannot check out a branch."""
    from banger.guest import agent

    status, _, _ = agent.capture_exec(endpoint_of(connection), [b"git", b"--version"], timeout_s=60)
    if status.exit_code != 0:
        raise Unavailable(
            f"--branch needs git in the guest, and {connection['vm']['image']} has none",
            hint="leave --branch out, or take an image with git",
        )


# -- the shell or the command


def _finish(
    context: Context,
    connection: VmConnection,
    args: argparse.Namespace,
    *,
    execution: ExecRequest | None,
    directory: str | None,
    progress: Progress,
) -> int:
    name = connection["vm"]["name"]
    if execution is not None:
        from banger.cli.vm_exec import execute, ssh_agent_for, wait_for_services

        if args.wait:
            wait_for_services(connection, progress)
        progress.close()
        with ssh_agent_for(connection, execution, wanted=args.forward_agent) as request:
            code = execute(connection, request, json=args.json)
        if args.detach:
            if not args.json:
                output.write_line(name)
            _say(args, f"`banger vm ssh {name}` looks after it")
        elif not args.rm:
            _say(args, f"{name} stays: `banger vm ssh {name}` enters it, "
                       f"`banger vm delete {name}` deletes it")  # fmt: skip
        return code
    if args.json:
        progress.close()
        output.write_json(context.client.get_vm(name))
        return 0
    if args.detach:
        progress.close()
        output.write_line(name)
        return 0
    return _shell(context, connection, directory, args, progress)


def _shell(
    context: Context,
    connection: VmConnection,
    directory: str | None,
    args: argparse.Namespace,
    progress: Progress,
) -> int:
    from banger.cli.vm_ssh import find_way, open_shell

    name = connection["vm"]["name"]
    way = find_way(context, connection, progress)
    progress.close()
    if way.ssh is None:
        code = open_shell(connection, way, directory=directory, forward_agent=args.forward_agent)
    else:
        argv = way.ssh
        # Outright: ssh would complain about a missing terminal, and needs telling with a command.
        argv.insert(1, "-t" if output.is_terminal(sys.stdin) else "-T")
        if args.forward_agent:
            argv.insert(1, "-A")
        if directory is not None:
            import shlex

            argv += ["--", f'cd {shlex.quote(directory)} && exec "${{SHELL:-/bin/sh}}" -l']
        code = _run_interactive(argv)
    if not args.rm:
        _say(args, f"{name} stays: `banger vm ssh {name}` comes back, "
                   f"`banger vm delete {name}` deletes it")  # fmt: skip
    return code


def _run_interactive(argv: list[str]) -> int:
    """Run ssh on our terminal; Ctrl-C is its business, not ours, until it ends."""
    import subprocess

    def leave_to_ssh(_number: int, _frame: object) -> None:
        # A handler, not SIG_IGN: an ignored signal would stay ignored in the child.
        return

    previous = {
        number: signal.signal(number, leave_to_ssh) for number in (signal.SIGINT, signal.SIGQUIT)
    }
    try:
        code = subprocess.call(argv)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _say(args: argparse.Namespace, text: str) -> None:
    if args.quiet:
        return
    if args.json:
        output.write_json_line({"type": "notice", "message": text}, sys.stderr)
        return
    output.notice(text)


VERBS = {"run": (build_run, run_run)}
