"""A git repository on the host as one tar stream for a guest.

Owns what is copied (tracked files, untracked ones that are not ignored, and a `.git` that
works inside) and how a tar is written, byte for byte. Leaves the transport to `guest.agent`,
and what a second copy has to send to `services.workspace_sync`. The host's repository is only
read: no index refresh, no hook, no filter, no fsmonitor and no lazy fetch runs for it, and no
symbolic link is followed.

What the copy of `.git` is not: linked worktrees, submodules' git directories and
alternates are folded into one plain `.git` directory per repository, so nothing in it
points outside. Secrets stay here: user names and passwords inside http(s) URLs, passwords
in others, `http.*.extraHeader`, cookie files, `credential.*` and signing settings are left
out of its config; `user.name`, `user.email` and line-ending settings in force are put in,
so that commits work and `git status` says what it says on the host.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Self

from banger.errors import Conflict, InvalidInput
from banger.services.safe_git import git

GUEST_HOME = "/root"

_CHUNK_BYTES = 256 * 1024
_MAX_NESTING = 16  # repositories inside repositories
_MAX_ALTERNATES = 16  # git itself follows five levels
_PACK_LISTINGS = 3  # a repack may replace packs while they are copied
_TICK_NS = 20_000_000  # two writes so close may leave one mtime; kernels tick every 1 to 10 ms

Warn = Callable[[str], None]


class Entry(NamedTuple):
    """What a copy has at a path: a file (`f`), a symlink (`l`) or a directory that is empty (`d`).

    `extra` is a link's target, or the SHA-256 of content that no file here holds.
    """

    kind: str
    mode: int
    size: int
    mtime_ns: int
    extra: bytes = b""


Note = Callable[[bytes, Entry], object]


class Found(NamedTuple):
    """Something to copy; its descriptor is open until the next one is asked for.

    `name` is below the copy (empty: that itself). A file of a git directory has a `source`, one
    that is made up for the copy has `content`. `alone` marks a directory that nothing lies in.
    """

    name: bytes
    stat: os.stat_result | None = None
    directory_fd: int = -1
    leaf: bytes = b""
    source: bytes | None = None
    content: Callable[[], bytes] | None = None
    digest: bytes = b""
    alone: bool = False


class Depth(NamedTuple):
    """How much history goes along: all, or the newest commit.

    `sent` holds, for each repository of a shallow copy (by its path in there), the commits that
    the guest has from before.
    """

    shallow: bool
    sent: Mapping[bytes, tuple[str, ...]]


FULL = Depth(False, {})


class Workspace(NamedTuple):
    """A repository to copy: its top directory, the name its copy gets, and what comes along."""

    top: str
    name: str
    include_untracked: bool = True
    directory: str | None = None

    @property
    def guest_directory(self) -> str:
        """Where the copy is inside the guest: `directory`, or by its name below the home."""
        return self.directory or f"{GUEST_HOME}/{self.name}"


def open_workspace(path: str) -> Workspace:
    """Return the repository `path` is in; a subdirectory stands for the whole.

    Raises InvalidInput when it is no directory, in no repository, or the repository has
    no files checked out (a bare one, or its `.git`).
    """
    if not os.path.isdir(path):
        problem = "is not a directory" if os.path.lexists(path) else "does not exist"
        raise InvalidInput(f"{path} {problem}", hint="give the path of a git repository")
    answers = git(path, "rev-parse", "--is-bare-repository", "--is-inside-work-tree").split()
    if answers != [b"false", b"true"]:
        raise InvalidInput(
            f"{path} is a bare repository, or inside one's .git: there are no files to copy",
            hint="give the path of a checkout: git clone REPOSITORY DIRECTORY",
        )
    top = git(path, "rev-parse", "--show-toplevel").removesuffix(b"\n")
    return Workspace(os.fsdecode(top), guest_name(top))


def guest_name(top: bytes) -> str:
    """Return the directory name of a copy: the repository's own, without odd characters.

    It never begins with a dot or a dash: `/root/.ssh` must not be a repository's to fill.
    """
    text = os.path.basename(top).decode(errors="replace")
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in text)
    return plain.strip("-").lstrip(".-")[:100] or "repo"


def check_branch(workspace: Workspace, name: str, ref: str | None) -> None:
    """Check `--branch` and `--from` against the repository; raise InvalidInput or Conflict.

    A branch that exists is checked out, so nothing can be said of where it begins.
    """
    if name.startswith("-") or not git(
        workspace.top, "check-ref-format", "--branch", name, check=False
    ):
        raise InvalidInput(f"{name!r} is no branch name", hint="for example --branch fix-login")
    if _has_branch(workspace, name):
        if ref is not None:
            raise Conflict(
                f"the branch {name} exists already",
                hint="leave --from out to check it out, or choose another name",
            )
        return
    wanted = "HEAD" if ref is None else ref
    if wanted.startswith("-") or not git(
        workspace.top, "rev-parse", "-q", "--verify", f"{wanted}^{{commit}}", check=False
    ):
        raise InvalidInput(f"the repository has no commit {wanted}", hint="see `git log --oneline`")


def _has_branch(workspace: Workspace, name: str) -> bool:
    ref = f"refs/heads/{name}"
    return bool(git(workspace.top, "rev-parse", "-q", "--verify", ref, check=False))


def branch_argv(workspace: Workspace, name: str, ref: str | None) -> list[bytes]:
    """Return the command that begins a branch inside the guest, or checks out one that exists."""
    words = ["git", "-C", workspace.guest_directory, "checkout", "-q"]
    words += [name] if _has_branch(workspace, name) else ["-b", name]
    words += [] if ref is None else [ref]
    return [os.fsencode(word) for word in [*words, "--"]]


# -- tar, byte exact


_BLOCK = 512
TAR_END = bytes(2 * _BLOCK)
_OWNER = b"root".ljust(32, b"\0") * 2
_TAIL = b"ustar  \0" + _OWNER + bytes(16 + 155 + 12)
_IDS = b"0000000\0" * 2
_MAX_OCTAL = 8**11


def tar_header(
    name: bytes, kind: bytes, *, mode: int, size: int = 0, mtime: int = 0, link: bytes = b""
) -> bytes:
    """Return the header of one entry in GNU format, owned by root.

    Names are raw bytes: what is longer than a field goes into GNU `L` and `K` records,
    which every tar reads (pax would want UTF-8).
    """
    long = b""
    if len(name) > 100:
        long = _long_record(b"L", name)
    if len(link) > 100:
        long += _long_record(b"K", link)
    size_field = b"%011o\0" % size if size < _MAX_OCTAL else b"\x80" + size.to_bytes(11, "big")
    head = b"%b%07o\0%b%b%011o\0" % (
        name[:100].ljust(100, b"\0"),
        mode & 0o7777,
        _IDS,
        size_field,
        min(max(mtime, 0), _MAX_OCTAL - 1),
    )
    tail = kind + link[:100].ljust(100, b"\0") + _TAIL
    # The checksum counts its own field as eight spaces.
    return b"%b%b%06o\0 %b" % (long, head, sum(head) + sum(tail) + 256, tail)


def _long_record(kind: bytes, text: bytes) -> bytes:
    data = text + b"\0"
    header = tar_header(b"././@LongLink", kind, mode=0o644, size=len(data))
    return header + data + bytes(-len(data) % _BLOCK)


def tar_file(
    fd: int, name: bytes, found: os.stat_result, warn: Warn, note: Note | None = None
) -> Iterator[bytes]:
    """Yield the entry of an open regular file.

    The header's size is a promise: a file that shrinks meanwhile is filled with zeros, one
    that grows is cut, each with a warning. `note` is told what the header says.
    """
    if note is not None:
        entry = entry_of(found)
        if time.time_ns() - found.st_mtime_ns < _TICK_NS:
            # Who writes to it now may leave the same mtime: noted as another, it is sent again
            # (as git's index has it, "racily clean"). Its second, which the guest has, stays.
            entry = entry._replace(mtime_ns=entry.mtime_ns ^ 1)
        note(name, entry)
    size = found.st_size
    yield tar_header(name, b"0", mode=found.st_mode, size=size, mtime=int(found.st_mtime))
    left = size
    grown = False
    while left >= 0:
        # One byte more than is left tells a file that grew, without another system call.
        data = os.read(fd, min(left + 1, _CHUNK_BYTES))
        if len(data) > left:
            data, grown = data[:left], True
        if not data:
            break
        yield data
        left -= len(data)
        if grown or (left == 0 and len(data) < _CHUNK_BYTES and size < _CHUNK_BYTES):
            break
    if left > 0:
        warn(f"{os.fsdecode(name)} shrank while it was copied: its end is zeros")
        while left > 0:
            step = min(left, _CHUNK_BYTES)
            yield bytes(step)
            left -= step
    elif grown:
        warn(f"{os.fsdecode(name)} grew while it was copied: its end is missing")
    if size % _BLOCK:
        yield bytes(-size % _BLOCK)


def entry_of(found: os.stat_result, target: bytes = b"") -> Entry:
    """Return what is noted of a file, or of a link with its target."""
    kind = "l" if stat.S_ISLNK(found.st_mode) else "f"
    mode = 0o777 if kind == "l" else stat.S_IMODE(found.st_mode)
    return Entry(kind, mode, found.st_size, found.st_mtime_ns, target)


def tar_entry(
    directory_fd: int, leaf: bytes, name: bytes, warn: Warn, note: Note | None = None
) -> Iterator[bytes]:
    """Yield the entry of a file or symbolic link; nothing when it vanished or is neither."""
    try:
        found = os.stat(leaf, dir_fd=directory_fd, follow_symlinks=False)
        if stat.S_ISLNK(found.st_mode):
            target = os.readlink(leaf, dir_fd=directory_fd)
            if note is not None:
                note(name, entry_of(found, target))
            yield tar_header(name, b"2", mode=0o777, mtime=int(found.st_mtime), link=target)
            return
        if not stat.S_ISREG(found.st_mode):
            if not stat.S_ISDIR(found.st_mode):
                warn(f"{os.fsdecode(name)} is a socket, a pipe or a device: not copied")
            return
        # O_NONBLOCK: were it a pipe by now, opening must not hang.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(leaf, flags, dir_fd=directory_fd)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            warn(f"{os.fsdecode(name)} cannot be read ({error.strerror}): not copied")
        return
    try:
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode):
            yield from tar_file(fd, name, found, warn, note)
    finally:
        os.close(fd)


def tar_directory(name: bytes, found: os.stat_result) -> bytes:
    """Return the entry of a directory."""
    mode = stat.S_IMODE(found.st_mode) & 0o777
    return tar_header(name + b"/", b"5", mode=mode, mtime=int(found.st_mtime))


def batched(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Join small pieces into chunks worth a system call."""
    kept: list[bytes] = []
    count = 0
    for piece in pieces:
        kept.append(piece)
        count += len(piece)
        if count >= _CHUNK_BYTES:
            yield b"".join(kept)
            kept.clear()
            count = 0
    if kept:
        yield b"".join(kept)


