"""The chroot's files, the limits' words, and what a sweep takes away."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from banger.errors import VmmFailed
from banger.vmm import jail
from banger.vmm.base import VmSpec
from tests.support.specs import VM_ID, plain_spec

EXECUTABLE = Path("/opt/firecracker")


@pytest.fixture
def spec(tmp_path: Path) -> VmSpec:
    for name in (
        *("vmlinux", "initramfs.img", "base.ext4", "own.ext4", "mods.ext4"),
        *("vmm.log", "metrics.json"),
    ):
        (tmp_path / name).write_bytes(name.encode())
        (tmp_path / name).chmod(0o600)
    return plain_spec(
        tmp_path,
        vcpu=2,
        memory_bytes=512 << 20,
        directory=tmp_path / "vm",
        runtime=tmp_path / "run" / "vms" / VM_ID,
        metrics_log=tmp_path / "metrics.json",
    )


@pytest.fixture(autouse=True)
def owners(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Who was given what, by name: only root may really do it."""
    given: dict[str, int] = {}

    def chown(path: Path, uid: int, gid: int) -> None:
        assert uid == gid
        path.stat()
        given[Path(path).name] = uid

    monkeypatch.setattr(os, "chown", chown)
    return given


def test_the_chroot_holds_links_and_gives_away_only_what_is_the_vms(
    spec: VmSpec, owners: dict[str, int]
) -> None:
    root = jail.build_chroot(spec, 4711, EXECUTABLE)
    assert root == spec.directory / "jail" / "firecracker" / spec.mark / "root"
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    expected = {
        "vmlinux": spec.kernel,
        "base.ext4": spec.base_disk,
        "mods.ext4": spec.modules_disk,
        "initramfs.img": spec.initramfs,
        "own.ext4": spec.own_disk,
        "vmm.log": spec.vmm_log,
        "metrics.json": spec.metrics_log,
    }
    assert {path.name for path in root.iterdir()} == set(expected)
    for name, path in expected.items():
        assert path is not None
        assert (root / name).samefile(path), name
    own = {"root", "initramfs.img", "own.ext4", "vmm.log", "metrics.json"}
    assert owners == dict.fromkeys(own, 4711)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in root.iterdir()}
    # What all VMs share is read by any uid and written by none.
    assert {modes[name] for name in ("vmlinux", "base.ext4", "mods.ext4")} == {0o444}
    assert {modes[name] for name in ("own.ext4", "vmm.log", "metrics.json")} == {0o600}


def test_a_shared_file_that_all_may_read_keeps_its_mode(spec: VmSpec) -> None:
    spec.kernel.chmod(0o644)
    jail.build_chroot(spec, 4711, EXECUTABLE)
    assert stat.S_IMODE(spec.kernel.stat().st_mode) == 0o644


def test_a_vmm_without_metrics_gets_no_file_for_them(spec: VmSpec) -> None:
    root = jail.build_chroot(replace(spec, metrics_log=None), 4711, EXECUTABLE)
    assert not (root / "metrics.json").exists()


@pytest.mark.parametrize("field", ["own_disk", "initramfs", "kernel", "base_disk"])
def test_a_file_that_is_missing_is_not_made(spec: VmSpec, field: str) -> None:
    missing: Path = getattr(spec, field)
    missing.unlink()
    with pytest.raises(FileNotFoundError, match=missing.name):
        jail.build_chroot(spec, 4711, EXECUTABLE)
    assert not missing.exists()


def test_what_a_crash_left_of_a_chroot_is_replaced(spec: VmSpec) -> None:
    first = jail.build_chroot(spec, 4711, EXECUTABLE)
    (first / "fc.sock").touch()
    # A guest that took its VMM over may leave links; what they lead to stays.
    outside = spec.kernel.parent / "precious"
    outside.mkdir()
    (outside / "file").touch()
    (first / "link").symlink_to(outside)
    second = jail.build_chroot(spec, 4711, EXECUTABLE)
    assert second == first
    assert not (second / "fc.sock").exists()
    assert (outside / "file").exists()


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.EXDEV, "vmlinux has to be on the file system of "),
        (errno.EPERM, "set `jailer_enabled = false`"),
        (errno.EMLINK, "set `jailer_enabled = false`"),
    ],
)
def test_a_file_that_cannot_be_linked_is_named_with_a_way_out(
    spec: VmSpec, monkeypatch: pytest.MonkeyPatch, number: int, hint: str
) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(VmmFailed) as caught:
        jail.build_chroot(spec, 4711, EXECUTABLE)
    assert caught.value.message == (
        f"{spec.kernel} cannot be linked into the VM's chroot: {os.strerror(number)}"
    )
    assert hint in caught.value.hint
    assert "jailer_enabled = false" in caught.value.hint


