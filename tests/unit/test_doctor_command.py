"""`banger doctor`, and the checks that look at users and files; see test_doctor.py for the rest."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from banger.cli import doctor as cli
from banger.cli.context import Context
from banger.config import Config, config_path
from banger.errors import Unavailable
from banger.host.commands import HostCommands
from banger.images import ext4
from banger.paths import Paths
from banger.services import doctor
from banger.services.doctor import Check, fix, run_checks
from banger.vmm.probe import KvmProbe

KVM = KvmProbe(True, "/dev/kvm is usable")
QEMU = """case $1 in
--version) echo "QEMU emulator version 10.0.2" ;;
*) printf 'microvm   microvm (i386)\\ntcg\\nkvm\\n' ;;
esac"""
PROGRAMS = (
    "mke2fs e2fsck mmdebstrap ssh ssh-keygen git npm newuidmap unshare apt-get sudo passt pasta ip "
    "bridge nft resolvectl"
).split()


class FakeHost(NamedTuple):
    """A PATH and a HOME of its own, and a log of what was run."""

    bin: Path
    log: Path
    paths: Paths

    def program(self, name: str, body: str = ":", status: int = 0) -> None:
        path = self.bin / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>{self.log}\n{body}\nexit {status}\n')
        path.chmod(0o755)

    def commands(self) -> HostCommands:
        commands = HostCommands({"PATH": str(self.bin)})
        # HostCommands adds /usr/sbin and friends, which would show the real host.
        commands.environment["PATH"] = str(self.bin)
        return commands

    def check(self, name: str, config: Config = Config()) -> Check:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(doctor, "_CHECKS", [row for row in doctor._CHECKS if row[0] == name])
            (found,) = asyncio.run(run_checks(self.commands(), self.paths, config, kvm=KVM))
        return found

    def ran(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    """A host that lacks nothing, seen by root."""
    (tmp_path / "bin").mkdir()
    base = str(tmp_path / "home")
    paths = Paths(*(f"{base}/{name}" for name in ("config", "data", "state", "cache", "run/it")))
    made = FakeHost(tmp_path / "bin", tmp_path / "log", paths)
    for name in PROGRAMS:
        made.program(name)
    made.program("debugfs", "echo /12/100644/0/0/probe/0/")
    made.program("qemu-system-x86_64", QEMU)
    made.program("firecracker", "echo Firecracker v1.17.0")
    made.program("jailer", "echo Jailer v1.17.0")
    keyring, agent = tmp_path / "keyring.gpg", tmp_path / "banger-agent-x86_64"
    keyring.touch()
    agent.touch()
    monkeypatch.setattr(doctor, "_DEBIAN_KEYRING", keyring)
    monkeypatch.setattr(doctor, "agent_binary", lambda: agent)
    monkeypatch.setattr(doctor, "_SPACE_WARN_BYTES", 0)
    monkeypatch.setattr(doctor, "_SPACE_FAIL_BYTES", 0)
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(ext4, "_PROBED", {})
    monkeypatch.setattr(os, "getuid", lambda: 0)
    return made


# -- the command


class _Args(NamedTuple):
    fix: bool


@pytest.fixture
def command(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`banger doctor` on the made-up host."""
    monkeypatch.setattr("banger.host.commands.HostCommands", host.commands)
    monkeypatch.setattr(doctor, "probe_kvm", lambda: KVM)

    def run(*, fix: bool = False, json: bool = False) -> int:
        return cli.run_doctor(Context(json=json, paths=host.paths), _Args(fix))  # type: ignore[arg-type]

    return run