class DirectoryStack:
    """The open directories on the way to the current file, each opened without following.

    Paths come sorted, so every directory is opened once.
    """

    _FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

    def __init__(self, root: bytes) -> None:
        self.root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._names: list[bytes] = []
        self._fds: list[int] = []
        self._current = b""
        self._entered: list[tuple[bytes, os.stat_result]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self._cut(0)
        os.close(self.root_fd)

    def enter(self, directory: bytes) -> tuple[int, list[tuple[bytes, os.stat_result]]] | None:
        """Return the fd of a directory and those newly entered on the way to it.

        None when a component is gone or is no directory any more.
        """
        if directory == self._current:
            return self._here()
        parts = directory.split(b"/") if directory else []
        common = 0
        while common < min(len(parts), len(self._names)) and parts[common] == self._names[common]:
            common += 1
        self._cut(common)
        for part in parts[common:]:
            try:
                fd = os.open(part, self._FLAGS, dir_fd=self._fds[-1] if self._fds else self.root_fd)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    self._current = b"/".join(self._names)
                    return None
                raise
            self._names.append(part)
            self._fds.append(fd)
            self._entered.append((b"/".join(self._names), os.fstat(fd)))
        self._current = directory
        return self._here()

    def _here(self) -> tuple[int, list[tuple[bytes, os.stat_result]]]:
        # Those entered on a way that ended early are reported with the next that does not.
        entered, self._entered = self._entered, []
        return (self._fds[-1] if self._fds else self.root_fd), entered

    def _cut(self, length: int) -> None:
        while len(self._fds) > length:
            os.close(self._fds.pop())
            self._names.pop()


# -- the stream


def tar_found(found: Found, name: bytes, warn: Warn, note: Note | None = None) -> Iterator[bytes]:
    """Yield the entry of something found, under this name."""
    if found.content is not None:
        content = found.content()
        if note is not None:
            note(name, Entry("f", 0o644, len(content), 0, found.digest))
        yield from tar_content(name, content)
    elif found.stat is not None and stat.S_ISDIR(found.stat.st_mode):
        if found.alone and note is not None:
            note(name, Entry("d", 0, 0, 0))
        yield tar_directory(name, found.stat)
    elif found.source is not None:
        yield from tar_source(found.source, name, warn, note)
    else:
        yield from tar_entry(found.directory_fd, found.leaf, name, warn, note)


def tar_content(name: bytes, content: bytes) -> Iterator[bytes]:
    """Yield the entry of a file that is made up."""
    yield tar_header(name, b"0", mode=0o644, size=len(content))
    yield content + bytes(-len(content) % _BLOCK)


def walk(
    workspace: Workspace,
    *,
    warn: Warn = lambda _: None,
    depth: Depth = FULL,
    names_only: bool = False,
) -> Iterator[Found]:
    """Yield all that a copy has, directories before what is in them.

    With `names_only`, git's objects come without a look at each.
    """
    listing = ["--cached"]
    if workspace.include_untracked:
        listing += ["--others", "--exclude-standard"]
    yield from _repository(
        os.fsencode(workspace.top), b"", _Walk(warn, listing, depth, names_only), 0
    )


class _Walk(NamedTuple):
    warn: Warn
    listing: list[str]
    depth: Depth
    names_only: bool


def _below(prefix: bytes, name: bytes) -> bytes:
    return b"%b/%b" % (prefix, name) if prefix else name


def _repository(root: bytes, prefix: bytes, how: _Walk, level: int) -> Iterator[Found]:
    """Yield one repository: its directory, its files, the repositories inside, its .git."""
    nested: list[bytes] = []
    with DirectoryStack(root) as stack:
        yield Found(prefix, os.fstat(stack.root_fd))
        for path in _list_files(root, how.listing):
            directory, _, leaf = path.rstrip(b"/").rpartition(b"/")
            here = stack.enter(directory)
            if here is None:
                continue  # tracked, and deleted or replaced by a link
            for name, found in here[1]:
                yield Found(_below(prefix, name), found)
            name = _below(prefix, path.rstrip(b"/"))
            entry = _stat_entry(here[0], leaf, name, how.warn)
            # Of listed names only submodules are directories.
            if path.endswith(b"/") or (entry is not None and stat.S_ISDIR(entry.st_mode)):
                nested.append(path.rstrip(b"/"))
            elif entry is not None:
                yield Found(name, entry, here[0], leaf)
    for path in nested:
        yield from _nested(b"%b/%b" % (root, path), _below(prefix, path), how, level + 1)
    if how.depth.shallow:
        yield from _shallow_git_directory(root, prefix, how)
    else:
        yield from _git_directory(root, _below(prefix, b".git"), how.names_only)


def _stat_entry(directory_fd: int, leaf: bytes, name: bytes, warn: Warn) -> os.stat_result | None:
    """Return what a name is; None when it is gone, or nothing that can be copied."""
    try:
        found = os.stat(leaf, dir_fd=directory_fd, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            warn(f"{os.fsdecode(name)} cannot be read ({error.strerror}): not copied")
        return None
    kind = stat.S_IFMT(found.st_mode)
    if kind in (stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR):
        return found
    warn(f"{os.fsdecode(name)} is a socket, a pipe or a device: not copied")
    return None


def _nested(root: bytes, prefix: bytes, how: _Walk, level: int) -> Iterator[Found]:
    """Yield a submodule, or a repository that lies untracked inside another."""
    try:
        found = os.lstat(root)
    except OSError:
        return
    if not stat.S_ISDIR(found.st_mode):
        return
    if level > _MAX_NESTING:
        how.warn(f"{os.fsdecode(prefix)} is nested too deep: not copied")
    elif os.path.lexists(root + b"/.git"):
        yield from _repository(root, prefix, how, level)
    else:
        yield Found(prefix, found, alone=True)  # a submodule that is not checked out


def _list_files(root: bytes, listing: list[str]) -> list[bytes]:
    """Return the paths that `git ls-files` lists, sorted so that directories are runs."""
    listed = git(root, "ls-files", "-z", *listing)
    # A conflicted path is listed once per side.
    return sorted(set(listed.split(b"\0")) - {b""})


# -- .git


class _GitDirectories(NamedTuple):
    """`own` is this checkout's; `common` the repository's (the same unless a worktree)."""

    own: bytes
    common: bytes


# Of a repository shared by worktrees: what is not one checkout's own.
_SHARED = (b"refs", b"logs", b"packed-refs", b"reftable", b"info", b"hooks", b"shallow",
           b"description", b"lfs", b"rr-cache", b"branches", b"remotes")  # fmt: skip
_NEVER = frozenset(
    [b"config", b"config.worktree", b"objects", b"modules", b"worktrees", b"commondir", b"gitdir",
     b"locked", b"gc.pid", b"fsmonitor--daemon", b"fsmonitor--daemon.ipc", b"banger"]
)  # fmt: skip


def _find_git_directories(root: bytes) -> _GitDirectories:
    own = git(root, "rev-parse", "--absolute-git-dir").removesuffix(b"\n")
    common = git(root, "rev-parse", "--git-common-dir").removesuffix(b"\n")
    # --git-common-dir is relative to where git ran (absolute paths: git >= 2.31 only).
    return _GitDirectories(os.path.realpath(own), os.path.realpath(os.path.join(root, common)))


def _git_directory(root: bytes, prefix: bytes, names_only: bool) -> Iterator[Found]:
    """Yield a plain `.git` directory that holds everything it needs.

    References come before objects: git only adds objects (a repack apart, see
    `_objects`), so whatever a copied reference names is there when objects are copied.
    """
    found = _find_git_directories(root)
    yield Found(prefix, os.stat(found.common))
    done = set(_NEVER)
    # Loose references before packed ones: packing writes the new file, then removes them.
    for directory, names in ((found.own, None), (found.common, _SHARED)):
        present = sorted(os.listdir(directory), key=lambda name: (name == b"packed-refs", name))
        for name in present:
            if name in done and name not in (b"refs", b"logs", b"info"):
                continue
            if names is not None and found.own != found.common and name not in names:
                continue
            yield from _git_tree(directory, name, prefix, done)
    yield _made_up(prefix + b"/config", _guest_config(root, found))
    yield from _objects(found.common, prefix + b"/objects", names_only)


def _made_up(name: bytes, content: bytes) -> Found:
    digest = hashlib.sha256(content).hexdigest().encode()  # in the manifest, NUL ends a field
    return Found(name, content=lambda: content, digest=digest)


def _git_tree(directory: bytes, name: bytes, prefix: bytes, done: set[bytes]) -> Iterator[Found]:
    """Yield one entry of a git directory and all below it; `done` holds what is out already."""
    path = os.path.join(directory, name)
    try:
        found = os.stat(path)  # git itself follows links at this level (git-new-workdir)
    except OSError:
        return
    if not stat.S_ISDIR(found.st_mode):
        if _wanted(name) and name not in done:
            done.add(name)
            yield from _source(path, b"%b/%b" % (prefix, name))
        return
    for parent, directories, files in os.walk(path):
        relative = os.path.relpath(parent, directory)
        if relative not in done:
            done.add(relative)
            yield Found(b"%b/%b" % (prefix, relative), os.stat(parent))
        directories.sort()
        for leaf in sorted(files):
            entry = os.path.join(relative, leaf)
            if _wanted(leaf) and entry not in done:
                done.add(entry)
                yield from _source(os.path.join(parent, leaf), b"%b/%b" % (prefix, entry))


def _source(path: bytes, name: bytes) -> Iterator[Found]:
    try:
        found = os.lstat(path)
    except OSError:
        return
    if stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode):
        yield Found(name, found, source=path)


def _wanted(leaf: bytes) -> bool:
    """Tell whether a file of a git directory is lasting: no lock, no half-written one."""
    return not leaf.endswith((b".lock", b".sample")) and not leaf.startswith(b"tmp_")


def tar_source(path: bytes, name: bytes, warn: Warn, note: Note | None = None) -> Iterator[bytes]:
    """Yield the entry of a file of a git directory."""
    directory, leaf = os.path.split(path)
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        yield from tar_entry(fd, leaf, name, warn, note)
    finally:
        os.close(fd)


def _object_directories(common: bytes) -> list[bytes]:
    """Return the object directory and its alternates, theirs too."""
    found = [os.path.join(common, b"objects")]
    for directory in found:
        try:
            with open(os.path.join(directory, b"info", b"alternates"), "rb") as file:
                lines = file.read().split(b"\n")
        except OSError:
            continue
        for line in lines:
            if not line or line.startswith(b"#"):
                continue
            other = os.path.realpath(os.path.join(directory, line))
            if other not in found and os.path.isdir(other) and len(found) < _MAX_ALTERNATES:
                found.append(other)
    return found


def _objects(common: bytes, prefix: bytes, names_only: bool) -> Iterator[Found]:
    """Yield every object of a repository and its alternates, as one object directory.

    Loose objects before packs: a repack writes the pack, then removes what is in it. A
    pack that vanishes was replaced by a newer one, so the packs are listed again.
    """
    directories = _object_directories(common)
    yield Found(prefix, os.stat(directories[0]))
    done: set[bytes] = set()
    for directory in directories:
        for fan in sorted(os.listdir(directory)):
            if len(fan) == 2 and re.fullmatch(rb"[0-9a-f]{2}", fan):
                yield from _directory_files(directory, fan, prefix, done, names_only)
    if len(directories) == 1:
        yield from _tree_of_objects(directories[0], b"info", prefix, done, names_only)
    for directory in directories:
        for _ in range(_PACK_LISTINGS):
            before = _packs(directory)
            yield from _directory_files(directory, b"pack", prefix, done, names_only)
            if _packs(directory) <= before:
                break


def _packs(directory: bytes) -> set[bytes]:
    try:
        return {name for name in os.listdir(directory + b"/pack") if name.endswith(b".pack")}
    except OSError:
        return set()


def _tree_of_objects(
    directory: bytes, name: bytes, prefix: bytes, done: set[bytes], names_only: bool
) -> Iterator[Found]:
    yield from _directory_files(directory, name, prefix, done, names_only)
    if os.path.isdir(os.path.join(directory, name, b"commit-graphs")):
        graphs = os.path.join(name, b"commit-graphs")
        yield from _directory_files(directory, graphs, prefix, done, names_only)


def _directory_files(
    directory: bytes, name: bytes, prefix: bytes, done: set[bytes], names_only: bool
) -> Iterator[Found]:
    """Yield one directory and the files in it that are not out already."""
    path = os.path.join(directory, name)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if name not in done:
            done.add(name)
            yield Found(b"%b/%b" % (prefix, name), os.fstat(fd))
        for text in sorted(os.listdir(fd)):
            leaf = os.fsencode(text)
            entry = b"%b/%b" % (name, leaf)
            if entry in done or not _wanted(leaf) or leaf in (b"alternates", b"http-alternates"):
                continue
            if names_only:
                done.add(entry)
                yield Found(b"%b/%b" % (prefix, entry), None, fd, leaf, b"%b/%b" % (path, leaf))
                continue
            try:
                found = os.stat(leaf, dir_fd=fd, follow_symlinks=False)
            except OSError:
                continue  # one that vanished is not out: its successor may be
            if stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode):
                done.add(entry)
                name_there = b"%b/%b" % (prefix, entry)
                yield Found(name_there, found, fd, leaf, b"%b/%b" % (path, leaf))
    finally:
        os.close(fd)


