"""The lab of a test session; evidence of the tests that fail in it.

LAB_KEEP=1 leaves it running, and the next session takes the running one and installs what changed.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.lab import EVIDENCE, Lab, why_no_lab

_HERE = Path(__file__).parent
BROKE = EVIDENCE / "broke"
# The first test also waits for the lab: see the bounds in tests/support/lab.py.
_TIMEOUT_S = 2400
# Collecting takes seconds; of a lab in which everything fails the first ones tell.
_KEPT_TESTS = 5

_lab = pytest.StashKey[Lab]()
_kept = pytest.StashKey[int]()
_hint = pytest.StashKey[str]()
_resets = pytest.StashKey[int]()
_forgiven = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One lab for all: they run in one worker of xdist, and one after the other."""
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.lab)
            item.add_marker(pytest.mark.xdist_group("lab"))
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(_TIMEOUT_S))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function):  # type: ignore[no-untyped-def]
    """Run a test once more when a guest reset itself under it.

    The lab's KVM is itself emulated, and about one guest in a hundred resets without a word some
    seconds after its boot (docs/debugging.md, 16). Only that is forgiven, and once: a test that fails
    without such a reset, or a second time, has failed.
    """
    lab = pyfuncitem.config.stash.get(_lab, None)
    if lab is None:
        return (yield)
    seen = pyfuncitem.config.stash.get(_resets, 0)
    try:
        return (yield)
    except (AssertionError, subprocess.TimeoutExpired):
        if lab.guest_resets() == seen:
            raise
        lab.keep_evidence(f"{pyfuncitem.name}-reset")
        lab.start_stopped_vms()
    finally:
        pyfuncitem.config.stash[_resets] = lab.guest_resets()
    pyfuncitem.config.stash[_forgiven] = [
        *pyfuncitem.config.stash.get(_forgiven, []),
        pyfuncitem.name,
    ]
    names = pyfuncitem._fixtureinfo.argnames
    pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names})
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    """Collect evidence while what the test made is still there."""
    report = yield
    kept = item.config.stash.get(_kept, 0)
    lab = item.config.stash.get(_lab, None)
    if report.failed and lab is not None and _broke(item, lab, call.when):
        BROKE.touch()
    if report.failed and lab is not None and kept < _KEPT_TESTS:
        item.config.stash[_kept] = kept + 1
        lab.keep_evidence(item.name)
    return report


def _broke(item: pytest.Item, lab: Lab, when: str) -> bool:
    """Tell whether the lab failed, not the test; scripts/test.sh then takes a new one, once.

    Its kernel panicked, for it is emulated too; or a guest reset under a fixture, which is not
    made twice as a test is.
    """
    if lab.has_panicked():
        return True
    seen = item.config.stash.get(_resets, 0)
    try:
        return when == "setup" and lab.guest_resets() != seen
    except (AssertionError, subprocess.SubprocessError):
        # It does not answer.
        return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how to get into a lab that runs on."""
    forgiven = terminalreporter.config.stash.get(_forgiven, [])
    if forgiven:
        terminalreporter.write_line(f"run again after a guest's reset: {', '.join(forgiven)}")
    hint = terminalreporter.config.stash.get(_hint, None)
    if hint is not None:
        terminalreporter.write_line(f"the lab runs on: {hint}")


@pytest.fixture(scope="session")
def lab(pytestconfig: pytest.Config) -> Iterator[Lab]:
    """The lab with the product installed; one that ran before the session runs on after it."""
    reason = why_no_lab()
    if reason is not None:
        pytest.skip(reason)
    made = Lab()
    pytestconfig.stash[_lab] = made
    try:
        made.start()
        BROKE.unlink(missing_ok=True)
        yield made
    finally:
        del pytestconfig.stash[_lab]
        made.close()
        if made.started and not os.environ.get("LAB_KEEP"):
            made.stop()
        else:
            pytestconfig.stash[_hint] = made.ssh_command()
