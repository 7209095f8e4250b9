"""Layers in, one tar out: the process that reads hostile archives.

`python -m banger.images.flatten TAR_FD` reads lines of JSON from stdin, in this order:

    {"limits": {...}, "stream": null | {"newest", "from_bytes"}}   once; `layers.Limits`
    {"layer": {"path", "offset", "size", "diff_id"}, "is_top"}      for each, from the bottom up
    (end of file)                                an empty diff_id is not checked

It indexes each layer as it comes, writes `{"summary": {...}}` to stdout, then the merged tar to
TAR_FD, and ends with `{"done": {...}}`. `{"progress": bytes}`, `{"warning": text}` and
`{"error": {"code", "message"}}` may come at any time. It is a process of its own so that
decoders and header parsers that go wrong take nothing with them but the import, its memory
is bounded and given back, and the daemon goes on answering.

An indexed layer is read twice, for the index and for the content: a later layer decides what an
earlier one contributes. With `stream`, a top layer of at least `from_bytes` is read once
(`images.top_layer`); `{"restart": true}` says that this one wants an index after all.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from banger.errors import BangerError
from banger.images.layer_tars import Layer, members_of
from banger.images.layers import Limits, Member, Tree
from banger.images.merged_tar import Plan, other_xattrs, plan_of, write_tar
from banger.images.top_layer import CannotStream, summary_of, unpacked_size, write_streamed

_MEMORY_CEILING_BYTES = 4 << 30
# What fits into an inode's spare room and one block; mke2fs -O ea_inode would allow more.
_MAX_XATTRS_BYTES = 3800
_PROGRESS_INTERVAL_S = 0.1
_READERS = 4


def main() -> int:
    """Serve one import; see the module's docstring."""
    # Memory, not address space alone, is what a hostile index would eat.
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_CEILING_BYTES, _MEMORY_CEILING_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A decoder's thread wants the interpreter for microseconds every 2 ms; at the default it waits
    # for 5 ms each time, and the index takes a third longer.
    sys.setswitchinterval(0.0001)
    try:
        _serve(int(sys.argv[1]), sys.stdin.buffer)
    except BangerError as error:
        _say({"error": {"code": error.code, "message": error.message, "hint": error.hint}})
        return 1
    except MemoryError:
        _say({"error": {"code": "invalid_input", "message": "the image needs too much memory"}})
        return 1
    except CannotStream:
        _say({"restart": True})
        return 1
    except BrokenPipeError:
        return 2  # mke2fs ended first and says why
    return 0


def _serve(tar_fd: int, lines: Iterable[bytes]) -> None:
    layers: list[Layer] = []
    limits = Limits()
    stream: dict[str, int] | None = None
    top_bytes = 0
    teller = _Teller()
    # Layers are read side by side and applied in order: the decoders need no lock.
    readers = ThreadPoolExecutor(max_workers=_READERS)
    reading: list[Future[list[Member]]] = []
    for line in lines:
        message = json.loads(line)
        if "limits" in message:
            limits = Limits(**message["limits"])
            stream = message["stream"]
            continue
        layer = Layer(**message["layer"])
        layers.append(layer)
        if message["is_top"] and stream is not None:
            top_bytes = unpacked_size(layer) or 0
            if top_bytes >= stream["from_bytes"]:
                break
        reading.append(readers.submit(_collect, layer, len(layers) - 1, limits, teller))
    else:
        stream = None
    tree = Tree(limits)
    for one in reading:
        tree.begin_layer()
        for member in one.result():
            tree.apply(member)
    summary = None if stream is None else summary_of(tree, top_bytes, stream["newest"])
    if stream is not None and summary is None:
        raise CannotStream
    told = _Teller()
    with os.fdopen(tar_fd, "wb", buffering=1 << 18) as out:
        if summary is not None:
            _say({"summary": summary})
            xattrs: list[dict[str, Any]] = []
            write_streamed(tree, layers, summary["newest"], out, lambda done: told.tell(0, done))
        else:
            plan = plan_of(tree)
            xattrs = _checked_xattrs(plan)
            said = {"data_bytes": plan.data_bytes, "inodes": plan.inodes, "newest": plan.newest}
            _say({"summary": said})
            write_tar(plan, tree, layers, out, lambda done: told.tell(0, done))
        with contextlib.suppress(BrokenPipeError):
            out.flush()
    _say({"done": {"entries": tree.entries, "xattrs": xattrs}})


def _collect(layer: Layer, number: int, limits: Limits, teller: _Teller) -> list[Member]:
    """Return a layer's members, no more of them than an image may have in all."""
    members: list[Member] = []
    for member in members_of(layer, number, limits, lambda done: teller.tell(number, done)):
        members.append(member)
        if len(members) > limits.max_entries:
            break  # applying them says so
    return members


def _checked_xattrs(plan: Plan) -> list[dict[str, Any]]:
    """Return what is left for debugfs: mark, real time and attributes (hex) of each inode."""
    found = []
    for node, mark in plan.marks.values():
        wanted = other_xattrs(node)
        if sum(len(name) + len(value) + 16 for name, value in wanted.items()) > _MAX_XATTRS_BYTES:
            _say({"warning": "extended attributes above 3800 bytes of one file are left out"})
            wanted = {}
        found.append(
            {
                "mark": mark,
                "mtime": node.mtime,
                "xattrs": {name: value.hex() for name, value in sorted(wanted.items())},
            }
        )
    return found


class _Teller:
    """Tells bytes done of all layers, at most ten times a second."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}
        self._told_at = 0.0

    def tell(self, part: int, done: int) -> None:
        self._done[part] = done
        now = time.monotonic()
        if now - self._told_at >= _PROGRESS_INTERVAL_S:
            self._told_at = now
            _say({"progress": sum(self._done.values())})


def _say(message: dict[str, Any]) -> None:
    # One write: two threads may tell at once.
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    # Not sys.exit: readers of other layers may still be at it, and nobody waits for them.
    _status = main()
    sys.stdout.flush()
    os._exit(_status)