# -- .git of one commit

_ID = re.compile(rb"[0-9a-f]{40}(?:[0-9a-f]{24})?\Z")
# Of a git directory: what names no object.
_WITHOUT_OBJECTS = (b"description", b"hooks", b"info")


def staged_hash(root: bytes) -> str:
    """Return the SHA-256 of what an index holds, as `git ls-files -s -z | sha256sum` has it."""
    return hashlib.sha256(git(root, "ls-files", "-s", "-z")).hexdigest()


def head_commit(root: bytes) -> str | None:
    """Return the commit that HEAD is, None before the first."""
    said = git(root, "rev-parse", "-q", "--verify", "HEAD^{commit}", check=False)
    return said.strip().decode("ascii", "replace") or None


def _shallow_git_directory(root: bytes, prefix: bytes, how: _Walk) -> Iterator[Found]:
    """Yield a `.git` with the newest commit and what is staged, its history cut off by `shallow`.

    The pack is made when it is asked for: its name tells what is in it. What the guest has from
    before (`Depth.sent`) is not in it.
    """
    found = _find_git_directories(root)
    below = _below(prefix, b".git")
    yield Found(below, os.stat(found.common))
    head = (head_commit(root) or "").encode()
    branch = git(root, "symbolic-ref", "-q", "HEAD", check=False).strip()
    done: set[bytes] = set()
    for name in _WITHOUT_OBJECTS:
        yield from _git_tree(found.common, name, below, done)
    yield from _source(os.path.join(found.own, b"index"), below + b"/index")
    yield _made_up(below + b"/HEAD", (b"ref: " + branch if branch else head) + b"\n")
    if head and branch:
        yield _made_up(b"%b/%b" % (below, branch), head + b"\n")
    earlier = [one.encode() for one in how.depth.sent.get(prefix, ())]
    cut = sorted(
        one
        for one in {*earlier, *([head] if head else [])}
        if b"\nparent " in git(root, "cat-file", "commit", one, check=False).partition(b"\n\n")[0]
    )
    if cut:
        yield _made_up(below + b"/shallow", b"\n".join(cut) + b"\n")
    yield _made_up(below + b"/config", _guest_config(root, found, shallow=True))
    listed = git(root, "ls-files", "-s", "-z")
    key = hashlib.sha256(head + b"\n" + listed).hexdigest()[:40].encode()
    made = functools.cache(functools.partial(_pack, root, head, listed, earlier))
    pack = b"%b/objects/pack/pack-%b" % (below, key)
    yield Found(pack + b".pack", content=lambda: made()[0], digest=key)
    yield Found(pack + b".idx", content=lambda: made()[1], digest=key)


