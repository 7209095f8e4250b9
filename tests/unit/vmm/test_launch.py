"""How a Firecracker begins: what a command line must hold for the confinement to be one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from banger.errors import Unavailable
from banger.host.commands import HostCommands
from banger.vmm import launch
from banger.vmm.firecracker import Firecracker


def test_every_way_without_the_jailer_drops_all_rights_last() -> None:
    argv = ["/opt/firecracker", "--id", "x"]
    drop = ["setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--", *argv]
    assert launch.without_rights(argv) == drop
    user_namespace = ["unshare", "--user", "--map-root-user"]
    assert launch.unprivileged(argv, own_network=False) == [*user_namespace, "--", *drop]
    assert launch.unprivileged(argv, own_network=True) == [*user_namespace, "--net", "--", *drop]
    assert launch.network_holder(drop, Path("/log"))[-len(drop) :] == drop


@pytest.mark.parametrize("name", ["-x", "a b", "$(touch x)", "`touch x`", "'", '"', "\n"])
def test_no_path_is_ever_a_word_of_the_shells(tmp_path: Path, name: str) -> None:
    output = tmp_path / name
    output.touch()
    words = launch.network_holder(["printf", "%s", name], output)
    shell = words[words.index("/bin/sh") :]
    # The same script, without the interfaces that need a namespace.
    script = shell[2][shell[2].index("output=$1") :]
    subprocess.run([*shell[:2], f"set -eu\n{script}", *shell[3:]], check=True, cwd=tmp_path)
    assert output.read_text() == name
    assert {path.name for path in tmp_path.iterdir()} == {name}


def test_the_namespace_says_ready_and_goes_on_when_its_stdin_ends(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    asked = tmp_path / "asked"
    (tools / "ip").write_text(f'#!/bin/sh\necho "$@" >>{asked}\n')
    (tools / "ip").chmod(0o755)
    output = tmp_path / "console.log"
    words = launch.network_holder(["echo", "booted"], output)
    shell = words[words.index("/bin/sh") :]
    script = shell[2].replace("echo 1 2>/dev/null >/proc/sys", "echo 1 2>/dev/null >/nonexistent")
    with subprocess.Popen(
        [*shell[:2], script, *shell[3:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PATH": f"{tools}:/usr/bin:/bin"},
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == b"ready\n"
        assert "pasta0" not in asked.read_text()
        holder.stdin.close()
        assert holder.wait(20) == 0
    assert asked.read_text().splitlines() == [
        "link set lo up",
        "link add br0 type bridge",
        "tuntap add dev tap0 mode tap",
        "link set tap0 master br0 up",
        "link set br0 up",
        "link set pasta0 master br0 up",
    ]
    assert output.read_text() == "booted\n"


def _jailer(network: str | None) -> list[str]:
    return launch.jailer(
        "/opt/jailer",
        Path("/opt/firecracker"),
        mark="banger-vm-x",
        uid=4711,
        base=Path("/vm/jail"),
        cgroup=["--cgroup-version", "2"],
        network=network,
    )


def test_the_jailer_is_told_who_where_and_in_which_network() -> None:
    words = _jailer("/proc/1/ns/net")
    assert (words[0], words[-2:]) == ("/opt/jailer", ["--new-pid-ns", "--"])
    options = words[1:-2]
    assert dict(zip(options[::2], options[1::2], strict=True)) == {
        "--id": "banger-vm-x",
        "--exec-file": "/opt/firecracker",
        "--uid": "4711",
        "--gid": "4711",
        "--chroot-base-dir": "/vm/jail",
        "--netns": "/proc/1/ns/net",
        "--cgroup-version": "2",
    }
    assert "--netns" not in _jailer(None)


def test_a_program_behind_links_is_found(tmp_path: Path) -> None:
    real = tmp_path / "firecracker-1.15"
    real.touch()
    (tmp_path / "firecracker").symlink_to("current")
    (tmp_path / "current").symlink_to(real)
    assert launch.resolve(str(tmp_path / "firecracker")) == real


@pytest.mark.parametrize(("status", "usable"), [(0, True), (1, False)])
def test_without_root_firecracker_needs_user_namespaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, usable: bool
) -> None:
    """Else `auto` would choose a VMM that cannot start, as on Ubuntu 24.04 without root."""
    (tmp_path / "unshare").write_text(f"#!/bin/sh\nexit {status}\n")
    (tmp_path / "unshare").chmod(0o755)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    commands = HostCommands({"PATH": f"{tmp_path}:/usr/bin:/bin"})
    vmm = Firecracker(commands, lambda: "/bin/firecracker", lambda: None, jailed=False)
    if usable:
        vmm.check()
        return
    with pytest.raises(Unavailable, match="user namespaces are not allowed"):
        vmm.check()


def test_the_probe_succeeds_where_namespaces_can_be_made() -> None:
    if os.geteuid() != 0:
        pytest.skip("whether they can be made without root is this host's affair")
    assert subprocess.run(launch.probe(), check=False, capture_output=True).returncode == 0
