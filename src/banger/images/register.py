"""A root file system that somebody made elsewhere becomes an image: copied, or linked.

Owns the look at an ext4's superblock (ext4 documentation, "Super Block") and the order of a
registration. A linked file stays where it is, is never written to, and is trusted only as long
as it looks as it did (`artifacts.LinkedFile`).
"""

from __future__ import annotations

import asyncio
import os
import stat
import struct
from pathlib import Path

from banger.errors import Conflict, InvalidInput
from banger.events import EventSink
from banger.host.commands import HostCommands
from banger.host.files import copy_sparse
from banger.host.threads import run_uncut
from banger.images import artifacts
from banger.images.artifacts import ImageManifest
from banger.images.ext4 import check_ext4

ROOTFS = "rootfs.ext4"
_HEAD_BYTES = 0x10000 + 128  # as far as the other file systems' magic numbers lie
_SUPERBLOCK = 1024
_MAGIC = 0xEF53
_CLEAN, _WITH_ERRORS = 0x1, 0x2
_RECOVER, _JOURNAL_DEVICE = 0x4, 0x8
_ORPHANS_PRESENT = 0x10000  # of the read-only features
# What ext4 of Linux 6.1 and newer mounts read-only whatever its configuration: filetype, meta_bg,
# extents, 64bit, mmp, flex_bg, ea_inode, metadata_csum_seed, large_dir, inline_data. Left out:
# encrypt (a choice of the kernel's configuration) and casefold (no layer of an overlay).
_MOUNTABLE = 0x2 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000
_INCOMPATIBLE_NAMES = {
    0x1: "compression",
    0x1000: "dirdata",
    0x10000: "encrypt",
    0x20000: "casefold",
}
_MAX_BLOCK_BYTES = 4096  # a page: what an x86-64 kernel mounts
_OTHERS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"XFSB", "an XFS file system"),
    (0, b"hsqs", "a squashfs"),
    (0x10040, b"_BHRfS_M", "a btrfs file system"),
    (0, b"QFI\xfb", "a qcow2 image; `qemu-img convert -O raw` makes a plain one"),
    (0, b"\x1f\x8b", "packed with gzip; unpack it first"),
    (
        0,
        b"\x28\xb5\x2f\xfd",
        "packed with zstd; a bundle goes into `banger image pull bundle:FILE`",
    ),
    (0, b"\xfd7zXZ", "packed with xz; unpack it first"),
    (257, b"ustar", "a tar; `banger image pull rootfs:FILE` takes it"),
    (0x1FE, b"\x55\xaa", "a disk with partitions; a single ext4 is what is needed"),
)


async def register_image(
    name: str,
    rootfs: Path,
    *,
    data_dir: Path,
    commands: HostCommands,
    sink: EventSink,
    link: bool = False,
    kernel: str = "",
    description: str = "",
    force: bool = False,
) -> ImageManifest:
    """Make an image of an ext4 in a file; root is not needed.

    With `link` the file is not copied: it must stay as it is as long as the image is used.

    Raises Conflict when the name is taken and `force` is not given, InvalidInput for a file that
    is no ext4 a guest can mount read-only, Corrupted for one that e2fsck finds damaged.
    """
    if not force and artifacts.artifact_directory(data_dir, "image", name).exists():
        raise Conflict(
            f"image {name} is installed already",
            hint="--force replaces it, --name gives this one another name",
        )
    if not rootfs.is_absolute():
        raise InvalidInput(f"{rootfs} is not an absolute path")
    source = await asyncio.to_thread(_resolved, rootfs)
    await asyncio.to_thread(check_superblock, source)
    async with artifacts.staging(data_dir, "image", name) as staged:
        out = staged / "artifact"
        out.mkdir(mode=0o700)
        if link:
            before = artifacts.linked_file(source)
            checked = source
            if not os.stat(source).st_mode & stat.S_IROTH:
                sink.warning(
                    f"{source} is readable by its owner only: VMs in Firecracker's jailer, which "
                    "have uids of their own, will not start from it"
                )
        else:
            sink.stage(f"copying {source}")
            before = None
            checked = out / ROOTFS
            await run_uncut(copy_sparse, source, checked)
            # Again, and of what counts: the first may have been changed while it was copied.
            await asyncio.to_thread(check_superblock, checked)
        sink.stage("checking the file system")
        await check_ext4(checked, commands=commands)
        sink.stage("computing the digest")
        digest = await artifacts.digest_file(checked)
        if before is not None and artifacts.linked_file(source) != before:
            raise Conflict(f"{source} was changed while it was read: something writes to it")
        if not link:
            checked.chmod(0o444)
        files, allocated = artifacts.measure(out)
        manifest = ImageManifest(
            name=name,
            digest=digest,
            size_bytes=checked.stat().st_size,
            allocated_bytes=allocated,
            origin=f"{'linked' if link else 'file'}:{source}",
            description=description or f"{'linked to' if link else 'made of'} {source.name}",
            created_at=artifacts.now_rfc3339(),
            files=files,
            kernel=kernel,
            linked=before,
        )
        await asyncio.to_thread(artifacts.install, out, data_dir, "image", manifest, force=force)
    return manifest


