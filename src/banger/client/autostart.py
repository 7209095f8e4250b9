"""The daemon behind the socket: found, started when absent, replaced when of another version.

Owns the start lock, the readiness pipe and the version handshake. The lock is
`<runtime_dir>/autostart.lock`: ten command lines at once start one daemon, and a command
line killed while it holds the lock releases it. The handshake costs no round trip where
it can be avoided: every answer names its version, and only a request that changes
something asks first.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from banger import __version__
from banger.client import connection
from banger.client.connection import Answer, DaemonGone, error_from_body
from banger.errors import BangerError, Conflict, Unavailable
from banger.paths import Paths, make_runtime_dir

READY_TIMEOUT_S = 60.0  # Python's start, migrations and reconciling, on a busy machine
STOP_TIMEOUT_S = 20.0  # the daemon ends within a few seconds once it agreed to
LOCK_TIMEOUT_S = 90.0  # whoever holds the lock waits READY_TIMEOUT_S at most
_POLL_S = 0.02


def socket_path(paths: Paths) -> str:
    """Return the path of the daemon's socket."""
    return os.path.join(paths.runtime_dir, "bangerd.sock")


def log_path(paths: Paths) -> str:
    """Return the path of the daemon's log."""
    return os.path.join(paths.state_dir, "bangerd.log")


