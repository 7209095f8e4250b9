"""The host's checks, over made-up hosts: each finding, and the command that mends it."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from banger import __version__
from banger.config import Config, load_config
from banger.errors import BangerError, CommandFailed, InvalidInput, Unavailable
from banger.host.commands import HostCommands
from banger.paths import find_paths
from banger.services import doctor
from banger.services.doctor import Check
from banger.services.doctor.network import docker_drops
from banger.store.layout import Layout
from banger.vmm.probe import KvmProbe

USABLE = KvmProbe(True, "/dev/kvm is usable")
UNUSABLE = KvmProbe(False, "the CPU shows no vmx or svm")
QEMU = """case "$*" in
*version*) echo "QEMU emulator version {version} (Debian)" ;;
*machine*) echo "microvm   microvm (i386)"; echo "pc   a PC" ;;
*accel*) echo "Accelerators supported in QEMU binary:"; echo tcg; echo kvm ;;
esac"""
QUIET = (
    "e2fsck resize2fs mmdebstrap git ssh ssh-keygen npm newuidmap newgidmap unshare apt-get "
    "apt-cache passt pasta ip bridge nft resolvectl sudo"
)


class OnlyTheseCommands(HostCommands):
    """A host that has the programs of one directory, and nothing else."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory

    def find(self, program: str) -> str | None:
        """Look in the one directory."""
        path = self.directory / program
        return str(path) if path.exists() else None


@dataclass
class MadeHost:
    """A host in a temporary directory."""

    root: Path
    config: Config = Config()
    kvm: KvmProbe = USABLE
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.root / "bin").mkdir()
        for name in ("home", "run"):
            (self.root / name).mkdir(mode=0o700)
        self.paths = find_paths(
            {"HOME": str(self.root / "home"), "XDG_RUNTIME_DIR": f"/proc/{os.getpid()}/none"}
        )._replace(runtime_dir=str(self.root / "run" / "banger"))
        self.layout = Layout.of(self.paths)
        self.layout.data.mkdir(parents=True)
        self.layout.config.mkdir(parents=True)
        for program in QUIET.split():
            self.program(program, "exit 0")
        self.qemu("10.0.2")
        self.program("mke2fs", "exit 1")
        self.program("firecracker", "echo Firecracker v1.17.0")
        self.program("jailer", "echo Jailer v1.17.0")

    def program(self, name: str, script: str) -> None:
        """Put a program on this host."""
        path = self.root / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def qemu(self, version: str) -> None:
        """Put a QEMU of a version on this host."""
        self.program("qemu-system-x86_64", QEMU.format(version=version))

    def remove(self, name: str) -> None:
        """Take a program away."""
        (self.root / "bin" / name).unlink()

    @property
    def commands(self) -> HostCommands:
        """The programs of this host."""
        return OnlyTheseCommands(self.root / "bin")

    async def checks(self) -> dict[str, Check]:
        """Every finding by name."""
        found = await doctor.run_checks(self.commands, self.paths, self.config, kvm=self.kvm)
        return {check.name: check for check in found}


@pytest.fixture
def host(tmp_path: Path) -> MadeHost:
    """A host on which all is well."""
    return MadeHost(tmp_path)


async def test_each_finding_is_one_line_with_a_status(host: MadeHost) -> None:
    found = await host.checks()
    assert len(found) >= 19
    for check in found.values():
        assert check.status in ("ok", "warning", "fail")
        assert check.message
        assert "\n" not in check.message + check.fix
        assert not (check.status == "ok" and check.fix)


async def test_checks_change_nothing(host: MadeHost) -> None:
    before = sorted(str(path) for path in host.root.rglob("*"))
    await host.checks()
    assert sorted(str(path) for path in host.root.rglob("*")) == before


