"""`vm run`, `exec`, `cp` and `internal connect` from the terminal's side, with the real agent.

The agent serves on this host's own file system (its test mode), and a fake daemon stands in
front: what is tested is everything between argv and the agent, in real processes.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import banger
from banger.client import autostart
from banger.errors import InvalidInput
from banger.guest.transport import endpoint_from_wire
from banger.paths import find_paths
from banger.services import guest_copies
from banger.services.workspaces import open_workspace
from tests.unit.client.fake_daemon import FakeDaemon, make_vm

pytestmark = pytest.mark.integration

SOURCE = Path(banger.__file__).parents[1]
AGENT = SOURCE / "banger" / "guest" / "bin" / f"banger-agent-{platform.machine()}"


class Machine:
    """A fake daemon with one VM, `box`, whose agent is real."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.guest_home = root / "guest"
        self.guest_home.mkdir()
        (root / "run").mkdir(mode=0o700)
        (root / "agent").mkdir()
        self.environment = {
            "PATH": os.environ["PATH"], "HOME": str(root / "home"), "PYTHONPATH": str(SOURCE),
            "XDG_RUNTIME_DIR": str(root / "run"), "LANG": "C.UTF-8", "TERM": "dumb",
            "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null",
        }  # fmt: skip
        (root / "home").mkdir()
        with open(root / "agent.log", "wb") as log:
            self.agent = subprocess.Popen(
                [AGENT, "serve-unix", root / "agent", "6"],
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "BANGER_AGENT_LOGS": str(root / "logs"), "HOME": str(root)},
            )
        assert self.agent.stdout is not None
        assert self.agent.stdout.readline() == b"ready\n"
        paths = find_paths(self.environment)
        os.makedirs(os.path.dirname(paths.runtime_dir), mode=0o700)
        os.mkdir(paths.runtime_dir, 0o700)
        self.paths = paths
        self.daemon = FakeDaemon(autostart.socket_path(paths))
        vm = make_vm()
        self.endpoint = {"kind": "virtio-serial", "directory": str(root / "agent"), "ports": 6}
        self.daemon.answers["GET /v1/vms/box/connection"] = {"vm": vm, "endpoint": self.endpoint}
        self.daemon.answers["GET /v1/vms/box"] = vm
        self.daemon.answers["POST /v1/vms"] = self.daemon.operation(
            {"type": "stage", "stage": "boot"}, result=vm
        )
        self.daemon.answers["DELETE /v1/vms/box"] = self.daemon.operation(result={"ok": True})

    def start(self, *words: str | bytes, **options: Any) -> subprocess.Popen[bytes]:
        # Where the guest's home is: this host is the guest, and /root is somebody's.
        code = (
            "import sys; from banger.services import workspaces; "
            f"workspaces.GUEST_HOME = {str(self.guest_home)!r}; "
            "from banger.cli.main import main; sys.exit(main())"
        )
        return subprocess.Popen(
            [sys.executable, "-c", code, *words], env=self.environment, **options
        )

    def run(self, *words: str | bytes, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        process = self.start(
            *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            out, err = process.communicate(stdin, timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(list(words), process.returncode, out, err)

    def asked(self, method: str, path: str) -> list[Any]:
        return [body for m, p, body in self.daemon.requests if (m, p) == (method, path)]

    def close(self) -> None:
        self.daemon.close()
        self.agent.kill()
        self.agent.wait()
        assert self.agent.stdout is not None
        self.agent.stdout.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    with tempfile.TemporaryDirectory(prefix="bng-") as root:
        made = Machine(Path(root))
        yield made
        made.close()


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    made = tmp_path / "repo"
    made.mkdir()
    for words in (["init", "-q", "-b", "main"], ["config", "user.name", "a"],
                  ["config", "user.email", "a@example"]):  # fmt: skip
        subprocess.run(["git", *words], cwd=made, check=True)
    (made / "a file\nwith \xff").write_text("odd")
    (made / "run.sh").write_text("#!/bin/sh\npwd; ls; exit 7\n")
    (made / "run.sh").chmod(0o755)
    subprocess.run(["git", "add", "-A"], cwd=made, check=True)
    subprocess.run(["git", "commit", "-qm", "x"], cwd=made, check=True)
    return made


# -- exec


def test_streams_and_status_are_the_commands_own(machine: Machine) -> None:
    script = "cat; printf 'e\\0\\377' >&2; exit 42"
    data = bytes(range(256)) * 4000
    ran = machine.run("vm", "exec", "box", "--", "sh", "-c", script, stdin=data)
    assert (ran.returncode, ran.stdout, ran.stderr) == (42, data, b"e\0\xff")


def test_argv_and_environment_arrive_byte_for_byte(machine: Machine) -> None:
    words = [b"", b"a b", b"new\nline", b"\xff\xfe", b"--", b"-x", b"*", b"'\"$(x)`"]
    code = (
        "import os,sys; os.write(1, b'|'.join(map(os.fsencode, sys.argv[1:])) + os.environb[b'K'])"
    )
    ran = machine.run(
        "vm", "exec", "-e", b"K=v\xff=1", "box", "--", sys.executable, "-c", code, *words
    )
    assert ran.stderr == b""
    assert ran.stdout == b"|".join(words) + b"v\xff=1"


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["sh", "-c", "kill -9 $$"], 137), (["/nonexistent"], 127), (["/etc/passwd"], 126),
        (["true"], 0), (["sh", "-c", "kill -TERM $$"], 143),
    ],
)  # fmt: skip
def test_exit_statuses(machine: Machine, command: list[str], status: int) -> None:
    assert machine.run("vm", "exec", "box", "--", *command).returncode == status


