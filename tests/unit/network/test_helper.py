"""What root's helper refuses: everything but its grammar, before anything is run."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from banger.errors import BangerError, Conflict, InvalidInput, Unavailable
from banger.network import helper
from tests.unit.network.test_plan import (
    BRIDGE,
    HOSTILE_ADDRESSES,
    HOSTILE_IDS,
    HOSTILE_MACS,
    HOSTILE_NAMES,
    HOSTILE_TAPS,
    LINE,
    TAP,
    ports,
)

TAKE = [
    "tap-take",
    "br-banger",
    TAP,
    "0123456789ab",
    "0",
    "02:00:00:00:00:01",
    "172.16.0.2",
    "open",
]


@pytest.fixture(autouse=True)
def no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*words: str, stdin: str = "") -> None:
        raise AssertionError(f"ran {words}")

    monkeypatch.setattr(helper, "_start", start)


def give_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize(
    "words",
    [
        [],
        [""],
        ["fly"],
        ["show"],
        ["show", "br-banger", "br-banger"],
        ["--help"],
        ["bridge-up", "br-banger"],
        ["bridge-up", "br-banger", "172.16.0.1"],
        ["bridge-up", "br-banger", "8.8.8.8/24"],
        ["bridge-up", "br-banger", "172.16.0.1/8"],
        ["bridge-up", "br-banger", "172.16.0.0/24"],
        ["bridge-up", "br-banger", "172.16.0.1/24\n"],
        ["rules", "br-banger", "172.16.0.1/24", "extra"],
        ["tap-add", "br-banger2", TAP, "0"],
        ["tap-add", "br-banger", TAP, "-1"],
        ["tap-add", "br-banger", TAP, "01"],
        ["tap-add", "br-banger", TAP, "root"],
        ["tap-add", "br-banger", TAP, "4294967295"],
        ["tap-add", "br-banger", TAP, "\u0661"],
        ["tap-add", "br-banger", TAP, "0" * 10_000_000],
        ["names", "br-banger", "127.0.0.1"],
        ["names", "br-banger", "127.0.0.1:0"],
        ["names", "br-banger", "127.0.0.1:65536"],
        ["names", "br-banger", "127.0.0.999:53"],
        ["names", "br-banger", "8.8.8.8:53"],
        ["names", "br-banger", "[::1]:53"],
        ["names", "br-banger", "127.0.0.1:53 127.0.0.2:53"],
    ],
)
def test_words_outside_the_grammar_are_refused(words: list[str]) -> None:
    with pytest.raises(InvalidInput):
        helper.parse(words)


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_every_verb_refuses_an_interface_that_is_not_bangers(name: str) -> None:
    for words in (
        ["bridge-up", name, "172.16.0.1/24"],
        ["bridge-down", name],
        ["tap-add", name, TAP, "0"],
        ["tap-del", name, TAP],
        ["rules", name, "172.16.0.1/24"],
        ["names", name, "127.0.0.1:53"],
        ["names-off", name],
        ["show", name],
        [TAKE[0], name, *TAKE[2:]],
    ):
        with pytest.raises(InvalidInput):
            helper.parse(words)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (2, HOSTILE_TAPS),
        (3, HOSTILE_IDS),
        (4, ["-1", "x", "", "99999999999"]),
        (5, HOSTILE_MACS),
        (7, ["", "closed", "isolated "]),
    ],
)
def test_a_take_with_one_bad_word_is_refused(index: int, words: list[str]) -> None:
    for word in words:
        with pytest.raises(InvalidInput):
            helper.parse([*TAKE[:index], word, *TAKE[index + 1 :]])


@pytest.mark.parametrize("address", HOSTILE_ADDRESSES)
def test_a_take_refuses_an_address_that_no_vm_has(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Which addresses those are, only the bridge on the host tells: here, that it is BRIDGE.
    monkeypatch.setattr(helper, "_our_bridge", lambda name, owner: BRIDGE)
    with pytest.raises(InvalidInput):
        helper.parse([*TAKE[:6], address, TAKE[7]])(0)


@pytest.mark.parametrize(
    "data",
    [
        LINE.encode(),
        b"\n",
        b"\xff\n",
        LINE.encode() + b"\n\n",
        LINE.encode() + b"\r\n",
        LINE.replace(" ", "\x0b", 1).encode() + b"\n",
        LINE.encode() + b"\0\n",
        LINE.encode() + b"\n" + LINE.encode() + b"\n",
        b"table inet banger { }\n",
        b"x" * 10_000_000,
        b"\n" * 10_000_000,
        b"".join(f"{port}\n".encode() for port in ports(200)) * 6,
        "".join(f"{port}\n" for port in ports(254)).encode(),  # the last has the broadcast address
    ],
    ids=range(13),
)
def test_rules_refuse_what_is_not_lines_of_ports(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_stdin(monkeypatch, data)
    with pytest.raises(InvalidInput):
        helper.parse(["rules", "br-banger", "172.16.0.1/24"])


@pytest.mark.parametrize(
    ("tap_uid", "owner"),
    [(0, 1000), (1001, 1000), (1_900_000_000, 1000), (1000, 0), (1_879_048_191, 0), (65534, 0)],
)
def test_a_tap_is_not_given_to_another_user(tap_uid: int, owner: int) -> None:
    for words in (
        ["tap-add", "br-banger", TAP, str(tap_uid)],
        [*TAKE[:4], str(tap_uid), *TAKE[5:]],
    ):
        action = helper.parse(words)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(InvalidInput, match="may not"):
            patch.setattr(helper, "_our_bridge", lambda name, owner: BRIDGE)
            action(owner)


@pytest.mark.parametrize(
    ("tap_uid", "owner"), [(1000, 1000), (0, 0), (1_879_048_192, 0), (2_147_483_647, 0)]
)
def test_a_tap_is_given_to_the_user_or_by_root_to_a_jail(tap_uid: int, owner: int) -> None:
    helper._check_tap_uid(tap_uid, owner)


@pytest.mark.skipif(os.geteuid() != 0, reason="speaks for root")
@pytest.mark.parametrize(("sudo_uid", "owner"), [("", 0), ("1000", 1000), ("0", 0)])
def test_the_user_who_asks_is_sudos(sudo_uid: str, owner: int) -> None:
    assert owner == helper._owner(sudo_uid)


@pytest.mark.skipif(os.geteuid() != 0, reason="speaks for root")
@pytest.mark.parametrize("sudo_uid", ["-1", "x", "1000\n", " 1", "99999999999", "\u0661"])
def test_a_strange_sudo_uid_is_refused(sudo_uid: str) -> None:
    with pytest.raises(InvalidInput):
        helper._owner(sudo_uid)


def run(words: list[str], **more: object) -> subprocess.CompletedProcess[bytes]:
    argv = [sys.executable, "-I", "-m", "banger.network.helper", *words]
    return subprocess.run(argv, check=False, capture_output=True, timeout=30, **more)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    "words", [["bridge-up", "lo", "172.16.0.1/24"], ["x\ny" * 9], ["show", "br-banger\x7f"]]
)
def test_a_refusal_is_one_line_and_status_2(words: list[str]) -> None:
    done = run(words, stdin=subprocess.DEVNULL)
    assert 2 == done.returncode
    assert done.stderr.startswith(b"banger-net-helper: refused: ")
    assert 1 == done.stderr.count(b"\n")
    assert "invalid_input" == json.loads(done.stdout)["error"]["code"]


def test_a_stdin_of_10_mb_is_refused_without_being_held() -> None:
    done = run(["rules", "br-banger", "172.16.0.1/24"], input=b"x" * 10_000_000)
    assert 2 == done.returncode


@pytest.mark.skipif(os.geteuid() != 0, reason="has to be root to stop being it")
def test_without_root_nothing_is_tried() -> None:
    done = run(["show", "br-banger"], stdin=subprocess.DEVNULL, user=65534)
    assert 1 == done.returncode
    assert b"banger-net-helper: failed: it has to run as root\n" == done.stderr


def test_the_lock_is_no_link_and_no_others_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    (tmp_path / "link").symlink_to(victim)
    monkeypatch.setattr(helper, "LOCK_PATH", str(tmp_path / "link"))
    with pytest.raises(OSError), helper._locked():
        pass
    assert not victim.exists()
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(helper, "LOCK_PATH", str(tmp_path / "fifo"))
    with pytest.raises(Conflict), helper._locked():
        pass


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(helper, "PROGRAM_PATH", "/nonexistent")
    with pytest.raises(Unavailable, match="nft is not installed"):
        helper._run("nft", "list", "tables")


def row(**more: object) -> dict[str, object]:
    return {"ifname": TAP, "linkinfo": {"info_kind": "tun"}, "ifalias": "banger 7 idle", **more}


def test_a_tap_is_known_by_its_mark() -> None:
    assert helper._check_tap(row(), "br-banger", 7) is None
    held = row(ifalias="banger 7 0123456789ab", master="br-banger")
    assert "0123456789ab" == helper._check_tap(held, "br-banger", 7)


@pytest.mark.parametrize(
    "more",
    [
        {"ifalias": None},
        {"ifalias": ""},
        {"ifalias": "banger 8 idle"},
        {"ifalias": "banger 7"},
        {"ifalias": "banger 7 idle\n"},
        {"ifalias": "banger 07 idle"},
        {"linkinfo": {"info_kind": "veth"}},
        {"linkinfo": {}},
        {"master": "docker0"},
    ],
)
def test_a_tap_without_the_mark_is_not_touched(more: dict[str, object]) -> None:
    with pytest.raises(BangerError):
        helper._check_tap(row(**more), "br-banger", 7)


def listing(policy: str, *rules: tuple[str, list[object]]) -> str:
    chain = {"family": "ip", "table": "filter", "name": "FORWARD", "policy": policy}
    return json.dumps(
        {"nftables": [{"chain": chain}, *({"rule": {"chain": c, "expr": e}} for c, e in rules)]}
    )


def accepts(key: str, name: str) -> list[object]:
    match = {"op": "==", "left": {"meta": {"key": key}}, "right": name}
    return [{"match": match}, {"counter": {}}, {"accept": None}]


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (listing("accept"), False),
        (listing("drop"), True),
        (listing("drop", ("DOCKER-USER", accepts("iifname", "br-banger"))), True),
        (
            listing(
                "drop",
                ("DOCKER-USER", accepts("iifname", "br-banger")),
                ("FORWARD", accepts("oifname", "br-banger")),
            ),
            False,
        ),
        (
            listing(
                "drop",
                ("OTHER", accepts("iifname", "br-banger")),
                ("FORWARD", accepts("oifname", "docker0")),
            ),
            True,
        ),
    ],
)
def test_a_forward_policy_that_stops_vms_is_seen(
    listed: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helper, "_run", lambda *words: listed)
    assert expected == helper._is_forward_dropped("br-banger", {("ip", "filter")})
    assert not helper._is_forward_dropped("br-banger", {("inet", "filter")})


def test_only_plan_and_errors_of_banger_come_along_to_root() -> None:
    code = "import sys, banger.network.helper; print(*sorted(m for m in sys.modules if m.startswith('banger')))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], check=False, capture_output=True, text=True
    )
    expected = [
        "banger",
        "banger.errors",
        "banger.network",
        "banger.network.helper",
        "banger.network.plan",
    ]
    assert expected == done.stdout.split()
