"""A Firecracker without KVM: the real words on its command line, its real API, no guest.

`FakeFirecracker(directory)` puts this very file there as an executable; the adapter starts it as it
starts the real one. `plan.json` beside it says how to misbehave, `requests.jsonl` holds what was
asked for. What it takes and refuses is checked against the real binary by the tests that use it
(tests/integration/test_firecracker_start.py). Standard library only: it runs without site-packages.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import stat
import sys
import time
from pathlib import Path
from typing import Any

# What the real one answers with 400 for; by path, whether a field has to be there.
_BODIES: dict[str, dict[str, bool]] = {
    "/machine-config": {"vcpu_count": True, "mem_size_mib": True, "smt": False},
    "/boot-source": {"kernel_image_path": True, "initrd_path": False, "boot_args": False},
    "/drives/": {
        "drive_id": True,
        "path_on_host": False,
        "is_root_device": True,
        "is_read_only": False,
        "cache_type": False,
        "io_engine": False,
    },
    "/network-interfaces/": {"iface_id": True, "host_dev_name": True, "guest_mac": False},
    "/vsock": {"guest_cid": True, "uds_path": True, "vsock_id": False},
    "/entropy": {"rate_limiter": False},
    "/actions": {"action_type": True},
    "/vm": {"state": True},
}
_BEFORE_START = "The requested operation is not supported before starting the microVM."
_AFTER_START = "The requested operation is not supported after starting the microVM."


class FakeFirecracker:
    """One fake in a directory: where it is, how it is to behave, what it was asked."""

    def __init__(self, directory: Path, **plan: Any) -> None:
        """`plan`, all optional.

        exit_saying, exit_status: end at start with a line on stderr.
        silent: never open the socket. deaf_s: bind it, and listen this much later.
        at: the number of the request, from 1, that is answered otherwise: with status 400 and
        `fault`, with `body_bytes` of an x, by a hang-up in the middle (`hang_up`), or never
        (`hang`).
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.program = directory / "firecracker"
        self._requests = directory / "requests.jsonl"
        # No byte of bytecode beside it: the tests count files.
        self.program.write_text(f"#!{sys.executable} -IBS\n" + Path(__file__).read_text())
        self.program.chmod(0o755)
        (directory / "plan.json").write_text(json.dumps(plan))

    @property
    def requests(self) -> list[dict[str, Any]]:
        """What was asked so far: method, path, body and the status it got."""
        if not self._requests.exists():
            return []
        return [json.loads(line) for line in self._requests.read_text().splitlines()]


