"""Start-up after anything: what is on record and what exists are made to agree.

Both ways: rows whose step was cut off are rolled back or carried on, and processes,
directories and sockets whose id nobody owns are removed.
"""

from __future__ import annotations

import asyncio
import logging
import re

from banger.host import files
from banger.host.process import end_all, find_by_argument
from banger.services.networks import NetworkService
from banger.services.vms import VmService
from banger.store.layout import Layout
from banger.store.vms import VmRepository
from banger.vmm.base import PROCESS_MARK, mark_of

log = logging.getLogger(__name__)


async def reconcile(
    rows: VmRepository, vms: VmService, networks: NetworkService, layout: Layout
) -> None:
    """Bring database, processes and files together; the caller holds the daemon's lock."""
    known = await rows.all()
    # A live VM's other processes (pasta, the carrier of its ports) carry the same mark as its VMM.
    alive = {row.id for row in known if row.process is not None and row.process.alive()}
    for process in await asyncio.to_thread(find_by_argument, PROCESS_MARK):
        vm_id = _whose(process.pid, layout)
        if vm_id is not None and vm_id not in alive:
            log.warning("ending a process that no VM owns: pid %d", process.pid)
            await end_all([process])
    for row in known:
        if row.state in ("creating", "deleting"):
            log.info("%s was %s: deleting it", row.name, row.state, extra={"vm": row.id})
            await vms.finish_delete(row)
        elif row.state == "stopped":
            await vms.readopt_stopped(row)
        else:
            await vms.readopt(row)
    await networks.reconcile()
    owned = {row.id for row in await rows.all()}
    for directory in (layout.vms, layout.runtime_vms):
        for entry in directory.iterdir() if directory.exists() else ():
            if entry.name not in owned:
                log.warning("removing %s, which no VM owns", entry)
                await asyncio.to_thread(files.remove_tree, entry)


def _whose(pid: int, layout: Layout) -> str | None:
    """Return the id of the VM of ours that a process is marked with: not one of another HOME."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read()
    except OSError:
        return None
    mark = re.escape(mark_of("ID", layout.vm("ID").runtime)).replace("ID", "([0-9a-f]{12})")
    found = re.search(mark.encode(), words)
    return None if found is None else found[1].decode()
