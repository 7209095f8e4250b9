"""Every request of PROTOCOL.md through the real client against the real agent."""

from __future__ import annotations

import base64
import io
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from banger.cli.attach import run_exec
from banger.errors import Cancelled, Conflict, InvalidInput, NotFound, TimedOut, Unavailable
from banger.guest import agent, frames
from banger.guest.agent import ExecRequest, ExitStatus
from banger.guest.transport import Endpoint, UnixListener, VirtioSerial, open_stream

SRC = str(Path(__file__).resolve().parents[2] / "src")


def run(endpoint: Endpoint, *argv: bytes, **options: object) -> tuple[ExitStatus, bytes, bytes]:
    return agent.capture_exec(endpoint, list(argv), timeout_s=20, **options)  # type: ignore[arg-type]


def lock_states(endpoint: VirtioSerial) -> dict[int, str]:
    return {
        number: Path(f"{endpoint.directory}/p{number:02d}.lock").read_text()
        for number in range(endpoint.ports)
        if os.path.exists(f"{endpoint.directory}/p{number:02d}.lock")
    }


def test_wait_ready_says_who_answers(endpoint: Endpoint) -> None:
    info = agent.wait_ready(endpoint, timeout_s=5)
    assert (1, "test") == (info.version, info.mode)
    assert len(info.boot_id) == 36


def test_wait_ready_can_be_cancelled(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        agent.wait_ready(VirtioSerial(str(tmp_path), 2), timeout_s=5, cancelled=lambda: True)
    with pytest.raises(TimedOut):
        agent.wait_ready(UnixListener(str(tmp_path / "none")), timeout_s=0.1)


def test_exec_keeps_bytes_streams_and_status(endpoint: Endpoint) -> None:
    argv = [b"sh", b"-c", b'printf "%s" "$1"; printf err >&2; exit 7', b"sh", b"\xff\xfe\n "]
    assert (ExitStatus(7, None), b"\xff\xfe\n ", b"err") == run(endpoint, *argv)


def test_exec_takes_two_megabytes_of_argv(endpoint: Endpoint) -> None:
    words = [b"x" * 100_000] * 15
    status, out, _ = run(endpoint, b"printf", b"%s", *words)
    assert (0, 1_500_000) == (status.exit_code, len(out))


def test_stdin_of_many_windows_arrives_whole(endpoint: Endpoint) -> None:
    data = os.urandom(3_000_000)
    status, out, _ = run(endpoint, b"cat", input=data)
    assert (0, True) == (status.exit_code, out == data)


def test_stdin_that_nobody_reads_does_not_hang(endpoint: Endpoint) -> None:
    status, out, _ = run(endpoint, b"sh", b"-c", b"exec <&-; echo ok", input=b"x" * 2_000_000)
    assert (0, b"ok\n") == (status.exit_code, out)


@pytest.mark.parametrize("number", [1, 2, 9, 11, 15])
def test_terminating_signal_passes_exactly(endpoint: Endpoint, number: int) -> None:
    status, _, _ = run(endpoint, b"sh", b"-c", b"ulimit -c 0; kill -%d $$; sleep 9" % number)
    assert (ExitStatus(None, number), 128 + number) == (status, status.exit_code)


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (b"no-such-program", 127),
        (b"/no/such", 127),
        (b"/etc/passwd", 126),
        (b"/etc", 126),
        (b"", 127),
    ],
)
def test_what_cannot_run_ends_as_in_a_shell(endpoint: Endpoint, argv: bytes, code: int) -> None:
    status, out, err = run(endpoint, argv)
    assert (code, b"") == (status.exit_code, out)
    assert err.startswith(b"banger: " + argv)


