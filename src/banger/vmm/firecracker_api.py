"""Firecracker's API: the endpoints we use as a table, and a client over its Unix socket.

Owns bodies and paths; tests validate each against upstream's own description of the API
(`firecracker-api-v*.yaml`). Leaves the order of calls to `vmm.firecracker`.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from banger.errors import VmmFailed
from banger.guest.transport import socket_path

if TYPE_CHECKING:
    import httpx2

# It answers in 1-3 ms; InstanceStart takes 0.1 s, and has taken 3 s in a nested lab under load.
_REQUEST_TIMEOUT_S = 30.0
# A machine's whole configuration takes 2 KB. Who answers may be a VMM that its guest took over.
_ANSWER_LIMIT_BYTES = 64 << 10
_FAULT_LIMIT = 500


class Call(NamedTuple):
    """One request: its name is what an error says was being done."""

    name: str
    method: str
    path: str
    body: dict[str, Any]


def machine_config(vcpu: int, memory_mib: int) -> Call:
    """Size the machine."""
    body = {"vcpu_count": vcpu, "mem_size_mib": memory_mib, "smt": False}
    return Call("set the machine's size", "PUT", "/machine-config", body)


def boot_source(kernel: str, initramfs: str, command_line: str) -> Call:
    """Say what it boots."""
    body = {"kernel_image_path": kernel, "initrd_path": initramfs, "boot_args": command_line}
    return Call("set the kernel", "PUT", "/boot-source", body)


def drive(role: str, path: str, *, read_only: bool) -> Call:
    """Add a drive, the next after those before; none is the root device, for the agent mounts."""
    body = {
        "drive_id": role,
        "path_on_host": path,
        "is_root_device": False,
        "is_read_only": read_only,
        # A guest's fsync has to mean something: Unsafe ignores its flushes.
        "cache_type": "Unsafe" if read_only else "Writeback",
        "io_engine": "Sync",
    }
    return Call(f"add the drive {role}", "PUT", f"/drives/{role}", body)


def network_interface(tap: str, mac: str) -> Call:
    """Add eth0."""
    body = {"iface_id": "eth0", "host_dev_name": tap, "guest_mac": mac}
    return Call(f"add the network interface on {tap}", "PUT", "/network-interfaces/eth0", body)


def vsock(path: str) -> Call:
    """Add the vsock that leads to the agent; a guest's cid means nothing outside of its VMM."""
    return Call("add the vsock", "PUT", "/vsock", {"guest_cid": 3, "uds_path": path})


def entropy() -> Call:
    """Add virtio-rng, so that keys are made from the host's entropy."""
    return Call("add the entropy device", "PUT", "/entropy", {})


def instance_start() -> Call:
    """Power on."""
    return Call("start the machine", "PUT", "/actions", {"action_type": "InstanceStart"})


def flush_metrics() -> Call:
    """Write the counters to the metrics file now."""
    return Call("flush the metrics", "PUT", "/actions", {"action_type": "FlushMetrics"})


def vm_state(state: str) -> Call:
    """Paused or Resumed."""
    return Call(f"make the machine {state.lower()}", "PATCH", "/vm", {"state": state})


def instance_info() -> Call:
    """Ask who it is and what state it is in."""
    return Call("ask for its state", "GET", "/", {})


class FirecrackerApi:
    """A connection to one Firecracker's API socket; an async context manager."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._client: httpx2.AsyncClient | None = None
        self._open = ExitStack()

    async def __aenter__(self) -> Self:
        import httpx2  # 150 ms of a daemon's start that a host without KVM never needs

        try:
            path = self._open.enter_context(socket_path(str(self._socket)))
        except OSError as error:
            raise VmmFailed(f"Firecracker's API socket is gone: {error.strerror}") from error
        self._client = httpx2.AsyncClient(
            # Not https: without this it reads every certificate of the host first.
            transport=httpx2.AsyncHTTPTransport(uds=path, verify=False),
            base_url="http://firecracker",
            timeout=_REQUEST_TIMEOUT_S,
            trust_env=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await self._client.aclose()
        self._open.close()

    async def call(self, call: Call) -> dict[str, Any]:
        """Make one request and return the answer's object.

        Raises VmmFailed: with Firecracker's `fault_message` where it refused, with the reason
        where it did not answer.
        """
        import httpx2

        if self._client is None:
            raise RuntimeError("not connected")
        try:
            # httpx2 bounds each read; this, all of them together.
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                status, content = await _exchange(self._client, call)
        except TimeoutError as error:
            raise VmmFailed(
                f"Firecracker did not {call.name} within {_REQUEST_TIMEOUT_S:.0f} s"
            ) from error
        except httpx2.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise VmmFailed(f"Firecracker did not {call.name}: {reason}") from error
        if status >= 300:
            fault = _fault(content) or f"status {status}"
            raise VmmFailed(f"Firecracker refused to {call.name}: {fault}", code="vmm_refused")
        body = _object(content) if content else {}
        if body is None:
            raise VmmFailed(f"Firecracker did not {call.name}: its answer is no JSON object")
        return body


async def _exchange(client: httpx2.AsyncClient, call: Call) -> tuple[int, bytes]:
    """Make a request and return status and body; raises VmmFailed for an endless one."""
    content = b""
    async with client.stream(
        call.method, call.path, json=call.body if call.method != "GET" else None
    ) as answer:
        # Raw: it compresses nothing, and what claims to be compressed may be a bomb.
        async for chunk in answer.aiter_raw():
            content += chunk
            if len(content) > _ANSWER_LIMIT_BYTES:
                raise VmmFailed(
                    f"Firecracker did not {call.name}: "
                    f"it answered with more than {_ANSWER_LIMIT_BYTES >> 10} KiB"
                )
        return answer.status_code, content


def _object(content: bytes) -> dict[str, Any] | None:
    """Return the JSON object in an answer, None when it holds none."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _fault(content: bytes) -> str:
    """Return why a request was refused: one line that steers no terminal."""
    said = (_object(content) or {}).get("fault_message", content.decode(errors="replace"))
    shown = "".join(c if c.isprintable() else " " for c in str(said))
    return " ".join(shown.split())[:_FAULT_LIMIT]
