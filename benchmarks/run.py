"""`make bench`: every row compares banger with a peer or a limit in one run.

Writes docs/benchmarks.md. Seconds differ between machines and hours; a ratio of two things
measured in turns on one machine is what a budget can hold on to.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from banger.catalog import image_entry
from banger.client.api import Api
from banger.guest import agent, transport
from banger.host.commands import HostCommands
from banger.host.files import allocated_bytes
from banger.services.boot import BootFiles
from banger.store.database import Database
from banger.store.vms import VmRepository
from banger.vmm.qemu import Qemu
from banger.vmm.probe import probe_kvm
from banger.vmm.select import choose_vmm
from tests.support.artifacts import cache_root, need_image, need_kernel
from tests.support.sandbox import Sandbox

ROOT = Path(__file__).parents[1]
IMAGE = "debian-bookworm"
FILES = 10_000


@dataclass(frozen=True)
class Row:
    """One line of the table: what, the two figures, their ratio, the budget and whether it holds."""

    what: str
    ours: str
    peer: str
    ratio: str
    budget: str
    holds: bool


def timed(step: Callable[[], object]) -> float:
    """Return the seconds one call takes."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def in_turns(
    ours: Callable[[], object], peer: Callable[[], object], rounds: int
) -> tuple[float, float]:
    """Return the median seconds of two things measured turn by turn, so that both see one host."""
    both = [(timed(ours), timed(peer)) for _ in range(rounds)]
    return statistics.median(o for o, _ in both), statistics.median(p for _, p in both)


def at_most(what: str, ours_s: float, peer: str, peer_s: float, limit: float) -> Row:
    """Return a row whose budget is `ours <= limit x peer`."""
    ratio = ours_s / peer_s
    return Row(what, _ms(ours_s), f"{peer}: {_ms(peer_s)}", f"{ratio:.2f}x", f"<= {limit:g}x",
               ratio <= limit)  # fmt: skip


def faster(what: str, ours_s: float, peer: str, peer_s: float, times: float) -> Row:
    """Return a row whose budget is `peer >= times x ours`."""
    ratio = peer_s / ours_s
    return Row(what, _ms(ours_s), f"{peer}: {_ms(peer_s)}", f"{ratio:.1f}x faster",
               f">= {times:g}x faster", ratio >= times)  # fmt: skip


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"


def cli_rows(user: Sandbox) -> Iterator[Row]:
    """Start of the command line against a bare interpreter."""
    bare = [sys.executable, "-c", "pass"]

    def run(argv: list[str]) -> Callable[[], object]:
        return lambda: subprocess.run(argv, env=user.environment, check=True, capture_output=True)

    script = shutil.which("banger", path=user.environment["PATH"]) or ""
    user.ok("vm", "list")
    for words, limit in ((["version"], 3.0), (["vm", "list"], 5.0)):
        ours, peer = in_turns(run([script, *words]), run(bare), 30)
        yield at_most(f"`banger {' '.join(words)}`", ours, "`python3 -c pass`", peer, limit)


def create_rows(user: Sandbox) -> Iterator[Row]:
    """A VM without start: daemon time and disk."""
    api = Api.connect(user.layout) if hasattr(Api, "connect") else None
    del api
    user.ok("vm", "create", "--no-start", "--name", "warm-up", "--image", IMAGE)
    spent = []
    for number in range(5):
        begin = time.perf_counter()
        operation = _post(user, "/v1/vms", {"name": f"bench-{number}", "image": IMAGE})
        for _ in _follow(user, operation["id"]):
            pass
        spent.append(time.perf_counter() - begin)
    median = statistics.median(spent)
    yield Row("VM create without start, asked and answered over HTTP", _ms(median), "limit", "",
              "<= 50 ms", median <= 0.050)  # fmt: skip
    directory = Path(user.json("vm", "show", "bench-0")["directory"])
    used = allocated_bytes(directory)
    yield Row("its disk and boot files", f"{used / 2**20:.2f} MiB", "limit", "", "<= 2 MiB",
              used <= 2 << 20)  # fmt: skip
    user.ok("vm", "delete", "warm-up", *(f"bench-{n}" for n in range(5)))


def _post(user: Sandbox, path: str, body: dict[str, object]) -> dict[str, str]:
    from banger.client.connection import request  # the command line's own

    return request(str(user.layout.api_socket), "POST", path, body).body  # type: ignore[no-any-return]


def _follow(user: Sandbox, operation: str) -> Iterator[object]:
    from banger.client.connection import stream

    yield from stream(str(user.layout.api_socket), f"/v1/operations/{operation}/events")
