"""`vm session`: processes that live on in a VM; the words of its actions, each with its own help.

What an action does is in `session_start`, `session_show`, `session_attach` and `session_logs`, and
only that one is imported.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from banger.cli.context import Context
from banger.cli.parsing import Parser, add_json, add_quiet, add_surroundings, make_parser, parse
from banger.errors import UsageError, nearest

_NOUN = "vm session"
_NEGATIVE = re.compile(r"-\d+|-\d*\.\d+")  # a word, as argparse has it


class Action(NamedTuple):
    """One action: its line of help, its arguments, and the `module:function` that runs it."""

    help: str
    build: Callable[[Parser], None]
    run: str


def build_session(parser: Parser) -> None:
    """Arguments of `vm session`: an action, and what follows is that one's."""
    width = max(map(len, ACTIONS)) + 2
    lines = [f"  {name:<{width}}{action.help}" for name, action in ACTIONS.items()]
    parser.usage = "banger vm session ACTION [VM] [NAME] [OPTIONS]"
    parser.description = (
        "Processes that live on in a VM, whoever comes and goes: an agent, a server, a shell.\n"
        "The guest keeps each with its input and what it wrote, until `rm`.\n\n"
        "actions:\n" + "\n".join(lines) + "\n\n"
        "`banger vm session ACTION --help` shows an action's options."
    )
    parser.takes_command = True
    parser.add_argument(
        "action", metavar="ACTION", nargs=argparse.PARSER, action=_Nested, help=argparse.SUPPRESS
    )
    add_quiet(parser)
    add_json(parser)
    parser.examples(
        ("banger vm session start box --name planner -- pi --mode rpc", "start it"),
        ('banger vm session send box planner \'{"type": "prompt"}\'', "a line to its stdin"),
        ("banger vm session logs box planner -f", "what it says"),
        ("banger vm session attach box planner", "both; Ctrl-C leaves, it goes on"),
        ("banger vm session stop box planner", "end it, with all its children"),
    )


