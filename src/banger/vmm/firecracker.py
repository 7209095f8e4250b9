"""Firecracker on KVM: the first choice of VMM.

Owns the order of its start (confinement, user network, API calls, power on) and what is left to
clean after it. Command lines are `vmm.launch`'s, the chroot `vmm.jail`'s, requests
`vmm.firecracker_api`'s.

In `runtime`: fc.sock (API) and v.sock (vsock); with the jailer `jail`, a link to the chroot that
holds them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from banger.errors import BangerError, Unavailable, VmmFailed
from banger.guest.transport import Endpoint, HybridVsock, connect_unix, socket_path
from banger.host.commands import HostCommands
from banger.host.files import last_lines
from banger.host.process import ProcessIdentity, end_by_argument, end_by_root
from banger.host.threads import run_uncut
from banger.network.usermode import start_pasta
from banger.vmm import firecracker_api as api
from banger.vmm import jail, launch
from banger.vmm.base import VmmCapabilities, VmSpec, check_socket_path, mark_of
from banger.vmm.children import Children

# It opens its socket within 15 ms; in a nested lab under load it has taken 4 s.
_START_TIMEOUT_S = 30.0
_POLL_S = 0.005
_PROBE_TIMEOUT_S = 10.0
# Within execve(2) a process has no command line to know it by: microseconds, or the time its file
# takes to be read.
_EXEC_TIMEOUT_S = 1.0
_API_SOCKET = "fc.sock"
_VSOCK_SOCKET = "v.sock"
_JAIL = "jail"

Find = Callable[[], str | None]


@dataclass(frozen=True, slots=True)
class _Files:
    """The names Firecracker knows its files by: the host's, or the chroot's."""

    kernel: str
    initramfs: str
    base: str
    own: str
    mods: str
    log: str
    metrics: str | None
    sockets: str  # what stands before a socket's name


class Firecracker:
    """The Firecracker adapter. `find_*` are asked at each start: either may come later."""

    name = "firecracker"

    def __init__(
        self, commands: HostCommands, find_firecracker: Find, find_jailer: Find, *, jailed: bool
    ) -> None:
        self._commands = commands
        self._find_firecracker = find_firecracker
        self._find_jailer = find_jailer
        self._children = Children(commands)
        self.capabilities = VmmCapabilities(
            snapshots=False, accelerators=("kvm",), drives_by_serial=False, jailed=jailed
        )

    def endpoint(self, runtime: Path) -> Endpoint:
        """Return the VM's vsock."""
        return HybridVsock(str(_sockets(runtime) / _VSOCK_SOCKET))

    def check(self) -> None:
        """Raise Unavailable when Firecracker, or what confines it here, is missing."""
        self._programs()
        if os.geteuid() != 0 and not self._has_namespaces:
            raise Unavailable(
                "user namespaces are not allowed to this user, and without root they confine "
                "Firecracker",
                hint="allow them (`banger doctor`), or take `--vmm qemu`",
            )

    @cached_property
    def _has_namespaces(self) -> bool:
        """Whether a user namespace of ours may set up a network, asked of the kernel once.

        Ubuntu 24.04 lets one be made, and takes its rights away (AppArmor).
        """
        try:
            done = subprocess.run(
                launch.probe(),
                env=self._commands.environment,
                capture_output=True,
                timeout=_PROBE_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0

    def _programs(self) -> tuple[str, str]:
        firecracker, jailer = self._find_firecracker(), self._find_jailer()
        if firecracker is None:
            raise Unavailable(
                "Firecracker is not installed", hint="get it: `banger firecracker install`"
            )
        if self.capabilities.jailed and jailer is None:
            raise Unavailable(
                "Firecracker's jailer is not installed, and as root a VMM does not run without it",
                hint="get it: `banger firecracker install`; or `jailer_enabled = false` in the "
                "config runs Firecracker as root",
            )
        return firecracker, jailer or ""

    async def start(self, spec: VmSpec) -> ProcessIdentity:
        """Start Firecracker, configure the machine through its API and power it on."""
        firecracker, jailer = self._programs()
        executable = launch.resolve(firecracker)
        await self.sweep(spec.id, spec.runtime, spec.directory)
        child = None
        try:
            if spec.metrics_log is not None:
                spec.metrics_log.touch(mode=0o600)
            spec.vmm_log.touch(mode=0o600)
            files = await run_uncut(_place, spec, executable)
            check_socket_path(spec.runtime / _JAIL / _API_SOCKET)
            async with AsyncExitStack() as holders:
                argv = _own_words(spec, executable, files)
                child = await self._spawn(spec, executable, jailer, argv, holders)
                process = await self._wait_for_api(spec, executable, child)
            await _configure(_sockets(spec.runtime), spec, files)
        except BaseException as error:
            if child is not None:
                await self._children.end(child)
            await self.sweep(spec.id, spec.runtime, spec.directory)
            if isinstance(error, OSError):
                raise VmmFailed(f"cannot prepare Firecracker's files: {error}") from error
            if isinstance(error, BangerError) and not error.hint:
                error.hint = _hint(error.message, spec)
            raise
        return process

    async def adopt(self, runtime: Path, process: ProcessIdentity) -> bool:
        """Tell whether Firecracker still runs and answers on its API socket."""
        if not process.alive():
            return False
        try:
            async with api.FirecrackerApi(_sockets(runtime) / _API_SOCKET) as client:
                await client.call(api.instance_info())
        except VmmFailed:
            return False
        return True

    async def pause(self, runtime: Path) -> None:
        """Stop the vCPUs."""
        await self._set_state(runtime, "Paused")

    async def resume(self, runtime: Path) -> None:
        """Let the vCPUs go on."""
        await self._set_state(runtime, "Resumed")

    async def _set_state(self, runtime: Path, state: str) -> None:
        async with api.FirecrackerApi(_sockets(runtime) / _API_SOCKET) as client:
            await client.call(api.vm_state(state))

    async def kill(self, process: ProcessIdentity) -> None:
        """SIGKILL, and wait until it is gone."""
        await self._children.kill(process)

    async def sweep(self, vm_id: str, runtime: Path, directory: Path) -> None:
        """End pasta and remove chroot, cgroup and sockets; idempotent."""
        mark = mark_of(vm_id, runtime)
        await end_by_argument(mark)
        # What has left the jailer and is within execve(2) is known by its root alone.
        for root in jail.chroots_in(directory):
            await end_by_root(root)
        await asyncio.to_thread(jail.sweep_jail, directory, mark)
        for name in (_API_SOCKET, _VSOCK_SOCKET, _JAIL):
            (runtime / name).unlink(missing_ok=True)

    # --- its start ---

    async def _spawn(
        self,
        spec: VmSpec,
        executable: Path,
        jailer: str,
        argv: list[str],
        holders: AsyncExitStack,
    ) -> subprocess.Popen[bytes]:
        """Start the confined Firecracker; what `holders` closes is needed until its API answers."""
        user_network = spec.network is not None and spec.network.tap is None
        if spec.jail_uid is None:
            if not user_network:
                words = launch.unprivileged(argv, own_network=spec.network is None)
                return await self._to_logs(spec, words)
            return await self._in_user_network(spec, launch.without_rights(argv))
        network = None
        if user_network:
            # Namespaces of the VM's own uid, for pasta to enter without root; then the jailer
            # takes Firecracker there.
            holder = await self._in_user_network(
                spec, ["sleep", str(_START_TIMEOUT_S)], as_uid=spec.jail_uid
            )
            holders.push_async_callback(self._children.end, holder)
            network = f"/proc/{holder.pid}/ns/net"
        words = launch.jailer(
            jailer,
            executable,
            mark=spec.mark,
            uid=spec.jail_uid,
            base=jail.base_of(spec.directory),
            cgroup=jail.cgroup_arguments(spec),
            network=network,
        )
        if spec.network is None:
            words = ["unshare", "--net", "--", *words]
        return await self._to_logs(spec, [*words, *argv])

    async def _to_logs(self, spec: VmSpec, argv: list[str]) -> subprocess.Popen[bytes]:
        console = self._children.open_console(spec.console_log)
        try:
            return await self._children.spawn(argv, log=spec.vmm_log, stdout=console)
        finally:
            os.close(console)

    async def _in_user_network(
        self, spec: VmSpec, argv: list[str], *, as_uid: int | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a program in a network namespace that pasta joins to the world."""
        assert spec.network is not None
        prefix = [] if as_uid is None else launch.as_user(as_uid)
        output, console = Path("/dev/null"), -1
        if as_uid is None:
            console = self._children.open_console(spec.console_log)
            output = Path(f"/proc/self/fd/{console}")
        said, says = os.pipe()
        waits, goes = os.pipe()
        child = None
        try:
            child = await self._children.spawn(
                [*prefix, *launch.network_holder(argv, output)],
                log=spec.vmm_log,
                stdin=waits,
                stdout=says,
                pass_fds=() if console < 0 else (console,),
            )
            for fd in (says, waits):
                os.close(fd)
            says = waits = -1
            if not await _read_soon(said):
                raise VmmFailed(
                    f"the VM's network namespace could not be made: {last_lines(spec.vmm_log)}",
                    hint="`banger doctor` checks user namespaces; or take `--vmm qemu`",
                )
            await start_pasta(
                self._commands,
                child.pid,
                launch.PASTA_END,
                mark=spec.mark,
                prefix=prefix,
            )
        except BaseException:
            if child is not None:
                await self._children.end(child)
            raise
        finally:
            for fd in (said, says, waits, goes, console):
                if fd >= 0:
                    os.close(fd)
        return child

    async def _wait_for_api(
        self, spec: VmSpec, executable: Path, child: subprocess.Popen[bytes]
    ) -> ProcessIdentity:
        """Return Firecracker's process once its API socket is there."""
        socket = _sockets(spec.runtime) / _API_SOCKET
        seen = asyncio.get_running_loop().time()
        deadline = seen + _START_TIMEOUT_S
        while True:
            status = child.poll()
            # The jailer ends with 0 when it has made the process in its new pid namespace.
            if status is not None and (spec.jail_uid is None or status != 0):
                raise VmmFailed(
                    f"Firecracker ended with status {status}: {last_lines(spec.vmm_log)}"
                )
            pid = child.pid if spec.jail_uid is None else _jailed_pid(spec, executable)
            process = None if pid is None else ProcessIdentity.of(pid)
            if process is not None and _listens(socket):
                return process
            now = asyncio.get_running_loop().time()
            if process is not None or status is None:
                seen = now
            elif now - seen > _EXEC_TIMEOUT_S:
                raise VmmFailed(f"Firecracker ended at once: {last_lines(spec.vmm_log)}")
            if now > deadline:
                raise VmmFailed(
                    f"Firecracker did not answer within {_START_TIMEOUT_S:.0f} s: "
                    f"{last_lines(spec.vmm_log)}"
                )
            await asyncio.sleep(_POLL_S)


async def _read_soon(fd: int) -> bytes:
    """Return what comes through a pipe first, empty at its end; raises VmmFailed when none does."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            await ready.wait()
    except TimeoutError as error:
        raise VmmFailed(
            f"the VM's network namespace was not there within {_START_TIMEOUT_S:.0f} s"
        ) from error
    finally:
        loop.remove_reader(fd)
    return os.read(fd, 16)


def _listens(path: Path) -> bool:
    """Tell whether a connection is taken: the socket's file is there a moment before."""
    with (
        contextlib.suppress(OSError),
        socket_path(str(path)) as name,
        contextlib.closing(connect_unix(name)),
    ):
        return True
    return False


def _sockets(runtime: Path) -> Path:
    """Return the directory that holds a VM's sockets."""
    jailed = runtime / _JAIL
    return jailed if jailed.is_symlink() else runtime


def _place(spec: VmSpec, executable: Path) -> _Files:
    """Put the files where Firecracker will see them and return their names there."""
    if spec.jail_uid is None:
        jail.take_back(spec)
        return _Files(
            kernel=str(spec.kernel),
            initramfs=str(spec.initramfs),
            base=str(spec.base_disk),
            own=str(spec.own_disk),
            mods=str(spec.modules_disk),
            log=str(spec.vmm_log),
            metrics=None if spec.metrics_log is None else str(spec.metrics_log),
            sockets=f"{spec.runtime}/",
        )
    root = jail.build_chroot(spec, spec.jail_uid, executable)
    (spec.runtime / _JAIL).symlink_to(root)
    return _Files(
        kernel="/vmlinux",
        initramfs="/initramfs.img",
        base="/base.ext4",
        own="/own.ext4",
        mods="/mods.ext4",
        log="/vmm.log",
        metrics=None if spec.metrics_log is None else "/metrics.json",
        sockets="/",
    )


def _own_words(spec: VmSpec, executable: Path, files: _Files) -> list[str]:
    words = [
        *("--api-sock", f"{files.sockets}{_API_SOCKET}"),
        *("--log-path", files.log),
        # It warns of a vCPU that was interrupted before its first run, at every start.
        *("--level", "Error"),
        *([] if files.metrics is None else ["--metrics-path", files.metrics]),
    ]
    # The jailer says executable and id by itself.
    return words if spec.jail_uid else [str(executable), "--id", spec.mark, *words]


async def _configure(sockets: Path, spec: VmSpec, files: _Files) -> None:
    """Make the machine and power it on; a refused step raises VmmFailed."""
    async with api.FirecrackerApi(sockets / _API_SOCKET) as client:
        for call in configuration(spec, files):
            await client.call(call)


def configuration(spec: VmSpec, files: _Files) -> list[api.Call]:
    """Return the requests that make and start a machine, in order.

    The order of the drives is what they are called in the guest: vda, vdb, vdc.
    """
    calls = [
        api.machine_config(spec.vcpu, spec.memory_bytes >> 20),
        api.boot_source(files.kernel, files.initramfs, spec.command_line),
        api.drive("base", files.base, read_only=True),
        api.drive("own", files.own, read_only=False),
        api.drive("mods", files.mods, read_only=True),
        api.vsock(f"{files.sockets}{_VSOCK_SOCKET}"),
        api.entropy(),
    ]
    if spec.network is not None:
        calls.append(api.network_interface(spec.network.tap or launch.TAP, spec.network.mac))
    return [*calls, api.instance_start()]


def _jailed_pid(spec: VmSpec, executable: Path) -> int | None:
    """Return the pid the jailer wrote down, checked against the process table."""
    root = jail.chroot_of(spec, executable)
    with contextlib.suppress(OSError, ValueError):
        fd = os.open(root / f"{executable.name}.pid", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            pid = int(file.read(16))
        # The chroot is the VMM's to write: the number has to be one of a process of this VM.
        if spec.mark.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    return None


def _hint(message: str, spec: VmSpec) -> str:
    """Return what to do about a failed start."""
    lower = message.lower()
    if "kvm" in lower and ("permission" in lower or "os error 13" in lower):
        return "no access to /dev/kvm: join its group (`sudo usermod -aG kvm $USER`), log in again"
    if "kvm" in lower:
        return "KVM is not usable here: see `banger doctor`, or take `--vmm qemu`"
    return f"its log: {spec.vmm_log}; check the host with `banger doctor`"
