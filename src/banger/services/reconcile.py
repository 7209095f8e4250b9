"""Start-up after anything: what is on record and what exists are made to agree.

Both ways: rows whose step was cut off are rolled back or carried on, and processes,
directories and sockets whose id nobody owns are removed.
"""

from __future__ import annotations

import asyncio
import logging

from banger.host import files
from banger.host.process import find_by_argument
from banger.services.vms import VmService
from banger.store.layout import Layout
from banger.store.vms import VmRepository
from banger.vmm.base import PROCESS_MARK

log = logging.getLogger(__name__)


async def reconcile(rows: VmRepository, vms: VmService, layout: Layout) -> None:
    """Bring database, processes and files together; the caller holds the daemon's lock."""
    known = await rows.all()
    recorded = {row.pid for row in known if row.process is not None and row.process.alive()}
    # Our own runtime directory in the command line tells our VMMs from another HOME's.
    for process in find_by_argument(f"{layout.runtime_vms}/"):
        if process.pid not in recorded and _is_vmm(process.pid):
            log.warning("ending a VMM that no VM owns: pid %d", process.pid)
            process.kill()
            await process.wait()
    for row in known:
        if row.state in ("creating", "deleting"):
            log.info("%s was %s: deleting it", row.name, row.state, extra={"vm": row.id})
            await vms.finish_delete(row)
        elif row.state == "stopped":
            await vms.readopt_stopped(row)
        else:
            await vms.readopt(row)
    owned = {row.id for row in await rows.all()}
    for directory in (layout.vms, layout.runtime_vms):
        for entry in directory.iterdir() if directory.exists() else ():
            if entry.name not in owned:
                log.warning("removing %s, which no VM owns", entry)
                await asyncio.to_thread(files.remove_tree, entry)


def _is_vmm(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return PROCESS_MARK.encode() in file.read()
    except OSError:
        return False
