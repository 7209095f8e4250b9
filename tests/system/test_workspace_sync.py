"""A repository kept up to date in a real machine: in, again, and while it is watched."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.artifacts import need_image
from tests.support.sandbox import Sandbox

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

IMAGE = "debian-bookworm"


@pytest.fixture
def user(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    need_image(IMAGE)
    made = Sandbox()
    try:
        yield made
    finally:
        made.keep_evidence(request.node.name)
        made.close()


def _git(repo: Path, *words: str) -> str:
    git = ["git", "-c", "user.name=B", "-c", "user.email=b@example.org", "-C", str(repo)]
    return subprocess.run([*git, *words], check=True, capture_output=True, text=True).stdout


def _guest(user: Sandbox, script: str) -> str:
    return user.ok("vm", "exec", "box", "--", "sh", "-c", f"cd /root/repo; {script}").decode()


def test_a_copy_follows_the_repository_until_the_machine_stops(user: Sandbox) -> None:
    repo = user.root / "repo"
    repo.mkdir()
    _git(repo, "init", "-q", "-b", "main")
    for number in range(500):
        (repo / f"f{number}").write_text("1\n")
    (repo / "-odd\nname").write_text("odd")
    _git(repo, "add", "-A")
    _git(repo, "commit", "-qm", "first")
    user.ok("vm", "run", "-d", "--name", "box", "--image", IMAGE, str(repo))

    # `vm run` made a copy that prepare knows.
    (repo / "f7").write_text("2\n")
    (repo / "-odd\nname").unlink()
    said = user.json("vm", "workspace", "prepare", "box", str(repo))
    assert {key: said[key] for key in ("sent", "deleted", "git", "conflicts")} == {
        "sent": 1, "deleted": 1, "git": "same", "conflicts": []
    }  # fmt: skip
    assert _guest(user, "cat f7; git status --porcelain -z").split("\n", 1)[0] == "2"
    _git(repo, "add", "-A")
    _git(repo, "commit", "-qm", "second")
    assert user.json("vm", "workspace", "sync", "box", str(repo))["git"] == "sent"
    assert _guest(user, "git log -1 --format=%s; git status --porcelain") == "second\n"
    _guest(user, "git fsck --strict")

    watching = user.popen("vm", "workspace", "sync", "box", str(repo), "--watch")
    assert watching.stderr is not None
    while b"watching" not in watching.stderr.readline():
        assert watching.poll() is None
    _guest(user, "echo guest >f8")
    (repo / "f8").write_text("host\n")
    (repo / "f9").write_text("edited while watched\n")
    deadline = time.monotonic() + 60
    while _guest(user, "cat f9") != "edited while watched\n":
        assert time.monotonic() < deadline
    assert _guest(user, "cat f8") == "guest\n"
    user.ok("vm", "stop", "box")
    _, told = watching.communicate(timeout=60)
    assert watching.returncode == 0, told
    assert b"box has stopped" in told
    assert told.count(b"f8 stays as it is there") == 1