async def test_a_broken_check_costs_only_itself(
    host: MadeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_it() -> Path:
        raise PermissionError("no such luck")

    monkeypatch.setattr(doctor, "agent_binary", break_it)
    found = await host.checks()
    assert found["agent"].status == "warning"
    assert "no such luck" in found["agent"].message
    assert found["git"].status == "ok"


async def test_without_kvm_machines_are_emulated_and_the_reason_is_shown(host: MadeHost) -> None:
    assert (await host.checks())["kvm"].status == "ok"
    host.kvm = UNUSABLE
    found = (await host.checks())["kvm"]
    assert found.status == "warning"
    assert UNUSABLE.reason in found.message


@pytest.mark.parametrize(
    ("version", "status"), [("6.2.0", "fail"), ("7.2.18", "ok"), ("10.0.2", "ok"), ("x", "fail")]
)
async def test_qemu_has_to_be_recent(host: MadeHost, version: str, status: str) -> None:
    host.qemu(version)
    assert (await host.checks())["vmm"].status == status


async def test_missing_qemu_names_its_package(host: MadeHost) -> None:
    host.remove("qemu-system-x86_64")
    found = (await host.checks())["vmm"]
    assert (found.status, found.fixable) == ("fail", True)
    assert "qemu-system-x86" in found.fix


async def test_qemu_without_the_machine_or_accelerator_fails(host: MadeHost) -> None:
    host.program("qemu-system-x86_64", QEMU.format(version="10.0").replace("microvm ", "isapc "))
    assert "microvm" in (await host.checks())["vmm"].message
    host.program("qemu-system-x86_64", QEMU.format(version="10.0").replace("echo kvm", "true"))
    assert (await host.checks())["vmm"].status == "fail"
    host.kvm = UNUSABLE
    assert (await host.checks())["vmm"].status == "ok"


@pytest.mark.parametrize(
    ("version", "kernel", "kvm", "status"),
    [
        ("7.2.18", "generic-6.12", UNUSABLE, "fail"),
        ("7.2.18", "generic-6.12", USABLE, "ok"),
        ("7.2.18", "generic-6.1", UNUSABLE, "ok"),
        ("10.0.2", "generic-6.12", UNUSABLE, "ok"),
    ],
)
async def test_kernel_and_emulator_pairs_known_bad_are_found(
    host: MadeHost, version: str, kernel: str, kvm: KvmProbe, status: str
) -> None:
    host.qemu(version)
    host.kvm, host.config = kvm, Config(default_kernel_name=kernel)
    found = (await host.checks())["kernel and vmm"]
    assert found.status == status
    assert status == "ok" or found.fix


async def test_backports_is_only_used_where_apt_knows_it(host: MadeHost) -> None:
    host.qemu("7.2.18")
    host.kvm = UNUSABLE
    assert not (await host.checks())["kernel and vmm"].fixable
    host.program("apt-cache", "echo ' release a=bookworm-backports'")
    found = (await host.checks())["kernel and vmm"]
    assert found.fixable
    assert "-t bookworm-backports" in found.fix


async def test_mke2fs_without_tar_input_is_a_warning(host: MadeHost) -> None:
    assert (await host.checks())["e2fsprogs"].status == "warning"
    host.remove("mke2fs")
    assert (await host.checks())["e2fsprogs"].status == "fail"


@pytest.mark.parametrize(
    ("program", "check", "package"),
    [
        ("mmdebstrap", "mmdebstrap", "mmdebstrap"),
        ("git", "git", "git"),
        ("ssh", "ssh", "openssh-client"),
        ("ssh-keygen", "ssh", "openssh-client"),
        ("npm", "npm", "npm"),
    ],
)
async def test_missing_program_names_its_package(
    host: MadeHost, program: str, check: str, package: str
) -> None:
    host.remove(program)
    found = (await host.checks())[check]
    assert found.status != "ok"
    assert found.fix.split()[-1] == package


async def test_without_apt_nothing_is_installed_by_itself(host: MadeHost) -> None:
    host.remove("apt-get")
    host.remove("git")
    found = (await host.checks())["git"]
    assert not found.fixable
    assert "git" in found.fix


@pytest.mark.parametrize(
    ("free_bytes", "status"), [(1 << 30, "fail"), (5 << 30, "warning"), (50 << 30, "ok")]
)
async def test_disk_space_has_two_marks(
    host: MadeHost, monkeypatch: pytest.MonkeyPatch, free_bytes: int, status: str
) -> None:
    monkeypatch.setattr(
        doctor.shutil, "disk_usage", lambda _path: type("Usage", (), {"free": free_bytes})
    )
    assert (await host.checks())["disk space"].status == status


async def test_runtime_directory_open_to_others_is_found(host: MadeHost) -> None:
    assert (await host.checks())["runtime directory"].status == "ok"
    host.layout.runtime.mkdir(mode=0o700)
    assert (await host.checks())["runtime directory"].status == "ok"
    host.layout.runtime.chmod(0o755)
    assert (await host.checks())["runtime directory"].status == "fail"
    host.layout.runtime.rmdir()
    host.layout.runtime.symlink_to(host.root)
    assert (await host.checks())["runtime directory"].status == "fail"


async def test_damaged_config_is_a_finding(host: MadeHost) -> None:
    assert (await host.checks())["config"].status == "ok"
    (host.layout.config / "config.toml").write_text("defualt_image_name = 'x'\n")
    with pytest.raises(InvalidInput):
        load_config(host.paths.config_dir)
    found = (await host.checks())["config"]
    assert found.status == "fail"
    assert "defualt_image_name" in found.message


async def test_database_is_checked_without_a_daemon(host: MadeHost) -> None:
    assert (await host.checks())["database"].status == "ok"
    connection = sqlite3.connect(host.layout.database)
    connection.execute("CREATE TABLE vms (id)")
    connection.commit()
    connection.close()
    assert (await host.checks())["database"].status == "ok"
    whole = host.layout.database.read_bytes()
    host.layout.database.write_bytes(b"not a database at all" * 100)
    found = (await host.checks())["database"]
    assert (found.status, found.fixable) == ("fail", False)
    assert str(host.layout.database) in found.message
    host.layout.database.write_bytes(whole[:-4096] + bytes(4096))
    assert (await host.checks())["database"].status == "fail"


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (json.dumps({"version": __version__, "pid": 7}), "ok"),
        (json.dumps({"version": "0.0.0", "pid": 7}), "warning"),
        ("[]", "warning"),
        ("no JSON", "warning"),
        ("", "warning"),
    ],
)
async def test_daemon_is_asked_who_it_is(host: MadeHost, answer: str, status: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + answer.encode())
        writer.close()

    host.layout.runtime.mkdir(mode=0o700)
    server = await asyncio.start_unix_server(serve, host.layout.api_socket)
    async with server:
        assert (await host.checks())["daemon"].status == status


