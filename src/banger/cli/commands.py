"""The words of the command line as data: nouns, verbs, their aliases and one-line help.

Dispatch, help, suggestions and completion all read this table; none of them imports the
module of a verb that is not run.
"""

from __future__ import annotations


class Verb:
    """One verb: the module of `banger.cli` that runs it, and its line of help."""

    # Plain classes: importing typing would cost a third of what `banger version` may.
    __slots__ = ("help", "module")

    def __init__(self, module: str, help: str) -> None:  # noqa: A002 - argparse's word
        self.module = module
        self.help = help


class Noun:
    """One noun. A noun without verbs is a command by itself: its verb is the empty string."""

    __slots__ = ("aliases", "help", "verbs")

    def __init__(
        self,
        help: str,  # noqa: A002 - argparse's word
        verbs: dict[str, Verb],
        aliases: dict[str, str] | None = None,
    ) -> None:
        self.help = help
        self.verbs = verbs
        self.aliases = aliases or {}


NOUNS: dict[str, Noun] = {
    "vm": Noun(
        "Make, enter and remove virtual machines",
        {
            "run": Verb("vm_run", "Make a VM and enter it, or run a command in it"),
            "create": Verb("vm_lifecycle", "Make a VM without entering it"),
            "start": Verb("vm_lifecycle", "Start stopped VMs"),
            "stop": Verb("vm_lifecycle", "Shut VMs down"),
            "restart": Verb("vm_lifecycle", "Stop VMs and start them again"),
            "kill": Verb("vm_lifecycle", "End VMs at once, like pulling the plug"),
            "delete": Verb("vm_lifecycle", "Delete VMs and their disks"),
            "prune": Verb("vm_lifecycle", "Delete every stopped VM"),
            "set": Verb("vm_lifecycle", "Rename or resize a VM"),
            "list": Verb("vm_show", "List VMs"),
            "show": Verb("vm_show", "Show everything about a VM"),
            "stats": Verb("vm_show", "Show what VMs cost the host, and their own view"),
            "ports": Verb("vm_show", "List the ports that listen inside a VM"),
            "forward": Verb("vm_forward", "Let a VM's ports answer on this host's loopback"),
            "logs": Verb("logs", "Show a VM's console, or its VMM's log"),
            "exec": Verb("vm_exec", "Run a command in a running VM"),
            "session": Verb("vm_session", "Start and join processes that live on in a VM"),
            "ssh": Verb("vm_ssh", "Enter a running VM through ssh"),
            "workspace": Verb(
                "vm_workspace", "Keep a copy of a repository up to date; bring changes home"
            ),
            "acp": Verb("vm_acp", "Speak the Agent Client Protocol with an agent inside a VM"),
            "cp": Verb("vm_cp", "Copy files between the host and a VM"),
        },
        {
            "ls": "list",
            "ps": "list",
            "rm": "delete",
            "remove": "delete",
            "inspect": "show",
            "shell": "ssh",
            "copy": "cp",
            "log": "logs",
        },
    ),
    "image": Noun(
        "Root file systems VMs are made from",
        {
            "list": Verb("images", "List installed images and the catalog"),
            "show": Verb("images", "Show everything about an image"),
            "pull": Verb("images", "Make an image: the catalog's, a registry's, an archive's"),
            "cache": Verb("images", "List or remove the layers that pulls downloaded"),
            "register": Verb("image_store", "Make an image of an ext4 in a file, copied or linked"),
            "promote": Verb("image_build", "Make an image of a stopped VM"),
            "build": Verb("image_build", "Build a Dockerfile inside a VM, as an image"),
            "export": Verb("image_store", "Write an image to one file, a bundle"),
            "catalog": Verb("image_store", "List what can be pulled by name, or check a catalog"),
            "delete": Verb("image_store", "Delete images no VM uses"),
        },
        {"ls": "list", "rm": "delete", "remove": "delete", "inspect": "show"},
    ),
    "kernel": Noun(
        "Kernels VMs boot",
        {
            "list": Verb("kernels", "List installed kernels, and the catalog's"),
            "show": Verb("kernels", "Show everything about a kernel, or its configuration"),
            "pull": Verb("kernels", "Make a kernel from its catalog entry"),
            "import": Verb("kernels", "Make a kernel of files on this host"),
            "check": Verb("kernels", "Compare a kernel with what machines and Docker need"),
            "rm": Verb("kernels", "Delete kernels no VM and no image uses"),
        },
        {"ls": "list", "delete": "rm", "remove": "rm", "inspect": "show"},
    ),
    "firecracker": Noun(
        "The VMM for hosts with KVM: its releases",
        {
            "install": Verb("firecracker", "Download a release, check it, and use it"),
            "list": Verb("firecracker", "List installed releases"),
            "remove": Verb("firecracker", "Remove an installed release"),
        },
        {"ls": "list", "rm": "remove", "delete": "remove"},
    ),
    "daemon": Noun(
        "The background process that owns the VMs",
        {
            "status": Verb("daemon", "Tell whether the daemon runs"),
            "stop": Verb("daemon", "Stop the daemon; VMs go on"),
            "logs": Verb("logs", "Show the daemon's log"),
        },
        {"log": "logs", "info": "status"},
    ),
    "config": Noun(
        "The settings in force",
        {
            "show": Verb("config", "Show every setting with its value"),
            "get": Verb("config_edit", "Print one setting's value"),
            "set": Verb("config_edit", "Set a setting; comments stay"),
            "unset": Verb("config_edit", "Take a setting back to its default"),
            "edit": Verb("config_edit", "Open config.toml in your editor, checked"),
            "check": Verb("config_edit", "Check config.toml"),
            "path": Verb("config", "Print the path of config.toml"),
        },
    ),
    "doctor": Noun(
        "Check this host, and mend it with --fix",
        {"": Verb("doctor", "Check this host, and mend it with --fix")},
    ),
    "ssh-config": Noun(
        "Let plain ssh, scp, rsync and editors reach NAME.vm",
        {"": Verb("ssh_config", "Let plain ssh, scp, rsync and editors reach NAME.vm")},
    ),
    "completion": Noun(
        "Print a completion script for bash, zsh or fish",
        {"": Verb("completion", "Print a completion script for bash, zsh or fish")},
    ),
    "version": Noun(
        "Print the version",
        {"": Verb("version", "Print the version")},
    ),
}

# Machinery: not shown, not suggested, not completed.
HIDDEN: dict[str, Noun] = {
    "internal": Noun(
        "What ssh calls",
        {"connect": Verb("internal", "Carry a TCP port of a VM over stdin and stdout")},
    ),
}

SHORTCUTS: dict[str, tuple[str, str]] = {
    "run": ("vm", "run"),
    "ps": ("vm", "list"),
    "ls": ("vm", "list"),
    "exec": ("vm", "exec"),
    "ssh": ("vm", "ssh"),
    "cp": ("vm", "cp"),
    "rm": ("vm", "delete"),
    "images": ("image", "list"),
    "kernels": ("kernel", "list"),
    "pull": ("image", "pull"),
}

# The verbs whose stdout belongs to the guest's command: ours goes to stderr, even as JSON.
STDOUT_IS_THE_GUESTS = {
    *(("vm", "exec"), ("vm", "ssh"), ("vm", "cp"), ("vm", "acp")),
    ("internal", "connect"),
}
