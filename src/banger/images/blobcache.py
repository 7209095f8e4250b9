"""Blobs by digest, kept between pulls: found, downloaded once by all who want them, evicted.

Owns the directory below, shared by every daemon of a user. Where bytes come from is the
caller's to know; what an image makes of them too.

<cache>/blobs/                 mode 0700
  sha256/<hex>                 whole: size and digest were right when it got this name. Whoever
                               uses it holds a shared flock on it; only who gets the exclusive
                               one may unlink it
  sha256/<hex>.partial         a download. Its exclusive flock is held by whoever appends to it;
                               left by a crash or a failure, the next one goes on at its end
  sha512/...                   likewise

A lock on a path's file counts only while the path still leads to that file, so everybody looks
again after locking. Whole blobs come into being by rename alone, after fsync: kill -9 or a power
cut leaves a whole blob, a partial, or both names absent. The kernel drops the locks of the dead.

A blob found here is **hashed again at every use**, not only measured. It costs 0.2 to 0.6 s per
300 MB in a thread, brings into the page cache what the merge reads next, and is the only thing
between a flipped bit on this disk and an image that is silently wrong. What differs is removed
and downloaded anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from banger.errors import Corrupted, InvalidInput, NoSpace
from banger.host.files import fsync_directory, make_private_directory, no_space_named
from banger.host.threads import run_uncut
from banger.images.oci import BlobFile
from banger.types import format_size

_ALGORITHMS = {"sha256": 64, "sha512": 128}
_PARTIAL = ".partial"
_FILE_NAME = re.compile(r"([0-9a-f]+)(\.partial)?")
_HASH_CHUNK_BYTES = 1 << 20
_STALE_PARTIAL_S = 7 * 86400  # nobody comes back for a download after a week
_DAMAGED_TRIES = 3  # two that find the same damage at once: one removes it
# Locks are asked for again and again: a wait inside flock(2) could not be cancelled.
_POLL_FIRST_S = 0.02
_POLL_LIMIT_S = 0.5


class CachedBlob(NamedTuple):
    """One file of the cache; `partial` is a download that did not end, or runs."""

    digest: str
    size_bytes: int
    last_used: float  # seconds since the epoch
    partial: bool
    in_use: bool


_Entries = list[tuple[Path, CachedBlob]]
_CachedBlobs = list[CachedBlob]


class Partial:
    """A blob that is being downloaded: append what is missing from `size_bytes` on."""

    def __init__(self, fd: int, digest: str, wanted_bytes: int, reached: Callable[[int], None]):
        self.digest = digest
        self.wanted_bytes = wanted_bytes
        self.size_bytes = 0
        self._fd = fd
        self._hash = _new_hash(digest)
        self._reached = reached

    async def append(self, data: bytes) -> None:
        """Write and hash `data`; raise Corrupted when it is more than the blob has."""
        if self.size_bytes + len(data) > self.wanted_bytes:
            raise Corrupted(
                f"{short(self.digest)} is longer than the {self.wanted_bytes} bytes it should have"
            )
        await run_uncut(self._write, data)
        self._reached(self.size_bytes)

    async def restart(self) -> None:
        """Forget everything there is."""
        await run_uncut(os.ftruncate, self._fd, 0)
        self._hash = _new_hash(self.digest)
        self.size_bytes = 0

    def load(self) -> None:
        """Take in what an earlier download left."""
        size = os.fstat(self._fd).st_size
        if size > self.wanted_bytes:
            os.ftruncate(self._fd, 0)
            return
        for piece in _pieces(self._fd, size):
            self._hash.update(piece)
            self.size_bytes += len(piece)

    def check(self) -> None:
        """Raise Corrupted unless size and then digest are right."""
        if self.size_bytes != self.wanted_bytes:
            raise Corrupted(
                f"{short(self.digest)} has {self.size_bytes} bytes, not {self.wanted_bytes}"
            )
        found = self._hash.hexdigest()
        if found != self.digest.partition(":")[2]:
            raise Corrupted(
                f"what arrived is not {short(self.digest)}: its digest is {found[:12]}",
                hint="it was damaged on the way or at the registry; try again",
            )

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, self.size_bytes)
            self._hash.update(view[:done])
            self.size_bytes += done
            view = view[done:]


Fetch = Callable[[Partial], Awaitable[None]]


class BlobCache:
    """The cache in `directory` (`<cache>/blobs`), kept below `limit_bytes` by eviction."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self._directory = directory
        self._limit_bytes = limit_bytes

    @contextlib.contextmanager
    def pinning(self) -> Iterator[Pins]:
        """Let blobs be used: what is found or obtained stays until the block ends."""
        pins = Pins(self)
        try:
            yield pins
        finally:
            pins.close()

    def path(self, digest: str) -> Path:
        """Return where a whole blob lies; raise InvalidInput for what is no digest."""
        algorithm, _, text = digest.partition(":")
        if _ALGORITHMS.get(algorithm) != len(text) or not re.fullmatch(r"[0-9a-f]+", text):
            raise InvalidInput(f"{digest!r} is not a digest banger knows: sha256 or sha512")
        return self._directory / algorithm / text

    async def list(self) -> _CachedBlobs:
        """Return what there is, the least recently used first."""
        return await run_uncut(lambda: [blob for _, blob in self._entries(probe=True)])

    async def evict(self) -> int:
        """Remove the least recently used blobs down to the limit; return the bytes freed.

        What is in use stays, and so may more than the limit. Partials that nobody went on with
        for a week go in any case.
        """
        return await run_uncut(self._shrink, self._limit_bytes, _STALE_PARTIAL_S)

    async def prune(self, *, all: bool = False) -> int:  # noqa: A002 - as the command has it
        """Remove every download that does not run, and evict; with `all` every blob not in use.

        Returns the bytes freed.
        """
        return await run_uncut(self._shrink, 0 if all else self._limit_bytes, 0)

    def _entries(self, *, probe: bool) -> _Entries:
        found: _Entries = []
        for algorithm, digits in _ALGORITHMS.items():
            with contextlib.suppress(FileNotFoundError):
                for entry in os.scandir(self._directory / algorithm):
                    named = _FILE_NAME.fullmatch(entry.name)
                    if named is None or len(named[1]) != digits:
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        path = Path(entry.path)
                        blob = CachedBlob(
                            digest=f"{algorithm}:{named[1]}",
                            size_bytes=status.st_size,
                            last_used=status.st_mtime,
                            partial=named[2] is not None,
                            in_use=probe and _is_held(path),
                        )
                        found.append((path, blob))
        return sorted(found, key=lambda one: (one[1].last_used, one[1].digest))

    def _shrink(self, limit_bytes: int, stale_s: float) -> int:
        entries = self._entries(probe=False)
        total = sum(blob.size_bytes for _, blob in entries)
        oldest = time.time() - stale_s
        freed = 0
        for path, blob in entries:
            stale = blob.partial and (stale_s == 0 or blob.last_used < oldest)
            # `<=`: with a limit of 0 the empty ones go too.
            if (total - freed <= limit_bytes and limit_bytes > 0) and not stale:
                continue
            if _remove_unheld(path):
                freed += blob.size_bytes
        return freed