def test_warning_alone_exits_0(
    host: FakeHost, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (host.bin / "npm").unlink()
    assert command() == 0
    found = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert (found.count("warning"), found.count("fail")) == (1, 0)


def test_fail_exits_1_names_the_mending_command_and_runs_nothing(
    host: FakeHost, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (host.bin / "git").unlink()
    assert command() == 1
    assert "mend it: sudo apt-get install" in capsys.readouterr().out
    assert not [line for line in host.ran() if line.startswith(("apt-get", "sudo"))]
    assert not Path(host.paths.data_dir).parent.exists()


def test_broken_config_is_one_finding_among_others(
    host: FakeHost, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    Path(host.paths.config_dir).mkdir(parents=True)
    Path(config_path(host.paths.config_dir)).write_text("nonsense")
    assert command(json=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert [check["name"] for check in found["checks"] if check["status"] == "fail"] == ["config"]


def test_fix_mends_and_checks_again(
    host: FakeHost, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (host.bin / "git").unlink()
    cp = shutil.which("cp")
    host.program("apt-get", f'case "$*" in *git*) {cp} {host.bin}/npm {host.bin}/git ;; esac')
    assert command(fix=True) == 0
    assert "fail" not in capsys.readouterr().out
    assert "apt-get -qq update" in host.ran()


def test_fix_that_does_not_help_exits_1(
    host: FakeHost, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (host.bin / "git").unlink()
    host.program("apt-get", "echo 'E: no such package' >&2", status=100)
    assert command(fix=True) == 1
    assert "no such package" in capsys.readouterr().err


# -- users


def test_root_needs_no_namespace_and_no_sudo(host: FakeHost) -> None:
    (host.bin / "newuidmap").unlink()
    assert host.check("user namespaces").status == "ok"
    check = Check("git", "fail", "", "sudo apt-get install -y git", fixable=True)
    assert asyncio.run(fix(check, host.commands()))
    assert host.ran()[-2:] == ["apt-get -qq update", "apt-get install -y git"]


class TestWithoutRoot:
    """A user named ada."""

    @pytest.fixture(autouse=True)
    def user(self, monkeypatch: pytest.MonkeyPatch, host: FakeHost) -> None:
        class Entry(NamedTuple):
            pw_name: str = "ada"

        monkeypatch.setattr(os, "getuid", lambda: 4711)
        monkeypatch.setattr(doctor.pwd, "getpwuid", lambda _: Entry())
        monkeypatch.setattr(doctor, "_has_subordinate_ids", lambda *_: True)

    def test_all_there_is_ok(self, host: FakeHost) -> None:
        assert host.check("user namespaces").status == "ok"

    def test_missing_newuidmap_fails(self, host: FakeHost) -> None:
        (host.bin / "newuidmap").unlink()
        found = host.check("user namespaces")
        assert (found.status, found.fixable) == ("fail", True)
        assert found.fix.endswith("uidmap")

    def test_missing_subordinate_ids_fail(
        self, host: FakeHost, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(doctor, "_has_subordinate_ids", lambda *_: False)
        found = host.check("user namespaces")
        assert (found.status, found.fixable) == ("fail", True)
        assert found.fix.endswith("ada")

    def test_kernel_that_refuses_is_found(self, host: FakeHost) -> None:
        host.program("unshare", "echo 'unshare: not permitted' >&2", status=1)
        # A warning where AppArmor decides, for mmdebstrap may have a profile of its own.
        assert host.check("user namespaces").status in ("fail", "warning")

    def test_fix_asks_sudo_without_a_password(self, host: FakeHost) -> None:
        check = Check("git", "fail", "", "sudo apt-get install -y git", fixable=True)
        asyncio.run(fix(check, host.commands()))
        assert host.ran() == ["sudo -n apt-get -qq update", "sudo -n apt-get install -y git"]
        host.program("sudo", "echo 'sudo: a password is required' >&2", status=1)
        with pytest.raises(Unavailable, match="password") as caught:
            asyncio.run(fix(check, host.commands()))
        assert "`sudo apt-get" in caught.value.hint


@pytest.mark.parametrize(
    ("line", "found"), [("ada:1:2", True), ("0:1:2", True), ("adam:1:2", False), ("", False)]
)
def test_subordinate_ids_are_found_by_name_or_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, found: bool
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 0)
    file = tmp_path / "subuid"
    file.write_text(f"bob:1:2\n{line}\n")
    assert doctor._has_subordinate_ids(file, "ada") is found


def test_suggested_ids_are_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = (tmp_path / "subuid", tmp_path / "subgid")
    monkeypatch.setattr(doctor, "_SUBORDINATE_IDS", files)
    assert doctor._free_subordinate_id() == 100_000
    files[0].write_text("ann:100000:65536\nbob:165536:65536\n# odd\n::\n")
    files[1].write_text("ann:300000:10\n")
    assert doctor._free_subordinate_id() == 300_010


# -- the jailer and the bridge


def test_jailer_of_root_has_to_be_here_and_mended(host: FakeHost) -> None:
    assert host.check("jailer").status == "ok"
    host.program("jailer", "echo Jailer v1.14.0")
    found = host.check("jailer")
    assert (found.status, found.fix) == ("warning", "banger firecracker install")
    assert "CVE-2026-1386" in found.message
    host.program("jailer", "echo Jailer v1.16.1")
    assert "not of the release" in host.check("jailer").message
    (host.bin / "jailer").unlink()
    assert host.check("jailer").status == "fail"
    assert host.check("jailer", Config(vmm="qemu")).status == "warning"
    assert host.check("jailer", Config(jailer_enabled=False)).status == "ok"
    (host.bin / "firecracker").unlink()
    assert host.check("jailer").status == "ok"


def test_docker_that_drops_is_a_warning_with_both_commands(host: FakeHost) -> None:
    assert host.check("bridge").status == "ok"
    (host.bin / "nft").unlink()
    host.program("nft", "exit 1")
    host.program("iptables", "echo '-P FORWARD DROP'")
    found = host.check("bridge")
    assert (found.status, found.fixable) == ("warning", False)
    assert found.fix == (
        "sudo iptables -I DOCKER-USER -i br-banger -j ACCEPT && sudo iptables -I DOCKER-USER "
        "-o br-banger -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
    )


class TestBridgeWithoutRoot:
    """A user named ada, on a host where root installed banger."""

    @pytest.fixture(autouse=True)
    def user(self, monkeypatch: pytest.MonkeyPatch, host: FakeHost) -> None:
        class Entry(NamedTuple):
            pw_name: str = "ada"

        monkeypatch.setattr(os, "getuid", lambda: 4711)
        monkeypatch.setattr(doctor.pwd, "getpwuid", lambda _: Entry())
        monkeypatch.setattr(doctor.network, "find_trusted_helper", lambda: Path("/opt/helper"))

    def test_sudo_that_allows_the_helper_is_asked_and_runs_nothing(self, host: FakeHost) -> None:
        assert host.check("bridge").status == "ok"
        asked = [line for line in host.ran() if not line.startswith("qemu")]
        assert asked == ["sudo -n -l /opt/helper"]

    def test_sudo_that_does_not_is_told_of_the_rule(self, host: FakeHost) -> None:
        host.program("sudo", "echo 'sudo: a password is required' >&2", status=1)
        wanted = Config(network="bridge")
        found = host.check("bridge", wanted)
        assert (found.status, found.fixable) == ("fail", False)
        assert found.fix.endswith("ada ALL=(root) NOPASSWD: /opt/helper")
        (host.bin / "sudo").unlink()
        assert "no sudo" in host.check("bridge", wanted).message

    def test_who_does_not_use_the_bridge_is_not_warned(self, host: FakeHost) -> None:
        host.program("sudo", "echo 'sudo: a password is required' >&2", status=1)
        found = host.check("bridge")
        assert (found.status, found.fix) == ("ok", "")
        assert "not needed: network is user; to have it, " in found.message
        assert found.message.endswith("ada ALL=(root) NOPASSWD: /opt/helper")

    def test_helper_that_others_can_write_is_no_way_to_root(
        self, host: FakeHost, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse() -> Path:
            raise Unavailable("others can write it", hint="install banger as root")

        monkeypatch.setattr(doctor.network, "find_trusted_helper", refuse)
        found = host.check("bridge", Config(network="bridge"))
        assert (found.status, found.fix) == ("fail", "install banger as root")

    def test_jailer_is_not_needed(self, host: FakeHost) -> None:
        (host.bin / "jailer").unlink()
        assert host.check("jailer").status == "ok"


# -- the database


@pytest.fixture
def database(host: FakeHost) -> Path:
    path = Path(host.paths.data_dir) / "banger.db"
    path.parent.mkdir(parents=True)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE vms (id TEXT PRIMARY KEY, name TEXT)")
    rows = [(str(number), "x" * 200) for number in range(500)]
    connection.executemany("INSERT INTO vms VALUES (?, ?)", rows)
    connection.commit()
    connection.close()
    return path


def test_check_makes_nothing_beside_the_database(host: FakeHost, database: Path) -> None:
    before = database.read_bytes()
    assert host.check("database").status == "ok"
    assert list(database.parent.iterdir()) == [database]
    assert database.read_bytes() == before


def test_database_in_use_is_ok(host: FakeHost, database: Path) -> None:
    connection = sqlite3.connect(database)
    connection.execute("INSERT INTO vms VALUES ('new', 'y')")
    connection.commit()
    assert host.check("database").status == "ok"
    connection.close()


def test_log_of_a_killed_daemon_is_left_for_the_next_one(host: FakeHost, database: Path) -> None:
    log = database.with_name("banger.db-wal")
    log.write_bytes(b"left")
    assert host.check("database").status == "warning"
    assert sorted(database.parent.iterdir()) == [database, log]


def test_damage_inside_is_found_and_left_alone(host: FakeHost, database: Path) -> None:
    whole = database.read_bytes()
    damaged = whole[:4096] + b"\xff" * 8192 + whole[12288:]
    database.write_bytes(damaged)
    found = host.check("database")
    assert (found.status, found.fixable) == ("fail", False)
    assert database.read_bytes() == damaged
