"""The wire contract's shapes: what travels as JSON between the command line and the daemon.

TypedDicts, because the command line reads them without importing a codec; the daemon
validates requests against the same definitions (`api.codec`). Sizes are in the unit that
ends the name, times are RFC 3339 in UTC.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

VmState = Literal["creating", "stopped", "starting", "running", "stopping", "deleting"]
Accel = Literal["kvm", "tcg"]
NetworkMode = Literal["user", "bridge", "none"]
ArtifactKind = Literal["image", "kernel"]


class ErrorBody(TypedDict):
    """Why something failed: a stable code, one line, and what to do next (may be empty)."""

    code: str
    message: str
    hint: str


class ErrorAnswer(TypedDict):
    """The body of every answer with a status of 400 and above."""

    error: ErrorBody


class DaemonInfo(TypedDict):
    """Who answers."""

    version: str
    pid: int
    started_at: str
    data_dir: str
    running_operations: int
    running_vms: int


class DaemonStop(TypedDict, total=False):
    """Ask the daemon to end; VMs go on. `only_if_idle` refuses while an operation runs."""

    only_if_idle: bool


class Done(TypedDict):
    """The step is done; nothing more to say."""

    ok: bool


class HostInfo(TypedDict):
    """What this host would run, and the sizes a VM gets when none are given."""

    vmm: str
    accel: Accel
    accel_reason: str
    vcpu: int
    memory_bytes: int
    disk_size_bytes: int


class Image(TypedDict):
    """An image: installed (`installed` true) or only in the catalog."""

    name: str
    installed: bool
    digest: str
    size_bytes: int
    disk_bytes: int
    origin: str
    created_at: str
    description: str
    used_by: list[str]


class Kernel(TypedDict):
    """A kernel: installed (`installed` true) or only in the catalog."""

    name: str
    installed: bool
    release: str
    digest: str
    size_bytes: int
    disk_bytes: int
    origin: str
    created_at: str
    description: str
    used_by: list[str]


class PullRequest(TypedDict, total=False):
    """Make an artifact from its catalog entry; `force` replaces an installed one."""

    force: bool


class VmCreate(TypedDict, total=False):
    """What a new VM is made of; an absent field takes its default.

    `publish` holds `[HOST_IP:]PORT:GUEST_PORT`; `nat` and `isolated` matter on the bridge.
    `start` boots it and waits for its agent. `owner_pid` makes it ephemeral: it is deleted
    when that process (of the same user) is gone.
    """

    name: str
    image: str
    kernel: str
    vcpu: int
    memory_bytes: int
    disk_size_bytes: int
    vmm: str
    network: str
    nat: bool
    isolated: bool
    publish: list[str]
    start: bool
    owner_pid: int


class VmSet(TypedDict, total=False):
    """Change a VM: its name at any time, sizes while stopped; a disk only grows."""

    name: str
    vcpu: int
    memory_bytes: int
    disk_size_bytes: int
    network: str
    nat: bool
    isolated: bool
    publish: list[str]


class Vm(TypedDict):
    """A VM as it is now. `accel` is what it runs with, or would run with when stopped.

    `address` is its lease on the bridge, where it answers to `dns_name`; null elsewhere.
    """

    id: str
    name: str
    state: VmState
    state_reason: str
    vmm: str
    accel: Accel
    accel_reason: str
    image: str
    kernel: str
    vcpu: int
    memory_bytes: int
    disk_size_bytes: int
    disk_used_bytes: int
    network: str
    nat: bool
    isolated: bool
    publish: list[str]
    address: str | None
    dns_name: str | None
    ephemeral: bool
    pid: int | None
    created_at: str
    started_at: str | None
    directory: str
    console_log: str
    vmm_log: str


class Endpoint(TypedDict):
    """How to reach the guest agent: `guest.transport.endpoint_from_wire` reads it."""

    kind: str
    directory: NotRequired[str]
    ports: NotRequired[int]
    path: NotRequired[str]
    port: NotRequired[int]


class VmConnection(TypedDict):
    """What a client needs to talk to a running VM without the daemon."""

    vm: Vm
    endpoint: Endpoint


class VmStats(TypedDict):
    """What the VMM process costs the host; the guest's own view comes from its agent."""

    name: str
    state: VmState
    cpu_seconds: float
    memory_bytes: int
    disk_used_bytes: int
    uptime_s: float


class StopRequest(TypedDict, total=False):
    """How long the guest may take to stop before its VMM is killed."""

    timeout_s: float


class PruneRequest(TypedDict, total=False):
    """Delete stopped VMs; `dry_run` only names them, `all` takes running ones too."""

    dry_run: bool
    all: bool


class Pruned(TypedDict):
    """What a prune removed (or would)."""

    vms: list[str]
    freed_bytes: int


class Operation(TypedDict):
    """A long step: `status` is running, done, failed or cancelled."""

    id: str
    kind: str
    subject: str
    status: Literal["running", "done", "failed", "cancelled"]
    started_at: str
    stage: str
    error: ErrorBody | None


class OperationEvent(TypedDict, total=False):
    """One line of an operation's event stream (newline-delimited JSON).

    `type` is stage, progress, warning, result, error or heartbeat; the last event is
    `result` (whose `result` is the route's result shape) or `error`.
    """

    type: str
    stage: str
    done_bytes: int
    total_bytes: int
    message: str
    result: Any
    error: ErrorBody