def _pack(root: bytes, head: bytes, listed: bytes, earlier: list[bytes]) -> tuple[bytes, bytes]:
    """Return a pack of one commit and of what is staged, and its index."""
    staged = {line.split(b" ")[1] for line in listed.split(b"\0") if line and line[:6] != b"160000"}
    asked = b"".join(one + b"\n" for one in sorted(staged))
    answers = git(root, "cat-file", "--batch-check=%(objectname) %(objecttype)", stdin=asked)
    blobs = [line.split(b" ")[0] for line in answers.splitlines() if line.endswith(b" blob")]
    known = b"".join(one + b"^{commit}\n" for one in earlier)
    answers = git(root, "cat-file", "--batch-check=%(objectname)", stdin=known) if known else b""
    older = [b"^" + line for line in answers.splitlines() if _ID.match(line)]
    # The guest has trees and files of the older ones, and none of their parents.
    cuts = {*([head] if head else []), *(one[1:] for one in older)}
    tips = [head] if head and b"^" + head not in older else []
    lines = [*(b"--shallow " + one for one in sorted(cuts)), *tips, *blobs, *older]
    words = b"".join(line + b"\n" for line in lines)
    # Without deltas: one against an object that is not in the pack could not be indexed here.
    how = ["--thin", "--shallow", "--no-reuse-delta", "--window=0"] if older else []
    pack = git(root, "pack-objects", "--revs", "--stdout", "-q", *how, stdin=words)
    with tempfile.TemporaryDirectory(prefix="banger-pack-") as place:
        name, index = os.path.join(place, "x.pack"), os.path.join(place, "x.idx")
        with open(name, "wb") as file:
            file.write(pack)
        git(root, "index-pack", "-o", index, name)
        with open(index, "rb") as file:
            return pack, file.read()


