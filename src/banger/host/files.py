"""Files that are whole or absent, and copies that stay sparse.

Owns atomic writes (write beside, fsync, rename), durable directory commits, sparse and
reflink copies, and the mapping of ENOSPC to a designed error.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from banger.errors import NoSpace

_FICLONE = 0x40049409  # linux/fs.h
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h
_LIBC = ctypes.CDLL(None, use_errno=True)


def fsync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace `path` by `data`: a reader sees the old file or the new one, never a part."""
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with no_space_named(path.parent):
            fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, path)
            fsync_directory(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            staged.unlink()
        raise


def make_private_directory(path: Path) -> Path:
    """Make `path` and its missing parents with mode 0700 and return it."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def copy_sparse(source: Path, destination: Path, *, mode: int = 0o600) -> None:
    """Copy a file by reflink where the file system can, else only its data extents.

    The destination must not exist. Holes stay holes, so a 20 GiB disk with 1 MiB of
    metadata costs 1 MiB.
    """
    with no_space_named(destination.parent), open(source, "rb") as src:
        fd = os.open(destination, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as dst:
            with contextlib.suppress(OSError):
                fcntl.ioctl(dst.fileno(), _FICLONE, src.fileno())
                return
            size = os.fstat(src.fileno()).st_size
            os.ftruncate(dst.fileno(), size)
            for start, end in data_extents(src.fileno(), size):
                offset = start
                while offset < end:
                    count = os.copy_file_range(
                        src.fileno(), dst.fileno(), end - offset, offset, offset
                    )
                    if count == 0:
                        break
                    offset += count


def exchange(one: Path, other: Path) -> None:
    """Let two paths of one file system change places in one step (renameat2(2))."""
    done = _LIBC.renameat2(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE
    )
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


def begin_writeback(path: Path) -> None:
    """Have the kernel begin to write a file's dirty pages to disk; waits for none of them.

    sync_file_range(2): what another process writes reaches the disk meanwhile, not at its end.
    """
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            # Where a file system has none of it, the pages are written later.
            _LIBC.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)
        finally:
            os.close(fd)


def data_extents(fd: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the [start, end) ranges of a file that hold data, in order."""
    offset = 0
    while offset < size_bytes:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        offset = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, offset


def allocated_bytes(path: Path) -> int:
    """Return the bytes a file or a directory tree occupies on disk (holes not counted)."""
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_blocks * 512
    total = 0
    for root, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(root, name)).st_blocks * 512
    return total


def last_lines(path: Path, *, count: int = 3) -> str:
    """Return the last lines of a log in one line, for an error message."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 8192))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    # A guest writes what it likes to its console: nothing of it may steer a terminal.
    shown = ["".join(c if c.isprintable() else " " for c in line).strip() for line in lines]
    kept = [line for line in shown if line][-count:]
    return " / ".join(kept) if kept else "it said nothing"


def trim_log(path: Path, limit_bytes: int, kept_bytes: int) -> None:
    """Cut a log that grew over `limit_bytes` to its last `kept_bytes`.

    Its writer has it open with O_APPEND, so it goes on at the new end; what it writes while
    the file is cut may be lost, which a console log can bear.
    """
    try:
        with open(path, "r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size <= limit_bytes:
                return
            file.seek(size - kept_bytes)
            tail = file.read(kept_bytes)
            file.truncate(0)
    except FileNotFoundError:
        return
    with open(path, "ab") as file:
        file.write(b"[earlier lines were cut]\n" + tail)


def remove_tree(path: Path) -> None:
    """Remove a file or a tree; absent is fine."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def no_space_named(directory: Path) -> Iterator[None]:
    """Turn ENOSPC and EDQUOT into NoSpace that names the directory and what frees room."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(
                f"no space left on the file system of {directory}",
                hint="free some with `banger vm prune`, `banger image delete` or `df -h`",
            ) from error
        raise
