"""Whose login a registry gets: files in order, the most specific entry, helpers."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest

from banger.errors import InvalidInput
from banger.host.commands import HostCommands
from banger.images.credentials import Credential, Credentials

HUB = "https://index.docker.io/v1/"


class User:
    """A user with a home, a PATH for helpers, and the warnings they got."""

    def __init__(self, directory: Path) -> None:
        self.home = directory / "home"
        self.bin = directory / "bin"
        self.home.mkdir()
        self.bin.mkdir()
        self.environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin", "XDG_RUNTIME_DIR": str(directory / "run"),
        }  # fmt: skip
        self.warnings: list[str] = []

    def write(self, name: str, content: object) -> Path:
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def helper(self, name: str, script: str) -> None:
        path = self.bin / f"docker-credential-{name}"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    async def find(self, host: str, repository: str = "o/n") -> Credential | None:
        credentials = Credentials(
            self.environment, self.home, HostCommands(self.environment), warn=self.warnings.append
        )
        return await credentials.find(host, repository)


@pytest.fixture
def user(tmp_path: Path) -> User:
    return User(tmp_path)


def auth(name: str, password: str = "pass:word") -> dict[str, str]:
    return {"auth": base64.b64encode(f"{name}:{password}".encode()).decode()}


async def test_no_file_is_no_login(user: User) -> None:
    assert await user.find("ghcr.io") is None


async def test_docker_login_is_found_and_the_password_may_have_colons(user: User) -> None:
    user.write(".docker/config.json", {"auths": {"ghcr.io": auth("me")}})
    assert await user.find("ghcr.io") == Credential("me", "pass:word")
    assert await user.find("quay.io") is None


async def test_docker_hub_is_found_by_its_old_url(user: User) -> None:
    user.write(".docker/config.json", {"auths": {HUB: auth("hub")}})
    found = await user.find("docker.io", "library/alpine")
    assert found is not None
    assert found.username == "hub"


@pytest.mark.parametrize(
    ("repository", "expected"), [("ns/repo", "repo"), ("ns/other", "ns"), ("x/y", "host")]
)
async def test_most_specific_entry_wins(user: User, repository: str, expected: str) -> None:
    user.write(
        ".config/containers/auth.json",
        {
            "auths": {
                "https://h.example": auth("host"), "h.example/ns": auth("ns"),
                "h.example/ns/repo": auth("repo"), "h.example/n": auth("no"),
            }
        },
    )  # fmt: skip
    found = await user.find("h.example", repository)
    assert found is not None
    assert found.username == expected


async def test_files_are_looked_at_in_order_and_each_may_lack_the_host(user: User) -> None:
    user.write(".docker/config.json", {"auths": {"a.example": auth("docker")}})
    user.write(".config/containers/auth.json", {"auths": {"a.example": {}, "b.example": auth("x")}})
    found = await user.find("a.example")
    assert found is not None
    assert found.username == "docker"
    user.write("../run/containers/auth.json", {"auths": {"a.example": auth("runtime")}})
    found = await user.find("a.example")
    assert found is not None
    assert found.username == "runtime"


async def test_registry_auth_file_is_the_only_one(user: User) -> None:
    user.write(".docker/config.json", {"auths": {"a.example": auth("docker")}})
    user.environment["REGISTRY_AUTH_FILE"] = str(user.write("mine.json", {"auths": {}}))
    assert await user.find("a.example") is None


async def test_docker_config_moves_dockers_file(user: User) -> None:
    user.write("moved/config.json", {"auths": {"a.example": auth("moved")}})
    user.environment["DOCKER_CONFIG"] = str(user.home / "moved")
    found = await user.find("a.example")
    assert found is not None
    assert found.username == "moved"


async def test_identity_token_takes_the_passwords_place(user: User) -> None:
    entry = auth("me", "") | {"identitytoken": "sesame"}
    user.write(".docker/config.json", {"auths": {"a.example": entry}})
    assert await user.find("a.example") == Credential("me", identity_token="sesame")


async def test_helper_of_the_host_is_asked_with_the_host(user: User) -> None:
    user.helper(
        "my-vault",
        '[ "$1" = get ] || exit 9; read -r host; printf \'{"Username":"u","Secret":"%s"}\' "$host"',
    )
    user.write(".docker/config.json", {"credHelpers": {"a.example:5000": "my-vault"}})
    assert await user.find("a.example:5000") == Credential("u", "a.example:5000")
    assert await user.find("b.example") is None


async def test_store_is_asked_after_the_entries_and_for_the_hub_by_its_url(user: User) -> None:
    user.helper("store", 'read -r host; printf \'{"Username":"<token>","Secret":"%s"}\' "$host"')
    user.write(
        ".docker/config.json",
        {"credsStore": "store", "auths": {"a.example": {}, "b.example": auth("plain")}},
    )
    assert await user.find("docker.io") == Credential("", identity_token=HUB)
    assert await user.find("a.example") == Credential("", identity_token="a.example")
    assert await user.find("b.example") == Credential("plain", "pass:word")


async def test_helper_that_knows_nothing_is_no_login_and_no_warning(user: User) -> None:
    user.helper("store", "echo credentials not found in native keychain; exit 1")
    user.write(".docker/config.json", {"credsStore": "store"})
    assert await user.find("docker.io") is None
    assert user.warnings == []


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo hunter2 >&2; exit 3", "failed with status 3"),
        ("echo hunter2", "did not answer"),
        ('echo \'{"Username": 3, "Secret": "hunter2"}\'', "did not answer"),
        ("yes hunter2", "printed more"),
        (None, "not installed"),
    ],
)
async def test_helper_that_fails_is_warned_of_without_its_words(
    user: User, script: str | None, words: str
) -> None:
    if script is not None:
        user.helper("store", script)
    user.write(".docker/config.json", {"credsStore": "store"})
    assert await user.find("ghcr.io") is None
    [warning] = user.warnings
    assert words in warning
    assert "hunter2" not in warning


@pytest.mark.parametrize("name", ["../evil", "a b", "A", "x;y", "a/b"])
async def test_name_of_a_helper_is_no_path(user: User, name: str) -> None:
    user.write(".docker/config.json", {"credsStore": name})
    with pytest.raises(InvalidInput, match="not the name of a credential helper"):
        await user.find("ghcr.io")


@pytest.mark.parametrize(
    "content",
    [
        '{"auths": {"ghcr.io": {"auth": "c2VjcmV0OnNlY3JldA=="',
        "not json secret",
        "[]",
        '{"auths": 3}',
        '{"auths": {"ghcr.io": {"auth": "secret!"}}}',
        '{"auths": {"ghcr.io": {"auth": "c2VjcmV0"}}}',
        '{"auths": {"ghcr.io": {"auth": 5}}}',
        "[" * 100_000,
        '"' + "s" * (1 << 20) + '"',
    ],
)
async def test_broken_file_is_named_in_one_line_without_its_content(
    user: User, content: str
) -> None:
    path = user.write(".docker/config.json", content)
    with pytest.raises(InvalidInput) as caught:
        await user.find("ghcr.io")
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert "secret" not in caught.value.message
    assert "c2Vj" not in repr(caught.value)


async def test_file_that_may_not_be_read_is_named(user: User) -> None:
    path = user.write(".docker/config.json/x", "{}").parent
    with pytest.raises(InvalidInput, match=f"cannot read .*{path}"):
        await user.find("ghcr.io")


async def test_empty_file_is_no_login(user: User) -> None:
    user.write(".docker/config.json", "")
    assert await user.find("ghcr.io") is None


def test_secrets_are_in_no_repr() -> None:
    shown = repr(Credential("me", "hunter2", "sesame"))
    assert "me" in shown
    assert "hunter2" not in shown
    assert "sesame" not in shown


def test_without_a_runtime_directory_podmans_fallback_is_looked_at(user: User) -> None:
    del user.environment["XDG_RUNTIME_DIR"]
    files = Credentials(user.environment, user.home, HostCommands()).files()
    assert files[0] == Path(f"/run/containers/{os.getuid()}/auth.json")
