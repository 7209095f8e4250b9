"""What a guest's copy of a repository has that the repository here has not, and bringing it home.

The way is git's own bundle over the agent's stream: no network, no ssh, nothing merged. The guest
is hostile: what it sends is bounded, its pack is checked by `index-pack --strict` and for holes,
and it names refs below `refs/remotes/banger/VM/` only.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, NamedTuple

from banger.errors import BangerError, InvalidInput, NotFound, Unavailable
from banger.guest import agent, frames
from banger.guest.transport import Endpoint
from banger.host.files import no_space_named
from banger.services.safe_git import git
from banger.services.workspaces import Workspace

MAX_BUNDLE_BYTES = 8 << 30
_MAX_ANSWER_BYTES = 64 << 20
_MAX_REFS = 1000
_MAX_TIPS = 1000  # of ours, told to the guest; each is 42 bytes of a command line
_MAX_COMMITS = 1000
_MAX_HISTORY = 20_000  # commits looked through for the last one that both have
_MAX_HEADER_LINES = 1 << 16
_ID = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?\Z")
_GUEST_OPTIONS = (
    "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-c", "color.ui=false",
    "-c", "core.quotePath=false", "--no-pager",
)  # fmt: skip
# A copy of the index: the guest's own stays as it is, and so does what is staged in it.
_WITH_INDEX_COPY = (
    'i=$(mktemp) || exit; trap \'rm -f "$i" "$i.lock"\' EXIT; '
    'cp "$(git rev-parse --git-path index)" "$i" 2>/dev/null || rm -f "$i"; '
    'export GIT_INDEX_FILE="$i"; g() { git -c core.hooksPath=/dev/null -c core.fsmonitor=false '
    '"$@"; }; '
)


class Copy(NamedTuple):
    """A copy in a guest, and the repository here that it is a copy of."""

    vm: str
    endpoint: Endpoint
    directory: str
    workspace: Workspace


class Commit(NamedTuple):
    """A commit of the guest's that is not here."""

    id: str
    subject: str


class Change(NamedTuple):
    """An uncommitted change: git's two letters (git-status(1), "Short Format") and the path."""

    status: str
    path: str


class State(NamedTuple):
    """What a copy has more; `base` is the last commit of its history that is here too."""

    branch: str | None
    base: str | None
    commits: list[Commit]
    changes: list[Change]


class Pulled(NamedTuple):
    """A ref that was brought home: `commits` are those that were not here."""

    ref: str
    old: str | None
    new: str
    commits: int


def read_state(copy: Copy) -> State:
    """Return what the copy has that is not here."""
    listed = _ask(copy, "status", "--porcelain=v1", "-z", "--untracked-files=all").split(b"\0")
    changes: list[Change] = []
    entries = iter(listed)
    for entry in entries:
        if len(entry) < 4:
            continue
        status, path = entry[:2].decode("ascii", "replace"), os.fsdecode(entry[3:])
        if "R" in status or "C" in status:
            path = f"{os.fsdecode(next(entries, b''))} -> {path}"
        changes.append(Change(status, path))
    head = _head(copy)
    commits = []
    logged = _ask(
        copy, "log", "-z", "--format=%H%x09%s", f"--max-count={_MAX_COMMITS}", "--ignore-missing",
        "--branches", *([head] if head else []), *_not_ours(copy),
    )  # fmt: skip
    for line in logged.split(b"\0"):
        commit, _, subject = line.decode(errors="surrogateescape").partition("\t")
        if commit:
            commits.append(Commit(_id(commit), subject))
    return State(_branch(copy), _base(copy) if head else None, commits, changes)


def write_diff(copy: Copy, take: Callable[[bytes], object], *, stat: bool = False) -> None:
    """Hand over the diff from the last commit both have to the guest's files, as `git apply` wants.

    Untracked files that are not ignored are in it.
    """
    base = _base(copy) or _text(_ask(copy, "hash-object", "-t", "tree", "/dev/null"))
    how = ["--stat=100"] if stat else ["--binary", "--full-index"]
    script = (
        f"{_WITH_INDEX_COPY} g add -A -N . && "
        "g -c color.ui=false -c core.quotePath=false --no-pager diff --no-ext-diff --no-textconv "
        '"$@"'
    )
    _run(copy, ["sh", "-c", script, "sh", *how, base, "--"], _bounded(copy, take))


