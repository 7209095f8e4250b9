"""`banger firecracker`: without a daemon, from the configured address, against the pinned digest."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from banger.vmm import firecracker_release as release
from tests.unit.cli.conftest import Cli

ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\x3e\x00" + bytes(200)


@pytest.fixture
def archive(home: str) -> Path:
    """An archive of the default version, where a mirror would have it."""
    version = release.DEFAULT
    path = Path(home, "mirror", f"v{version}", f"firecracker-v{version}-x86_64.tgz")
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as tar:
        for program in ("firecracker", "jailer"):
            info = tarfile.TarInfo(f"release-v{version}-x86_64/{program}-v{version}-x86_64")
            info.size = len(ELF)
            tar.addfile(info, io.BytesIO(ELF))
    return path


def test_install_list_and_remove_need_no_daemon(cli: Cli, home: str, archive: Path) -> None:
    version = str(release.DEFAULT)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest().upper()
    words = ["--base-url", Path(home, "mirror").as_uri(), "--version", f"v{version}"]
    words += ["--sha256", digest]
    ran = cli.run("firecracker", "install", *words)
    assert (ran.status, ran.out) == (0, f"{version}\n")
    assert f"download Firecracker {version}" in ran.err
    [entry] = json.loads(cli.run("firecracker", "list", "--json").out)
    assert (entry["version"], entry["current"]) == (version, True)
    assert version in cli.run("firecracker", "ls").out
    assert cli.run("firecracker", "install", *words, "--quiet").err == ""
    assert json.loads(cli.run("firecracker", "install", *words, "--json").out) == entry
    assert not list(Path(home, "run").rglob("*.sock"))
    assert "removed" in cli.run("firecracker", "rm", version).out
    assert cli.run("firecracker", "list", "--json").out == "[]\n"
    ran = cli.run("firecracker", "remove", version)
    assert (ran.status, "not installed" in ran.err) == (125, True)


def test_configured_address_and_pinned_digest_are_the_defaults(
    cli: Cli, home: str, archive: Path
) -> None:
    folder = Path(home, ".config", "banger")
    folder.mkdir(parents=True)
    url = Path(home, "mirror").as_uri()
    (folder / "config.toml").write_text(f'firecracker_base_url = "{url}"\n')
    ran = cli.run("firecracker", "install")
    assert ran.status == 125
    assert f"expected {release.RELEASES[release.DEFAULT]}" in ran.err
    assert str(archive) in ran.err


def test_release_without_a_pin_asks_for_its_digest(cli: Cli, home: str) -> None:
    ran = cli.run("firecracker", "install", "--version", "1.14.1", "--json")
    assert ran.status == 125
    error = json.loads(ran.out)["error"]
    assert error["code"] == "invalid_input"
    assert "--sha256" in error["hint"]
    assert cli.run("firecracker", "install", "--version", "newest").status == 125
