"""The wire contract's shapes: what travels as JSON between the command line and the daemon.

TypedDicts, because the command line reads them without importing a codec; the daemon
validates requests against the same definitions (`api.codec`). Sizes are in the unit that
ends the name, times are RFC 3339 in UTC.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, Required, TypedDict

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
    """An image: installed (`installed` true) or only in the catalog.

    `user`, `env`, `entrypoint`, `command` and `working_dir` are what an imported image says of
    itself; `kernel` is what a VM of it gets when none is asked for (empty: the default one).
    """

    name: str
    installed: bool
    digest: str
    size_bytes: int
    disk_bytes: int
    origin: str
    created_at: str
    description: str
    used_by: list[str]
    platform: str
    kernel: str
    user: str
    env: dict[str, str]
    entrypoint: list[str]
    command: list[str]
    working_dir: str


class ImageRegister(TypedDict, total=False):
    """Make an image of the ext4 in a file of this host; all paths are absolute.

    `link` leaves the file where it is, never to be changed. `kernel_ref` names the kernel of its
    VMs; `kernel` and `modules` make one of files, called as the image. An `initrd` is not used.
    """

    name: Required[str]
    rootfs: Required[str]
    link: bool
    kernel_ref: str
    kernel: str
    initrd: str
    modules: str
    description: str
    force: bool


class ImageExport(TypedDict, total=False):
    """Write an image to the file `path` (absolute) as a bundle; `force` replaces one there."""

    path: Required[str]
    force: bool


class ImageExported(TypedDict):
    """A bundle that was written; `sha256` is hexadecimal, of the whole file."""

    name: str
    path: str
    sha256: str
    size_bytes: int


class ImageDelete(TypedDict, total=False):
    """Delete an image; with `force` although VMs that do not run are made of it."""

    force: bool


class ImageDeleted(TypedDict):
    """An image is gone; `stranded` are VMs that cannot start until the same one is back."""

    ok: bool
    stranded: list[str]


class CatalogEntry(TypedDict):
    """An image that can be pulled by name; `kind` is debian, oci or bundle.

    `pinned` tells whether a digest says what comes; `catalog` is `built-in`, a path or a URL.
    """

    name: str
    kind: str
    description: str
    source: str
    pinned: bool
    kernel: str
    catalog: str


class Catalog(TypedDict):
    """What can be pulled by name, and what is wrong with the catalogs of the configuration."""

    entries: list[CatalogEntry]
    warnings: list[str]


class Kernel(TypedDict):
    """A kernel: installed (`installed` true) or only in the catalog.

    `used_by` are VMs, `used_by_images` the images whose VMs get it when none is asked for.
    """

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
    used_by_images: list[str]


class KernelImport(TypedDict, total=False):
    """Make a kernel of files on this host; paths are absolute.

    What is not named is looked for in `directory`. `force` takes a kernel that lacks what a
    machine needs, and replaces an installed one.
    """

    directory: Required[str]
    kernel: str
    modules: str
    config: str
    force: bool


class KernelFeature(TypedDict):
    """A CONFIG_ option, what it is for, and whether a kernel has it.

    `group` is machine, vmm or docker. A module counts only when its file is there; `note` says
    when it should be and is not.
    """

    option: str
    group: str
    need: Literal["required", "recommended"]
    state: Literal["built in", "module", "missing"]
    why: str
    note: str


class KernelCheck(TypedDict):
    """A kernel held against what machines and Docker need; `ok`: nothing required is missing."""

    name: str
    release: str
    ok: bool
    config_known: bool
    features: list[KernelFeature]


class KernelConfig(TypedDict):
    """A kernel's build configuration, empty when nobody knew it."""

    name: str
    config: str


class ImagePull(TypedDict, total=False):
    """Make an image of `source`: a catalog's name, a registry's reference, a file.

    `name` is what it is called here (default: from the source). `size_bytes` is the size of its
    file system (default: what fits). `force` replaces an installed one. `origin` is what goes on
    record for a source that is a file of the moment.
    """

    source: Required[str]
    name: str
    kernel: str
    platform: str
    size_bytes: int
    force: bool
    origin: str


class VmPromote(TypedDict, total=False):
    """Make the image `name` of a stopped VM; `kernel` is that of its VMs (default: as before).

    `force` replaces an installed image that no VM uses.
    """

    name: Required[str]
    kernel: str
    description: str
    force: bool


class Blob(TypedDict):
    """A downloaded layer or manifest that is kept for the next pull; `partial`: not all of it."""

    digest: str
    size_bytes: int
    used_at: str
    partial: bool
    in_use: bool


class BlobPrune(TypedDict, total=False):
    """Remove downloads that did not end and what is over the limit; `all`: every one not in use."""

    all: bool


class BlobsPruned(TypedDict):
    """What a prune of the blob cache freed."""

    freed_bytes: int


class PullRequest(TypedDict, total=False):
    """Make an artifact from its catalog entry; `force` replaces an installed one."""

    force: bool


class VmCreate(TypedDict, total=False):
    """What a new VM is made of; an absent field takes its default.

    `publish` holds `[HOST_IP:]PORT:GUEST_PORT`; `nat` and `isolated` matter on the bridge.
    `start` boots it and waits for its agent. `owner_pid` makes it ephemeral: it is deleted
    when that process (of the same user) is gone. `kernel` defaults to what the image names;
    `with_sshd` (an sshd is installed when the guest has none) to true for imported images.
    `credentials` (the user's logins and `file_sync` are written into it at each start) is true.
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
    with_sshd: bool
    credentials: bool
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
    with_sshd: bool
    credentials: bool
    synced_files: list[str]
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
