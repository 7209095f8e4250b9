"""The image people get, once: Docker on real ext4, its tools, the guest's way out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from tests.support.artifacts import need_image, need_kernel
from tests.support.sandbox import Sandbox

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(1200)]

VM = "full"
TOOLS = (
    "git jq curl gcc make python3 rg fd tmux vim less sudo ip iptables nft rsync unzip zstd ps "
    "docker containerd mise kmod udevadm dbus-daemon"
).split()


@pytest.fixture(scope="module")
def vm(shared_sandbox: Sandbox) -> Iterator[Sandbox]:
    """A user with one VM of the default image."""
    need_kernel()
    need_image("debian-bookworm")
    shared_sandbox.ok("vm", "create", "--name", VM, "--vcpu", "2", "--memory", "2G")
    yield shared_sandbox


def _shell(user: Sandbox, script: str, timeout_s: float = 300) -> str:
    done = user.run("vm", "exec", VM, "--", "sh", "-c", script, timeout_s=timeout_s)
    assert done.returncode == 0, f"{script}\n{done.stdout.decode()}\n{done.stderr.decode()}"
    return done.stdout.decode()


def test_the_promised_tools_are_there(vm: Sandbox) -> None:
    script = "; ".join(f"command -v {tool} >/dev/null || echo {tool}" for tool in TOOLS)
    assert _shell(vm, script + "; true") == ""
    assert _shell(vm, "mise --version && python3 -m venv /tmp/v && locale 2>&1 | grep LANG")


def test_the_guest_has_its_own_identity(vm: Sandbox) -> None:
    assert _shell(vm, "cat /etc/hostname").strip() == VM
    assert len(_shell(vm, "cat /etc/machine-id").strip()) == 32
    assert _shell(vm, "ls /etc/ssh/ssh_host_*").split() == [
        "/etc/ssh/ssh_host_ed25519_key",
        "/etc/ssh/ssh_host_ed25519_key.pub",
    ]


def test_docker_runs_a_container_on_overlay2_over_ext4(vm: Sandbox) -> None:
    vm.ok("vm", "exec", "--wait", VM, "--", "docker", "info", timeout_s=900)
    info = json.loads(_shell(vm, "docker info --format '{{json .}}'"))
    assert info["Driver"] == "overlay2"
    assert ["Backing Filesystem", "extfs"] in info["DriverStatus"]
    # A static program from the image itself makes the smallest container.
    _shell(
        vm,
        "cd /tmp && printf '#include <stdio.h>\\nint main(){puts(\"from a container\");}' > c.c && "
        "gcc -static -o hello c.c && tar c hello | docker import - hello >/dev/null",
    )
    assert _shell(vm, "docker run --rm hello /hello") == "from a container\n"


def test_the_guest_reaches_the_debian_archive(vm: Sandbox) -> None:
    deadline = time.monotonic() + 300
    # The archive may be slow or its mirror busy; the way out is what is tested.
    while True:
        done = vm.run("vm", "exec", VM, "--", "apt-get", "-qq", "update", timeout_s=300)
        if done.returncode == 0:
            return
        assert time.monotonic() < deadline, done.stderr.decode()


def test_git_works_in_a_workspace(vm: Sandbox) -> None:
    import subprocess

    repo = vm.root / "repo"
    repo.mkdir()
    git = ["git", "-c", "user.name=T", "-c", "user.email=t@example.org", "-C", str(repo)]
    subprocess.run([*git, "init", "-q", "-b", "main"], check=True)
    (repo / "Makefile").write_text("test:\n\t@git status --short; git log --format=%s\n")
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "the only commit"], check=True)
    (repo / "new").write_text("untracked")
    done = vm.run("vm", "run", "--rm", "--name", "work", str(repo), "--", "make", "test")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == "?? new\nthe only commit\n"
