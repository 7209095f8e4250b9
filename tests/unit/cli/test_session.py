"""The words of `vm session`: what is wrong is told before anybody is asked."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.cli import completion, session_attach, session_logs, session_show, session_socket
from banger.cli.context import Context
from banger.cli.session_start import name_after
from banger.cli.vm_session import ACTIONS, action_parser, options_first
from banger.errors import InvalidInput
from banger.guest import sessions
from banger.paths import Paths
from banger.store.layout import Layout
from banger.vmm import base
from tests.unit.cli.conftest import Cli
from tests.unit.client.fake_daemon import FakeDaemon, make_vm


@pytest.mark.parametrize("action", list(ACTIONS))
def test_every_action_has_its_own_help(action: str, cli: Cli) -> None:
    ran = cli.run("vm", "session", action, "--help")
    assert ran.status == 0
    assert ran.out.startswith(f"usage: banger vm session {action} ")
    assert "--json" in ran.out
    assert ("--ready-port" in ran.out) is (action == "start")
    assert action_parser(action).allow_abbrev is False
    assert f"  {action} " in cli.run("vm", "session", "--help").out


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        ([], 2, "required: ACTION"),
        (["strat"], 2, "did you mean `start`?"),
        (["start", "box", "--nmae", "x", "--", "y"], 2, "did you mean `--name`?"),
        (["start", "box"], 2, "no command given"),
        (["start", "box", "cat"], 2, "banger vm session start ... -- cat"),
        (["start", "--name", "a b", "--", "x"], 125, "cannot be a session's name"),
        (["start", "--log-limit", "1K", "--", "x"], 125, "from 64K to 1G"),
        (["start", "--log-limit", "many", "--", "x"], 125, "is not a size"),
        (["start", "--ready-port", "0", "--", "x"], 125, "--ready-port is a port"),
        (["start", "--ready-port", "²", "--", "x"], 125, "--ready-port is a port"),
        (["start", "--ready-file", "up", "--", "x"], 125, "an absolute path"),
        (["start", "--ready-timeout", "soon", "--", "x"], 125, "--ready-timeout must be"),
        (["start", "--ready-port", "1", "--ready-file", "/x", "--", "x"], 2, "not allowed with"),
        (["start", "--stdin-mode", "tty", "--", "x"], 2, "invalid choice"),
        (["start", "--restart", "always", "--", "x"], 2, "invalid choice"),
        (["start", "-e", "=v", "--", "x"], 125, "--env takes K=V"),
        (["list", "--", "x"], 2, "takes no words after --"),
        (["show", "box"], 2, "required: NAME"),
        (["attach", "box", "x", "--from", "middle"], 125, "--from is start, end"),
        (["attach", "box", "x", "--from", "1,"], 125, "--from is start, end"),
        (["send", "box", "x"], 2, "nothing to send"),
        (["send", "box", "x", "--stdin", "text"], 2, "two inputs"),
        (["logs", "box", "x", "--since", "yesterday"], 125, "--since takes"),
        (["logs", "box", "x", "--tail", "-1"], 125, "--tail must be a number"),
        (["logs", "box", "x", "--tail", "x"], 125, "--tail must be a number"),
        (["wait", "box", "x", "--timeout", "0"], 125, "--timeout must be"),
        (["signal", "box", "x", "TREM"], 125, "did you mean TERM?"),
        (["signal", "box", "x", "65"], 125, "is no signal"),
        (["stop", "box", "x", "--grace", "-"], 125, "--grace must be"),
        (["rm", "box"], 2, "required: NAME"),
    ],
)  # fmt: skip
def test_wrong_words_are_told_with_a_hint(
    words: list[str], status: int, told: str, cli: Cli
) -> None:
    ran = cli.run("vm", "session", *words)
    assert (ran.status, ran.out) == (status, "")
    assert told in ran.err
    assert "Traceback" not in ran.err and "unexpectedly" not in ran.err


@pytest.mark.parametrize(
    ("words", "ordered"),
    [
        (["box", "x", "--timeout", "5", "a", "--eof", "b"], ["--timeout", "5", "--eof", "box", "x", "a", "b"]),
        (["box", "x", "--timeout=5", "a"], ["--timeout=5", "box", "x", "a"]),
        (["box", "-fn", "5", "x", "-n3", "-f"], ["-fn", "5", "-n3", "-f", "box", "x"]),
        (["box", "x", "-1", "-", "- a", "-.5", ""], ["box", "x", "-1", "-", "- a", "-.5", ""]),
        (["box", "--timeout"], ["--timeout", "box"]),
        (["box", "--nope", "x"], ["--nope", "box", "x"]),
    ],
)  # fmt: skip
def test_options_may_stand_anywhere(words: list[str], ordered: list[str]) -> None:
    options = {"--timeout": True, "--eof": False, "-f": False, "-n": True}
    assert options_first(words, options) == ordered


def test_logs_as_json_cannot_follow(cli: Cli) -> None:
    ran = cli.run("vm", "session", "logs", "box", "x", "-f", "--json")
    assert (ran.status, "prints what is there" in ran.out) == (2, True)


def test_a_vm_that_is_stopped_has_a_hint(cli: Cli, daemon: FakeDaemon) -> None:
    body = {"error": {"code": "conflict", "message": "box is stopped", "hint": ""}}
    daemon.answers["GET /v1/vms/box/connection"] = (409, body)
    assert "hint: banger vm start box" in cli.run("vm", "session", "list", "box").err


@pytest.mark.parametrize(("text", "number"), [("TERM", 15), ("sigterm", 15), ("9", 9), ("64", 64)])
def test_signals_have_names_and_numbers(text: str, number: int) -> None:
    assert session_show.parse_signal(text) == number


@pytest.mark.parametrize(
    ("text", "positions"),
    [("start", (0, 0)), ("end", (-1, -1)), ("7", (7, -1)), ("7,0", (7, 0))],
)
def test_where_to_begin(text: str, positions: tuple[int, int]) -> None:
    assert session_attach.parse_begin(text) == positions


@given(st.text(max_size=20))
def test_any_text_is_a_moment_or_an_error(text: str) -> None:
    try:
        session_logs.parse_moment(text)
    except InvalidInput:
        pass


def test_moments() -> None:
    assert session_logs.parse_moment("1795721024") == 1795721024
    assert session_logs.parse_moment("2001-09-09T01:46:40Z") == 1_000_000_000
    assert session_logs.parse_moment("2001-09-09T03:46:40+02:00") == 1_000_000_000


@given(st.text(min_size=1, max_size=200))
def test_any_program_gives_a_name(program: str) -> None:
    sessions.check_name(name_after(program))
    sessions.check_name(name_after(program) + "-100")


def test_directory_and_mark_are_those_of_the_daemon(paths: Paths) -> None:
    """Reconcile ends what carries a mark of ours; a stop removes the directory."""
    context = Context(paths=paths)
    runtime = Layout.of(paths).vm("0123456789ab").runtime
    assert session_socket.mark_of(context, "0123456789ab") == base.mark_of("0123456789ab", runtime)
    assert session_socket.directory_of(context, "0123456789ab") == str(runtime / "s")


def test_completion_knows_actions_options_and_names(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["GET /v1/vms"] = [make_vm("one"), make_vm("two")]

    def complete(*words: str) -> list[str]:
        return completion.candidates(["vm", "session", *words[:-1]], words[-1])

    assert "session" in completion.candidates(["vm"], "se")
    assert complete("st") == ["start", "stop"]
    assert complete("start", "--ready-") == [
        "--ready-port", "--ready-file", "--ready-command", "--ready-timeout",
    ]  # fmt: skip
    assert complete("start", "--stdin-mode", "p") == ["pipe", "pty"]
    assert complete("start", "--name", "x", "") == ["one", "two"]
    assert complete("attach", "t") == ["two"]
    assert complete("attach", "two", "") == []  # nobody answers for it
    assert complete("nonsense", "") == []


@pytest.mark.parametrize(
    "module", ["vm_session", "session_start", "session_show", "session_attach", "session_logs"]
)
def test_actions_import_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, banger.cli.{module}, banger.cli.session_socket, banger.guest.session_sockets\n"
        "print([m for m in ('asyncio', 'msgspec', 'starlette', 'sqlite3') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
