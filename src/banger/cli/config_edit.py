"""`config get`, `set`, `unset`, `edit` and `check`: the file with its comments kept.

The file is the user's: it is rewritten only as far as a key says, only when the whole of it
is valid afterwards, and in one step. No daemon is needed; one that runs keeps what it has read.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from banger.cli import output
from banger.cli.context import Context
from banger.cli.parsing import Parser, add_json
from banger.errors import InvalidInput, NotFound, Unavailable, nearest

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

_EDITORS = ("sensible-editor", "editor", "nano", "vi")
_HEADER = "# banger's settings; docs/config.md has every key. An absent key has its default.\n"
EXIT_INVALID = 1


def _file(context: Context) -> Path:
    """Return the file itself: a link into somebody's dotfiles stays one."""
    return Path(os.path.realpath(os.path.join(context.paths.config_dir, "config.toml")))


def _known(settings: Any) -> dict[str, Any]:
    """Return every key with its value, `vm.memory` for those of a section.

    A table whose names are the user's, such as `acp_agents`, is one value.
    """
    from banger.cli.config import as_dict

    found: dict[str, Any] = {}
    for name in settings.__struct_fields__:
        value = getattr(settings, name)
        if hasattr(value, "__struct_fields__"):
            found |= {f"{name}.{key}": one for key, one in as_dict(value).items()}
        else:
            found[name] = as_dict(value)
    return found


def _check_key(key: str, known: dict[str, Any]) -> str:
    if key not in known:
        close = nearest(key, list(known))
        raise NotFound(
            f"there is no setting {key}",
            hint=f"did you mean {close}?" if close else "`banger config show` has every key",
        )
    return key


def _settings(directory: str | None) -> dict[str, Any]:
    """Return the settings in force, or the defaults when there is no directory."""
    from banger import config

    return _known(config.Config() if directory is None else config.load_config(directory))


# -- get


def build_get(parser: Parser) -> None:
    """Arguments of `config get`."""
    parser.description = "Print one setting's value in force: the file's, else the default."
    parser.add_argument("key", metavar="KEY")
    add_json(parser)


def run_get(context: Context, args: argparse.Namespace) -> int:
    """Print a value; strings and lists of them plainly, for scripts."""
    known = _settings(context.paths.config_dir)
    value = known[_check_key(args.key, known)]
    import json

    if context.json:
        output.write_json({"key": args.key, "value": value})
    elif isinstance(value, list):
        for one in value:
            output.write_line(one if isinstance(one, str) else json.dumps(one))
    elif value is not None:
        output.write_line(value if isinstance(value, str) else json.dumps(value))
    return 0


# -- set and unset


def build_set(parser: Parser) -> None:
    """Arguments of `config set`."""
    parser.description = (
        "Set a setting in config.toml, whose other lines and comments stay as they are.\n"
        "A value that is not valid changes nothing. A list takes several words."
    )
    parser.add_argument("key", metavar="KEY")
    parser.add_argument("value", metavar="VALUE", nargs="+")
    add_json(parser)
    parser.examples(
        ("banger config set vm.memory 4GiB", "what a new VM gets"),
        ("banger config set default_dns 9.9.9.9 1.1.1.1", "a list"),
        ("banger config set network bridge", ""),
    )


def run_set(context: Context, args: argparse.Namespace) -> int:
    """Set a value."""
    _check_key(args.key, _settings(None))
    section, _, name = args.key.rpartition(".")
    with _changing(context) as change:
        value = change(section, name, _candidates(args.value))
    return _tell(context, args.key, value)


def build_unset(parser: Parser) -> None:
    """Arguments of `config unset`."""
    parser.description = "Take a setting out of config.toml: its default is in force again."
    parser.add_argument("key", metavar="KEY")
    add_json(parser)


def run_unset(context: Context, args: argparse.Namespace) -> int:
    """Take a value out; one that is not there is fine."""
    defaults = _settings(None)
    _check_key(args.key, defaults)
    section, _, name = args.key.rpartition(".")
    with _changing(context) as change:
        change(section, name, [])
    return _tell(context, args.key, defaults[args.key])


def _candidates(words: list[str]) -> list[Any]:
    """Return what words can mean, the most literal first: TOML, a string, a list of strings."""
    import tomllib

    found: list[Any] = []
    if len(words) == 1:
        with contextlib.suppress(tomllib.TOMLDecodeError):
            found.append(tomllib.loads(f"value = {words[0]}")["value"])
        found.append(words[0])
    found.append(list(words))
    return found


Change = Callable[[str, str, list[Any]], Any]


