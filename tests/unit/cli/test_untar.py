"""What a hostile guest sends cannot leave the directory it is written in."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.cli import untar
from banger.errors import BangerError, Conflict, InvalidInput


def make_tar(
    *entries: tuple[str, str, str | bytes], kind_of_tar: int = tarfile.GNU_FORMAT
) -> bytes:
    """Build a tar of (name, kind, content or target)."""
    raw = io.BytesIO()
    with tarfile.open(
        fileobj=raw, mode="w", format=kind_of_tar, errors="surrogateescape"
    ) as archive:
        for name, kind, content in entries:
            info = tarfile.TarInfo(name)
            info.mode = 0o7755
            if kind == "file":
                data = content if isinstance(content, bytes) else content.encode()
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
                continue
            info.type = {"dir": b"5", "link": b"2", "hard": b"1", "char": b"3", "fifo": b"6"}[kind]
            info.linkname = content if isinstance(content, str) else os.fsdecode(content)
            archive.addfile(info)
    return raw.getvalue()


def extract(
    raw: bytes, root: Path, rename: tuple[bytes, bytes] | None = None
) -> tuple[untar.Extracted, list[str]]:
    warnings: list[str] = []
    fd = os.open(root, os.O_RDONLY)
    try:
        done = untar.extract(io.BytesIO(raw), fd, rename=rename, warn=warnings.append)
    finally:
        os.close(fd)
    return done, warnings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "in" / "root"
    made.mkdir(parents=True)
    (tmp_path / "in" / "outside").write_text("untouched")
    return made


@pytest.mark.parametrize("name", ["../outside", "/abs", "a/../../outside", "a/..", ".."])
def test_names_that_leave_are_refused(root: Path, name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        extract(make_tar((name, "file", "x")), root)
    assert caught.value.code == "unsafe_name"
    assert (root.parent / "outside").read_text() == "untouched"
    assert sorted(os.listdir(root.parent)) == ["outside", "root"]


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../x", "a/../../x", "..", "", "a/../b", "../../../../etc"]
)
def test_links_that_could_lead_out_are_left_out(root: Path, target: str) -> None:
    _, warnings = extract(make_tar(("l", "link", target)), root)
    assert os.listdir(root) == []
    assert len(warnings) == 1


def test_links_that_stay_are_kept(root: Path) -> None:
    extract(make_tar(("d/l", "link", "../x"), ("m", "link", "./d/l")), root)
    assert os.readlink(root / "d/l") == "../x"
    assert os.readlink(root / "m") == "./d/l"


def test_writing_through_a_link_of_the_same_tar_is_refused(root: Path) -> None:
    (root / "sub").mkdir()
    raw = make_tar(("l", "link", "sub"), ("l/x", "file", "x"))
    with pytest.raises(Conflict):
        extract(raw, root)
    assert os.listdir(root / "sub") == []


def test_a_link_in_the_way_is_replaced_not_followed(root: Path) -> None:
    (root / "x").symlink_to(root.parent / "outside")
    extract(make_tar(("x", "file", "new")), root)
    assert not (root / "x").is_symlink()
    assert (root / "x").read_text() == "new"
    assert (root.parent / "outside").read_text() == "untouched"


def test_a_directory_link_of_the_host_is_not_followed(root: Path) -> None:
    (root / "d").symlink_to(root.parent)
    with pytest.raises(Conflict):
        extract(make_tar(("d/outside", "file", "new")), root)
    assert (root.parent / "outside").read_text() == "untouched"


def test_hard_links_reach_files_of_the_same_tar_only(root: Path) -> None:
    (root / "mine").write_text("host's")
    raw = make_tar(("a", "file", "x"), ("b", "hard", "a"), ("c", "hard", "mine"))
    _, warnings = extract(raw, root)
    assert (root / "b").stat().st_ino == (root / "a").stat().st_ino
    assert not (root / "c").exists()
    assert len(warnings) == 1


def test_hard_link_to_a_link_is_not_made(root: Path) -> None:
    raw = make_tar(("a", "file", "x"), ("a", "link", "b"), ("c", "hard", "../outside"))
    with pytest.raises(InvalidInput):
        extract(raw, root)


def test_devices_and_pipes_are_left_out_and_setuid_is_dropped(root: Path) -> None:
    _, warnings = extract(
        make_tar(("c", "char", ""), ("p", "fifo", ""), ("x", "file", "x"), ("d", "dir", "")), root
    )
    assert sorted(os.listdir(root)) == ["d", "x"]
    assert stat.S_IMODE((root / "x").stat().st_mode) == 0o755
    assert stat.S_IMODE((root / "d").stat().st_mode) == 0o755
    assert len(warnings) == 2


@pytest.mark.parametrize("style", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_formats(root: Path, style: int) -> None:
    long = "/".join("d" * 40 for _ in range(5)) if style != tarfile.USTAR_FORMAT else "d/e"
    name = f"{long}/t\u00e9t\u00e9"
    raw = make_tar((name, "file", "content"), ("l", "link", "t" * 90), kind_of_tar=style)
    done, _ = extract(raw, root)
    assert done == (1, 7)
    assert (root / name).read_text() == "content"


def test_names_are_bytes(root: Path) -> None:
    names = [b"\xff\xfe", b"new\nline", b"sp ace", b"\x01"]
    extract(make_tar(*((os.fsdecode(name), "file", name) for name in names)), root)
    assert sorted(os.listdir(os.fsencode(root))) == sorted(names)


def test_rename_replaces_the_first_component(root: Path) -> None:
    raw = make_tar(("etc", "dir", ""), ("etc/a", "file", "a"), ("etc/b", "hard", "etc/a"))
    extract(raw, root, (b"etc", b"mine"))
    assert sorted(os.listdir(root / "mine")) == ["a", "b"]
    extract(raw, root, (b"etc", b""))
    assert sorted(os.listdir(root)) == ["a", "b", "mine"]


def test_entries_outside_the_asked_name_are_refused(root: Path) -> None:
    with pytest.raises(InvalidInput):
        extract(make_tar(("other/x", "file", "x")), root, (b"etc", b"mine"))
    assert os.listdir(root) == []


def test_gnu_tars_own_output_arrives(root: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / ("l" * 150)).mkdir(parents=True)
    (source / "big").write_bytes(os.urandom(300_000))
    (source / ("l" * 150) / "f").write_text("f")
    os.link(source / "big", source / "hard")
    (source / "link").symlink_to("big")
    for style in ("gnu", "posix"):
        raw = subprocess.run(["tar", "cf", "-", f"--format={style}", "-C", tmp_path, "source"],
                             check=True, capture_output=True).stdout  # fmt: skip
        extract(raw, root, (b"source", os.fsencode(style)))
        subprocess.run(["diff", "-r", source, root / style], check=True)
        assert os.readlink(root / style / "link") == "big"


def test_claimed_sizes_cannot_fill_memory(root: Path) -> None:
    from banger.services.workspaces import tar_header

    for kind in (b"L", b"K", b"x"):
        with pytest.raises(untar.BadTarError, match="too long"):
            extract(tar_header(b"x", kind, mode=0, size=1 << 40), root)
    with pytest.raises(untar.BadTarError):
        extract(tar_header(b"x", b"0", mode=0, size=1 << 40) + b"short", root)


@given(st.binary(max_size=1500), st.integers(0, 3000))
def test_any_bytes_are_an_error_or_fine(noise: bytes, at: int) -> None:
    import tempfile

    raw = bytearray(make_tar(("a", "file", "x" * 600), ("b", "link", "a"), ("c", "dir", "")))
    raw[at : at + len(noise)] = noise
    with tempfile.TemporaryDirectory() as name:
        inner = Path(name) / "root"
        inner.mkdir()
        try:
            extract(bytes(raw), inner)
        except (BangerError, OSError):
            pass
        assert os.listdir(name) == ["root"]


MEMBERS = st.tuples(
    st.text("ab./", max_size=8), st.sampled_from(["file", "dir", "link", "hard", "fifo"]),
    st.text("ab./", max_size=8),
)  # fmt: skip


@given(st.lists(MEMBERS, max_size=12))
def test_no_tar_writes_or_links_outside(members: list[tuple[str, str, str]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        inner = Path(name) / "x" / "root"
        inner.mkdir(parents=True)
        (inner.parent / "a").write_text("outside")
        try:
            extract(make_tar(*members), inner)
        except (BangerError, OSError):
            pass
        assert sorted(os.listdir(inner.parent)) == ["a", "root"]
        assert (inner.parent / "a").read_text() == "outside"
        assert (inner.parent / "a").stat().st_nlink == 1
        for parent, directories, files in os.walk(inner):
            for leaf in [*directories, *files]:
                try:
                    real = os.path.realpath(os.path.join(parent, leaf), strict=True)
                except OSError:
                    # A loop or a dangling link leads nowhere; not strict, realpath makes up a
                    # path for a loop with a slash behind it (`a -> a//` gives `/`).
                    continue
                assert real == str(inner) or real.startswith(f"{inner}/")
