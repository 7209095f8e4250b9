"""Ext4 file systems in files: made from a tar stream or empty, and checked. Nothing is mounted.

Owns the two strategies that turn a tar into an ext4 (`tar`: mke2fs reads it; `stage`: for an
e2fsprogs without tar input, see `images.staged`), the empty disk of a VM, and the check
that ends every build. Leaves what is in the tar to its maker.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import secrets
import tarfile
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import IO, Literal

from banger.errors import CommandFailed, Corrupted, InvalidInput, NoSpace
from banger.events import EventSink, NullSink
from banger.host.commands import HostCommands
from banger.host.files import (
    allocated_bytes,
    begin_writeback,
    copy_sparse,
    make_private_directory,
    no_space_named,
)
from banger.host.locks import locked
from banger.host.threads import run_uncut

Strategy = Literal["tar", "stage"]

# Every time stamp mke2fs would take from the clock, and the limit mmdebstrap clamps to, so
# that the same packages give the same bytes. 2023-06-10: the day Debian 12 came out.
SOURCE_DATE_EPOCH = 1686355200
REPRODUCIBLE = {
    "SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH),
    "E2FSPROGS_FAKE_TIME": str(SOURCE_DATE_EPOCH),  # e2fsprogs before 1.47.1
}
_UUID_SPACE = uuid.UUID("6f0c0b2e-4d6e-5b0a-9a43-62616e676572")
_BLOCK_BYTES = 4096
_BYTES_PER_INODE = 16384
_INODE_BYTES = 256
_MIN_SIZE_BYTES = 4 * 1024 * 1024
_MKE2FS_TIMEOUT_S = 900
_GROWTH_INTERVAL_S = 0.1  # of an operation's events ten a second are kept
_GROWTH_FLOOR_BYTES = 1024 * 1024
_PROBED: dict[str, Strategy] = {}
# Bumped when the options of `make_disk` change, so that old templates are not used.
_DISK_TEMPLATE_VERSION = 2


async def probe_strategy(commands: HostCommands) -> Strategy:
    """Return `tar` when the installed mke2fs takes a tar on stdin, else `stage`.

    The answer comes from feeding it one, for a version number does not tell whether it was
    built with libarchive; it is remembered per program path.
    """
    program = commands.need("mke2fs")
    if program not in _PROBED:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("probe"), io.BytesIO(b""))
        with tempfile.TemporaryDirectory(prefix="banger-probe-") as directory:
            image = os.path.join(directory, "probe.ext4")
            done = await commands.run(
                ["mke2fs", "-q", "-F", "-t", "ext4", "-d", "-", image, "1M"],
                stdin=buffer.getvalue(),
                cwd=directory,
                timeout_s=30,
                check=False,
            )
            listed = b""
            if done.exit_status == 0:
                listed = (await commands.run(["debugfs", "-R", "ls -p /", image])).stdout
        _PROBED[program] = "tar" if b"/probe/" in listed else "stage"
    return _PROBED[program]


def _reproducible(newest: int) -> dict[str, str]:
    return dict.fromkeys(REPRODUCIBLE, str(newest))


def volume_uuid(label: str) -> str:
    """Return the UUID of the file system with this label: the same on every host."""
    return str(uuid.uuid5(_UUID_SPACE, label))


async def build_ext4(
    source: Path | int,
    output: Path,
    *,
    size_bytes: int | None = None,
    inodes: int | None = None,
    label: str,
    commands: HostCommands,
    sink: EventSink | None = None,
    strategy: Strategy | None = None,
    work: Path | None = None,
    newest: int = SOURCE_DATE_EPOCH,
    check: bool = True,
) -> None:
    """Make a read-only-use ext4 (no journal) at `output` out of a tar, and check it.

    `source` is a tar file or the read end of a pipe; a pipe needs `size_bytes`, which is a
    limit rather than a cost, since the file is sparse. A tar that does not fit raises
    NoSpace. `inodes` is how many are needed, if that is known (default: one for 16 KiB). `newest`
    is the latest time in it: mke2fs takes later ones for that, and its own time stamps too. `work`
    holds what the `stage` strategy stages (default: beside the output). Without `check` the
    caller still changes it and checks it then.

    Where the strategies differ: of extended attributes `tar` keeps security.capability only
    (mke2fs 1.47.2), `stage` all; and each takes another member's word for the attributes of
    hard-linked files, so every member of such a file must repeat them, as tar writers do.
    """
    sink = sink or NullSink()
    strategy = strategy or await probe_strategy(commands)
    if size_bytes is None:
        if isinstance(source, int):
            raise TypeError("a pipe needs size_bytes")
        size_bytes = await asyncio.to_thread(estimate_size_bytes, source)
    size_bytes = max(_MIN_SIZE_BYTES, -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES)
    options = _base_options(label, inodes_for(size_bytes, inodes or 0))
    if strategy == "tar":
        with _opened(source) as stdin:
            await _mke2fs(
                [*options, "-d", "-", str(output), f"{size_bytes // 1024}k"],
                commands,
                output=output,
                stdin=stdin,
                env=_reproducible(newest),
                sink=sink,
            )
    else:
        from banger.images import staged  # only where e2fsprogs is old

        with (
            tempfile.TemporaryDirectory(prefix="staged-", dir=work or output.parent) as directory,
            _opened(source) as stdin,
        ):
            tree = await run_uncut(staged.stage_tar, stdin, Path(directory))
            sink.stage("writing the file system")
            await _mke2fs(
                [*options, "-d", str(tree.root), str(output), f"{size_bytes // 1024}k"],
                commands,
                output=output,
                sink=sink,
                # The other variable would clamp the times that are numbers there.
                env={"E2FSPROGS_FAKE_TIME": str(newest)},
            )
            await staged.apply_attributes(tree, output, commands=commands)
    if check:
        await check_ext4(output, commands=commands)


async def check_ext4(path: Path, *, commands: HostCommands) -> None:
    """Check a file system without changing it; raise Corrupted with what e2fsck found."""
    done = await commands.run(
        ["e2fsck", "-fn", str(path)], check=False, timeout_s=_MKE2FS_TIMEOUT_S, env=REPRODUCIBLE
    )
    if done.exit_status != 0:
        lines = done.stdout.decode(errors="replace").strip().splitlines()
        found = next((line for line in lines if not line.startswith("Pass ")), "no reason given")
        raise Corrupted(f"the file system {path.name} does not pass e2fsck: {found.strip()}")


async def make_disk(
    path: Path, size_bytes: int, *, cache_dir: Path, commands: HostCommands
) -> None:
    """Make the empty ext4 disk of a VM: sparse, with a journal, in milliseconds.

    It is a sparse copy (or reflink) of a template that is made once per size under a lock.
    """
    template = disk_template(cache_dir, size_bytes)
    if not template.exists():
        await _make_disk_template(template, size_bytes, commands)
    await asyncio.to_thread(copy_sparse, template, path)


def disk_template(cache_dir: Path, size_bytes: int) -> Path:
    """Return where the template of a disk of this size is kept."""
    return cache_dir / "disks" / f"v{_DISK_TEMPLATE_VERSION}-{size_bytes}.ext4"


async def _make_disk_template(template: Path, size_bytes: int, commands: HostCommands) -> None:
    make_private_directory(template.parent)
    lock = contextlib.ExitStack()
    await asyncio.to_thread(lock.enter_context, locked(template.parent / ".lock"))
    with lock:
        if template.exists():
            return
        staged = template.with_name(f".{template.name}.{secrets.token_hex(4)}")
        try:
            await _mke2fs(
                [
                    "-q", "-F", "-t", "ext4", "-b", str(_BLOCK_BYTES), "-m", "0",
                    "-L", "banger-own",
                    # A disk grows with resize2fs while it is not in use: no reserved blocks.
                    # An orphan file is 2 MiB written at once, for a gain no VM of ours sees.
                    "-O", "^resize_inode,^orphan_file",
                    "-J", "size=16",
                    # The tables are holes, so zero already. Saying so spares the guest from
                    # writing hundreds of MiB of zeros in the background after it mounts.
                    "-E", "assume_storage_prezeroed=1,nodiscard",
                    str(staged), f"{size_bytes // 1024}k",
                ],
                commands,
                output=staged,
            )  # fmt: skip
            await check_ext4(staged, commands=commands)
            with open(staged, "rb") as file:
                os.fsync(file.fileno())
            os.rename(staged, template)
        finally:
            staged.unlink(missing_ok=True)


def estimate_size_bytes(tar: Path) -> int:
    """Return a size that holds a tar's content, its inodes and directories, and some slack."""
    data = inodes = 0
    with tarfile.open(tar, mode="r:", errors="surrogateescape") as archive:
        for member in archive:
            inodes += 1
            data += -(-member.size // _BLOCK_BYTES) * _BLOCK_BYTES if member.isreg() else 0
            data += _BLOCK_BYTES if member.isdir() or len(member.linkname) >= 60 else 0
            archive.members = []  # type: ignore[attr-defined]  # a list of 100,000 is memory
    return size_for(data, inodes)


def size_for(data_bytes: int, inodes: int) -> int:
    """Return the size of a file system for this much content, in blocks, and this many inodes."""
    content = data_bytes + inodes_for(data_bytes, inodes) * _INODE_BYTES
    # Maps of extents, group descriptors, bitmaps, rounding: a sparse file pays for none unused.
    return content + content // 16 + 8 * 1024 * 1024


def inodes_for(size_bytes: int, wanted: int) -> int:
    """Return how many inodes a file system gets: one for 16 KiB, or what is wanted and slack."""
    return max(size_bytes // _BYTES_PER_INODE, wanted + wanted // 16 + 1024)


def _base_options(label: str, inodes: int) -> list[str]:
    identity = volume_uuid(label)
    return [
        "-q", "-F", "-t", "ext4", "-b", str(_BLOCK_BYTES), "-m", "0",
        "-L", label[:16],
        "-U", identity,
        "-N", str(inodes),
        "-I", str(_INODE_BYTES),
        # Never written to: no journal, no room to grow, nothing to initialise later. Its digest
        # stands for the whole, so no checksum in every piece of metadata either: mke2fs computes
        # them anew for each block it adds, a third of its time.
        "-O", "^has_journal,^resize_inode,^orphan_file,^metadata_csum",
        "-E", f"hash_seed={identity},assume_storage_prezeroed=1,nodiscard,root_owner=0:0",
    ]  # fmt: skip


async def _mke2fs(
    arguments: list[str],
    commands: HostCommands,
    *,
    output: Path,
    stdin: IO[bytes] | None = None,
    env: dict[str, str] | None = None,
    sink: EventSink | None = None,
) -> None:
    with no_space_named(output.parent):
        fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.close(fd)
    try:
        async with _growth_told(output, sink or NullSink()):
            await commands.run(
                ["mke2fs", *arguments], stdin=stdin, env=env, timeout_s=_MKE2FS_TIMEOUT_S
            )
    except CommandFailed as error:
        output.unlink(missing_ok=True)
        said = error.stderr_tail
        if "No space left on device" in said or "Disk quota exceeded" in said:
            raise NoSpace(
                f"no space left on the file system of {output.parent}",
                hint="free some with `banger vm prune`, `banger image delete` or `df -h`",
            ) from error
        if "Could not allocate" in said:
            raise NoSpace(f"the content does not fit into the file system {output.name}") from error
        if "invalid" in said.lower() and "tar" in said.lower():
            raise InvalidInput(f"{output.name}: the tar does not read: {error}") from error
        raise
    except BaseException:
        output.unlink(missing_ok=True)
        raise


@contextlib.asynccontextmanager
async def _growth_told(path: Path, sink: EventSink) -> AsyncIterator[None]:
    """Report what a file occupies while something else writes it, and have it go to the disk."""

    async def tell() -> None:
        begun = allocated_bytes(path)
        while True:
            await asyncio.sleep(_GROWTH_INTERVAL_S)
            await asyncio.to_thread(begin_writeback, path)
            # Inode tables come first, then nothing until the tar begins to flow.
            if (now := allocated_bytes(path)) > begun + _GROWTH_FLOOR_BYTES:
                sink.progress(now)

    teller = asyncio.create_task(tell())
    try:
        yield
    finally:
        teller.cancel()
        await asyncio.gather(teller, return_exceptions=True)


@contextlib.contextmanager
def _opened(source: Path | int) -> Iterator[IO[bytes]]:
    with open(source, "rb", closefd=not isinstance(source, int), buffering=0) as file:
        yield file
