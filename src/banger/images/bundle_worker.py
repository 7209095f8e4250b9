"""The process that packs and unpacks bundles: `python -I -m banger.images.bundle_worker`.

One request as JSON on stdin, either of

    {"pack": {"rootfs", "output", "manifest": BundleManifest without extents}}
    {"unpack": {"location", "sha256" (may be null), "plain_http", "rootfs"}}

and lines of JSON on stdout: `{"progress": [done, total]}`, `{"stage": text}`, and at the end
`{"done": {"sha256", "packed_bytes", "manifest"}}` or `{"error": {"code", "message", "hint"}}`.

It is a process of its own so that the decoder of hostile bytes takes nothing with it when it
goes wrong, so that its memory is bounded, and so that a download ends when it is killed.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from banger.errors import BangerError, Corrupted, InvalidInput, NoSpace, Unavailable
from banger.host import download
from banger.host.files import no_space_named
from banger.images.bundle_format import (
    BundleManifest,
    PackedStream,
    find_extents,
    read_manifest,
    read_rootfs,
    write_bundle,
)

_MEMORY_CEILING_BYTES = 2 << 30  # of addresses, most of them never used
_PROGRESS_INTERVAL_S = 0.1


def main() -> int:
    """Serve the one request."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_CEILING_BYTES, _MEMORY_CEILING_BYTES))
    request = json.load(sys.stdin)
    try:
        done = _pack(request["pack"]) if "pack" in request else _unpack(request["unpack"])
    except BangerError as error:
        _say({"error": {"code": error.code, "message": error.message, "hint": error.hint}})
        return 1
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        _say({"error": {"code": Unavailable.code, "message": f"{named}{error.strerror}"}})
        return 1
    except MemoryError:
        _say(
            {"error": {"code": InvalidInput.code, "message": "the bundle asks for 2 GiB of memory"}}
        )
        return 1
    _say({"done": done})
    return 0


def _pack(request: dict[str, Any]) -> dict[str, Any]:
    output = Path(request["output"])
    with open(request["rootfs"], "rb", buffering=0) as rootfs, no_space_named(output.parent):
        size = os.fstat(rootfs.fileno()).st_size
        _say({"stage": "finding what is not empty"})
        said = {**request["manifest"], "size_bytes": size}
        manifest = msgspec.convert(
            {**said, "extents": find_extents(rootfs.fileno(), size)}, BundleManifest
        )
        _say({"stage": "packing"})
        with open(output, "xb") as file:
            sha256, count = write_bundle(manifest, rootfs, file, _Progress())
            file.flush()
            os.fsync(file.fileno())
    return {"sha256": sha256, "packed_bytes": count, "manifest": {}}


def _unpack(request: dict[str, Any]) -> dict[str, Any]:
    rootfs = Path(request["rootfs"])
    location = request["location"]
    with (
        download.opened(location, plain_http=request["plain_http"]) as found,
        open(rootfs, "xb", buffering=0) as output,
        no_space_named(rootfs.parent),
    ):
        stream = PackedStream(found.pieces)
        manifest = read_manifest(stream)
        _check_room(rootfs.parent, manifest.data_bytes)
        sha256 = read_rootfs(stream, manifest, output, _Progress())
        wanted = request["sha256"]
        if wanted is not None and sha256 != wanted:
            raise Corrupted(
                f"{download.shown(location)} is another bundle than the pinned one: its sha256 is "
                f"{sha256}, expected {wanted}",
                hint="whoever gave you the digest can tell which of the two is right",
            )
        os.fsync(output.fileno())
    plain = msgspec.to_builtins(manifest)
    del plain["extents"]
    return {"sha256": sha256, "packed_bytes": stream.packed_bytes, "manifest": plain}


def _check_room(directory: Path, needed_bytes: int) -> None:
    space = os.statvfs(directory)
    free = space.f_bavail * space.f_frsize
    if needed_bytes > free:
        raise NoSpace(
            f"the bundle unpacks to {needed_bytes >> 20} MiB, and the file system of "
            f"{directory} has {free >> 20} MiB free",
            hint="free some with `banger vm prune`, `banger image delete` or `df -h`",
        )


class _Progress:
    """Tells bytes, ten times a second."""

    def __init__(self) -> None:
        self._told_at = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._told_at >= _PROGRESS_INTERVAL_S or done == total:
            self._told_at = now
            _say({"progress": [done, total]})


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
