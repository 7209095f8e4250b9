"""Is KVM usable, on hosts made up of a node, its ioctls and a /proc/cpuinfo."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from banger.vmm.probe import probe_kvm

INTEL = "processor\t: 0\nflags\t\t: fpu vme vmx sse\n\nprocessor\t: 1\n"
AMD = "flags : fpu svm\n"
GUEST = "flags : fpu vme hypervisor\n"


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file that answers KVM's ioctls as a device does."""
    path = tmp_path / "kvm"
    path.touch()

    def ioctl(fd: int, request: int, _argument: int = 0) -> int:
        return 12 if request == 0xAE00 else os.dup(fd)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    return str(path)


@pytest.mark.parametrize("cpuinfo", [INTEL, AMD])
def test_node_and_cpu_flag_are_enough(node: str, cpuinfo: str) -> None:
    assert probe_kvm(node, cpuinfo).usable


@pytest.mark.parametrize("cpuinfo", [GUEST, "", "flags :\n", "xflags : vmx\nvmx : vmx\n"])
def test_paravirtual_kvm_is_not_usable(node: str, cpuinfo: str) -> None:
    found = probe_kvm(node, cpuinfo)
    assert not found.usable
    assert "paravirtual" in found.reason


def test_no_node(tmp_path: Path) -> None:
    found = probe_kvm(str(tmp_path / "none"), INTEL)
    assert not found.usable
    assert "there is no" in found.reason


def test_no_permission_names_the_group(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    found = probe_kvm(node, INTEL)
    assert not found.usable
    assert "usermod -aG kvm" in found.reason


def test_node_that_makes_no_vm(tmp_path: Path) -> None:
    plain = tmp_path / "kvm"
    plain.touch()
    found = probe_kvm(str(plain), INTEL)
    assert not found.usable
    assert "makes no VM" in found.reason


def test_probe_leaves_no_descriptor_open(node: str) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for cpuinfo in (INTEL, GUEST):
        probe_kvm(node, cpuinfo)
    assert sorted(os.listdir("/proc/self/fd")) == before
