"""The static checks as tests, so that one command is the check."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_BIN = Path(sys.executable).parent
_PYTHON = ("src", "tests", "benchmarks")
_PROSE = ("src", "docs", "agent", "scripts", *sorted(p.name for p in ROOT.glob("*.md")))
_SCRIPTS = (
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "scripts").glob("*.sh")),
    *(".ci/run", "src/banger/guest/with-sshd.sh"),
)

CHECKS = {
    "format": ("ruff", "format", "--check", "--quiet", *_PYTHON),
    "lint": ("ruff", "check", "--quiet", *_PYTHON),
    "types": ("mypy",),
    "layers": ("lint-imports",),
    "spelling": ("codespell", *_PROSE),
    "shell": ("shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *_SCRIPTS),
}


@pytest.mark.parametrize("argv", CHECKS.values(), ids=CHECKS)
def test_static_check_is_clean(argv: tuple[str, ...]) -> None:
    _clean([str(_BIN / argv[0]), *argv[1:]], ROOT)


@pytest.fixture(scope="module")
def go() -> str:
    """The Go tool that `make check` and `make test` found."""
    found = os.environ.get("BANGER_GO") or shutil.which("go")
    if found is None:
        pytest.skip("no Go here; `make check` and `make test` bring one")
    return found


@pytest.mark.parametrize("words", [("vet", "./..."), ("test", "./...")], ids=["vet", "test"])
def test_agent_passes_go(go: str, words: tuple[str, ...]) -> None:
    _clean([go, *words], ROOT / "agent")


def test_agent_is_formatted(go: str) -> None:
    root = subprocess.run([go, "env", "GOROOT"], capture_output=True, text=True, check=True)
    gofmt = Path(root.stdout.strip()) / "bin" / "gofmt"
    found = shutil.which("gofmt") or str(gofmt)
    assert _clean([found, "-l", "."], ROOT / "agent") == ""


@pytest.mark.parametrize("path", ["Makefile", "pyproject.toml", "requirements", "scripts", ".ci"])
def test_no_file_of_the_build_names_a_host(path: str) -> None:
    files = [ROOT / path] if (ROOT / path).is_file() else sorted((ROOT / path).rglob("*"))
    for file in files:
        assert re.search(r"\w://\w", file.read_text()) is None, file


def _clean(argv: list[str], cwd: Path) -> str:
    environment = {
        **os.environ,
        "CGO_ENABLED": "0",
        "GOPROXY": "off",
        "GOTOOLCHAIN": "local",
        "GOFLAGS": "-mod=mod",
        "PYTHONWARNINGS": "default",
    }
    done = subprocess.run(
        argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=500
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(argv)}\n{done.stdout}{done.stderr}", pytrace=False)
    return done.stdout
