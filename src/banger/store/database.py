"""The SQLite file: opening, checking, migrating, and one thread that touches it.

Owns the connection and its pragmas; `store.vms` owns the statements.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import TypeVar

from banger.errors import Corrupted, NoSpace

T = TypeVar("T")


class Database:
    """One connection on one thread. Every call is a transaction: it commits whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")
        self._connection: sqlite3.Connection | None = None

    async def open(self) -> None:
        """Open, check and migrate the file, making it when absent.

        Raises Corrupted when it does not read, or is of a newer banger.
        """
        await self._on_thread(self._open)

    async def close(self) -> None:
        """Close the connection and end the thread; closed already is fine."""
        if self._connection is not None:
            await self._on_thread(self._close)
        self._thread.shutdown()

    async def transact(self, step: Callable[[sqlite3.Connection], T]) -> T:
        """Run `step` inside one transaction and return its result."""

        def run() -> T:
            connection = self._connection
            if connection is None:
                raise RuntimeError("the database is not open")
            try:
                with connection:
                    connection.execute("BEGIN IMMEDIATE")
                    return step(connection)
            except sqlite3.IntegrityError:
                raise  # a taken name: the caller knows what it means
            except sqlite3.OperationalError as error:
                if "full" in str(error) or "disk I/O" in str(error):
                    raise NoSpace(
                        f"no space left for the database {self.path}",
                        hint="free some with `banger vm prune` or `df -h`",
                    ) from error
                raise
            except sqlite3.DatabaseError as error:
                raise self._corrupted(str(error)) from error

        return await self._on_thread(run)

    async def _on_thread(self, step: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, step)

    def _open(self) -> None:
        try:
            # autocommit: `transact` says BEGIN itself.
            connection = sqlite3.connect(
                self.path, isolation_level=None, timeout=5, check_same_thread=False
            )
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = FULL")
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise self._corrupted(verdict)
            self._migrate(connection)
        except sqlite3.DatabaseError as error:
            raise self._corrupted(str(error)) from error
        self.path.chmod(0o600)
        self._connection = connection

    def _migrate(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        steps = migrations()
        if version > len(steps):
            raise Corrupted(
                f"the database {self.path} is of a newer banger: schema {version}, "
                f"known {len(steps)}",
                hint="install that banger again, or move the file away",
            )
        for number, script in enumerate(steps[version:], start=version + 1):
            connection.executescript(f"BEGIN;\n{script}\nPRAGMA user_version = {number};\nCOMMIT;")

    def _corrupted(self, detail: str) -> Corrupted:
        return Corrupted(
            f"the database {self.path} is damaged: {detail}",
            hint=f"move it away (`mv {self.path} {self.path}.damaged`); images and VM disks stay, "
            "VMs in it have to be made again",
        )

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def migrations() -> list[str]:
    """Return the migration scripts in order; the n-th leads to schema version n."""
    folder = resources.files("banger.store") / "migrations"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".sql"))
    return [(folder / name).read_text() for name in names]
