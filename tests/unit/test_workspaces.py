"""Repositories as tar streams, against real git, read back by two other tars."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.errors import BangerError, Conflict, InvalidInput
from banger.services import safe_git, workspaces
from banger.services.workspace_sync import iter_copy
from banger.services.workspaces import open_workspace

GIT_ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example", "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@example", "LC_ALL": "C",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_user_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")


def git(directory: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-c", "protocol.file.allow=always", *words],
        cwd=directory, env=GIT_ENVIRONMENT, check=True, capture_output=True, text=True,
        errors="surrogateescape",
    ).stdout  # fmt: skip


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    made = tmp_path / "repo"
    made.mkdir()
    git(made, "init", "-q", "-b", "main")
    (made / "a.txt").write_text("a\n")
    (made / "sub").mkdir()
    (made / "sub" / "b.txt").write_text("b\n")
    (made / ".gitignore").write_text("*.o\n")
    git(made, "add", "-A")
    git(made, "commit", "-qm", "first")
    return made


def stream(path: Path, warnings: list[str] | None = None) -> bytes:
    told = [] if warnings is None else warnings
    return b"".join(iter_copy(open_workspace(str(path)), warn=told.append))


def unpack(
    path: Path, tmp_path: Path, warnings: list[str] | None = None, data: bytes | None = None
) -> Path:
    """Copy a repository through the stream (or `data` of it) and GNU tar; return the copy."""
    target = tmp_path / "guest" / open_workspace(str(path)).name
    target.mkdir(parents=True)
    data = stream(path, warnings) if data is None else data
    subprocess.run(["tar", "xf", "-", "-C", target], input=data, check=True)
    return target


def tree(root: Path) -> dict[bytes, tuple[int, bytes]]:
    """Return {path: (mode, content or target)} of a checkout, its .git left out."""
    found: dict[bytes, tuple[int, bytes]] = {}
    top = os.fsencode(root)
    for parent, directories, files in os.walk(top):
        if b".git" in directories:
            directories.remove(b".git")
        for leaf in [*files, *(d for d in directories if os.path.islink(os.path.join(parent, d)))]:
            path = os.path.join(parent, leaf)
            mode = os.lstat(path).st_mode
            link = os.path.islink(path)
            content = os.readlink(path) if link else Path(os.fsdecode(path)).read_bytes()
            found[os.path.relpath(path, top)] = (mode, content)
    return found


ODD_NAMES = [
    b"with space", b"new\nline", b"\xff\xfenot utf-8", b"-dash", b"quote'\"`$(x)", b"\\back",
    b"t\xc3\xa9", b"tab\tx", b"*", b"trailing ", b"x" * 255,
]  # fmt: skip


def test_every_odd_name_link_and_mode_arrives(repo: Path, tmp_path: Path) -> None:
    for number, name in enumerate(ODD_NAMES):
        path = os.path.join(os.fsencode(repo), name)
        with open(path, "wb") as file:
            file.write(b"%d" % number)
        os.chmod(path, 0o755 if number % 2 else 0o644)
    os.symlink(b"nowhere\xff", os.fsencode(repo) + b"/link")
    os.symlink("/etc/passwd", repo / "absolute")
    os.symlink("sub", repo / "dirlink")
    os.symlink("t" * 200, repo / "longlink")
    deep = repo / ("d" * 120) / ("e" * 120)
    deep.mkdir(parents=True)
    (deep / ("f" * 100)).write_text("deep")
    (repo / "empty").touch()
    (repo / "untracked").write_text("u")
    git(repo, "add", "--", "empty", "link")
    copy = unpack(repo, tmp_path)
    assert tree(copy) == tree(repo)
    assert git(copy, "status", "--porcelain", "-z") == git(repo, "status", "--porcelain", "-z")


def test_bsdtar_and_tarfile_read_what_gnu_tar_reads(repo: Path, tmp_path: Path) -> None:
    for name in ODD_NAMES:
        Path(os.fsdecode(os.path.join(os.fsencode(repo), name))).write_bytes(name)
    data = stream(repo)
    copy = unpack(repo, tmp_path, data=data)
    names = subprocess.run(["tar", "tf", "-", "--null", "--quoting-style=literal"],
                           input=data, check=True, capture_output=True).stdout  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as archive:
        members = [os.fsencode(member.name) for member in archive]
        for member in archive:
            if member.isfile():
                path = os.path.join(os.fsencode(copy), os.fsencode(member.name))
                extracted = archive.extractfile(member)
                assert extracted is not None
                assert extracted.read() == Path(os.fsdecode(path)).read_bytes()
    assert all(name in names for name in ODD_NAMES)
    assert not any(name.startswith(b"/") or b".." in name.split(b"/") for name in members)
    assert len(members) == len(set(members))
    assert tree(copy) == tree(repo)


def test_bsdtar_agrees(repo: Path, tmp_path: Path) -> None:
    import shutil

    if shutil.which("bsdtar") is None:
        pytest.skip("bsdtar (libarchive-tools) is not installed")
    for name in ODD_NAMES:
        Path(os.fsdecode(os.path.join(os.fsencode(repo), name))).write_bytes(name)
    target = tmp_path / "bsd"
    target.mkdir()
    subprocess.run(["bsdtar", "xf", "-", "-C", target], input=stream(repo), check=True)
    assert tree(target / "repo") == tree(repo)


def test_ignored_and_deleted_files_stay_out(repo: Path, tmp_path: Path) -> None:
    (repo / "x.o").write_text("object")
    (repo / "a.txt").unlink()
    (repo / "new").write_text("n")
    copy = unpack(repo, tmp_path)
    assert sorted(os.listdir(copy)) == [".git", ".gitignore", "new", "sub"]
    assert git(copy, "status", "--porcelain") == " D a.txt\n?? new\n"


def test_git_works_inside(repo: Path, tmp_path: Path) -> None:
    git(repo, "branch", "other")
    git(repo, "tag", "v1")
    git(repo, "stash", "list")
    git(repo, "gc", "-q")
    (repo / "c").write_text("c")
    git(repo, "add", "c")
    copy = unpack(repo, tmp_path)
    assert git(copy, "status", "--porcelain") == "A  c\n"
    assert git(copy, "log", "--oneline", "--all") == git(repo, "log", "--oneline", "--all")
    assert git(copy, "for-each-ref") == git(repo, "for-each-ref")
    git(copy, "fsck", "--strict")
    git(copy, "commit", "-qm", "second")
    git(copy, "checkout", "-q", "other")


def test_the_hosts_repository_is_not_touched(repo: Path) -> None:
    def state() -> list[tuple[str, int, int]]:
        return sorted(
            (os.path.join(parent, name), found.st_mtime_ns, found.st_ino)
            for parent, directories, files in os.walk(repo)
            for name in [*files, *directories]
            for found in [os.lstat(os.path.join(parent, name))]
        )

    os.utime(repo / "a.txt", (1, 1))  # a stat difference git would like to refresh
    before = state()
    stream(repo)
    assert state() == before


def test_nothing_of_a_hostile_repository_runs(repo: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh\necho ran >> {marker}\n")
    script.chmod(0o755)
    for key in ("core.fsmonitor", "core.sshCommand", "core.pager", "core.askPass",
                "diff.external", "filter.x.clean", "filter.x.smudge", "filter.x.process",
                "core.editor", "credential.helper", "pager.ls-files", "alias.ls-files",
                "uploadpack.packObjectsHook", "core.alternateRefsCommand"):  # fmt: skip
        git(repo, "config", key, str(script))
    (repo / ".gitattributes").write_text("* filter=x\n")
    for hook in ("post-index-change", "pre-auto-gc", "reference-transaction", "fsmonitor"):
        path = repo / ".git" / "hooks" / hook
        path.parent.mkdir(exist_ok=True)
        path.write_text(script.read_text())
        path.chmod(0o755)
    os.utime(repo / "a.txt", (1, 1))
    workspace = open_workspace(str(repo))
    workspaces.check_branch(workspace, "new", None)
    stream(repo)
    assert not marker.exists()


def test_links_are_never_followed(repo: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b.txt").write_text("secret")
    (repo / "sub" / "b.txt").unlink()
    (repo / "sub").rmdir()
    (repo / "sub").symlink_to(outside)
    data = stream(repo)
    assert b"secret" not in data
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert archive.getmember("sub").issym()
        assert "sub/b.txt" not in archive.getnames()


def test_sockets_and_pipes_are_left_out(repo: Path, tmp_path: Path) -> None:
    os.mkfifo(repo / "pipe")
    git(repo, "update-index", "--add", "--cacheinfo",
        f"100644,{git(repo, 'hash-object', '-w', 'a.txt').strip()},pipe")  # fmt: skip
    warnings: list[str] = []
    copy = unpack(repo, tmp_path, warnings)
    assert not (copy / "pipe").exists()
    assert any("pipe" in warning for warning in warnings)


def test_subdirectory_stands_for_its_repository(repo: Path) -> None:
    assert open_workspace(str(repo / "sub")) == (str(repo), "repo", True, None)
    assert open_workspace(str(repo)).guest_directory == "/root/repo"


def test_bad_paths_are_named(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    git(tmp_path, "init", "-q", "--bare", "bare.git")
    for path, message in [
        ("missing", "does not exist"), ("repo/a.txt", "not a directory"), ("plain", "not in a git"),
        ("bare.git", "bare"), ("repo/.git", "bare repository, or inside"),
    ]:  # fmt: skip
        with pytest.raises(InvalidInput, match=message) as caught:
            open_workspace(str(tmp_path / path))
        assert caught.value.hint


def test_repository_without_commits_is_fine(tmp_path: Path) -> None:
    made = tmp_path / "fresh"
    made.mkdir()
    git(made, "init", "-q")
    (made / "x").write_text("x")
    copy = unpack(made, tmp_path)
    assert git(copy, "status", "--porcelain") == "?? x\n"


def test_dubious_ownership_has_a_hint() -> None:
    error = safe_git.failure("/x", "fatal: detected dubious ownership in repository at '/x'")
    assert isinstance(error, BangerError)
    assert "safe.directory" in error.hint


@pytest.mark.parametrize(
    ("top", "name"),
    [
        (b"/a/repo", "repo"), (b"/a/my project", "my-project"), (b"/a/.ssh", "ssh"),
        (b"/a/-x", "x"), (b"/a/\xff\n", "repo"), (b"/", "repo"), (b"/a/..x", "x"),
        (b"/a/bar\xc3\xa9", "bar"),
    ],
)  # fmt: skip
def test_guest_name(top: bytes, name: str) -> None:
    assert workspaces.guest_name(top) == name


def test_git_environment_of_a_hook_is_ignored(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    monkeypatch.setenv("GIT_INDEX_FILE", "/nonexistent/index")
    assert open_workspace(str(repo)).name == "repo"
    assert b"a.txt" in stream(repo)


# -- repositories of other shapes


def test_linked_worktree_becomes_a_plain_repository(repo: Path, tmp_path: Path) -> None:
    git(repo, "worktree", "add", "-q", "-b", "side", str(tmp_path / "side"))
    side = tmp_path / "side"
    (side / "s").write_text("s")
    git(side, "add", "s")
    copy = unpack(side, tmp_path)
    assert (copy / ".git").is_dir()
    assert git(copy, "status", "--porcelain", "-b") == "## side\nA  s\n"
    assert git(copy, "worktree", "list").count("\n") == 1
    git(copy, "fsck", "--strict")
    git(copy, "commit", "-qm", "in the guest")


def test_alternates_are_folded_in(repo: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", "--shared", str(repo), "shared")
    copy = unpack(tmp_path / "shared", tmp_path)
    assert not (copy / ".git/objects/info/alternates").exists()
    repo.rename(tmp_path / "gone")
    git(copy, "fsck", "--strict")
    assert git(copy, "status", "--porcelain") == ""


def test_submodules_come_along_and_work(repo: Path, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    git(inner, "init", "-q")
    (inner / "i").write_text("i")
    git(inner, "add", "-A")
    git(inner, "commit", "-qm", "i")
    git(repo, "submodule", "-q", "add", str(inner), "lib/inner")
    git(repo, "submodule", "-q", "add", str(inner), "absent")
    git(repo, "commit", "-qm", "submodules")
    git(repo, "submodule", "-q", "deinit", "absent")
    (repo / "lib/inner/untracked").write_text("u")
    copy = unpack(repo, tmp_path)
    assert (copy / "lib/inner/i").read_text() == "i"
    assert (copy / "lib/inner/untracked").read_text() == "u"
    assert (copy / "absent").is_dir()
    assert git(copy, "status", "--porcelain") == git(repo, "status", "--porcelain")
    assert git(copy / "lib/inner", "log", "--oneline") == git(inner, "log", "--oneline")
    git(copy / "lib/inner", "fsck", "--strict")


def test_untracked_repository_inside_comes_along(repo: Path, tmp_path: Path) -> None:
    nested = repo / "nested"
    nested.mkdir()
    git(nested, "init", "-q")
    (nested / "n").write_text("n")
    git(nested, "add", "-A")
    git(nested, "commit", "-qm", "n")
    copy = unpack(repo, tmp_path)
    assert git(copy, "status", "--porcelain") == "?? nested/\n"
    assert git(copy / "nested", "status", "--porcelain") == ""


def test_locks_and_half_written_files_stay_out(repo: Path, tmp_path: Path) -> None:
    (repo / ".git/index.lock").touch()
    (repo / ".git/objects/pack/tmp_pack_x").touch()
    copy = unpack(repo, tmp_path)
    assert not (copy / ".git/index.lock").exists()
    assert not (copy / ".git/objects/pack/tmp_pack_x").exists()


# -- the config of the copy


def test_secrets_and_host_paths_stay_here(repo: Path, tmp_path: Path) -> None:
    secret = "hunter2"
    for key, value in [
        ("remote.origin.url", f"https://me:{secret}@example.com/r.git"),
        ("remote.token.url", f"https://{secret}@example.com/r.git"),
        ("remote.ssh.url", f"ssh://git:{secret}@example.com/r.git"),
        ("remote.scp.url", "git@example.com:r.git"),
        (f"url.https://x:{secret}@example.com/.insteadOf", "https://example.com/"),
        ("http.https://example.com/.extraHeader", f"AUTHORIZATION: basic {secret}"),
        ("credential.helper", f"!echo {secret}"),
        ("core.worktree", str(repo)), ("core.hooksPath", "/host/hooks"), ("include.path", "/x"),
        ("commit.gpgSign", "true"), ("quoted.value", ' "a\\b"; # \t\n'), ("branch.a.b.merge", "x"),
    ]:  # fmt: skip
        git(repo, "config", key, value)
    copy = unpack(repo, tmp_path)
    text = (copy / ".git/config").read_text()
    assert secret not in text
    assert secret not in "".join(
        str(path.read_bytes()) for path in (copy / ".git").rglob("*") if path.is_file()
    )

    def value(key: str) -> str:
        return git(copy, "config", key).removesuffix("\n")

    assert value("remote.origin.url") == "https://example.com/r.git"
    assert value("remote.ssh.url") == "ssh://git@example.com/r.git"
    assert value("remote.scp.url") == "git@example.com:r.git"
    assert value("quoted.value") == ' "a\\b"; # \t\n'
    assert value("branch.a.b.merge") == "x"
    for key in ("core.worktree", "core.hookspath", "include.path", "commit.gpgsign"):
        assert key not in git(copy, "config", "--list")


def test_identity_of_the_user_goes_along(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gitconfig"
    path.write_text("[user]\n\tname = Ann\n\temail = ann@example\n[credential]\n\thelper = x\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(path))
    copy = unpack(repo, tmp_path)
    assert git(copy, "config", "user.name") == "Ann\n"
    assert "credential" not in (copy / ".git/config").read_text()


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
def test_rendered_config_is_read_back_exactly(values: list[str]) -> None:
    import tempfile

    entries = [(f's.sub.{"x" * n} "y\\.k', value) for n, value in enumerate(values)]
    with tempfile.NamedTemporaryFile() as file:
        file.write(workspaces.render_config(entries).encode())
        file.flush()
        listed = subprocess.run(
            ["git", "config", "--file", file.name, "--list", "-z"],
            env=GIT_ENVIRONMENT, check=True, capture_output=True,
        ).stdout  # fmt: skip
    assert workspaces._parse_config(listed) == entries


def test_branches_are_checked_before_anything_is_made(repo: Path) -> None:
    workspace = open_workspace(str(repo))
    workspaces.check_branch(workspace, "new", "main")
    workspaces.check_branch(workspace, "main", None)
    assert workspaces.branch_argv(workspace, "main", None)[-2:] == [b"main", b"--"]
    assert workspaces.branch_argv(workspace, "new", "main")[-4:] == [b"-b", b"new", b"main", b"--"]
    with pytest.raises(Conflict, match="exists already"):
        workspaces.check_branch(workspace, "main", "main")
    for name, ref in [("a b", None), ("-x", None), ("ok", "nothing"), ("ok", "--all")]:
        with pytest.raises(InvalidInput):
            workspaces.check_branch(workspace, name, ref)


# -- tar


@given(
    st.binary(min_size=1, max_size=300).filter(lambda b: b"\0" not in b and b.strip(b"/") == b),
    st.binary(max_size=2000),
    st.binary(min_size=1, max_size=300).filter(lambda b: b"\0" not in b),
)
def test_header_reads_back(name: bytes, data: bytes, link: bytes) -> None:
    raw = workspaces.tar_header(name, b"0", mode=0o755, size=len(data), mtime=7)
    raw += data + bytes(-len(data) % 512)
    raw += workspaces.tar_header(name, b"2", mode=0o777, link=link) + bytes(1024)
    with tarfile.open(fileobj=io.BytesIO(raw), errors="surrogateescape") as archive:
        first, second = archive.getmembers()
        extracted = archive.extractfile(first)
        assert extracted is not None
        assert extracted.read() == data
    assert (os.fsencode(first.name), first.mode, first.mtime) == (name, 0o755, 7)
    assert (first.uid, first.gid, first.uname) == (0, 0, "root")
    assert os.fsencode(second.linkname) == link


def test_huge_sizes_are_exact() -> None:
    raw = workspaces.tar_header(b"x", b"0", mode=0o644, size=9 << 33)
    assert tarfile.TarInfo.frombuf(raw, "utf-8", "strict").size == 9 << 33


def _changing(tmp_path: Path, change: Callable[[Path], None], size: int) -> tuple[bytes, list[str]]:
    """Return the entry of a file that changes between its header and its data."""
    path = tmp_path / "f"
    path.write_bytes(b"x" * size)
    warnings: list[str] = []
    fd = os.open(path, os.O_RDONLY)
    pieces = workspaces.tar_file(fd, b"f", os.fstat(fd), warnings.append)
    header = next(pieces)
    change(path)
    entry = header + b"".join(pieces)
    os.close(fd)
    with tarfile.open(fileobj=io.BytesIO(entry + bytes(1024))) as archive:
        extracted = archive.extractfile(archive.getmembers()[0])
        assert extracted is not None
        return extracted.read(), warnings


@pytest.mark.parametrize("size", [100, 512, 256 * 1024, 600_000])
def test_file_that_shrinks_is_filled(tmp_path: Path, size: int) -> None:
    data, warnings = _changing(tmp_path, lambda path: os.truncate(path, 40), size)
    assert data == b"x" * 40 + bytes(size - 40)
    assert "shrank" in warnings[0]


@pytest.mark.parametrize("size", [0, 100, 512, 256 * 1024, 600_000])
def test_file_that_grows_is_cut(tmp_path: Path, size: int) -> None:
    def grow(path: Path) -> None:
        with open(path, "ab") as file:
            file.write(b"more")

    data, warnings = _changing(tmp_path, grow, size)
    assert data == b"x" * size
    assert "grew" in warnings[0]


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 256 * 1024 - 1, 256 * 1024, 256 * 1024 + 1])
def test_file_that_stays_is_exact(tmp_path: Path, size: int) -> None:
    assert _changing(tmp_path, lambda path: None, size) == (b"x" * size, [])


def test_repack_while_copying_loses_nothing(repo: Path, tmp_path: Path) -> None:
    for number in range(30):
        (repo / "a.txt").write_text(f"{number}\n")
        git(repo, "commit", "-qam", str(number))
    stop = threading.Event()

    def repack() -> None:
        while not stop.is_set():
            git(repo, "repack", "-qad")
            git(repo, "pack-refs", "--all")
            git(repo, "commit", "-q", "--allow-empty", "-m", "more")

    thread = threading.Thread(target=repack)
    thread.start()
    try:
        for number in range(8):
            target = tmp_path / str(number)
            target.mkdir()
            subprocess.run(["tar", "xf", "-", "-C", target], input=stream(repo), check=True)
            git(target, "fsck", "--full")
            assert int(git(target, "rev-list", "--count", "HEAD")) >= 31
    finally:
        stop.set()
        thread.join()


def test_memory_stays_bounded(repo: Path) -> None:
    with open(repo / "big", "wb") as file:
        file.truncate(64 << 20)
    chunks = iter_copy(open_workspace(str(repo)))
    assert max(len(chunk) for chunk in chunks) <= 1 << 20
