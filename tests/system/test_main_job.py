"""`banger vm run` and its kin on a real machine: the small Debian image under QEMU."""

from __future__ import annotations

import json
import os
import shutil
import signal
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
    """A user with one running VM."""
    need_kernel()
    need_image(IMAGE)
    shared_sandbox.ok(
        "vm", "create", "--name", VM, "--image", IMAGE, "--vcpu", "2", "--memory", "1G"
    )
    yield shared_sandbox


def _exec(user: Sandbox, *argv: str | bytes, stdin: bytes = b"", options: tuple[str, ...] = ()):  # type: ignore[no-untyped-def]
    return user.run("vm", "exec", *options, VM, "--", *argv, stdin=stdin)


def test_the_isolation_in_force_is_shown(vm: Sandbox) -> None:
    (row,) = vm.json("vm", "list")
    assert (row["name"], row["state"]) == (VM, "running")
    assert row["accel"] in ("kvm", "tcg")
    assert row["accel"] in vm.ok("vm", "list").decode()
    assert row["accel"] in vm.ok("vm", "show", VM).decode()


def test_stdout_and_stderr_are_apart_and_the_exit_status_is_the_commands(vm: Sandbox) -> None:
    done = _exec(vm, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM),
        (["sh", "-c", "kill -KILL $$"], 128 + signal.SIGKILL),
        (["no-such-command"], 127),
        (["/etc/passwd"], 126),
        (["true"], 0),
    ],
)
def test_exit_status_follows_the_shells_rules(vm: Sandbox, argv: list[str], status: int) -> None:
    assert _exec(vm, *argv).returncode == status


def test_stdin_and_stdout_are_binary_safe_and_large(vm: Sandbox) -> None:
    data = os.urandom(3 << 20)
    assert _exec(vm, "cat", stdin=data).stdout == data


def test_argv_arrives_byte_for_byte(vm: Sandbox) -> None:
    words = [b"", b"a b", b"--", b"-x", b"$HOME", b"new\nline", b"\xff\xfe", "ü".encode(), b"*"]
    done = _exec(vm, "printf", "%s\\0", *words)
    assert done.stdout.split(b"\0")[:-1] == words


def test_environment_directory_and_user_pass(vm: Sandbox) -> None:
    options = ("--env", "A=b c", "--cwd", "/tmp", "--user", "nobody")
    done = _exec(vm, "sh", "-c", "echo $A; pwd; id -un", options=options)
    assert done.stdout == b"b c\n/tmp\nnobody\n"


def test_a_time_limit_ends_the_command_as_timeout_does(vm: Sandbox) -> None:
    done = _exec(vm, "sleep", "600", options=("--timeout", "1"))
    assert done.returncode == 124


