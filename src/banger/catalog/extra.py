"""Catalogs that others publish: a file or a URL each, beside the one that comes with banger.

Owns where they are read from, the copies kept of them, and the joining: a name that banger comes
with stays banger's, a name two catalogs give is the first one's, and both are said. A catalog that
is broken or out of reach is a warning, never a failure. The copies:

    <cache>/catalogs/<digest of the URL>.toml     as it came
    <cache>/catalogs/<digest of the URL>.json     its ETag, and when it was last asked for
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from banger.catalog import ImageEntry, catalog_images, find_entry, images_text
from banger.catalog.entries import MAX_CATALOG_BYTES, examine_images
from banger.config import Config
from banger.errors import BangerError, Corrupted
from banger.host import download
from banger.host.files import make_private_directory, write_atomic

BUILTIN = "built-in"
_FRESH_S = 3600.0  # a copy younger than this is taken without asking
_RETRY_S = 60.0  # who did not answer is left in peace for so long
_TIMEOUT_S = 10.0  # of each silence; a listing waits for it
_TOTAL_S = 30.0
_WARNED_PROBLEMS = 3


@dataclass(frozen=True, slots=True)
class Catalog:
    """All images that can be pulled by name; `origins` tells which catalog names which."""

    images: dict[str, ImageEntry]
    origins: dict[str, str]
    warnings: tuple[str, ...] = ()

    def entry(self, name: str) -> ImageEntry:
        """Return the entry for an image; raise NotFound with the nearest name."""
        return find_entry("image", name, self.images)


@dataclass(slots=True)
class Catalogs:
    """The catalogs of a configuration. `current` blocks, and may be called in any thread."""

    locations: tuple[str, ...] = ()
    cache_dir: Path | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _known: Catalog | None = None
    _known_key: tuple[Any, ...] = ()
    _tried_at: dict[str, float] = field(default_factory=dict)

    def current(self) -> Catalog:
        """Return what can be pulled now; asks the catalogs' servers at most once an hour."""
        with self._lock:
            key = tuple(self._state(location) for location in self.locations)
            if self._known is None or key != self._known_key or None in key:
                self._known = self._load()
                self._known_key = tuple(self._state(location) for location in self.locations)
            return self._known

    def _state(self, location: str) -> Any:
        """Return what changes when a location must be read again; None: it must be."""
        path = download.path_of(location)
        if path is not None:
            try:
                found = os.stat(path)
            except OSError:
                return "absent"
            return found.st_mtime_ns, found.st_size, found.st_ino
        return self._tried_at.get(location) if self._is_recent(location) else None

    def _is_recent(self, location: str) -> bool:
        tried_at = self._tried_at.get(location)
        return tried_at is not None and time.monotonic() - tried_at < _RETRY_S

    def _load(self) -> Catalog:
        images = dict(catalog_images())
        origins = dict.fromkeys(images, BUILTIN)
        warnings: list[str] = []
        for location in self.locations:
            where = download.shown(location)
            try:
                text, warning = self._text(location)
            except BangerError as error:
                warnings.append(f"the catalog {where} is left out: {error.message}")
                continue
            warnings += warning
            parsed = examine_images(text, builtin=images_text(), base=base_of(location))
            told = [problem.shown(where) for problem in parsed.problems[:_WARNED_PROBLEMS]]
            warnings += told
            if len(parsed.problems) > _WARNED_PROBLEMS:
                warnings.append(
                    f"{where}: and {len(parsed.problems) - _WARNED_PROBLEMS} more; "
                    "`banger image catalog check` names them"
                )
            for name, entry in parsed.images.items():
                if name in images:
                    whose = origins[name]
                    other = "banger's own" if whose == BUILTIN else f"that of {whose}"
                    warnings.append(f"{where}: {name} is left out: {other} has that name")
                    continue
                images[name], origins[name] = entry, where
        return Catalog(images, origins, tuple(warnings))

    def _text(self, location: str) -> tuple[str, list[str]]:
        if download.path_of(location) is not None:
            return read_text(location), []
        copy = None if self.cache_dir is None else _Copy(self.cache_dir, location)
        if copy is None:
            return read_text(location), []
        recent = self._is_recent(location)
        self._tried_at[location] = time.monotonic()
        if copy.is_fresh() or (recent and copy.is_there()):
            return copy.text(), copy.warning()
        return copy.renewed()


