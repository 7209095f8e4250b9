"""The entry of the command line: words to a verb, errors to a sentence and an exit status.

Owns splitting at the first `--`, lazy dispatch (the module of one verb is imported, and no
other), help, suggestions, and the one place where errors meet the terminal: 2 for usage,
125 for banger's own failures, 130 for Ctrl-C.
"""

from __future__ import annotations

import os
import sys

from banger import __version__
from banger.cli.commands import HIDDEN, NOUNS, SHORTCUTS, STDOUT_IS_THE_GUESTS, Noun

TYPE_CHECKING = False  # importing typing for the name costs 7 ms
if TYPE_CHECKING:
    from types import ModuleType
    from typing import NoReturn

    from banger.errors import BangerError

EXIT_USAGE = 2
EXIT_FAILURE = 125
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

_HELP_FLAGS = ("-h", "--help")


def split_words(argv: list[str]) -> tuple[list[str], list[str] | None]:
    """Split at the first `--`: what is ours, and the words after it (None without one).

    argparse would do it too, yet differently in 3.11, 3.12 and 3.13.
    """
    if "--" not in argv:
        return argv, None
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    words, command = split_words(list(sys.argv[1:] if argv is None else argv))
    try:
        status = _dispatch(words, command)
        # Flushed here: at the interpreter's end a closed pipe would print a traceback.
        sys.stdout.flush()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader is gone (`| head`): what is buffered must not be tried again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except SystemExit as leaving:  # argparse's --help
        return leaving.code if isinstance(leaving.code, int) else 0
    except Exception as error:  # noqa: BLE001 - the last resort: a sentence, no traceback
        return _fail(error, words)
    return status


def _dispatch(words: list[str], command: list[str] | None) -> int:
    flags = []
    while words and words[0] in ("--json", "-q", "--quiet"):
        flags.append(words.pop(0))
    if not words:
        _print_overview()
        return 0 if command is None else EXIT_USAGE
    first, rest = words[0], words[1:]
    if first in ("--version", "-V"):
        first = "version"
    if first in _HELP_FLAGS:
        _print_overview()
        return 0
    if first == "help":
        return _help(rest)
    if first == "__complete":
        from banger.cli import completion

        return completion.complete(rest + (command or []))
    if first in SHORTCUTS:
        noun_name, verb = SHORTCUTS[first]
        return _run(noun_name, verb, [*flags, *rest], command)
    noun = NOUNS.get(first) or HIDDEN.get(first)
    if noun is None:
        _usage_unknown("command", first, [*NOUNS, *SHORTCUTS, "help"], "banger help")
    if "" in noun.verbs:
        if first == "version" and not rest and not flags:
            sys.stdout.write(f"banger {__version__}\n")
            return 0
        return _run(first, "", [*flags, *rest], command)
    while rest and rest[0] in ("--json", "-q", "--quiet"):
        flags.append(rest.pop(0))
    if not rest or rest[0] in _HELP_FLAGS:
        _print_noun(first, noun)
        return 0 if rest else EXIT_USAGE
    verb = noun.aliases.get(rest[0], rest[0])
    if verb not in noun.verbs:
        known = [*noun.verbs, *noun.aliases]
        _usage_unknown(f"verb of `banger {first}`", rest[0], known, f"banger help {first}")
    return _run(first, verb, [*flags, *rest[1:]], command)


def _run(noun: str, verb: str, words: list[str], command: list[str] | None) -> int:
    from banger.cli.parsing import parse

    module = load(noun, verb)
    builder, runner = module.VERBS[verb or noun]
    parsed = parse(noun, verb, builder, words, command)
    from banger.cli.context import Context

    context = Context(json=bool(getattr(parsed, "json", False)))
    status: int = runner(context, parsed)
    return status


def load(noun: str, verb: str) -> ModuleType:
    """Import the module that runs one verb."""
    from importlib import import_module

    entry = (NOUNS.get(noun) or HIDDEN[noun]).verbs[verb]
    return import_module(f"banger.cli.{entry.module}")


# -- help


