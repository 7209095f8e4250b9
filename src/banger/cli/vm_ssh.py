"""`vm ssh`: the system's ssh, through the agent, with our key and our known hosts.

In a guest without an sshd, the agent's own shell in its place; `vm run` enters by the same ways.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from banger.cli import output
from banger.cli.context import Context, endpoint_of
from banger.cli.parsing import Parser, add_forward_agent, add_quiet
from banger.cli.progress import Progress
from banger.errors import Conflict, NotFound, Unavailable

if TYPE_CHECKING:
    from banger.api.models import Vm, VmConnection
    from banger.guest.ssh import SshFiles

SSH_PORT = 22
# sshd is up a second after the agent under KVM; emulated systemd takes most of a minute,
# and on a busy machine more.
_WAIT_S = {"kvm": 60.0, "tcg": 180.0}


def build_ssh(parser: Parser) -> None:
    """Arguments of `vm ssh`."""
    parser.description = (
        "Enter a running VM through the system's ssh; no network and no open port is needed.\n"
        "Where the guest has no sshd the agent gives the shell, at once.\n"
        "A command of one word is a line for the guest's shell, as with ssh itself; of several\n"
        "words, each arrives as it is."
    )
    parser.takes_command = True
    parser.command_after = 1
    parser.add_argument("name", metavar="NAME")
    parser.add_argument(
        "-o",
        "--ssh-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="an option for ssh -o, such as ForwardAgent=yes (repeat)",
    )
    parser.add_argument("-L", dest="local", action="append", default=[], metavar="FORWARD",
                        help="forward a local port, as ssh -L (repeat)")  # fmt: skip
    parser.add_argument("-t", "--tty", action="store_true", help="a terminal for the command too")
    add_forward_agent(parser)
    add_quiet(parser)
    parser.examples(
        ("banger vm ssh box", "a shell"),
        ("banger vm ssh box -- 'cd /srv && ls'", "one command line"),
        ("banger vm ssh --forward-agent box", "a shell that has the keys of your ssh-agent"),
        ("banger vm ssh box -L 8080:localhost:80", "the guest's port 80 on 127.0.0.1:8080"),
    )


class Way(NamedTuple):
    """How to enter a guest: `ssh` holds the words that run ssh, None where there is no sshd.

    `shell` is the best shell there is, None in an image that has none.
    """

    ssh: list[str] | None
    shell: list[bytes] | None


def run_ssh(context: Context, args: argparse.Namespace) -> int:
    """Become ssh, or enter through the agent."""
    if args.forward_agent:
        from banger.cli.vm_exec import check_forwarding

        check_forwarding(args)
    connection = connect_running(context, args.name)
    with Progress(quiet=args.quiet or not sys.stderr.isatty()) as progress:
        way = find_way(context, connection, progress)
    if way.ssh is not None:
        _become_ssh(way.ssh, args)
    return _enter(connection, way, args)


def _become_ssh(argv: list[str], args: argparse.Namespace) -> NoReturn:
    for option in args.ssh_option:
        argv[1:1] = ["-o", option]
    for forward in args.local:
        argv[1:1] = ["-L", forward]
    if args.forward_agent:
        argv.insert(1, "-A")
    if args.tty:
        argv.insert(1, "-t")
    elif args.command is None:
        argv.insert(1, "-t" if sys.stdin.isatty() else "-T")
    if args.command is not None:
        words = args.command
        argv += ["--", words[0] if len(words) == 1 else shlex.join(words)]
    sys.stdout.flush()
    os.execv(argv[0], ["ssh", *argv[1:]])  # noqa: S606 - no shell is wanted


def _enter(connection: VmConnection, way: Way, args: argparse.Namespace) -> int:
    """Do through the agent what ssh was asked for."""
    name = connection["vm"]["name"]
    if args.ssh_option or args.local:
        option = "-L" if args.local else "-o"
        lacks = "this host has no ssh" if shutil.which("ssh") is None else f"{name} has no sshd"
        raise Unavailable(
            f"{lacks}, which {option} needs",
            hint="`banger vm run --with-sshd` makes a VM with one; "
            "`banger vm set NAME --publish` opens a port without",
        )
    words = [os.fsencode(word) for word in args.command or []]
    if len(words) > 1:
        return run_through_agent(connection, words, tty=args.tty, forward_agent=args.forward_agent)
    if words:
        words = [*need_shell(connection, way), b"-c", *words]
        return run_through_agent(connection, words, tty=args.tty, forward_agent=args.forward_agent)
    return open_shell(connection, way, tty=args.tty, forward_agent=args.forward_agent)


def open_shell(
    connection: VmConnection,
    way: Way,
    *,
    directory: str | None = None,
    tty: bool = False,
    forward_agent: bool = False,
) -> int:
    """Open the agent's shell on our terminal; without one it reads commands from stdin."""
    shell = need_shell(connection, way)
    return run_through_agent(
        connection,
        shell,
        tty=tty or sys.stdin.isatty(),
        directory=directory,
        forward_agent=forward_agent,
    )