def write_bundle(copy: Copy, out: IO[bytes], *, uncommitted: bool = False) -> bool:
    """Write a git bundle of the branches' commits that are not here; False when there are none.

    With `uncommitted`, what is not committed goes as one more commit, `refs/banger/uncommitted`.
    """
    refs = ["--branches"]
    head = _head(copy)
    if head and _branch(copy) is None:
        refs.append("HEAD")
    if uncommitted and _commit_the_rest(copy):
        refs.append(_UNCOMMITTED)
    return _bundle(copy, refs, out)


def pull(
    copy: Copy, *, uncommitted: bool = False, progress: Callable[[int], object] = lambda _: None
) -> list[Pulled]:
    """Bring the guest's branches home as `refs/remotes/banger/VM/BRANCH`.

    With `uncommitted` the branch that is checked out there gets one commit more, of what is not
    committed. Nothing else here changes: no branch, no index, no file. A detached HEAD comes as
    `HEAD`. Raises InvalidInput for what the guest sends that no honest one would.
    """
    tips = _tips(copy)
    current = _branch(copy) or "HEAD"
    head = _head(copy)
    if head and current == "HEAD":
        tips["HEAD"] = head
    refs = ["--branches", *(["HEAD"] if "HEAD" in tips else [])]
    rest = _commit_the_rest(copy) if uncommitted else None
    if rest is not None:
        tips[current] = rest
        refs.append(_UNCOMMITTED)
    for name in tips:
        _check_name(copy, name)
    place = Path(tempfile.gettempdir())
    with no_space_named(place), tempfile.TemporaryFile(buffering=0, dir=place) as spool:
        if _bundle(copy, refs, spool, progress):
            _unbundle(copy, spool)
    return _update(copy, tips)


_UNCOMMITTED = "refs/banger/uncommitted"


def _check_name(copy: Copy, name: str) -> None:
    wanted = _ref(copy, name)
    if git(copy.workspace.top, "check-ref-format", "--normalize", wanted, check=False) != (
        f"{wanted}\n".encode("utf-8", "surrogateescape")
    ):
        raise InvalidInput(f"{copy.vm} names a branch {name!r}, which is no branch name")


def _ref(copy: Copy, name: str) -> str:
    return f"refs/remotes/banger/{copy.vm}/{name}"


# -- what each side has


def _head(copy: Copy) -> str | None:
    found = _text(_ask(copy, "rev-parse", "-q", "--verify", "HEAD^{commit}", may_fail=True))
    return _id(found) if found else None


def _branch(copy: Copy) -> str | None:
    """Return the branch that is checked out there, None when HEAD is detached."""
    return _text(_ask(copy, "symbolic-ref", "-q", "--short", "HEAD", may_fail=True)) or None


def _tips(copy: Copy) -> dict[str, str]:
    """Return the guest's branches and their commits."""
    listed = _ask(copy, "for-each-ref", f"--count={_MAX_REFS + 1}",
                  "--format=%(objectname) %(refname)", "refs/heads")  # fmt: skip
    tips = {}
    for line in os.fsdecode(listed).splitlines():
        commit, _, name = line.partition(" ")
        tips[name.removeprefix("refs/heads/")] = _id(commit)
    if len(tips) > _MAX_REFS:
        raise InvalidInput(f"{copy.vm} has more than {_MAX_REFS} branches in {copy.directory}")
    return tips


def _not_ours(copy: Copy) -> list[str]:
    """Return what tells git there which commits are here already: the latest tips, negated."""
    top = copy.workspace.top
    tips = git(top, "for-each-ref", "--sort=-committerdate", f"--count={_MAX_TIPS}",
               "--format=%(objectname)").decode().split()  # fmt: skip
    tips += git(top, "rev-parse", "-q", "--verify", "HEAD", check=False).decode().split()
    return [f"^{tip}" for tip in dict.fromkeys(tips)]


