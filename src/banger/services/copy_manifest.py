"""The manifest: what was sent to a copy, as the copy keeps it at `.git/banger/`.

Owns its form and that of `begun` (what a run is about to write). Both are the guest's to forge:
they are bounded, and no path of them is used before `check_path` has seen it.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from banger.services.workspaces import Entry

MANIFEST_PATH = b".git/banger/manifest"
BEGUN_PATH = b".git/banger/begun"
MAX_SHALLOW = 1000  # commits that a shallow copy is known to have
_VERSION = 1
_MAX_MANIFEST_BYTES = 256 << 20
_MAX_FIELDS = 4_000_000
_MAX_PATH_BYTES = 4096
_ID = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?\Z")
_TOKEN = re.compile(r"[0-9a-f]{32}\Z")
_HASH = re.compile(r"[0-9a-f]{64}\Z")
_ROW = re.compile(rb"([fld]) ([0-7]{1,4}) (\d{1,19}) (-?\d{1,20}) (.{0,4096})\Z", re.DOTALL)


class Manifest(NamedTuple):
    """What was sent. `staged` and `heads` are by the path of each repository in the copy.

    Rows are entries as `render_row` writes them: ten thousand are compared, few are parsed.
    Paths are checked when they are used (`check_path`).
    """

    name: str
    shallow: bool
    untracked: bool
    rows: dict[bytes, bytes]
    objects: set[bytes]
    staged: dict[bytes, str]
    heads: dict[bytes, tuple[str, ...]]


def render_row(entry: Entry) -> bytes:
    """Return an entry as the manifest has it."""
    kind, mode, size, mtime_ns, extra = entry
    return b"%b %o %d %d %b" % (kind.encode(), mode, size, mtime_ns, extra)


def parse_row(row: bytes) -> Entry:
    """Parse a row; raise ValueError for one that we would not have written."""
    match = _ROW.match(row)
    if match is None:
        raise ValueError("row")
    kind, mode, size, mtime_ns, extra = match.groups()
    return Entry(kind.decode(), int(mode, 8), int(size), int(mtime_ns), extra)


def check_path(path: bytes) -> bytes:
    """Return a path of the manifest that is used; raise ValueError unless it is below the copy."""
    parts = path.split(b"/")
    if not 0 < len(path) <= _MAX_PATH_BYTES or path.startswith(b".git/banger/"):
        raise ValueError("path")
    if any(part in (b"", b".", b"..") for part in parts):
        raise ValueError("path")
    return path


def _pack(header: dict[str, object], fields: Iterable[bytes]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    return zlib.compress(b"\0".join([text, *fields]), 1)


def _fields(rows: Mapping[bytes, bytes]) -> Iterator[bytes]:
    for path, row in rows.items():
        yield path
        yield row


def render_begun(token: str, intent: Mapping[bytes, bytes]) -> bytes:
    """Return what a run is about to write as its file's bytes."""
    header = {"version": _VERSION, "token": token, "rows": len(intent)}
    return _pack(header, _fields(intent))


def render_manifest(manifest: Manifest, token: str) -> bytes:
    """Return a manifest as its file's bytes: a line of JSON, then fields, all split by NUL."""
    header = {
        "version": _VERSION,
        "token": token,
        "name": manifest.name,
        "shallow": manifest.shallow,
        "untracked": manifest.untracked,
        "staged": {os.fsdecode(path): one for path, one in manifest.staged.items()},
        "heads": {os.fsdecode(path): list(ids) for path, ids in manifest.heads.items()},
        "rows": len(manifest.rows),
    }
    return _pack(header, [*_fields(manifest.rows), *sorted(manifest.objects)])


def parse_manifest(data: bytes) -> tuple[Manifest, str]:
    """Parse a manifest's file; raise ValueError for anything that we would not have written."""
    body, rows, objects = _unpack(data)
    name, shallow, untracked = body.get("name"), body.get("shallow"), body.get("untracked")
    staged, heads = body.get("staged"), body.get("heads")
    if not isinstance(name, str) or not isinstance(shallow, bool) or len(name) > 200:
        raise ValueError("name or mode")
    if not isinstance(untracked, bool) or not isinstance(staged, dict):
        raise ValueError("untracked or staged")
    if not isinstance(heads, dict) or not all(isinstance(ids, list) for ids in heads.values()):
        raise ValueError("heads")
    if any(len(ids) > MAX_SHALLOW for ids in heads.values()):
        raise ValueError("too many heads")
    return Manifest(
        name, shallow, untracked, rows, set(objects),
        {_parse_place(path): _matching(_HASH, one) for path, one in staged.items()},
        {_parse_place(p): tuple(_matching(_ID, one) for one in ids) for p, ids in heads.items()},
    ), _matching(_TOKEN, body.get("token"))  # fmt: skip


def parse_begun(data: bytes) -> tuple[dict[bytes, Entry], str]:
    """Parse what a run was about to write, and its token; raise ValueError."""
    body, rows, _ = _unpack(data)
    entries = {path: parse_row(row) for path, row in rows.items()}
    return entries, _matching(_TOKEN, body.get("token"))


def _unpack(data: bytes) -> tuple[dict[str, Any], dict[bytes, bytes], list[bytes]]:
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(data, _MAX_MANIFEST_BYTES)
        if not unpacker.eof:
            raise ValueError("too long, or cut off")
        header, *fields = text.split(b"\0")
        body = json.loads(header)
    except (zlib.error, RecursionError, MemoryError) as error:
        raise ValueError("no JSON") from error
    if not isinstance(body, dict) or body.get("version") != _VERSION:
        raise ValueError("version")
    count = body.get("rows")
    if type(count) is not int or not 0 <= 2 * count <= len(fields) <= _MAX_FIELDS:
        raise ValueError("rows")
    rows = dict(zip(fields[: 2 * count : 2], fields[1 : 2 * count : 2], strict=True))
    return body, rows, fields[2 * count :]


def _parse_place(text: object) -> bytes:
    if not isinstance(text, str):
        raise ValueError("place")
    return b"" if text == "" else check_path(os.fsencode(text))


def _matching(pattern: re.Pattern[str], text: object) -> str:
    if not isinstance(text, str) or not pattern.match(text):
        raise ValueError("no hash")
    return text
