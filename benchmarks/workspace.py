"""What `vm workspace prepare` costs: ten thousand files in, and one of them changed.

The guest is a running VM; the time is of the work itself, without an interpreter's start.
"""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

from banger.guest import agent
from banger.guest.transport import Endpoint
from banger.services import workspace_sync, workspaces
from banger.services.guest_paths import Target
from benchmarks.table import Row, faster, timed

FILES = 10_000
_GUEST = "/root/bench-sync"
_ROUNDS = 3


def make_repository(directory: Path, files: int = FILES) -> Path:
    """Make a git repository with that many small files, all committed; return it."""
    directory.mkdir()
    for number in range(files):
        folder = directory / f"d{number % 100:02d}"
        folder.mkdir(exist_ok=True)
        (folder / f"file-{number}.txt").write_bytes(b"x" * (200 + number % 3000))
    git = ["git", "-c", "user.name=B", "-c", "user.email=b@example.org", "-C", str(directory)]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "many"]):
        subprocess.run([*git, *words], check=True)
    return directory


def sync_rows(endpoint: Endpoint, repo: Path, files: int = FILES) -> Iterator[Row]:
    """One file changed of many, against the first copy of all of them."""
    workspace = workspaces.open_workspace(str(repo))._replace(directory=_GUEST)
    target = Target("bench", endpoint, workspace)
    first, again, unchanged = [], [], []

    def run(sent: int) -> None:
        assert workspace_sync.bring_up_to_date(target).sent == sent

    for number in range(_ROUNDS):
        agent.capture_exec(endpoint, [b"rm", b"-rf", _GUEST.encode()], timeout_s=300)
        first.append(timed(lambda: run(files)))
        (repo / "d01" / "file-1.txt").write_text(f"changed {number}\n")
        again.append(timed(lambda: run(1)))
        unchanged.append(timed(lambda: run(0)))
    whole = statistics.median(first)
    yield faster(
        f"workspace prepare, 1 of {files} files changed", statistics.median(again),
        "the first prepare", whole, 20,
    )  # fmt: skip
    yield faster(
        "workspace prepare, nothing changed", statistics.median(unchanged),
        "the first prepare", whole, 20,
    )  # fmt: skip
