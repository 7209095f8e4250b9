"""The client against the route table and a daemon that speaks the contract."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from banger import __version__
from banger.api.routes import ROUTES
from banger.client import autostart, connection
from banger.client.api import Client
from banger.client.autostart import Daemon
from banger.errors import Conflict, NotFound, TimedOut, Unavailable, VmmFailed
from banger.paths import Paths
from tests.unit.client.fake_daemon import FakeDaemon, make_vm


@pytest.fixture
def paths() -> Iterator[Paths]:
    # Short: sockets live below, and sun_path is 108 bytes.
    with tempfile.TemporaryDirectory(prefix="bng-") as root:
        os.mkdir(f"{root}/r", 0o700)
        yield Paths(*(f"{root}/{name}" for name in ("c", "d", "s", "k")), f"{root}/r/x")


@pytest.fixture
def daemon(paths: Paths) -> Iterator[FakeDaemon]:
    os.makedirs(paths.runtime_dir, mode=0o700)
    fake = FakeDaemon(autostart.socket_path(paths))
    yield fake
    fake.close()


class RecordingTransport:
    """Remembers the one request a method makes."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, Any]] = []

    def request(self, method: str, path: str, body: Any = None) -> Any:
        self.seen.append((method, path, body))
        return {}

    def stream(self, path: str) -> Iterator[dict[str, Any]]:
        self.seen.append(("GET", path, None))
        return iter(())


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_client_has_the_method_of_every_route(route: Any) -> None:
    transport = RecordingTransport()
    method = getattr(Client(transport), route.name)
    arguments: list[Any] = ["some/name"] * len(re.findall(r"\{", route.path))
    if route.request is not None:
        arguments.append({"marked": True})
    method(*arguments)
    expected_path = re.sub(r"\{\w+\}", "some%2Fname", route.path)
    body = None if route.request is None else {"marked": True}
    assert transport.seen == [(route.method, expected_path, body)]


def test_client_has_no_method_without_a_route() -> None:
    public = {name for name in vars(Client) if not name.startswith("_")}
    assert public - {route.name for route in ROUTES} == {"wait"}


def test_errors_keep_class_code_message_and_hint(paths: Paths, daemon: FakeDaemon) -> None:
    body = {"error": {"code": "vmm_failed", "message": "QEMU died", "hint": "banger doctor"}}
    daemon.answers["GET /v1/vms/box"] = (502, body)
    with pytest.raises(VmmFailed) as caught:
        Client(Daemon(paths)).get_vm("box")
    assert (caught.value.code, caught.value.message) == ("vmm_failed", "QEMU died")
    assert caught.value.hint == "banger doctor"


def test_an_unknown_code_is_mapped_by_status_and_kept(paths: Paths, daemon: FakeDaemon) -> None:
    body = {"error": {"code": "image_in_use", "message": "in use", "hint": ""}}
    daemon.answers["DELETE /v1/images/a"] = (409, body)
    with pytest.raises(Conflict) as caught:
        Client(Daemon(paths)).delete_image("a")
    assert caught.value.code == "image_in_use"


def test_operation_is_followed_to_its_result(paths: Paths, daemon: FakeDaemon) -> None:
    events = [
        {"type": "stage", "stage": "boot"},
        {"type": "heartbeat"},
        {"type": "progress", "stage": "boot", "done_bytes": 1, "total_bytes": 2},
    ]
    daemon.answers["POST /v1/vms"] = daemon.operation(*events, result=make_vm())
    client = Client(Daemon(paths))
    seen: list[Any] = []
    result = client.wait(client.create_vm({"start": True}), seen.append)
    assert result["name"] == "box"
    assert [event["type"] for event in seen] == ["stage", "progress"]


def test_operation_that_fails_raises_its_error(paths: Paths, daemon: FakeDaemon) -> None:
    error = {"code": "not_found", "message": "no image x", "hint": "banger image list"}
    daemon.answers["POST /v1/vms"] = daemon.operation(error=error)
    client = Client(Daemon(paths))
    with pytest.raises(NotFound, match="no image x"):
        client.wait(client.create_vm({}), lambda event: None)


