"""`vm workspace prepare` and `sync` from the terminal's side, with real git and the real agent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from banger.errors import Unavailable
from banger.guest import agent
from banger.guest.transport import endpoint_from_wire
from banger.services import copy_manifest, workspace_sync
from banger.services.guest_paths import Target
from banger.services.workspaces import Entry, open_workspace
from tests.integration.test_workspaces import Machine, machine, repo

__all__ = ["machine", "repo"]  # fixtures
pytestmark = pytest.mark.integration


def git(directory: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-c", "user.name=g", "-c", "user.email=g@example", *words],
        cwd=directory, check=True, capture_output=True, text=True, errors="surrogateescape",
    ).stdout.strip()  # fmt: skip


def tree(root: Path) -> dict[str, tuple[int, bytes]]:
    found = {}
    for path in root.rglob("*"):
        below = str(path.relative_to(root))
        if below.split("/")[0] == ".git" or (path.is_dir() and not path.is_symlink()):
            continue
        link = path.is_symlink()
        found[below] = (
            path.lstat().st_mode, os.fsencode(os.readlink(path)) if link else path.read_bytes(),
        )  # fmt: skip
    return found


class Copy:
    """The repository here, its copy there, and the two commands."""

    def __init__(self, machine: Machine, repo: Path) -> None:
        self.machine = machine
        self.repo = repo
        self.there = machine.guest_home / "repo"

    def run(self, action: str, *words: str, status: int = 0) -> Any:
        ran = self.machine.run("vm", "workspace", action, "box", str(self.repo), "--json", *words)
        assert ran.returncode == status, (ran.returncode, ran.stdout, ran.stderr)
        return json.loads(ran.stdout)

    def prepare(self, *words: str, status: int = 0) -> Any:
        return self.run("prepare", *words, status=status)

    def sync(self, *words: str, status: int = 0) -> Any:
        return self.run("sync", *words, status=status)

    def same(self) -> None:
        assert tree(self.there) == tree(self.repo)
        status = ("status", "--porcelain", "-z")
        assert git(self.there, *status) == git(self.repo, *status)

    def target(self) -> Target:
        workspace = open_workspace(str(self.repo))._replace(directory=str(self.there))
        return Target("box", endpoint_from_wire(self.machine.endpoint), workspace)


@pytest.fixture
def copy(machine: Machine, repo: Path) -> Copy:
    return Copy(machine, repo)


def conflicts(said: Any) -> list[str]:
    return [one["path"] for one in said["conflicts"]]


HOSTILE = [
    b"new\nline",
    b"-rf",
    b"--",
    b"\xff\xfe",
    b"a b",
    b"$(x)`'\"",
    b"\\",
    b"*",
    b"x/\n",
    b"t\t",
]


def test_every_kind_of_change_arrives(copy: Copy) -> None:
    top = os.fsencode(copy.repo)
    (copy.repo / "x").mkdir()
    for name in HOSTILE[:-2]:
        Path(os.fsdecode(os.path.join(top, name))).write_bytes(name)
    Path(os.fsdecode(top + b"/x/\n")).write_text("1")
    (copy.repo / "link").symlink_to("nowhere\n")
    for plain in ("file-to-dir", "file", "to-link"):
        (copy.repo / plain).write_text(plain)
    (copy.repo / "dir-to-file" / "deep").mkdir(parents=True)
    (copy.repo / "dir-to-file" / "deep" / "f").write_text("f")
    (copy.repo / "gone" / "deep").mkdir(parents=True)
    (copy.repo / "gone" / "deep" / "f").write_text("f")
    first = copy.prepare()
    assert (first["git"], first["conflicts"], first["sent"] > 10) == ("sent", [], True)
    copy.same()
    for name in HOSTILE[:4]:
        Path(os.fsdecode(os.path.join(top, name))).write_bytes(b"changed")
    for name in HOSTILE[4:6]:
        os.unlink(os.path.join(top, name))
    (copy.repo / "file-to-dir").unlink()
    (copy.repo / "file-to-dir").mkdir()
    (copy.repo / "file-to-dir" / "x").write_text("x")
    shutil.rmtree(copy.repo / "dir-to-file")
    (copy.repo / "dir-to-file").write_text("now a file")
    shutil.rmtree(copy.repo / "gone")
    (copy.repo / "to-link").unlink()
    (copy.repo / "to-link").symlink_to("file")
    (copy.repo / "link").unlink()
    (copy.repo / "link").write_text("now a file")
    (copy.repo / "file").chmod(0o755)
    second = copy.prepare()
    assert (second["sent"], second["deleted"], second["conflicts"]) == (9, 5, [])
    copy.same()
    assert not (copy.there / "gone").exists()
    assert copy.prepare()["sent"] == 0


def test_the_second_time_only_what_changed_goes(copy: Copy) -> None:
    for number in range(300):
        (copy.repo / f"f{number}").write_text("x" * 5000)
    whole = copy.prepare()
    (copy.repo / "f7").write_text("y")
    second = copy.prepare()
    assert (second["sent"], second["deleted"], second["git"]) == (1, 0, "same")
    assert second["bytes"] < whole["bytes"] / 20
    third = copy.sync()
    assert (third["sent"], third["bytes"]) == (0, 0)


def test_an_edit_of_one_size_within_a_second_goes(copy: Copy) -> None:
    copy.prepare()
    for text in ("one", "two", "six"):
        (copy.repo / "run.sh").write_text(text)
        assert copy.sync()["sent"] == 1
        assert (copy.there / "run.sh").read_text() == text


def test_the_copy_of_vm_run_is_one(copy: Copy) -> None:
    ran = copy.machine.run("vm", "run", str(copy.repo), "--branch", "fix", "--", "true")
    assert ran.returncode == 0, ran.stderr
    (copy.repo / "run.sh").write_text("newer")
    said = copy.sync()
    assert (said["sent"], said["git"], said["conflicts"]) == (1, "same", [])
    assert (copy.there / "run.sh").read_text() == "newer"
    assert git(copy.there, "branch", "--show-current") == "fix"


def test_changes_of_the_guest_stay_until_told_otherwise(copy: Copy) -> None:
    for name in ("both", "theirs", "deleted-there", "deleted-here", "same"):
        (copy.repo / name).write_text("1")
    copy.prepare()
    for name in ("both", "theirs", "deleted-here", "same"):
        (copy.there / name).write_text("guest")
    (copy.there / "deleted-there").unlink()
    (copy.there / "made-by-both").write_text("guest")
    (copy.there / "guests-own").write_text("guest")
    for name in ("both", "deleted-there", "made-by-both", "free"):
        (copy.repo / name).write_text("host!")
    (copy.repo / "deleted-here").unlink()
    (copy.repo / "same").write_text("guest")
    wanted = ["both", "deleted-here", "deleted-there", "made-by-both"]
    for action in (copy.prepare, copy.sync):
        said = action(status=1)
        assert conflicts(said) == wanted
    assert (copy.there / "free").read_text() == "host!"
    for name in ("both", "theirs", "deleted-here", "made-by-both", "guests-own", "same"):
        assert (copy.there / name).read_text() == "guest"
    assert not (copy.there / "deleted-there").exists()
    told = copy.machine.run("vm", "workspace", "sync", "box", str(copy.repo))
    assert b"both stays as it is there: changed there and here" in told.stderr
    assert b"--overwrite" in told.stderr
    said = copy.prepare("--overwrite")
    assert (said["sent"], said["deleted"], said["conflicts"]) == (3, 1, [])
    for name in ("both", "deleted-there", "made-by-both"):
        assert (copy.there / name).read_text() == "host!"
    assert not (copy.there / "deleted-here").exists()
    # What only the guest changed is not in the way of anything.
    assert (copy.there / "theirs").read_text() == (copy.there / "guests-own").read_text() == "guest"


def test_conflicts_of_odd_names_are_told(copy: Copy) -> None:
    name = os.fsdecode(b"odd\xff\n\x1b[2J")
    (copy.repo / name).write_text("1")
    copy.prepare()
    (copy.there / name).write_text("guest")
    (copy.repo / name).write_text("host!")
    assert conflicts(copy.sync(status=1)) == [name]
    told = copy.machine.run("vm", "workspace", "sync", "box", str(copy.repo)).stderr
    assert b"stays as it is there" in told
    assert b"\x1b" not in told


def test_shallow_becomes_full(copy: Copy) -> None:
    (copy.repo / "run.sh").write_text("2")
    git(copy.repo, "commit", "-qam", "2")
    copy.prepare("--mode", "shallow")
    said = copy.prepare("--mode", "full")
    assert (said["sent"], said["git"], said["conflicts"]) == (0, "sent", [])
    assert git(copy.there, "log", "--format=%s") == "2\nx"
    git(copy.there, "fsck", "--strict")


def test_a_directory_with_files_of_the_guests_is_not_replaced(copy: Copy) -> None:
    (copy.repo / "d").mkdir()
    (copy.repo / "d" / "f").write_text("f")
    copy.prepare()
    (copy.there / "d" / "own").write_text("mine")
    shutil.rmtree(copy.repo / "d")
    (copy.repo / "d").write_text("a file")
    assert conflicts(copy.sync(status=1)) == ["d"]
    assert (copy.there / "d" / "own").read_text() == "mine"


def test_links_that_the_guest_puts_in_the_way_lead_nowhere(copy: Copy, tmp_path: Path) -> None:
    (copy.repo / "d").mkdir()
    for name in ("f", "g"):
        (copy.repo / "d" / name).write_text("1")
    copy.prepare()
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("f", "g"):
        (victim / name).write_text("precious")
    shutil.rmtree(copy.there / "d")
    (copy.there / "d").symlink_to(victim)
    (copy.repo / "d" / "f").write_text("22")
    (copy.repo / "d" / "g").unlink()
    assert conflicts(copy.sync(status=1)) == ["d/f", "d/g"]
    assert conflicts(copy.prepare("--overwrite")) == []
    assert [(victim / name).read_text() for name in ("f", "g")] == ["precious"] * 2
    assert (copy.there / "d" / "f").read_text() == "22"
    assert not (copy.there / "d").is_symlink()


# -- .git


def test_commits_go_along_and_the_guests_stay(copy: Copy) -> None:
    copy.prepare()
    (copy.repo / "run.sh").write_text("second")
    git(copy.repo, "commit", "-qam", "second")
    git(copy.repo, "branch", "side/deep")
    said = copy.sync()
    assert (said["git"], said["conflicts"]) == ("sent", [])
    copy.same()
    assert git(copy.there, "for-each-ref") == git(copy.repo, "for-each-ref")
    git(copy.there, "fsck", "--strict")
    git(copy.repo, "pack-refs", "--all")
    git(copy.repo, "branch", "-D", "side/deep")
    assert copy.sync()["git"] == "sent"
    assert git(copy.there, "for-each-ref") == git(copy.repo, "for-each-ref")

    (copy.there / "own").write_text("own")
    git(copy.there, "add", "own")
    git(copy.there, "commit", "-qm", "the guest's")
    own = git(copy.there, "rev-parse", "HEAD")
    (copy.repo / "run.sh").write_text("third")
    git(copy.repo, "commit", "-qam", "third")
    said = copy.sync(status=1)
    assert (said["git"], conflicts(said), said["sent"]) == ("conflict", [".git"], 1)
    assert git(copy.there, "rev-parse", "HEAD") == own
    told = copy.machine.run("vm", "workspace", "sync", "box", str(copy.repo)).stderr
    assert b"vm workspace pull box" in told

    # Its commits come home and are merged here: then nothing is in the way any more.
    pulled = copy.machine.run("vm", "workspace", "pull", "box", str(copy.repo))
    assert pulled.returncode == 0, pulled.stderr
    git(copy.repo, "merge", "-q", "-m", "merged", "banger/box/main")
    said = copy.prepare("--overwrite")
    assert (said["git"], said["conflicts"]) == ("sent", [])
    assert git(copy.there, "rev-parse", "HEAD") == git(copy.repo, "rev-parse", "HEAD")
    copy.same()
    git(copy.there, "fsck", "--strict")


def test_what_was_pulled_and_merged_is_no_conflict(copy: Copy) -> None:
    copy.prepare()
    (copy.there / "own").write_text("own")
    git(copy.there, "add", "own")
    git(copy.there, "commit", "-qm", "the guest's")
    copy.machine.run("vm", "workspace", "pull", "box", str(copy.repo))
    git(copy.repo, "merge", "-q", "--ff-only", "banger/box/main")
    assert copy.sync()["conflicts"] == []
    copy.same()


def test_a_look_with_git_status_is_no_change(copy: Copy) -> None:
    copy.prepare()
    git(copy.there, "status")  # refreshes the index there
    os.utime(copy.repo / "run.sh")
    git(copy.repo, "status")  # and here
    assert copy.sync()["git"] == "same"
    (copy.repo / "new").write_text("n")
    git(copy.repo, "add", "new")
    said = copy.sync()
    assert (said["git"], said["conflicts"]) == ("sent", [])
    copy.same()


def test_shallow_has_one_commit_and_grows(copy: Copy) -> None:
    (copy.repo / "run.sh").write_text("2")
    git(copy.repo, "commit", "-qam", "2")
    (copy.repo / "staged").write_text("staged")
    git(copy.repo, "add", "staged")
    copy.prepare("--mode", "shallow")
    assert git(copy.there, "log", "--format=%s") == "2"
    copy.same()
    assert not list((copy.there / ".git").glob("objects/??"))
    git(copy.there, "fsck", "--strict")
    git(copy.repo, "commit", "-qm", "3")
    said = copy.prepare()
    assert (said["git"], said["conflicts"]) == ("sent", [])
    assert git(copy.there, "log", "-1", "--format=%s") == "3"
    copy.same()
    git(copy.there, "fsck", "--strict")
    git(copy.there, "commit", "-q", "--allow-empty", "-m", "there")
    git(copy.there, "reset", "-q", "--soft", "HEAD~")
    copy.prepare("--mode", "full", "--overwrite")
    assert git(copy.there, "log", "--format=%s") == "3\n2\nx"
    git(copy.there, "fsck", "--strict")
    assert (
        b"whole history"
        in copy.machine.run(
            "vm", "workspace", "prepare", "box", str(copy.repo), "--mode", "shallow"
        ).stderr
    )


def test_nested_repositories_follow(copy: Copy) -> None:
    inner = copy.repo / "inner"
    git(copy.repo, "init", "-q", "inner")
    (inner / "i").write_text("i")
    git(inner, "add", "-A")
    git(inner, "commit", "-qm", "i")
    copy.prepare()
    (inner / "i").write_text("ii")
    git(inner, "commit", "-qam", "ii")
    said = copy.sync()
    assert (said["sent"], said["git"]) == (1, "sent")
    assert git(copy.there / "inner", "log", "-1", "--format=%s") == "ii"
    git(copy.there / "inner", "fsck", "--strict")
    shutil.rmtree(inner)
    copy.sync()
    assert not (copy.there / "inner").exists()


def test_branches_are_checked_out_again(copy: Copy) -> None:
    for _ in range(2):
        copy.prepare("--branch", "fix")
        assert git(copy.there, "branch", "--show-current") == "fix"
    again = copy.machine.run("vm", "workspace", "prepare", "box", str(copy.repo),
                             "--branch", "fix", "--from", "main")  # fmt: skip
    assert again.returncode == 125
    assert b"exists already in box" in again.stderr
    assert git(copy.repo, "branch", "--list", "fix") == ""


def test_untracked_files_are_left_out_when_asked_to(copy: Copy) -> None:
    (copy.repo / "u").write_text("u")
    copy.prepare("--no-include-untracked")
    assert not (copy.there / "u").exists()
    copy.sync()
    assert not (copy.there / "u").exists()
    copy.prepare("--include-untracked")
    assert (copy.there / "u").exists()


# -- hostile sides


@pytest.mark.parametrize(
    "path", ["-x", "--upload-pack=x", "../..", "rel", "/", "/etc", "/root/../etc", "/proc/1/cwd"]
)
def test_guest_paths_are_no_way_out(copy: Copy, path: str) -> None:
    for action in ("prepare", "sync"):
        ran = copy.machine.run("vm", "workspace", action, "box", str(copy.repo),
                               f"--guest-path={path}")  # fmt: skip
        assert ran.returncode in (2, 125)
        assert b"hint: " in ran.stderr
    ran = copy.machine.run(
        "vm", "workspace", "prepare", "box", str(copy.repo), "--guest-path", path
    )
    assert ran.returncode in (2, 125)


def test_what_is_no_copy_of_ours_is_not_touched(copy: Copy) -> None:
    with_files = copy.machine.guest_home / "theirs"
    with_files.mkdir()
    (with_files / "f").write_text("f")
    a_file = copy.machine.guest_home / "file"
    a_file.write_text("f")
    for path in (with_files, a_file):
        for more in ([], ["--overwrite"]):
            said = copy.prepare("--guest-path", str(path), *more, status=125)
            assert "no copy that banger made" in said["error"]["message"]
    assert os.listdir(with_files) == ["f"]
    empty = copy.machine.guest_home / "empty"
    empty.mkdir()
    copy.prepare("--guest-path", str(empty))
    assert (empty / "run.sh").exists()
    assert copy.sync(status=125)["error"]["code"] == "not_found"


def test_the_copy_of_another_repository_is_not_replaced(copy: Copy, tmp_path: Path) -> None:
    copy.prepare()
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    (other / "o").write_text("o")
    ran = copy.machine.run("vm", "workspace", "prepare", "box", str(other),
                           "--guest-path", str(copy.there))  # fmt: skip
    assert ran.returncode == 125
    assert b"is a copy of repo, not of other" in ran.stderr
    assert (copy.there / "run.sh").exists()


@pytest.mark.parametrize("text", [b"garbage", b"x" * (70 << 20), b""], ids=["bad", "huge", "none"])
def test_a_broken_manifest_is_said_and_made_anew(copy: Copy, text: bytes) -> None:
    copy.prepare()
    (copy.there / ".git/banger/manifest").write_bytes(text)
    (copy.there / "run.sh").write_text("guest")
    said = copy.sync(status=125)
    assert "does not read" in said["error"]["message"]
    assert "--overwrite" in said["error"]["hint"]
    copy.prepare("--overwrite")
    copy.same()


def test_a_forged_manifest_deletes_nothing_outside_of_the_copy(copy: Copy, tmp_path: Path) -> None:
    copy.prepare()
    victim = copy.machine.guest_home / "victim"
    victim.write_text("precious")
    path = copy.there / ".git/banger/manifest"
    made, token = copy_manifest.parse_manifest(path.read_bytes())
    found = victim.stat()
    row = copy_manifest.render_row(
        Entry("f", found.st_mode & 0o777, found.st_size, found.st_mtime_ns)
    )
    for name in (b"../victim", os.fsencode(victim), b"x/../../victim"):
        forged = made._replace(rows={**made.rows, name: row})
        path.write_bytes(copy_manifest.render_manifest(forged, token))
        assert "does not read" in copy.sync(status=125)["error"]["message"]
    assert victim.read_text() == "precious"


def test_nothing_of_the_repository_runs_and_nothing_of_it_changes(
    copy: Copy, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh\necho ran >{canary}\ncat\n")
    script.chmod(0o755)
    for key in ("core.fsmonitor", "core.sshCommand", "filter.x.clean", "filter.x.smudge",
                "filter.x.process", "diff.external", "core.pager", "uploadpack.packObjectsHook",
                "core.alternateRefsCommand", "gc.recentObjectsHook"):  # fmt: skip
        git(copy.repo, "config", key, str(script))
    (copy.repo / ".gitattributes").write_text("* filter=x\n")
    hooks = copy.repo / ".git" / "hooks"
    hooks.mkdir(exist_ok=True)
    for hook in ("post-index-change", "pre-auto-gc", "reference-transaction", "fsmonitor"):
        shutil.copy(script, hooks / hook)
    os.utime(copy.repo / "run.sh", (1, 1))

    def state() -> list[tuple[str, int, int, int]]:
        return sorted(
            (str(path), found.st_mtime_ns, found.st_ino, found.st_size)
            for path in copy.repo.rglob("*")
            for found in [path.lstat()]
        )

    before = state()
    canary.unlink(missing_ok=True)
    copy.prepare("--no-bootstrap")
    assert state() == before
    shallow = str(copy.machine.guest_home / "shallow")
    copy.prepare("--mode", "shallow", "--guest-path", shallow)
    (copy.repo / "new").write_text("n")
    before = state()
    copy.sync()
    copy.sync("--guest-path", shallow)
    assert state() == before
    assert not canary.exists()


# -- broken off


@pytest.mark.parametrize("times", [1, 2])
def test_a_run_that_was_killed_is_continued(
    copy: Copy, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Between the files and the manifest; the first time, and over a copy that is there."""
    for number in range(20):
        (copy.repo / f"f{number}").write_bytes(os.urandom(50_000))
    if times == 2:
        workspace_sync.bring_up_to_date(copy.target())
        for number in range(20):
            (copy.repo / f"f{number}").write_bytes(os.urandom(60_000))
        (copy.repo / "f3").unlink()
        git(copy.repo, "add", "-A")
        git(copy.repo, "commit", "-qm", "2")
    real = agent.put_tar

    def killed(endpoint: Any, path: bytes, source: Any, **options: Any) -> Any:
        def until() -> Iterator[bytes]:
            whole = b"".join(source)
            yield whole[: whole.rindex(b".git/banger/manifest") - 30_000]
            raise Unavailable("killed")

        return real(endpoint, path, until(), **options)

    monkeypatch.setattr(agent, "put_tar", killed)
    with pytest.raises(Unavailable, match="killed"):
        workspace_sync.bring_up_to_date(copy.target())
    monkeypatch.undo()
    assert (copy.there / ".git/banger/begun").exists()
    assert copy.prepare()["conflicts"] == []
    copy.same()
    assert copy.sync()["bytes"] == 0


