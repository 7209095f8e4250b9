"""Progress as values: what a long step reports, and to whom.

Owns the event shapes shared by services (producers), operations (fan-out) and the
terminal (rendering). Knows neither HTTP nor a terminal.
"""

from __future__ import annotations

from typing import Protocol, TypedDict


class StageEvent(TypedDict):
    """A named stage began, for example `build image debian-bookworm: install packages`."""

    type: str  # "stage"
    stage: str


class ProgressEvent(TypedDict):
    """Bytes moved inside the current stage; `total_bytes` is 0 when unknown."""

    type: str  # "progress"
    stage: str
    done_bytes: int
    total_bytes: int


class WarningEvent(TypedDict):
    """Something the user should know that does not stop the operation."""

    type: str  # "warning"
    message: str


Event = StageEvent | ProgressEvent | WarningEvent


class EventSink(Protocol):
    """Takes events; must be cheap and must not raise."""

    def stage(self, stage: str) -> None:
        """Report that a named stage begins."""

    def progress(self, done_bytes: int, total_bytes: int = 0) -> None:
        """Report bytes done in the current stage, of `total_bytes` (0: unknown)."""

    def warning(self, message: str) -> None:
        """Report something that does not stop the operation."""


class NamedSink:
    """Puts the name of what is made before each stage: two things may be made at once."""

    def __init__(self, sink: EventSink, name: str) -> None:
        self._sink = sink
        self._name = name

    def stage(self, stage: str) -> None:
        """Repeat it with the name before it."""
        self._sink.stage(f"{self._name}: {stage}")

    def progress(self, done_bytes: int, total_bytes: int = 0) -> None:
        """Repeat it."""
        self._sink.progress(done_bytes, total_bytes)

    def warning(self, message: str) -> None:
        """Repeat it."""
        self._sink.warning(message)


class NullSink:
    """Drops every event."""

    def stage(self, stage: str) -> None:
        """Drop it."""

    def progress(self, done_bytes: int, total_bytes: int = 0) -> None:
        """Drop it."""

    def warning(self, message: str) -> None:
        """Drop it."""