async def test_no_daemon_and_a_stale_socket_are_fine(host: MadeHost) -> None:
    assert (await host.checks())["daemon"].status == "ok"
    host.layout.runtime.mkdir(mode=0o700)
    server = await asyncio.start_unix_server(lambda _r, _w: None, host.layout.api_socket)
    server.close()
    await server.wait_closed()
    assert (await host.checks())["daemon"].status == "ok"


async def test_fix_updates_the_index_then_installs(host: MadeHost) -> None:
    log = host.root / "log"
    host.program("apt-get", f'echo "$DEBIAN_FRONTEND $*" >> {log}')
    host.program("sudo", 'shift; exec "$0-target" "$@"')
    host.program("sudo-target", f'exec {host.root}/bin/"$@"')
    check = Check("git", "fail", "not installed", "sudo apt-get install -y git", fixable=True)
    assert await doctor.fix(check, host.commands)
    assert log.read_text().splitlines() == [
        "noninteractive -qq update",
        "noninteractive install -y git",
    ]


async def test_fix_runs_nothing_that_is_the_users_to_weigh(host: MadeHost) -> None:
    marker = host.root / "ran"
    host.program("mender", f"touch {marker}")
    with pytest.raises(InvalidInput):
        await doctor.fix(Check("x", "fail", "broken", "mender"), host.commands)
    assert not marker.exists()


