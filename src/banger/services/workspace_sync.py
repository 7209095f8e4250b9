"""Bringing a guest's copy of a repository up to date, one way: what changed here goes there.

Owns one run: the first copy, and the order of the steps over one that is there. What was sent is
`services.copy_manifest` (kept in the copy, so that every host agrees on it and it goes with the
copy); the comparison of here, sent and there is `services.copy_changes`; what is here
`services.workspace_snapshot`; what is asked of the guest `services.guest_paths`.

The guest is asked about no path but those that changed here. What changed on both sides stays as it
is there, and is reported. The manifest is the guest's to forge: it is bounded, and no path of it
makes this host read a file; it can only make the guest lose or miss its own.

A copy that is broken off leaves `.git/banger/begun` newer than the manifest, with what was about to
be written: the next run knows its own half-done work from the guest's.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from banger.errors import BangerError, Conflict, NotFound
from banger.guest import agent
from banger.services import guest_paths, workspaces
from banger.services.copy_changes import (
    GIT_DIRECTORIES,
    Seen,
    Todo,
    Unit,
    ancestors,
    changes,
    git_of,
    is_as,
    is_note,
    is_object,
    judge,
    split_git,
    states,
)
from banger.services.copy_manifest import (
    BEGUN_PATH,
    MANIFEST_PATH,
    Manifest,
    check_path,
    parse_row,
    render_begun,
    render_manifest,
    render_row,
)
from banger.services.guest_paths import Known, Target, unreadable
from banger.services.workspace_snapshot import (
    Snapshot,
    digest_here,
    head_commits,
    staged,
    take_snapshot,
)
from banger.services.workspaces import Depth, Entry, Warn, Workspace

_MAX_INTENT = 20_000  # more is a copy of nearly all: without it, half-done files may be conflicts
_PUT_TIMEOUT_S = 120.0  # between two answers of a guest that swaps


class Problem(NamedTuple):
    """A path that changed on both sides, and how."""

    path: bytes
    reason: str


class Report(NamedTuple):
    """What one run did. `git` is sent, same or conflict; `fresh` tells the first copy."""

    sent: int
    deleted: int
    size_bytes: int
    git: str
    conflicts: list[Problem]
    fresh: bool
    paths: list[bytes]
    untracked: bool


def _noting(rows: dict[bytes, bytes], objects: set[bytes]) -> Callable[[bytes, Entry], None]:
    """Return what notes entries as they are sent."""

    def note(name: bytes, entry: Entry) -> None:
        if is_object(name):
            objects.add(name)
        else:
            rows[name] = render_row(entry)

    return note


def iter_copy(
    workspace: Workspace,
    *,
    shallow: bool = False,
    warn: Warn = lambda _: None,
    rows: dict[bytes, bytes] | None = None,
) -> Iterator[bytes]:
    """Yield a tar of the repository for an absent or empty directory, with the manifest at its end.

    Made for extraction in the copy's own directory. `rows` gets what went.
    """
    rows = {} if rows is None else rows
    objects: set[bytes] = set()
    token = secrets.token_hex(16)

    def pieces() -> Iterator[bytes]:
        note = _noting(rows, objects)
        yield from workspaces.tar_content(BEGUN_PATH, render_begun(token, {}))
        for found in workspaces.walk(workspace, warn=warn, depth=Depth(shallow, {})):
            yield from workspaces.tar_found(found, found.name or b".", warn, note)
        repositories = {p[0] for path in rows if path.endswith(b"/HEAD") and (p := split_git(path))}
        made = Manifest(
            workspace.name, shallow, workspace.include_untracked, rows, objects,
            {one: staged(workspace, one) for one in repositories},
            head_commits(workspace, repositories, {}) if shallow else {},
        )  # fmt: skip
        yield from workspaces.tar_content(MANIFEST_PATH, render_manifest(made, token))
        yield workspaces.TAR_END

    return workspaces.batched(pieces())


def _of_one_content(
    target: Target, snapshot: Snapshot, guest: Mapping[bytes, Seen], doubts: Iterable[bytes],
    *, interrupted: bool,
) -> set[bytes]:  # fmt: skip
    """Return which of these the guest has as they are here: by another hand, but no other content.

    After an interruption the beginning of a file is a half-written one of ours.
    """
    whole: list[bytes] = []
    begun: dict[bytes, int] = {}
    for path in doubts:
        row, there = snapshot.rows.get(path), guest.get(path)
        if row is None or there is None:
            continue
        here = parse_row(row)
        if (here.kind, there.kind) != ("f", "f"):
            continue
        if here.size == there.size:
            whole.append(path)
        elif interrupted and there.size < here.size:
            begun[path] = there.size
    said: dict[bytes, bytes] = {}
    if whole:
        said.update(zip(whole, guest_paths.digests(target, whole), strict=True))
    if begun:
        said.update(zip(begun, guest_paths.prefix_digests(target, begun), strict=True))
    return {
        path
        for path, digest in said.items()
        if digest == digest_here(target.workspace, snapshot, path, begun.get(path))
    }


class Options(NamedTuple):
    """How a run goes, and who is told of it.

    None for `shallow` and `untracked` is what the copy has; for a new one False and True. With
    `overwrite`, what changed on both sides becomes what it is here.
    """

    overwrite: bool = False
    shallow: bool | None = None
    untracked: bool | None = None
    warn: Warn = lambda _: None
    progress: Callable[[int], None] | None = None
    stage: Callable[[str], None] = lambda _: None


_PLAIN = Options()


def bring_up_to_date(target: Target, options: Options = _PLAIN, *, make: bool = True) -> Report:
    """Send what changed here since the last run; where there is no copy, make one (with `make`).

    What changed on both sides stays as it is there and is in the report, unless told to overwrite.
    Raises Conflict for a directory that is not a copy of this repository, and what agent and git
    raise.
    """
    known = guest_paths.read_known(target, forgive=options.overwrite)
    if known.present:
        return _Run(target, known, options).run()
    if not make:
        raise NotFound(
            f"{target.vm} has no copy of {target.workspace.name} at "
            f"{target.workspace.guest_directory}",
            hint=f"banger vm workspace prepare {target.vm}, or --guest-path",
        )
    return _first(target, options)


def _first(target: Target, options: Options) -> Report:
    workspace = target.workspace._replace(include_untracked=options.untracked is not False)
    options.stage(f"copy {workspace.name} to {workspace.guest_directory}")
    count = _Counter(options.progress)
    rows: dict[bytes, bytes] = {}
    stream = iter_copy(workspace, shallow=bool(options.shallow), warn=options.warn, rows=rows)
    try:
        agent.put_tar(
            target.endpoint, target.directory, stream, mode="create", timeout_s=_PUT_TIMEOUT_S,
            progress=count,
        )  # fmt: skip
    except BangerError as error:
        if error.code in ("agent_exists", "agent_not_a_directory"):
            raise Conflict(
                f"{workspace.guest_directory} is in {target.vm} and is no copy that banger made",
                hint="choose another --guest-path, or remove it there",
            ) from error
        raise
    sent = sum(1 for path in rows if split_git(path) is None)
    return Report(sent, 0, count.total, "sent", [], True, [], workspace.include_untracked)


class _Counter:
    """Adds up what was sent, and passes it on."""

    def __init__(self, passed_on: Callable[[int], None] | None) -> None:
        self._passed_on = passed_on
        self._before = 0
        self.total = 0

    def __call__(self, done: int) -> None:
        self.total = self._before + done
        if self._passed_on is not None:
            self._passed_on(self.total)

    def next(self) -> None:
        """Begin another stream."""
        self._before = self.total


class _Run:
    """One run over a copy that is there."""

    def __init__(self, target: Target, known: Known, options: Options) -> None:
        shallow, untracked = options.shallow, options.untracked
        manifest = known.manifest or Manifest(
            target.workspace.name, bool(shallow), untracked is not False, {}, set(), {}, {}
        )
        if manifest.name != target.workspace.name and not options.overwrite:
            raise Conflict(
                f"{target.workspace.guest_directory} is a copy of {_plain(manifest.name)}, "
                f"not of {target.workspace.name}",
                hint="choose another --guest-path; --overwrite makes it a copy of this one",
            )
        self.shallow = manifest.shallow if shallow is None else shallow
        if self.shallow and not manifest.shallow and known.manifest is not None:
            raise Conflict(
                f"the copy in {target.vm} has the whole history already",
                hint="leave --mode out, or choose another --guest-path",
            )
        include = manifest.untracked if untracked is None else untracked
        workspace = target.workspace._replace(include_untracked=include)
        self.target = target._replace(workspace=workspace)
        self.options = options
        self.base = manifest
        self.intent = known.intent
        self.conflicts: list[Problem] = []
        self.count = _Counter(options.progress)
        self._hashes: dict[bytes, str] = {}
        heads = manifest.heads if manifest.shallow else {}
        self.snapshot = take_snapshot(workspace, Depth(self.shallow, heads), options.warn)
        # Of the paths in question: what they are here, what was sent, and what is there.
        self.host: dict[bytes, Entry] = {}
        self.sent: dict[bytes, Entry] = {}
        self.guest: dict[bytes, Seen] = {}

    def run(self) -> Report:
        """Compare, ask, and send."""
        workspace = self.target.workspace
        todo = changes(self.snapshot.rows, self.base.rows)
        files = Todo(*([path for path in side if split_git(path) is None] for side in todo))
        units = self._units(todo)
        changed = self.shallow != self.base.shallow or self.intent is not None
        if not any([*files, units, changed]) and workspace[:3] == (
            workspace.top, self.base.name, self.base.untracked
        ):  # fmt: skip
            return Report(0, 0, 0, "same", [], False, [], workspace.include_untracked)
        self.options.stage(f"bring {workspace.guest_directory} up to date")
        self._ask(todo, files, units)
        write, delete, same, after = self._decide(files)
        git_write, git_delete, git_conflict = self._settle(units)
        self._make_way(write, delete, after)
        work = sorted(write) + self._in_order(git_write)
        made = self._manifest(units, git_conflict, same | delete)
        made.rows.update((path, self.snapshot.rows[path]) for path in same if path in self.host)
        self._send(work, made, git_delete)
        state = "conflict" if git_conflict else "sent" if git_write or git_delete else "same"
        return Report(
            len(write), len(delete), self.count.total, state, sorted(self.conflicts), False, work,
            workspace.include_untracked,
        )  # fmt: skip

    def _index_hash(self, repository: bytes) -> str:
        if repository not in self._hashes:
            self._hashes[repository] = staged(self.target.workspace, repository)
        return self._hashes[repository]

    # -- what is asked

    def _units(self, todo: Todo) -> list[Unit]:
        """Return the repositories whose `.git` changed here."""
        writes: dict[bytes, list[bytes]] = {}
        deletes: dict[bytes, list[bytes]] = {}
        objects: dict[bytes, list[bytes]] = {}
        new = self.snapshot.objects.keys() - self.base.objects
        for side, where in zip([*todo, new], (writes, deletes, objects), strict=True):
            for path in side:
                if parts := split_git(path):
                    where.setdefault(parts[0], []).append(path)
        alive = self.snapshot.repositories()
        units = []
        for one in sorted(writes.keys() | deletes.keys() | objects.keys()):
            gone = one not in alive
            mine, lost = writes.get(one, []), deletes.get(one, [])
            unit = Unit(one, Todo(mine, lost), sorted(objects.get(one, [])), [], gone)
            before = self.base.staged.get(one)
            if (
                unit.index_path in mine
                and unit.index_path in self.base.rows
                and before == self._index_hash(one)
            ):
                mine.remove(unit.index_path)  # git refreshed it: what is in it is the same
            if not mine and not lost and not unit.objects:
                continue
            asked = {*mine, *lost}
            if git_of(one) + b"/HEAD" in asked:
                # Who moves there would be moved by us.
                asked.update(states(one, self.snapshot.rows), states(one, self.base.rows))
            units.append(unit._replace(watched=sorted(asked)))
        return units

    def _ask(self, todo: Todo, files: Todo, units: list[Unit]) -> None:
        """Ask what the guest has where something is to be done; check what the manifest says."""
        paths = {*files.write, *files.delete}
        for unit in units:
            paths.update(unit.watched)
        paths |= {one for path in paths for one in ancestors(path)}
        try:
            for path in todo.delete:
                check_path(path)
            for path in paths:
                if path in self.snapshot.rows:
                    self.host[path] = parse_row(self.snapshot.rows[path])
                if path in self.base.rows:
                    self.sent[check_path(path)] = parse_row(self.base.rows[path])
        except ValueError as error:
            raise unreadable(self.target) from error
        self.guest = guest_paths.look(self.target, paths)

    # -- what is decided

    def _decide(self, files: Todo) -> tuple[set[bytes], set[bytes], set[bytes], set[bytes]]:
        """Return the files to write, to delete, those that are the same, and `Verdict.after`."""
        verdict = judge(files, self.host, self.sent, self.guest, intent=self.intent)
        write, delete, after = set(verdict.write), set(verdict.delete), set(verdict.after)
        write |= self._of_one_content(verdict.doubts)
        for path, reason in verdict.doubts.items():
            if path in write:
                continue
            if not self.options.overwrite:
                self.conflicts.append(Problem(path, reason))
            elif path not in self.host:
                delete.add(path)
            elif self._kind(path) == "d":
                after.add(path)
            else:
                write.add(path)
        return write, delete, set(verdict.same), after

    def _of_one_content(self, doubts: Iterable[bytes]) -> set[bytes]:
        interrupted = self.intent is not None
        return _of_one_content(
            self.target, self.snapshot, self.guest, doubts, interrupted=interrupted
        )

    def _manifest(self, units: list[Unit], conflicts: set[bytes], settled: set[bytes]) -> Manifest:
        """Return the manifest to be, with the rows that are sent still as they were."""
        workspace, heads = self.target.workspace, self.base.heads
        rows = {path: row for path, row in self.base.rows.items() if path not in settled}
        alive = self.snapshot.repositories()
        sent = head_commits(workspace, alive - conflicts, heads) if self.shallow else {}
        kept = {one: ids for one, ids in heads.items() if one in conflicts}
        return Manifest(
            workspace.name, self.shallow, workspace.include_untracked, rows,
            set(self.base.objects), self._staged(units, conflicts), {**sent, **kept},
        )  # fmt: skip

    def _settle(self, units: list[Unit]) -> tuple[set[bytes], list[bytes], set[bytes]]:
        """Return what goes of each `.git`, what goes away, and the repositories in conflict.

        All of one goes, or nothing of it.
        """
        host, base = self.host, self.sent
        write: set[bytes] = set()
        delete: list[bytes] = []
        conflicts = set()
        for unit in units:
            moved = self._moved(unit)
            if moved and not self.options.overwrite:
                conflicts.add(unit.repository)
                reason = "the guest has commits, branches or an index of its own"
                self.conflicts.append(Problem(git_of(unit.repository), reason))
                continue
            write.update(unit.objects, unit.todo.write)
            write.update(path for path in moved if path in host)
            gone = [path for path in moved if path not in host and path in base]
            delete += sorted({*unit.todo.delete, *gone})
            if unit.gone:
                for path in self.base.objects:
                    if (parts := split_git(path)) and parts[0] == unit.repository:
                        delete.append(check_path(path))
        return write, delete, conflicts

    def _moved(self, unit: Unit) -> list[bytes]:
        """Return the names of a `.git` that are neither as they were sent nor as they are here."""
        if not unit.todo.write and not unit.todo.delete:
            return []  # objects alone change nothing
        host, base = self.host, self.sent
        doubts = []
        for path in unit.watched:
            parts = split_git(path)
            if parts is None or is_note(parts[1]):
                continue
            seen = self.guest.get(path)
            expected = [base.get(path), host.get(path)]
            if self.intent is not None:
                expected.append(self.intent.get(path))
            if not any(is_as(seen, entry) for entry in expected) and not (
                seen is None and self.intent is not None
            ):
                doubts.append(path)
        if unit.index_path in doubts and not self.options.overwrite:
            there = guest_paths.staged_there(self.target, unit.repository)
            here = None if unit.gone else self._index_hash(unit.repository)
            if there is not None and there in (self.base.staged.get(unit.repository), here):
                doubts.remove(unit.index_path)
        same = self._of_one_content(doubts)
        return [path for path in doubts if path not in same]

    def _staged(self, units: list[Unit], conflicts: set[bytes]) -> dict[bytes, str]:
        staged = dict(self.base.staged)
        for unit in units:
            if unit.gone:
                staged.pop(unit.repository, None)
            elif unit.repository not in conflicts:
                staged[unit.repository] = self._index_hash(unit.repository)
        return staged

    # -- what is done

    def _make_way(self, write: set[bytes], delete: set[bytes], after: set[bytes]) -> None:
        """Delete what is gone here and what stands in the way of what comes.

        What is a directory there and a file here comes when nothing of the guest's is left in it.
        """
        host = self.host
        ways = set()
        for path in write:
            stands = [above for above in ancestors(path) if self._kind(above) not in ("", "d")]
            ways.update(stands[-1:])
            if host[path].kind == "d" and self._kind(path) not in ("", "d"):
                ways.add(path)
        # Through a link of the guest's, what would go is not in the copy.
        gone = {
            path
            for path in delete
            if self._kind(path) != "d"
            and all(self._kind(above) in ("", "d") for above in ancestors(path))
        } | ways
        if gone:
            guest_paths.remove(self.target, gone)
        empty: set[bytes] = set()
        if delete:
            # Only what we sent a file into is ours to remove; that of the guest's is not empty.
            kept = {above for path in self.snapshot.rows for above in ancestors(path)}
            empty = {above for path in delete for above in ancestors(path)} - kept
            empty |= {path for path in delete if self._kind(path) == "d"} - kept
        guest_paths.remove_directories(self.target, empty | after)
        if after:
            left = guest_paths.look(self.target, after)
            for path in sorted(after):
                if path in left:
                    reason = "a directory with files of its own there, a file here"
                    self.conflicts.append(Problem(path, reason))
                else:
                    write.add(path)

    def _kind(self, path: bytes) -> str:
        seen = self.guest.get(path)
        return seen.kind if seen is not None else ""

    def _in_order(self, paths: set[bytes]) -> list[bytes]:
        """Objects before what names them, HEAD last."""

        def rank(path: bytes) -> tuple[int, bytes]:
            parts = split_git(path)
            name = parts[1] if parts else b""
            return (0 if is_object(path) else 2 if name == b"HEAD" else 1), path

        return sorted(paths, key=rank)

    def _send(self, work: list[bytes], made: Manifest, gone: list[bytes]) -> None:
        """Put the files, delete what is gone of `.git`, and put the manifest."""
        token = secrets.token_hex(16)
        clear = [path for path in gone if any(other.startswith(path + b"/") for other in work)]
        if clear:
            guest_paths.remove(self.target, clear)
        last = [path for path in gone if path not in clear]
        if last:
            # References are packed by now, or are no more: first the new ones, then these go.
            self._put(self._tar(work, made, token, finish=False))
            guest_paths.remove(self.target, last)
            empty = {above for path in last for above in ancestors(path)}
            here = {above for path in self.snapshot.rows for above in ancestors(path)}
            units = {parts[0] for path in last if (parts := split_git(path))}
            for one in units - self.snapshot.repositories():
                empty.update(b"%b/%b" % (git_of(one), name) for name in GIT_DIRECTORIES)
            guest_paths.remove_directories(
                self.target, empty - here - self.snapshot.directories.keys()
            )
            work = []
        for path in gone:
            made.rows.pop(path, None)
            made.objects.discard(path)
        self._put(self._tar(work, made, token, begin=not last))

    def _put(self, tar: Iterable[bytes]) -> None:
        agent.put_tar(
            self.target.endpoint, self.target.directory, workspaces.batched(tar),
            timeout_s=_PUT_TIMEOUT_S, progress=self.count,
        )  # fmt: skip
        self.count.next()

    def _tar(
        self, work: list[bytes], made: Manifest, token: str, *,
        begin: bool = True, finish: bool = True,
    ) -> Iterator[bytes]:  # fmt: skip
        rows = self.snapshot.rows
        if begin:
            intent = {path: rows[path] for path in work[:_MAX_INTENT] if path in rows}
            yield from workspaces.tar_content(BEGUN_PATH, render_begun(token, intent))
        note = _noting(made.rows, made.objects)
        known: set[bytes] = set()
        if any(path not in self.base.rows and path not in self.snapshot.objects for path in work):
            known = {above for path in self.base.rows for above in ancestors(path)}
        with workspaces.DirectoryStack(os.fsencode(self.target.workspace.top)) as stack:
            for path in work:
                if path not in self.base.rows and path not in self.snapshot.objects:
                    for above in reversed([*ancestors(path)]):
                        if above not in known and above in self.snapshot.directories:
                            known.add(above)
                            yield workspaces.tar_directory(above, self.snapshot.directories[above])
                found = self.snapshot.sources.get(path) or self.snapshot.objects.get(path)
                if found is not None:
                    yield from workspaces.tar_found(found, path, self.options.warn, note)
                elif rows[path].startswith(b"d "):
                    note(path, parse_row(rows[path]))
                    yield workspaces.tar_directory(path, self.snapshot.directories[path])
                elif (here := stack.enter(os.path.dirname(path))) is not None:
                    leaf = os.path.basename(path)
                    yield from workspaces.tar_entry(here[0], leaf, path, self.options.warn, note)
        if finish:
            yield from workspaces.tar_content(MANIFEST_PATH, render_manifest(made, token))
        yield workspaces.TAR_END


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:100])
