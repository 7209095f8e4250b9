"""The user's files in a VM: there at each start, nowhere else, and in no image or log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sandbox import Sandbox
from tests.support.tiny import make_tiny_image

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

MACHINE = ("--image", "tiny", "--network", "none", "--memory", "512M", "--vcpu", "1")
SECRET = "sk-canary-0123456789"
CLAUDE = "/root/.claude/.credentials.json"


@pytest.fixture
def user(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A user with logins of two agents, a file of their own to sync, and one that is absent."""
    made = Sandbox.with_own_images()
    try:
        _write(made.home / ".claude/.credentials.json", SECRET + "-1")
        _write(made.home / ".claude/history.jsonl", "what was said")
        _write(made.home / ".local/share/opencode/auth.json", SECRET + "-2")
        _write(made.home / "dotfiles/tool", SECRET + "-3")
        _write(
            made.home / ".config/banger/config.toml",
            '[[file_sync]]\nhost = "~/dotfiles/tool"\nguest = "/etc/tool/[a]*"\nmode = "0640"\n'
            '[[file_sync]]\nhost = "~/absent"\nguest = "/etc/absent"\n',
        )
        rootfs = make_tiny_image(made.home / "own")
        made.ok("image", "register", "--name", "tiny", "--rootfs", str(rootfs))
        yield made
    finally:
        made.keep_evidence(request.node.name)
        made.close()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _run(user: Sandbox, vm: str, script: str) -> str:
    return user.ok("vm", "exec", vm, "--", "sh", "-c", script).decode()


def test_logins_arrive_at_each_start_and_leave_with_no_image(user: Sandbox) -> None:
    user.ok("vm", "create", "--name", "a", *MACHINE)
    stat = "/bin/busybox stat -c '%u:%g %a %n'"
    assert _run(user, "a", f"cd /root; {stat} .claude .local .local/share .local/share/opencode; "
                f"{stat} .claude/.credentials.json /etc/tool /etc/tool/*; "
                "cat .claude/.c* .local/share/opencode/* /etc/tool/*; ls /etc/absent .pi 2>&1 || true") == (
        "0:0 700 .claude\n0:0 700 .local\n0:0 700 .local/share\n0:0 700 .local/share/opencode\n"
        "0:0 600 .claude/.credentials.json\n0:0 755 /etc/tool\n0:0 640 /etc/tool/[a]*\n"
        f"{SECRET}-1{SECRET}-2{SECRET}-3"
        "ls: /etc/absent: No such file or directory\nls: .pi: No such file or directory\n"
    )  # fmt: skip
    shown = user.json("vm", "show", "a")
    assert shown["credentials"] is True
    assert shown["synced_files"] == [
        "/etc/tool/[a]*", CLAUDE, "/root/.local/share/opencode/auth.json"
    ]  # fmt: skip
    assert CLAUDE.encode() in user.ok("vm", "show", "a")

    # What changed here is there after the next start; what is absent here stays as it is.
    _write(user.home / ".claude/.credentials.json", SECRET + "-new")
    (user.home / ".local/share/opencode/auth.json").unlink()
    _run(user, "a", "echo mine > /root/.claude/mine; /bin/busybox touch /etc/tool/a1")
    user.ok("vm", "restart", "a")
    assert _run(user, "a", f"cat {CLAUDE} /root/.local/share/opencode/auth.json /root/.claude/mine") == (
        f"{SECRET}-new{SECRET}-2mine\n"
    )  # fmt: skip

    user.ok("vm", "stop", "a")
    user.ok("image", "promote", "a", "--name", "mine")
    found = user.layout.data / "images" / "mine" / "rootfs.ext4"
    assert SECRET.encode() not in found.read_bytes()
    user.ok("vm", "create", "--name", "b", *MACHINE, "--image", "mine", "--no-credentials")
    assert _run(user, "b", "ls -A /root/.claude /etc/tool") == (
        "/etc/tool:\na1\n\n/root/.claude:\nmine\n"
    )
    shown = user.json("vm", "show", "b")
    assert (shown["credentials"], shown["synced_files"]) == (False, [])
    logs = list(user.layout.daemon_log.parent.glob("*"))
    assert logs
    assert not [log for log in logs if log.is_file() and SECRET.encode() in log.read_bytes()]


def test_a_symlink_on_the_way_is_a_warning_and_leads_nowhere(user: Sandbox) -> None:
    user.ok("vm", "create", "--name", "a", *MACHINE)
    _run(
        user, "a",
        "/bin/busybox rm -r /root/.claude /root/.local/share/opencode/auth.json /etc/tool; "
        "/bin/busybox mkdir /victim; /bin/busybox ln -s /victim /root/.claude; echo kept > /victim/f; "
        "/bin/busybox ln -s /victim/f /root/.local/share/opencode/auth.json; echo x > /etc/tool",
    )  # fmt: skip
    user.ok("vm", "stop", "a")
    started = user.run("vm", "start", "a")
    assert started.returncode == 0
    for path in (CLAUDE, "/etc/tool/[a]*"):
        assert f"a did not get {path}: it refuses".encode() in started.stderr
    assert SECRET.encode() not in started.stderr
    assert _run(user, "a", "ls -A /victim; cat /victim/f /etc/tool") == "f\nkept\nx\n"
    # A link in the place of the file itself gives way to the file.
    auth = "/root/.local/share/opencode/auth.json"
    assert _run(user, "a", f"/bin/busybox stat -c %F {auth}; cat {auth}") == (
        f"regular file\n{SECRET}-2"
    )


def test_what_is_no_plain_file_here_is_skipped_with_a_warning(user: Sandbox) -> None:
    login = user.home / ".claude/.credentials.json"
    login.unlink()
    login.mkdir()
    _write(user.home / ".pi/agent/auth.json", "x" * (1 << 20) + "y")
    created = user.run("vm", "create", "--name", "a", *MACHINE)
    assert created.returncode == 0
    assert b"~/.claude/.credentials.json is not synced: not a plain file" in created.stderr
    assert b"~/.pi/agent/auth.json is not synced: larger than 1024 KiB" in created.stderr
    assert _run(user, "a", "ls -A /root/.claude /root/.pi 2>&1; true").count("No such file") == 2


def test_none_when_the_configuration_says_so(user: Sandbox) -> None:
    user.ok("config", "unset", "file_sync")
    user.ok("config", "set", "credential_sync", "false")
    user.ok("daemon", "stop")  # it has read the file
    user.ok("vm", "create", "--name", "a", *MACHINE)
    assert user.json("vm", "show", "a")["synced_files"] == []
    assert "No such file" in _run(user, "a", "ls -A /root/.claude 2>&1; true")
