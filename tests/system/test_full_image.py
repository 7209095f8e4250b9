"""The image people get, once: Docker on real ext4, its tools, the guest's way out."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import acp
import pytest

from tests.support.artifacts import need_image, need_kernel, need_opencode
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


def test_a_repository_goes_there_and_its_work_comes_back(vm: Sandbox, tmp_path: Path) -> None:
    repo = tmp_path / "proj"
    repo.mkdir()
    git = ["git", "-c", "user.name=T", "-c", "user.email=t@example.org", "-C", str(repo)]
    subprocess.run([*git, "init", "-q", "-b", "main"], check=True)
    (repo / ".mise.toml").write_text('[env]\nFROM_MISE = "yes"\n')
    (repo / "file").write_text("one\n")
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    subprocess.run([*git, "config", "user.name", "Here"], check=True)
    subprocess.run([*git, "config", "user.email", "here@example.org"], check=True)
    script = (
        "echo two >>file; git commit -qam second; echo three >>file; echo new >untracked; exit 3"
    )
    run = ("vm", "run", "--name", "work", "--vcpu", "2", "--memory", "1G", str(repo))
    ran = vm.run(*run, "--branch", "there", "--", "sh", "-c", script, timeout_s=600)
    assert ran.returncode == 3, ran.stderr.decode()
    log = "/root/.cache/banger/vm-run-tooling-proj.log"
    assert f"mise installs its tools in the background: {log}".encode() in ran.stderr
    ended = f"for i in $(seq 120); do grep -q ended {log} && break; sleep 1; done; cat {log}"
    told = vm.ok("vm", "exec", "work", "--", "sh", "-c", ended, timeout_s=300).decode()
    assert told.endswith("ended with 0\n"), told
    status = vm.json("vm", "workspace", "status", "work", str(repo))
    assert (status["branch"], [one["subject"] for one in status["commits"]]) == (
        "there",
        ["second"],
    )
    assert {(one["status"], one["path"]) for one in status["changes"]} == {
        (" M", "file"), ("??", "untracked")
    }  # fmt: skip
    vm.ok("vm", "workspace", "pull", "work", str(repo), "--uncommitted")
    there = "banger/work/there"
    shown = subprocess.run(
        [*git, "log", "--format=%an %s", f"main..{there}"], check=True, capture_output=True
    )
    assert shown.stdout.decode().splitlines() == [
        "Here Uncommitted changes in work:/root/proj", "Here second"
    ]  # fmt: skip
    files = subprocess.run([*git, "show", f"{there}:file"], check=True, capture_output=True)
    assert files.stdout == b"one\ntwo\nthree\n"
    assert (repo / "file").read_text() == "one\n"
    vm.ok("vm", "delete", "work")


class _Editor(acp.Client):
    """What an editor is in the Agent Client Protocol: here it remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    async def session_update(self, session_id: str, update: Any, **_: Any) -> None:
        self.told.append(update.content.text)


def test_an_editor_speaks_with_an_agent_in_there(vm: Sandbox) -> None:
    """Both ends are the protocol's own SDK; what shells print at login is nowhere between them."""
    site = Path(acp.__file__).parents[1]
    vm.ok("vm", "exec", VM, "--", "mkdir", "-p", "/opt/acp")
    names = ("acp", "annotated_types", "pydantic", "pydantic_core", "typing_extensions.py",
             "typing_inspection")  # fmt: skip
    for name in names:
        vm.ok("vm", "cp", str(site / name), f"{VM}:/opt/acp/")
    echo = Path(__file__).parents[1] / "support" / "acp_echo.py"
    vm.ok("vm", "cp", str(echo), f"{VM}:/opt/acp/echo.py")
    _shell(vm, "for f in ~/.bashrc ~/.profile /etc/profile.d/x.sh; do echo 'echo noise' >>$f; done; "
               "echo noise >/etc/motd")  # fmt: skip
    big = "x" * (16 << 20)

    async def talk() -> tuple[list[str], int | None]:
        editor = _Editor()
        words = [str(word) for word in vm.command("vm", "acp", VM, "-e", "PYTHONPATH=/opt/acp", "--",
                                                  "python3", "/opt/acp/echo.py")]  # fmt: skip
        limit = {"limit": 64 << 20, "stderr": asyncio.subprocess.DEVNULL}
        async with acp.spawn_agent_process(
            editor, *words, env=vm.environment, transport_kwargs=limit
        ) as (agent, process):
            await agent.initialize(protocol_version=acp.PROTOCOL_VERSION)
            session = await agent.new_session(cwd="/root", mcp_servers=[])
            for text in ("hello", big):
                done = await agent.prompt(
                    session_id=session.session_id, prompt=[acp.text_block(text)]
                )
                assert done.stop_reason == "end_turn"
        return editor.told, process.returncode

    told, status = asyncio.run(asyncio.wait_for(talk(), timeout=400))
    assert [len(text) for text in told] == [5, len(big)]
    assert told == ["hello", big]
    assert status == 0
    assert _shell(vm, "pgrep -f [a]cp/echo.py || true") == ""


@pytest.mark.skipif(shutil.which("npm") is None, reason="no npm here to get opencode with")
def test_opencode_answers_an_editor(vm: Sandbox) -> None:
    """The real agent, which is the default of `vm acp`. It needs no model before it is prompted."""
    vm.ok("vm", "cp", str(need_opencode()), f"{VM}:/usr/local/bin/", timeout_s=600)

    async def talk() -> tuple[Any, Any]:
        words = [str(word) for word in vm.command("vm", "acp", VM)]
        async with acp.spawn_agent_process(
            _Editor(), *words, env=vm.environment, transport_kwargs={"limit": 64 << 20}
        ) as (agent, _):
            found = await agent.initialize(protocol_version=acp.PROTOCOL_VERSION)
            return found, await agent.new_session(cwd="/root", mcp_servers=[])

    found, session = asyncio.run(asyncio.wait_for(talk(), timeout=600))
    assert found.protocol_version == acp.PROTOCOL_VERSION
    assert found.agent_info.name.lower() == "opencode"
    assert session.session_id.startswith("ses_")
    assert _shell(vm, "pgrep -f '[o]pencode acp' || true") == ""
