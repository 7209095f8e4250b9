"""The smallest image a VM boots from: static busybox, no init, the agent stays PID 1.

It boots in a few seconds of emulation, so the VMM contract can afford real boots.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

_APPLETS = ("sh", "cat", "echo", "true", "false", "sleep", "ls", "mount", "ps", "kill", "env")
_PASSWD = b"root:x:0:0:root:/root:/bin/sh\n"


def make_tiny_image(directory: Path) -> Path:
    """Make `directory`/rootfs.ext4 and return it; needs busybox-static and a tar-reading mke2fs."""
    directory.mkdir(parents=True, exist_ok=True)
    rootfs = directory / "rootfs.ext4"
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", "-", str(rootfs), "16m"],
        input=_tar(),
        check=True,
        capture_output=True,
    )
    return rootfs


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("bin", "etc", "root", "proc", "sys", "dev", "run", "tmp", "var", "var/lib"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        busybox = Path("/bin/busybox").read_bytes()
        for name, data, mode in (
            ("bin/busybox", busybox, 0o755),
            ("etc/passwd", _PASSWD, 0o644),
            ("etc/group", b"root:x:0:\n", 0o644),
        ):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), mode
            tar.addfile(entry, io.BytesIO(data))
        for applet in _APPLETS:
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(entry)
    return out.getvalue()