def test_stream_that_ends_without_a_result_is_an_error(paths: Paths, daemon: FakeDaemon) -> None:
    daemon.answers["POST /v1/vms"] = daemon.operation(result=1)
    client = Client(Daemon(paths))
    operation = client.create_vm({})
    daemon.operations[operation["id"]] = [{"type": "stage", "stage": "x"}]
    with pytest.raises(Unavailable, match="the daemon ended"):
        client.wait(operation, lambda event: None)


def test_a_silent_daemon_is_a_bounded_wait(paths: Paths) -> None:
    import socket

    os.makedirs(paths.runtime_dir, mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(autostart.socket_path(paths))
        listener.listen()
        with pytest.raises(TimedOut):
            Client(Daemon(paths, timeout_s=0.2)).list_vms()


def test_without_start_nobody_is_started(paths: Paths) -> None:
    with pytest.raises(connection.DaemonGone):
        Client(Daemon(paths, start=False)).list_vms()
    assert not os.path.exists(paths.runtime_dir)


def test_version_is_checked_without_another_round_trip(paths: Paths, daemon: FakeDaemon) -> None:
    daemon.answers["GET /v1/vms"] = []
    Client(Daemon(paths)).list_vms()
    assert [path for _, path, _ in daemon.requests] == ["/v1/vms"]


def test_busy_daemon_of_another_version_is_kept_with_a_warning(paths: Paths) -> None:
    os.makedirs(paths.runtime_dir, mode=0o700)
    fake = FakeDaemon(autostart.socket_path(paths), version="0.0.1")
    fake.answers["GET /v1/daemon"]["running_operations"] = 1
    fake.answers["GET /v1/vms"] = [make_vm()]
    warnings: list[str] = []
    try:
        client = Client(Daemon(paths, warn=warnings.append))
        assert len(client.list_vms()) == 1
        client.list_vms()
    finally:
        fake.close()
    assert len(warnings) == 1
    assert "0.0.1" in warnings[0]
    assert "POST" not in [method for method, _, _ in fake.requests]


def test_a_change_asks_for_the_version_first(paths: Paths, daemon: FakeDaemon) -> None:
    daemon.answers["DELETE /v1/images/a"] = {"ok": True}
    Client(Daemon(paths)).delete_image("a")
    assert [path for _, path, _ in daemon.requests] == ["/v1/daemon", "/v1/images/a"]


# -- starting

STARTER = """
import json, os, sys, time
sys.path[:0] = [{tests!r}, {source!r}]
fd = int(sys.argv[sys.argv.index("--ready-fd") + 1])
open({root!r} + "/started", "a").write("x")
{body}
"""


def _fake_executable(paths: Paths, monkeypatch: pytest.MonkeyPatch, body: str) -> str:
    """Make sys.executable a script that stands in for `python -m banger.daemon.main`."""
    root = os.path.dirname(os.path.dirname(paths.runtime_dir))
    here = os.path.abspath(__file__)
    tests = here[: here.index("/tests/")]
    source = os.path.dirname(os.path.dirname(os.path.abspath(autostart.__file__)))
    source = os.path.dirname(source)
    script = f"{root}/daemon"
    with open(script, "w") as file:
        file.write(f"#!{os.path.realpath('/proc/self/exe')}\n")
        file.write(STARTER.format(tests=tests, source=source, root=root, body=body))
    os.chmod(script, stat.S_IRWXU)
    monkeypatch.setattr(sys, "executable", script)
    return root


SERVE = """
from tests.unit.client.fake_daemon import FakeDaemon
time.sleep(0.3)
fake = FakeDaemon({socket!r})
fake.answers["GET /v1/vms"] = []
fake.answers["POST /v1/daemon/stop"] = {{"ok": True}}
fake.answers["GET /v1/daemon"]["pid"] = os.getpid()
os.write(fd, b"ready\\n")
time.sleep(30)
"""


def test_ten_clients_at_once_start_one_daemon(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket_path = autostart.socket_path(paths)
    root = _fake_executable(paths, monkeypatch, SERVE.format(socket=socket_path))
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            assert Client(Daemon(paths)).list_vms() == []
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    info = connection.send(socket_path, "GET", "/v1/daemon").body
    os.kill(info["pid"], 9)
    assert failures == []
    with open(f"{root}/started") as file:
        assert file.read() == "x"


def test_daemon_that_says_why_it_cannot_start_is_quoted(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = (
        "os.write(fd, json.dumps({'error': {'code': 'corrupted', 'message': 'the database is "
        "broken', 'hint': 'move it away'}}).encode() + b'\\n')"
    )
    _fake_executable(paths, monkeypatch, body)
    with pytest.raises(Exception, match="the database is broken") as caught:
        Client(Daemon(paths)).list_vms()
    assert getattr(caught.value, "code", "") == "corrupted"


def test_daemon_that_dies_shows_the_end_of_its_log(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_executable(paths, monkeypatch, "sys.exit('ImportError: something')")
    with pytest.raises(Unavailable, match="died at its start.*ImportError: something"):
        Client(Daemon(paths)).list_vms()


def test_daemon_that_never_gets_ready_is_ended(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autostart, "READY_TIMEOUT_S", 1.0)
    _fake_executable(paths, monkeypatch, "time.sleep(30)")
    with pytest.raises(Unavailable, match="not ready"):
        Client(Daemon(paths)).list_vms()


def test_idle_daemon_of_another_version_is_replaced(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket_path = autostart.socket_path(paths)
    old = SERVE.replace("FakeDaemon({socket!r})", "FakeDaemon({socket!r}, version='0.0.1')")
    old = old.replace("time.sleep(30)", "while not any(m == 'POST' for m, _, _ in fake.requests):"
                      "\n    time.sleep(0.02)\ntime.sleep(0.2)\nos.unlink({socket!r})")  # fmt: skip
    _fake_executable(paths, monkeypatch, old.format(socket=socket_path))
    autostart.start_daemon(paths)
    _fake_executable(paths, monkeypatch, SERVE.format(socket=socket_path))
    warnings: list[str] = []
    Client(Daemon(paths, warn=warnings.append)).list_vms()
    answer = connection.send(socket_path, "GET", "/v1/daemon")
    os.kill(answer.body["pid"], 9)
    assert warnings == []
    assert answer.version == __version__


def test_stale_socket_is_no_daemon(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    os.makedirs(paths.runtime_dir, mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(autostart.socket_path(paths))
    body = "os.unlink({socket!r})" + SERVE
    _fake_executable(paths, monkeypatch, body.format(socket=autostart.socket_path(paths)))
    assert Client(Daemon(paths)).list_vms() == []
    info = connection.send(autostart.socket_path(paths), "GET", "/v1/daemon").body
    os.kill(info["pid"], 9)


def test_cli_does_not_keep_the_daemons_pipe(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon must not hold the stdout of the command line that started it."""
    body = SERVE.format(socket=autostart.socket_path(paths))
    _fake_executable(paths, monkeypatch, body)
    code = (
        "import sys; from banger.client.autostart import start_daemon; from banger.paths import "
        f"Paths; sys.executable = {sys.executable!r}; start_daemon(Paths(*{tuple(paths)!r}))"
    )
    source = os.path.dirname(os.path.dirname(os.path.dirname(autostart.__file__)))
    done = subprocess.run(
        [os.path.realpath("/proc/self/exe"), "-c", code],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        timeout=30,
        check=False,
    )
    info = connection.send(autostart.socket_path(paths), "GET", "/v1/daemon").body
    os.kill(info["pid"], 9)
    assert done.returncode == 0, done.stderr
