"""`image promote` and what `image build` refuses before it makes a machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from banger.cli import completion, image_build
from banger.errors import InvalidInput
from tests.unit.cli.conftest import Cli
from tests.unit.client.fake_daemon import FakeDaemon


def _sent(daemon: FakeDaemon, path: str) -> list[Any]:
    return [body for method, at, body in daemon.requests if (method, at) == ("POST", path)]


def test_promote_sends_only_what_was_given(cli: Cli, daemon: FakeDaemon) -> None:
    path = "/v1/vms/box/promote"
    daemon.answers[f"POST {path}"] = daemon.operation(result={"name": "base"})
    assert cli.run("image", "promote", "box", "--name", "base").out == "base\n"
    words = ("--kernel-ref", "k", "--description", "d", "-f", "--json")
    assert cli.run("image", "promote", "box", "--name", "base", *words).status == 0
    assert _sent(daemon, path) == [
        {"name": "base", "force": False},
        {"name": "base", "force": True, "kernel": "k", "description": "d"},
    ]
    assert cli.run("image", "promote", "box").status == 2


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("app", "app"),
        ("app:v1", "app-v1"),
        ("app:latest", "app"),
        ("ghcr.io/owner/app:v1", "app-v1"),
        ("localhost:5000/app", "app"),
    ],
)
def test_a_tag_names_the_image_as_a_pull_would(given: str, name: str) -> None:
    assert image_build._image_name(given, is_given=True) == name


@pytest.mark.parametrize(
    ("directory", "name"), [("My App", "my-app"), ("_x_", "x"), ("ünï", "n"), ("日本", "image")]
)
def test_a_directory_names_the_image_as_well_as_it_can(directory: str, name: str) -> None:
    assert image_build._image_name(directory, is_given=False) == name


@pytest.mark.parametrize("given", ["", "App", "-x", "a b", "x" * 64])
def test_a_tag_that_is_no_name_is_refused(given: str) -> None:
    with pytest.raises(InvalidInput):
        image_build._image_name(given, is_given=True)


def test_build_arguments_take_the_environments_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "x=y")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert image_build._build_args(["A=b=c", "E=", "HERE", "NOWHERE"]) == [
        "A=b=c",
        "E=",
        "HERE=x=y",
    ]


@pytest.mark.parametrize(
    ("image", "words", "says"),
    [
        ({"origin": "file:/x", "used_by": []}, (), "installed already, from file:/x"),
        ({"origin": "build:/x", "used_by": ["box"]}, (), "used by box"),
        ({"origin": "file:/x", "used_by": ["box"]}, ("--force",), "used by box"),
        ({"origin": "", "used_by": [], "installed": False}, (), "of the catalog"),
    ],
)
def test_an_image_that_must_stay_is_told_before_a_machine_is_made(
    cli: Cli, daemon: FakeDaemon, tmp_path: Path, image: Any, words: tuple[str, ...], says: str
) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    daemon.answers["GET /v1/images/app"] = {"name": "app", "installed": True, **image}
    ran = cli.run("image", "build", str(tmp_path), "-t", "app", *words)
    assert ran.status == 125
    assert says in ran.err
    assert _sent(daemon, "/v1/vms") == []


def test_a_dockerfile_may_lie_inside_or_outside_of_the_directory(tmp_path: Path) -> None:
    context = tmp_path / "context"
    (context / "sub").mkdir(parents=True)
    for path in (tmp_path / "Outside", context / "sub" / "Inside", context / "..Odd"):
        path.touch()

    def plan(file: Path) -> image_build._Plan:
        parser = completion.make_parser("image", "build", image_build.build_build)
        return image_build._plan(parser.parse_args([str(context), "-f", str(file)]))

    assert plan(context / "sub" / "Inside").inside == "sub/Inside"
    assert plan(context / "..Odd").inside == "..Odd"
    outside = plan(tmp_path / "Outside")
    assert (outside.inside, outside.outside) == ("", os.fspath(tmp_path / "Outside"))


def test_completion_names_machines_and_files(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["GET /v1/vms"] = [{"name": "one"}, {"name": "two"}]
    assert completion.candidates(["image", "promote"], "t") == ["two"]
    assert completion.candidates(["image", "build"], "") == ["__files__"]
