"""The table of a benchmark: rows that hold ours against a peer or a limit, and their page."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table: what, the two figures, their ratio, the budget, does it hold."""

    what: str
    ours: str
    against: str
    ratio: str
    budget: str
    holds: bool | None


def timed(step: Callable[[], object]) -> float:
    """Return the seconds one call takes."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def in_turns(
    ours: Callable[[], object],
    peer: Callable[[], object],
    rounds: int,
    *,
    clean: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """Return median seconds of two things measured turn by turn, so that both see one host.

    Before each, `clean` removes what the last ones made, and what is left to be written gets to the
    disk: else who writes less waits for who writes more.
    """

    def settled(step: Callable[[], object]) -> float:
        clean()
        os.sync()
        return timed(step)

    both = [(settled(ours), settled(peer)) for _ in range(rounds)]
    return statistics.median(o for o, _ in both), statistics.median(p for _, p in both)


def at_most(what: str, ours_s: float, peer: str, peer_s: float, limit: float) -> Row:
    """Return a row whose budget is `ours <= limit x peer`."""
    ratio = ours_s / peer_s
    against = f"{peer}: {shown_time(peer_s)}"
    return Row(what, shown_time(ours_s), against, f"{ratio:.2f}x", f"<= {limit:g}x", ratio <= limit)


def faster(what: str, ours_s: float, peer: str, peer_s: float, times: float) -> Row:
    """Return a row whose budget is `peer >= times x ours`."""
    ratio = peer_s / ours_s
    against = f"{peer}: {shown_time(peer_s)}"
    budget = f">= {times:g}x faster"
    return Row(what, shown_time(ours_s), against, f"{ratio:.1f}x faster", budget, ratio >= times)


def within(what: str, ours: float, shown: str, limit: float, budget: str) -> Row:
    """Return a row whose budget is an absolute limit."""
    return Row(what, shown, "limit", f"{ours / limit:.2f} of it", budget, ours <= limit)


def shown_time(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def render(title: str, intro: Sequence[str], facts: Sequence[str], found: Sequence[Row]) -> str:
    """Return the page: what it is, facts about the run, and the table."""
    lines = [
        f"# {title}",
        "",
        *intro,
        "",
        *(f"- {fact}" for fact in facts),
        "",
        "| what | ours | against | ratio | budget | holds |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        holds = {True: "yes", False: "**no**", None: ""}[row.holds]
        lines.append(
            f"| {row.what} | {row.ours} | {row.against} | {row.ratio} | {row.budget} | {holds} |"
        )
    return "\n".join(lines) + "\n"
