"""The real daemon: started once, found again, replaced, and clear about what stops it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.host.process import find_by_argument
from tests.support.sandbox import Sandbox


@pytest.fixture
def user() -> Iterator[Sandbox]:
    """A user with no image, no kernel and no daemon yet."""
    made = Sandbox(artifacts=False)
    yield made
    made.close()


def _daemons(user: Sandbox) -> list[int]:
    """Return the daemons whose environment is this user's."""
    marker = f"HOME={user.home}".encode()
    found = []
    for process in find_by_argument("banger.daemon.main"):
        try:
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        except OSError:
            continue
        if marker in environment.split(b"\0"):
            found.append(process.pid)
    return found


def test_ten_command_lines_at_once_start_one_daemon(user: Sandbox) -> None:
    started = [user.popen("vm", "list", "--json") for _ in range(10)]
    answers = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0] * 10, answers
    assert {out.strip() for out, _ in answers} == {b"[]"}
    assert len(_daemons(user)) == 1


def test_a_killed_daemon_is_started_again_over_its_stale_socket(user: Sandbox) -> None:
    first = user.daemon_pid() or user.json("vm", "list") or user.daemon_pid()
    assert first
    os.kill(first, signal.SIGKILL)
    while first in _daemons(user):
        time.sleep(0.01)
    assert user.layout.api_socket.exists()  # stale: nobody listens
    assert user.json("vm", "list") == []
    assert user.daemon_pid() not in (None, first)


def test_a_second_daemon_refuses_to_run(user: Sandbox) -> None:
    user.json("vm", "list")
    second = subprocess.run(
        [sys.executable, "-m", "banger.daemon.main"],
        env=user.environment, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert second.returncode == 1
    assert b"another bangerd runs" in second.stderr
    assert user.json("vm", "list") == []


def test_stop_ends_it_and_status_says_so_without_starting_one(user: Sandbox) -> None:
    user.json("vm", "list")
    user.ok("daemon", "stop")
    assert _daemons(user) == []
    assert not user.layout.api_socket.exists()
    assert json.loads(user.run("daemon", "status", "--json").stdout)["running"] is False
    assert _daemons(user) == []


def test_a_daemon_of_another_version_is_replaced(user: Sandbox, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(Path(__file__).parents[2] / "src" / "banger", other / "banger")
    (other / "banger" / "__init__.py").write_text('"""Another."""\n__version__ = "0.0.9"\n')
    old = subprocess.Popen(
        [sys.executable, "-m", "banger.daemon.main"],
        env={**user.environment, "PYTHONPATH": str(other)},
    )
    deadline = time.monotonic() + 30
    while not user.layout.api_socket.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert user.json("vm", "list") == []
    status = user.json("daemon", "status")
    assert status["pid"] != old.pid
    assert old.wait(30) == 0
    assert status["version"] != "0.0.9"


def test_a_damaged_database_is_named_with_the_way_out(user: Sandbox) -> None:
    user.layout.data.mkdir(parents=True)
    user.layout.database.write_bytes(b"no database at all" * 500)
    done = user.run("vm", "list")
    assert done.returncode == 125
    assert str(user.layout.database).encode() in done.stderr
    assert b"mv " in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_broken_config_is_named_with_the_nearest_key(user: Sandbox) -> None:
    user.layout.config.mkdir(parents=True)
    (user.layout.config / "config.toml").write_text('default_image = "x"\n')
    done = user.run("vm", "list")
    assert done.returncode == 125
    assert b"default_image" in done.stderr and b"did you mean" in done.stderr


def test_the_socket_is_private_and_speaks_only_what_the_table_says(user: Sandbox) -> None:
    user.json("vm", "list")
    assert user.layout.api_socket.stat().st_mode & 0o077 == 0
    assert user.layout.runtime.stat().st_mode & 0o777 == 0o700
    for request, status in (
        (b"GET /v1/nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"404"),
        (b"POST /v1/vms HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nConnection: close\r\n\r\n{",
         b"400"),
        (b"garbage\r\n\r\n", b"400"),
    ):  # fmt: skip
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(str(user.layout.api_socket))
            client.sendall(request)
            assert client.recv(65536).split(b" ")[1] == status


def test_an_unknown_image_and_vm_suggest_the_nearest(user: Sandbox) -> None:
    done = user.run("vm", "create", "--image", "debian-bokworm")
    assert done.returncode == 125
    assert b"did you mean debian-bookworm" in done.stderr
    assert user.run("vm", "show", "nothing").returncode == 125
    assert user.json("vm", "list") == []


def test_a_pull_that_is_interrupted_leaves_nothing_and_can_be_tried_again(user: Sandbox) -> None:
    pulling = user.popen("kernel", "pull", "generic-6.12")
    deadline = time.monotonic() + 60
    staging = user.layout.data / "staging"
    while not (staging.exists() and any(staging.iterdir())):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pulling.send_signal(signal.SIGINT)
    _, err = pulling.communicate(timeout=60)
    assert pulling.returncode == 130, err
    assert [path for path in staging.iterdir() if path.is_dir()] == []
    rows = {row["name"]: row["installed"] for row in user.json("kernel", "list")}
    assert rows["generic-6.12"] is False
    # And a daemon killed in the middle of one.
    pulling = user.popen("kernel", "pull", "generic-6.12")
    while not any(path.is_dir() for path in staging.iterdir()):
        time.sleep(0.02)
    daemon = user.daemon_pid()  # not by its command line: a child between fork and exec has it too
    assert daemon is not None
    os.kill(daemon, signal.SIGKILL)
    _, err = pulling.communicate(timeout=60)
    assert pulling.returncode == 125, err
    user.ok("kernel", "pull", "generic-6.12")
    assert [path for path in staging.iterdir() if path.is_dir()] == []


def test_an_unreachable_archive_is_said(user: Sandbox) -> None:
    user.layout.config.mkdir(parents=True)
    (user.layout.config / "config.toml").write_text('debian_mirror = "http://127.0.0.1:9/debian"\n')
    done = user.run("kernel", "pull", "generic-6.12")
    assert done.returncode == 125
    assert b"hint:" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_full_disk_is_said_and_nothing_is_left(user: Sandbox) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    # A file system of its own in a mount namespace of its own; the daemon starts inside.
    script = f"""
        mount -t tmpfs -o size=60m tmpfs {user.home}
        {sys.executable} -m banger kernel pull generic-6.12; echo "status $?"
        {sys.executable} -m banger daemon stop
        ls {user.layout.data}/kernels {user.layout.data}/staging
    """
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        env=user.environment, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert b"status 125" in done.stdout
    assert b"no space left" in done.stderr and b"hint:" in done.stderr
    assert b"generic" not in done.stdout.split(b"status 125")[1]
