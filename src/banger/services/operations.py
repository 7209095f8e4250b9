"""Long steps: run in the background, followed by any number, cancelled on request.

Owns the tasks and their events, in memory: what a step must not lose is in the database and
on disk, and start-up reconciles those. Knows neither HTTP nor what a step does.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from typing import Any, TypeVar

from banger.api.models import ErrorBody, OperationEvent
from banger.api.models import Operation as OperationWire
from banger.errors import BangerError, Cancelled, NotFound
from banger.events import EventSink

log = logging.getLogger(__name__)

_KEPT_FINISHED = 64
_PROGRESS_INTERVAL_S = 0.1
# A reader that waits longer gets a heartbeat, so that a dead connection shows on either side.
_HEARTBEAT_S = 10.0

T = TypeVar("T")
Step = Callable[["Operation"], Awaitable[Any]]


class Operation:
    """One running or finished step; it is its own EventSink."""

    def __init__(self, kind: str, subject: str) -> None:
        self.id = secrets.token_hex(8)
        self.kind = kind
        self.subject = subject
        self.started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self.status = "running"
        self.error: ErrorBody | None = None
        self.events: list[OperationEvent] = []
        self.task: asyncio.Task[None] | None = None
        self._stage = ""
        self._changed = asyncio.Event()
        self._last_progress = 0.0

    def stage(self, stage: str) -> None:
        """Report that a named stage begins."""
        self._stage = stage
        self._last_progress = 0.0
        self._add({"type": "stage", "stage": stage})

    def progress(self, done_bytes: int, total_bytes: int = 0) -> None:
        """Report bytes done; at most ten a second are kept."""
        now = time.monotonic()
        finished = total_bytes and done_bytes >= total_bytes
        if now - self._last_progress < _PROGRESS_INTERVAL_S and not finished:
            return
        self._last_progress = now
        self._add(
            {
                "type": "progress",
                "stage": self._stage,
                "done_bytes": done_bytes,
                "total_bytes": total_bytes,
            }
        )

    def warning(self, message: str) -> None:
        """Report something that does not stop the step."""
        log.warning(message, extra={"operation": self.id})
        self._add({"type": "warning", "message": message})

    def finish(self, status: str, event: OperationEvent) -> None:
        """Record the end; nothing comes after it."""
        self.status = status
        self.error = event.get("error")
        self._add(event)

    def wire(self) -> OperationWire:
        """Return the shape that travels."""
        return {
            "id": self.id,
            "kind": self.kind,
            "subject": self.subject,
            "status": self.status,  # type: ignore[typeddict-item]  # one of the four by finish()
            "started_at": self.started_at,
            "stage": self._stage,
            "error": self.error,
        }

    async def follow(self) -> AsyncIterator[OperationEvent]:
        """Yield every event from the first to the last, and heartbeats while nothing happens."""
        position = 0
        while True:
            changed = self._changed
            while position < len(self.events):
                yield self.events[position]
                position += 1
            if self.status != "running":
                return
            try:
                async with asyncio.timeout(_HEARTBEAT_S):
                    await changed.wait()
            except TimeoutError:
                yield {"type": "heartbeat"}

    def _add(self, event: OperationEvent) -> None:
        self.events.append(event)
        # Wake every follower, and give those that come later a fresh bell.
        self._changed.set()
        self._changed = asyncio.Event()


class OperationManager:
    """Starts steps, and keeps the last finished ones for late readers."""

    def __init__(self) -> None:
        self._operations: OrderedDict[str, Operation] = OrderedDict()

    def start(self, kind: str, subject: str, step: Step) -> Operation:
        """Run `step` in the background."""
        operation = Operation(kind, subject)
        self._operations[operation.id] = operation
        operation.task = asyncio.create_task(self._run(operation, step))
        return operation

    def find(self, operation_id: str) -> Operation:
        """Return an operation; raise NotFound."""
        try:
            return self._operations[operation_id]
        except KeyError:
            raise NotFound(
                f"no operation has the id {operation_id!r}",
                hint="the daemon may have been restarted; look with `banger vm list`",
            ) from None

    def all(self) -> list[Operation]:
        """Return the operations known, oldest first."""
        return list(self._operations.values())

    @property
    def running(self) -> int:
        """How many run now."""
        return sum(op.status == "running" for op in self._operations.values())

    def cancel(self, operation: Operation) -> None:
        """Ask a step to end; it sweeps what it began, then its last event is an error."""
        if operation.task is not None:
            operation.task.cancel()

    async def close(self) -> None:
        """Cancel what runs and wait until it has swept."""
        tasks = [op.task for op in self._operations.values() if op.task and not op.task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, operation: Operation, step: Step) -> None:
        extra = {"operation": operation.id}
        log.info("%s %s begins", operation.kind, operation.subject, extra=extra)
        status, event = await _outcome(operation, step)
        operation.finish(status, event)
        # Who asked may be gone when somebody looks into it: the log says why.
        why = event["error"]["message"] if event["type"] == "error" else status
        log.info("%s %s: %s", operation.kind, operation.subject, why, extra=extra)
        finished = [op.id for op in self._operations.values() if op.status != "running"]
        for old in finished[:-_KEPT_FINISHED]:
            del self._operations[old]


class SharedSteps:
    """Joins equal steps: the second caller of a key gets the first one's progress and result.

    The step ends early only when every caller was cancelled.
    """

    def __init__(self) -> None:
        self._running: dict[str, tuple[asyncio.Task[Any], _Broadcast]] = {}

    async def run(
        self, key: str, sink: EventSink, step: Callable[[EventSink], Coroutine[Any, Any, T]]
    ) -> T:
        """Run `step` under `key`, or wait for the one that runs under it."""
        if key not in self._running:
            broadcast = _Broadcast()
            task: asyncio.Task[Any] = asyncio.create_task(step(broadcast))
            self._running[key] = (task, broadcast)
            task.add_done_callback(lambda _: self._running.pop(key, None))
        task, broadcast = self._running[key]
        broadcast.join(sink)
        try:
            result: T = await asyncio.shield(task)
            return result
        except asyncio.CancelledError:
            if len(broadcast.sinks) == 1 and not task.done():
                task.cancel()
                await asyncio.wait([task])  # what it staged is swept before we answer
            raise
        finally:
            broadcast.sinks.remove(sink)


class _Broadcast:
    """An EventSink that repeats to every sink that joined, from the current stage on."""

    def __init__(self) -> None:
        self.sinks: list[EventSink] = []
        self._stage = ""

    def join(self, sink: EventSink) -> None:
        self.sinks.append(sink)
        if self._stage:
            sink.stage(self._stage)

    def stage(self, stage: str) -> None:
        self._stage = stage
        for sink in self.sinks:
            sink.stage(stage)

    def progress(self, done_bytes: int, total_bytes: int = 0) -> None:
        for sink in self.sinks:
            sink.progress(done_bytes, total_bytes)

    def warning(self, message: str) -> None:
        for sink in self.sinks:
            sink.warning(message)


async def _outcome(operation: Operation, step: Step) -> tuple[str, OperationEvent]:
    try:
        return "done", {"type": "result", "result": await step(operation)}
    except asyncio.CancelledError:
        error: BangerError = Cancelled(f"{operation.kind} {operation.subject} was cancelled")
        status = "cancelled"
    except BangerError as caught:
        error, status = caught, "failed"
    except Exception as caught:
        # A programmer's error must reach the user as an error, not as a stream without an end.
        log.exception("%s %s failed", operation.kind, operation.subject)
        error = BangerError(
            f"internal error in {operation.kind} {operation.subject}: "
            f"{type(caught).__name__}: {caught}",
            hint="see `banger daemon logs`, and report it",
        )
        status = "failed"
    body: ErrorBody = {"code": error.code, "message": error.message, "hint": error.hint}
    return status, {"type": "error", "error": body}