def test_timeout_is_124(machine: Machine) -> None:
    ran = machine.run("vm", "exec", "--timeout", "0.5", "box", "--", "sleep", "30")
    assert ran.returncode == 124


def test_json_result_goes_to_stderr(machine: Machine) -> None:
    ran = machine.run("vm", "exec", "--json", "box", "--", "sh", "-c", "echo out; exit 3")
    assert ran.stdout == b"out\n"
    assert json.loads(ran.stderr)["result"] == {
        "name": "box", "exit_code": 3, "signal": None, "timed_out": False,
    }  # fmt: skip


def test_detached_command_is_started_and_named(machine: Machine) -> None:
    ran = machine.run("vm", "exec", "-d", "box", "--", "sh", "-c", "echo from inside")
    assert (ran.returncode, ran.stdout) == (0, b"")
    log = ran.stderr.decode().split("its output is in ")[1].strip()
    deadline = time.monotonic() + 20
    while "from inside" not in (Path(log).read_text() if os.path.exists(log) else ""):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_interrupt_reaches_the_command(machine: Machine) -> None:
    script = "trap 'echo got it; exit 9' INT; echo up; while :; do sleep 0.1; done"
    process = machine.start(
        "vm", "exec", "box", "--", "sh", "-c", script,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.read() == b"got it\n"
    assert process.wait(30) == 9
    process.stdout.close()


def test_killing_the_daemon_does_not_disturb_an_exec(machine: Machine) -> None:
    process = machine.start(
        "vm", "exec", "box", "--", "sh", "-c", "echo up; read x; echo $x",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    machine.daemon.server.server_close()
    out, _ = process.communicate(b"still here\n", timeout=30)
    assert (process.returncode, out) == (0, b"still here\n")


def test_stopped_vm_has_a_hint(machine: Machine) -> None:
    body = {"error": {"code": "conflict", "message": "box is stopped", "hint": ""}}
    machine.daemon.answers["GET /v1/vms/box/connection"] = (409, body)
    ran = machine.run("vm", "exec", "box", "--", "true")
    assert ran.returncode == 125
    assert b"box is stopped\nhint: banger vm start box" in ran.stderr


# -- run


def test_run_copies_the_repository_and_runs_there(machine: Machine, repo: Path) -> None:
    (repo / "untracked").write_text("u")
    ran = machine.run("vm", "run", str(repo), "--", "./run.sh")
    assert ran.returncode == 7, ran.stderr
    copy = machine.guest_home / "repo"
    assert ran.stdout.decode().splitlines()[0] == str(copy)
    subprocess.run(["diff", "-r", "--exclude=.git", repo, copy], check=True)
    status = subprocess.run(["git", "status", "--porcelain"], cwd=copy, check=True,
                            capture_output=True, text=True).stdout  # fmt: skip
    assert status == "?? untracked\n"
    assert b"box stays" in ran.stderr
    assert machine.asked("DELETE", "/v1/vms/box") == []


def test_run_rm_deletes_whatever_happens(machine: Machine) -> None:
    ran = machine.run("vm", "run", "--rm", "-q", "--", "sh", "-c", "exit 5")
    assert (ran.returncode, ran.stderr) == (5, b"")
    assert len(machine.asked("DELETE", "/v1/vms/box")) == 1
    assert machine.asked("POST", "/v1/vms")[0]["owner_pid"] > 0


def test_run_begins_a_branch(machine: Machine, repo: Path) -> None:
    ran = machine.run("vm", "run", str(repo), "--branch", "fix", "--", "git", "branch",
                      "--show-current")  # fmt: skip
    assert ran.stdout == b"fix\n", ran.stderr
    branches = subprocess.run(["git", "branch"], cwd=repo, check=True, capture_output=True).stdout
    assert branches == b"* main\n"


def test_run_checks_out_a_branch_that_exists(machine: Machine, repo: Path) -> None:
    subprocess.run(["git", "branch", "other"], cwd=repo, check=True)
    ran = machine.run("vm", "run", str(repo), "--branch", "other", "--", "git", "branch",
                      "--show-current")  # fmt: skip
    assert ran.stdout == b"other\n", ran.stderr
    refused = machine.run("vm", "run", str(repo), "--branch", "other", "--from", "main")
    assert refused.returncode == 125
    assert b"leave --from out" in refused.stderr


def test_untracked_files_stay_here_when_asked_to(machine: Machine, repo: Path) -> None:
    (repo / "untracked").write_text("x")
    (repo / "nested").mkdir()
    subprocess.run(["git", "init", "-q", "nested"], cwd=repo, check=True)
    (repo / "nested" / "file").write_text("x")
    look = ("--", "git", "status", "--short", "--untracked-files=all")
    ran = machine.run("vm", "run", str(repo), "--no-include-untracked", *look)
    assert ran.stdout == b"", ran.stderr
    assert machine.run("vm", "run", "--no-include-untracked").returncode == 125


def test_failed_copy_leaves_no_vm(machine: Machine, repo: Path) -> None:
    (machine.guest_home / "repo").write_text("in the way")
    ran = machine.run("vm", "run", str(repo), "--", "true")
    assert ran.returncode == 125
    assert len(machine.asked("DELETE", "/v1/vms/box")) == 1


def test_json_with_a_command_is_lines_on_stderr(machine: Machine) -> None:
    ran = machine.run("vm", "run", "--json", "--", "echo", "out")
    assert ran.stdout == b"out\n"
    events = [json.loads(line) for line in ran.stderr.splitlines()]
    assert {"type": "stage", "stage": "boot"} in events
    assert any(event.get("result", {}).get("exit_code") == 0 for event in events)


def test_json_without_a_command_is_the_vm(machine: Machine) -> None:
    ran = machine.run("vm", "run", "--json")
    assert json.loads(ran.stdout)["name"] == "box"


def test_emulation_is_told_once(machine: Machine) -> None:
    first = machine.run("vm", "run", "--", "true").stderr
    second = machine.run("vm", "run", "--", "true").stderr
    assert b"emulated (tcg)" in first
    assert b"/dev/kvm is absent" in first
    assert b"emulated" not in second


def test_bad_input_makes_nothing(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    for words in (
        ["/nonexistent"], [str(tmp_path / "plain")], ["--branch", "x"], ["--from", "x"],
        ["--name", "Bad_Name"], ["--memory", "much"], ["--vcpu", "many"], ["--rm", "-d"],
        ["--timeout", "-1", "--", "true"], ["--env", "=x", "--", "true"],
    ):  # fmt: skip
        ran = machine.run("vm", "run", *words)
        lines = ran.stderr.decode().splitlines()
        assert ran.returncode == 125, (words, lines)
        assert lines[0].startswith("banger: "), lines
        assert lines[1].startswith("hint: "), lines
    assert machine.asked("POST", "/v1/vms") == []


def test_interrupted_creation_is_cancelled(machine: Machine) -> None:
    daemon = machine.daemon
    daemon.answers["POST /v1/vms"] = daemon.operation({"type": "stage", "stage": "x"}, wait=True)
    process = machine.start(
        "vm", "run", "--", "true",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    while b"banger: x" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert daemon.cancelled["op1"].is_set()


def test_second_interrupt_leaves_at_once(machine: Machine) -> None:
    daemon = machine.daemon
    daemon.answers["POST /v1/vms"] = daemon.operation({"type": "stage", "stage": "x"}, wait=True)
    process = machine.start(
        "vm", "run", "--", "true",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    while b"banger: x" not in process.stderr.readline():
        pass

    class Never:
        def set(self) -> None:
            pass

        def wait(self, seconds: float) -> None:
            time.sleep(5)

    daemon.cancelled["op1"] = Never()  # type: ignore[assignment]
    process.send_signal(signal.SIGINT)
    while b"cancelling" not in process.stderr.readline():
        pass
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - began < 3


# -- cp


@pytest.fixture
def files(tmp_path: Path) -> Path:
    made = tmp_path / "files"
    (made / "d").mkdir(parents=True)
    (made / "d" / "f").write_bytes(os.urandom(200_000))
    (made / os.fsdecode(b"\xff\n x")).write_text("odd")
    (made / "exec").write_text("x")
    (made / "exec").chmod(0o755)
    (made / "link").symlink_to("d/f")
    return made


def same(one: Path, two: Path) -> None:
    subprocess.run(["diff", "-r", "--no-dereference", one, two], check=True)


def test_directory_into_and_out_of_an_existing_one(machine: Machine, files: Path) -> None:
    guest = machine.guest_home
    assert machine.run("vm", "cp", str(files), f"box:{guest}").stderr.count(b"\n") <= 1
    same(files, guest / "files")
    assert (guest / "files/exec").stat().st_mode & 0o777 == 0o755
    out = files.parent / "out"
    out.mkdir()
    assert machine.run("vm", "cp", f"box:{guest}/files", str(out)).returncode == 0
    same(files, out / "files")


def test_directory_to_a_new_name_and_contents_only(machine: Machine, files: Path) -> None:
    guest, out = machine.guest_home, files.parent
    for words, made in [
        ([str(files), f"box:{guest}/new"], guest / "new"),
        ([f"{files}/.", f"box:{guest}"], guest),
        ([f"{files}/.", f"box:{guest}/dot"], guest / "dot"),
        ([f"box:{guest}/new", str(out / "back")], out / "back"),
        ([f"box:{guest}/new/.", str(out / "into")], out / "into"),
    ]:
        if made.name == "into":
            made.mkdir()
        ran = machine.run("vm", "cp", *words)
        assert ran.returncode == 0, (words, ran.stderr)
        if made != guest:
            same(files, made)
        else:
            assert (guest / "exec").exists()


def test_files(machine: Machine, files: Path) -> None:
    guest, out = machine.guest_home, files.parent
    source = files / "d/f"
    for words, made in [
        ([str(source), f"box:{guest}"], guest / "f"),
        ([str(source), f"box:{guest}/g"], guest / "g"),
        ([str(source), f"box:{guest}/"], guest / "f"),
        ([f"box:{guest}/f", str(out)], out / "f"),
        ([f"box:{guest}/f", str(out / "h")], out / "h"),
        ([f"box:{guest}/f", str(out / "h")], out / "h"),
    ]:
        ran = machine.run("vm", "cp", *words)
        assert ran.returncode == 0, (words, ran.stderr)
        assert made.read_bytes() == source.read_bytes()


def test_tar_streams(machine: Machine, files: Path) -> None:
    guest = machine.guest_home
    raw = subprocess.run(["tar", "c", "-C", files, "."], check=True, capture_output=True).stdout
    assert machine.run("vm", "cp", "-", f"box:{guest}", stdin=raw).returncode == 0
    same(files, guest)
    out = machine.run("vm", "cp", f"box:{guest}/d", "-").stdout
    listed = subprocess.run(["tar", "t"], input=out, check=True, capture_output=True).stdout
    assert listed == b"d/\nd/f\n"


def test_bad_copies_are_named(machine: Machine, files: Path) -> None:
    guest, out = machine.guest_home, files.parent
    (guest / "file").write_text("")
    for status, words in [
        (125, [f"{out}/none", f"box:{guest}"]), (125, [f"box:{guest}/none", str(out)]),
        (125, [str(files), f"box:{guest}/file"]), (125, [str(files / "exec"), f"box:{guest}/no/"]),
        (125, [str(files / "exec"), f"box:{guest}/no/such/f"]), (2, [str(files), str(out)]),
        (125, [f"box:{guest}/file", f"{out}/no/such"]), (2, ["box:/a", "box:/b"]),
        (125, [f"box:{guest}", str(files / "exec")]),
    ]:  # fmt: skip
        ran = machine.run("vm", "cp", *words)
        assert ran.returncode == status, (words, ran.stderr)
        assert b"hint: " in ran.stderr


def test_links_that_lead_out_are_left_out_with_a_warning(machine: Machine, tmp_path: Path) -> None:
    (machine.guest_home / "d").mkdir()
    (machine.guest_home / "d" / "evil").symlink_to("/etc/passwd")
    (machine.guest_home / "d" / "ok").write_text("ok")
    ran = machine.run("vm", "cp", f"box:{machine.guest_home}/d", str(tmp_path))
    assert ran.returncode == 0
    assert b"d/evil points outside" in ran.stderr
    assert os.listdir(tmp_path / "d") == ["ok"]


# -- what ssh uses


def test_connect_carries_a_port(machine: Machine) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        peer, _ = listener.accept()
        with peer:
            while data := peer.recv(65536):
                peer.sendall(data)

    thread = threading.Thread(target=serve)
    thread.start()
    data = os.urandom(300_000)
    port = str(listener.getsockname()[1])
    ran = machine.run("internal", "connect", "Box.vm", port, stdin=data)
    thread.join(20)
    listener.close()
    assert (ran.returncode, ran.stdout) == (0, data)


def test_stats_and_ports(machine: Machine) -> None:
    machine.daemon.answers["GET /v1/vms/box/stats"] = {
        "name": "box", "state": "running", "cpu_seconds": 1.5, "memory_bytes": 1 << 30,
        "disk_used_bytes": 1 << 20, "uptime_s": 100.0,
    }  # fmt: skip
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    rows = json.loads(machine.run("vm", "ports", "box", "--json").stdout)
    table = machine.run("vm", "ports", "box").stdout.decode()
    listener.close()
    assert port in [row["port"] for row in rows]
    assert str(port) in table
    stats = json.loads(machine.run("vm", "stats", "box", "--json").stdout)
    assert stats[0]["guest"]["memory"]["total"] > 0
    assert "1 GiB" in machine.run("vm", "stats", "box").stdout.decode()


# -- what changed there, and bringing it home


@pytest.fixture
def copied(machine: Machine, repo: Path) -> Path:
    """The copy of `repo` in the guest, with a commit and changes of its own."""
    assert machine.run("vm", "run", "-q", str(repo), "--", "true").returncode == 0
    copy = machine.guest_home / "repo"
    _git(copy, "checkout", "-q", "-b", "fix")
    (copy / "new.txt").write_text("new\n")
    _git(copy, "add", "new.txt")
    _git(copy, "commit", "-q", "-m", "a commit\x1b[31m there")
    (copy / "run.sh").write_text("changed\n")
    (copy / "odd\nname").write_bytes(b"\0binary\xff")
    (copy / "a.bin").write_bytes(bytes(range(256)))
    return copy


def _git(where: Path, *words: str) -> str:
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    done = subprocess.run(
        ["git", "-c", "user.name=n", "-c", "user.email=e", *words],
        cwd=where, check=True, capture_output=True, env=environment,
    )  # fmt: skip
    return done.stdout.decode().rstrip("\n")


def _everything(repo: Path) -> dict[str, bytes]:
    """Every file of a checkout, and of its .git what no object or remote's ref is."""
    return {
        str(path.relative_to(repo)): path.read_bytes()
        for path in sorted(repo.rglob("*"))
        if path.is_file() and not {"objects", "banger"} & set(path.parts)
    }


def test_status_tells_what_is_there_and_not_here(
    machine: Machine, repo: Path, copied: Path
) -> None:
    ran = machine.run("vm", "workspace", "status", "box", str(repo), "--json")
    assert ran.returncode == 0, ran.stderr
    state = json.loads(ran.stdout)
    assert (state["branch"], state["base"]) == ("fix", _git(repo, "rev-parse", "HEAD"))
    assert [commit["id"] for commit in state["commits"]] == [_git(copied, "rev-parse", "HEAD")]
    assert {(change["status"], change["path"]) for change in state["changes"]} >= {
        (" M", "run.sh"), ("??", "odd\nname"), ("??", "a.bin")
    }  # fmt: skip
    shown = machine.run("vm", "workspace", "status", "box", str(repo)).stdout.decode()
    assert "a commit" in shown
    assert "\x1b" not in shown
    assert "odd\\nname" in shown


def test_pull_brings_branches_home_and_changes_nothing_else(
    machine: Machine, repo: Path, copied: Path
) -> None:
    canary = machine.root / "canary"
    for hook in ("reference-transaction", "post-update", "fsmonitor", "post-index-change"):
        script = repo / ".git" / "hooks" / hook
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/sh\necho ran >{canary}\n")
        script.chmod(0o755)
    _git(repo, "config", "core.fsmonitor", str(repo / ".git/hooks/fsmonitor"))
    before = _everything(repo)
    ran = machine.run("vm", "workspace", "pull", "box", str(repo), "--json")
    assert not canary.exists()
    assert ran.returncode == 0, ran.stderr
    head = _git(copied, "rev-parse", "fix")
    pulled = {one["ref"]: one for one in json.loads(ran.stdout)}
    assert pulled["refs/remotes/banger/box/fix"] == {
        "ref": "refs/remotes/banger/box/fix", "old": None, "new": head, "commits": 1
    }  # fmt: skip
    assert _git(repo, "rev-parse", "banger/box/fix") == head
    assert _git(repo, "show", "banger/box/fix:new.txt") == "new"
    assert _everything(repo) == before
    assert _git(repo, "fsck", "--strict", "--no-dangling") == ""
    again = machine.run("vm", "workspace", "pull", "box", str(repo))
    assert (again.returncode, again.stdout) == (0, b"")
    assert b"nothing that is not here" in again.stderr


def test_pull_of_what_is_not_committed_is_one_commit_more(
    machine: Machine, repo: Path, copied: Path
) -> None:
    index = (copied / ".git" / "index").read_bytes()
    status = _git(copied, "status", "--porcelain")
    ran = machine.run("vm", "workspace", "pull", "box", str(repo), "--uncommitted")
    assert ran.returncode == 0, ran.stderr
    assert b"banger/box/fix" in ran.stdout
    assert _git(repo, "rev-parse", "banger/box/fix~1") == _git(copied, "rev-parse", "fix")
    assert _git(repo, "show", "banger/box/fix:run.sh") == "changed"
    names = _git(repo, "diff", "--name-only", "-z", "banger/box/fix~1", "banger/box/fix")
    assert {"run.sh", "odd\nname", "a.bin"} <= set(names.split("\0"))
    assert _git(copied, "status", "--porcelain") == status
    assert (copied / ".git" / "index").read_bytes() == index


def test_the_diff_applies_here(machine: Machine, repo: Path, copied: Path, tmp_path: Path) -> None:
    patch = machine.run("vm", "workspace", "diff", "box", str(repo))
    assert patch.returncode == 0, patch.stderr
    exported = tmp_path / "x.patch"
    ran = machine.run("vm", "workspace", "export", "box", str(repo), "-o", str(exported), "--json")
    assert json.loads(ran.stdout) == {
        "path": str(exported), "size_bytes": len(patch.stdout)
    }, ran.stderr  # fmt: skip
    assert exported.read_bytes() == patch.stdout
    clean = tmp_path / "clean"
    subprocess.run(["git", "clone", "-q", str(repo), str(clean)], check=True)
    subprocess.run(["git", "apply"], cwd=clean, input=patch.stdout, check=True)
    for name in ("new.txt", "run.sh", "odd\nname", "a.bin"):
        assert (clean / name).read_bytes() == (copied / name).read_bytes()
    short = machine.run("vm", "workspace", "diff", "--stat", "box", str(repo)).stdout
    assert b"new.txt" in short
    assert b"+new" not in short


def test_a_guest_cannot_fill_the_disk(
    repo: Path, copied: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_copies, "MAX_BUNDLE_BYTES", 100)
    endpoint = endpoint_from_wire(machine.endpoint)
    copy = guest_copies.Copy("box", endpoint, str(copied), open_workspace(str(repo)))
    for step in (lambda: guest_copies.write_diff(copy, len), lambda: guest_copies.pull(copy)):
        with pytest.raises(InvalidInput, match="sends more than"):
            step()


def test_a_bundle_is_gits_own(machine: Machine, repo: Path, copied: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "x.bundle"
    words = ("vm", "workspace", "export", "box", str(repo), "-o", str(bundle), "--format", "bundle")
    assert machine.run(*words).returncode == 0
    _git(repo, "fetch", "-q", str(bundle), "fix:taken")
    assert _git(repo, "rev-parse", "taken") == _git(copied, "rev-parse", "fix")
    bundle.unlink()
    empty = machine.run(*words)
    assert (empty.returncode, b"--uncommitted" in empty.stderr) == (125, True)
    assert list(tmp_path.glob("*.bundle")) == list(tmp_path.glob(".banger-*")) == []
    assert machine.run(*words, "--uncommitted").returncode == 0
    assert "refs/banger/uncommitted" in _git(repo, "bundle", "list-heads", str(bundle))


def test_hostile_copies_bring_nothing_home(machine: Machine, repo: Path, copied: Path) -> None:
    """A guest may send any pack: one with a tree that git refuses to check out, say."""
    blob = _git(copied, "hash-object", "-w", "new.txt")
    hook = subprocess.run(
        ["git", "mktree"], cwd=copied, check=True, capture_output=True,
        input=f"100755 blob {blob}\thook\n".encode(),
    ).stdout.decode().strip()  # fmt: skip
    tree = subprocess.run(
        ["git", "hash-object", "-t", "tree", "-w", "--stdin", "--literally"], cwd=copied,
        check=True, capture_output=True, input=b"40000 .git\0" + bytes.fromhex(hook),
    ).stdout.decode().strip()  # fmt: skip
    evil = _git(copied, "commit-tree", tree, "-m", "evil")
    _git(copied, "update-ref", "refs/heads/evil", evil)
    ran = machine.run("vm", "workspace", "pull", "box", str(repo))
    assert ran.returncode == 125
    assert _git(repo, "for-each-ref", "refs/remotes") == ""
    _git(copied, "update-ref", "-d", "refs/heads/evil")
    # A branch that names a commit without its objects.
    (copied / ".git" / "refs" / "heads" / "hole").write_text("1" * 40 + "\n")
    assert machine.run("vm", "workspace", "pull", "box", str(repo)).returncode == 125
    assert _git(repo, "for-each-ref", "refs/remotes") == ""


def test_a_host_that_went_on_still_finds_the_base(
    machine: Machine, repo: Path, copied: Path
) -> None:
    base = _git(repo, "rev-parse", "HEAD")
    (repo / "run.sh").write_text("here\n")
    _git(repo, "commit", "-q", "-a", "-m", "here")
    state = json.loads(machine.run("vm", "workspace", "status", "box", str(repo), "--json").stdout)
    assert state["base"] == base
    assert machine.run("vm", "workspace", "pull", "box", str(repo)).returncode == 0
    assert _git(repo, "log", "-1", "--format=%s", "HEAD") == "here"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("pull", "box", "{repo}", "--guest-path", "/nowhere"), "no git repository at /nowhere"),
        (("pull", "box", "{repo}", "--guest-path", "--upload-pack=x"), "--guest-path"),
        (("status", "box", "/nonexistent"), "does not exist"),
        (("diff", "box", "{repo}", "-o", "x"), "--output is for export"),
        (("export", "box", "{repo}", "--uncommitted", "-o", "x"), "a patch holds"),
        (("export", "box", "{repo}", "--format", "bundle"), "-o FILE"),
        (("export", "box", "{repo}", "-o", "/nowhere/x"), "/nowhere does not exist"),
        (("export", "box", "{repo}", "-o", "/dev/full"), "/dev/full is no plain file"),
        (("export", "box", "{repo}", "-o", "/proc/x"), "cannot write in /proc"),
    ],
)
def test_what_is_wrong_is_said(
    machine: Machine, repo: Path, copied: Path, words: tuple[str, ...], said: str
) -> None:
    ran = machine.run("vm", "workspace", *(word.format(repo=repo) for word in words))
    assert ran.returncode in (2, 125)
    assert said.encode() in ran.stderr


# -- acp


def test_an_agents_bytes_pass_both_ways_at_once(machine: Machine) -> None:
    line = b"x" * (16 << 20) + b"\n"
    ran = machine.run("vm", "acp", "box", "--", "sh", "-c", "cat; exit 7", stdin=line * 2)
    assert (ran.returncode, ran.stderr) == (7, b"")
    assert ran.stdout == line * 2


def test_the_agent_is_the_one_the_configuration_names(machine: Machine) -> None:
    config = Path(machine.paths.config_dir) / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(
        'acp_agent = "mine"\n[acp_agents]\nmine = ["sh", "-c", "pwd; echo $A"]\nother = ["false"]\n'
    )
    ran = machine.run("vm", "acp", "box", "--cwd", "/usr", "--env", "A=b")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"/usr\nb\n", b"")
    assert machine.run("vm", "acp", "box", "--agent", "other").returncode == 1
    wrong = machine.run("vm", "acp", "box", "--agent", "opncode")
    assert (wrong.returncode, wrong.stdout) == (125, b"")
    assert b"did you mean opencode?" in wrong.stderr


def test_a_stopped_machine_is_started_and_stdout_stays_the_agents(machine: Machine) -> None:
    machine.daemon.answers["GET /v1/vms/box"] = {**make_vm(), "state": "stopped", "pid": None}
    machine.daemon.answers["POST /v1/vms/box/start"] = machine.daemon.operation(
        {"type": "stage", "stage": "boot box"}, {"type": "warning", "message": "odd"}, result=make_vm()
    )  # fmt: skip
    ran = machine.run("vm", "acp", "box", "--", "echo", "{}")
    assert (ran.returncode, ran.stdout) == (0, b"{}\n")
    assert b"odd" in ran.stderr
    assert len(machine.asked("POST", "/v1/vms/box/start")) == 1


def test_the_first_time_the_machine_and_the_copy_are_made(machine: Machine, repo: Path) -> None:
    missing = machine.run("vm", "acp", "new", "--", "pwd")
    assert (missing.returncode, missing.stdout) == (125, b"")
    assert b"--run PATH" in missing.stderr
    ran = machine.run("vm", "acp", "new", "--run", str(repo), "--", "sh", "-c", "pwd; ls run.sh")
    assert ran.stdout == f"{machine.guest_home}/repo\nrun.sh\n".encode(), ran.stderr
    assert machine.asked("POST", "/v1/vms")[0] == {"name": "new", "start": True}


def test_the_agent_and_its_children_end_with_the_bridge(machine: Machine) -> None:
    begun = machine.start(
        "vm", "acp", "box", "--", "sh", "-c", "sleep 1000 & echo $$ $!; wait",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert begun.stdout is not None
    pids = [int(word) for word in begun.stdout.readline().split()]
    begun.kill()
    begun.communicate()
    deadline = time.monotonic() + 30
    while left := [pid for pid in pids if _alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
