"""Go's own heavier checks of the agent: native fuzzing, bounded, and the race detector."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

AGENT = Path(__file__).parents[2] / "agent"
TARGETS = [
    (path.parent.relative_to(AGENT), name)
    for path in sorted(AGENT.rglob("*_test.go"))
    for name in re.findall(r"^func (Fuzz\w+)", path.read_text(), re.MULTILINE)
]


def _go(*words: str, cgo: str) -> str:
    go = os.environ.get("BANGER_GO") or shutil.which("go")
    if go is None:
        pytest.skip("no Go here; `make test` brings one")
    environment = {**os.environ, "CGO_ENABLED": cgo, "GOPROXY": "off", "GOTOOLCHAIN": "local"}
    done = subprocess.run(
        [go, *words], cwd=AGENT, env=environment, capture_output=True, text=True, timeout=500,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("package", "target"), TARGETS, ids=str)
def test_what_the_host_sends_never_breaks_the_agent(package: Path, target: str) -> None:
    said = _go("test", f"./{package}", "-run=^$", f"-fuzz=^{target}$", "-fuzztime=4s", cgo="0")
    assert "execs:" in said


def test_the_agent_has_no_data_race() -> None:
    if shutil.which("gcc") is None:
        pytest.skip("the race detector needs a C compiler")
    _go("test", "-race", "./...", cgo="1")
