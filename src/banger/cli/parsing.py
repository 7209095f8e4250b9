"""argparse, tamed: designed errors, near names, no abbreviations, and options shared by verbs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

from banger.errors import UsageError, nearest

Builder = Callable[["Parser"], None]


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps line breaks, and finds the terminal's width without importing shutil."""

    def __init__(self, prog: str) -> None:
        from banger.cli.output import terminal_width

        super().__init__(prog, width=min(terminal_width(), 100) - 2)


class Parser(argparse.ArgumentParser):
    """One verb's parser. `takes_command` allows words after `--`.

    `command_after` is the number of positionals after which the rest is the guest's
    command, even without `--` (`vm exec NAME ls -l`); None when only `--` begins one.
    """

    takes_command = False
    command_after: int | None = None

    def error(self, message: str) -> NoReturn:
        """Raise a UsageError: one line and a hint, as everywhere."""
        raise UsageError(message, hint=f"`{self.prog} --help` shows how")

    def examples(self, *lines: tuple[str, str]) -> None:
        """Set the examples that close `--help`: (command, what it does)."""
        width = max(len(command) for command, _ in lines) + 2
        rows = [f"  {command:<{width}}{meaning}" for command, meaning in lines]
        self.epilog = "examples:\n" + "\n".join(rows)

    def value_options(self) -> dict[str, bool]:
        """Map every option string to whether it takes a value."""
        return {
            text: action.nargs != 0 for action in self._actions for text in action.option_strings
        }


