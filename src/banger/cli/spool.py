"""Files that a command line writes for the daemon to read, and that outlive neither."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator

from banger.paths import Paths


@contextlib.contextmanager
def spooled(paths: Paths) -> Iterator[tuple[int, str]]:
    """Yield the descriptor and the path of a new file in the cache; it is gone afterwards.

    We hold its lock: what a killed command line left has none, and the next one removes it.
    """
    directory = os.path.join(paths.cache_dir, "incoming")
    os.makedirs(directory, mode=0o700, exist_ok=True)
    _sweep(directory)
    while True:
        fd, path = tempfile.mkstemp(suffix=".tar", dir=directory)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            break
        os.close(fd)  # swept by another between the two lines
    try:
        yield fd, path
    finally:
        os.unlink(path)
        os.close(fd)


def _sweep(directory: str) -> None:
    for entry in os.scandir(directory):
        fd = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(entry.path)
        except OSError:
            continue
        finally:
            os.close(fd)