def _base(copy: Copy) -> str | None:
    """Return the last commit of the checked-out history that is here too."""
    listed = _ask(copy, "rev-list", f"--max-count={_MAX_HISTORY}", "HEAD", may_fail=True).split()
    asked = "".join(f"{_id(commit.decode('ascii', 'replace'))}^{{commit}}\n" for commit in listed)
    answers = git(copy.workspace.top, "cat-file", "--batch-check=%(objectname)",
                  stdin=asked.encode())  # fmt: skip
    for commit, answer in zip(listed, answers.splitlines(), strict=True):
        if answer == commit:
            return commit.decode()
    return None


# -- making the bundle, there


def _commit_the_rest(copy: Copy) -> str | None:
    """Make a commit of what is not committed there, on top of HEAD; None when there is nothing.

    Only objects and `refs/banger/uncommitted` come to be: index, branches and files stay.
    """
    if not _ask(copy, "status", "--porcelain=v1", "-z", "--untracked-files=all"):
        return None
    script = (
        f"{_WITH_INDEX_COPY} g add -A . && t=$(g write-tree) && "
        "p=$(g rev-parse -q --verify HEAD); "
        'c=$(g -c user.name="$1" -c user.email="$2" commit-tree ${p:+-p} $p -m "$3" "$t") && '
        f'g update-ref {_UNCOMMITTED} "$c" && printf %s "$c"'
    )
    name = _text(_ask(copy, "config", "user.name", may_fail=True)) or "banger"
    email = _text(_ask(copy, "config", "user.email", may_fail=True)) or f"root@{copy.vm}"
    message = f"Uncommitted changes in {copy.vm}:{copy.directory}"
    return _id(_text(_collect(copy, ["sh", "-c", script, "sh", name, email, message])))


def _bundle(
    copy: Copy,
    refs: list[str],
    out: IO[bytes],
    progress: Callable[[int], object] = lambda _: None,
) -> bool:
    def write(data: bytes) -> None:
        view = memoryview(data)
        while view:  # a raw file may take less
            view = view[out.write(view) :]

    words = ["bundle", "create", "-q", "-", "--ignore-missing", *refs, *_not_ours(copy)]
    take = _bounded(copy, write, progress)
    stderr = _run(copy, _git_words(words), take, refused=b"empty bundle")
    return b"empty bundle" not in stderr


def _bounded(
    copy: Copy,
    take: Callable[[bytes], object],
    progress: Callable[[int], object] = lambda _: None,
) -> Callable[[bytes], object]:
    """Return `take` for as much as a guest may send: it could fill our disk."""
    done = 0

    def count(data: bytes) -> None:
        nonlocal done
        done += len(data)
        if done > MAX_BUNDLE_BYTES:
            raise InvalidInput(f"{copy.vm} sends more than {MAX_BUNDLE_BYTES >> 30} GiB")
        take(data)
        progress(done)

    return count


# -- and taking it apart, here


def _unbundle(copy: Copy, spool: IO[bytes]) -> None:
    top = copy.workspace.top
    needed = _read_header(copy, spool)
    asked = "".join(f"{commit}^{{commit}}\n" for commit in needed).encode()
    if needed and b"missing" in git(top, "cat-file", "--batch-check", stdin=asked):
        raise InvalidInput(f"{copy.vm} builds upon commits that are not here")
    git(top, "index-pack", "--stdin", "--fix-thin", "--strict",
        f"--max-input-size={MAX_BUNDLE_BYTES}", stdin=spool)  # fmt: skip


def _read_header(copy: Copy, spool: IO[bytes]) -> list[str]:
    """Read a bundle's header (gitformat-bundle(5)) and leave the descriptor at its pack."""
    spool.seek(0)
    with open(spool.fileno(), "rb", closefd=False) as file:
        first = file.readline(64)
        needed = []
        at = len(first)
        for _ in range(_MAX_HEADER_LINES):
            line = file.readline(8192)
            at += len(line)
            if line == b"\n":
                break
            if line.startswith(b"-"):
                needed.append(_id(line[1:].split(b" ")[0].strip().decode("ascii", "replace")))
        else:
            first = b""
    if first not in (b"# v2 git bundle\n", b"# v3 git bundle\n"):
        raise InvalidInput(f"what {copy.vm} sent is no git bundle")
    os.lseek(spool.fileno(), at, os.SEEK_SET)
    return needed


