"""What a copy made now would have: this side of the comparison.

Owns the look at the repository and the hashes of what is in it. How its files are found is
`services.workspaces`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from banger.services import workspaces
from banger.services.copy_changes import is_object, split_git
from banger.services.copy_manifest import MAX_SHALLOW, parse_row, render_row
from banger.services.workspaces import Depth, Entry, Found, Warn, Workspace


class Snapshot(NamedTuple):
    """What a copy made now would have, and where each file of a git directory is."""

    rows: dict[bytes, bytes]
    objects: dict[bytes, Found]
    sources: dict[bytes, Found]
    directories: dict[bytes, os.stat_result]

    def repositories(self) -> set[bytes]:
        """Return the paths of the repositories in it."""
        return {parts[0] for path in self.sources if (parts := split_git(path))}


def take_snapshot(workspace: Workspace, depth: Depth, warn: Warn = lambda _: None) -> Snapshot:
    """Look at the repository, and read none of its files but git's configuration."""
    taken = Snapshot({}, {}, {}, {})
    for found in workspaces.walk(workspace, warn=warn, depth=depth, names_only=True):
        name, is_git = found.name, found.source is not None or found.content is not None
        if is_git and is_object(name):
            taken.objects[name] = found
        elif found.content is not None:
            entry = Entry("f", 0o644, len(found.content()), 0, found.digest)
            taken.rows[name] = render_row(entry)
            taken.sources[name] = found
        elif found.stat is None:
            continue
        elif stat.S_ISDIR(found.stat.st_mode):
            taken.directories[name] = found.stat
            if found.alone:
                taken.rows[name] = render_row(Entry("d", 0, 0, 0))
        else:
            target = b""
            if stat.S_ISLNK(found.stat.st_mode):
                try:
                    at = None if found.source else found.directory_fd
                    target = os.readlink(found.source or found.leaf, dir_fd=at)
                except OSError:
                    continue
            taken.rows[name] = render_row(workspaces.entry_of(found.stat, target))
            if is_git:
                taken.sources[name] = found
    return taken


def digest_here(
    workspace: Workspace, snapshot: Snapshot, path: bytes, size: int | None
) -> bytes | None:
    """Return the SHA-256 of a file here (or of its beginning), without following a link."""
    digest = hashlib.sha256()
    left = parse_row(snapshot.rows[path]).size if size is None else size
    found = snapshot.sources.get(path)
    if found is not None and found.content is not None:
        return hashlib.sha256(found.content()[:left]).hexdigest().encode()
    top = os.fsencode(workspace.top)
    root, name = os.path.split(found.source) if found and found.source else (top, path)
    with workspaces.DirectoryStack(root) as stack:
        here = stack.enter(os.path.dirname(name))
        if here is None:
            return None
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(os.path.basename(name), flags, dir_fd=here[0])
        except OSError:
            return None
        with open(fd, "rb", buffering=0) as file:
            while left > 0 and (data := file.read(min(left, 1 << 20))):
                digest.update(data)
                left -= len(data)
    return digest.hexdigest().encode() if left == 0 else None


def _root(workspace: Workspace, repository: bytes) -> bytes:
    return os.path.join(os.fsencode(workspace.top), repository)


def staged(workspace: Workspace, repository: bytes) -> str:
    """Return the hash of what a repository's index holds."""
    return workspaces.staged_hash(_root(workspace, repository))


def head_commits(
    workspace: Workspace, repositories: Iterable[bytes], before: Mapping[bytes, tuple[str, ...]]
) -> dict[bytes, tuple[str, ...]]:
    """Return the commits that a shallow copy has, by repository."""
    found = {}
    for one in repositories:
        head = workspaces.head_commit(_root(workspace, one))
        known = [*before.get(one, ()), *([head] if head else [])]
        found[one] = tuple(dict.fromkeys(known))[-MAX_SHALLOW:]
    return found
