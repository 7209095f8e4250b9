"""The grammar of WWW-Authenticate, and what is answered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.images.credentials import Credential
from banger.images.registry_auth import Challenge, basic, parse_challenges

_word = st.from_regex(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,20}", fullmatch=True)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([""], []),
        (["Basic"], [("basic", {})]),
        (['Basic realm="x"'], [("basic", {"realm": "x"})]),
        (["BEARER Realm=x , a = b"], [("bearer", {"realm": "x", "a": "b"})]),
        (
            ['Bearer realm="https://h/t?a=1,2",service="s \\"q\\"",scope="r:n:pull,push"'],
            [
                (
                    "bearer",
                    {"realm": "https://h/t?a=1,2", "service": 's "q"', "scope": "r:n:pull,push"},
                )
            ],
        ),
        (['Basic realm="x", Bearer realm="y"'], [("basic", {"realm": "x"}), ("bearer", {"realm": "y"})]),
        (["Negotiate, Basic realm=x"], [("negotiate", {}), ("basic", {"realm": "x"})]),
        (["Negotiate", "Basic realm=x"], [("negotiate", {}), ("basic", {"realm": "x"})]),
        (['Bearer realm="first",realm="second"'], [("bearer", {"realm": "first"})]),
        (['Bearer realm="never ends'], [("bearer", {})]),
        (["=,="], []),
    ],
)  # fmt: skip
def test_challenges_are_read(values: list[str], expected: list[tuple[str, dict[str, str]]]) -> None:
    assert parse_challenges(values) == [Challenge(*one) for one in expected]


@given(st.lists(st.tuples(_word, st.dictionaries(_word.map(str.lower), st.text('ab "\\,=:/'), min_size=1)), max_size=4))  # fmt: skip
def test_what_is_written_is_read_back(challenges: list[tuple[str, dict[str, str]]]) -> None:
    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    text = ", ".join(
        f"{scheme} " + ", ".join(f"{name}={quoted(value)}" for name, value in parameters.items())
        for scheme, parameters in challenges
    )
    expected = [Challenge(scheme.lower(), parameters) for scheme, parameters in challenges]
    if len(text) < 8192:
        assert parse_challenges([text]) == expected


@given(st.lists(st.text() | st.text('Basic ,="\\x\t'), max_size=3))
def test_any_header_is_read_or_left_out(values: list[str]) -> None:
    for scheme, parameters in parse_challenges(values):
        assert scheme == scheme.lower()
        assert all(name == name.lower() for name in parameters)


def test_basic_takes_any_password() -> None:
    assert basic(Credential("u", "p:\u00e4")) == "Basic dTpwOsOk"
