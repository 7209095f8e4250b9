"""What `--forward-agent` turns into, and what is told before anything is made."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.guest import agent
from banger.paths import Paths
from tests.unit.cli.conftest import Cli
from tests.unit.client.fake_daemon import FakeDaemon, make_vm


@pytest.fixture
def ssh_agent(home: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The user's ssh-agent, a real one without keys."""
    path = f"{home}/ssh-agent"
    started = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not os.path.exists(path):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    monkeypatch.setenv("SSH_AUTH_SOCK", path)
    yield
    started.kill()
    started.wait()


def test_ssh_is_told_to_forward_by_itself(
    cli: Cli,
    daemon: FakeDaemon,
    paths: Paths,
    ssh_agent: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    became: list[list[str]] = []

    def become(_: str, argv: list[str]) -> None:
        became.append(argv[1:])
        raise SystemExit(0)

    endpoint = {"kind": "unix", "path": "/nonexistent"}
    daemon.answers["GET /v1/vms/box/connection"] = {"vm": make_vm(), "endpoint": endpoint}
    monkeypatch.setattr(agent, "find_shell", lambda *_: agent.Shell([b"/bin/bash"], "up"))
    monkeypatch.setattr(os, "execv", become)
    ran = cli.run("vm", "ssh", "--forward-agent", "box", "--", "true")
    assert "your ssh-agent holds no key yet: `ssh-add` gives it one" in ran.err
    config = f"{paths.runtime_dir}/ssh/id-box.conf"
    assert became == [["-A", "-F", config, "box", "--", "true"]]
    # Our configuration is the only one that ssh reads; it must leave -A alone.
    told = subprocess.run(
        [str(shutil.which("ssh")), "-G", "-A", "-F", config, "box"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "forwardagent yes" in told
    assert "identityagent" not in Path(config).read_text().lower()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vm", "exec", "-d", "--forward-agent", "box", "--", "true"], "-d ends it at once"),
        (["vm", "run", "-d", "--forward-agent", "--", "true"], "-d ends it at once"),
        (["vm", "run", "-d", "--forward-agent"], "-d ends it at once"),
        (["vm", "run", "--json", "--forward-agent"], "--json alone runs neither"),
    ],
)
def test_what_it_does_not_go_with(
    cli: Cli, daemon: FakeDaemon, ssh_agent: None, words: list[str], said: str
) -> None:
    ran = cli.run(*words)
    assert ran.status in (2, 125)
    assert said in ran.out + ran.err
    assert daemon.requests == []
