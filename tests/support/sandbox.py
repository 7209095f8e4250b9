"""A user of their own: HOME, daemon, VMs; everything ended and kept as evidence afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from banger.client import connection
from banger.errors import BangerError
from banger.host.process import ProcessIdentity, find_by_argument
from banger.paths import find_paths
from banger.store.layout import Layout
from tests.support.artifacts import artifact_store, need_kernel

EVIDENCE = Path(__file__).parents[2] / "test-results"


class Sandbox:
    """One made-up user. `run` is the command line as that user types it."""

    def __init__(self, *, artifacts: bool = True, prefix: Sequence[str] = ()) -> None:
        # Words before every command, such as those that enter a network namespace.
        self.prefix = list(prefix)
        # Short: sockets live below, and sun_path is 108 bytes.
        self.root = Path(tempfile.mkdtemp(prefix="bng-"))
        self.home = self.root / "home"
        self.home.mkdir(mode=0o700)
        runtime = self.root / "run"
        runtime.mkdir(mode=0o700)
        self.environment = {
            "HOME": str(self.home),
            "XDG_RUNTIME_DIR": str(runtime),
            "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:"
            "/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "TERM": "dumb",
        }
        for name in ("PYTHONPATH", "SSL_CERT_FILE", "http_proxy", "https_proxy"):
            if name in os.environ:
                self.environment[name] = os.environ[name]
        self.layout = Layout.of(find_paths(self.environment))
        if artifacts:
            self.layout.data.mkdir(parents=True, mode=0o700)
            for kind in ("images", "kernels"):
                (artifact_store() / kind).mkdir(exist_ok=True)
                (self.layout.data / kind).symlink_to(artifact_store() / kind)

    @classmethod
    def with_own_images(cls) -> Self:
        """Return a user with the kernels all tests share, and images of their own to add to."""
        kernels = need_kernel().parent
        made = cls(artifacts=False)
        (made.layout.data / "images").mkdir(parents=True, mode=0o700)
        (made.layout.data / "kernels").symlink_to(kernels)
        return made

    def command(self, *words: str | bytes) -> list[str | bytes]:
        """Return the argv of a banger command."""
        return [*self.prefix, sys.executable, "-m", "banger", *words]

    def run(
        self,
        *words: str | bytes,
        stdin: bytes = b"",
        timeout_s: float = 300,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a banger command to its end."""
        return subprocess.run(
            self.command(*words),
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            cwd=cwd or self.home,
            env={**self.environment, **(env or {})},
            check=False,
        )

    def ok(self, *words: str | bytes, **options: Any) -> bytes:
        """Run a command that must succeed and return its stdout."""
        done = self.run(*words, **options)
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stderr.decode()}"
        return done.stdout

    def json(self, *words: str, **options: Any) -> Any:
        """Run a command with --json and return what it said."""
        return json.loads(self.ok(*words, "--json", **options))

    def popen(self, *words: str | bytes, **options: Any) -> subprocess.Popen[bytes]:
        """Start a banger command with pipes."""
        return subprocess.Popen(
            self.command(*words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.home,
            env=self.environment,
            **options,
        )

    def on_a_terminal(self, *words: str, typed: bytes) -> tuple[int, bytes]:
        """Run a command on a pty, type when it shows a prompt, and return its status and screen."""
        master, slave = pty.openpty()
        running = subprocess.Popen(
            self.command(*words), stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={**self.environment, "TERM": "xterm"}, cwd=self.home,
        )  # fmt: skip
        os.close(slave)
        screen = b""
        deadline = time.monotonic() + 300
        while True:
            ready, _, _ = select.select([master], [], [], 1)
            assert time.monotonic() < deadline, screen
            if ready:
                try:
                    screen += os.read(master, 65536)
                except OSError:  # EIO: the other end is closed
                    break
            if typed and b"# " in screen:
                os.write(master, typed)
                typed = b""
        os.close(master)
        return running.wait(60), screen

    def daemon_pid(self) -> int | None:
        """Return the daemon's pid when one runs."""
        done = self.run("daemon", "status", "--json")
        status = json.loads(done.stdout) if done.stdout.strip() else {}
        return status.get("pid")

    def processes(self) -> list[ProcessIdentity]:
        """Return the VMMs of this user."""
        return find_by_argument(f"{self.layout.runtime_vms}/")

    def keep_evidence(self, test: str) -> None:
        """Copy console, VMM and daemon logs to test-results/<test>/."""
        kept = EVIDENCE / test.replace("/", "_")
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        for pattern in (
            "state/banger/*.log*",
            "state/banger/last-failed-boot/*",
            "share/banger/vms/*/*.log",
        ):
            for path in (self.home / ".local").glob(pattern):
                shutil.copy(path, kept / f"{path.parent.name}-{path.name}")
        with contextlib.suppress(BangerError), open(kept / "events.jsonl", "w") as events:
            socket_path = str(self.layout.api_socket)
            for operation in connection.send(socket_path, "GET", "/v1/operations").body:
                events.write(json.dumps(operation) + "\n")
                if operation["status"] != "running":
                    path = f"/v1/operations/{operation['id']}/events"
                    for event in connection.stream(socket_path, path):
                        events.write(json.dumps(event) + "\n")

    def close(self) -> None:
        """End the daemon and every VMM of this user, and remove its HOME."""
        self.run("daemon", "stop", timeout_s=60)
        for process in self.processes():
            process.kill(signal.SIGKILL)
        shutil.rmtree(self.root, ignore_errors=True)
