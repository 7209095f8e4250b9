"""Blobs by digest: found, shared, resumed, verified, evicted, whatever dies in between."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from banger.errors import Corrupted, InvalidInput, NoSpace, Unavailable
from banger.images.blobcache import BlobCache, Meter, Partial

DATA = bytes(range(256)) * 4096
GIB = 1 << 30


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


DIGEST = digest_of(DATA)


def feed(data: bytes, calls: list[int] | None = None) -> Callable[[Partial], object]:
    async def fetch(partial: Partial) -> None:
        if calls is not None:
            calls.append(partial.size_bytes)
        while partial.size_bytes < len(data):
            await partial.append(data[partial.size_bytes : partial.size_bytes + 100_000])

    return fetch


async def never(partial: Partial) -> None:
    raise AssertionError("it is there")


@pytest.fixture
def cache(tmp_path: Path) -> BlobCache:
    return BlobCache(tmp_path / "blobs", GIB)


def partial_of(cache: BlobCache, digest: str = DIGEST) -> Path:
    path = cache.path(digest)
    return path.with_name(path.name + ".partial")


def leave_partial(cache: BlobCache, data: bytes, digest: str = DIGEST) -> Path:
    path = partial_of(cache, digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


async def put(cache: BlobCache, data: bytes, *, used: float | None = None) -> str:
    digest = digest_of(data)
    with cache.pinning() as pins:
        await pins.obtain(digest, len(data), feed(data))
    if used is not None:
        os.utime(cache.path(digest), (used, used))
    return digest


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("data", [DATA, b""])
async def test_blob_is_fetched_once_and_then_found(
    cache: BlobCache, data: bytes, algorithm: str
) -> None:
    digest = digest_of(data, algorithm)
    for fetch in (feed(data), never):
        told: list[int] = []
        with cache.pinning() as pins:
            blob = await pins.obtain(digest, len(data), fetch, Meter(told.append))
            assert blob == (cache.path(digest), 0, len(data))
            assert blob.path.read_bytes() == data
        assert sum(told) == len(data)
    assert [path.name for path in cache.path(digest).parent.iterdir()] == [digest.partition(":")[2]]


async def test_download_goes_on_where_it_ended(cache: BlobCache) -> None:
    leave_partial(cache, DATA[:300_000])
    calls: list[int] = []
    with cache.pinning() as pins:
        await pins.obtain(DIGEST, len(DATA), feed(DATA, calls))
    assert calls == [300_000]
    assert cache.path(DIGEST).read_bytes() == DATA


async def test_failure_keeps_what_came(cache: BlobCache) -> None:
    async def fail(partial: Partial) -> None:
        await partial.append(DATA[:1000])
        raise Unavailable("gone")

    with cache.pinning() as pins:
        with pytest.raises(Unavailable):
            await pins.obtain(DIGEST, len(DATA), fail)
        assert partial_of(cache).read_bytes() == DATA[:1000]
        assert await pins.find(DIGEST, len(DATA)) is None


async def test_failure_before_the_first_byte_leaves_nothing(cache: BlobCache) -> None:
    async def fail(partial: Partial) -> None:
        raise Unavailable("gone")

    with cache.pinning() as pins, pytest.raises(Unavailable):
        await pins.obtain(DIGEST, len(DATA), fail)
    assert list(cache.path(DIGEST).parent.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (DATA[:-1] + b"x", "what arrived is not"),
        (DATA + b"x", "longer than"),
        (DATA[:-1], "bytes, not"),
    ],
)
async def test_what_is_wrong_leaves_nothing(cache: BlobCache, data: bytes, words: str) -> None:
    with cache.pinning() as pins, pytest.raises(Corrupted, match=words):
        await pins.obtain(DIGEST, len(DATA), feed(data))
    assert list(cache.path(DIGEST).parent.iterdir()) == []


@pytest.mark.parametrize(
    ("left", "offsets"),
    [(b"garbage", [7, 0]), (bytes(len(DATA)), [0]), (bytes(len(DATA) + 1), [0]), (DATA, [])],
)
async def test_damaged_beginning_is_fetched_anew(
    cache: BlobCache, left: bytes, offsets: list[int]
) -> None:
    leave_partial(cache, left)
    calls: list[int] = []
    told: list[int] = []
    with cache.pinning() as pins:
        await pins.obtain(DIGEST, len(DATA), feed(DATA, calls), Meter(told.append))
    assert calls == offsets
    assert cache.path(DIGEST).read_bytes() == DATA
    assert sum(told) == len(DATA)


async def test_flipped_bit_on_disk_is_found_and_fetched_anew(cache: BlobCache) -> None:
    await put(cache, DATA)
    with open(cache.path(DIGEST), "r+b") as file:
        file.seek(1000)
        file.write(b"\xff")
    calls: list[int] = []
    with cache.pinning() as pins:
        await pins.obtain(DIGEST, len(DATA), feed(DATA, calls))
    assert calls == [0]
    assert cache.path(DIGEST).read_bytes() == DATA


async def test_flipped_bit_under_another_import_is_told_not_used(cache: BlobCache) -> None:
    with cache.pinning() as other:
        await other.obtain(DIGEST, len(DATA), feed(DATA))
        cache.path(DIGEST).write_bytes(b"x" * len(DATA))
        with cache.pinning() as pins, pytest.raises(Corrupted, match="damaged on disk"):
            await pins.find(DIGEST, len(DATA))


async def test_image_that_lies_about_a_size_is_told(cache: BlobCache) -> None:
    await put(cache, DATA)
    with cache.pinning() as pins, pytest.raises(Corrupted, match="the image says 5"):
        await pins.find(DIGEST, 5)
    assert cache.path(DIGEST).exists()


async def test_two_tasks_share_one_download(cache: BlobCache) -> None:
    calls: list[int] = []
    begun, go = asyncio.Event(), asyncio.Event()

    async def slow(partial: Partial) -> None:
        calls.append(partial.size_bytes)
        await partial.append(DATA[:1000])
        begun.set()
        await go.wait()
        await partial.append(DATA[1000:])

    told: list[int] = []
    with cache.pinning() as one, cache.pinning() as two:
        first = asyncio.create_task(one.obtain(DIGEST, len(DATA), slow))
        await begun.wait()
        second = asyncio.create_task(two.obtain(DIGEST, len(DATA), never, Meter(told.append)))
        while not told:  # the second sees how far the first is
            await asyncio.sleep(0.01)
        assert sum(told) == 1000
        go.set()
        assert await first == await second
    assert calls == [0]
    assert sum(told) == len(DATA)


async def test_second_goes_on_where_the_first_failed(cache: BlobCache) -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def fail(partial: Partial) -> None:
        await partial.append(DATA[:1000])
        begun.set()
        await go.wait()
        raise Unavailable("gone")

    calls: list[int] = []
    with cache.pinning() as one, cache.pinning() as two:
        first = asyncio.create_task(one.obtain(DIGEST, len(DATA), fail))
        await begun.wait()
        second = asyncio.create_task(two.obtain(DIGEST, len(DATA), feed(DATA, calls)))
        go.set()
        with pytest.raises(Unavailable):
            await first
        await second
    assert calls == [1000]


async def test_cancelled_download_is_kept_and_lets_go(cache: BlobCache) -> None:
    begun = asyncio.Event()

    async def hang(partial: Partial) -> None:
        await partial.append(DATA[:1000])
        begun.set()
        await asyncio.Event().wait()

    with cache.pinning() as pins:
        task = asyncio.create_task(pins.obtain(DIGEST, len(DATA), hang))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        calls: list[int] = []
        await pins.obtain(DIGEST, len(DATA), feed(DATA, calls))
    assert calls == [1000]


async def test_least_recently_used_goes_first_and_down_to_the_limit(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 2500)
    old, middle, new = [await put(cache, bytes([n]) * 1000, used=1000 + n) for n in (1, 2, 3)]
    with cache.pinning() as pins:
        await pins.find(old, 1000)  # used: no longer the oldest
    assert await cache.evict() == 1000
    assert [blob.digest for blob in await cache.list()] == [new, old]
    assert await cache.evict() == 0
    assert middle not in {blob.digest for blob in await cache.list()}


async def test_blob_in_use_is_not_evicted(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 0)
    with cache.pinning() as pins:
        await pins.obtain(DIGEST, len(DATA), feed(DATA))
        assert await cache.evict() == 0
        assert await cache.prune(all=True) == 0
        [blob] = await cache.list()
        assert (blob.digest, blob.size_bytes, blob.partial, blob.in_use) == (
            DIGEST, len(DATA), False, True,
        )  # fmt: skip
    [blob] = await cache.list()
    assert not blob.in_use
    assert await cache.evict() == len(DATA)
    assert await cache.list() == []


async def test_prune_takes_downloads_that_do_not_run_and_with_all_the_rest(
    cache: BlobCache,
) -> None:
    whole = await put(cache, b"whole")
    leave_partial(cache, b"partial")
    (cache.path(DIGEST).parent / "not-ours").write_text("x")
    assert await cache.evict() == 0  # not old enough
    assert await cache.prune() == len(b"partial")
    assert [blob.digest for blob in await cache.list()] == [whole]
    assert await cache.prune(all=True) == len(b"whole")
    assert [path.name for path in cache.path(DIGEST).parent.iterdir()] == ["not-ours"]


async def test_download_nobody_came_back_for_is_evicted(cache: BlobCache) -> None:
    path = leave_partial(cache, b"partial")
    os.utime(path, (1000, 1000))
    assert await cache.evict() == len(b"partial")
    assert not path.exists()


async def test_running_download_survives_a_prune(cache: BlobCache) -> None:
    async def pruned(partial: Partial) -> None:
        await partial.append(DATA[:1000])
        assert await cache.prune(all=True) == 0
        [blob] = await cache.list()
        assert (blob.partial, blob.in_use) == (True, True)
        await partial.append(DATA[1000:])

    with cache.pinning() as pins:
        await pins.obtain(DIGEST, len(DATA), pruned)


async def test_blob_larger_than_the_file_system_is_refused_at_once(cache: BlobCache) -> None:
    with cache.pinning() as pins, pytest.raises(NoSpace, match="to be downloaded"):
        await pins.obtain(DIGEST, 1 << 60, never)
    assert list(cache.path(DIGEST).parent.iterdir()) == []


@pytest.mark.parametrize(
    "digest", ["", "sha256:", "sha256:" + "g" * 64, "sha256:../" + "a" * 61, "md5:" + "a" * 32]
)
def test_path_of_no_digest_is_refused(cache: BlobCache, digest: str) -> None:
    with pytest.raises(InvalidInput, match="not a digest"):
        cache.path(digest)


async def test_link_planted_in_its_place_is_not_followed(cache: BlobCache, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    path = partial_of(cache)
    path.parent.mkdir(parents=True)
    path.symlink_to(target)
    with cache.pinning() as pins, pytest.raises(OSError, match="symbolic"):
        await pins.obtain(DIGEST, len(DATA), feed(DATA))
    assert target.read_bytes() == b"precious"


# -- several processes

_CHILD = """
import asyncio, sys
from pathlib import Path
from banger.images.blobcache import BlobCache
data = bytes(range(256)) * 4096
async def fetch(partial):
    print("fetch", partial.size_bytes, flush=True)
    while partial.size_bytes < len(data):
        await partial.append(data[partial.size_bytes:partial.size_bytes + 65536])
        if partial.size_bytes >= STOP:
            print("stopped", flush=True)
            sys.stdin.readline()
