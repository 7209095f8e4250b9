"""`image pull` whole: command line, daemon, and Debian's real docker-registry."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import registries
from tests.support.ext4_listing import debugfs, list_image
from tests.support.layouts import directory, make_layout, member
from tests.support.registries import PASSWORD, USER, RealRegistry
from tests.support.sandbox import Sandbox

pytestmark = pytest.mark.integration

BIG = 24 << 20


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layout") / "lay"
    make_layout(
        path,
        [[directory("d"), member("d/big", data=os.urandom(BIG))], [member("top", data=b"2")]],
        config={"Cmd": ["/bin/top"], "Env": ["PATH=/bin"]},
    )
    return path


@pytest.fixture(scope="module")
def registry(layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    base = tmp_path_factory.mktemp("registry")
    with registries.real_registry(base, base / "storage") as running:
        registries.push(layout, "t", running.host, "team/app:1.0")
        yield running


@pytest.fixture
def user() -> Iterator[Sandbox]:
    made = Sandbox(artifacts=False)
    yield made
    made.close()


def store(user: Sandbox, name: str) -> Path:
    return user.layout.data / "images" / name / "rootfs.ext4"


def staging(user: Sandbox) -> list[str]:
    directory = user.layout.data / "staging"
    return sorted(os.listdir(directory)) if directory.exists() else []


def test_pull_show_cache_and_delete(user: Sandbox, registry: RealRegistry) -> None:
    source = f"{registry.host}/team/app:1.0"
    ran = user.run("image", "pull", source)
    assert (ran.returncode, ran.stdout) == (0, b"app-1.0\n"), ran.stderr
    assert b"fetching layers" in ran.stderr
    assert list_image(store(user, "app-1.0")).keys() == {b"/d", b"/d/big", b"/top"}
    entry = user.json("image", "show", "app-1.0", "--json")
    assert (entry["command"], entry["env"]) == (["/bin/top"], {"PATH": "/bin"})
    assert entry["origin"] == source
    # again: nothing is made
    before = store(user, "app-1.0").stat().st_mtime_ns
    user.ok("image", "pull", source)
    assert store(user, "app-1.0").stat().st_mtime_ns == before
    blobs = user.json("image", "cache", "list", "--json")
    assert sum(blob["size_bytes"] for blob in blobs) > BIG
    assert user.json("image", "cache", "prune", "--json")["freed_bytes"] == 0
    user.ok("image", "cache", "prune", "--all")
    assert user.json("image", "cache", "list", "--json") == []
    user.ok("image", "delete", "app-1.0")
    assert not store(user, "app-1.0").exists()


def test_two_terminals_pull_one_image(user: Sandbox, registry: RealRegistry) -> None:
    words = ("image", "pull", f"{registry.host}/team/app:1.0", "--name", "shared")
    both = [user.popen(*words) for _ in range(2)]
    for one in both:
        out, said = one.communicate(timeout=120)
        assert (one.returncode, out) == (0, b"shared\n"), said
    assert staging(user) == []


@pytest.mark.parametrize("moment", [b"fetching layers", b"writing the file system"])
def test_interrupted_nothing_is_left(user: Sandbox, layout: Path, moment: bytes) -> None:
    user.ok("image", "list")
    pull = user.popen("image", "pull", f"oci:{layout}:t", "--name", "cut")
    assert pull.stderr is not None
    for line in pull.stderr:
        if moment in line:
            break
    pull.send_signal(signal.SIGINT)
    pull.communicate(timeout=60)
    assert pull.returncode == 130
    assert staging(user) == []
    assert not store(user, "cut").exists()
    user.ok("image", "pull", f"oci:{layout}:t", "--name", "cut")


def test_killed_daemon_leaves_what_the_next_one_sweeps(user: Sandbox, layout: Path) -> None:
    user.ok("image", "list")
    pull = user.popen("image", "pull", f"oci:{layout}:t", "--name", "cut")
    assert pull.stderr is not None
    for line in pull.stderr:
        if b"writing the file system" in line:
            break
    pid = user.daemon_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    _, said = pull.communicate(timeout=60)
    assert pull.returncode == 125, said
    user.ok("image", "list")  # a new daemon
    assert staging(user) == []
    assert not store(user, "cut").exists()


def test_credentials_of_docker_login(user: Sandbox, layout: Path, tmp_path: Path) -> None:
    auth = registries.htpasswd_auth(tmp_path)
    with registries.real_registry(tmp_path, tmp_path / "storage", auth=auth) as registry:
        registries.push(layout, "t", registry.host, "private:1", f"--dest-creds={USER}:{PASSWORD}")
        source = f"{registry.host}/private:1"
        refused = user.run("image", "pull", source)
        assert refused.returncode == 125
        assert b"hint: " in refused.stderr
        assert b"login" in refused.stderr
        home = Path(user.environment["HOME"])
        (home / ".docker").mkdir()
        secret = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        (home / ".docker" / "config.json").write_text(
            json.dumps({"auths": {registry.host: {"auth": secret}}})
        )
        user.ok("image", "pull", source)
        assert secret.encode() not in (user.layout.daemon_log).read_bytes()


def test_docker_archive_from_stdin(user: Sandbox, layout: Path, tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    subprocess.run(
        ["skopeo", "copy", "-q", f"oci:{layout}:t", f"docker-archive:{archive}:team/app:v2"],
        check=True,
    )
    with open(archive, "rb") as file:
        assert user.ok("image", "pull", "docker-archive:-", stdin=file.read()) == b"app-v2\n"
    assert debugfs(store(user, "app-v2"), "cat /top") == b"2"
    incoming = user.layout.cache / "incoming"
    assert list(incoming.iterdir()) == []
    # one that a killed command line left is swept by the next
    (incoming / "left.tar").write_bytes(b"x")
    with open(archive, "rb") as file:
        user.ok("image", "pull", "docker-archive:-", "--name", "again", stdin=file.read())
    assert list(incoming.iterdir()) == []


def test_names_that_are_taken(user: Sandbox, layout: Path, tmp_path: Path) -> None:
    user.ok("image", "pull", f"oci:{layout}:t", "--name", "one")
    make_layout(tmp_path / "other", [[member("x")]])
    other = user.run("image", "pull", f"oci:{tmp_path}/other:t", "--name", "one")
    assert other.returncode == 125
    assert b"installed already, from oci:" in other.stderr
    assert b"--force" in other.stderr
    user.ok("image", "pull", f"oci:{tmp_path}/other:t", "--name", "one", "--force")
    catalog = user.run("image", "pull", f"oci:{layout}:t", "--name", "debian-bookworm")
    assert b"the catalog" in catalog.stderr


def test_relative_paths_are_the_command_lines(user: Sandbox, layout: Path) -> None:
    user.ok("image", "list")
    user.ok("image", "pull", f"oci:{layout.name}:t", "--name", "rel", cwd=layout.parent)
    assert user.json("image", "show", "rel", "--json")["origin"] == f"oci:{layout}:t"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["debian-bookwrm"], "did you mean debian-bookworm?"),
        (["Alpine:3"], "lower case"),
        (["oci:/no/such/dir"], "is not a directory"),
        (["oci-archiv:/dir"], "oci-archive"),
        (["rootfs:/no/such"], "neither a tar nor a directory"),
        (["alpine:3", "--platform", "windows/amd64"], "Linux only"),
        (["alpine:3", "--name", "Bad Name"], "not a name"),
        (["debian-bookworm", "--platform", "linux/amd64"], "not for an image of the catalog"),
        (["alpine:3", "--size", "big"], "not a size"),
    ],
)
def test_wrong_words(user: Sandbox, words: list[str], text: str) -> None:
    ran = user.run("image", "pull", *words)
    assert ran.returncode == 125
    assert text in ran.stderr.decode()
    assert len(ran.stderr.splitlines()) <= 2, ran.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="a small file system is mounted")
def test_a_full_disk_is_said_and_nothing_stays(layout: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", small], check=True)
    user = Sandbox(artifacts=False)
    try:
        user.environment["XDG_DATA_HOME"] = str(small)
        ran = user.run("image", "pull", f"oci:{layout}:t", "--name", "full")
        assert ran.returncode == 125
        assert b"no space left" in ran.stderr, ran.stderr
        assert list((small / "banger" / "staging").iterdir()) == []
    finally:
        user.run("daemon", "stop")
        deadline = time.monotonic() + 20
        while subprocess.run(["umount", small], check=False, capture_output=True).returncode:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        user.close()
