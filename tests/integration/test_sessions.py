"""`vm session` from the terminal's side, and the local sockets, with the real agent.

As in test_workspaces the agent serves on this host and a fake daemon stands in front; a sleeping
process is the VMM, with which the sockets end.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from banger.guest import frames, sessions
from banger.guest.agent import ExecRequest
from banger.guest.transport import Endpoint, endpoint_from_wire
from banger.host.process import find_by_argument, start_ticks
from tests.integration.test_workspaces import Machine

pytestmark = pytest.mark.integration

WAIT_S = 60.0
VM_ID = "0123456789ab"
# What a JSON-lines agent is to banger: it answers each line, byte for byte, and flushes.
ECHO = (
    "import sys\n"
    "for line in sys.stdin.buffer:\n"
    "    sys.stdout.buffer.write(b'got ' + line); sys.stdout.buffer.flush()\n"
)


class Guest(Machine):
    """The machine with what sessions need of it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.vmm = subprocess.Popen(["sleep", "3600"])
        vm = self.daemon.answers["GET /v1/vms/box"]
        vm.update(id=VM_ID, pid=self.vmm.pid)
        self.daemon.answers["GET /v1/vms"] = [vm]
        self.runtime = Path(self.paths.runtime_dir) / "vms" / VM_ID
        self.runtime.mkdir(parents=True, mode=0o700)
        self.agent_endpoint: Endpoint = endpoint_from_wire(dict(self.endpoint))

    @property
    def mark(self) -> str:
        return f"banger-vm-{VM_ID}-{os.path.basename(self.paths.runtime_dir)}"

    def session(
        self, *words: str | bytes, stdin: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        return self.run("vm", "session", *words, stdin=stdin)

    def ok(self, *words: str | bytes, stdin: bytes = b"") -> bytes:
        done = self.session(*words, stdin=stdin)
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stderr.decode()}"
        return done.stdout

    def json(self, *words: str) -> Any:
        return json.loads(self.ok(*words, "--json"))

    def popen(self, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return self.start("vm", "session", *words, **{**pipes, **options})

    def begin(self, name: str, *argv: str, **fields: Any) -> sessions.Session:
        """Start a session without the command line, where that is not what is tested."""
        request = sessions.SessionRequest(name, ExecRequest([os.fsencode(word) for word in argv]))
        return sessions.start(self.agent_endpoint, request._replace(**fields))

    def shown(self, name: str) -> sessions.Session:
        return sessions.show(self.agent_endpoint, name)

    def until(self, name: str, reached: Callable[[sessions.Session], bool]) -> sessions.Session:
        deadline = time.monotonic() + WAIT_S
        while not reached(session := self.shown(name)):
            assert time.monotonic() < deadline, session
            time.sleep(0.02)
        return session

    def connect(self, name: str, wish: bytes = b"") -> Program:
        return Program(self.json("show", "box", name)["socket"], wish)

    def close(self) -> None:
        for session in sessions.list_all(self.agent_endpoint):
            sessions.remove(self.agent_endpoint, session.name, force=True)
        self.vmm.kill()
        self.vmm.wait()
        super().close()


class Program:
    """A program of the host at a session's socket."""

    def __init__(self, path: str, wish: bytes = b"") -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(WAIT_S)
        self.socket.connect(path)
        self.socket.sendall(wish + b"\n")
        line = b""
        while not line.endswith(b"\n"):
            byte = self.socket.recv(1)
            if not byte:
                break
            line += byte
        self.answer = json.loads(line)
        self.decoder = frames.Decoder()

    def frame(self) -> tuple[int, bytes]:
        while (found := self.decoder.next_frame()) is None:
            data = self.socket.recv(65536)
            assert data, "the connection has ended"
            self.decoder.feed(data)
        return found

    def read(self, count: int, kind: int = frames.STDOUT) -> bytes:
        data = b""
        while len(data) < count:
            found, payload = self.frame()
            assert found == kind, (found, payload[:100])
            data += payload
        return data

    def write(self, data: bytes) -> None:
        for at in range(0, len(data), frames.MAX_PAYLOAD):
            self.socket.sendall(frames.encode(frames.STDIN, data[at : at + frames.MAX_PAYLOAD]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    with tempfile.TemporaryDirectory(prefix="bng-") as root:
        made = Guest(Path(root))
        yield made
        made.close()


def _end(*processes: subprocess.Popen[bytes]) -> None:
    for process in processes:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


# -- its life


def test_a_session_has_a_name_and_says_everything(guest: Guest) -> None:
    started = json.loads(guest.ok(
        "start", "--name", "planner", "--cwd", "/tmp", "-e", "K=v w", "--json", "--",
        "sh", "-c", 'echo "$K $PWD"; read x; exit 7',
    ))  # fmt: skip
    assert (started["name"], started["vm"], started["state"]) == ("planner", "box", "running")
    assert started["argv"][0] == "sh"
    assert os.stat(started["socket"]).st_mode & 0o777 == 0o600
    assert os.stat(os.path.dirname(started["socket"])).st_mode & 0o777 == 0o700
    guest.until("planner", lambda session: session.stdout.end == 9)
    assert guest.ok("logs", "box", "planner") == b"v w /tmp\n"
    listed = guest.ok("list").decode().splitlines()
    assert listed[0].split() == ["NAME", "STATE", "READY", "PID", "SINCE", "COMMAND"]
    assert listed[1].split()[:4] == ["planner", "running", "-", str(started["pid"])]
    assert guest.json("list", "box")[0]["name"] == "planner"
    shown = guest.ok("show", "box", "planner").decode()
    assert "cwd:" in shown
    assert started["socket"] in shown
    guest.ok("send", "box", "planner", "x")
    assert guest.session("wait", "box", "planner").returncode == 7
    ended = guest.json("show", "box", "planner")
    assert (ended["state"], ended["exit"]) == ("ended", {"code": 7, "signal": None})
    assert guest.session("attach", "box", "planner").returncode == 7
    assert guest.ok("rm", "box", "planner") == b"planner removed\n"
    assert guest.json("list", "box") == []


def test_names_come_from_the_command_and_are_free(guest: Guest) -> None:
    assert guest.ok("start", "box", "--", "/bin/cat") == b"cat\n"
    assert guest.ok("start", "box", "--", "cat") == b"cat-2\n"
    taken = guest.session("start", "box", "--name", "cat", "--", "cat")
    assert taken.returncode == 125
    assert b"has a session cat already" in taken.stderr


def test_without_a_name_the_only_running_vm_is_meant(guest: Guest) -> None:
    guest.daemon.answers["GET /v1/vms"] = []
    none = guest.session("start", "--", "true")
    assert (none.returncode, b"no VM runs" in none.stderr) == (125, True)
    vm = guest.daemon.answers["GET /v1/vms/box"]
    guest.daemon.answers["GET /v1/vms"] = [vm, {**vm, "name": "two"}]
    several = guest.session("list")
    assert (several.returncode, b"2 VMs run: box, two" in several.stderr) == (125, True)


def test_a_stopped_vm_is_started(guest: Guest) -> None:
    vm = guest.daemon.answers["GET /v1/vms/box"]
    guest.daemon.answers["GET /v1/vms/box"] = {**vm, "state": "stopped"}
    guest.daemon.answers["POST /v1/vms/box/start"] = guest.daemon.operation(result=vm)
    assert guest.ok("start", "box", "--", "true") == b"true\n"
    assert len(guest.asked("POST", "/v1/vms/box/start")) == 1


def test_near_names_are_suggested(guest: Guest) -> None:
    guest.begin("planner", "cat")
    for action in ("show", "attach", "logs", "wait", "stop", "rm"):
        missing = guest.session(action, "box", "planer")
        assert missing.returncode == 125
        assert b"did you mean planner?" in missing.stderr, action


def test_errors_as_json_spare_a_sessions_stdout(guest: Guest) -> None:
    missing = guest.session("attach", "box", "nobody", "--json")
    assert (missing.returncode, missing.stdout) == (125, b"")
    assert json.loads(missing.stderr)["error"]["code"] == "session_not_found"


def test_killing_who_started_or_watches_it_ends_nothing(guest: Guest) -> None:
    guest.begin("echo", sys.executable, "-u", "-c", ECHO)
    watching = guest.popen("attach", "box", "echo")
    assert watching.stdin is not None and watching.stdout is not None
    watching.stdin.write(b"one\n")
    watching.stdin.flush()
    assert watching.stdout.readline() == b"got one\n"
    _end(watching)
    guest.ok("send", "box", "echo", "two")
    guest.until("echo", lambda session: session.stdout.end == 16)
    assert guest.ok("logs", "box", "echo") == b"got one\ngot two\n"
    assert guest.shown("echo").state == "running"


def test_restart_on_failure_begins_again_and_tells_who_watches(guest: Guest) -> None:
    crash = "echo run; read x; kill -9 $$"
    guest.ok("start", "box", "--name", "r", "--restart", "on-failure", "--", "sh", "-c", crash)
    watching = guest.popen("attach", "--read-only", "--from", "start", "box", "r")
    assert watching.stdout is not None and watching.stderr is not None
    assert watching.stdout.readline() == b"run\n"
    guest.ok("send", "box", "r", "x")
    assert watching.stdout.readline() == b"run\n"
    while (said := watching.stderr.readline()) and b"begun again" not in said:
        pass
    assert said == b"banger: r ended (SIGKILL) and has begun again\n"
    session = guest.until("r", lambda found: found.state == "running")
    assert (session.restarts, session.exit and session.exit.signal) == (1, 9)
    assert guest.ok("stop", "box", "r") == b"r ended (SIGTERM)\n"
    assert watching.wait(WAIT_S) == 143
    _end(watching)
    assert guest.json("show", "box", "r")["reason"] == "stopped"


def test_stop_ends_children_too(guest: Guest) -> None:
    script = "sleep 3600 & echo $!; wait"
    guest.begin("tree", "sh", "-c", script)
    session = guest.until("tree", lambda found: found.stdout.end > 0)
    child = int(guest.ok("logs", "box", "tree"))
    guest.ok("stop", "box", "tree", "--grace", "5")
    for pid in (session.pid, child):
        assert pid is not None
        assert start_ticks(pid) is None


def test_stop_kills_what_does_not_want_to_end(guest: Guest) -> None:
    guest.begin("deaf", "sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done")
    guest.until("deaf", lambda found: found.stdout.end > 0)
    stopped = guest.json("stop", "box", "deaf", "--grace", "0.2")
    assert stopped[0]["exit"] == {"code": None, "signal": 9}
    refused = guest.session("signal", "box", "deaf", "TERM")
    assert (refused.returncode, b"runs no more" in refused.stderr) == (125, True)


def test_kill_signal_and_rm(guest: Guest) -> None:
    for name in ("a", "b", "c"):
        guest.begin(name, "sleep", "3600")
    guest.ok("signal", "box", "a", "USR1")
    assert guest.session("wait", "box", "a").returncode == 128 + signal.SIGUSR1
    assert guest.ok("kill", "box", "b") == b"b ended (SIGKILL)\n"
    refused = guest.session("rm", "box", "a", "c", "b")
    assert (refused.returncode, refused.stdout) == (125, b"a removed\nb removed\n")
    assert b"the session c of box runs" in refused.stderr
    guest.ok("rm", "--force", "box", "c")
    assert guest.json("list") == []


def test_wait_past_its_timeout_is_124(guest: Guest) -> None:
    guest.begin("long", "sleep", "3600")
    assert guest.session("wait", "box", "long", "--timeout", "0.2").returncode == 124
    ready = guest.session("wait", "box", "long", "--for", "ready")
    assert (ready.returncode, b"without a ready check" in ready.stderr) == (125, True)


@pytest.mark.parametrize("check", ["file", "command", "port"])
def test_start_waits_until_it_is_ready(guest: Guest, check: str) -> None:
    up = guest.root / "up"
    listening = (
        "import socket, sys, time; open(sys.argv[1] + '.begun', 'w'); time.sleep(0.3);"
        "s = socket.create_server(('127.0.0.1', 0)); p = s.getsockname()[1];"
        "open(sys.argv[1], 'w').write(str(p)); time.sleep(3600)"
    )
    # The port is known before: one that is free now.
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    listening = listening.replace("'127.0.0.1', 0", f"'127.0.0.1', {port}")
    option = {"file": str(up), "command": f"test -s {up}", "port": str(port)}[check]
    shown = json.loads(guest.ok(
        "start", "box", "--name", "r", f"--ready-{check}", option, "--json", "--",
        sys.executable, "-c", listening, str(up),
    ))  # fmt: skip
    assert shown["ready"] is True
    assert guest.session("wait", "box", "r", "--for", "ready").returncode == 0


def test_what_is_not_ready_in_time_is_told_with_its_last_words(guest: Guest) -> None:
    late = guest.session(
        "start", "box", "--name", "late", "--ready-file", "/nonexistent/up", "--ready-timeout", "1",
        "--", "sh", "-c", "echo first >&2; echo why >&2; exec sleep 3600",
    )  # fmt: skip
    assert (late.returncode, late.stdout) == (125, b"")
    assert b"was not ready within 1 s, and goes on: first / why" in late.stderr
    assert b"hint: banger vm session logs box late" in late.stderr
    assert guest.shown("late").state == "running"
    ended = guest.session(
        "start", "box", "--name", "gone", "--ready-file", "/nonexistent/up", "--",
        "sh", "-c", "echo bad >&2; exit 3",
    )  # fmt: skip
    assert ended.returncode == 125
    assert b"gone ended (3) before it was ready: bad" in ended.stderr


# -- attach


def test_binary_goes_both_ways_through_attach(guest: Guest) -> None:
    data = os.urandom(5 << 20)
    guest.begin("cat", "cat")
    watching = guest.popen("attach", "box", "cat")
    assert watching.stdin is not None and watching.stdout is not None
    feeding = threading.Thread(target=watching.stdin.write, args=(data,))
    feeding.start()
    got = watching.stdout.read(len(data))
    feeding.join()
    assert got == data
    # The end of our input is not the end of its: it goes on, and so do we.
    watching.stdin.close()
    guest.until("cat", lambda session: session.writer)
    assert guest.shown("cat").state == "running"
    watching.send_signal(signal.SIGINT)
    assert watching.wait(WAIT_S) == 0
    assert guest.shown("cat").state == "running"
    _end(watching)


def test_stderr_stays_apart(guest: Guest) -> None:
    guest.begin("two", "sh", "-c", "printf 'o\\0\\377'; printf 'e\\0\\376' >&2; read x; exit 5")
    watching = guest.popen("attach", "-q", "--from", "start", "box", "two")
    out, err = watching.communicate(b"x\n", timeout=WAIT_S)
    assert (watching.returncode, out, err) == (5, b"o\0\xff", b"e\0\xfe")
    assert guest.ok("logs", "box", "two", "--stream", "stderr") == b"e\0\xfe"


def test_many_watch_and_one_writes(guest: Guest) -> None:
    guest.begin("echo", sys.executable, "-u", "-c", ECHO)
    with guest.connect("echo") as writer, guest.connect("echo", b'{"read_only":true}') as viewer:
        assert writer.answer["ok"] is True
        second = guest.session("attach", "box", "echo")
        assert second.returncode == 125
        assert b"has a writer" in second.stderr
        assert b"--read-only" in second.stderr
        refused = guest.connect("echo")
        assert (refused.answer["ok"], refused.answer["code"]) == (False, "busy")
        refused.socket.close()
        viewer.write(b"nobody hears this\n")
        writer.write(b"hello\n")
        assert writer.read(10) == viewer.read(10) == b"got hello\n"
        assert guest.json("show", "box", "echo")["viewers"] == 2
    guest.until("echo", lambda session: session.viewers == 0 and not session.writer)


def test_a_slow_viewer_misses_output_and_is_told(guest: Guest) -> None:
    size = 8 << 20
    code = (
        f"import os\nfor _ in range({size >> 16}): os.write(1, b'x' * 65536)\nos.write(1, b'end')"
    )
    guest.begin("fast", sys.executable, "-c", f"input()\n{code}", log_limit=65536)
    with guest.connect("fast", b'{"read_only":true}') as slow:
        guest.ok("send", "box", "fast", "go")
        # It never waits for who does not read.
        session, ended = sessions.wait(guest.agent_endpoint, "fast", timeout_s=WAIT_S)
        assert (ended, session.stdout.end) == (True, size + 3)
        got, missed, kinds = 0, 0, []
        while True:
            kind, payload = slow.frame()
            kinds.append(kind)
            if kind == frames.STDOUT:
                got += len(payload)
                last = payload
            elif kind == frames.MISSED:
                stream, count = sessions.parse_missed(payload)
                assert stream == "stdout"
                missed += count
            elif kind == frames.END:
                break
    assert got + missed == size + 3
    assert missed > 0
    assert last.endswith(b"end")
    assert kinds[-2:] == [frames.EXIT, frames.END]
    whole = guest.session("attach", "--read-only", "--from", "start", "box", "fast")
    assert b"bytes of stdout are gone: so much is kept no more\n" in whole.stderr
    assert whole.stdout.endswith(b"end")


def test_a_position_is_where_one_goes_on(guest: Guest) -> None:
    guest.begin("once", "sh", "-c", "printf 0123456789; printf abc >&2")
    guest.until("once", lambda session: session.state == "ended")
    for where, out, err in (
        ("4", b"456789", b""),
        ("10,1", b"", b"bc"),
        ("start", b"0123456789", b"abc"),
        ("end", b"", b""),
    ):
        done = guest.session("attach", "-q", "--from", where, "box", "once")
        assert (done.returncode, done.stdout, done.stderr) == (0, out, err), where


class Terminal:
    """A command of ours on a pty."""

    def __init__(self, guest: Guest, *words: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 33, 44, 0, 0))
        environment = {**guest.environment, "TERM": "xterm"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "banger", "vm", "session", *words],
            stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.screen = b""

    def until(self, text: bytes) -> None:
        deadline = time.monotonic() + WAIT_S
        while text not in self.screen:
            assert time.monotonic() < deadline, self.screen
            if select.select([self.master], [], [], 1)[0]:
                self.screen += os.read(self.master, 65536)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_a_terminal_is_left_with_ctrl_p_ctrl_q(guest: Guest) -> None:
    script = "read x; stty size; stty raw -echo; echo raw; exec cat -v"
    guest.begin("sh", "sh", "-c", script, stdin_mode="pty")
    terminal = Terminal(guest, "attach", "box", "sh")
    try:
        terminal.until(b"Ctrl-P Ctrl-Q leaves")
        guest.until("sh", lambda session: session.writer)
        terminal.type(b"x\r")
        terminal.until(b"33 44")
        terminal.until(b"raw")
        # Ctrl-C is the session's, and a lone Ctrl-P too.
        terminal.type(b"\x03\x10here")
        terminal.until(b"^C^Phere")
        terminal.type(b"\x10\x11")
        assert terminal.process.wait(WAIT_S) == 0
    finally:
        terminal.close()
    assert guest.shown("sh").state == "running"
    guest.ok("send", "box", "sh", "bye")
    guest.until("sh", lambda session: not session.writer)
    assert b"bye^M" in guest.ok("logs", "box", "sh")


# -- send


def test_two_who_send_at_once_queue(guest: Guest) -> None:
    guest.begin("echo", sys.executable, "-u", "-c", ECHO)
    senders = [guest.popen("send", "box", "echo", str(number) * 20000) for number in range(4)]
    for sender in senders:
        _, err = sender.communicate(timeout=WAIT_S)
        assert sender.returncode == 0, err
    guest.until("echo", lambda session: session.stdout.end == 4 * 20005)
    lines = guest.ok("logs", "box", "echo").splitlines()
    assert sorted(lines) == [b"got " + str(number).encode() * 20000 for number in range(4)]


def test_stdin_is_sent_byte_for_byte(guest: Guest) -> None:
    data = os.urandom(1 << 20)
    guest.begin("cat", "cat")
    guest.ok("send", "box", "cat", "--stdin", "--eof", stdin=data)
    assert guest.session("wait", "box", "cat").returncode == 0
    assert guest.ok("logs", "box", "cat") == data
    late = guest.session("send", "box", "cat", "x")
    assert (late.returncode, b"has ended (0)" in late.stderr) == (125, True)


def test_text_may_look_like_options_and_have_no_newline(guest: Guest) -> None:
    guest.begin("cat", "cat")
    guest.ok("send", "box", "cat", "--no-newline", "--", "-x", "--eof")
    guest.ok("send", "box", "cat", "a", "--eof", "-1", "b")
    guest.session("wait", "box", "cat")
    assert guest.ok("logs", "box", "cat") == b"-x --eofa -1 b\n"


def test_send_says_when_nobody_reads(guest: Guest) -> None:
    guest.begin("deaf", "sleep", "3600")
    stuck = guest.session("send", "box", "deaf", "--stdin", "--timeout", "1", stdin=bytes(1 << 20))
    assert stuck.returncode == 125
    assert b"takes no more of its stdin" in stuck.stderr


# -- logs


def test_logs_begin_at_the_last_lines(guest: Guest) -> None:
    lines = "".join(f"line {number} {'x' * 100}\n" for number in range(9000))
    file = guest.root / "lines"
    file.write_text(lines)
    guest.begin("all", "sh", "-c", f"cat {file}; printf tail; echo a >&2; echo b >&2")
    guest.until("all", lambda session: session.state == "ended")
    whole = (lines + "tail").encode()
    for count in (0, 1, 2, 5000, 9001, 99999):
        wanted = b"".join(whole.splitlines(keepends=True)[-count:]) if count else b""
        assert guest.ok("logs", "box", "all", "--stream", "stdout", "--tail", str(count)) == wanted
    both = guest.session("logs", "box", "all", "-n", "1")
    assert (both.stdout, both.stderr) == (b"tail", b"b\n")
    assert guest.json("logs", "box", "all", "-n", "1") == {
        "vm": "box", "name": "all", "stdout": "tail", "stderr": "b\n",
    }  # fmt: skip


def test_logs_follow_to_the_end(guest: Guest) -> None:
    guest.begin("cat", "cat")
    guest.ok("send", "box", "cat", "one")
    following = guest.popen("logs", "-f", "box", "cat")
    assert following.stdout is not None
    assert following.stdout.readline() == b"one\n"
    guest.ok("send", "box", "cat", "two", "--eof")
    assert following.stdout.read() == b"two\n"
    assert following.wait(WAIT_S) == 0
    _end(following)


def test_logs_since_a_time(guest: Guest) -> None:
    guest.begin("cat", "cat")
    guest.ok("send", "box", "cat", "old")
    guest.until("cat", lambda session: session.stdout.end == 4)
    first = time.time()
    while int(time.time()) <= int(first) + 1:  # exact to a second
        time.sleep(0.05)
    moment = int(time.time())
    guest.ok("send", "box", "cat", "new")
    guest.until("cat", lambda session: session.stdout.end == 8)
    assert guest.ok("logs", "box", "cat", "--since", str(moment)) == b"new\n"
    assert guest.ok("logs", "box", "cat", "--since", "1h") == b"old\nnew\n"
    assert guest.ok("logs", "box", "cat", "--since", "1h", "--tail", "1") == b"new\n"
    assert guest.ok("logs", "box", "cat", "--since", "2001-01-01T00:00:00Z") == b"old\nnew\n"


# -- the sockets


def test_json_lines_pass_byte_for_byte_from_a_plain_program(guest: Guest) -> None:
    guest.begin("agent", sys.executable, "-u", "-c", ECHO)
    path = guest.json("show", "box", "agent")["socket"]
    program = (
        "import json, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "f = s.makefile('rwb')\n"
        "f.write(b'{\"raw\": true}\\n'); f.flush()\n"
        "assert json.loads(f.readline())['ok']\n"
        "for n in range(100):\n"
        "    line = json.dumps({'n': n, 'text': 'ä\\u2028' * n}, ensure_ascii=False).encode() + b'\\n'\n"
        "    f.write(line); f.flush()\n"
        "    assert f.readline() == b'got ' + line\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], timeout=WAIT_S, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    guest.until("agent", lambda session: not session.writer)


def test_raw_bytes_go_both_ways_through_a_socket(guest: Guest) -> None:
    data = os.urandom(5 << 20)
    guest.begin("cat", "cat")
    with guest.connect("cat", b'{"raw":true}') as program:
        feeding = threading.Thread(target=program.socket.sendall, args=(data,))
        feeding.start()
        got = b""
        while len(got) < len(data):
            more = program.socket.recv(1 << 20)
            assert more
            got += more
        feeding.join()
        assert got == data
        program.socket.shutdown(socket.SHUT_WR)
        guest.ok("kill", "box", "cat")
        assert program.socket.recv(1) == b""


def test_what_a_program_sent_before_it_left_arrives(guest: Guest) -> None:
    # More than may wait for the process; less than fits in between when, as here, nobody reads
    # what it says (600 KB to 800 KB).
    data = bytes(range(256)) * 1200
    guest.begin("cat", "cat")
    with guest.connect("cat", b"") as program:
        program.write(data)
    guest.until("cat", lambda session: session.stdout.end == len(data))
    with guest.connect("cat", b'{"read_only":true,"from":{"stdout":5}}') as viewer:
        assert viewer.read(len(data) - 5) == data[5:]


def test_what_a_slow_process_still_takes_is_not_cut_off(guest: Guest) -> None:
    """The program is gone for longer than its bytes may stand still; these never do."""
    count = 600_000
    guest.begin("slow", sys.executable, "-u", "-c", (
        "import os, time\n"
        "n = 0\n"
        "for _ in range(5): time.sleep(3); n += len(os.read(0, 40960))\n"
        f"while n < {count}: n += len(os.read(0, 65536))\n"
        "print(n)"
    ))  # fmt: skip
    with guest.connect("slow", b"") as program:
        program.write(bytes(count))
    guest.until("slow", lambda session: session.stdout.end > 0)
    assert guest.ok("logs", "box", "slow") == b"%d\n" % count


def test_signal_size_and_end_of_input_through_a_socket(guest: Guest) -> None:
    guest.begin("tty", "sh", "-c", "read x; stty size; trap 'exit 9' USR1; while :; do sleep 0.1; done",
                stdin_mode="pty")  # fmt: skip
    with guest.connect("tty") as program:
        program.socket.sendall(frames.encode_json(frames.RESIZE, {"rows": 33, "cols": 44}))
        program.write(b"x\r")
        seen = b""
        while b"33 44" not in seen:
            seen += program.frame()[1]
        program.socket.sendall(frames.encode_json(frames.SIGNAL, {"number": signal.SIGUSR1}))
        while (found := program.frame())[0] != frames.EXIT:
            pass
        assert json.loads(found[1]) == {"code": 9, "signal": None}
        kind, payload = program.frame()
        assert kind == frames.END
        assert json.loads(payload)["session"]["state"] == "ended"
    guest.begin("cat", "cat")
    with guest.connect("cat") as program:
        program.socket.sendall(frames.encode(frames.STDIN_EOF))
        assert json.loads(program.frame()[1]) == {"code": 0, "signal": None}


def test_nonsense_of_a_program_harms_nobody(guest: Guest) -> None:
    guest.begin("cat", "cat")
    path = guest.json("show", "box", "cat")["socket"]
    bridge = find_by_argument(guest.mark)
    for line in (b"nonsense", b"[]", b"[" * 4000, b'{"from":-1}', b'{"from":true}', b'{"raw":1}',
                 b"x" * 5000, b'{"from":{"stdout":1e9}}', b'{"from":' + b"9" * 30 + b"}"):  # fmt: skip
        with Program(path, line) as program:
            assert program.answer["ok"] is False, line
            assert program.answer["code"] == "invalid_input"
    for garbage in (b"\xff" * 100, frames.encode(frames.STDOUT, b"x"), b"\x10\xff\xff\xff\xff",
                    frames.encode(frames.SIGNAL, b"{}"), frames.encode(frames.RESIZE, b"[")):  # fmt: skip
        with Program(path) as program:
            assert program.answer["ok"] is True
            program.socket.sendall(garbage)
            with contextlib.suppress(ConnectionResetError):
                assert program.socket.recv(100) == b""
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(WAIT_S)
        control.connect(os.path.join(os.path.dirname(path), ".control"))
        control.sendall(b"../../x\n")
        assert b"cannot be a session's name" in control.recv(500)
    assert find_by_argument(guest.mark) == bridge
    guest.until("cat", lambda session: session.viewers == 0)
    with Program(path) as program:
        program.write(b"fine")
        assert program.read(4) == b"fine"


def test_a_removed_session_takes_its_socket_along(guest: Guest) -> None:
    guest.begin("cat", "cat")
    path = guest.json("show", "box", "cat")["socket"]
    with Program(path) as program:
        guest.ok("rm", "--force", "box", "cat")
        while program.frame()[0] != frames.END:
            pass
    with Program(path) as program:
        assert (program.answer["ok"], program.answer["code"]) == (False, "not_found")
    assert not os.path.exists(path)
    guest.begin("cat", "cat")
    with guest.connect("cat") as program:
        assert program.answer["ok"] is True


def test_a_killed_bridge_is_begun_again(guest: Guest) -> None:
    guest.begin("one", "cat")
    guest.begin("two", "cat")
    paths = [guest.json("show", "box", name)["socket"] for name in ("one", "two")]
    (bridge,) = find_by_argument(guest.mark)
    bridge.kill()
    deadline = time.monotonic() + WAIT_S
    while bridge.alive():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert guest.json("show", "box", "one")["socket"] == paths[0]
    assert find_by_argument(guest.mark) != [bridge]
    for path in paths:  # the one before is taken up whole
        with Program(path) as program:
            program.write(b"x")
            assert program.read(1) == b"x"


def test_several_who_need_the_bridge_start_one(guest: Guest) -> None:
    for number in range(4):
        guest.begin(f"s{number}", "cat")
    showing = [guest.popen("show", "--json", "box", f"s{number}") for number in range(4)]
    for process in showing:
        out, err = process.communicate(timeout=WAIT_S)
        assert json.loads(out)["socket"] is not None, err
    assert len(find_by_argument(guest.mark)) == 1


def test_the_bridge_ends_with_the_vm(guest: Guest) -> None:
    guest.begin("cat", "cat")
    guest.json("show", "box", "cat")
    (bridge,) = find_by_argument(guest.mark)
    guest.vmm.kill()
    deadline = time.monotonic() + WAIT_S
    while bridge.alive():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_long_name_has_a_short_socket(guest: Guest) -> None:
    name = "n" * 64
    guest.begin(name, "cat")
    with guest.connect(name) as program:
        assert program.answer["session"]["name"] == name


def test_the_documented_program_runs(guest: Guest) -> None:
    """The example of docs/sessions.md, as it stands there."""
    page = (Path(__file__).parents[2] / "docs" / "sessions.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    guest.begin("planner", sys.executable, "-u", "-c", ECHO)
    path = guest.json("show", "box", "planner")["socket"]
    done = subprocess.run(
        [sys.executable, "-c", code, path],
        timeout=WAIT_S,
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == 'got {"type": "hello"}\n'