async def main():
    with BlobCache(Path(sys.argv[1]), 1 << 30).pinning() as pins:
        blob = await pins.obtain(sys.argv[2], len(data), fetch)
        print("done", flush=True)
        PIN
asyncio.run(main())
"""


def child(cache: BlobCache, *, stop: int = 1 << 40, pin: str = "") -> subprocess.Popen[str]:
    script = textwrap.dedent(_CHILD).replace("STOP", str(stop)).replace("PIN", pin or "pass")
    return subprocess.Popen(
        [sys.executable, "-c", script, str(cache.path(DIGEST).parents[1]), DIGEST],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], word: str) -> list[str]:
    seen = []
    for line in process.stdout or ():
        seen.append(line.strip())
        if line.startswith(word):
            return seen
    raise AssertionError(f"{word} never came: {seen}")


def end(process: subprocess.Popen[str], *, kill: bool = False) -> str:
    if kill:
        process.send_signal(signal.SIGKILL)
    out, _ = process.communicate("\n" * 100)
    return out


async def test_two_processes_share_one_download(cache: BlobCache) -> None:
    first = child(cache, stop=500_000)
    wait_for(first, "stopped")
    second = child(cache)
    ended = asyncio.create_task(asyncio.to_thread(end, first))
    said = await asyncio.to_thread(wait_for, second, "done")
    await ended
    end(second)
    assert said == ["done"]  # without a fetch of its own
    assert cache.path(DIGEST).read_bytes() == DATA


async def test_killed_download_is_gone_on_with(cache: BlobCache) -> None:
    first = child(cache, stop=500_000)
    wait_for(first, "stopped")
    second = child(cache)
    end(first, kill=True)
    said = await asyncio.to_thread(wait_for, second, "done")
    end(second)
    assert said == ["fetch 524288", "done"]
    assert cache.path(DIGEST).read_bytes() == DATA


async def test_pin_of_a_process_ends_with_it_however_it_ends(cache: BlobCache) -> None:
    process = child(cache, pin="sys.stdin.readline()")
    wait_for(process, "done")
    assert await cache.prune(all=True) == 0
    end(process, kill=True)
    assert await cache.prune(all=True) == len(DATA)


@pytest.mark.parametrize("step", ["fsync", "rename", "fsync_directory"])
async def test_kill_between_the_steps_of_a_commit_leaves_nothing_wrong(
    cache: BlobCache, step: str
) -> None:
    script = textwrap.dedent(_CHILD).replace("STOP", "1<<40").replace("PIN", "pass")
    die = "lambda *_: os.kill(os.getpid(), 9)"
    target = {
        "fsync": "os.fsync", "rename": "Path.rename", "fsync_directory": "b.fsync_directory",
    }[step]  # fmt: skip
    script = script.replace(
        "data =", f"import os; import banger.images.blobcache as b; {target} = {die}\ndata =", 1
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, str(cache.path(DIGEST).parents[1]), DIGEST],
        check=False, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    with cache.pinning() as pins:
        blob = await pins.obtain(DIGEST, len(DATA), never)  # all of it is there, and is checked
        assert blob.path.read_bytes() == DATA
    assert len(await cache.list()) == 1
