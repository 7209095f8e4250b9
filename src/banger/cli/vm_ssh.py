"""`vm ssh`: the system's ssh, through the agent, with our key and our known hosts."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from typing import TYPE_CHECKING

from banger.cli.context import Context, endpoint_of
from banger.cli.parsing import Parser, add_quiet
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
    add_quiet(parser)
    parser.examples(
        ("banger vm ssh box", "a shell"),
        ("banger vm ssh box -- 'cd /srv && ls'", "one command line"),
        ("banger vm ssh box -L 8080:localhost:80", "the guest's port 80 on 127.0.0.1:8080"),
    )


def run_ssh(context: Context, args: argparse.Namespace) -> int:
    """Become ssh."""
    connection = connect_running(context, args.name)
    with Progress(quiet=args.quiet or not sys.stderr.isatty()) as progress:
        argv = prepare(context, connection, progress)
    for option in args.ssh_option:
        argv[1:1] = ["-o", option]
    for forward in args.local:
        argv[1:1] = ["-L", forward]
    if args.tty:
        argv.insert(1, "-t")
    elif args.command is None:
        argv.insert(1, "-t" if sys.stdin.isatty() else "-T")
    if args.command is not None:
        words = args.command
        argv += ["--", words[0] if len(words) == 1 else shlex.join(words)]
    sys.stdout.flush()
    os.execv(argv[0], ["ssh", *argv[1:]])  # noqa: S606 - no shell is wanted


def connect_running(context: Context, name: str) -> VmConnection:
    """Return how to reach a running VM; a stopped one is an error that says how to start it."""
    try:
        return context.client.connect_vm(name)
    except Conflict as error:
        if error.hint:
            raise
        raise Conflict(error.message, hint=f"banger vm start {name}") from error


def find_ssh(name: str) -> str:
    """Return the path of ssh, or say how to do without."""
    found = shutil.which("ssh")
    if found is None:
        raise NotFound(
            "ssh is not installed",
            hint=f"apt install openssh-client, or use `banger vm exec -it {name} -- bash`",
            code="unavailable",
        )
    return found


def prepare(context: Context, connection: VmConnection, progress: Progress) -> list[str]:
    """Wait for the guest's sshd, write the VM's ssh_config, return the words that run ssh."""
    vm = connection["vm"]
    ssh = find_ssh(vm["name"])
    wait_for_sshd(connection, progress)
    return [ssh, "-F", write_config(context, vm), vm["name"]]


def wait_for_sshd(connection: VmConnection, progress: Progress) -> None:
    """Wait until the agent sees port 22 listening, in bounds that fit the isolation."""
    from banger.guest import agent

    vm = connection["vm"]
    endpoint = endpoint_of(connection)
    if agent.probe_port(endpoint, SSH_PORT, wait_s=0.0):
        return
    progress.stage("waiting for sshd")
    wait_s = _WAIT_S.get(vm["accel"], 180.0)
    if not agent.probe_port(endpoint, SSH_PORT, wait_s=wait_s):
        raise Unavailable(
            f"nothing listens on port 22 in {vm['name']} after {wait_s:.0f} s",
            hint=f"`banger vm exec -it {vm['name']} -- sh` needs no sshd; "
            f"`banger vm logs {vm['name']}` may tell why",
        )


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