class Pins:
    """Blobs one import uses. Each holds one descriptor until the end of the import."""

    def __init__(self, cache: BlobCache) -> None:
        self._cache = cache
        self._held: dict[str, int] = {}

    def close(self) -> None:
        """Let go of everything."""
        while self._held:
            os.close(self._held.popitem()[1])

    async def find(self, digest: str, size_bytes: int) -> BlobFile | None:
        """Return a whole blob, its size and digest checked, or None. A damaged one is removed."""
        path = self._cache.path(digest)
        if digest not in self._held:
            await run_uncut(self._open, path, digest, size_bytes)
        return BlobFile(path, 0, size_bytes) if digest in self._held else None

    def _open(self, path: Path, digest: str, size_bytes: int) -> None:
        # In the thread: a descriptor it returned would be lost to a cancelled caller.
        fd = _open_whole(path, digest, size_bytes)
        if fd is not None and self._held.setdefault(digest, fd) != fd:
            os.close(fd)  # another task of this import was faster

    async def obtain(
        self,
        digest: str,
        size_bytes: int,
        fetch: Fetch,
        meter: Meter | None = None,
    ) -> BlobFile:
        """Return a whole blob: found, waited for while another downloads it, or by `fetch`.

        `fetch` appends to the Partial from its `size_bytes` to its `wanted_bytes`; when it fails,
        what it appended is kept for the next one, unless it raises Corrupted. A blob made of an
        earlier download's beginning that turns out wrong is fetched once more from its first
        byte. `meter` is told how far the blob is. Raises Corrupted, NoSpace.
        """
        meter = meter or Meter(lambda _: None)
        while True:
            blob = await self.find(digest, size_bytes)
            if blob is None:
                async with self._partial(digest, size_bytes, meter) as partial:
                    if partial is None:
                        continue  # another ended it while we waited
                    await self._fill(partial, fetch)
                blob = await self.find(digest, size_bytes)
            if blob is not None:  # else evicted in this very instant
                meter.reached(size_bytes)
                return blob

    async def _fill(self, partial: Partial, fetch: Fetch) -> None:
        again = partial.size_bytes > 0
        while True:
            if partial.size_bytes < partial.wanted_bytes:
                await fetch(partial)
            try:
                partial.check()
            except Corrupted:
                if not again:
                    raise
                again = False
                await partial.restart()
            else:
                return

    @contextlib.asynccontextmanager
    async def _partial(
        self, digest: str, size_bytes: int, meter: Meter
    ) -> AsyncIterator[Partial | None]:
        """Hold a blob's partial, loaded; the whole blob is there after the block.

        Yields None when the blob may have appeared while another held it.
        """
        whole = self._cache.path(digest)
        path = whole.with_name(whole.name + _PARTIAL)
        make_private_directory(whole.parent)
        with no_space_named(whole.parent):
            fd = await _hold(path, meter)
            if fd is None:
                yield None
                return
            try:
                if whole.exists():
                    # Another made it after we looked, and before we made this empty file.
                    path.unlink()
                    yield None
                    return
                partial = Partial(fd, digest, size_bytes, meter.reached)
                try:
                    await run_uncut(partial.load)
                    _check_room(whole.parent, size_bytes - partial.size_bytes)
                    meter.reached(partial.size_bytes)
                    yield partial
                except BaseException as error:
                    if isinstance(error, Corrupted) or os.fstat(fd).st_size == 0:
                        path.unlink()
                    raise
                await run_uncut(_commit, fd, path, whole)
            finally:
                os.close(fd)


