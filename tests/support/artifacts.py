"""Real images and kernels for the tests, made once by the product itself.

They live under ~/.cache/banger-ci (or BANGER_CI_CACHE), keyed by the content of all that
makes them, and are read back through the product's own checks, so a damaged cache is noticed.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import time
from pathlib import Path

import banger
from banger.errors import Corrupted
from banger.events import NullSink
from banger.host.commands import HostCommands
from banger.host.locks import locked

_PACKAGE = Path(banger.__file__).parent
# What decides the bytes of an artifact: its recipe and its makers.
_MAKERS = ("catalog", "images", "kernels")
# A store of another day's recipe is a gigabyte nobody reads any more.
_KEPT_S = 2 * 86400.0


def cache_root() -> Path:
    """Return the directory of what is expensive to make."""
    default = Path(os.environ.get("HOME", "/root")) / ".cache" / "banger-ci"
    return Path(os.environ.get("BANGER_CI_CACHE", default))


def artifact_store() -> Path:
    """Return a data directory whose images/ and kernels/ tests may link to, never change."""
    digest = hashlib.sha256()
    for maker in _MAKERS:
        for path in sorted((_PACKAGE / maker).rglob("*")):
            if path.suffix in (".py", ".toml"):
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    root = cache_root() / f"artifacts-{digest.hexdigest()[:16]}"
    root.mkdir(parents=True, exist_ok=True)
    os.utime(root)
    for other in cache_root().glob("artifacts-*"):
        if other.stat().st_mtime < time.time() - _KEPT_S:
            shutil.rmtree(other, ignore_errors=True)
    return root


def need_kernel(name: str = "generic-6.12") -> Path:
    """Return the directory of an installed kernel, pulling it when absent."""
    from banger.services.artifact_sources import KernelSource

    return _need(KernelSource(artifact_store(), cache_root() / "cache", HostCommands(), None), name)


def need_image(name: str) -> Path:
    """Return the directory of an installed image, pulling it when absent."""
    from banger.services.artifact_sources import ImageSource

    return _need(ImageSource(artifact_store(), cache_root() / "cache", HostCommands(), None), name)


def _need(source, name: str) -> Path:  # type: ignore[no-untyped-def]
    with locked(artifact_store() / f".{source.kind}-{name}.lock"):
        sound = name in source.installed()
        if sound:
            try:
                source.wire(name)
            except Corrupted:
                source.delete(name)
                sound = False
        if not sound:
            asyncio.run(source.pull(name, NullSink(), force=False))
    return artifact_store() / f"{source.kind}s" / name