# -- watching


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_watch_sends_edits_and_tells_a_conflict_once(copy: Copy) -> None:
    copy.prepare()
    vm = copy.machine.daemon.answers["GET /v1/vms/box"]
    held = subprocess.Popen(["sleep", "1000"])
    copy.machine.daemon.answers["GET /v1/vms/box/connection"] = {
        "vm": {**vm, "pid": held.pid}, "endpoint": copy.machine.endpoint,
    }  # fmt: skip
    log = copy.machine.root / "watch.log"
    with open(log, "wb") as file:
        watching = copy.machine.start(
            "vm", "workspace", "sync", "box", str(copy.repo), "--watch",
            stdout=subprocess.DEVNULL, stderr=file,
        )  # fmt: skip
    until(lambda: b"watching" in log.read_bytes())
    (copy.repo / "new").write_text("edit")
    until((copy.there / "new").exists)
    (copy.there / "run.sh").write_text("guest")
    (copy.repo / "run.sh").write_text("host")
    until(lambda: b"run.sh stays" in log.read_bytes())
    for number in range(2):
        (copy.repo / f"more{number}").write_text("edit")
        until(lambda number=number: (copy.there / f"more{number}").exists())  # type: ignore[misc]
    (copy.repo / "new").unlink()
    until(lambda: not (copy.there / "new").exists())
    assert log.read_bytes().count(b"run.sh stays") == 1
    assert (copy.there / "run.sh").read_text() == "guest"
    held.kill()
    held.wait()
    assert watching.wait(30) == 0
    assert b"box has stopped" in log.read_bytes()


def test_interrupt_ends_a_watch(copy: Copy) -> None:
    copy.prepare()
    watching = copy.machine.start(
        "vm", "workspace", "sync", "box", str(copy.repo), "--watch",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert watching.stderr is not None
    while b"watching" not in watching.stderr.readline():
        pass
    watching.send_signal(signal.SIGINT)
    _, rest = watching.communicate(timeout=30)
    assert watching.returncode == 130
    assert b"Traceback" not in rest


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sync", "--overwrite"), "--overwrite is for prepare"),
        (("prepare", "--watch"), "--watch is for sync"),
        (("status", "--no-include-untracked"), "--include-untracked is for prepare"),
        (("prepare", "--from", "main"), "add --branch"),
        (("prepare", "--branch", "-x"), "--branch"),
        (("sync",), "has no copy of repo"),
    ],
)
def test_what_is_wrong_is_said(copy: Copy, words: tuple[str, ...], said: str) -> None:
    ran = copy.machine.run("vm", "workspace", words[0], "box", str(copy.repo), *words[1:])
    assert ran.returncode in (2, 125)
    assert said.encode() in ran.stderr
