"""`ssh-config`: NAME.vm for plain ssh, scp, rsync and editors, by one Include line."""

from __future__ import annotations

import argparse
import os

from banger.cli import output
from banger.cli.context import Context
from banger.cli.parsing import Parser, add_json


def build_ssh_config(parser: Parser) -> None:
    """Arguments of `ssh-config`."""
    parser.description = (
        "Print the ssh configuration for NAME.vm. With --install, write it to a file of\n"
        "banger's own and put one Include line at the top of ~/.ssh/config; --uninstall\n"
        "takes exactly that line out again. Without either, nothing is touched."
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--install", action="store_true", help="add the Include line")
    which.add_argument("--uninstall", action="store_true", help="take it out again")
    add_json(parser)
    parser.examples(
        ("banger ssh-config --install", "then: ssh box.vm, scp f box.vm:, code --remote ..."),
    )


def run_ssh_config(context: Context, args: argparse.Namespace) -> int:
    """Print, install or uninstall."""
    from banger.cli.vm_ssh import ssh_files
    from banger.guest import ssh

    ours = os.path.join(context.paths.config_dir, "ssh", "config")
    theirs = os.path.join(os.path.expanduser("~"), ".ssh", "config")
    line = ssh.include_line(ours)
    before = ssh.read_text(theirs)
    if args.uninstall:
        after = ssh.without_include(before, line)
        if after != before:
            ssh.rewrite(theirs, after)
        if os.path.exists(ours):
            os.unlink(ours)
        return _report(context, theirs, ours, changed=after != before, installed=False)
    text = "# Written by `banger ssh-config --install`; changes here are lost.\n"
    text += ssh.every_vm_block(ssh_files(context), ssh.banger_argv())
    if args.install:
        if ssh.read_text(ours) != text:
            os.makedirs(os.path.dirname(ours), mode=0o700, exist_ok=True)
            ssh.rewrite(ours, text)
        after = ssh.with_include(before, line)
        if after != before:
            ssh.rewrite(theirs, after)
        return _report(context, theirs, ours, changed=after != before, installed=True)
    if context.json:
        installed = line in before.splitlines()
        output.write_json({"installed": installed, "path": ours, "text": text})
    else:
        for printed in text.splitlines():
            output.write_line(printed)
    return 0


def _report(context: Context, theirs: str, ours: str, *, changed: bool, installed: bool) -> int:
    if context.json:
        output.write_json(
            {"installed": installed, "changed": changed, "ssh_config": theirs, "path": ours}
        )
    elif installed:
        output.write_line(f"{theirs} {'now includes' if changed else 'included already'} {ours}")
    else:
        output.write_line(
            f"the Include line is gone from {theirs}"
            if changed
            else f"{theirs} had no line of ours"
        )
    return 0


VERBS = {"ssh-config": (build_ssh_config, run_ssh_config)}
