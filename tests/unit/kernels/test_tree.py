"""Somebody's directory: nothing outside it is read, nothing in it is believed."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from banger.errors import InvalidInput
from banger.kernels import tree
from banger.kernels.tree import Tree


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    place = tmp_path / "outside"
    (place / "kernel").mkdir(parents=True)
    (place / "kernel" / "stolen.ko").write_bytes(b"secret")
    (place / "modules.dep").write_bytes(b"secret")
    return place


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    place = tmp_path / "inside"
    place.mkdir()
    return place


def test_no_link_is_followed_on_any_component(inside: Path, outside: Path) -> None:
    (inside / "lib").symlink_to(outside)
    (inside / "file").symlink_to(outside / "modules.dep")
    (inside / "near").symlink_to("real")
    (inside / "real").write_bytes(b"x")
    with Tree(inside) as found:
        assert found.names("lib") == []
        assert not found.is_directory("lib/kernel")
        assert found.read("lib/modules.dep", 100) is None
        assert found.read("file", 100) is None
        assert found.read("near", 100) is None
        assert found.read("real", 100) == b"x"


@pytest.mark.parametrize("path", ["..", "../outside", "a/../../outside", "./x"])
def test_a_path_that_climbs_is_refused(inside: Path, outside: Path, path: str) -> None:
    with Tree(inside) as found, pytest.raises(InvalidInput):
        found.names(path)


def test_a_pipe_or_a_device_is_no_file_and_does_not_hang(inside: Path) -> None:
    os.mkfifo(inside / "vmlinuz")
    with Tree(inside) as found:
        assert not found.is_file("vmlinuz")
        assert found.read("vmlinuz", 10) is None


def test_a_file_above_its_limit_is_refused(inside: Path) -> None:
    (inside / "big").write_bytes(b"x" * 101)
    with Tree(inside) as found, pytest.raises(InvalidInput, match="larger"):
        found.read("big", 100)
    with pytest.raises(InvalidInput, match="larger"):
        tree.read_file(inside / "big", 100)


def test_named_files_must_be_files(inside: Path) -> None:
    os.mkfifo(inside / "pipe")
    for name in ("pipe", "missing", "."):
        with pytest.raises(InvalidInput):
            tree.read_file(inside / name, 100)


def test_modules_and_their_indexes_are_copied_and_nothing_else(
    inside: Path, outside: Path, tmp_path: Path
) -> None:
    (inside / "kernel" / "fs").mkdir(parents=True)
    for name in ("modules.dep", "vmlinuz", "kernel/a.ko", "kernel/fs/b-b.ko.xz", "kernel/fs/c.txt"):
        (inside / name).write_bytes(name.encode())
    (inside / "build").symlink_to("/usr/src")
    (inside / "kernel" / "evil.ko").symlink_to(outside / "modules.dep")
    (inside / "kernel" / "dir").symlink_to(outside / "kernel")
    os.mkfifo(inside / "kernel" / "pipe.ko")
    with Tree(inside) as found:
        copy = found.copy_modules("", tmp_path / "m.tar")
    assert copy.links == 3
    assert sorted(copy.modules) == ["kernel/a.ko", "kernel/fs/b-b.ko.xz"]
    with tarfile.open(tmp_path / "m.tar") as archive:
        assert sorted(archive.getnames()) == [
            ".", "./kernel", "./kernel/a.ko", "./kernel/fs", "./kernel/fs/b-b.ko.xz",
            "./modules.dep",
        ]  # fmt: skip
        assert all((m.uid, m.gid, m.mode & 0o7000) == (0, 0, 0) for m in archive)
    plain = tmp_path / "plain"
    plain.mkdir()
    tree.unpack_copy(tmp_path / "m.tar", plain)
    assert (plain / "kernel/fs/b-b.ko.xz").read_bytes() == b"kernel/fs/b-b.ko.xz"


@pytest.mark.parametrize("name", ["a b.ko", "a\nb.ko", "-x.ko", "\x1b[1m.ko", b"\xff.ko"])
def test_a_module_with_a_strange_name_is_refused(inside: Path, tmp_path: Path, name) -> None:
    with open(os.path.join(os.fsencode(inside), os.fsencode(name)), "wb"):
        pass
    with Tree(inside) as found, pytest.raises(InvalidInput, match="no kernel's has"):
        found.copy_modules("", tmp_path / "m.tar")


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("MAX_ENTRIES", 5),
        ("MAX_MODULE_FILES", 5),
        ("MAX_MODULES_BYTES", 50),
        ("MAX_FILE_BYTES", 9),
        ("MAX_DEPTH", 2),
    ],
)
def test_every_bound_holds(inside: Path, tmp_path: Path, monkeypatch, limit: str, value) -> None:
    (inside / "a" / "b" / "c").mkdir(parents=True)
    for number in range(8):
        (inside / "a" / f"m{number}.ko").write_bytes(b"0123456789")
    with Tree(inside) as found:
        assert len(found.copy_modules("", tmp_path / "whole.tar").modules) == 8
    monkeypatch.setattr(tree, limit, value)
    with Tree(inside) as found, pytest.raises(InvalidInput):
        found.copy_modules("", tmp_path / "m.tar")