def test_script_without_interpreter_line_is_no_shell_script(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    script = tmp_path / "s"
    script.write_text("echo hi\n")
    script.chmod(0o755)
    assert run(endpoint, os.fsencode(script))[0].exit_code == 126


def test_output_of_a_grandchild_does_not_hold_the_exec(endpoint: Endpoint) -> None:
    begin = time.monotonic()
    assert run(endpoint, b"sh", b"-c", b"sleep 30 & echo done")[1] == b"done\n"
    assert time.monotonic() - begin < 5


def test_large_output_before_the_exit_is_not_lost(endpoint: Endpoint) -> None:
    out = run(endpoint, b"sh", b"-c", b"head -c 5000000 /dev/zero; sleep 30 &")[1]
    assert len(out) == 5_000_000


def test_environment_user_and_directory(endpoint: Endpoint) -> None:
    request = ExecRequest(
        [b"sh", b"-c", b'pwd; echo "$HOME $X $LANG"'], env={b"X": b"\xff"}, cwd=b"/usr"
    )
    read, write = os.pipe()
    null = os.open("/dev/null", os.O_WRONLY)
    status = run_exec(endpoint, request, stdin_fd=None, stdout_fd=write, stderr_fd=null)
    os.close(write)
    with os.fdopen(read, "rb") as out:
        text = out.read()
    os.close(null)
    assert status.exit_code == 0
    assert text.startswith(b"/usr\n/")
    assert text.endswith(b" \xff C.UTF-8\n")


@pytest.mark.parametrize(
    "request_",
    [ExecRequest([b"true"], cwd=b"/no/such"), ExecRequest([b"true"], user="no-such-user")],
)
def test_bad_directory_or_user_is_our_failure(endpoint: Endpoint, request_: ExecRequest) -> None:
    with pytest.raises(InvalidInput), open(os.devnull, "w") as null:
        run_exec(
            endpoint, request_, stdin_fd=None, stdout_fd=null.fileno(), stderr_fd=null.fileno()
        )


def test_timeout_kills_the_whole_session(endpoint: Endpoint) -> None:
    begin = time.monotonic()
    status, out, _ = agent.capture_exec(
        endpoint,
        [b"sh", b"-c", b"trap '' TERM; sleep 60 & echo $!; wait; wait; sleep 60"],
        timeout_s=0.3,
    )
    assert (True, 124) == (status.timed_out, status.exit_code)
    assert time.monotonic() - begin < 8
    assert not is_running(int(out))


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_gone(pid: int, *, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not is_running(pid):
            return True
        time.sleep(0.02)
    return False


def test_hang_up_ends_the_process(endpoint: Endpoint) -> None:
    stream = open_stream(endpoint, timeout_s=5)
    stream.send_request("exec", agent.exec_fields(ExecRequest([b"sleep", b"60"])))
    pid = frames.decode_object(agent.expect(stream, frames.STARTED, timeout_s=5))["pid"]
    assert isinstance(pid, int)
    stream.close()
    assert wait_gone(pid, timeout_s=4)


def test_signal_gets_through_while_stdin_is_full(endpoint: Endpoint) -> None:
    with open_stream(endpoint, timeout_s=5) as stream:
        stream.send_request("exec", agent.exec_fields(ExecRequest([b"sleep", b"60"])))
        agent.expect(stream, frames.STARTED, timeout_s=5)
        for _ in range(4):
            stream.send(frames.STDIN, b"x" * 65536)
        stream.send_raw(frames.encode_json(frames.SIGNAL, {"number": 15}))
        while (frame := stream.receive(timeout_s=5))[0] == frames.STDIN_CREDIT:
            pass
        assert (frames.EXIT, ExitStatus(None, 15)) == (frame[0], agent.parse_exit(frame[1]))
        agent.expect(stream, frames.END, timeout_s=5)


def test_more_stdin_than_credit_is_a_protocol_error(endpoint: Endpoint) -> None:
    with open_stream(endpoint, timeout_s=5) as stream:
        stream.send_request("exec", agent.exec_fields(ExecRequest([b"sleep", b"60"])))
        agent.expect(stream, frames.STARTED, timeout_s=5)
        with pytest.raises(Unavailable) as caught:
            for _ in range(30):
                stream.send(frames.STDIN, b"x" * 65536)
            while True:
                kind, payload = stream.receive(timeout_s=5)
                if kind == frames.ERROR:
                    raise agent.agent_error(payload)
        assert caught.value.code in ("agent_protocol", "agent_lost")
        stream.finished = False
    assert run(endpoint, b"true")[0].exit_code == 0


def test_detached_process_lives_on_and_its_output_is_kept(endpoint: Endpoint) -> None:
    started = agent.start_detached(endpoint, ExecRequest([b"sh", b"-c", b"echo out; echo err >&2"]))
    log = Path(str(started["log"]))
    deadline = time.monotonic() + 5
    while len(log.read_text()) < 8 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert log.read_text() == "out\nerr\n"


def test_terminal_has_size_and_passes_bytes(endpoint: Endpoint) -> None:
    with open_stream(endpoint, timeout_s=5) as stream:
        request = ExecRequest(
            [b"sh", b"-c", b"stty size; read x; stty size; tty; echo $TERM"], tty=(11, 22, "vt100")
        )
        stream.send_request("exec", agent.exec_fields(request))
        out, resized = b"", False
        while True:
            kind, payload = stream.receive(timeout_s=5)
            if kind == frames.STDOUT:
                out += payload
                if b"11 22" in out and not resized:
                    resized = True
                    stream.send_raw(frames.encode_json(frames.RESIZE, {"rows": 33, "cols": 44}))
                    stream.send(frames.STDIN, b"\n")
            elif kind == frames.END:
                break
    assert b"33 44" in out
    assert b"/dev/pts/" in out
    assert b"vt100" in out


def test_put_and_get_round_trip(endpoint: Endpoint, tmp_path: Path) -> None:
    source = io.BytesIO()
    names = ["plain", "with space", "new\nline", "deep/" * 30 + "long", "\udcff\udcfe"]
    with tarfile.open(fileobj=source, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = 200_000, 0o755, 1_500_000_000
            tar.addfile(info, io.BytesIO(b"z" * 200_000))
    source.seek(0)
    seen: list[int] = []
    target = os.fsencode(tmp_path / "in")
    result = agent.put_tar(endpoint, target, source, mode="create", progress=seen.append)
    assert (5, 1_000_000) == (result["files"], result["bytes"])
    assert seen[-1] >= 1_000_000
    got = io.BytesIO()
    agent.get_tar(endpoint, target, got.write)
    got.seek(0)
    with tarfile.open(fileobj=got, errors="surrogateescape") as tar:
        files = {m.name: (m.size, m.mode, m.mtime) for m in tar.getmembers() if m.isfile()}
    assert files == {"in/" + name: (200_000, 0o755, 1_500_000_000) for name in names}


def test_put_reports_the_first_failure_and_stops(endpoint: Endpoint, tmp_path: Path) -> None:
    sent = 0

    def endless() -> object:
        nonlocal sent
        while sent < 200 << 20:
            sent += 65536
            yield b"not a tar " * 6553 + b"123456"

    with pytest.raises(Unavailable, match="damaged"):
        agent.put_tar(endpoint, os.fsencode(tmp_path), endless())  # type: ignore[arg-type]
    assert sent < 100 << 20
    (tmp_path / "full").write_text("")
    with pytest.raises(Conflict):
        agent.put_tar(endpoint, os.fsencode(tmp_path), io.BytesIO(bytes(10240)), mode="create")
    assert run(endpoint, b"true")[0].exit_code == 0


def test_a_full_get_has_what_a_copy_leaves_out(endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    os.setxattr(tmp_path / "file", "user.note", b"a\0b")
    os.mkfifo(tmp_path / "pipe")
    found = {}
    for full in (False, True):
        got = io.BytesIO()
        agent.get_tar(endpoint, os.fsencode(tmp_path / "."), got.write, full=full)
        got.seek(0)
        with tarfile.open(fileobj=got) as tar:
            found[full] = {m.name: m.pax_headers for m in tar.getmembers()}
    name = f"./{'file'}" if "./file" in found[True] else f"{tmp_path.name}/file"
    assert found[False][name] == {}
    assert found[True][name]["SCHILY.xattr.user.note"] == "a\0b"


def test_get_of_nothing_is_not_found(endpoint: Endpoint) -> None:
    with pytest.raises(NotFound):
        agent.get_tar(endpoint, b"/no/such", lambda data: None)
    with pytest.raises(InvalidInput):
        agent.get_tar(endpoint, b"relative", lambda data: None)


def test_stat(endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    (tmp_path / "l").symlink_to("f")
    found = agent.stat_path(endpoint, os.fsencode(tmp_path / "f"))
    assert found is not None
    assert ("file", 5) == (found["type"], found["size"])
    link = agent.stat_path(endpoint, os.fsencode(tmp_path / "l"))
    assert link is not None
    assert ("symlink", "file") == (link["type"], link["target_type"])
    assert agent.stat_path(endpoint, os.fsencode(tmp_path / "none")) is None


def test_forward_closes_each_half_by_itself(endpoint: Endpoint) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert agent.probe_port(endpoint, port, wait_s=1)
        server.accept()[0].close()

        def answer() -> None:
            connection = server.accept()[0]
            with connection:
                data = b""
                while part := connection.recv(65536):
                    data += part
                connection.sendall(data[::-1])

        thread = threading.Thread(target=answer)
        thread.start()
        with agent.open_forward(endpoint, port, wait_s=1) as forward:
            data = os.urandom(2_000_000)
            forward.send(data)
            forward.send_eof()
            got = b""
            while part := forward.recv():
                got += part
        thread.join()
        assert got == data[::-1]


def test_forward_joins_descriptors(endpoint: Endpoint) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ours, theirs = socket.socketpair()
        out_read, out_write = os.pipe()
        thread = threading.Thread(
            target=agent.forward,
            args=(endpoint, port),
            kwargs={"wait_s": 1, "in_fd": theirs.fileno(), "out_fd": out_write},
        )
        thread.start()
        connection = server.accept()[0]
        ours.sendall(b"ping")
        assert connection.recv(4) == b"ping"
        connection.sendall(b"pong")
        assert os.read(out_read, 4) == b"pong"
        ours.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
        connection.close()
        assert os.read(out_read, 1) == b""
        thread.join(5)
        assert not thread.is_alive()
        os.close(out_read)
        ours.close()
        theirs.close()


def test_forward_waits_for_a_listener_and_says_when_there_is_none(endpoint: Endpoint) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        assert not agent.probe_port(endpoint, port, wait_s=0.1)
        threading.Timer(0.3, reserved.listen).start()
        assert agent.probe_port(endpoint, port, wait_s=5)


def test_shell_is_one_that_runs(endpoint: Endpoint) -> None:
    found = agent.find_shell(endpoint)
    assert found.argv is not None
    assert found.sshd in ("up", "coming", "none")
    status, out, _ = run(endpoint, *found.argv, b"-c", b"echo $0")
    assert (0, found.argv[0] + b"\n") == (status.exit_code, out)
    with pytest.raises(InvalidInput, match="no user"):
        agent.find_shell(endpoint, user="nobody-of-that-name")


def test_ports_stats_time_sync_shutdown(endpoint: Endpoint) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        mine = [p for p in agent.listening_ports(endpoint) if p["port"] == port]
        assert [("tcp", "127.0.0.1", os.getpid())] == [
            (p["proto"], p["address"], p["pid"]) for p in mine
        ]
    stats = agent.stats(endpoint)
    assert stats["memory"]["total"] > stats["memory"]["available"] > 0  # type: ignore[index]
    assert stats["processes"] > 0  # type: ignore[operator]
    agent.set_time(endpoint)
    agent.sync(endpoint)
    agent.shutdown(endpoint, timeout_s=5)


def test_unknown_request_is_refused_and_the_port_stays_clean(agent_directory: str) -> None:
    endpoint = VirtioSerial(agent_directory, 1)
    with pytest.raises(Unavailable) as caught:
        agent._ask(endpoint, "no-such-kind", {})
    assert caught.value.code == "agent_unsupported"
    assert lock_states(endpoint) == {0: "C"}


def test_ports_are_taken_from_the_lowest_and_come_back_clean(agent_directory: str) -> None:
    endpoint = VirtioSerial(agent_directory, 4)
    with open_stream(endpoint, timeout_s=5), open_stream(endpoint, timeout_s=5):
        assert lock_states(endpoint) == {0: "D", 1: "D"}
        with pytest.raises(TimedOut) as caught:
            open_stream(VirtioSerial(agent_directory, 2), timeout_s=0.2)
        assert caught.value.code == "agent_busy"
    assert run(endpoint, b"true")[0].exit_code == 0
    assert lock_states(endpoint)[0] == "C"


@pytest.mark.parametrize("ports", [1, 4])
def test_killed_client_costs_no_port(agent_directory: str, ports: int) -> None:
    endpoint = VirtioSerial(agent_directory, ports)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from banger.guest import agent\n"
        "from banger.guest.transport import VirtioSerial\n"
        f"stream = agent.open_stream(VirtioSerial(sys.argv[2], {ports}), timeout_s=5)\n"
        "stream.send_request('exec', agent.exec_fields(agent.ExecRequest([b'yes'])))\n"
        "stream.send_raw(b'\\x10\\0\\0\\xff\\xffhalf a frame')\n"
        "print(flush=True); sys.stdin.read()\n"
    )
    for _ in range(5):
        client = subprocess.Popen(
            [sys.executable, "-c", program, SRC, agent_directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert client.stdout is not None and client.stdin is not None
        client.stdout.readline()
        client.kill()
        client.wait()
        client.stdin.close()
        client.stdout.close()
        assert run(endpoint, b"echo", b"ok")[1] == b"ok\n"
    # As many streams at once as there are ports. (A dirty port above a clean one is only taken back
    # when it is needed, so the states of the locks alone would say nothing.)
    streams = [open_stream(endpoint, timeout_s=10) for _ in range(ports)]
    for stream in streams:
        stream.close()


def test_agent_survives_any_bytes(agent_directory: str) -> None:
    hello = frames.encode_hello("0" * 32)
    for junk in (
        b"\xff" * 100_000,
        hello + b"\xff" * 100,
        hello + frames.encode(frames.REQUEST, b"{" * 60000),
        hello + frames.encode(frames.REQUEST, b'{"kind":"exec","argv":5}'),
        hello + frames.encode(frames.REQUEST, b'{"kind":"put","path":"LwA=","mode":"merge"}'),
        hello + frames.encode(frames.REQUEST, b'{"kind":"forward","port":-1}'),
        hello + frames.encode(frames.REQUEST, b'{"kind":"time","unix_ns":"x"}'),
        hello * 50,
    ):
        for path in ("/p00", "/listen"):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(agent_directory + path)
                try:
                    sock.sendall(junk)
                except BrokenPipeError:
                    pass
    assert run(VirtioSerial(agent_directory, 1), b"echo", b"ok")[1] == b"ok\n"


# The byte pump of the command line, as a process of its own.

PUMP = (
    "import sys; sys.path.insert(0, sys.argv[1])\n"
    "from banger.cli.attach import run_exec\n"
    "from banger.guest.agent import ExecRequest\n"
    "from banger.guest.transport import VirtioSerial\n"
    "tty = (24, 80, 'xterm') if sys.argv[3] == 'tty' else None\n"
    "request = ExecRequest([a.encode() for a in sys.argv[4:]], tty=tty)\n"
    "print('attached', file=sys.stderr, flush=True)\n"
    "s = run_exec(VirtioSerial(sys.argv[2], 4), request, stdin_fd=0, stdout_fd=1, stderr_fd=2)\n"
    "sys.exit(s.exit_code)\n"
)


def pump_argv(directory: str, mode: str, *argv: str) -> list[str]:
    return [sys.executable, "-c", PUMP, SRC, directory, mode, *argv]


@pytest.mark.parametrize("kind", ["pipe", "file", "null"])
def test_pump_takes_any_stdin(agent_directory: str, tmp_path: Path, kind: str) -> None:
    data = b"" if kind == "null" else os.urandom(1_000_000)
    (tmp_path / "data").write_bytes(data)
    argv = pump_argv(agent_directory, "-", "cat")
    if kind == "pipe":
        done = subprocess.run(argv, check=False, input=data, capture_output=True, timeout=30)
    else:
        with open(tmp_path / "data" if kind == "file" else os.devnull, "rb") as source:
            done = subprocess.run(argv, check=False, stdin=source, capture_output=True, timeout=30)
    assert (0, True) == (done.returncode, done.stdout == data)


def test_pump_forwards_a_signal(agent_directory: str) -> None:
    argv = pump_argv(
        agent_directory, "-", "sh", "-c", "trap 'echo got; exit 5' TERM; echo up; sleep 60 & wait"
    )
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"up\n"
        client.send_signal(signal.SIGTERM)
        out, _ = client.communicate(timeout=20)
    assert (5, b"got\n") == (client.returncode, out)


def test_pump_ends_quietly_when_nobody_reads(agent_directory: str) -> None:
    with subprocess.Popen(
        pump_argv(agent_directory, "-", "yes"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as client:
        assert client.stdout is not None and client.stderr is not None
        client.stdout.read(100_000)
        client.stdout.close()
        assert client.wait(20) == 141
        assert client.stderr.read() == b"attached\n"


def test_pump_in_a_terminal(agent_directory: str) -> None:
    pid, master = pty.fork()
    if pid == 0:
        argv = pump_argv(
            agent_directory, "tty", "sh", "-c", "echo ready; read x; echo got:$x; cat; exit 3"
        )
        os.execv(argv[0], argv)
    seen = b""

    def expect(part: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 10
        while part not in seen:
            assert select.select([master], [], [], max(0, deadline - time.monotonic()))[0], seen
            seen += os.read(master, 4096)

    expect(b"ready")
    os.write(master, b"hello\r")
    expect(b"got:hello")
    os.write(master, b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    os.close(master)


def test_base64_helper_is_standard() -> None:
    assert agent.b64(b"\xff\xfe\xfd") == base64.b64encode(b"\xff\xfe\xfd").decode()


def test_the_agent_is_one_small_static_file(agent_binary: str) -> None:
    binary = Path(agent_binary).read_bytes()
    assert len(binary) <= 4_000_000  # DESIGN.md, section 2
    assert b"/lib64/ld-linux" not in binary
