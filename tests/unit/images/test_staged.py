"""Staging a tar of hostile names stays below its directory and loses nothing."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from banger.errors import BangerError, InvalidInput
from banger.images import staged

names = st.lists(
    st.sampled_from(["a", "b", "..", ".", "", 'q"uote', "new\nline", "\udce9", "-rf", "<2>", "é"]),
    min_size=1,
    max_size=4,
).map("/".join)
kinds = st.sampled_from(
    [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]
)
members = st.lists(
    st.tuples(names, kinds, st.sampled_from(["a", "/etc", "..", "../../..", "b/a"])), max_size=8
)


def tar_of(items: list[tuple[str, bytes, str]]) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(
        fileobj=out, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape"
    ) as archive:
        for name, kind, target in items:
            member = tarfile.TarInfo(name)
            member.type = kind
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                member.linkname = target
            data = b"data" if kind == tarfile.REGTYPE else b""
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    out.seek(0)
    return out


def everything_below(directory: Path) -> set[bytes]:
    return {
        os.path.relpath(os.path.join(root, name), os.fsencode(directory))
        for root, directories, files in os.walk(os.fsencode(directory))
        for name in (*directories, *files)
    }


@settings(deadline=None)
@given(members)
def test_no_member_leaves_the_directory(items) -> None:
    with tempfile.TemporaryDirectory() as outer:
        directory = Path(outer, "one", "two")
        directory.mkdir(parents=True)
        try:
            staged.stage_tar(tar_of(items), directory)
        except BangerError:
            pass
        outside = {
            path for path in everything_below(Path(outer)) if not path.startswith(b"one/two")
        }
        assert outside == {b"one"}


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "stage").mkdir()
    tar = tar_of(
        [
            ("door", tarfile.SYMTYPE, str(tmp_path / "victim")),
            ("door/planted", tarfile.REGTYPE, ""),
        ]
    )
    with pytest.raises(InvalidInput, match="not a directory"):
        staged.stage_tar(tar, tmp_path / "stage")
    assert list((tmp_path / "victim").iterdir()) == []


def test_a_later_file_replaces_an_earlier_one_and_never_writes_through_it(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "stage").mkdir()
    tar = tar_of([("f", tarfile.SYMTYPE, str(victim)), ("f", tarfile.REGTYPE, "")])
    tree = staged.stage_tar(tar, tmp_path / "stage")
    assert victim.read_bytes() == b"precious"
    assert (tree.root / "f").read_bytes() == b"data"
    assert not (tree.root / "f").is_symlink()


def test_members_without_their_directories_get_them(tmp_path: Path) -> None:
    tree = staged.stage_tar(tar_of([("a/b/c", tarfile.REGTYPE, "")]), tmp_path)
    assert (tree.root / "a/b/c").read_bytes() == b"data"
    assert len(tree.attributes) == 4


@pytest.mark.parametrize("key", ["SCHILY.xattr.user.a b", "SCHILY.xattr.user.a\nquit"])
def test_an_attribute_name_that_is_a_command_is_refused(tmp_path: Path, key: str) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("f")
        member.pax_headers = {key: "v"}
        archive.addfile(member, io.BytesIO(b""))
    out.seek(0)
    with pytest.raises(InvalidInput, match="unusable extended attribute"):
        staged.stage_tar(out, tmp_path)
