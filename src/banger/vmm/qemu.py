"""QEMU's microvm machine, with KVM or by software emulation.

Owns QEMU's command line and QMP. Agent streams are a pool of virtio-serial ports, each with
its own Unix socket: unlike vhost-vsock they need no device node, and unlike an AF_VSOCK
address no other local user can connect to them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
from pathlib import Path

from banger.errors import VmmFailed
from banger.guest.transport import Endpoint, VirtioSerial
from banger.host.commands import HostCommands
from banger.host.files import last_lines
from banger.host.process import ProcessIdentity
from banger.network.usermode import start_passt
from banger.vmm.base import NetworkSpec, VmmCapabilities, VmSpec, check_socket_path
from banger.vmm.children import Children

# Streams at once. Each port costs the guest 4 MiB of buffers (seen: 30 ports take 95 MiB more
# than 8), and the 13th stream only waits for a free one.
STREAM_PORTS = 12
# QEMU opens its sockets within 0.1-0.5 s here; a busy host has been seen to take 5 s.
_START_TIMEOUT_S = 30.0
_QMP_TIMEOUT_S = 10.0


class Qemu:
    """The QEMU adapter."""

    name = "qemu"
    capabilities = VmmCapabilities(
        snapshots=False, accelerators=("kvm", "tcg"), drives_by_serial=True
    )

    def __init__(self, commands: HostCommands, binary: str = "qemu-system-x86_64") -> None:
        self._commands = commands
        self._binary = binary
        self._children = Children(commands)

    def endpoint(self, runtime: Path) -> Endpoint:
        """Return the VM's pool of virtio-serial ports."""
        return VirtioSerial(directory=str(runtime), ports=STREAM_PORTS)

    def check(self) -> None:
        """Raise Unavailable when QEMU is not installed."""
        self._commands.need(self._binary)

    async def start(self, spec: VmSpec) -> ProcessIdentity:
        """Start QEMU and wait for its QMP socket; see `Vmm.start`."""
        check_socket_path(spec.runtime / "qmp.sock")
        for stale in spec.runtime.glob("*.sock"):
            stale.unlink()
        ours, qemus = _user_network(spec)
        console = self._children.open_console(spec.console_log)
        try:
            if ours is not None:
                await start_passt(self._commands, ours.fileno())
            child = await self._children.spawn(
                [
                    self._commands.need(self._binary),
                    *command_line(spec, None if qemus is None else qemus.fileno()),
                ],
                log=spec.vmm_log,
                stdout=console,
                pass_fds=() if qemus is None else (qemus.fileno(),),
            )
        finally:
            os.close(console)
            # passt ends when QEMU's end is the last one closed.
            for end in (ours, qemus):
                if end is not None:
                    end.close()
        process = ProcessIdentity.of(child.pid)
        try:
            await self._wait_for_qmp(spec, child)
        except BaseException:
            await self._children.end(child)
            raise
        if process is None:
            raise VmmFailed(f"QEMU ended at once: {last_lines(spec.vmm_log)}")
        return process

    async def adopt(self, runtime: Path, process: ProcessIdentity) -> bool:
        """Tell whether QEMU still runs and answers QMP."""
        if not process.alive():
            return False
        try:
            await self._execute(runtime, "query-status")
        except VmmFailed:
            return False
        return True

    async def pause(self, runtime: Path) -> None:
        """Stop the vCPUs."""
        await self._execute(runtime, "stop")

    async def resume(self, runtime: Path) -> None:
        """Let the vCPUs go on."""
        await self._execute(runtime, "cont")

    async def kill(self, process: ProcessIdentity) -> None:
        """SIGKILL, and wait until it is gone."""
        await self._children.kill(process)

    async def sweep(self, vm_id: str, runtime: Path, directory: Path) -> None:
        """Nothing: all that QEMU makes stands in `runtime`, and passt ends with it."""

    async def _wait_for_qmp(self, spec: VmSpec, child: subprocess.Popen[bytes]) -> None:
        deadline = asyncio.get_running_loop().time() + _START_TIMEOUT_S
        socket = spec.runtime / "qmp.sock"
        while True:
            if child.poll() is not None:
                raise VmmFailed(
                    f"QEMU ended with status {child.returncode}: {last_lines(spec.vmm_log)}",
                    hint=f"its log: {spec.vmm_log}; check the host with `banger doctor`",
                )
            if socket.exists():
                # QMP is the last thing QEMU sets up before it runs the machine.
                with contextlib.suppress(VmmFailed):
                    await self._execute(spec.runtime, "query-status")
                    return
            if asyncio.get_running_loop().time() > deadline:
                raise VmmFailed(
                    f"QEMU did not answer within {_START_TIMEOUT_S:.0f} s: "
                    f"{last_lines(spec.vmm_log)}",
                    hint=f"its log: {spec.vmm_log}",
                )
            await asyncio.sleep(0.01)

    async def _execute(self, runtime: Path, command: str) -> object:
        from qemu.qmp import QMPClient, QMPError

        client = QMPClient("banger")
        client.logger.disabled = True  # a refused connection is an answer here, not an error
        try:
            async with asyncio.timeout(_QMP_TIMEOUT_S):
                await client.connect(str(runtime / "qmp.sock"))
                try:
                    return await client.execute(command)
                finally:
                    await client.disconnect()
        except (TimeoutError, OSError, EOFError, QMPError) as error:
            raise VmmFailed(f"QEMU did not do {command!r}: {error or 'no answer'}") from error


