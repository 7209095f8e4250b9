"""The real agent in its test mode, and both kinds of endpoint onto it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.guest.transport import Endpoint, UnixListener, VirtioSerial

ROOT = Path(__file__).resolve().parents[2]
PORTS = 4


def find_go() -> str | None:
    for candidate in (os.environ.get("BANGER_GO"), shutil.which("go"), "/tmp/w/gov/bin/go"):
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    return None


@pytest.fixture(scope="session")
def agent_binary(tmp_path_factory: pytest.TempPathFactory) -> str:
    given = os.environ.get("BANGER_AGENT")
    if given:
        return given
    go = find_go()
    if go is not None:
        target = tmp_path_factory.mktemp("agent") / "banger-agent"
        subprocess.run(
            [go, "build", "-trimpath", "-o", str(target), "."],
            cwd=ROOT / "agent",
            env={**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false"},
            check=True,
        )
        return str(target)
    built = ROOT / "src/banger/guest/bin/banger-agent"
    if built.exists():
        return str(built)
    pytest.skip("no go and no built agent: run `make agent`")


@pytest.fixture
def agent_directory(agent_binary: str) -> Iterator[str]:
    # A short path: sun_path is 108 bytes, pytest's own directories are long.
    with tempfile.TemporaryDirectory(prefix="bgc") as directory:
        process = subprocess.Popen(
            [agent_binary, "serve-unix", directory, str(PORTS)],
            stdout=subprocess.PIPE,
            env={**os.environ, "BANGER_AGENT_LOGS": directory + "/logs"},
        )
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            yield directory
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.fixture(params=["ports", "listener"])
def endpoint(request: pytest.FixtureRequest, agent_directory: str) -> Endpoint:
    if request.param == "ports":
        return VirtioSerial(agent_directory, PORTS)
    return UnixListener(agent_directory + "/listen")
