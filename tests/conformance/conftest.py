"""The real agent in its test mode, and both kinds of endpoint onto it."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator

import pytest

from banger.guest import boot
from banger.guest.transport import Endpoint, UnixListener, VirtioSerial

PORTS = 4


@pytest.fixture(scope="session")
def agent_binary() -> str:
    return os.environ.get("BANGER_AGENT") or str(boot.agent_binary())


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