# -- .git/config

_DROPPED_SECTIONS = ("credential", "gpg", "include", "includeif")
_DROPPED_KEYS = frozenset(
    ["core.worktree", "core.bare", "core.fsmonitor", "core.askpass", "core.sshcommand",
     "commit.gpgsign", "tag.gpgsign", "push.gpgsign", "user.signingkey",
     "extensions.worktreeconfig"]
)  # fmt: skip
_DROPPED_VARIABLES = frozenset(
    ["extraheader", "cookiefile", "sslkey", "sslcert", "sslcertpasswordprotected", "proxy"]
)
_ADDED_KEYS = ("user.name", "user.email", "core.autocrlf", "core.eol", "core.safecrlf")
_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)@")


def _guest_config(root: bytes, found: _GitDirectories, *, shallow: bool = False) -> bytes:
    """Return the config of the copy: the repository's own, less secrets and host paths."""
    entries = _config_entries(root, os.path.join(found.common, b"config"))
    if any(key == "extensions.worktreeconfig" and value == "true" for key, value in entries):
        entries += _config_entries(root, os.path.join(found.own, b"config.worktree"))
    kept = [
        (_key_without_secrets(key), None if value is None else without_secrets(value))
        for key, value in entries
        if _keeps(key, value) and not (shallow and key == "extensions.refstorage")
    ]
    kept.append(("core.bare", "false"))
    own = {key for key, _ in kept}
    in_force = dict(_parse_config(git(root, "config", "--list", "-z", check=False)))
    kept += [(key, in_force[key]) for key in _ADDED_KEYS if key in in_force and key not in own]
    return render_config(kept).encode(errors="surrogateescape")