class _Machine:
    """What has been configured; the answers follow from it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._state = "Not started"
        self._have: set[str] = set()
        self.vsock: socket.socket | None = None

    def answer(self, method: str, path: str, body: Any) -> tuple[int, dict[str, Any] | None]:
        if (method, path) == ("GET", "/"):
            shown = {"id": self._name, "state": self._state, "app_name": "Firecracker"}
            return 200, {**shown, "vmm_version": "1.12.1"}
        fault = self._refuses(method, path, body)
        return (204, None) if fault is None else (400, {"fault_message": fault})

    def _refuses(self, method: str, path: str, body: Any) -> str | None:
        kind = re.sub(r"(?<=.)/[^/]+$", "/", path)
        if kind not in _BODIES or method != ("PATCH" if path == "/vm" else "PUT"):
            return f"Invalid request method and/or path: {method} {path[1:]}."
        wrong = _wrong_body(_BODIES[kind], body)
        if wrong is not None:
            return f"An error occurred when deserializing the json body of a request: {wrong}."
        running = self._state != "Not started"
        if path == "/actions" and body["action_type"] == "InstanceStart":
            return self._start()
        if path in ("/vm", "/actions"):
            if not running:
                return _BEFORE_START
            if path == "/vm":
                self._state = {"Paused": "Paused", "Resumed": "Running"}[body["state"]]
            return None
        if running:
            return _AFTER_START
        return self._configure(kind, path, body)

    def _start(self) -> str | None:
        if self._state != "Not started":
            return _AFTER_START
        if "/boot-source" not in self._have:
            return "Start microvm error: Cannot start microvm without kernel configuration."
        self._state = "Running"
        return None

    def _configure(self, kind: str, path: str, body: Any) -> str | None:
        if kind == "/machine-config" and not 1 <= body["vcpu_count"] <= 32:
            return "Machine config error: The number of vCPUs must be greater than 0."
        if kind in ("/drives/", "/network-interfaces/"):
            if path.rpartition("/")[2] != body["drive_id" if "drive_id" in body else "iface_id"]:
                return "The id from the path does not match the id from the body!"
        for field in ("kernel_image_path", "initrd_path", "path_on_host"):
            if field in body and not os.path.exists(body[field]):
                return f"{kind}: No such file or directory (os error 2) {body[field]}"
        if kind == "/vsock":
            if self.vsock is not None:
                self.vsock.close()
                os.unlink(body["uds_path"])
            self.vsock = _listen(body["uds_path"])
        self._have.add(kind)
        return None


def _wrong_body(fields: dict[str, bool], body: Any) -> str | None:
    if not isinstance(body, dict):
        return "invalid type"
    unknown = [f"unknown field `{name}`" for name in body if name not in fields]
    missing = [f"missing field `{name}`" for name in fields if fields[name] and name not in body]
    for name, value in body.items():
        if name in ("vcpu_count", "mem_size_mib", "guest_cid") and type(value) is not int:
            return "invalid type"
    return (unknown + missing + [None])[0]


def _listen(path: str, deaf_s: float = 0.0) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(path)
    time.sleep(deaf_s)
    made.listen()
    return made


def _read_request(connection: socket.socket) -> tuple[str, str, Any] | None:
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = connection.recv(65536)
        if not chunk:
            return None
        data += chunk
    head, _, rest = data.partition(b"\r\n\r\n")
    method, path, _ = head.decode().split("\r\n")[0].split(" ")
    length = re.search(rb"content-length: *(\d+)", head.lower())
    while len(rest) < int(length[1] if length else 0):
        rest += connection.recv(65536)
    return method, path, json.loads(rest) if rest else None


def _send(connection: socket.socket, status: int, body: bytes) -> None:
    head = f"HTTP/1.1 {status} x\r\nServer: Firecracker API\r\nConnection: keep-alive\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


def _serve(plan: dict[str, Any], machine: _Machine, api: socket.socket, record: Path) -> None:
    count = 0
    while True:
        connection = api.accept()[0]
        with connection:
            while (request := _read_request(connection)) is not None:
                method, path, body = request
                count += 1
                status, said = machine.answer(method, path, body)
                odd = count == plan.get("at")
                if odd and "fault" in plan:
                    status, said = 400, {"fault_message": plan["fault"]}
                row = {"method": method, "path": path, "body": body, "status": status}
                with open(record, "a") as file:
                    file.write(json.dumps(row) + "\n")
                if odd and "hang" in plan:
                    time.sleep(600)
                if odd and "hang_up" in plan:
                    connection.sendall(b"HTTP/1.1 204 No Con")
                    break
                if odd and "body_bytes" in plan:
                    try:
                        _send(connection, 400, b"x" * plan["body_bytes"])
                    except ConnectionError:  # the client had enough
                        break
                    continue
                _send(connection, status, b"" if said is None else json.dumps(said).encode())


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--api-sock", required=True)
    parser.add_argument("--id", required=True)
    parser.add_argument("--log-path", required=True)
    parser.add_argument("--level", required=True)
    parser.add_argument("--metrics-path")
    options = parser.parse_args()
    here = Path(__file__).parent
    plan = json.loads((here / "plan.json").read_text())
    if not re.fullmatch("[a-zA-Z0-9-]{1,64}", options.id):
        print("Invalid instance ID", file=sys.stderr)
        return 134
    for path in (options.log_path, options.metrics_path):
        # The real one opens both without making them.
        if path is not None and not stat.S_ISREG(os.stat(path).st_mode):
            return 1
    if "exit_saying" in plan:
        print(plan["exit_saying"], file=sys.stderr)
        return int(plan.get("exit_status", 1))
    if "silent" in plan:
        time.sleep(600)
    api = _listen(options.api_sock, plan.get("deaf_s", 0.0))
    _serve(plan, _Machine(options.id), api, here / "requests.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
