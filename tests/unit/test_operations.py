"""Operations end once, tell everybody, and leave nothing behind when cancelled."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from banger.errors import InvalidInput, NotFound
from banger.events import EventSink, NullSink
from banger.host.tasks import together
from banger.services.operations import Operation, OperationManager, SharedSteps


async def _events(operation: Operation) -> list[dict[str, Any]]:
    return [dict(event) async for event in operation.follow()]


async def test_followers_get_every_event_from_first_to_last_however_late_they_come() -> None:
    manager = OperationManager()

    async def step(sink: Operation) -> str:
        sink.stage("one")
        await asyncio.sleep(0)
        sink.stage("two")
        return "made"

    operation = manager.start("test", "it", step)
    early = await _events(operation)
    late = await _events(operation)
    expected = [
        {"type": "stage", "stage": "one"},
        {"type": "stage", "stage": "two"},
        {"type": "result", "result": "made"},
    ]
    assert expected == early == late
    assert operation.status == "done"


async def test_a_designed_error_is_the_last_event() -> None:
    async def step(_: Operation) -> None:
        raise InvalidInput("no such size", hint="use --memory 2G")

    operation = OperationManager().start("test", "it", step)
    error = {"code": "invalid_input", "message": "no such size", "hint": "use --memory 2G"}
    assert await _events(operation) == [{"type": "error", "error": error}]
    assert operation.wire()["error"] == error


async def test_a_programmers_error_ends_the_stream_too() -> None:
    async def step(_: Operation) -> None:
        raise KeyError("oops")

    (last,) = await _events(OperationManager().start("test", "it", step))
    assert last["error"]["code"] == "internal"


async def test_cancel_waits_for_the_sweep() -> None:
    swept = asyncio.Event()
    manager = OperationManager()

    async def step(_: Operation) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            swept.set()

    operation = manager.start("test", "it", step)
    await asyncio.sleep(0)
    manager.cancel(operation)
    (last,) = await _events(operation)
    assert last["error"]["code"] == "cancelled"
    assert swept.is_set()
    assert manager.running == 0


def test_an_unknown_operation_is_not_found() -> None:
    with pytest.raises(NotFound):
        OperationManager().find("nothing")


class _Sink(NullSink):
    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, stage: str) -> None:
        self.stages.append(stage)


async def test_the_first_failure_of_steps_side_by_side_ends_the_others_before_it_is_told() -> None:
    swept = False

    async def long() -> None:
        nonlocal swept
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            swept = True

    async def bad() -> None:
        await asyncio.sleep(0)
        raise InvalidInput("no")

    with pytest.raises(InvalidInput):
        await together(long(), bad())
    assert swept


async def test_equal_steps_run_once_and_share_progress_and_result() -> None:
    steps = SharedSteps()
    runs = 0
    go = asyncio.Event()

    async def step(sink: EventSink) -> int:
        nonlocal runs
        runs += 1
        sink.stage("begun")
        await go.wait()
        sink.stage("ended")
        return runs

    sinks = [_Sink(), _Sink()]
    tasks = [asyncio.create_task(steps.run("key", sink, step)) for sink in sinks]
    await asyncio.sleep(0.01)
    go.set()
    assert await asyncio.gather(*tasks) == [1, 1]
    assert [sink.stages for sink in sinks] == [["begun", "ended"]] * 2


async def test_a_shared_step_ends_only_when_its_last_caller_leaves() -> None:
    steps = SharedSteps()
    ended = False

    async def step(_: EventSink) -> None:
        nonlocal ended
        try:
            await asyncio.sleep(60)
        finally:
            ended = True

    first = asyncio.create_task(steps.run("key", _Sink(), step))
    second = asyncio.create_task(steps.run("key", _Sink(), step))
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert not ended
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert ended


async def test_a_failed_shared_step_can_be_tried_again() -> None:
    steps = SharedSteps()

    async def bad(_: EventSink) -> None:
        raise InvalidInput("no")

    async def good(_: EventSink) -> str:
        return "yes"

    with pytest.raises(InvalidInput):
        await steps.run("key", _Sink(), bad)
    assert await steps.run("key", _Sink(), good) == "yes"