@contextlib.contextmanager
def _changing(context: Context) -> Iterator[Change]:
    """Yield what changes the file, under a lock: two terminals do not lose each other's change."""
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    from banger.config import parse_config
    from banger.host.files import make_private_directory, write_atomic

    path = _file(context)
    make_private_directory(path.parent)
    lock = os.open(path.parent / ".config.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def change(section: str, name: str, candidates: list[Any]) -> Any:
        text, mode = _read(path)
        refused: InvalidInput | None = None
        for value in candidates or [None]:
            try:
                document = tomlkit.parse(text)
            except TOMLKitError as error:
                raise InvalidInput(
                    f"{path} is not TOML: {error}", hint="mend it with `banger config edit`"
                ) from error
            _put(document, section, name, value)
            new = tomlkit.dumps(document)
            try:
                parse_config(new.encode(), str(path))
            except InvalidInput as error:
                refused = refused or error
                continue
            write_atomic(path, new.encode(), mode=mode)
            return value
        assert refused is not None  # every candidate was
        raise refused

    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield change
    finally:
        os.close(lock)


def _put(document: TOMLDocument, section: str, name: str, value: Any) -> None:
    """Set a key of a section ("" is the top), or take it out when there is no value."""
    import tomlkit

    if section and section not in document:
        if value is None:
            return
        document[section] = tomlkit.table()
    table: Any = document[section] if section else document
    if value is None:
        table.pop(name, None)
    else:
        table[name] = value


def _read(path: Path) -> tuple[str, int]:
    """Return the file's text and mode; an absent one is its header."""
    try:
        return path.read_text(), stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return _HEADER, 0o600
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read {path}: {error}") from error


def _tell(context: Context, key: str, value: Any) -> int:
    if context.json:
        output.write_json({"key": key, "value": value})
    _tell_daemon(context)
    return 0


def _tell_daemon(context: Context) -> None:
    if os.path.exists(os.path.join(context.paths.runtime_dir, "bangerd.sock")):
        output.notice("a daemon that runs keeps what it has read: `banger daemon stop`, VMs run on")


# -- edit and check


def build_edit(parser: Parser) -> None:
    """Arguments of `config edit`."""
    parser.description = (
        "Open config.toml in $VISUAL or $EDITOR. What you leave is taken when it is valid;\n"
        "when not, the file stays as it was and your text is kept beside it."
    )
    add_json(parser)


def run_edit(context: Context, _args: argparse.Namespace) -> int:
    """Edit a copy and take it when it is valid."""
    import subprocess

    from banger.config import parse_config
    from banger.host.files import make_private_directory, write_atomic

    path = _file(context)
    make_private_directory(path.parent)
    text, mode = _read(path)
    fd, copy = tempfile.mkstemp(prefix="config-", suffix=".toml", dir=path.parent)
    with os.fdopen(fd, "w") as file:
        file.write(text)
    # As git does: the variable may hold options.
    done = subprocess.run(["sh", "-c", f'{_editor()} "$1"', "sh", copy], check=False)
    if done.returncode != 0:
        os.unlink(copy)
        raise Unavailable(f"the editor ended with status {done.returncode}: nothing is changed")
    new = Path(copy).read_bytes()
    try:
        parse_config(new, str(path))
    except InvalidInput as error:
        error.hint = f"your text is in {copy}; `banger config edit` begins with the old one again"
        raise
    os.unlink(copy)
    changed = new != text.encode()
    if changed:
        write_atomic(path, new, mode=mode)
    if context.json:
        output.write_json({"path": str(path), "changed": changed})
    if not changed:
        output.notice("nothing is changed")
    else:
        _tell_daemon(context)
    return 0


def _editor() -> str:
    import shutil

    for name in ("VISUAL", "EDITOR"):
        if os.environ.get(name):
            return os.environ[name]
    for program in _EDITORS:
        if shutil.which(program):
            return program
    raise Unavailable("no editor is installed", hint="name one: EDITOR=... banger config edit")


def build_check(parser: Parser) -> None:
    """Arguments of `config check`."""
    parser.description = "Check config.toml, or FILE; exits with 1 when it is not valid."
    parser.add_argument("file", nargs="?", metavar="FILE")
    add_json(parser)


def run_check(context: Context, args: argparse.Namespace) -> int:
    """Check a file."""
    from banger.config import parse_config

    path = Path(args.file) if args.file else _file(context)
    problem: InvalidInput | None = None
    found = path.exists() or bool(args.file)
    try:
        if found:
            parse_config(path.read_bytes(), str(path))
    except OSError as error:
        problem = InvalidInput(f"cannot read {path}: {error.strerror}")
    except InvalidInput as error:
        problem = error
    if context.json:
        said = output.error_body(problem) if problem else {}
        output.write_json({"path": str(path), "exists": found, "ok": problem is None, **said})
    elif problem is not None:
        output.write_error(problem)
    else:
        output.write_line(f"{path} is valid" if found else f"{path} is absent: all defaults")
    return EXIT_INVALID if problem else 0


VERBS = {
    "get": (build_get, run_get),
    "set": (build_set, run_set),
    "unset": (build_unset, run_unset),
    "edit": (build_edit, run_edit),
    "check": (build_check, run_check),
}
