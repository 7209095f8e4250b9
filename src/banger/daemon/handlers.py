"""One handler per row of the route table: decoded body in, shape or Operation out."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from banger import __version__
from banger.api import models
from banger.errors import Conflict
from banger.services.artifacts import ArtifactService
from banger.services.image_store import ImageStore
from banger.services.images import ImageService
from banger.services.kernels import KernelService
from banger.services.operations import Operation, OperationManager
from banger.services.promote import Promoter
from banger.services.vms import VmService

Handler = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Services:
    """What the handlers call."""

    vms: VmService
    images: ImageService
    kernels: KernelService
    image_store: ImageStore
    promoter: Promoter
    operations: OperationManager
    data_dir: str
    stop_daemon: Callable[[], None]


class Handlers:
    """The methods are named as the rows of `api.routes.ROUTES`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._vms = services.vms
        self._operations = services.operations
        self._started_at = datetime.now(UTC).isoformat(timespec="seconds")

    async def daemon_info(self) -> models.DaemonInfo:
        """Say who answers."""
        running = [vm for vm in await self._vms.all() if vm["state"] == "running"]
        return {
            "version": __version__,
            "pid": os.getpid(),
            "started_at": self._started_at,
            "data_dir": self._services.data_dir,
            "running_operations": self._operations.running,
            "running_vms": len(running),
        }

    async def daemon_stop(self, body: models.DaemonStop) -> models.Done:
        """End the daemon after this answer."""
        if body.get("only_if_idle", False) and self._operations.running:
            raise Conflict(
                f"the daemon runs {self._operations.running} operation(s)",
                hint="wait for them, or `banger daemon stop`",
            )
        self._services.stop_daemon()
        return {"ok": True}

    async def host_info(self) -> models.HostInfo:
        """Say what a VM gets here by default."""
        choice, defaults = self._vms.choice, self._vms.defaults
        return {
            "vmm": choice.vmm,
            "accel": choice.accel,  # type: ignore[typeddict-item]  # kvm or tcg by choose_vmm
            "accel_reason": choice.reason,
            "vcpu": defaults.vcpu,
            "memory_bytes": defaults.memory_bytes,
            "disk_size_bytes": defaults.disk_size_bytes,
        }

    async def list_images(self) -> list[dict[str, Any]]:
        """List images."""
        return await self._services.images.all()

    async def get_image(self, name: str) -> dict[str, Any]:
        """Show an image."""
        return await self._services.images.get(name)

    async def pull_image(self, body: models.ImagePull) -> Operation:
        """Pull an image."""
        images = self._services.images
        return self._operations.start(
            "pull image", body["source"], lambda sink: images.pull_source(body, sink)
        )

    async def list_blobs(self) -> list[models.Blob]:
        """List kept downloads."""
        return await self._services.images.blobs()

    async def prune_blobs(self, body: models.BlobPrune) -> models.BlobsPruned:
        """Remove kept downloads."""
        freed = await self._services.images.prune_blobs(everything=body.get("all", False))
        return {"freed_bytes": freed}

    async def register_image(self, body: models.ImageRegister) -> Operation:
        """Register an image."""
        store = self._services.image_store
        return self._operations.start(
            "register image", body["name"], lambda sink: store.register(body, sink)
        )

    async def export_image(self, name: str, body: models.ImageExport) -> Operation:
        """Export an image."""
        store = self._services.image_store
        return self._operations.start(
            "export image", name, lambda sink: store.export(name, body, sink)
        )

    async def delete_image(self, name: str, body: models.ImageDelete) -> models.ImageDeleted:
        """Delete an image."""
        return await self._services.image_store.delete(name, force=body.get("force", False))

    async def image_catalog(self) -> models.Catalog:
        """List what can be pulled by name."""
        return await self._services.image_store.catalog()

    async def list_kernels(self) -> list[dict[str, Any]]:
        """List kernels."""
        return await self._services.kernels.all()

    async def get_kernel(self, name: str) -> dict[str, Any]:
        """Show a kernel."""
        return await self._services.kernels.get(name)

    async def pull_kernel(self, name: str, body: models.PullRequest) -> Operation:
        """Pull a kernel."""
        return self._pull(self._services.kernels, "kernel", name, body)

    async def import_kernel(self, name: str, body: models.KernelImport) -> Operation:
        """Import a kernel."""
        return self._operations.start(
            "import kernel", name, lambda sink: self._services.kernels.import_(name, body, sink)
        )

    async def check_kernel(self, name: str) -> models.KernelCheck:
        """Compare a kernel with what is needed."""
        return await self._services.kernels.check_features(name)

    async def kernel_config(self, name: str) -> models.KernelConfig:
        """Show a kernel's configuration."""
        return await self._services.kernels.config(name)

    async def delete_kernel(self, name: str) -> models.Done:
        """Delete a kernel."""
        await self._services.kernels.delete(name)
        return {"ok": True}

    def _pull(
        self, service: ArtifactService, kind: str, name: str, body: models.PullRequest
    ) -> Operation:
        force = body.get("force", False)
        return self._operations.start(
            f"pull {kind}", name, lambda sink: service.pull(name, sink, force=force)
        )

    async def list_vms(self) -> list[models.Vm]:
        """List VMs."""
        return await self._vms.all()

    async def create_vm(self, body: models.VmCreate) -> Operation:
        """Create a VM."""
        subject = body.get("name", "VM")
        return self._operations.start("create", subject, lambda op: self._vms.create(body, op))

    async def prune_vms(self, body: models.PruneRequest) -> Operation:
        """Delete VMs that do not run."""
        return self._operations.start(
            "prune",
            "VMs",
            lambda op: self._vms.prune(
                everything=body.get("all", False), dry_run=body.get("dry_run", False), sink=op
            ),
        )

    async def get_vm(self, name: str) -> models.Vm:
        """Show a VM."""
        return await self._vms.get(name)

    async def set_vm(self, name: str, body: models.VmSet) -> models.Vm:
        """Change a VM."""
        return await self._vms.set(name, body)

    async def delete_vm(self, name: str) -> Operation:
        """Delete a VM."""
        vm = await self._vms.get(name)

        async def step(operation: Operation) -> models.Done:
            operation.stage(f"delete {vm['name']}")
            await self._vms.delete(vm["id"])
            return {"ok": True}

        return self._operations.start("delete", vm["name"], step)

    async def start_vm(self, name: str) -> Operation:
        """Start a VM."""
        vm = await self._vms.get(name)
        return self._operations.start("start", vm["name"], lambda op: self._vms.start(vm["id"], op))

    async def stop_vm(self, name: str, body: models.StopRequest) -> Operation:
        """Stop a VM."""
        vm, timeout_s = await self._vms.get(name), body.get("timeout_s")
        return self._operations.start(
            "stop", vm["name"], lambda op: self._vms.stop(vm["id"], op, timeout_s)
        )

    async def restart_vm(self, name: str, body: models.StopRequest) -> Operation:
        """Restart a VM."""
        vm, timeout_s = await self._vms.get(name), body.get("timeout_s")
        return self._operations.start(
            "restart", vm["name"], lambda op: self._vms.restart(vm["id"], op, timeout_s)
        )

    async def kill_vm(self, name: str) -> Operation:
        """Kill a VM."""
        vm = await self._vms.get(name)
        return self._operations.start("kill", vm["name"], lambda _: self._vms.kill(vm["id"]))

    async def connect_vm(self, name: str) -> models.VmConnection:
        """Say how to reach a VM's agent."""
        return await self._vms.connection(name)

    async def promote_vm(self, name: str, body: models.VmPromote) -> Operation:
        """Make an image of a VM."""
        vm = await self._vms.get(name)
        promoter = self._services.promoter
        return self._operations.start(
            "promote", vm["name"], lambda op: promoter.promote(vm["id"], body, op)
        )

    async def vm_stats(self, name: str) -> models.VmStats:
        """Say what a VM costs."""
        return await self._vms.stats(name)

    async def list_operations(self) -> list[models.Operation]:
        """List operations."""
        return [operation.wire() for operation in self._operations.all()]

    async def get_operation(self, id: str) -> models.Operation:  # noqa: A002 - the path's name
        """Show an operation."""
        return self._operations.find(id).wire()

    async def operation_events(self, id: str) -> Operation:  # noqa: A002
        """Return the operation to follow."""
        return self._operations.find(id)

    async def cancel_operation(self, id: str) -> models.Done:  # noqa: A002
        """Cancel an operation."""
        self._operations.cancel(self._operations.find(id))
        return {"ok": True}
