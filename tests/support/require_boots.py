"""A pytest plugin for CI: a run in which no `system` test passed fails, whatever else passed.

Loaded by `.ci/run` with -p; a developer's partial run is left alone.
"""

from __future__ import annotations

import pytest

_PASSED = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin to count."""
    config.stash[_PASSED] = 0
    config.pluginmanager.register(_Counter(config), "banger-boots-counter")


class _Counter:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a passed test that carries the marker (reports travel from xdist's workers too)."""
        if report.when == "call" and report.passed and "system" in report.keywords:
            self.config.stash[_PASSED] += 1


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Turn success without a boot into failure."""
    if hasattr(session.config, "workerinput"):
        return  # a worker of xdist sees only its part
    if session.config.stash[_PASSED] == 0 and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why."""
    if terminalreporter.config.stash[_PASSED] == 0:
        terminalreporter.section("no system test passed: no machine booted", red=True)
