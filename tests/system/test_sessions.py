"""Sessions in a real machine: what survives the daemon, what `stop` finds, and a stop of the VM."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from banger.host.process import find_by_argument, start_ticks
from tests.support.sandbox import Sandbox
from tests.support.tiny import make_tiny_image

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

MACHINE = ("--image", "tiny", "--network", "none", "--memory", "512M", "--vcpu", "1")
WAIT_S = 120.0


@pytest.fixture
def user(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A user with one running VM, `a`."""
    made = Sandbox.with_own_images()
    try:
        rootfs = make_tiny_image(made.home / "own")
        made.ok("image", "register", "--name", "tiny", "--rootfs", str(rootfs))
        made.ok("vm", "create", "--name", "a", *MACHINE)
        yield made
    finally:
        made.keep_evidence(request.node.name)
        made.close()


def _start(user: Sandbox, name: str, script: str, *options: str) -> Any:
    return json.loads(
        user.ok("vm", "session", "start", "a", "--name", name, "--json", *options, "--",
                "sh", "-c", script)
    )  # fmt: skip


def _until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _processes(user: Sandbox) -> bytes:
    """Return the command lines of the guest."""
    return user.ok("vm", "exec", "a", "--", "sh", "-c", "/bin/busybox cat /proc/[0-9]*/cmdline")


def test_it_survives_a_killed_daemon_and_its_socket_does_too(user: Sandbox) -> None:
    echo = 'while read line; do echo "got $line"; done'
    shown = _start(user, "echo", echo)
    pid = user.daemon_pid()
    assert pid is not None
    with socket.socket(socket.AF_UNIX) as program:
        program.settimeout(WAIT_S)
        program.connect(shown["socket"])
        lines = program.makefile("rwb")
        lines.write(b'{"raw":true}\n')
        lines.flush()
        assert json.loads(lines.readline())["ok"] is True
        os.kill(pid, signal.SIGKILL)
        _until(lambda: start_ticks(pid) is None)
        lines.write(b"one\n")
        lines.flush()
        assert lines.readline() == b"got one\n"
        # The next daemon takes the VM up, and ends nothing that is its.
        user.ok("vm", "list")
        lines.write(b"two\n")
        lines.flush()
        assert lines.readline() == b"got two\n"
        lines.close()
    _until(lambda: not user.json("vm", "session", "show", "a", "echo")["writer"])
    user.ok("vm", "session", "send", "a", "echo", "three")
    _until(lambda: user.ok("vm", "session", "logs", "a", "echo").endswith(b"got three\n"))


def test_stop_finds_a_child_that_left_its_session_twice(user: Sandbox) -> None:
    child = "/bin/busybox setsid sh -c '/bin/busybox setsid /bin/busybox sleep 3333 & exit' &"
    _start(user, "tree", f"{child} exec /bin/busybox sleep 4444")
    _until(lambda: b"3333" in _processes(user) and b"4444" in _processes(user))
    assert user.ok("vm", "session", "stop", "a", "tree") == b"tree ended (SIGTERM)\n"
    left = _processes(user)
    assert b"3333" not in left and b"4444" not in left
    assert user.json("vm", "session", "show", "a", "tree")["reason"] == "stopped"


def test_a_restarted_machine_says_what_ended_with_it(user: Sandbox) -> None:
    _start(user, "up", "echo before; exec /bin/busybox sleep 3333", "--restart", "on-failure")
    _start(user, "done", "exit 5")
    assert user.run("vm", "session", "wait", "a", "done").returncode == 5
    vm = user.json("vm", "show", "a")
    mark = f"banger-vm-{vm['id']}-{user.layout.runtime.name}"
    _until(lambda: user.ok("vm", "session", "logs", "a", "up") == b"before\n")
    user.ok("vm", "stop", "a")
    _until(lambda: not find_by_argument(mark))
    assert not (user.layout.runtime_vms / vm["id"]).exists()
    user.ok("vm", "start", "a")
    sessions = {found["name"]: found for found in user.json("vm", "session", "list", "a")}
    assert (sessions["up"]["state"], sessions["up"]["reason"]) == ("ended", "machine")
    assert sessions["done"]["exit"] == {"code": 5, "signal": None}
    assert user.ok("vm", "session", "logs", "a", "up") == b"before\n"
    # It saw the SIGTERM of an orderly stop, or nothing any more.
    assert user.run("vm", "session", "wait", "a", "up").returncode in (125, 128 + signal.SIGTERM)
    user.ok("vm", "session", "rm", "a", "up", "done")
    shown = _start(user, "up", "echo again; read x")
    assert os.path.exists(shown["socket"])
