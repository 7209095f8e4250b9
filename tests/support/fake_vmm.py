"""A VMM without a machine: the real agent as a process on Unix sockets.

It keeps the same contract suite as QEMU (tests/contract/test_vmm.py) and serves tests of what
lies above a VMM. It runs commands on this very host, so it never leaves tests/.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path
from typing import ClassVar

from banger.errors import VmmFailed
from banger.guest.boot import agent_binary
from banger.guest.transport import Endpoint, VirtioSerial
from banger.host.files import last_lines
from banger.host.process import ProcessIdentity, find_by_argument
from banger.vmm.base import VmmCapabilities, VmSpec

_PORTS = 8


class FakeVmm:
    """Runs `banger-agent serve-unix` in place of a VMM."""

    name = "fake"
    capabilities = VmmCapabilities(snapshots=False, accelerators=("tcg",), drives_by_serial=True)

    # Shared by all, as the kernel's own table is: a restarted daemon finds its children here.
    _children: ClassVar[dict[int, subprocess.Popen[bytes]]] = {}

    def endpoint(self, runtime: Path) -> Endpoint:
        """Return its sockets."""
        return VirtioSerial(directory=str(runtime), ports=_PORTS)

    def check(self) -> None:
        """It is always there."""

    async def start(self, spec: VmSpec) -> ProcessIdentity:
        """Start the agent; a missing kernel fails it as it would fail a VMM."""
        for path in (spec.kernel, spec.initramfs, spec.base_disk, spec.own_disk):
            if not path.exists():
                raise VmmFailed(f"cannot open {path}")
        spec.console_log.write_text("fake console\n")
        with open(spec.vmm_log, "ab") as log:
            child = subprocess.Popen(
                [spec.mark, "serve-unix", str(spec.runtime), str(_PORTS)],
                executable=agent_binary(),
                env={**os.environ, "BANGER_AGENT_EXIT_ON_SHUTDOWN": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._children[child.pid] = child
        while not (spec.runtime / f"p{_PORTS - 1:02d}").exists():
            if child.poll() is not None:
                raise VmmFailed(f"the agent ended: {last_lines(spec.vmm_log)}")
            await asyncio.sleep(0.005)
        process = ProcessIdentity.of(child.pid)
        assert process is not None
        return process

    async def adopt(self, runtime: Path, process: ProcessIdentity) -> bool:
        """Tell whether the process runs."""
        return process.alive() and (runtime / "p00").exists()

    async def pause(self, runtime: Path) -> None:
        """Freeze the process that has `runtime` in its command line."""
        self._signal(runtime, signal.SIGSTOP)

    async def resume(self, runtime: Path) -> None:
        """Let it go on."""
        self._signal(runtime, signal.SIGCONT)

    async def kill(self, process: ProcessIdentity) -> None:
        """End it."""
        process.kill()
        child = self._children.pop(process.pid, None)
        if child is not None:
            await asyncio.to_thread(child.wait)
        else:
            await process.wait()

    async def sweep(self, vm_id: str, runtime: Path, directory: Path) -> None:
        """Nothing is left but what is in `runtime`."""

    def _signal(self, runtime: Path, number: signal.Signals) -> None:
        for process in find_by_argument(str(runtime)):
            os.kill(process.pid, number)