def test_a_terminal_is_a_real_one(vm: Sandbox) -> None:
    script = shutil.which("script")
    assert script is not None
    command = " ".join(
        str(word) for word in vm.command("vm", "exec", "-it", VM, "--", "sh -c 'tty; stty size'")
    )
    # util-linux's script gives the command line a terminal of its own.
    command = command.replace("-- sh -c 'tty; stty size'", "-- sh -c 'tty && stty size'")
    done = subprocess.run(
        [script, "-qec", f"stty rows 33 cols 77; {command}", "/dev/null"],
        env=vm.environment, capture_output=True, timeout=120, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert b"/dev/pts/" in done.stdout, done
    assert b"33 77" in done.stdout


def test_a_shell_is_entered_left_and_entered_again(vm: Sandbox) -> None:
    for _ in range(2):
        status, screen = vm.on_a_terminal(
            "vm", "run", "--name", VM, typed=b"tty; hostname -s; exit 3\n"
        )
        assert status == 3, screen
        assert b"/dev/pts/" in screen and b"sandbox\r\n" in screen
        assert b"`banger vm ssh sandbox` comes back" in screen
        assert b"`banger vm delete sandbox`" in screen
    assert vm.json("vm", "show", VM)["state"] == "running"


def test_ssh_runs_a_command_with_our_own_key_and_known_host(vm: Sandbox) -> None:
    done = vm.run("vm", "ssh", VM, "--", "hostname; exit 5", timeout_s=300)
    assert (done.returncode, done.stdout) == (5, b"sandbox\n"), done.stderr.decode()


def test_plain_ssh_and_scp_work_after_ssh_config_install(vm: Sandbox, tmp_path: Path) -> None:
    vm.ok("vm", "ssh", VM, "--", "true", timeout_s=300)
    vm.ok("ssh-config", "--install")
    config = vm.home / ".ssh" / "config"
    # OpenSSH takes the home directory from passwd, not from HOME.
    done = subprocess.run(
        ["ssh", "-F", str(config), "-o", "BatchMode=yes", f"{VM}.vm", "cat", "/etc/hostname"],
        env=vm.environment, capture_output=True, timeout=120, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, b"sandbox\n"), done.stderr.decode()
    (tmp_path / "file").write_bytes(b"by scp")
    subprocess.run(
        ["scp", "-q", "-F", str(config), str(tmp_path / "file"), f"{VM}.vm:/root/by-scp"],
        env=vm.environment, timeout=120, check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert _exec(vm, "cat", "/root/by-scp").stdout == b"by scp"
    vm.ok("ssh-config", "--uninstall")
    assert "banger" not in config.read_text()


def test_cp_carries_trees_there_and_back(vm: Sandbox, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub dir").mkdir(parents=True)
    (tree / "sub dir" / "file").write_bytes(b"\0binary\xff")
    (tree / "run").write_bytes(b"#!/bin/sh\n")
    (tree / "run").chmod(0o755)
    (tree / "link").symlink_to("run")
    vm.ok("vm", "cp", str(tree), f"{VM}:/root/")
    assert _exec(vm, "cat", "/root/tree/sub dir/file").stdout == b"\0binary\xff"
    back = tmp_path / "back"
    back.mkdir()
    vm.ok("vm", "cp", f"{VM}:/root/tree", str(back))
    assert (back / "tree" / "sub dir" / "file").read_bytes() == b"\0binary\xff"
    assert os.access(back / "tree" / "run", os.X_OK)
    assert (back / "tree" / "link").readlink() == Path("run")


def test_ports_and_stats_and_logs_tell_of_the_guest(vm: Sandbox) -> None:
    vm.ok("vm", "ssh", VM, "--", "true", timeout_s=300)
    assert any(port["port"] == 22 for port in vm.json("vm", "ports", VM))
    assert json.dumps(vm.json("vm", "stats", VM))
    assert vm.ok("vm", "logs", VM)


def test_an_exec_does_not_notice_that_the_daemon_is_killed_and_the_vm_is_adopted(
    vm: Sandbox,
) -> None:
    daemon = vm.daemon_pid()
    assert daemon is not None
    pid = vm.json("vm", "show", VM)["pid"]
    running = vm.popen("vm", "exec", VM, "--", "sh", "-c", "echo begun; cat; echo ended")
    assert running.stdout is not None and running.stdin is not None
    assert running.stdout.readline() == b"begun\n"
    os.kill(daemon, signal.SIGKILL)
    vm_after = vm.json("vm", "show", VM)
    assert (vm_after["state"], vm_after["pid"]) == ("running", pid)
    assert vm.daemon_pid() not in (None, daemon)
    out, err = running.communicate(b"through\n", timeout=60)
    assert (running.returncode, out, err) == (0, b"through\nended\n", b"")


def test_a_killed_client_frees_its_stream_and_ends_its_command(vm: Sandbox) -> None:
    running = vm.popen("vm", "exec", VM, "--", "sh", "-c", "echo $$; exec sleep 987")
    assert running.stdout is not None
    running.stdout.readline()
    running.kill()
    running.communicate()
    deadline = time.monotonic() + 60
    while b"987" in _exec(vm, "sh", "-c", "ps ax -o args | grep '[s]leep 987'").stdout:
        assert time.monotonic() < deadline


def test_the_workspace_arrives_exactly(vm: Sandbox, tmp_path: Path) -> None:
    repo = tmp_path / "my repo"
    repo.mkdir()
    git = ["git", "-c", "user.name=T", "-c", "user.email=t@example.org", "-C", str(repo)]
    subprocess.run([*git, "init", "-q", "-b", "main"], check=True)
    odd = [b"plain", b"with space", b"new\nline", b"\xff\xfelatin", b"dir/deep"]
    (repo / "dir").mkdir()
    for name in odd:
        with open(os.path.join(os.fsencode(repo), name), "wb") as file:
            file.write(name)
    (repo / "tool").write_bytes(b"#!/bin/sh\necho ran\n")
    (repo / "tool").chmod(0o755)
    (repo / "gone").write_bytes(b"tracked, then deleted")
    (repo / "link").symlink_to("plain")
    (repo / "outside").symlink_to("/etc/hostname")
    (repo / ".gitignore").write_text("ignored\n")
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    (repo / "gone").unlink()
    (repo / "ignored").write_text("secret")
    (repo / "untracked").write_text("new")

    done = vm.run(
        "vm", "run", "--rm", "--name", "work", "--image", IMAGE, "--vcpu", "1", str(repo), "--",
        "sh", "-c", "pwd; ./tool; ls -1b; readlink link outside; cat dir/deep",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    lines = done.stdout.decode().splitlines()
    assert lines[1] == "ran"
    for name in ("untracked", "with\\ space", "new\\nline", "\\377\\376latin", "link"):
        assert name in lines
    assert "ignored" not in lines
    assert "gone" not in lines
    assert done.stdout.endswith(b"plain\n/etc/hostname\ndir/deep")
    assert [row["name"] for row in vm.json("vm", "list")] == [VM]


def test_a_vm_of_a_killed_command_line_is_deleted(vm: Sandbox) -> None:
    running = vm.popen(
        "vm", "run", "--rm", "--name", "orphan", "--image", IMAGE, "--vcpu", "1", "--",
        "sh", "-c", "echo up; sleep 600",
    )  # fmt: skip
    assert running.stdout is not None
    assert running.stdout.readline() == b"up\n"
    running.kill()
    running.communicate()
    deadline = time.monotonic() + 60
    while [row["name"] for row in vm.json("vm", "list")] != [VM]:
        assert time.monotonic() < deadline
    assert len(vm.processes()) == 1


def test_stop_and_start_keep_the_disk(vm: Sandbox) -> None:
    vm.ok("vm", "exec", VM, "--", "sh", "-c", "echo kept > /root/kept; sync")
    vm.ok("vm", "stop", VM)
    assert vm.json("vm", "show", VM)["state"] == "stopped"
    assert vm.processes() == []
    refused = _exec(vm, "true")
    assert refused.returncode == 125
    assert b"banger vm start" in refused.stderr
    vm.ok("vm", "start", VM)
    assert _exec(vm, "cat", "/root/kept").stdout == b"kept\n"


def test_a_guest_that_powers_off_is_seen_as_stopped(vm: Sandbox) -> None:
    vm.ok("vm", "start", VM)
    deadline = time.monotonic() + 180
    # The agent answers before the guest's init is up, so the first tries may be too early.
    while _exec(vm, "systemctl", "reboot").returncode != 0:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    while vm.json("vm", "show", VM)["state"] != "stopped":
        assert time.monotonic() < deadline
        time.sleep(0.5)
    vm.ok("vm", "start", VM)


def test_a_disk_grows_inside_too_and_users_lines_stay(vm: Sandbox) -> None:
    vm.ok("vm", "exec", VM, "--", "sh", "-c", "echo 192.0.2.1 mine >> /etc/hosts")
    before = int(vm.ok("vm", "exec", VM, "--", "df", "--output=size", "/").split()[-1])
    vm.ok("vm", "stop", VM)
    size = vm.json("vm", "show", VM)["disk_size_bytes"]
    vm.ok("vm", "set", VM, "--disk-size", str(size * 2))
    vm.ok("vm", "start", VM)
    after = int(vm.ok("vm", "exec", VM, "--", "df", "--output=size", "/").split()[-1])
    assert after > 1.9 * before
    hosts = vm.ok("vm", "exec", VM, "--", "cat", "/etc/hosts").decode()
    assert "192.0.2.1 mine" in hosts
    assert hosts.count("127.0.1.1") == 1


def test_a_vm_whose_disk_was_removed_says_so(vm: Sandbox) -> None:
    vm.ok("vm", "create", "--no-start", "--name", "diskless", "--image", IMAGE)
    shown = vm.json("vm", "show", "diskless")
    (Path(shown["directory"]) / "disk.ext4").unlink()
    refused = vm.run("vm", "start", "diskless")
    assert refused.returncode == 125
    assert b"disk of diskless is gone" in refused.stderr
    vm.ok("vm", "delete", "diskless")


def test_delete_leaves_nothing(vm: Sandbox) -> None:
    vm.ok("vm", "delete", VM)
    assert vm.json("vm", "list") == []
    assert vm.processes() == []
    assert list(vm.layout.vms.iterdir()) == []
    assert list(vm.layout.runtime_vms.iterdir()) == []
    assert vm.layout.known_hosts.read_text() == ""