async def test_failing_fix_says_what_the_command_said(host: MadeHost) -> None:
    host.program("mender", "echo no network >&2; exit 100")
    with pytest.raises(CommandFailed, match="no network"):
        await doctor.fix(Check("x", "fail", "broken", "mender", fixable=True), host.commands)


async def test_fix_with_a_program_that_is_gone_is_designed_text(host: MadeHost) -> None:
    with pytest.raises(BangerError):
        await doctor.fix(Check("x", "fail", "broken", "nowhere", fixable=True), host.commands)


@pytest.mark.skipif(os.getuid() == 0, reason="root needs no sudo")
async def test_sudo_that_asks_is_not_answered(host: MadeHost) -> None:
    host.program("sudo", "echo 'sudo: a password is required' >&2; exit 1")
    check = Check("git", "fail", "not installed", "sudo apt-get install -y git", fixable=True)
    with pytest.raises(Unavailable, match="password"):
        await doctor.fix(check, host.commands)


# -- Firecracker


async def test_absent_firecracker_is_missed_only_where_kvm_is(host: MadeHost) -> None:
    host.remove("firecracker")
    found = (await host.checks())["firecracker"]
    assert (found.status, found.fix, found.fixable) == (
        "warning", "banger firecracker install", True,
    )  # fmt: skip
    assert "QEMU runs the VMs" in found.message
    host.config = Config(vmm="qemu")
    assert (await host.checks())["firecracker"].status == "ok"
    host.config = Config(vmm="firecracker")
    assert (await host.checks())["firecracker"].status == "fail"
    host.config, host.kvm = Config(), UNUSABLE
    assert (await host.checks())["firecracker"].status == "ok"


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("Firecracker v1.17.0", "ok"),
        ("Firecracker v1.12.1", "ok"),
        ("Firecracker v1.16.1", "warning"),
        ("Firecracker v1.10.0", "fail"),
        ("hello", "warning"),
    ],
)
async def test_firecracker_is_judged_by_its_version(host: MadeHost, said: str, status: str) -> None:
    host.program("firecracker", f"echo {said}; echo; exit 0")
    found = (await host.checks())["firecracker"]
    assert found.status == status
    assert found.fixable == (status != "ok")


async def test_installed_firecracker_comes_before_that_of_path(host: MadeHost) -> None:
    place = host.layout.data / "firecracker" / "1.10.0"
    place.mkdir(parents=True)
    (place / "firecracker").write_text("#!/bin/sh\necho Firecracker v1.10.0\n")
    (place / "firecracker").chmod(0o755)
    (place.parent / "current").symlink_to("1.10.0")
    found = (await host.checks())["firecracker"]
    assert found.status == "fail"
    assert str(place) in found.message


async def test_broken_program_named_in_config_is_the_users_to_mend(host: MadeHost) -> None:
    path = host.root / "fc"
    path.write_bytes(b"\x7fELF")
    path.chmod(0o755)
    host.config = Config(firecracker_bin=str(path))
    found = (await host.checks())["firecracker"]
    assert (found.status, found.fixable) == ("warning", False)
    assert "firecracker_bin" in found.fix


# -- networks


async def test_missing_passt_fails_and_names_its_package(host: MadeHost) -> None:
    assert (await host.checks())["passt"].status == "ok"
    host.remove("pasta")
    found = (await host.checks())["passt"]
    assert (found.status, found.fixable) == ("fail", True)
    assert found.fix.endswith(" passt")


