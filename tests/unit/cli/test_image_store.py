"""`image register`, `export`, `delete` and `catalog` against the fake daemon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from banger.cli import completion
from tests.unit.cli.conftest import Cli
from tests.unit.client.fake_daemon import FakeDaemon


def bodies(daemon: FakeDaemon, method: str, path: str) -> list[Any]:
    return [body for m, p, body in daemon.requests if (m, p) == (method, path)]


def test_register_sends_whole_paths_and_only_what_was_given(
    cli: Cli, daemon: FakeDaemon, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    path = "/v1/images/register"
    daemon.answers[f"POST {path}"] = daemon.operation(result={"name": "base"})
    assert cli.run("image", "register", "--name", "base", "--rootfs", "r.ext4").out == "base\n"
    words = ["--link", "-f", "--kernel", "boot/vmlinuz", "--modules", "m", "--initrd", "i"]
    ran = cli.run("image", "register", "--name", "base", "--rootfs", "/r", *words, "--json")
    assert json.loads(ran.out) == {"name": "base"}
    assert bodies(daemon, "POST", path) == [
        {"name": "base", "rootfs": f"{home}/r.ext4", "link": False, "force": False},
        {
            "name": "base", "rootfs": "/r", "link": True, "force": True,
            "kernel": f"{home}/boot/vmlinuz", "modules": f"{home}/m", "initrd": f"{home}/i",
        },
    ]  # fmt: skip
    assert cli.run("image", "register", "--name", "base").status == 2


def test_export_prints_what_sha256sum_does(
    cli: Cli, daemon: FakeDaemon, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    done = {"name": "a", "path": f"{home}/a.tar.zst", "sha256": "ab" * 32, "size_bytes": 1}
    daemon.answers["POST /v1/images/a/export"] = daemon.operation(result=done)
    assert cli.run("image", "export", "a", "-o", "a.tar.zst").out == f"{'ab' * 32}  a.tar.zst\n"
    assert json.loads(cli.run("image", "export", "a", "-o", "a.tar.zst", "--json").out) == done
    sent = {"path": f"{home}/a.tar.zst", "force": False}
    assert bodies(daemon, "POST", "/v1/images/a/export") == [sent, sent]
    assert cli.run("image", "export", "a").status == 2


def test_delete_tells_who_is_stranded(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["DELETE /v1/images/a"] = {"ok": True, "stranded": ["box", "fox"]}
    ran = cli.run("image", "rm", "--force", "a")
    assert (ran.status, ran.out) == (0, "a deleted\n")
    assert "until a is back these do not start: box, fox" in ran.err
    cli.run("image", "delete", "a")
    assert bodies(daemon, "DELETE", "/v1/images/a") == [{"force": True}, None]
    ran = cli.run("image", "delete", "a", "missing", "--json")
    assert ran.status == 125
    assert [entry["ok"] for entry in json.loads(ran.out)] == [True, False]


def test_catalog_list_is_a_table_with_warnings_beside_it(cli: Cli, daemon: FakeDaemon) -> None:
    entry = {
        "name": "base", "kind": "bundle", "description": "Ours", "source": "https://h/b.tar.zst",
        "pinned": True, "kernel": "", "catalog": "/srv/images.toml",
    }  # fmt: skip
    found = {"entries": [entry], "warnings": ["https://h/images.toml is out of reach"]}
    daemon.answers["GET /v1/catalog"] = found
    ran = cli.run("image", "catalog", "list")
    assert ran.out.splitlines()[1].split() == ["base", "bundle", "/srv/images.toml", "yes", "Ours"]
    assert "out of reach" in ran.err
    assert json.loads(cli.run("image", "catalog", "list", "--json").out) == found
    for words in (["list", "x"], ["list", "--offline"], ["chek"], []):
        assert cli.run("image", "catalog", *words).status == 2


def test_catalog_check_needs_no_daemon(cli: Cli, home: str) -> None:
    assert cli.run("image", "catalog", "check").out == "images.toml: ok, 2 images\n"
    ran = cli.run("image", "catalog", "check", f"{home}/absent.toml")
    assert ran.status == 1
    assert "No such file" in ran.out
    assert not os.path.exists(f"{home}/.local/share/banger")


def test_completion_knows_the_verbs() -> None:
    assert completion.candidates(["image", "catalog"], "") == ["list", "check"]
    assert completion.candidates(["image", "register", "--kernel"], "") == ["__files__"]
    assert "--link" in completion.candidates(["image", "register"], "--l")


def test_the_verbs_import_nothing_heavy() -> None:
    code = (
        "import sys; import banger.cli.image_store; "
        "print([m for m in ('asyncio', 'msgspec', 'httpx2', 'tempfile') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout == "[]\n"
