"""The kernel verbs against the fake daemon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from banger.cli import completion
from tests.unit.cli.conftest import Cli
from tests.unit.client.fake_daemon import FakeDaemon

KERNEL: dict[str, Any] = {
    "name": "mine", "installed": True, "digest": "sha256:1", "size_bytes": 1, "disk_bytes": 2,
    "origin": "import:/k", "created_at": "2026", "description": "Mine", "used_by": ["box"],
    "release": "6.1.0", "used_by_images": ["base"],
}  # fmt: skip
OTHER = {**KERNEL, "name": "other", "installed": False, "used_by": [], "used_by_images": []}


def feature(option: str, state: str, need: str = "required", note: str = "") -> dict[str, str]:
    return {
        "option": option, "group": "docker", "need": need, "state": state, "why": "because",
        "note": note,
    }  # fmt: skip


def check(*features: dict[str, str], ok: bool = True, known: bool = True) -> dict[str, Any]:
    return {
        "name": "mine", "release": "6.1.0", "ok": ok, "config_known": known,
        "features": list(features),
    }  # fmt: skip


def asked(daemon: FakeDaemon) -> list[Any]:
    return [(path, body) for method, path, body in daemon.requests if method == "POST"]


def test_list_shows_what_is_installed_and_the_catalog_when_asked(
    cli: Cli, daemon: FakeDaemon
) -> None:
    daemon.answers["GET /v1/kernels"] = [KERNEL, OTHER]
    assert "other" not in cli.run("kernel", "list").out
    lines = cli.run("kernel", "list", "--available").out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["mine", "6.1.0", "yes"],
        ["other", "6.1.0", "no"],
    ]
    assert cli.run("kernel", "ls", "-q").out == "mine\n"
    assert cli.run("kernel", "ls", "-q", "--available").out == "mine\nother\n"
    assert len(json.loads(cli.run("kernel", "list", "--json").out)) == 2


def test_an_empty_list_names_the_next_command(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["GET /v1/kernels"] = [OTHER]
    ran = cli.run("kernel", "list")
    assert (ran.status, ran.out) == (0, "")
    assert "banger kernel list --available" in ran.err


def test_show_tells_users_and_features(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["GET /v1/kernels/mine"] = KERNEL
    daemon.answers["GET /v1/kernels/mine/check"] = check(
        feature("VETH", "module"), feature("KEYS", "built in"), feature("TUN", "missing")
    )
    out = cli.run("kernel", "show", "mine").out
    for told in ("6.1.0", "sha256:1", "import:/k", "box, image base"):
        assert told in out
    found = dict(line.split(":", 1) for line in out.splitlines())
    assert (found["built in"].strip(), found["as modules"].strip()) == ("KEYS", "VETH")
    assert found["missing"].strip() == "TUN"
    shown = json.loads(cli.run("kernel", "show", "mine", "--json").out)
    assert (shown["name"], shown["check"]["ok"]) == ("mine", True)


def test_show_of_a_kernel_that_is_not_there_asks_for_no_check(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["GET /v1/kernels/other"] = OTHER
    ran = cli.run("kernel", "show", "other")
    assert (ran.status, ran.err) == (0, "")
    assert json.loads(cli.run("kernel", "show", "other", "--json").out)["check"] is None


def test_show_config_prints_the_whole_of_it(cli: Cli, daemon: FakeDaemon) -> None:
    text = "# CONFIG_A is not set\nCONFIG_B=y\n"
    daemon.answers["GET /v1/kernels/mine/config"] = {"name": "mine", "config": text}
    assert cli.run("kernel", "show", "mine", "--config").out == text
    found = json.loads(cli.run("kernel", "show", "mine", "--config", "--json").out)
    assert found["config"] == text
    daemon.answers["GET /v1/kernels/mine/config"] = {"name": "mine", "config": ""}
    ran = cli.run("kernel", "show", "mine", "--config")
    assert (ran.status, ran.out) == (1, "")
    assert "not known" in ran.err


def test_import_sends_whole_paths_and_only_what_was_given(
    cli: Cli, daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.answers["POST /v1/kernels/mine/import"] = daemon.operation(result=KERNEL)
    monkeypatch.chdir(tmp_path)
    assert cli.run("kernel", "import", "mine", "--from", "k").out == "mine\n"
    assert asked(daemon)[-1] == ("/v1/kernels/mine/import", {"directory": f"{tmp_path}/k"})
    cli.run(
        *("kernel", "import", "mine", "--from", ".", "--vmlinux", "v", "--modules", "../m"),
        *("--config", "/c", "--force"),
    )
    assert asked(daemon)[-1][1] == {
        "directory": str(tmp_path),
        "kernel": f"{tmp_path}/v",
        "modules": f"{tmp_path.parent}/m",
        "config": "/c",
        "force": True,
    }
    assert cli.run("kernel", "import", "mine").status == 2


def test_check_is_a_table_and_an_exit_status(cli: Cli, daemon: FakeDaemon) -> None:
    path = "GET /v1/kernels/mine/check"
    daemon.answers[path] = check(
        feature("VETH", "module"), feature("TUN", "missing", "recommended")
    )
    ran = cli.run("kernel", "check", "mine")
    assert ran.status == 0
    assert ran.out.splitlines()[1].split() == ["docker", "VETH", "required", "module", "because"]
    assert "recommended, and missing: TUN" in ran.err
    daemon.answers[path] = check(feature("VETH", "missing", note="no file"), ok=False, known=False)
    ran = cli.run("kernel", "check", "mine")
    assert ran.status == 1
    assert "no file" in ran.out
    assert "lacks what is required: VETH" in ran.err
    assert "configuration is not known" in ran.err
    ran = cli.run("kernel", "check", "mine", "--json")
    assert (ran.status, json.loads(ran.out)["ok"]) == (1, False)


def test_names_and_files_are_completed(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["GET /v1/kernels"] = [KERNEL, OTHER]
    for verb in ("check", "show", "rm", "pull"):
        assert "mine" in completion.candidates(["kernel", verb], "")
    assert completion.candidates(["kernel", "import", "x", "--kernel"], "") == ["__files__"]
    assert completion.candidates(["kernel", "import", "x", "--from"], "") == ["__files__"]
    assert completion.candidates(["kernel", "import"], "") == []  # a name that is new
    assert "--modules" in completion.candidates(["kernel", "import", "x"], "--m")