class Daemon:
    """The transport `client.api` speaks through.

    `start` false never starts or replaces a daemon (completion, `daemon status`): requests
    raise DaemonGone instead. `warn` takes one line for the user.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        start: bool = True,
        warn: Callable[[str], None] = lambda _: None,
        timeout_s: float = connection.REQUEST_TIMEOUT_S,
    ) -> None:
        self.paths = paths
        self._socket = socket_path(paths)
        self._start = start
        self._warn = warn
        self._timeout_s = timeout_s
        self._settled = not start

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """Send one request and return the decoded body; raise the error an answer carries."""
        if not self._settled and method != "GET":
            self.request("GET", "/v1/daemon")
        answer = self._send(method, path, body)
        if not self._settled:
            self._settled = True
            if answer.version not in (None, __version__) and self._replace(answer):
                answer = self._send(method, path, body)
        if answer.status >= 400:
            raise error_from_body(answer.body, answer.status)
        return answer.body

    def stream(self, path: str) -> Iterator[dict[str, Any]]:
        """Yield the objects of an event stream."""
        return connection.stream(self._socket, path)

    def _send(self, method: str, path: str, body: Any) -> Answer:
        try:
            return connection.send(self._socket, method, path, body, timeout_s=self._timeout_s)
        except DaemonGone as gone:
            # A request that reached a daemon may have been carried out: only a read is
            # safe to send twice.
            if not self._start or (gone.started and method != "GET"):
                raise
        start_daemon(self.paths)
        return connection.send(self._socket, method, path, body, timeout_s=self._timeout_s)

    def _replace(self, answer: Answer) -> bool:
        """Stop a daemon of another version when it is idle and start ours; say so otherwise."""
        theirs = answer.version
        try:
            stop_daemon(self.paths, only_if_idle=True)
        except Conflict:
            self._warn(
                f"the running daemon is version {theirs}, this is {__version__}; "
                "it is busy and will be replaced later"
            )
            return False
        except BangerError as error:
            self._warn(f"the daemon of version {theirs} could not be replaced: {error.message}")
            return False
        start_daemon(self.paths)
        return True


def stop_daemon(paths: Paths, *, only_if_idle: bool) -> bool:
    """Ask the daemon to end and wait until its process is gone; False when none ran.

    Raises Conflict when `only_if_idle` and an operation runs.
    """
    path = socket_path(paths)
    try:
        info = connection.send(path, "GET", "/v1/daemon")
        pid = int(info.body["pid"]) if info.status < 400 else 0
        if only_if_idle and info.status < 400 and info.body.get("running_operations", 0):
            raise Conflict("the daemon is busy", hint="wait for it, or see `banger daemon status`")
        pidfd = _open_pidfd(pid)
    except DaemonGone as gone:
        if gone.started:
            raise
        return False
    try:
        answer = connection.send(path, "POST", "/v1/daemon/stop", {"only_if_idle": only_if_idle})
        if answer.status >= 400:
            raise error_from_body(answer.body, answer.status)
    except DaemonGone:
        pass  # it ended before the answer was out
    except BaseException:
        if pidfd is not None:
            os.close(pidfd)
        raise
    _wait_gone(path, pid, pidfd)
    return True


def _open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid) if pid > 0 else None
    except OSError:
        return None  # gone already, or a kernel without pidfds


def _wait_gone(path: str, pid: int, pidfd: int | None) -> None:
    if pidfd is not None:
        import select

        try:
            if select.select([pidfd], [], [], STOP_TIMEOUT_S)[0]:
                return
        finally:
            os.close(pidfd)
    else:
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                connection.send(path, "GET", "/v1/daemon", timeout_s=STOP_TIMEOUT_S)
            except DaemonGone:
                return
            time.sleep(_POLL_S)
    raise Unavailable(
        f"the daemon (pid {pid}) did not end within {STOP_TIMEOUT_S:.0f} s", hint=f"kill -9 {pid}"
    )


def start_daemon(paths: Paths) -> None:
    """Start the daemon unless one answers; return when it is ready.

    Raises Unavailable with the last lines of its log when it dies or is not ready in time.
    """
    make_runtime_dir(paths)
    os.makedirs(paths.state_dir, mode=0o700, exist_ok=True)
    with _start_lock(paths):
        try:
            connection.send(socket_path(paths), "GET", "/v1/daemon")
        except DaemonGone:
            _spawn(paths)


@contextlib.contextmanager
def _start_lock(paths: Paths) -> Iterator[None]:
    path = os.path.join(paths.runtime_dir, "autostart.lock")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Unavailable(
                        "another banger has been starting the daemon for too long",
                        hint="see `banger daemon logs`",
                    ) from None
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(fd)


def _spawn(paths: Paths) -> None:
    import subprocess  # 6 ms, and only the first command of a day starts a daemon

    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    log_fd = os.open(log_path(paths), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        process = subprocess.Popen(
            # -P: the working directory is no place to import from.
            [sys.executable, "-P", "-m", "banger.daemon.main", "--ready-fd", str(write_fd)],
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            cwd="/",
            env=_daemon_environment(),
            pass_fds=(write_fd,),
            start_new_session=True,
        )
    except OSError as error:
        os.close(read_fd)
        raise Unavailable(f"cannot start the daemon: {error.strerror}") from error
    finally:
        os.close(write_fd)
        os.close(log_fd)
    try:
        line = _read_ready_line(read_fd)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        raise Unavailable(
            f"the daemon was not ready within {READY_TIMEOUT_S:.0f} s{_log_tail(paths)}",
            hint="see `banger daemon logs` and `banger doctor`",
        ) from None
    finally:
        os.close(read_fd)
        process.returncode = 0  # it outlives us: Popen's destructor has nothing to say
    if line.strip() == b"ready":
        return
    raise _start_failure(paths, line)


def _daemon_environment() -> dict[str, str]:
    """The user's environment, with our package importable from `/` however it was found."""
    environment = dict(os.environ)
    source = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if "site-packages" not in source and "dist-packages" not in source:
        known = environment.get("PYTHONPATH", "")
        environment["PYTHONPATH"] = f"{source}:{known}" if known else source
    return environment


def _read_ready_line(fd: int) -> bytes:
    import select

    deadline = time.monotonic() + READY_TIMEOUT_S
    line = b""
    while b"\n" not in line and len(line) < 65536:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            raise TimeoutError
        chunk = os.read(fd, 4096)
        if not chunk:
            break
        line += chunk
    return line


def _start_failure(paths: Paths, line: bytes) -> BangerError:
    try:
        body = json.loads(line)
    except ValueError:
        return Unavailable(
            f"the daemon died at its start{_log_tail(paths)}",
            hint="see `banger daemon logs` and `banger doctor`",
        )
    return error_from_body(body)


def _log_tail(paths: Paths, lines: int = 5) -> str:
    """Return `: ` and the last lines of the daemon's log, or nothing."""
    try:
        with open(log_path(paths), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
            tail = file.read().decode(errors="replace").strip().splitlines()[-lines:]
    except OSError:
        return ""
    return ": " + " | ".join(tail) if tail else ""