def make_parser(noun: str, verb: str, builder: Builder) -> Parser:
    """Build the parser of one verb."""
    parser = Parser(
        prog=f"banger {noun} {verb}".strip(),
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    builder(parser)
    return parser


def parse(
    noun: str, verb: str, builder: Builder, words: list[str], command: list[str] | None
) -> argparse.Namespace:
    """Parse one verb's words; the namespace's `command` holds the guest's, or None."""
    parser = make_parser(noun, verb, builder)
    if parser.command_after is not None:
        words, command = split_after_positionals(parser, words, command)
    found, unknown = parser.parse_known_args(words)
    if unknown:
        _refuse(parser, unknown)
    if command is not None:
        if not parser.takes_command:
            parser.error("this command takes no words after --")
        if not command:
            parser.error("no command after --")
    found.command = command
    return found


def split_after_positionals(
    parser: Parser, words: list[str], command: list[str] | None
) -> tuple[list[str], list[str] | None]:
    """Cut `words` behind its first positionals: what follows is the guest's command.

    When such a command contains `--` itself (`vm exec NAME grep -- x`), it is put back.
    """
    options = parser.value_options()
    positionals = 0
    index = 0
    while index < len(words):
        word = words[index]
        if positionals == parser.command_after:
            rest = words[index:] + (["--", *command] if command is not None else [])
            return words[:index], rest
        if word.startswith("-") and word != "-":
            if options.get(word, False) or _bundle_wants_value(word, options):
                index += 1
        else:
            positionals += 1
        index += 1
        # Options are ours only until the command begins; `NAME -t` is an option still.
        while (
            positionals == parser.command_after
            and index < len(words)
            and words[index].partition("=")[0] in options
        ):
            if options[words[index].partition("=")[0]] and "=" not in words[index]:
                index += 1
            index += 1
    return words, command


def _bundle_wants_value(word: str, options: dict[str, bool]) -> bool:
    """Tell whether the last letter of a bundle such as `-ite` takes the next word."""
    if word.startswith("--") or len(word) < 3 or word in options:
        return False
    for position, letter in enumerate(word[1:], start=1):
        if options.get(f"-{letter}", False):
            return position == len(word) - 1
    return False


def _refuse(parser: Parser, unknown: list[str]) -> NoReturn:
    word = unknown[0]
    if word.startswith("-") and word != "-":
        name = word.partition("=")[0]
        known = [text for text in parser.value_options() if text.startswith("--")]
        close = nearest(name, known)
        hint = f"did you mean `{close}`?" if close else f"`{parser.prog} --help` lists options"
        raise UsageError(f"unknown option {name} for `{parser.prog}`", hint=hint)
    hint = f"`{parser.prog} --help` shows how"
    if parser.takes_command:
        hint = f"a command for the guest goes after --: `{parser.prog} ... -- {word}`"
    raise UsageError(f"unexpected word {word!r} for `{parser.prog}`", hint=hint)


# -- options several verbs share


def add_json(parser: argparse.ArgumentParser, text: str = "print JSON") -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help=text)


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add -q/--quiet."""
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no notices")


def add_creation(parser: argparse.ArgumentParser) -> None:
    """Add what `vm run` and `vm create` make a VM of."""
    group = parser.add_argument_group("the machine")
    group.add_argument("--name", help="the VM's name (default: one is made up)")
    group.add_argument(
        "--image", help="the image it starts from: a name, or what `image pull` takes"
    )
    group.add_argument("--kernel", help="the kernel it boots (see `banger kernel list`)")
    group.add_argument("--vcpu", metavar="N", help="virtual CPUs (default: from the host)")
    group.add_argument("--memory", metavar="SIZE", help="memory, such as 4G or 512M")
    group.add_argument("--disk-size", metavar="SIZE", help="its own disk, such as 20G")
    group.add_argument("--vmm", help="auto, qemu or firecracker")
    group.add_argument(
        "--with-sshd",
        action=argparse.BooleanOptionalAction,
        help="install an sshd, in the background, in a guest without one "
        "(default: for imported images)",
    )
    group.add_argument(
        "--no-credentials",
        dest="credentials",
        action="store_const",
        const=False,
        help="give it neither the logins of your coding agents nor the files of file_sync",
    )
    add_network(parser)


def add_network(parser: argparse.ArgumentParser) -> None:
    """Add how a VM is joined to the world."""
    group = parser.add_argument_group("its network")
    group.add_argument(
        "--network",
        metavar="MODE",
        help="user: outbound, no root (default); bridge: an address and a name; or none",
    )
    group.add_argument(
        "-p",
        "--publish",
        action="append",
        metavar="[IP:]PORT:GUEST_PORT",
        help="open a port of the host, on 127.0.0.1 unless IP says else (repeat)",
    )
    both = argparse.BooleanOptionalAction
    group.add_argument("--nat", action=both, help="bridge: reach the outside")
    group.add_argument("--isolate", dest="isolated", action=both, help="bridge: reach no other VM")


NETWORK_FIELDS = ("network", "nat", "isolated", "publish")
CREATION_FIELDS = (
    *("name", "image", "kernel", "vcpu", "memory", "disk_size", "vmm", "with_sshd", "credentials"),
    *NETWORK_FIELDS,
)


def add_surroundings(group: argparse._ActionsContainer) -> None:
    """Add where in the guest a command runs, as whom, and what its variables are."""
    group.add_argument(
        "-e", "--env", action="append", default=[], metavar="K=V", help="set a variable (repeat)"
    )
    group.add_argument("-w", "--cwd", metavar="DIR", help="run it in this directory of the guest")
    group.add_argument("-u", "--user", metavar="USER", help="run it as this user (default: root)")


def add_forward_agent(parser: argparse._ActionsContainer) -> None:
    """Add --forward-agent."""
    parser.add_argument(
        "--forward-agent",
        action="store_true",
        help="let programs in the guest use the keys of your ssh-agent for as long as this runs",
    )


def add_execution(parser: argparse.ArgumentParser) -> None:
    """Add how a command runs in the guest."""
    group = parser.add_argument_group("the command")
    group.add_argument(
        "-i", "--interactive", action="store_true", help="pass stdin even when it is a terminal"
    )
    group.add_argument("-t", "--tty", action="store_true", help="give the command a terminal")
    group.add_argument("-d", "--detach", action="store_true", help="start it and return at once")
    add_surroundings(group)
    group.add_argument(
        "--timeout", metavar="SECONDS", help="end it after so long and exit with 124"
    )
    group.add_argument(
        "--wait",
        action="store_true",
        help="first wait until the guest's own services (Docker, say) are up; "
        "without it the command may run before them",
    )
