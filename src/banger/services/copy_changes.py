"""Here, sent and there: what a run has to do, as functions on values.

Owns the three-way comparison, and which names of a `.git` are objects, state or notes along the
way. Knows no guest and no file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from banger.services.workspaces import Entry

# Those that `git init` makes, and may leave empty.
GIT_DIRECTORIES = (b"branches", b"hooks", b"info", b"objects/info", b"objects/pack", b"refs/heads",
                    b"refs/tags")  # fmt: skip
# What git writes along the way: not worth a conflict.
_NOTES = (b"logs/", b"COMMIT_EDITMSG", b"FETCH_HEAD", b"ORIG_HEAD", b"gc.log", b"description")
_STATE = re.compile(
    rb"(HEAD|[A-Z_]+_HEAD|packed-refs|index|shallow|refs/.*|reftable/.*)\Z", re.DOTALL
)


class Seen(NamedTuple):
    """What the guest has at a path; `whole` tells an mtime of whole seconds, as a copy sets it."""

    kind: str  # f, l, d; o is anything else
    mode: int
    size: int
    mtime_s: int
    whole: bool


class Todo(NamedTuple):
    """What the host changed since the manifest: paths to write and to delete."""

    write: list[bytes]
    delete: list[bytes]


class Verdict(NamedTuple):
    """`same` is there already as it is here; `doubts` changed on both sides, by all but content.

    `after` are files here and directories there, whose files go: to be looked at again then.
    """

    write: list[bytes]
    delete: list[bytes]
    same: list[bytes]
    doubts: dict[bytes, str]
    after: list[bytes]


def changes(host: Mapping[bytes, object], base: Mapping[bytes, object]) -> Todo:
    """Return what differs between the host's state and what was sent."""
    return Todo(
        sorted(path for path, row in host.items() if base.get(path) != row),
        sorted(base.keys() - host.keys()),
    )


def is_as(seen: Seen | None, entry: Entry | None) -> bool:
    """Tell whether the guest has what this entry put there."""
    if seen is None or entry is None:
        return seen is None and entry is None
    if seen.kind != entry.kind:
        return False
    if seen.kind == "d":
        return True
    mtime_s = max(entry.mtime_ns, 0) // 1_000_000_000
    same = seen.size == entry.size and seen.whole and seen.mtime_s == mtime_s
    return same and (seen.kind == "l" or seen.mode == entry.mode & 0o7777)


def ancestors(path: bytes) -> Iterator[bytes]:
    """Yield the directories above a path, nearest first."""
    at = path.rfind(b"/")
    while at > 0:
        yield path[:at]
        at = path.rfind(b"/", 0, at)


def judge(
    todo: Todo,
    host: Mapping[bytes, Entry],
    base: Mapping[bytes, Entry],
    guest: Mapping[bytes, Seen],
    *,
    intent: Mapping[bytes, Entry] | None = None,
) -> Verdict:
    """Decide for each path that changed here; `guest` has all of them and their ancestors.

    `host` and `base` need have no others. `intent` is what an interrupted run was about to write;
    None when none was.
    """
    verdict = Verdict([], [], [], {}, [])
    held = {above for path in todo.delete for above in ancestors(path)}

    def ours(path: bytes) -> bool:
        seen = guest.get(path)
        if is_as(seen, base.get(path)):
            return True
        return intent is not None and (seen is None or is_as(seen, intent.get(path)))

    def blocked(path: bytes) -> bytes | None:
        """The topmost thing on the way that is no directory, and does not go by our hand."""
        found = None
        for above in ancestors(path):
            seen = guest.get(above)
            if seen is not None and seen.kind != "d":
                found = above
        if found is None or (found in base and ours(found)):
            return None
        return found

    for path in todo.write:
        seen, way = guest.get(path), blocked(path)
        if way is not None:
            verdict.doubts[path] = f"{os.fsdecode(way)} is no directory there"
        elif any(guest.get(a, _DIRECTORY).kind != "d" for a in ancestors(path)):
            verdict.write.append(path)  # what stands in the way goes
        elif ours(path):
            done = intent is not None and intent.get(path) == host[path] and is_as(seen, host[path])
            # What looks like both may be the one before, for a second has room for two.
            sure = done and not is_as(seen, base.get(path))
            (verdict.same if sure else verdict.write).append(path)
        elif is_as(seen, host[path]):
            # An mtime of whole seconds does not tell that it is the same for sure.
            (verdict.same if host[path].kind == "d" else verdict.write).append(path)
        elif seen is None:
            verdict.doubts[path] = "deleted there, changed here"
        elif seen.kind == "d" and path in held:
            verdict.after.append(path)
        elif path in base:
            verdict.doubts[path] = "changed there and here"
        else:
            verdict.doubts[path] = "made there and here"
    for path in todo.delete:
        if guest.get(path) is None:
            verdict.same.append(path)
        elif blocked(path) is not None:
            verdict.doubts[path] = "changed there, deleted here"
        elif ours(path):
            verdict.delete.append(path)
        else:
            verdict.doubts[path] = "changed there, deleted here"
    return verdict


_DIRECTORY = Seen("d", 0o755, 0, 0, True)


# -- names of a .git


def split_git(path: bytes) -> tuple[bytes, bytes] | None:
    """Return (repository, name in its `.git`) of a path, None for one of the work tree."""
    if path.startswith(b".git/"):
        return b"", path[5:]
    if b"/.git/" not in path:
        return None
    before, _, after = path.partition(b"/.git/")
    return before, after


def is_object(path: bytes) -> bool:
    """Tell whether a path is content-addressed: what has its name once is never sent again."""
    parts = split_git(path)
    return parts is not None and parts[1].startswith(b"objects/")


def states(repository: bytes, rows: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what says where a repository stands: its references, HEAD and index."""
    for path in rows:
        parts = split_git(path)
        if parts and parts[0] == repository and _STATE.match(parts[1]):
            yield path


def is_note(name: bytes) -> bool:
    """Tell whether a name in a `.git` is only a note that git makes."""
    return name.startswith(_NOTES)


def git_of(repository: bytes) -> bytes:
    """Return the path of a repository's `.git`."""
    return repository + b"/.git" if repository else b".git"


class Unit(NamedTuple):
    """One repository's `.git`: what changed of it here, and what may not have changed there."""

    repository: bytes
    todo: Todo
    objects: list[bytes]
    watched: list[bytes]
    gone: bool

    @property
    def index_path(self) -> bytes:
        """The path of its index."""
        return git_of(self.repository) + b"/index"