def need_shell(connection: VmConnection, way: Way) -> list[bytes]:
    """Return the guest's shell, or say that the image has none and what works without."""
    if way.shell is None:
        vm = connection["vm"]
        raise NotFound(
            f"there is no shell in {vm['name']}: its image {vm['image']} has none",
            hint=f"`banger vm exec {vm['name']} -- PROGRAM` runs what the image has; "
            f"`banger vm run --image {vm['image']} --entrypoint` runs its entrypoint",
            code="no_shell",
        )
    return way.shell


def run_through_agent(
    connection: VmConnection,
    argv: list[bytes],
    *,
    tty: bool,
    directory: str | None = None,
    forward_agent: bool = False,
) -> int:
    """Run a program of the guest over our stdin, stdout and stderr; return its status."""
    from banger.cli.vm_exec import execute, ssh_agent_for, terminal
    from banger.guest.agent import ExecRequest

    cwd = None if directory is None else os.fsencode(directory)
    request = ExecRequest(argv, cwd=cwd, tty=terminal() if tty else None)
    with ssh_agent_for(connection, request, wanted=forward_agent) as request:
        return execute(connection, request, json=False)


def connect_running(context: Context, name: str) -> VmConnection:
    """Return how to reach a running VM; a stopped one is an error that says how to start it."""
    try:
        return context.client.connect_vm(name)
    except Conflict as error:
        if error.hint:
            raise
        raise Conflict(error.message, hint=f"banger vm start {name}") from error


def find_way(context: Context, connection: VmConnection, progress: Progress) -> Way:
    """Return how to enter: by ssh where sshd is up or about to be, else by the agent at once."""
    from banger.guest import agent

    vm = connection["vm"]
    found = agent.find_shell(endpoint_of(connection))
    ssh = shutil.which("ssh")
    if ssh is None or found.sshd == "none":
        return Way(None, found.argv)
    if found.sshd == "coming" and not _wait_for_sshd(connection, progress):
        return Way(None, found.argv)
    return Way([ssh, "-F", write_config(context, vm), vm["name"]], found.argv)


def _wait_for_sshd(connection: VmConnection, progress: Progress) -> bool:
    """Wait until the agent sees port 22 listening, in bounds that fit the isolation."""
    from banger.guest import agent

    vm = connection["vm"]
    progress.stage("waiting for sshd")
    wait_s = _WAIT_S.get(vm["accel"], 180.0)
    if agent.probe_port(endpoint_of(connection), SSH_PORT, wait_s=wait_s):
        return True
    output.warn(
        f"nothing listens on port 22 in {vm['name']} after {wait_s:.0f} s: entering without ssh "
        f"(`banger vm logs {vm['name']}` may tell why)"
    )
    return False


def write_config(context: Context, vm: Vm) -> str:
    """Write `<runtime_dir>/ssh/<id>.conf`, the configuration of one VM, and return its path."""
    from banger.guest import ssh
    from banger.paths import make_runtime_dir

    directory = os.path.join(make_runtime_dir(context.paths), "ssh")
    os.makedirs(directory, mode=0o700, exist_ok=True)
    path = os.path.join(directory, f"{vm['id']}.conf")
    text = ssh.vm_block(vm["id"], vm["name"], ssh_files(context), ssh.banger_argv())
    if ssh.read_text(path) != text:
        ssh.rewrite(path, text)
    return path


def ssh_files(context: Context) -> SshFiles:
    """Return the key and the known hosts, as configured."""
    from banger.guest import ssh

    return ssh.find_ssh_files(context.paths, _configured_key(context))


def _configured_key(context: Context) -> str:
    # Without a file there is nothing to read, and no decoder to import.
    if not os.path.exists(os.path.join(context.paths.config_dir, "config.toml")):
        return ""
    from banger import config

    return str(config.load_config(context.paths.config_dir).ssh_key_path)


VERBS = {"ssh": (build_ssh, run_ssh)}
