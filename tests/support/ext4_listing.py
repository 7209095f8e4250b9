"""An ext4 file read back through debugfs: the oracle of every test that makes one."""

from __future__ import annotations

import re
import stat
import subprocess
from pathlib import Path


def debugfs(image: Path, request: str) -> bytes:
    return subprocess.run(
        ["/usr/sbin/debugfs", "-R", request, image], capture_output=True, check=True
    ).stdout


def list_image(image: Path) -> dict[bytes, dict[str, object]]:
    """Read an image back: every path with the facts that must not depend on the strategy."""
    found: dict[bytes, dict[str, object]] = {}
    names: dict[int, set[bytes]] = {}

    def walk(inode: int, prefix: bytes) -> None:
        raw = debugfs(image, f"ls -p <{inode}>")
        # Owners from 2^31 on are shown as negative numbers.
        # /inode/mode/uid/gid/name/size/ and a newline, where a name may hold a newline too
        for row in re.finditer(rb"/(\d+)/(\d+)/(-?\d+)/(-?\d+)/([^/]+)/(\d*)/\n", raw):
            child, mode, name = int(row[1]), int(row[2], 8), row[5]
            if name in (b".", b"..", b"lost+found") or child == 0:
                continue
            path = prefix + b"/" + name
            facts: dict[str, object] = {
                "mode": mode,
                "uid": int(row[3]) % 2**32,
                "gid": int(row[4]) % 2**32,
            }
            text = debugfs(image, f"stat <{child}>").decode("latin-1")
            facts["mtime"] = re.search(r"mtime: 0x([0-9a-f]+)", text)[1]  # type: ignore[index]
            facts["links"] = re.search(r"Links: (\d+)", text)[1]  # type: ignore[index]
            # Of a tar, mke2fs takes security.capability and no other attribute.
            facts["capability"] = re.findall(r"^  (security\.capability .*)$", text, re.M)
            facts["names"] = names.setdefault(child, set())
            names[child].add(path)
            if stat.S_ISREG(mode):
                facts["data"] = debugfs(image, f"cat <{child}>")
            if stat.S_ISLNK(mode):
                fast = re.search(r'Fast link dest: "(.*)"', text)
                facts["target"] = fast[1] if fast else debugfs(image, f"cat <{child}>")
            if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                facts["device"] = re.search(r"number: (\S+)", text)[1]  # type: ignore[index]
            found[path] = facts
            if stat.S_ISDIR(mode):
                walk(child, path)

    walk(2, b"")
    return found
