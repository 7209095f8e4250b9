"""What passt and pasta are told: that nothing leads into a VM."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from banger.errors import Unavailable, VmmFailed
from banger.host.commands import HostCommands
from banger.network import usermode


def _values(words: list[str], option: str) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words) if word == option]


@pytest.mark.parametrize(
    "words",
    [
        usermode.passt_arguments(7),
        usermode.pasta_arguments(1, "pasta0", "banger-vm-x", root=False),
    ],
)
def test_nothing_listens(words: list[str]) -> None:
    assert _values(words, "--tcp-ports") == ["none"]
    assert _values(words, "--udp-ports") == ["none"]
    assert "--no-map-gw" in words  # the gateway is not the host


def test_a_guest_of_pasta_reaches_no_port_of_the_hosts_loopback() -> None:
    words = usermode.pasta_arguments(4711, "pasta0", "banger-vm-x", root=False)
    assert (words[0], words[-1]) == ("pasta", "4711")
    assert _values(words, "--tcp-ns") == _values(words, "--udp-ns") == ["none"]
    assert _values(words, "--ns-ifname") == ["pasta0"]
    assert _values(words, "--search") == ["banger-vm-x"]
    assert "--runas" not in words


def test_pasta_enters_namespaces_of_roots_as_root() -> None:
    words = usermode.pasta_arguments(4711, "pasta0", "banger-vm-x", root=True)
    assert _values(words, "--runas") == ["0:0"]
    assert words[-1] == "4711"


@pytest.fixture
def commands(tmp_path: Path) -> HostCommands:
    return HostCommands({"PATH": f"{tmp_path}:/usr/bin:/bin"})


def _program(directory: Path, name: str, script: str) -> None:
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


@pytest.mark.parametrize(
    ("uid", "prefix", "expected"),
    [
        (0, [], "--runas 0:0"),
        (0, ["env"], ""),
        (1000, [], ""),
    ],
)
async def test_pasta_stays_root_only_where_root_made_the_namespaces(
    tmp_path: Path,
    commands: HostCommands,
    monkeypatch: pytest.MonkeyPatch,
    uid: int,
    prefix: list[str],
    expected: str,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    _program(tmp_path, "pasta", f'echo "$@" >{tmp_path}/said')
    await usermode.start_pasta(commands, 1, "pasta0", mark="banger-vm-x", prefix=prefix)
    said = (tmp_path / "said").read_text()
    assert ("--runas 0:0" in said) == bool(expected)
    assert "--search banger-vm-x 1" in said


async def test_one_that_fails_is_quoted_without_its_noise(
    tmp_path: Path, commands: HostCommands
) -> None:
    _program(tmp_path, "pasta", "echo Failed to send to syslog >&2; echo no tun >&2; exit 1")
    with pytest.raises(VmmFailed, match="^pasta did not start: no tun$") as caught:
        await usermode.start_pasta(commands, 1, "pasta0", mark="m")
    assert "--network none" in caught.value.hint


async def test_one_that_fails_silently_says_so(tmp_path: Path, commands: HostCommands) -> None:
    _program(tmp_path, "passt", "exit 1")
    with pytest.raises(VmmFailed, match="^passt did not start: it said nothing$"):
        await usermode.start_passt(commands, 0)


async def test_a_missing_program_is_named_with_its_package(tmp_path: Path) -> None:
    nothing = HostCommands({"PATH": str(tmp_path)})
    nothing.environment["PATH"] = str(tmp_path)
    with pytest.raises(Unavailable, match="program pasta is not installed") as caught:
        await usermode.start_pasta(nothing, 1, "pasta0", mark="m")
    assert "passt" in caught.value.hint


async def test_the_descriptor_reaches_passt(tmp_path: Path, commands: HostCommands) -> None:
    read, write = os.pipe()
    _program(
        tmp_path,
        "passt",
        f"for fd; do :; done; exec {sys.executable} -c \"import os,sys; os.write(int(sys.argv[1]), b'here')\" $fd",
    )
    try:
        await usermode.start_passt(commands, write)
        assert os.read(read, 10) == b"here"
    finally:
        os.close(read)
        os.close(write)
