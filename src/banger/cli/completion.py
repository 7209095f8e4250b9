"""Completion: a small script per shell that asks `banger __complete`, and the answers.

The answers come from the same table and parsers as dispatch, so they cannot go stale.
Names of VMs, images and kernels are asked from a daemon that runs; none is started for it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import TYPE_CHECKING

from banger.cli.commands import NOUNS, SHORTCUTS
from banger.cli.context import Context
from banger.cli.parsing import Parser, make_parser
from banger.errors import BangerError, InvalidInput

if TYPE_CHECKING:
    from banger.client.api import Client

_NAMES_TIMEOUT_S = 2.0  # nobody waits longer for a Tab

_BASH = r"""_banger() {
    local IFS=$'\n'
    local words=("${COMP_WORDS[@]:1:COMP_CWORD}")
    COMPREPLY=($(banger __complete "${words[@]/#--/__dd__}" 2>/dev/null))
    [[ ${COMPREPLY[0]-} == __files__ ]] && COMPREPLY=($(compgen -f -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o filenames -F _banger banger
"""

_ZSH = r"""#compdef banger
_banger() {
    local -a found given
    given=("${(@)words[2,CURRENT]}")
    found=("${(@f)$(banger __complete "${(@)given/#--/__dd__}" 2>/dev/null)}")
    if [[ ${found[1]} == __files__ ]]; then _files; else compadd -- ${found:#}; fi
}
if [ "$funcstack[1]" = "_banger" ]; then _banger "$@"; else compdef _banger banger; fi
"""

_FISH = r"""function __banger_complete
    set -l given (commandline -opc)[2..-1] (commandline -ct)
    set -l found (banger __complete (string replace -r '^--' '__dd__' -- $given) 2>/dev/null)
    if test "$found[1]" = __files__
        __fish_complete_path (commandline -ct)
    else
        printf '%s\n' $found
    end
end
complete -c banger -f -a '(__banger_complete)'
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}

_FILES = "__files__"
# `main` cuts at the first `--`, so the scripts send it under another name.
_DASHES = "__dd__"


def build_completion(parser: Parser) -> None:
    """Arguments of `completion`."""
    parser.description = "Print a completion script."
    parser.add_argument("shell", metavar="SHELL", help="bash, zsh or fish")
    parser.examples(
        ("banger completion bash > ~/.local/share/bash-completion/completions/banger", ""),
        ("banger completion zsh > ~/.zfunc/_banger", ""),
        ("banger completion fish > ~/.config/fish/completions/banger.fish", ""),
    )


def run_completion(_context: Context, args: argparse.Namespace) -> int:
    """Print a script."""
    if args.shell not in _SCRIPTS:
        raise InvalidInput(f"no completion for {args.shell}", hint="bash, zsh or fish")
    sys.stdout.write(_SCRIPTS[args.shell])
    return 0


def complete(words: list[str]) -> int:
    """Print the candidates for the last of `words` (those behind `banger`), one per line."""
    plain = [f"--{word.removeprefix(_DASHES)}" if word.startswith(_DASHES) else word
             for word in words]  # fmt: skip
    typed = plain[-1] if plain else ""
    for candidate in candidates(plain[:-1], typed):
        sys.stdout.write(candidate + "\n")
    return 0


def candidates(before: list[str], typed: str) -> list[str]:
    """Return what may stand after `before` and begins with `typed`."""
    if "--" in before:
        return [_FILES]
    if not before:
        return _matching([*NOUNS, "run", "ps", "exec", "ssh", "cp", "help"], typed)
    first, rest = before[0], before[1:]
    if first == "help":
        known = NOUNS if not rest else NOUNS[rest[0]].verbs if rest[0] in NOUNS else {}
        return _matching([word for word in known if word], typed)
    if first in SHORTCUTS:
        noun, verb = SHORTCUTS[first]
    elif first not in NOUNS:
        return []
    elif "" in NOUNS[first].verbs:
        noun, verb = first, ""
    elif not rest:
        return _matching(list(NOUNS[first].verbs), typed)
    else:
        noun, verb, rest = first, NOUNS[first].aliases.get(rest[0], rest[0]), rest[1:]
        if verb not in NOUNS[noun].verbs:
            return []
    return _of_verb(noun, verb, rest, typed)


def _of_verb(noun: str, verb: str, rest: list[str], typed: str) -> list[str]:
    from banger.cli.main import load

    if (noun, verb) == ("vm", "session"):
        return _of_session(rest, typed)
    parser = make_parser(noun, verb, load(noun, verb).VERBS[verb or noun][0])
    options = parser.value_options()
    if rest and options.get(rest[-1], False):
        if (noun, verb) in (("kernel", "import"), ("image", "register")):
            return [_FILES]
        return _matching(_values(rest[-1]), typed) or [_FILES]
    if typed.startswith("-"):
        return _matching(_shown_options(parser), typed)
    if noun == "completion":
        return _matching(list(_SCRIPTS), typed)
    if (noun, verb) in (("vm", "run"), ("image", "build")):
        return [_FILES]
    if (noun, verb) == ("image", "promote"):
        return _matching(_names("vm"), typed) if not rest else []
    if (noun, verb) == ("vm", "cp"):
        if "/" in typed or typed.startswith("."):
            return [_FILES]
        return _matching([f"{name}:" for name in _names("vm")], typed) or [_FILES]
    if (noun, verb) == ("image", "catalog"):
        return _matching(["list", "check"], typed) if not rest else [_FILES]
    if (noun, verb) == ("image", "register"):
        return []
    taken = [word for word in rest if not word.startswith("-")]
    if noun in ("vm", "image", "kernel") and verb not in ("list", "create", "prune", "import"):
        return _matching([name for name in _names(noun) if name not in taken], typed)
    return []


def _of_session(rest: list[str], typed: str) -> list[str]:
    from banger.cli.vm_session import ACTIONS, action_parser, find_action

    if not rest:
        return _matching(list(ACTIONS), typed)
    action = find_action(rest[0])
    if action is None:
        return []
    parser = action_parser(action)
    options = parser.value_options()
    if options.get(rest[-1], False):
        return _matching(_values(rest[-1]), typed)
    if typed.startswith("-"):
        return _matching(_shown_options(parser), typed)
    words = [
        word
        for before, word in itertools.pairwise(rest)
        if not word.startswith("-") and not options.get(before, False)
    ]
    if not words:
        return _matching(_names("vm"), typed)
    several = action in {"stop", "kill", "rm"}
    if action in {"start", "list"} or (len(words) > 1 and not several):
        return []
    return _matching([name for name in _sessions(words[0]) if name not in words[1:]], typed)


def _sessions(vm: str) -> list[str]:
    from banger.cli.context import endpoint_of
    from banger.guest import sessions

    try:
        endpoint = endpoint_of(_asking().connect_vm(vm))
        found = sessions.list_all(endpoint, timeout_s=_NAMES_TIMEOUT_S)
    except (BangerError, OSError):
        return []
    return [session.name for session in found]


def _shown_options(parser: Parser) -> list[str]:
    return [
        text
        for action in parser._actions
        if action.help is not argparse.SUPPRESS
        for text in action.option_strings
        if text.startswith("--")
    ]


def _values(option: str) -> list[str]:
    fixed = {
        "--vmm": ["auto", "qemu", "firecracker"],
        "--network": ["user", "bridge", "none"],
        "--stdin-mode": ["pipe", "pty", "null"],
        "--restart": ["no", "on-failure"],
        "--stream": ["stdout", "stderr"],
        "--from": ["start", "end"],
        "--for": ["end", "ready"],
    }
    if option in fixed:
        return fixed[option]
    return _names(option[2:]) if option in ("--image", "--kernel") else []


def _asking() -> Client:
    """Return a client of a daemon that runs: none is started for a Tab."""
    from banger.client.api import Client
    from banger.client.autostart import Daemon

    return Client(Daemon(Context().paths, start=False, timeout_s=_NAMES_TIMEOUT_S))


def _names(noun: str) -> list[str]:
    try:
        client = _asking()
        if noun == "vm":
            return [vm["name"] for vm in client.list_vms()]
        if noun == "image":
            return [image["name"] for image in client.list_images()]
        return [kernel["name"] for kernel in client.list_kernels()]
    except (BangerError, OSError):
        return []


def _matching(known: list[str], typed: str) -> list[str]:
    return [word for word in known if word.startswith(typed) and word.isprintable()]


VERBS = {"completion": (build_completion, run_completion)}
