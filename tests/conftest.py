"""Fixtures of all tests; evidence of the failing ones."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest

from tests.support.sandbox import Sandbox

# nohup and `&` start us with some signals ignored, and our children would inherit that.
for _number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM, signal.SIGINT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        default = signal.default_int_handler if _number is signal.SIGINT else signal.SIG_DFL
        signal.signal(_number, default)

with contextlib.suppress(ImportError):  # the lab, where a part of the tests runs, has none
    import hypothesis

    # No test is timed: machines here are shared.
    hypothesis.settings.register_profile("banger", deadline=None)
    hypothesis.settings.load_profile("banger")

_outcome = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    """Remember whether a test failed, for the fixture that keeps its evidence."""
    report = yield
    if report.when == "call":
        item.stash[_outcome] = report.failed
    return report


@pytest.fixture
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A user of their own with the cached images and kernels."""
    made = Sandbox()
    try:
        yield made
    finally:
        if request.node.stash.get(_outcome, True):
            made.keep_evidence(request.node.nodeid)
        made.close()


@pytest.fixture(scope="module")
def shared_sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """One user for a whole module, where a boot for each test would cost too much."""
    made = Sandbox()
    failed_before = request.session.testsfailed
    try:
        yield made
    finally:
        if request.session.testsfailed > failed_before:
            made.keep_evidence(request.node.nodeid)
        made.close()
