"""The table of routes: one row each, from which server, client and OpenAPI page are made.

`kind` says how an answer arrives: `json` at once, or `operation` (202 and an Operation;
its events, ended by a `result` of the row's result shape, come from
`GET /v1/operations/{id}/events`). `events` is that stream itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from banger.api import models


class Route(NamedTuple):
    """One row. `request` and `result` are shapes of `api.models` (None: no body)."""

    name: str
    method: str
    path: str
    request: type[Any] | None
    result: Any
    kind: str = "json"
    summary: str = ""


ROUTES: tuple[Route, ...] = (
    Route("daemon_info", "GET", "/v1/daemon", None, models.DaemonInfo, summary="Who answers"),
    Route(
        "daemon_stop",
        "POST",
        "/v1/daemon/stop",
        models.DaemonStop,
        models.Done,
        summary="End the daemon; VMs go on",
    ),
    Route("host_info", "GET", "/v1/host", None, models.HostInfo, summary="What this host runs"),
    Route("list_images", "GET", "/v1/images", None, list[models.Image], summary="List images"),
    Route("get_image", "GET", "/v1/images/{name}", None, models.Image, summary="Show an image"),
    Route(
        "pull_image",
        "POST",
        "/v1/images",
        models.ImagePull,
        models.Image,
        "operation",
        "Make an image: from the catalog, a registry, an archive or a bundle",
    ),
    Route("list_blobs", "GET", "/v1/blobs", None, list[models.Blob], summary="List kept downloads"),
    Route(
        "prune_blobs",
        "POST",
        "/v1/blobs/prune",
        models.BlobPrune,
        models.BlobsPruned,
        summary="Remove kept downloads",
    ),
    Route(
        "register_image",
        "POST",
        "/v1/images/register",
        models.ImageRegister,
        models.Image,
        "operation",
        "Make an image of an ext4 on this host",
    ),
    Route(
        "export_image",
        "POST",
        "/v1/images/{name}/export",
        models.ImageExport,
        models.ImageExported,
        "operation",
        "Write an image to a file, as a bundle",
    ),
    Route(
        "delete_image",
        "DELETE",
        "/v1/images/{name}",
        models.ImageDelete,
        models.ImageDeleted,
        summary="Delete an image",
    ),
    Route(
        "image_catalog",
        "GET",
        "/v1/catalog",
        None,
        models.Catalog,
        summary="List what can be pulled by name, and what is wrong with the catalogs",
    ),
    Route("list_kernels", "GET", "/v1/kernels", None, list[models.Kernel], summary="List kernels"),
    Route("get_kernel", "GET", "/v1/kernels/{name}", None, models.Kernel, summary="Show a kernel"),
    Route(
        "pull_kernel",
        "POST",
        "/v1/kernels/{name}/pull",
        models.PullRequest,
        models.Kernel,
        "operation",
        "Make a kernel from its catalog entry",
    ),
    Route(
        "import_kernel",
        "POST",
        "/v1/kernels/{name}/import",
        models.KernelImport,
        models.Kernel,
        "operation",
        "Make a kernel of files on this host",
    ),
    Route(
        "check_kernel",
        "GET",
        "/v1/kernels/{name}/check",
        None,
        models.KernelCheck,
        summary="Compare a kernel with what machines and Docker need",
    ),
    Route(
        "kernel_config",
        "GET",
        "/v1/kernels/{name}/config",
        None,
        models.KernelConfig,
        summary="Show a kernel's build configuration",
    ),
    Route(
        "delete_kernel",
        "DELETE",
        "/v1/kernels/{name}",
        None,
        models.Done,
        summary="Delete a kernel",
    ),
    Route("list_vms", "GET", "/v1/vms", None, list[models.Vm], summary="List VMs"),
    Route(
        "create_vm",
        "POST",
        "/v1/vms",
        models.VmCreate,
        models.Vm,
        "operation",
        "Create a VM and, when asked, start it; pulls what is absent",
    ),
    Route("prune_vms", "POST", "/v1/vms/prune", models.PruneRequest, models.Pruned, "operation"),
    Route("get_vm", "GET", "/v1/vms/{name}", None, models.Vm, summary="Show a VM"),
    Route("set_vm", "PATCH", "/v1/vms/{name}", models.VmSet, models.Vm, summary="Change a VM"),
    Route(
        "delete_vm",
        "DELETE",
        "/v1/vms/{name}",
        None,
        models.Done,
        "operation",
        "Delete a VM, killing it when it runs",
    ),
    Route(
        "start_vm",
        "POST",
        "/v1/vms/{name}/start",
        None,
        models.Vm,
        "operation",
        "Start a VM and wait for its agent",
    ),
    Route(
        "stop_vm",
        "POST",
        "/v1/vms/{name}/stop",
        models.StopRequest,
        models.Vm,
        "operation",
        "Shut a VM down; kill it past the deadline",
    ),
    Route(
        "restart_vm",
        "POST",
        "/v1/vms/{name}/restart",
        models.StopRequest,
        models.Vm,
        "operation",
        "Stop and start a VM",
    ),
    Route(
        "kill_vm",
        "POST",
        "/v1/vms/{name}/kill",
        None,
        models.Vm,
        "operation",
        "End the VMM at once",
    ),
    Route(
        "connect_vm",
        "GET",
        "/v1/vms/{name}/connection",
        None,
        models.VmConnection,
        summary="How to reach a running VM's agent",
    ),
    Route(
        "promote_vm",
        "POST",
        "/v1/vms/{name}/promote",
        models.VmPromote,
        models.Image,
        "operation",
        "Make an image of a stopped VM",
    ),
    Route("vm_stats", "GET", "/v1/vms/{name}/stats", None, models.VmStats, summary="Host cost"),
    Route(
        "list_operations",
        "GET",
        "/v1/operations",
        None,
        list[models.Operation],
        summary="List operations",
    ),
    Route("get_operation", "GET", "/v1/operations/{id}", None, models.Operation),
    Route(
        "operation_events",
        "GET",
        "/v1/operations/{id}/events",
        None,
        models.OperationEvent,
        "events",
        "Follow an operation, from its first event to its last",
    ),
    Route(
        "cancel_operation",
        "DELETE",
        "/v1/operations/{id}",
        None,
        models.Done,
        summary="Cancel an operation; it sweeps what it began",
    ),
)
