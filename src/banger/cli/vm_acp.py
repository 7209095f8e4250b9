"""`vm acp`: stdin and stdout are an agent's inside a VM, for editors that start agents so.

The protocol (agentclientprotocol.com) is the two ends' own: bytes pass as they are, and stdout gets
nothing of ours. The daemon is asked for the VM and is out of the way from then on.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from banger.cli.context import Context
from banger.cli.parsing import Parser, add_forward_agent, add_json, add_quiet, add_surroundings
from banger.cli.progress import Progress, follow
from banger.errors import InvalidInput, NotFound, UsageError, nearest

if TYPE_CHECKING:
    from banger.api.models import VmConnection, VmCreate
    from banger.services.workspaces import Workspace

_BUILTIN = {"opencode": ["opencode", "acp"]}


def build_acp(parser: Parser) -> None:
    """Arguments of `vm acp`."""
    parser.usage = "banger vm acp VM [OPTIONS] [-- AGENT...]"
    parser.description = (
        "Be the agent, for an editor that starts one and speaks the Agent Client Protocol with\n"
        "it: stdin and stdout are passed to an agent inside the VM, byte for byte. A stopped VM\n"
        "is started. What banger has to say goes to stderr; the status is the agent's own, and\n"
        "the agent ends when this command does, however that ends."
    )
    parser.takes_command = True
    parser.command_after = 1
    parser.add_argument("name", metavar="VM")
    parser.add_argument(
        "--agent", metavar="NAME", help="opencode, or one of acp_agents in the configuration"
    )
    parser.add_argument(
        "--run",
        metavar="PATH",
        help="when there is no such VM: make it, with a copy of this git repository",
    )
    parser.add_argument("--image", metavar="IMAGE", help="--run: the image of a new VM")
    add_surroundings(parser)
    add_forward_agent(parser)
    add_quiet(parser)
    add_json(parser, "write the result as a line of JSON to stderr")
    parser.examples(
        ("banger vm acp box", "opencode acp, in the VM box"),
        ("banger vm acp box --run ./repo", "the same; the first time it makes box"),
        ("banger vm acp box -- claude-code-acp", "another agent"),
    )


def run_acp(context: Context, args: argparse.Namespace) -> int:
    """Start the agent and be its stdin and stdout."""
    from banger.cli.vm_exec import check_forwarding, execute, parse_environment, ssh_agent_for
    from banger.guest.agent import ExecRequest

    argv = args.command if args.command is not None else _preset(context, args.agent)
    if args.agent and args.command is not None:
        raise UsageError("--agent and a command are two agents", hint="leave one of them out")
    if args.image and args.run is None:
        raise UsageError("--image is for --run, which makes the VM")
    environment = parse_environment(args.env)
    check_forwarding(args)
    workspace = None
    if args.run is not None:
        from banger.services.workspaces import open_workspace

        workspace = open_workspace(args.run)
    with Progress(quiet=args.quiet) as progress:
        connection = _running(context, args, workspace, progress)
    directory = args.cwd or (None if workspace is None else workspace.guest_directory)
    request = ExecRequest(
        argv=[os.fsencode(word) for word in argv],
        env=environment,
        cwd=None if directory is None else os.fsencode(directory),
        user=args.user or "root",
    )
    with ssh_agent_for(connection, request, wanted=args.forward_agent) as request:
        return execute(connection, request, json=context.json)


def _preset(context: Context, name: str | None) -> list[str]:
    from banger.config import load_config

    config = load_config(context.paths.config_dir)
    known = {**_BUILTIN, **config.acp_agents}
    wanted = name or config.acp_agent
    if wanted not in known:
        close = nearest(wanted, list(known))
        raise InvalidInput(
            f"no agent is named {wanted!r}",
            hint=f"did you mean {close}?" if close else "acp_agents in config.toml names more",
        )
    return known[wanted]


def _running(
    context: Context, args: argparse.Namespace, workspace: Workspace | None, progress: Progress
) -> VmConnection:
    """Return a VM that runs: the one there is, started where it is stopped, or a new one."""
    from banger.cli.vm_run import begin_tooling, copy_in, create, deleted_on_failure

    try:
        vm = context.client.get_vm(args.name)
    except NotFound as error:
        if workspace is None:
            error.hint = f"{error.hint}; --run PATH makes one" if error.hint else "--run PATH"
            raise
    else:
        if vm["state"] != "running":
            vm = follow(context.client, context.client.start_vm(vm["name"]), progress)
        return context.client.connect_vm(vm["name"])
    request: VmCreate = {"name": args.name, "start": True}
    if args.image:
        request["image"] = args.image
    vm = create(context, request, progress)
    with deleted_on_failure(context, vm["name"], wanted=True):
        connection = context.client.connect_vm(vm["name"])
        copy_in(connection, workspace, progress)
        begin_tooling(connection, workspace, progress)
    return connection


VERBS = {"acp": (build_acp, run_acp)}
