"""VM rows: the durable intent and facts of every VM."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, fields, replace
from typing import Any

from banger.errors import Conflict, NotFound, nearest
from banger.host.process import ProcessIdentity
from banger.store.database import Database


@dataclass(frozen=True, slots=True)
class VmRow:
    """One row of `vms`; see migrations for the meaning of each column."""

    id: str
    name: str
    state: str
    image: str
    kernel: str
    vcpu: int
    memory_bytes: int
    disk_size_bytes: int
    vmm: str
    network: str
    machine_id: str
    mac: str
    created_at: str
    state_reason: str = ""
    owner_pid: int | None = None
    owner_start: int | None = None
    running_vmm: str | None = None
    accel: str | None = None
    accel_reason: str = ""
    boot_id: str | None = None
    pid: int | None = None
    pid_start: int | None = None
    started_at: str | None = None
    nat: bool = True
    isolated: bool = True
    publish: str = ""
    address: str | None = None
    tap: str | None = None
    jail_uid: int | None = None
    with_sshd: bool = False
    credentials: bool = True
    synced: str = "[]"

    @property
    def process(self) -> ProcessIdentity | None:
        """The VMM process on record, if any."""
        if self.pid is None or self.pid_start is None or self.boot_id is None:
            return None
        return ProcessIdentity(boot_id=self.boot_id, pid=self.pid, start_ticks=self.pid_start)

    def without_process(self, state: str, reason: str) -> VmRow:
        """Return this row in a state that has no VMM."""
        return replace(
            self,
            state=state,
            state_reason=reason,
            running_vmm=None,
            accel=None,
            accel_reason="",
            boot_id=None,
            pid=None,
            pid_start=None,
            started_at=None,
            tap=None,
        )


_COLUMNS = tuple(field.name for field in fields(VmRow))


class VmRepository:
    """Reads and writes VM rows."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def insert(self, row: VmRow) -> None:
        """Add a row; raise Conflict when the name is taken."""
        names = ", ".join(_COLUMNS)
        marks = ", ".join("?" for _ in _COLUMNS)
        try:
            await self._database.transact(
                lambda db: db.execute(
                    f"INSERT INTO vms ({names}) VALUES ({marks})",  # noqa: S608 - our own names
                    tuple(getattr(row, name) for name in _COLUMNS),
                )
            )
        except sqlite3.IntegrityError as error:
            raise name_taken(row.name) from error

    async def update(self, row: VmRow) -> VmRow:
        """Write a row back whole and return it; raise Conflict when its new name is taken."""
        marks = ", ".join(f"{name} = ?" for name in _COLUMNS)
        try:
            await self._database.transact(
                lambda db: db.execute(
                    f"UPDATE vms SET {marks} WHERE id = ?",  # noqa: S608 - our own names
                    (*(getattr(row, name) for name in _COLUMNS), row.id),
                )
            )
        except sqlite3.IntegrityError as error:
            raise name_taken(row.name) from error
        return row

    async def delete(self, vm_id: str) -> None:
        """Remove a row; absent is fine."""
        await self._database.transact(
            lambda db: db.execute("DELETE FROM vms WHERE id = ?", (vm_id,))
        )

    async def all(self) -> list[VmRow]:
        """Return every row, oldest first."""
        rows = await self._database.transact(
            lambda db: db.execute("SELECT * FROM vms ORDER BY created_at, id").fetchall()
        )
        return [_row(dict(row)) for row in rows]

    async def find(self, name_or_id: str) -> VmRow:
        """Return the VM with this name or id; raise NotFound with the nearest name."""
        rows = await self.all()
        for row in rows:
            if name_or_id in (row.name, row.id):
                return row
        close = nearest(name_or_id, [row.name for row in rows])
        raise NotFound(
            f"no VM is named {name_or_id!r}",
            hint=f"did you mean {close}?" if close else "see `banger vm list`",
        )


def _row(columns: dict[str, Any]) -> VmRow:
    # SQLite has no booleans.
    booleans = {
        name: bool(columns[name]) for name in ("nat", "isolated", "with_sshd", "credentials")
    }
    return VmRow(**{**columns, **booleans})


def name_taken(name: str) -> Conflict:
    """Return the error for a name that another VM has."""
    return Conflict(
        f"a VM named {name} exists already",
        hint=f"enter it with `banger vm ssh {name}`, delete it with `banger vm delete {name}`, "
        "or choose another --name",
    )
