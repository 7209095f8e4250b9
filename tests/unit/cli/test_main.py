"""Words, help, suggestions, errors and exit statuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger import __version__
from banger.cli.commands import NOUNS, SHORTCUTS
from banger.cli.main import load, main, split_words
from banger.cli.parsing import make_parser, parse
from banger.errors import UsageError
from tests.unit.cli.conftest import Cli
from tests.unit.client.fake_daemon import FakeDaemon, make_vm

VERBS = [(noun, verb) for noun, entry in NOUNS.items() for verb in entry.verbs]
SOURCE = os.path.dirname(os.path.dirname(os.path.dirname(load("vm", "run").__file__ or "")))

WORDS = st.lists(st.text(max_size=8) | st.sampled_from(["--", "-", "--json", "-t"]), max_size=8)


@given(WORDS)
def test_split_loses_nothing_and_cuts_at_the_first_dashes(words: list[str]) -> None:
    before, after = split_words(words)
    assert "--" not in before
    assert before + ([] if after is None else ["--", *after]) == words


@given(st.lists(st.text(max_size=8), min_size=1, max_size=6))
def test_command_after_dashes_arrives_word_for_word(command: list[str]) -> None:
    builder = load("vm", "exec").VERBS["exec"][0]
    assert parse("vm", "exec", builder, ["-t", "box"], command).command == command


@given(st.lists(st.text(max_size=8) | st.sampled_from(["--", "-t", "--env"]), max_size=6))
def test_command_of_exec_needs_no_dashes(rest: list[str]) -> None:
    builder = load("vm", "exec").VERBS["exec"][0]
    words, after = split_words(["--cwd", "/srv", "-it", "box", "ls", *rest])
    found = parse("vm", "exec", builder, words, after)
    assert (found.name, found.cwd, found.tty) == ("box", "/srv", True)
    assert found.command == ["ls", *rest]


def test_options_of_exec_may_follow_the_name() -> None:
    builder = load("vm", "exec").VERBS["exec"][0]
    found = parse("vm", "exec", builder, ["box", "-t", "-e", "A=1", "ls", "-e"], None)
    assert (found.tty, found.env, found.command) == (True, ["A=1"], ["ls", "-e"])


def test_no_command_after_dashes_is_a_usage_error() -> None:
    builder = load("vm", "run").VERBS["run"][0]
    with pytest.raises(UsageError, match="no command after --"):
        parse("vm", "run", builder, [], [])


@pytest.mark.parametrize(("noun", "verb"), VERBS, ids=lambda value: value or "-")
def test_every_verb_has_help(noun: str, verb: str, cli: Cli) -> None:
    ran = cli.run(*[word for word in (noun, verb, "--help") if word])
    assert ran.status == 0
    assert ran.out.startswith("usage: banger")
    assert "--json" in ran.out or (noun, verb) in [("vm", "ssh"), ("completion", "")]
    assert cli.run(*[word for word in ("help", noun, verb) if word]).out == ran.out


@pytest.mark.parametrize(("noun", "verb"), VERBS, ids=lambda value: value or "-")
def test_no_option_may_be_abbreviated(noun: str, verb: str) -> None:
    parser = make_parser(noun, verb, load(noun, verb).VERBS[verb or noun][0])
    assert parser.allow_abbrev is False


def test_overview_names_every_noun_and_verb(cli: Cli) -> None:
    for words in ([], ["help"], ["--help"]):
        out = cli.run(*words).out
        assert all(name in out for name in NOUNS)
    assert "internal" not in out


def test_version(cli: Cli) -> None:
    for words in (["version"], ["--version"], ["-V"]):
        assert cli.run(*words) == (0, f"banger {__version__}\n", "")
    assert json.loads(cli.run("version", "--json").out) == {"version": __version__}


@pytest.mark.parametrize(
    ("words", "close"),
    [
        (["daemn", "status"], "daemon"),
        (["vm", "lst"], "list"),
        (["vm", "list", "--jsn"], "--json"),
        (["help", "kernl"], "kernel"),
        (["vm", "run", "--nmae=x"], "--name"),
    ],
)
def test_near_names_are_suggested(words: list[str], close: str, cli: Cli) -> None:
    ran = cli.run(*words)
    assert ran.status == 2
    assert ran.out == ""
    assert f"did you mean `{close}`?" in ran.err


def test_usage_error_is_one_line_and_a_hint(cli: Cli) -> None:
    ran = cli.run("vm", "show")
    assert ran.status == 2
    lines = ran.err.splitlines()
    assert lines[0].startswith("banger: ")
    assert lines[1].startswith("hint: ")
    assert len(lines) == 2


def test_forgotten_dashes_are_hinted_at(cli: Cli) -> None:
    ran = cli.run("vm", "run", "./repo", "make")
    assert ran.status == 2
    assert "-- make" in ran.err


def test_error_as_json_goes_to_stdout(cli: Cli, daemon: FakeDaemon) -> None:
    ran = cli.run("vm", "show", "nobody", "--json")
    assert ran.status == 125
    assert json.loads(ran.out)["error"]["code"] == "not_found"
    assert ran.err == ""


def test_error_as_json_spares_the_guests_stdout(cli: Cli, daemon: FakeDaemon) -> None:
    for words in (["vm", "exec", "nobody", "--json", "--", "ls"], ["run", "--json", "--", "ls"]):
        ran = cli.run(*words)
        assert ran.status == 125
        assert ran.out == ""
        assert json.loads(ran.err.splitlines()[-1])["error"]["code"] == "not_found"


def test_hostile_message_cannot_reach_the_terminal(cli: Cli, daemon: FakeDaemon) -> None:
    body = {"error": {"code": "x", "message": "a\x1b[2Jb\nc\u202e", "hint": "\x07"}}
    daemon.answers["GET /v1/vms/box"] = (404, body)
    ran = cli.run("vm", "show", "box")
    assert "\x1b" not in ran.err
    assert "\\x1b[2Jb\\nc\\u202e" in ran.err


def test_shortcuts_and_aliases_mean_the_long_form(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["GET /v1/vms"] = [make_vm()]
    expected = cli.run("vm", "list").out
    for words in (["ps"], ["ls"], ["vm", "ls"], ["vm", "ps"]):
        assert cli.run(*words).out == expected
    assert all(verb in NOUNS[noun].verbs for noun, verb in SHORTCUTS.values())
    for noun in NOUNS.values():
        assert set(noun.aliases.values()) <= set(noun.verbs)


def test_json_may_come_first(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["GET /v1/vms"] = []
    assert cli.run("--json", "vm", "list").out == "[]\n"
    assert cli.run("vm", "--json", "list").out == "[]\n"


HEAVY = ["asyncio", "httpx2", "msgspec", "starlette", "rich", "jinja2", "sqlite3", "dataclasses"]
HEAVY += ["subprocess", "tomllib", "pathlib", "inspect", "hypothesis"]


def _imported(*words: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "banger", *words],
        env={**os.environ, "PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        check=True,
    )
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    # What the bare interpreter brings (site, .pth files of a test environment) is not ours.
    bare = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import runpy"],
        capture_output=True,
        text=True,
        check=True,
    )
    return names - {line.rpartition("|")[2].strip() for line in bare.stderr.splitlines()}


@pytest.mark.parametrize("words", [["--help"], ["vm", "--help"], ["vm", "run", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    assert _imported(*words) & set(HEAVY) == set()


def test_version_imports_neither_argparse_nor_json() -> None:
    assert _imported("version") & {*HEAVY, "argparse", "json", "re", "socket"} == set()


def test_vm_list_imports_nothing_heavy(daemon: FakeDaemon) -> None:
    daemon.answers["GET /v1/vms"] = [make_vm()]
    assert _imported("vm", "list") & set(HEAVY) == set()


def test_closed_pipe_is_quiet(daemon: FakeDaemon) -> None:
    daemon.answers["GET /v1/vms"] = [make_vm(f"box{n}") for n in range(2000)]
    process = subprocess.Popen(
        [sys.executable, "-m", "banger", "vm", "list"],
        env={**os.environ, "PYTHONPATH": SOURCE},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait(30)


def test_interrupt_is_130(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from banger.cli import version

    def interrupted(*args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(version.VERBS, "version", (version.build_version, interrupted))
    assert main(["version", "--json"]) == 130


def test_surprise_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from banger.cli import version

    def broken(*args: object) -> int:
        raise RuntimeError("odd")

    monkeypatch.setitem(version.VERBS, "version", (version.build_version, broken))
    ran = cli.run("version", "--json")
    assert ran.status == 125
    assert "RuntimeError: odd" in json.loads(ran.out)["error"]["message"]