def _update(copy: Copy, tips: dict[str, str]) -> list[Pulled]:
    """Point our refs at what came; each commit has to be whole."""
    top = copy.workspace.top
    if not tips:
        return []
    git(top, "rev-list", "--quiet", "--objects", *dict.fromkeys(tips.values()), "--not", "--all")
    pulled = []
    for name, commit in sorted(tips.items()):
        ref = _ref(copy, name)
        old = _text(git(top, "rev-parse", "-q", "--verify", ref, check=False)) or None
        if old == commit:
            continue
        count = int(git(top, "rev-list", "--count", commit, "--not", "--all"))
        git(top, "update-ref", "--create-reflog", "-m", f"banger: from {copy.vm}", ref, commit)
        pulled.append(Pulled(ref, old, commit, count))
    return pulled


# -- git in the guest


def _git_words(words: Iterable[str]) -> list[str]:
    return ["git", *_GUEST_OPTIONS, *words]


def _ask(copy: Copy, *words: str, may_fail: bool = False) -> bytes:
    """Run git in the copy and return its stdout; `may_fail` is for questions with no answer."""
    return _collect(copy, _git_words(words), refused=b"" if may_fail else None)


def _collect(copy: Copy, words: list[str], *, refused: bytes | None = None) -> bytes:
    """Run a program as `_run` does and return its stdout, bounded."""
    said = bytearray()

    def take(data: bytes) -> None:
        said.extend(data)
        if len(said) > _MAX_ANSWER_BYTES:
            raise Unavailable(f"git in {copy.vm} says more than {_MAX_ANSWER_BYTES >> 20} MiB")

    _run(copy, words, take, refused=refused)
    return bytes(said)


def _run(
    copy: Copy,
    words: list[str],
    take: Callable[[bytes], object],
    *,
    refused: bytes | None = None,
) -> bytes:
    """Run a program in the copy's directory and return its stderr.

    Raises for a status other than 0, unless `refused` is in what it says.
    """
    stderr = bytearray()

    def sort(kind: int, data: bytes) -> None:
        if kind == frames.STDOUT:
            take(data)
        elif len(stderr) < 1 << 16:
            stderr.extend(data)

    request = agent.ExecRequest(
        [os.fsencode(word) for word in words],
        env={b"LC_ALL": b"C", b"GIT_OPTIONAL_LOCKS": b"0"},
        cwd=os.fsencode(copy.directory),
    )
    try:
        status = agent.follow_exec(copy.endpoint, request, sort)
    except BangerError as error:
        if error.code in ("agent_bad_cwd", "agent_not_found", "agent_not_a_directory"):
            raise _no_copy(copy) from error
        raise
    if status.exit_code != 0 and (refused is None or refused not in stderr):
        raise _failure(copy, status.exit_code, stderr.decode(errors="replace"))
    return bytes(stderr)


def _failure(copy: Copy, code: int, stderr: str) -> BangerError:
    if code == 127:
        return Unavailable(
            f"{copy.vm} has no git: this needs one in the guest", hint="take an image with git"
        )
    if "not a git repository" in stderr:
        return _no_copy(copy)
    lines = stderr.strip().splitlines() or [f"status {code}"]
    last = "".join(c if c.isprintable() else "?" for c in lines[-1][:500])
    return Unavailable(f"git in {copy.vm} says: {last.removeprefix('fatal: ')}")


def _no_copy(copy: Copy) -> NotFound:
    return NotFound(
        f"{copy.vm} has no git repository at {copy.directory}",
        hint="--guest-path says where the copy is",
    )


def _id(text: str) -> str:
    """Check a commit's id: it becomes an argument of git's."""
    if not _ID.match(text):
        raise InvalidInput(f"the guest names a commit {text[:80]!r}, which is no commit's id")
    return text


def _text(said: bytes) -> str:
    return said.decode(errors="surrogateescape").strip()