class Meter:
    """Turns positions into new bytes, whose sum is the size: a restart counts nothing twice."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self._progress = progress
        self._highest = 0

    def reached(self, position: int) -> None:
        """Report a position; what is below the highest so far was reported."""
        if position > self._highest:
            new, self._highest = position - self._highest, position
            self._progress(new)


def short(digest: str) -> str:
    """Return a digest for people."""
    return digest[: digest.find(":") + 13]


async def _hold(path: Path, meter: Meter) -> int | None:
    """Return a descriptor that holds the partial's lock; None after another's hold of it."""
    delay = _POLL_FIRST_S
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if _try_flock(fd, fcntl.LOCK_EX):
                if _leads_to(path, fd):
                    return fd
                os.close(fd)
                return None
            meter.reached(os.fstat(fd).st_size)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        await asyncio.sleep(delay)
        delay = min(delay * 2, _POLL_LIMIT_S)


def _commit(fd: int, path: Path, whole: Path) -> None:
    os.fsync(fd)
    path.rename(whole)
    fsync_directory(whole.parent)


def _open_whole(path: Path, digest: str, size_bytes: int) -> int | None:
    """Return a descriptor with a shared lock on a whole and right blob, or None."""
    for _ in range(_DAMAGED_TRIES):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        keep = False
        try:
            # Nobody holds it exclusively but for the moment of an unlink or of a listing.
            fcntl.flock(fd, fcntl.LOCK_SH)
            if not _leads_to(path, fd):
                continue
            if _has_digest(fd, digest):
                found_bytes = os.fstat(fd).st_size
                if found_bytes != size_bytes:
                    raise Corrupted(
                        f"{short(digest)} has {found_bytes} bytes, and the image says {size_bytes}"
                    )
                os.utime(fd)
                keep = True
                return fd
            if _try_flock(fd, fcntl.LOCK_EX) and _leads_to(path, fd):
                path.unlink()
                return None
        finally:
            if not keep:
                os.close(fd)
    raise Corrupted(
        f"the cached blob {short(digest)} was damaged on disk while something uses it",
        hint="try again when the other pull has ended; see `banger image cache list`",
    )


def _has_digest(fd: int, digest: str) -> bool:
    found = _new_hash(digest)
    for piece in _pieces(fd, os.fstat(fd).st_size):
        found.update(piece)
    return found.hexdigest() == digest.partition(":")[2]


def _pieces(fd: int, size_bytes: int) -> Iterator[bytes]:
    offset = 0
    while offset < size_bytes:
        piece = os.pread(fd, min(_HASH_CHUNK_BYTES, size_bytes - offset), offset)
        if not piece:
            return
        offset += len(piece)
        yield piece


def _new_hash(digest: str) -> hashlib._Hash:
    return hashlib.new(digest.partition(":")[0])


def _try_flock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _leads_to(path: Path, fd: int) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(fd))


@contextlib.contextmanager
def _exclusively(path: Path) -> Iterator[bool]:
    """Yield whether the file of a path is held by nobody else, and hold it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        yield _try_flock(fd, fcntl.LOCK_EX) and _leads_to(path, fd)
    finally:
        os.close(fd)


def _is_held(path: Path) -> bool:
    with _exclusively(path) as free:
        return not free


def _remove_unheld(path: Path) -> bool:
    with _exclusively(path) as free:
        if free:
            path.unlink()
        return free


def _check_room(directory: Path, missing_bytes: int) -> None:
    space = os.statvfs(directory)
    free = space.f_bavail * space.f_frsize
    if missing_bytes > free:
        raise NoSpace(
            f"{format_size(missing_bytes)} are to be downloaded, "
            f"and the file system of {directory} has {format_size(free)}",
            hint="free some with `banger image cache prune`, `banger vm prune` or `df -h`",
        )
