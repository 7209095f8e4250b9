"""A daemon that speaks the contract over a real Unix socket and remembers what it was asked."""

from __future__ import annotations

import json
import os
import socketserver
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from banger import __version__

GIB = 1 << 30


def make_vm(name: str = "box", **changes: Any) -> dict[str, Any]:
    vm = {
        "id": f"id-{name}", "name": name, "state": "running", "state_reason": "", "vmm": "qemu",
        "accel": "tcg", "accel_reason": "/dev/kvm is absent", "image": "debian-bookworm",
        "kernel": "generic-6.12", "vcpu": 2, "memory_bytes": 2 * GIB, "disk_size_bytes": 8 * GIB,
        "disk_used_bytes": 3 << 20, "network": "user", "nat": True,
        "isolated": True, "publish": [], "credentials": True, "synced_files": [],
        "address": None, "dns_name": None, "ephemeral": False, "pid": 4242,
        "created_at": "2026-01-01T00:00:00Z", "started_at": "2026-01-01T00:00:00Z",
        "directory": f"/data/{name}", "console_log": f"/data/{name}/console.log",
        "vmm_log": f"/data/{name}/vmm.log",
    }  # fmt: skip
    return {**vm, **changes}


class FakeDaemon:
    """`answers` maps "METHOD /path" to a body, an (status, body) pair, or a function of the body.

    An operation is answered with `operation(...)`, whose events are streamed when asked for.
    """

    def __init__(self, socket_path: str, *, version: str | None = __version__) -> None:
        self.version = version
        self.requests: list[tuple[str, str, Any]] = []
        self.answers: dict[str, Any] = {}
        self.operations: dict[str, list[dict[str, Any]]] = {}
        self.cancelled: dict[str, threading.Event] = {}
        self.answers["GET /v1/daemon"] = {
            "version": version, "pid": os.getpid(), "started_at": "2026-01-01T00:00:00Z",
            "data_dir": "/data", "running_operations": 0, "running_vms": 0,
        }  # fmt: skip
        daemon = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def address_string(self) -> str:
                return "unix"

            def log_message(self, *args: object) -> None:
                pass

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                daemon.respond(self, body)

            do_GET = do_POST = do_DELETE = do_PATCH = handle_any

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that hangs up is part of some tests

        os.makedirs(os.path.dirname(socket_path), mode=0o700, exist_ok=True)
        self.server = Server(socket_path, Handler)
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def operation(
        self, *events: dict[str, Any], result: Any = None, error: Any = None, wait: bool = False
    ) -> Callable[[Any], tuple[int, Any]]:
        """Return an answer: 202 and an operation with these events. `wait`: until cancelled."""

        def answer(_: Any) -> tuple[int, Any]:
            operation_id = f"op{len(self.operations) + 1}"
            last = (
                {"type": "error", "error": error}
                if error is not None
                else {"type": "result", "result": result}
            )
            self.operations[operation_id] = [*events, last]
            if wait:
                self.cancelled[operation_id] = threading.Event()
            return 202, {
                "id": operation_id, "kind": "test", "subject": "box", "status": "running",
                "started_at": "2026-01-01T00:00:00Z", "stage": "", "error": None,
            }  # fmt: skip

        return answer

    def respond(self, handler: Any, body: Any) -> None:
        method, path = handler.command, handler.path
        self.requests.append((method, path, body))
        parts = path.split("/")
        if path.startswith("/v1/operations/") and path.endswith("/events"):
            self.stream(handler, parts[3])
            return
        if path.startswith("/v1/operations/") and method == "DELETE":
            if parts[3] in self.cancelled:
                self.operations[parts[3]][-1] = {
                    "type": "error",
                    "error": {"code": "cancelled", "message": "cancelled", "hint": ""},
                }
                self.cancelled[parts[3]].set()
            self.send(handler, 200, {"ok": True})
            return
        missing = {"error": {"code": "not_found", "message": f"no answer for {path}", "hint": "h"}}
        answer = self.answers.get(f"{method} {path}", (404, missing))
        if callable(answer):
            answer = answer(body)
        status, found = answer if isinstance(answer, tuple) else (200, answer)
        self.send(handler, status, found)

    def send(self, handler: Any, status: int, body: Any) -> None:
        payload = json.dumps(body).encode()
        handler.send_response(status)
        if self.version is not None:
            handler.send_header("X-Banger-Version", self.version)
        handler.send_header("Content-Length", str(len(payload)))
        handler.end_headers()
        handler.wfile.write(payload)

    def stream(self, handler: Any, operation_id: str) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()

        def chunk(data: bytes) -> None:
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

        for event in self.operations[operation_id][:-1]:
            chunk(json.dumps(event).encode() + b"\n")
        if operation_id in self.cancelled:
            self.cancelled[operation_id].wait(20)
        last = json.dumps(self.operations[operation_id][-1]).encode() + b"\n"
        chunk(last[:5])  # a line may come in pieces
        chunk(last[5:])
        handler.wfile.write(b"0\r\n\r\n")
