"""The daemon's routes as methods: one per row of `api.routes.ROUTES`, and `wait`.

A method of an operation row returns the Operation at once; `wait` follows it to its
result. A test compares this class with the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, cast

from banger.client.connection import error_from_body
from banger.errors import Unavailable

if TYPE_CHECKING:
    from banger.api import models
    from banger.api.models import Operation, OperationEvent


class Transport(Protocol):
    """What `Client` needs of `autostart.Daemon`."""

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """Send one request and return the decoded body."""

    def stream(self, path: str) -> Iterator[dict[str, Any]]:
        """Yield the objects of an event stream."""


class Client:
    """The daemon's API, one method per route."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def _get(self, path: str) -> Any:
        return self._transport.request("GET", path)

    def _post(self, path: str, body: Any = None) -> Any:
        return self._transport.request("POST", path, body)

    def _delete(self, path: str) -> Any:
        return self._transport.request("DELETE", path)

    # -- the daemon and its host

    def daemon_info(self) -> models.DaemonInfo:
        """Return who answers."""
        return cast("models.DaemonInfo", self._get("/v1/daemon"))

    def daemon_stop(self, request: models.DaemonStop) -> models.Done:
        """End the daemon; VMs go on."""
        return cast("models.Done", self._post("/v1/daemon/stop", request))

    def host_info(self) -> models.HostInfo:
        """Return what this host would run and its default sizes."""
        return cast("models.HostInfo", self._get("/v1/host"))

    # -- images and kernels

    def list_images(self) -> list[models.Image]:
        """Return installed images and those of the catalog."""
        return cast("list[models.Image]", self._get("/v1/images"))

    def get_image(self, name: str) -> models.Image:
        """Return one image."""
        return cast("models.Image", self._get(f"/v1/images/{_segment(name)}"))

    def pull_image(self, request: models.ImagePull) -> Operation:
        """Begin to make an image of whatever `source` names; the result is an Image."""
        return cast("Operation", self._post("/v1/images", request))

    def list_blobs(self) -> list[models.Blob]:
        """Return what is kept of downloads."""
        return cast("list[models.Blob]", self._get("/v1/blobs"))

    def prune_blobs(self, request: models.BlobPrune) -> models.BlobsPruned:
        """Remove kept downloads."""
        return cast("models.BlobsPruned", self._post("/v1/blobs/prune", request))

    def register_image(self, request: models.ImageRegister) -> Operation:
        """Begin to make an image of an ext4 on this host; the result is an Image."""
        return cast("Operation", self._post("/v1/images/register", request))

    def export_image(self, name: str, request: models.ImageExport) -> Operation:
        """Begin to write an image to a file; the result is an ImageExported."""
        return cast("Operation", self._post(f"/v1/images/{_segment(name)}/export", request))

    def delete_image(
        self, name: str, request: models.ImageDelete | None = None
    ) -> models.ImageDeleted:
        """Delete an image."""
        found = self._transport.request("DELETE", f"/v1/images/{_segment(name)}", request)
        return cast("models.ImageDeleted", found)

    def image_catalog(self) -> models.Catalog:
        """Return what can be pulled by name, and what is wrong with the catalogs."""
        return cast("models.Catalog", self._get("/v1/catalog"))

    def list_kernels(self) -> list[models.Kernel]:
        """Return installed kernels and those of the catalog."""
        return cast("list[models.Kernel]", self._get("/v1/kernels"))

    def get_kernel(self, name: str) -> models.Kernel:
        """Return one kernel."""
        return cast("models.Kernel", self._get(f"/v1/kernels/{_segment(name)}"))

    def pull_kernel(self, name: str, request: models.PullRequest) -> Operation:
        """Begin to make a kernel from its catalog entry; the result is a Kernel."""
        return cast("Operation", self._post(f"/v1/kernels/{_segment(name)}/pull", request))

    def import_kernel(self, name: str, request: models.KernelImport) -> Operation:
        """Begin to make a kernel of files on this host; the result is a Kernel."""
        return cast("Operation", self._post(f"/v1/kernels/{_segment(name)}/import", request))

    def check_kernel(self, name: str) -> models.KernelCheck:
        """Return a kernel held against what machines and Docker need."""
        return cast("models.KernelCheck", self._get(f"/v1/kernels/{_segment(name)}/check"))

    def kernel_config(self, name: str) -> models.KernelConfig:
        """Return a kernel's build configuration."""
        return cast("models.KernelConfig", self._get(f"/v1/kernels/{_segment(name)}/config"))

    def delete_kernel(self, name: str) -> models.Done:
        """Delete a kernel no VM uses."""
        return cast("models.Done", self._delete(f"/v1/kernels/{_segment(name)}"))

    # -- VMs

    def list_vms(self) -> list[models.Vm]:
        """Return every VM."""
        return cast("list[models.Vm]", self._get("/v1/vms"))

    def create_vm(self, request: models.VmCreate) -> Operation:
        """Begin to make a VM; the result is a Vm."""
        return cast("Operation", self._post("/v1/vms", request))

    def prune_vms(self, request: models.PruneRequest) -> Operation:
        """Begin to delete stopped VMs; the result is a Pruned."""
        return cast("Operation", self._post("/v1/vms/prune", request))

    def get_vm(self, name: str) -> models.Vm:
        """Return one VM."""
        return cast("models.Vm", self._get(f"/v1/vms/{_segment(name)}"))

    def set_vm(self, name: str, request: models.VmSet) -> models.Vm:
        """Change a VM and return it."""
        found = self._transport.request("PATCH", f"/v1/vms/{_segment(name)}", request)
        return cast("models.Vm", found)

    def delete_vm(self, name: str) -> Operation:
        """Begin to delete a VM, killing it when it runs; the result is a Done."""
        return cast("Operation", self._delete(f"/v1/vms/{_segment(name)}"))

    def start_vm(self, name: str) -> Operation:
        """Begin to start a VM; the result is a Vm whose agent answers."""
        return cast("Operation", self._post(f"/v1/vms/{_segment(name)}/start"))

    def stop_vm(self, name: str, request: models.StopRequest) -> Operation:
        """Begin to shut a VM down; the result is a Vm."""
        return cast("Operation", self._post(f"/v1/vms/{_segment(name)}/stop", request))

    def restart_vm(self, name: str, request: models.StopRequest) -> Operation:
        """Begin to stop and start a VM; the result is a Vm."""
        return cast("Operation", self._post(f"/v1/vms/{_segment(name)}/restart", request))

    def kill_vm(self, name: str) -> Operation:
        """Begin to end a VMM at once; the result is a Vm."""
        return cast("Operation", self._post(f"/v1/vms/{_segment(name)}/kill"))

    def connect_vm(self, name: str) -> models.VmConnection:
        """Return how to reach the agent of a running VM."""
        return cast("models.VmConnection", self._get(f"/v1/vms/{_segment(name)}/connection"))

    def promote_vm(self, name: str, request: models.VmPromote) -> Operation:
        """Begin to make an image of a stopped VM; the result is an Image."""
        return cast("Operation", self._post(f"/v1/vms/{_segment(name)}/promote", request))

    def vm_stats(self, name: str) -> models.VmStats:
        """Return what a VM costs the host."""
        return cast("models.VmStats", self._get(f"/v1/vms/{_segment(name)}/stats"))

    # -- operations

    def list_operations(self) -> list[Operation]:
        """Return the operations the daemon remembers."""
        return cast("list[Operation]", self._get("/v1/operations"))

    def get_operation(self, operation_id: str) -> Operation:
        """Return one operation."""
        return cast("Operation", self._get(f"/v1/operations/{_segment(operation_id)}"))

    def operation_events(self, operation_id: str) -> Iterator[OperationEvent]:
        """Yield an operation's events, from its first to its last."""
        path = f"/v1/operations/{_segment(operation_id)}/events"
        return cast("Iterator[OperationEvent]", self._transport.stream(path))

    def cancel_operation(self, operation_id: str) -> models.Done:
        """Give up one's interest in an operation."""
        return cast("models.Done", self._delete(f"/v1/operations/{_segment(operation_id)}"))

    def wait(self, operation: Operation, on_event: Callable[[OperationEvent], None]) -> Any:
        """Follow an operation to its end and return its result; raise its error.

        `on_event` sees every event but the last and the heartbeats.
        """
        for event in self.operation_events(operation["id"]):
            kind = event.get("type")
            if kind == "result":
                return event.get("result")
            if kind == "error":
                raise error_from_body(event.get("error"))
            if kind != "heartbeat":
                on_event(event)
        raise Unavailable(
            f"the daemon ended during {operation.get('kind', 'an operation')}",
            hint="run the command again; `banger daemon logs` tells why",
        )


_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_~.")


def _segment(name: str) -> str:
    """Return a name as one segment of a path (RFC 3986); urllib.parse is 2 ms of import."""
    encoded = name.encode(errors="surrogateescape")
    # "." and ".." alone would be taken out of the path.
    plain = _PLAIN if encoded.strip(b".") else b""
    return "".join(chr(byte) if byte in plain else f"%{byte:02X}" for byte in encoded)
