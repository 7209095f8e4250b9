"""`--forward-agent` into a real machine: over the agent's stream, and by OpenSSH's own forwarding."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.artifacts import need_image, need_kernel
from tests.support.sandbox import Sandbox

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

IMAGE = "debian-bookworm-minimal"
VM = "sandbox"


@pytest.fixture(scope="module")
def vm(shared_sandbox: Sandbox) -> Iterator[Sandbox]:
    """A user with one running VM, and an ssh-agent that holds one key."""
    need_kernel()
    need_image(IMAGE)
    user = shared_sandbox
    path = user.root / "ssh-agent"
    started = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        user.environment["SSH_AUTH_SOCK"] = str(path)
        key = user.root / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        subprocess.run(["ssh-add", "-q", key], env=user.environment, check=True)
        key.unlink()
        user.ok("vm", "create", "--name", VM, "--image", IMAGE, "--vcpu", "2", "--memory", "1G")
        yield user
    finally:
        started.kill()
        started.wait()


@pytest.fixture(scope="module")
def public_key(vm: Sandbox) -> bytes:
    return (vm.root / "key.pub").read_bytes()


def _exec(user: Sandbox, *argv: str, options: tuple[str, ...] = (), stdin: bytes = b""):  # type: ignore[no-untyped-def]
    return user.run("vm", "exec", "--forward-agent", *options, VM, "--", *argv, stdin=stdin)


def _sockets(user: Sandbox) -> bytes:
    return user.ok("vm", "exec", VM, "--", "sh", "-c", "ls -d /run/banger-ssh-* 2>/dev/null; true")


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_exec_gives_a_user_of_the_guest_the_hosts_keys(
    vm: Sandbox, public_key: bytes, user: str
) -> None:
    done = _exec(vm, "ssh-add", "-L", options=("--user", user))
    assert (done.returncode, done.stdout) == (0, public_key), done.stderr
    script = 'stat -c "%a %U" "$SSH_AUTH_SOCK" "${SSH_AUTH_SOCK%/*}"'
    done = _exec(vm, "sh", "-c", script, options=("--user", user))
    assert done.stdout.decode() == f"600 {user}\n700 {user}\n"
    assert _sockets(vm) == b""


def test_a_guest_logs_in_elsewhere_with_a_key_it_does_not_have(
    vm: Sandbox, public_key: bytes
) -> None:
    vm.ok("vm", "ssh", VM, "--", "true", timeout_s=300)  # its sshd is up
    script = (
        "useradd -m -s /bin/sh friend && install -d -o friend ~friend/.ssh &&"
        " cat >~friend/.ssh/authorized_keys"
    )
    vm.ok("vm", "exec", VM, "--", "sh", "-c", script, stdin=public_key)
    ssh = ("ssh", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "friend@localhost")
    done = _exec(vm, *ssh, "id", "-un")
    assert (done.returncode, done.stdout) == (0, b"friend\n"), done.stderr
    # From there on with the guest's own -A: two hops.
    done = _exec(vm, *ssh[:1], "-A", *ssh[1:], "ssh-add", "-L")
    assert (done.returncode, done.stdout) == (0, public_key), done.stderr
    assert vm.run("vm", "exec", VM, "--", *ssh, "true").returncode == 255


def test_a_guest_cannot_empty_the_ssh_agent(vm: Sandbox, public_key: bytes) -> None:
    assert _exec(vm, "ssh-add", "-D").returncode != 0
    assert _exec(vm, "ssh-add", "-L").stdout == public_key


def test_a_killed_command_line_leaves_no_socket_in_the_guest(vm: Sandbox) -> None:
    running = vm.popen("vm", "exec", "--forward-agent", VM, "--", "sh", "-c", "echo up; sleep 600")
    assert running.stdout is not None
    assert running.stdout.readline() == b"up\n"
    assert _sockets(vm) != b""
    running.kill()
    running.communicate()
    deadline = time.monotonic() + 60
    while _sockets(vm) != b"":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_ssh_forwards_by_itself(vm: Sandbox, public_key: bytes) -> None:
    done = vm.run("vm", "ssh", "--forward-agent", VM, "--", "ssh-add -L", timeout_s=300)
    assert (done.returncode, done.stdout) == (0, public_key), done.stderr
    done = vm.run("vm", "ssh", VM, "--", 'echo "${SSH_AUTH_SOCK-none}"', timeout_s=300)
    assert done.stdout == b"none\n"


def test_run_enters_with_the_ssh_agent(vm: Sandbox, public_key: bytes) -> None:
    status, screen = vm.on_a_terminal(
        "vm", "run", "--name", VM, "--forward-agent", typed=b"ssh-add -L; exit 4\n"
    )
    assert status == 4, screen
    assert public_key.split()[1] in screen


def test_a_terminal_over_the_agent_has_it_too(vm: Sandbox, public_key: bytes) -> None:
    status, screen = vm.on_a_terminal(
        "vm", "exec", "-it", "--forward-agent", VM, "--", "bash", typed=b"ssh-add -L; exit 6\n"
    )
    assert status == 6, screen
    assert public_key.split()[1] in screen
    assert _sockets(vm) == b""


def test_without_an_ssh_agent_no_vm_is_made(vm: Sandbox) -> None:
    done = vm.run(
        "vm", "run", "--name", "other", "--forward-agent", "--", "true",
        env={"SSH_AUTH_SOCK": str(Path("/nonexistent"))},
    )  # fmt: skip
    assert done.returncode == 125
    assert b"ssh-add" in done.stderr
    assert [row["name"] for row in vm.json("vm", "list")] == [VM]