@pytest.mark.parametrize(
    ("program", "package"), [("ip", "iproute2"), ("bridge", "iproute2"), ("nft", "nftables")]
)
async def test_missing_program_of_the_bridge_fails_where_it_is_the_default(
    host: MadeHost, program: str, package: str
) -> None:
    host.remove(program)
    found = (await host.checks())["bridge"]
    assert (found.status, found.fixable) == ("warning", True)
    assert found.fix.endswith(f" {package}")
    host.config = Config(network="bridge")
    assert (await host.checks())["bridge"].status == "fail"


async def test_names_need_resolved_only_with_the_bridge(host: MadeHost) -> None:
    assert (await host.checks())["names"].status == "ok"
    host.program("resolvectl", "echo 'Failed to connect to bus' >&2; exit 1")
    assert (await host.checks())["names"].status == "ok"
    host.config = Config(network="bridge", dns_listen_addr="127.0.0.2:5300")
    found = (await host.checks())["names"]
    assert (found.status, found.fixable) == ("warning", False)
    assert "server=/vm/127.0.0.2#5300" in found.fix
    host.remove("resolvectl")
    assert (await host.checks())["names"].status == "warning"
    host.config = Config(network="bridge", dns_listen_addr="")
    assert (await host.checks())["names"].status == "ok"


DOCKER = """
add table ip filter
add chain ip filter FORWARD {{ type filter hook forward priority 0; policy {policy}; }}
add chain ip filter DOCKER-USER
add rule ip filter FORWARD counter jump DOCKER-USER
{rules}
"""
IN_NAMESPACE = """
import asyncio, subprocess, sys
from banger.host.commands import HostCommands
from banger.services.doctor.network import docker_drops
subprocess.run(["nft", "-f", "-"], input=sys.stdin.read(), text=True, check=True)
print(asyncio.run(docker_drops(HostCommands(), "br-banger")))
"""
FROM = 'iifname "br-banger" counter accept'
TO = 'oifname "br-banger" ct state established,related counter accept'
OTHER = 'iifname "br-other" counter accept'


@pytest.mark.parametrize(
    ("policy", "rules", "drops"),
    [
        ("drop", [], True),
        ("drop", [FROM], True),
        ("drop", [TO], True),
        ("drop", [OTHER, TO], True),
        ("drop", [FROM.replace("accept", "drop"), TO], True),
        ("drop", [FROM, TO], False),
        ("accept", [], False),
        (None, [], False),
    ],
)
async def test_dockers_real_rules_are_understood(
    policy: str | None, rules: list[str], drops: bool
) -> None:
    """In a network namespace of its own: the host's firewall is not looked at, nor touched."""
    lines = "\n".join(f"add rule ip filter DOCKER-USER {rule}" for rule in rules)
    ruleset = DOCKER.format(policy=policy, rules=lines) if policy else ""
    done = await HostCommands().run(
        ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", IN_NAMESPACE],
        stdin=ruleset.encode(),
        check=False,
    )
    if "unshare" in done.stderr:
        pytest.skip(f"no namespaces here: {done.stderr.strip()}")
    assert done.stdout.decode() == f"{drops}\n", done.stderr


MENDED = (
    "-A DOCKER-USER -i br-banger -j ACCEPT\n"
    "-A DOCKER-USER -o br-banger -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
)


@pytest.mark.parametrize(
    ("lines", "drops"),
    [
        ("-P FORWARD DROP", True),
        ("-P FORWARD ACCEPT", False),
        ("-P FORWARD DROP\n-A DOCKER-USER -i br-banger -j ACCEPT", True),
        (f"-P FORWARD DROP\n{MENDED}", False),
        ("-P FORWARD DROP\n-A X -i br-bangerx -j ACCEPT\n-A X -o br-bangerx -j ACCEPT", True),
    ],
)
async def test_legacy_iptables_is_understood(host: MadeHost, lines: str, drops: bool) -> None:
    host.program("nft", "exit 1")
    assert not await docker_drops(host.commands, "br-banger")
    host.program("iptables", f"cat <<'.'\n{lines}\n.")
    assert await docker_drops(host.commands, "br-banger") is drops