def load(config: Config, cache_dir: Path) -> Catalogs:
    """Return the catalogs of a configuration."""
    return Catalogs(tuple(os.path.expanduser(text) for text in config.catalogs), cache_dir)


def base_of(location: str) -> str:
    """Return the URL that relative URLs of a catalog are beside."""
    path = download.path_of(location)
    return location if path is None else Path(os.path.abspath(path)).as_uri()


def read_text(location: str) -> str:
    """Return a catalog's text from its path or URL; raise Unavailable, InvalidInput, Corrupted."""
    with download.opened(location, plain_http="loopback", timeout_s=_TIMEOUT_S) as found:
        return _decoded(_collect(found.pieces, location), location)


def _collect(pieces: Iterable[bytes], location: str) -> bytes:
    deadline = time.monotonic() + _TOTAL_S
    parts: list[bytes] = []
    count = 0
    for piece in pieces:
        count += len(piece)
        if count > MAX_CATALOG_BYTES or time.monotonic() > deadline:
            raise Corrupted(f"{download.shown(location)} is above 1 MiB, or slower than 30 s")
        parts.append(piece)
    return b"".join(parts)


def _decoded(raw: bytes, location: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise Corrupted(f"{download.shown(location)} is not UTF-8") from error


class _Copy:
    """The copy that is kept of a catalog of a URL."""

    def __init__(self, cache_dir: Path, location: str) -> None:
        self._location = location
        name = hashlib.sha256(location.encode()).hexdigest()[:24]
        self._path = cache_dir / "catalogs" / f"{name}.toml"
        self._notes = self._path.with_suffix(".json")
        self._said = self._read_notes()

    def _read_notes(self) -> dict[str, Any]:
        try:
            notes = json.loads(self._notes.read_bytes())
        except (OSError, ValueError):
            return {}
        return notes if isinstance(notes, dict) else {}

    def is_there(self) -> bool:
        return self._path.exists()

    def is_fresh(self) -> bool:
        asked_at = self._said.get("asked_at", 0)
        return self.is_there() and 0 <= time.time() - asked_at < _FRESH_S

    def text(self) -> str:
        try:
            return _decoded(self._path.read_bytes(), self._location)
        except OSError as error:
            raise Corrupted(f"the copy {self._path} does not read: {error.strerror}") from error

    def warning(self) -> list[str]:
        """Say that the copy stands in for its original, if so."""
        return [self._said["failed"]] if self._said.get("failed") else []

    def renewed(self) -> tuple[str, list[str]]:
        """Ask for the catalog anew; when that fails return the copy and what is to be said."""
        etag = self._said.get("etag", "")
        headers = {"If-None-Match": etag} if etag and self.is_there() else {}
        try:
            with download.opened(
                self._location, plain_http="loopback", headers=headers, timeout_s=_TIMEOUT_S
            ) as found:
                if found.status != 304:
                    raw = _collect(found.pieces, self._location)
                    text = _decoded(raw, self._location)
                    # One that does not even read must not take the place of one that does.
                    parsed = examine_images(text, builtin=images_text(), base=self._location)
                    if self.is_there() and not parsed.images and parsed.problems:
                        raise Corrupted(parsed.problems[0].shown("it"))
                    self._keep(raw, found.headers.get("ETag", "")[:1024])
                    return text, []
            self._note({**self._said, "asked_at": time.time(), "failed": ""})
            return self.text(), []
        except (BangerError, OSError) as error:
            if not self.is_there():
                raise
            age = time.strftime("%Y-%m-%d", time.localtime(self._path.stat().st_mtime))
            reason = f"{download.shown(self._location)} is out of reach or broken ({error}): the "
            failed = f"{reason}copy of {age} is used"
            self._note({**self._said, "failed": failed})
            return self.text(), [failed]

    def _keep(self, raw: bytes, etag: str) -> None:
        make_private_directory(self._path.parent)
        # Notes first: a crash between the two leaves an ETag of nothing, which is not sent.
        self._notes.unlink(missing_ok=True)
        write_atomic(self._path, raw)
        self._note({"url": download.shown(self._location), "etag": etag, "asked_at": time.time()})

    def _note(self, notes: dict[str, Any]) -> None:
        self._said = notes
        write_atomic(self._notes, json.dumps(notes).encode())