def _user_network(spec: VmSpec) -> tuple[socket.socket | None, socket.socket | None]:
    """Return passt's and QEMU's ends of a socket where the VM is on the user network."""
    if spec.network is None or spec.network.tap is not None:
        return None, None
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def command_line(spec: VmSpec, network_fd: int | None = None) -> list[str]:
    """Return QEMU's arguments for a VM; `network_fd` leads to passt."""
    runtime = str(spec.runtime)
    arguments = [
        # The id stands in the command line, so that a crash's orphans can be found by it.
        *("-name", f"guest={spec.mark}"),
        *("-machine", "microvm,rtc=on,pic=off,pit=off,isa-serial=on,auto-kernel-cmdline=off"),
        *("-accel", "kvm" if spec.accel == "kvm" else "tcg,thread=multi,tb-size=256"),
        *("-cpu", "host" if spec.accel == "kvm" else "max"),
        *("-smp", str(spec.vcpu)),
        *("-m", f"{spec.memory_bytes >> 20}M"),
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        *("-display", "none"),
        *(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        ),
        *("-kernel", str(spec.kernel)),
        *("-initrd", str(spec.initramfs)),
        *("-append", spec.command_line),
        *("-chardev", "stdio,id=console,signal=off"),
        *("-serial", "chardev:console"),
        *("-chardev", f"socket,id=qmp,path={_escape(runtime)}/qmp.sock,server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
        *("-device", "virtio-rng-device"),
        *_disk("base", spec.base_disk, read_only=True),
        *_disk("own", spec.own_disk, read_only=False),
        *_disk("mods", spec.modules_disk, read_only=True),
        *("-device", f"virtio-serial-device,max_ports={STREAM_PORTS + 1}"),
    ]
    for port in range(STREAM_PORTS):
        path = f"{_escape(runtime)}/p{port:02d}"
        arguments += [
            *("-chardev", f"socket,id=s{port},path={path},server=on,wait=off"),
            *("-device", f"virtserialport,chardev=s{port},name=banger.{port},nr={port + 1}"),
        ]
    if spec.network is not None:
        arguments += [
            *("-netdev", _netdev(spec.network, network_fd)),
            *("-device", f"virtio-net-device,netdev=net0,mac={spec.network.mac}"),
        ]
    return arguments


def _netdev(network: NetworkSpec, fd: int | None) -> str:
    if network.tap is not None:
        return f"tap,id=net0,ifname={network.tap},script=no,downscript=no"
    return f"stream,id=net0,server=off,addr.type=fd,addr.str={fd}"


def _disk(role: str, path: Path, *, read_only: bool) -> list[str]:
    node = {
        "driver": "raw",
        "node-name": role,
        "read-only": read_only,
        "discard": "unmap",
        "file": {"driver": "file", "filename": str(path), "read-only": read_only},
    }
    return [
        *("-blockdev", json.dumps(node)),
        # The guest finds a disk by its serial: the order of mmio slots is the kernel's affair.
        *("-device", f"virtio-blk-device,drive={role},serial=banger-{role}"),
    ]


def _escape(value: str) -> str:
    """Double commas: that is how a value says one in QEMU's option syntax."""
    return value.replace(",", ",,")