def _help(rest: list[str]) -> int:
    if not rest:
        _print_overview()
        return 0
    name = rest[0]
    if name in SHORTCUTS:
        noun_name, verb = SHORTCUTS[name]
        return _run(noun_name, verb, ["--help"], None)
    noun = NOUNS.get(name)
    if noun is None:
        _usage_unknown("command", name, [*NOUNS, *SHORTCUTS], "banger help")
    if "" in noun.verbs:
        return _run(name, "", ["--help"], None)
    if len(rest) == 1:
        _print_noun(name, noun)
        return 0
    verb = noun.aliases.get(rest[1], rest[1])
    if verb not in noun.verbs:
        _usage_unknown(f"verb of `banger {name}`", rest[1], [*noun.verbs], f"banger help {name}")
    return _run(name, verb, ["--help"], None)


def _print_overview() -> None:
    lines = [
        "banger gives you a throw-away Linux machine from one command.",
        "",
        "  banger vm run                      a clean shell in a fresh VM",
        "  banger vm run ./repo               your repository copied in, then a shell there",
        "  banger vm run ./repo -- make test  run it there, exit with its status",
        "",
        "usage: banger COMMAND [VERB] [OPTIONS] [-- COMMAND OF THE GUEST]",
        "",
        "commands:",
    ]
    for name, noun in NOUNS.items():
        lines.append(f"  {name:<12}{noun.help}")
        verbs = " ".join(verb for verb in noun.verbs if verb)
        if verbs:
            lines.append(f"  {'':<12}  {verbs}")
    lines += [
        "",
        "short forms: run (vm run), ps and ls (vm list), exec, ssh, cp, rm",
        "",
        "`banger help vm` tells more, `banger vm run --help` most.",
        "Every listing and action takes --json. Errors of banger's own exit with 125,",
        "a wrong command line with 2, a guest's command with its own status.",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _print_noun(name: str, noun: Noun) -> None:
    lines = [f"usage: banger {name} VERB [OPTIONS]", "", noun.help, "", "verbs:"]
    for verb, entry in noun.verbs.items():
        also = [alias for alias, target in noun.aliases.items() if target == verb]
        suffix = f" (also: {', '.join(also)})" if also else ""
        lines.append(f"  {verb:<10}{entry.help}{suffix}")
    lines += ["", f"`banger {name} VERB --help` shows a verb's options."]
    sys.stdout.write("\n".join(lines) + "\n")


# -- errors


def _usage_unknown(what: str, word: str, known: list[str], help_command: str) -> NoReturn:
    from banger.errors import UsageError, nearest

    close = nearest(word, known)
    hint = f"did you mean `{close}`?" if close else f"`{help_command}` lists them"
    raise UsageError(f"unknown {what}: {word}", hint=hint)


def _fail(error: Exception, words: list[str]) -> int:
    """Show an error and return its exit status: the one place errors meet the terminal."""
    from banger.cli import output
    from banger.errors import BangerError, UsageError

    status = EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILURE
    shown = error if isinstance(error, BangerError) else _unexpected(error)
    if "--json" in words:
        if _guest_owns_stdout(words):
            output.write_json_line({"type": "error", **output.error_body(shown)}, sys.stderr)
        else:
            output.write_json(output.error_body(shown))
    else:
        output.write_error(shown)
    return status


def _guest_owns_stdout(words: list[str]) -> bool:
    # Words after `--` are cut off already: with a command, `vm run` does not reach stdout.
    plain = [word for word in words if not word.startswith("-")]
    if plain and plain[0] in SHORTCUTS:
        return SHORTCUTS[plain[0]] in STDOUT_IS_THE_GUESTS or (
            plain[0] == "run" and _runs_a_command()
        )
    if len(plain) < 2:
        return False
    verb = NOUNS[plain[0]].aliases.get(plain[1], plain[1]) if plain[0] in NOUNS else plain[1]
    return (plain[0], verb) in STDOUT_IS_THE_GUESTS or (
        (plain[0], verb) == ("vm", "run") and _runs_a_command()
    )


def _runs_a_command() -> bool:
    return "--" in sys.argv or "--entrypoint" in sys.argv


def _unexpected(error: Exception) -> BangerError:
    from banger.errors import BangerError, Unavailable

    if os.environ.get("BANGER_DEBUG"):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, OSError) and error.strerror:
        name = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return Unavailable(f"{name}{error.strerror}")
    return BangerError(
        f"banger failed unexpectedly: {type(error).__name__}: {error}",
        hint="run again with BANGER_DEBUG=1 and report what it prints",
    )