# --- cgroup


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cgroup"
    root.mkdir()
    monkeypatch.setattr(jail, "CGROUP_ROOT", root)
    return root


def test_the_limits_are_those_of_the_machine_and_a_margin(spec: VmSpec, cgroups: Path) -> None:
    (cgroups / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    words = jail.cgroup_arguments(spec)
    assert words[:4] == ["--cgroup-version", "2", "--parent-cgroup", "banger"]
    assert words[4::2] == ["--cgroup"] * 3
    assert words[5::2] == [
        f"memory.max={(512 + 64) << 20}",
        "pids.max=18",
        "cpu.max=300000 100000",
    ]


def test_only_controllers_that_are_there_are_asked_for(spec: VmSpec, cgroups: Path) -> None:
    (cgroups / "cgroup.controllers").write_text("pids hugetlb\n")
    assert jail.cgroup_arguments(spec)[5::2] == ["pids.max=18"]


@pytest.mark.parametrize("controllers", [None, "", "hugetlb\n"])
def test_without_a_limit_to_set_the_jailer_is_told_of_no_cgroup(
    spec: VmSpec, cgroups: Path, controllers: str | None
) -> None:
    if controllers is not None:
        (cgroups / "cgroup.controllers").write_text(controllers)
    assert jail.cgroup_arguments(spec) == []


# --- sweep


def test_a_sweep_takes_chroot_and_cgroups_and_is_idempotent(spec: VmSpec, cgroups: Path) -> None:
    jail.build_chroot(spec, 4711, EXECUTABLE)
    jail.cgroup_of(spec.mark).mkdir(parents=True)
    jail.sweep_jail(spec.directory, spec.mark)
    assert list(spec.directory.iterdir()) == []
    assert list(cgroups.iterdir()) == []
    assert spec.own_disk.read_bytes() == b"own.ext4"
    jail.sweep_jail(spec.directory, spec.mark)


def test_a_sweep_leaves_other_vms_cgroups_alone(spec: VmSpec, cgroups: Path) -> None:
    other = jail.cgroup_of("banger-vm-other")
    other.mkdir(parents=True)
    jail.cgroup_of(spec.mark).mkdir()
    jail.sweep_jail(spec.directory, spec.mark)
    assert list(jail.cgroup_of(spec.mark).parent.iterdir()) == [other]


def test_a_cgroup_that_is_still_busy_is_tried_again_for_a_while(
    spec: VmSpec, cgroups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jail.cgroup_of(spec.mark).mkdir(parents=True)
    rmdir = Path.rmdir
    refusals = [errno.EBUSY] * 3

    def busy(path: Path) -> None:
        if path == jail.cgroup_of(spec.mark) and refusals:
            raise OSError(refusals.pop(), "busy")
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", busy)
    jail.sweep_jail(spec.directory, spec.mark)
    assert not jail.cgroup_of(spec.mark).exists()
    assert refusals == []


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EROFS])
def test_a_cgroup_that_stays_does_not_hold_a_sweep_up(
    spec: VmSpec, cgroups: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(jail, "_CGROUP_GONE_TIMEOUT_S", 0.05)
    jail.cgroup_of(spec.mark).mkdir(parents=True)

    def refuse(path: Path) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(Path, "rmdir", refuse)
    jail.sweep_jail(spec.directory, spec.mark)
    assert jail.cgroup_of(spec.mark).exists()


def test_a_run_without_the_jailer_takes_the_files_back(
    spec: VmSpec, monkeypatch: pytest.MonkeyPatch, owners: dict[str, int]
) -> None:
    """A user namespace has no right to files of a uid that is not mapped in it."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    spec.vmm_log.unlink()
    jail.take_back(spec)
    assert owners == {"initramfs.img": 0, "own.ext4": 0, "metrics.json": 0}