def check_superblock(path: Path) -> None:
    """Raise InvalidInput unless a file begins as a clean ext4 that a guest can mount read-only."""
    try:
        # O_NONBLOCK: the open of a FIFO would wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise InvalidInput(f"{path} is not a regular file")
        head = os.pread(fd, _HEAD_BYTES, 0)
    finally:
        os.close(fd)
    _check_head(head, found.st_size, path)


def _check_head(head: bytes, size_bytes: int, path: Path) -> None:
    super_block = head[_SUPERBLOCK : _SUPERBLOCK + 1024]
    if len(super_block) < 1024 or struct.unpack_from("<H", super_block, 0x38)[0] != _MAGIC:
        kind = next((what for at, magic, what in _OTHERS if head[at:].startswith(magic)), "")
        raise InvalidInput(f"{path} is no ext4 file system" + (f" but {kind}" if kind else ""))
    blocks_low, log_block, state = (
        struct.unpack_from(form, super_block, at)[0]
        for form, at in (("<I", 0x4), ("<I", 0x18), ("<H", 0x3A))
    )
    incompatible, read_only = struct.unpack_from("<II", super_block, 0x60)
    (blocks_high,) = struct.unpack_from("<I", super_block, 0x150)
    if incompatible & _JOURNAL_DEVICE:
        raise InvalidInput(f"{path} is the journal of another file system")
    if incompatible & _RECOVER or read_only & _ORPHANS_PRESENT:
        raise InvalidInput(
            f"{path} has a journal to be replayed: it is mounted, or was not unmounted",
            hint=f"unmount it, or work on a copy with `e2fsck -p {path}`",
        )
    if not state & _CLEAN or state & _WITH_ERRORS:
        raise InvalidInput(
            f"{path} is not clean: it is mounted, or has errors on record",
            hint=f"unmount it, or work on a copy with `e2fsck -f {path}`",
        )
    beyond = incompatible & ~_MOUNTABLE
    if beyond:
        bits = [1 << bit for bit in range(32) if beyond >> bit & 1]
        names = ", ".join(_INCOMPATIBLE_NAMES.get(bit, f"{bit:#x}") for bit in bits)
        raise InvalidInput(f"{path} has features that no guest is sure to mount: {names}")
    block_bytes = 1024 << log_block if log_block < 16 else 0
    if not 1024 <= block_bytes <= _MAX_BLOCK_BYTES:
        raise InvalidInput(f"{path} has blocks that are not of 1 to 4 KiB")
    blocks = blocks_low | (blocks_high << 32 if incompatible & 0x80 else 0)
    if blocks * block_bytes > size_bytes:
        raise InvalidInput(
            f"{path} is cut off: its file system has {blocks * block_bytes} bytes, "
            f"the file {size_bytes}"
        )


def _resolved(path: Path) -> Path:
    try:
        return Path(os.path.realpath(path, strict=True))
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error
