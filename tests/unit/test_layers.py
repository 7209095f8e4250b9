"""Nothing escapes the layers and nothing is depended on for nothing.

The contracts themselves are run by tests/static; here is what they cannot see.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PACKAGE = ROOT / "src" / "banger"
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_module_stands_in_a_layer() -> None:
    """A package that no contract names could import anything."""
    layers = _PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    placed = {name.strip() for layer in layers for name in layer.split("|")}
    # `network` spans two heights: the plan is pure and the config's, the rest is an adapter.
    parts = {f"banger.network.{path.stem}" for path in (_PACKAGE / "network").glob("[a-z]*.py")}
    assert {name for name in placed if name.startswith("banger.network.")} == parts
    placed = {".".join(name.split(".")[:2]) for name in placed}
    modules = {
        f"banger.{path.stem}"
        for path in _PACKAGE.iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists())
        and not path.name.startswith("__")
    }
    assert placed == modules


def test_command_line_may_import_no_service_but_the_named() -> None:
    """A new service is out of the command line's reach until somebody decides otherwise."""
    forbidden = set(_PROJECT["tool"]["importlinter"]["contracts"][1]["forbidden_modules"])
    services = {
        f"banger.services.{path.stem}"
        for path in (_PACKAGE / "services").glob("*.py")
        if path.stem != "__init__"
    }
    allowed = {
        "banger.services.catalogs",
        "banger.services.doctor",
        "banger.services.guest_copies",
        "banger.services.guest_paths",
        "banger.services.workspace_snapshot",
        "banger.services.workspace_sync",
        "banger.services.workspaces",
    }
    assert services - forbidden - allowed == set()


def test_every_dependency_is_imported() -> None:
    source = "\n".join(path.read_text() for path in _PACKAGE.rglob("*.py"))
    for requirement in _PROJECT["project"]["dependencies"]:
        name = re.split(r"[<>=; ]", requirement)[0]
        name = {"dnspython": "dns"}.get(name, name)
        package, _, module = name.rpartition(".")
        spelled = rf"(import|from) {re.escape(name)}\b"
        if package:
            spelled += rf"|from {re.escape(package)} import {module}\b"
        assert re.search(spelled, source), name


def test_no_archive_is_ever_extracted() -> None:
    """Hostile names never touch the host's file tree: tarfile and zipfile unpack nothing here."""
    calls = re.compile(r"(?<!untar)\.(extract|extractall|unpack_archive)\(")  # untar is our own
    found = [str(path) for path in _PACKAGE.rglob("*.py") if calls.search(path.read_text())]
    assert found == []