def _config_entries(root: bytes, path: bytes) -> list[tuple[str, str | None]]:
    if not os.path.exists(path):
        return []
    return _parse_config(git(root, "config", "--file", path, "--no-includes", "--list", "-z"))


def _parse_config(listed: bytes) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    for entry in os.fsdecode(listed).split("\0"):
        if entry:
            key, separator, value = entry.partition("\n")
            found.append((key, value if separator else None))
    return found


def _keeps(key: str, value: str | None) -> bool:
    section, _, rest = key.partition(".")
    variable = rest.rpartition(".")[2]
    if section in _DROPPED_SECTIONS or key in _DROPPED_KEYS:
        return False
    if section == "http" and variable in _DROPPED_VARIABLES:
        return False
    # Hooks inside the repository are part of it; those elsewhere on the host are not there.
    return not (key == "core.hookspath" and (value or "").startswith(("/", "~")))


def without_secrets(text: str) -> str:
    """Return a URL without its password, and over http(s) without its user (often a token)."""
    match = _URL.match(text)
    if match is None:
        return text
    scheme, userinfo = match.group(1), match.group(2)
    user = "" if scheme.lower() in ("http", "https") else userinfo.partition(":")[0]
    return f"{scheme}://{user + '@' if user else ''}{text[match.end() :]}"


def _key_without_secrets(key: str) -> str:
    section, _, rest = key.partition(".")
    subsection, dot, variable = rest.rpartition(".")
    return f"{section}.{without_secrets(subsection)}.{variable}" if dot else key


def render_config(entries: Iterable[tuple[str, str | None]]) -> str:
    """Return entries as git config text; a value of None is a bare (true) variable."""
    lines = []
    for key, value in entries:
        section, _, rest = key.partition(".")
        subsection, dot, variable = rest.rpartition(".")
        if dot:
            escaped = subsection.replace("\\", "\\\\").replace('"', '\\"')
            lines.append(f'[{section} "{escaped}"]')
        else:
            lines.append(f"[{section}]")
        lines.append(f"\t{variable}" if value is None else f"\t{variable} = {_quoted(value)}")
    return "\n".join(lines) + "\n"


def _quoted(value: str) -> str:
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\t", "\\t")):
        value = value.replace(plain, escaped)
    return f'"{value}"'
