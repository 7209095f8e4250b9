"""Progress of long steps on stderr, and Ctrl-C on its way to the daemon.

A terminal gets one line that is rewritten (stage, bytes, elapsed), anything else gets one
plain line per stage, `--json` gets the events themselves, `--quiet` gets warnings only.
"""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from banger.cli import output
from banger.errors import BangerError, Cancelled

if TYPE_CHECKING:
    from banger.api.models import Operation, OperationEvent
    from banger.client.api import Client

_TICK_S = 0.2
_KEPT_STAGE_S = 3.0  # a stage that took this long leaves its line on the terminal
_PLAIN_EVERY_S = 15.0  # without a terminal, bytes are told this often


class Progress:
    """Shows stages, bytes and warnings; an EventSink and a context manager.

    `prefix` names the subject when several steps run side by side.
    """

    def __init__(self, *, quiet: bool = False, json_lines: bool = False, prefix: str = "") -> None:
        self.quiet = quiet
        self._json = json_lines
        self._plain = not quiet and not json_lines
        self._live = self._plain and output.is_terminal(sys.stderr) and output.wants_live()
        self._prefix = f"{prefix}: " if prefix else ""
        self._stage = ""
        self._stage_at = 0.0
        self._told_at = 0.0
        self._bytes = (0, 0)
        self._ticker: _Ticker | None = None
        self._guard: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self._live:
            import threading  # the ticker and the reader of events share the line

            self._guard = threading.RLock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def stage(self, stage: str) -> None:
        """Begin a stage."""
        if self._json:
            output.write_json_line({"type": "stage", "stage": stage}, sys.stderr)
        if not self._plain or stage == self._stage:
            return
        with self._guard:
            self._leave_stage()
            self._stage = stage
            self._stage_at = self._told_at = time.monotonic()
            self._bytes = (0, 0)
        if self._live:
            if self._ticker is None:
                self._ticker = _Ticker(self)
            self.draw()
        else:
            output.notice(f"{self._prefix}{stage}")

    def progress(self, done_bytes: int, total_bytes: int = 0) -> None:
        """Tell bytes of the current stage."""
        self._bytes = (done_bytes, total_bytes)
        now = time.monotonic()
        if self._plain and not self._live and now - self._told_at >= _PLAIN_EVERY_S:
            self._told_at = now
            output.notice(f"{self._prefix}{self._stage}{self._amount()}")

    def warning(self, message: str) -> None:
        """Show a warning above the line."""
        if self._json:
            output.write_json_line({"type": "warning", "message": message}, sys.stderr)
            return
        with self._guard:
            self._erase()
            output.warn(f"{self._prefix}{message}")

    def notice(self, message: str) -> None:
        """Say something above the line."""
        if self._json:
            output.write_json_line({"type": "notice", "message": message}, sys.stderr)
        elif self._plain:
            with self._guard:
                self._erase()
                output.notice(message)

    def handle(self, event: OperationEvent) -> None:
        """Show one event of the wire."""
        kind = event.get("type")
        if kind == "stage":
            self.stage(str(event.get("stage", "")))
        elif kind == "progress":
            if self._json:
                output.write_json_line(event, sys.stderr)
            if event.get("stage") and event["stage"] != self._stage:
                self.stage(event["stage"])
            self.progress(int(event.get("done_bytes", 0)), int(event.get("total_bytes", 0)))
        elif kind == "warning":
            self.warning(str(event.get("message", "")))

    def close(self) -> None:
        """Take the line away."""
        if self._ticker is not None:
            self._ticker.stop()
            self._ticker = None
        self._leave_stage()
        self._stage = ""

    def draw(self) -> None:
        """Rewrite the line (from the ticker's thread, too)."""
        with self._guard:
            if not self._stage:
                return
            stage = output.escape(self._stage)
            text = f"{self._prefix}{stage}{self._amount()}  {self._elapsed()}"
            sys.stderr.write(f"\r\x1b[K{text[: output.terminal_width() - 1]}")
            sys.stderr.flush()

    def _amount(self) -> str:
        done, total = self._bytes
        if not done:
            return ""
        if total:
            return f"  {output.format_bytes(done)} of {output.format_bytes(total)}"
        return f"  {output.format_bytes(done)}"

    def _elapsed(self) -> str:
        return output.format_duration(time.monotonic() - self._stage_at)

    def _erase(self) -> None:
        if self._live and self._stage:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _leave_stage(self) -> None:
        if not self._live or not self._stage:
            return
        self._erase()
        if time.monotonic() - self._stage_at >= _KEPT_STAGE_S:
            output.notice(f"{self._prefix}{self._stage}{self._amount()} ({self._elapsed()})")


class _Ticker:
    """Redraws the line while nothing arrives, so that the seconds go on."""

    def __init__(self, progress: Progress) -> None:
        import threading

        self._progress = progress
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(_TICK_S):
            self._progress.draw()

    def stop(self) -> None:
        """End the redrawing; nothing is drawn after this returns."""
        self._stopped.set()
        self._thread.join(timeout=5)


def follow(client: Client, operation: Operation, progress: Progress) -> Any:
    """Follow an operation to its result.

    Ctrl-C cancels it in the daemon, waits until what it had begun is swept, and raises
    KeyboardInterrupt; a second Ctrl-C leaves at once.
    """
    try:
        return client.wait(operation, progress.handle)
    except KeyboardInterrupt:
        cancel(client, [operation], progress)
        raise


def cancel(client: Client, operations: list[Operation], progress: Progress) -> None:
    """Cancel operations and wait for their ends; errors of theirs are not news any more."""
    progress.stage("cancelling (Ctrl-C again to leave at once)")
    for operation in operations:
        try:
            client.cancel_operation(operation["id"])
            client.wait(operation, lambda _: None)
        except Cancelled:
            continue
        except BangerError:
            continue
