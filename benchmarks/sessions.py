"""Rows about sessions: how soon one is attached, and how fast its output comes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace

from banger.guest import agent, frames, sessions
from banger.guest.transport import Endpoint
from benchmarks.table import Row, faster, in_turns
from tests.support.sandbox import Sandbox

_BLOB_BYTES = 64 << 20
_BLOB = "/root/blob"


def session_rows(user: Sandbox, endpoint: Endpoint, ssh: list[str]) -> Iterator[Row]:
    """Compare with ssh into the same VM; `ssh` is that command line less the command."""

    def over_ssh(command: str) -> None:
        subprocess.run([*ssh, command], env=user.environment, check=True, capture_output=True)

    _start(endpoint, "talks", b"while :; do date; sleep 0.1; done")
    ours, peer = in_turns(lambda: _first_bytes(endpoint, "talks"), lambda: over_ssh("date"), 7)
    text = "attach to a session, to its first bytes"
    yield faster(text, ours, "`ssh bench.vm date`", peer, 10)
    whole, peer = in_turns(
        lambda: user.ok("vm", "session", "show", "bench", "talks"), lambda: over_ssh("date"), 5
    )
    text = "whole `banger vm session show`, interpreter included"
    yield replace(faster(text, whole, "`ssh bench.vm date`", peer, 1), budget="(none)", holds=None)
    sessions.kill(endpoint, "talks")
    sessions.remove(endpoint, "talks")

    # Of the guest's page cache, on both sides.
    script = f"head -c {_BLOB_BYTES} /dev/urandom > {_BLOB}; cat {_BLOB} > /dev/null"
    user.ok("vm", "exec", "bench", "--", "sh", "-c", script)

    def whole_output() -> None:
        _start(endpoint, "blob", f"exec cat {_BLOB}".encode())
        got = _everything(endpoint, "blob")
        if got != _BLOB_BYTES:
            raise SystemExit(f"a session's output came with {got} bytes")

    def clean() -> None:
        if any(session.name == "blob" for session in sessions.list_all(endpoint)):
            sessions.remove(endpoint, "blob", force=True)

    ours, peer = in_turns(whole_output, lambda: over_ssh(f"cat {_BLOB}"), 3, clean=clean)
    megabytes = _BLOB_BYTES / 1e6
    text = f"session throughput, start to last byte: {megabytes / ours:.0f} MB/s, kept on disk too"
    yield faster(text, ours, f"`ssh bench.vm cat`, {megabytes / peer:.0f} MB/s", peer, 1)
    clean()
    user.ok("vm", "exec", "bench", "--", "rm", _BLOB)


def _start(endpoint: Endpoint, name: str, script: bytes) -> None:
    process = agent.ExecRequest([b"sh", b"-c", script])
    request = sessions.SessionRequest(name, process, log_limit=2 * _BLOB_BYTES)
    sessions.start(endpoint, request)


def _first_bytes(endpoint: Endpoint, name: str) -> None:
    with sessions.attach(endpoint, name, read_only=True, stdout=0) as attached:
        while attached.receive(timeout_s=60)[0] != frames.STDOUT:
            pass


def _everything(endpoint: Endpoint, name: str) -> int:
    count = 0
    with sessions.attach(endpoint, name, read_only=True, stdout=0, stderr=None) as attached:
        while True:
            kind, payload = attached.receive(timeout_s=120)
            if kind == frames.STDOUT:
                count += len(payload)
            elif kind == frames.END:
                return count
