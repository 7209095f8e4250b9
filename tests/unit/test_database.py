"""The database keeps what was committed and says clearly when it cannot be read."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from banger.errors import Conflict, Corrupted, NotFound
from banger.store.database import Database, migrations
from banger.store.vms import VmRepository, VmRow

ROW = VmRow(
    id="0123456789ab",
    name="sandbox",
    state="stopped",
    image="debian-bookworm",
    kernel="generic-6.12",
    vcpu=2,
    memory_bytes=1 << 30,
    disk_size_bytes=1 << 34,
    vmm="auto",
    network="user",
    machine_id="0" * 32,
    mac="02:00:00:00:00:01",
    created_at="2026-01-01T00:00:00+00:00",
)


@pytest.fixture
async def rows(tmp_path: Path) -> AsyncIterator[VmRepository]:
    database = Database(tmp_path / "banger.db")
    await database.open()
    yield VmRepository(database)
    await database.close()


async def test_a_row_reads_back_as_it_was_written(rows: VmRepository) -> None:
    await rows.insert(ROW)
    changed = replace(ROW, state="running", pid=7, pid_start=8, boot_id="b", running_vmm="qemu")
    await rows.update(changed)
    assert await rows.find("sandbox") == changed == await rows.find(ROW.id)


async def test_a_taken_name_is_refused_on_insert_and_on_rename(rows: VmRepository) -> None:
    await rows.insert(ROW)
    with pytest.raises(Conflict, match="sandbox exists"):
        await rows.insert(replace(ROW, id="another"))
    await rows.insert(replace(ROW, id="another", name="other"))
    with pytest.raises(Conflict):
        await rows.update(replace(ROW, id="another"))


async def test_an_unknown_name_suggests_the_nearest(rows: VmRepository) -> None:
    await rows.insert(ROW)
    with pytest.raises(NotFound) as caught:
        await rows.find("sandbx")
    assert caught.value.hint == "did you mean sandbox?"


async def test_a_damaged_file_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "banger.db"
    path.write_bytes(b"this is no database" * 1000)
    with pytest.raises(Corrupted) as caught:
        await Database(path).open()
    assert str(path) in caught.value.message
    assert "mv" in caught.value.hint


async def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "banger.db"
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {len(migrations()) + 1}")
    connection.close()
    with pytest.raises(Corrupted, match="newer banger"):
        await Database(path).open()


async def test_an_interrupted_transaction_leaves_nothing(tmp_path: Path) -> None:
    database = Database(tmp_path / "banger.db")
    await database.open()

    def half(connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM vms")
        raise ZeroDivisionError

    rows = VmRepository(database)
    await rows.insert(ROW)
    with pytest.raises(ZeroDivisionError):
        await database.transact(half)
    assert await rows.all() == [ROW]
    await database.close()
