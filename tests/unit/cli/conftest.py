"""A user of their own, the fake daemon, and the command line run in this process."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from banger.cli.main import main
from banger.client import autostart
from banger.paths import Paths, find_paths
from tests.unit.client.fake_daemon import FakeDaemon


class Ran(NamedTuple):
    status: int
    out: str
    err: str


class Cli:
    """`run` is the command line as a user types it, without a terminal."""

    def __init__(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capfd = capfd
        self._monkeypatch = monkeypatch

    def run(self, *words: str) -> Ran:
        self._capfd.readouterr()
        self._monkeypatch.setattr(sys, "argv", ["banger", *words])
        status = main()
        out, err = self._capfd.readouterr()
        return Ran(status, out, err)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="bng-") as root:
        for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", root)
        os.mkdir(f"{root}/run", 0o700)
        monkeypatch.setenv("XDG_RUNTIME_DIR", f"{root}/run")
        yield root


@pytest.fixture
def paths(home: str) -> Paths:
    return find_paths()


@pytest.fixture
def daemon(paths: Paths) -> Iterator[FakeDaemon]:
    os.makedirs(os.path.dirname(paths.runtime_dir), mode=0o700)
    fake = FakeDaemon(autostart.socket_path(paths))
    yield fake
    fake.close()


@pytest.fixture
def cli(home: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capfd, monkeypatch)