class _Nested(argparse.Action):
    """Parses the words of an action as a verb of their own."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        del parser, option_string
        typed, *words = [str(value) for value in values or ()]
        name = find_action(typed)
        if name is None:
            close = nearest(typed, [*ACTIONS, *_ALIASES])
            raise UsageError(
                f"unknown action of `banger vm session`: {typed}",
                hint=f"did you mean `{close}`?" if close else "`banger vm session --help`",
            )
        ordered = options_first(words, action_parser(name).value_options())
        found = vars(parse(_NOUN, name, ACTIONS[name].build, ordered, None))
        del found["command"]  # it is cut off before anything is parsed
        for key, value in found.items():
            before = key in {"json", "quiet"} and getattr(namespace, key, False)
            setattr(namespace, key, before or value)
        namespace.action = name


def options_first(words: list[str], options: dict[str, bool]) -> list[str]:
    """Return the words with the options in front; `options` says which take a value.

    argparse gives a positional that takes any number of words only those before the next option.
    """
    front: list[str] = []
    rest: list[str] = []
    takes_next = False
    for word in words:
        is_option = len(word) > 1 and word[0] == "-" and " " not in word
        if takes_next:
            front.append(word)
            takes_next = False
        elif not is_option or (_NEGATIVE.fullmatch(word) and word not in options):
            rest.append(word)
        else:
            front.append(word)
            letters = [f"-{letter}" for letter in word[1:]]
            bundle = all(letter in options for letter in letters) and letters[-1]
            takes_next = options.get(word, options.get(bundle or "", False))
    return front + rest


def find_action(word: str) -> str | None:
    """Return the name of an action, also for another word for it; None when there is none."""
    name = _ALIASES.get(word, word)
    return name if name in ACTIONS else None


def action_parser(name: str) -> Parser:
    """Return the parser of one action."""
    return make_parser(_NOUN, name, ACTIONS[name].build)


def run_session(context: Context, args: argparse.Namespace) -> int:
    """Run an action."""
    if args.command is not None and args.action not in {"start", "send"}:
        raise UsageError(f"`banger vm session {args.action}` takes no words after --")
    module, _, function = ACTIONS[args.action].run.partition(":")
    status: int = getattr(import_module(f"banger.cli.{module}"), function)(context, args)
    return status


# -- arguments


def _add_target(parser: Parser, *, several: bool = False) -> None:
    parser.add_argument("vm", metavar="VM")
    if several:
        parser.add_argument("sessions", metavar="NAME", nargs="+")
    else:
        parser.add_argument("session", metavar="NAME")


def _build_start(parser: Parser) -> None:
    parser.usage = "banger vm session start [VM] [OPTIONS] -- COMMAND..."
    parser.description = (
        "Start a process that the guest keeps, and print its session's name. From then on it\n"
        "needs neither this command nor the daemon. A stopped VM is started."
    )
    parser.takes_command = True
    parser.add_argument("vm", metavar="VM", nargs="?", help="default: the only one that runs")
    parser.add_argument("--name", dest="session", metavar="NAME", help="default: after the command")
    process = parser.add_argument_group("the process")
    add_surroundings(process)
    process.add_argument(
        "--stdin-mode",
        choices=("pipe", "pty", "null"),
        default="pipe",
        metavar="MODE",
        help="pipe (default), pty for a program that wants a terminal, or null",
    )
    process.add_argument(
        "--restart",
        choices=("no", "on-failure"),
        default="no",
        metavar="WHEN",
        help="no (default), or on-failure: again after a signal or a status other than 0",
    )
    process.add_argument(
        "--log-limit", metavar="SIZE", help="so much of stdout, and of stderr, is kept (16M)"
    )
    ready = parser.add_argument_group("when it is ready (this command waits for it)")
    which = ready.add_mutually_exclusive_group()
    which.add_argument("--ready-port", metavar="PORT", help="something listens there in the guest")
    which.add_argument("--ready-file", metavar="PATH", help="this file is there")
    which.add_argument("--ready-command", metavar="SH", help="`sh -c SH` in the guest succeeds")
    ready.add_argument(
        "--ready-timeout", metavar="SECONDS", default="60", help="fail after so long (60)"
    )
    add_quiet(parser)
    add_json(parser, "print the session as JSON")
    parser.examples(
        ("banger vm session start box --name planner --cwd /root/repo -- pi --mode rpc", ""),
        ("banger vm session start --restart on-failure --ready-port 8000 -- ./serve", ""),
        ("banger vm session start box --stdin-mode pty -- bash -l", "then: attach"),
    )


def _build_list(parser: Parser) -> None:
    parser.description = "List a VM's sessions, also those that have ended."
    parser.add_argument("vm", metavar="VM", nargs="?", help="default: the only one that runs")
    add_json(parser)


def _build_show(parser: Parser) -> None:
    parser.description = (
        "Show everything about a session. From then on its local socket listens, through which\n"
        "any program of yours can speak with it."
    )
    _add_target(parser)
    add_json(parser)


def _build_attach(parser: Parser) -> None:
    parser.description = (
        "Be a session's stdin, stdout and stderr until it ends, and exit with its status. Leaving\n"
        "ends nothing: Ctrl-C, or Ctrl-P Ctrl-Q where the session has a terminal of its own.\n"
        "Many may watch, one writes. The end of our stdin is not the end of the process's."
    )
    _add_target(parser)
    parser.add_argument("--read-only", action="store_true", help="watch, and write nothing")
    parser.add_argument(
        "--from",
        dest="begin",
        metavar="WHERE",
        default="end",
        help="start, end (default), or a position of stdout, and of stderr after a comma",
    )
    add_quiet(parser)
    add_json(parser, "write the result as a line of JSON to stderr")
    parser.examples(
        ("banger vm session attach box shell", "a terminal, where it was started with one"),
        ("banger vm session attach --read-only --from start box planner", "all that is kept"),
    )


def _build_send(parser: Parser) -> None:
    parser.usage = "banger vm session send VM NAME [TEXT...] [OPTIONS]"
    parser.description = (
        "Write a line to a session's stdin, and return when the process has taken it. Words are\n"
        "joined by blanks; a session with a terminal gets Enter at the end. Two who send at once\n"
        "wait for each other."
    )
    parser.takes_command = True
    _add_target(parser)
    parser.add_argument("text", metavar="TEXT", nargs="*", help="the line; - is --stdin")
    parser.add_argument("--stdin", action="store_true", help="send our stdin, byte for byte")
    parser.add_argument("--no-newline", action="store_true", help="nothing behind the text")
    parser.add_argument("--eof", action="store_true", help="then end the process's stdin, for good")
    parser.add_argument(
        "--timeout", metavar="SECONDS", default="30", help="how long it may take nothing (30)"
    )
    add_json(parser)
    parser.examples(
        ('banger vm session send box planner \'{"type": "abort"}\'', ""),
        ("banger vm session send box builder --stdin --eof < input", ""),
        ("banger vm session send box shell -- ls -l", "words that look like options"),
    )


def _build_logs(parser: Parser) -> None:
    parser.description = (
        "Show what is kept of a session's stdout and stderr, on ours: byte for byte, but harmless\n"
        "on a terminal."
    )
    _add_target(parser)
    parser.add_argument(
        "--stream", choices=("stdout", "stderr"), metavar="WHICH", help="only it, on our stdout"
    )
    parser.add_argument("-f", "--follow", action="store_true", help="go on until it ends")
    parser.add_argument(
        "--since", metavar="WHEN", help="10m, 2026-01-31T10:00, or Unix seconds; the guest's clock"
    )
    parser.add_argument("-n", "--tail", metavar="N", help="the last N lines of each")
    add_json(parser, "print {stdout, stderr} instead (not with -f)")


def _build_wait(parser: Parser) -> None:
    parser.description = (
        "Wait until a session has ended, and exit with its status; 124 is too late."
    )
    _add_target(parser)
    parser.add_argument(
        "--for",
        dest="until",
        choices=("end", "ready"),
        default="end",
        metavar="WHAT",
        help="end (default), or ready: exit with 0 when its check has succeeded",
    )
    parser.add_argument("--timeout", metavar="SECONDS", help="wait no longer (default: for ever)")
    add_json(parser)


def _build_signal(parser: Parser) -> None:
    parser.description = "Signal a session's process group."
    _add_target(parser)
    parser.add_argument("signal", metavar="SIGNAL", help="TERM, SIGTERM or 15")
    add_json(parser)


def _build_stop(parser: Parser) -> None:
    parser.description = (
        "End sessions with all their processes, also those that have left: SIGTERM, and SIGKILL\n"
        "for what is there after the grace. Nothing is restarted; output and status are kept."
    )
    _add_target(parser, several=True)
    parser.add_argument("--grace", metavar="SECONDS", default="10", help="before SIGKILL (10)")
    add_json(parser)


def _build_kill(parser: Parser) -> None:
    parser.description = (
        "End sessions with all their processes at once; output and status are kept."
    )
    _add_target(parser, several=True)
    add_json(parser)


def _build_rm(parser: Parser) -> None:
    parser.description = "Forget sessions that have ended, with their output."
    _add_target(parser, several=True)
    parser.add_argument("--force", action="store_true", help="kill those that run")
    add_json(parser)


ACTIONS = {
    "start": Action("Start a process that lives on", _build_start, "session_start:run_start"),
    "list": Action("List sessions", _build_list, "session_show:run_list"),
    "show": Action("Show everything about one", _build_show, "session_show:run_show"),
    "attach": Action("Be its stdin and stdout", _build_attach, "session_attach:run_attach"),
    "send": Action("Write a line to its stdin", _build_send, "session_attach:run_send"),
    "logs": Action("Show what it wrote", _build_logs, "session_logs:run_logs"),
    "wait": Action("Wait until it ends, or is ready", _build_wait, "session_show:run_wait"),
    "signal": Action("Signal it", _build_signal, "session_show:run_signal"),
    "stop": Action("End it, and its children", _build_stop, "session_show:run_stop"),
    "kill": Action("End it at once", _build_kill, "session_show:run_kill"),
    "rm": Action("Forget it, and its output", _build_rm, "session_show:run_rm"),
}
_ALIASES = {"ls": "list", "remove": "rm", "delete": "rm", "inspect": "show", "log": "logs"}

VERBS = {"session": (build_session, run_session)}
