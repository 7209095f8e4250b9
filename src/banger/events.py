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


class NullSink:
    """Drops every event."""

    def stage(self, stage: str) -> None:
        """Drop it."""

    def progress(self, done_bytes: int, total_bytes: int = 0) -> None:
        """Drop it."""

    def warning(self, message: str) -> None:
        """Drop it."""
