"""What lies at a path or a URL, as a stream: https, http where it is allowed, and files.

Owns the rules of what may be asked for (which schemes, redirects included) and the bounds of
waiting. Blocking: for a thread or a process of its own. What the bytes are is left to others.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import stat
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from banger.errors import InvalidInput, Unavailable

if TYPE_CHECKING:
    import httpx2

# http carries no proof of who answers: it is for what is pinned by a digest, or for this host.
PlainHttp = Literal["never", "loopback", "any"]

CHUNK_BYTES = 256 * 1024
_SILENCE_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 15.0
_MAX_REDIRECTS = 5
_URL_LIMIT = 8192


class Download(NamedTuple):
    """An open stream; `size_bytes` is what was announced (0: nothing was)."""

    pieces: Iterator[bytes]
    size_bytes: int
    status: int
    headers: Mapping[str, str]


def is_loopback(host: str) -> bool:
    """Tell whether a host of a URL is this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def split_url(url: str) -> urllib.parse.SplitResult:
    """Return the parts of an https, http or file URL; raise InvalidInput."""
    try:
        parts = urllib.parse.urlsplit(url)
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError as error:
        raise InvalidInput(f"{shown(url)} is not a URL: {error}") from error
    if parts.scheme not in ("https", "http", "file"):
        raise InvalidInput(f"{shown(url)} is not an https, http or file URL")
    if len(url) > _URL_LIMIT or not url.isprintable() or " " in url:
        raise InvalidInput(f"{shown(url)[:80]!r} is not a URL: percent-encode what is unusual")
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise InvalidInput(f"{shown(url)}: a file URL names no other host")
        if not parts.path.startswith("/") or parts.query:
            raise InvalidInput(f"{shown(url)}: a file URL is file:///PATH")
    elif not parts.hostname or not port_is_fine:
        raise InvalidInput(f"{shown(url)} names no host")
    return parts


def check_scheme(url: str, plain_http: PlainHttp) -> urllib.parse.SplitResult:
    """Return the parts of a URL that may be asked for; raise InvalidInput."""
    parts = split_url(url)
    if parts.scheme == "http" and plain_http != "any":
        if plain_http == "loopback" and is_loopback(parts.hostname or ""):
            return parts
        raise InvalidInput(
            f"{shown(url)}: http tells nobody who answers",
            hint="use https, or give the sha256 of what is to come"
            if plain_http == "never"
            else "use https; http is for this machine only (127.0.0.1, localhost)",
        )
    return parts


def shown(url: str) -> str:
    """Return a URL for people: without the password or token that may be in it."""
    head, mark, _ = url.partition("?")
    head = head.partition("#")[0]
    scheme, separator, rest = head.partition("://")
    if separator:
        host, slash, path = rest.partition("/")
        head = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    return f"{head}?..." if mark else head


def path_of(location: str) -> Path | None:
    """Return the path of a file URL or a path; None for what lies elsewhere."""
    if location.startswith("file:"):
        return Path(urllib.parse.unquote(split_url(location).path))
    return None if "://" in location else Path(location)


@contextlib.contextmanager
def opened(
    location: str,
    *,
    plain_http: PlainHttp,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = _SILENCE_TIMEOUT_S,
) -> Iterator[Download]:
    """Open a path or a URL. `timeout_s` bounds each silence, not the whole.

    Raises InvalidInput for what is no location or may not be asked for, Unavailable for what
    does not answer with 200 (or 304, when `headers` ask so).
    """
    path = path_of(location)
    if path is not None:
        with _file(path, location) as found:
            yield found
        return
    check_scheme(location, plain_http)
    with _asked("GET", location, plain_http, headers or {}, timeout_s) as response:
        size = response.headers.get("Content-Length", "")
        yield Download(
            response.iter_raw(CHUNK_BYTES),
            int(size) if size.isdecimal() and len(size) < 19 else 0,
            response.status_code,
            response.headers,
        )


def check_there(location: str, *, plain_http: PlainHttp) -> None:
    """Raise unless a file is there, or HEAD of a URL is answered with 200."""
    path = path_of(location)
    if path is not None:
        with _file(path, location):
            return
    check_scheme(location, plain_http)
    with _asked("HEAD", location, plain_http, {}, _SILENCE_TIMEOUT_S):
        return


@contextlib.contextmanager
def _file(path: Path, location: str) -> Iterator[Download]:
    try:
        # O_NONBLOCK: the open of a FIFO would wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise Unavailable(f"{location}: {reason}") from error
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise Unavailable(f"{location} is not a regular file")
    with os.fdopen(fd, "rb", buffering=0) as file:
        pieces = iter(lambda: file.read(CHUNK_BYTES), b"")
        yield Download(pieces, found.st_size, 200, {})


@contextlib.contextmanager
def _asked(
    method: str, url: str, plain_http: PlainHttp, headers: Mapping[str, str], timeout_s: float
) -> Iterator[httpx2.Response]:
    import httpx2  # 150 ms, for a command that takes seconds

    def check(request: httpx2.Request) -> None:
        check_scheme(str(request.url), plain_http)  # also where a redirect leads

    # The certificates are the system's (truststore), the proxy the environment's.
    timeout = httpx2.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S))
    # As it is: what is hashed is what was published, not what a server made of it on the way.
    sent = {"Accept-Encoding": "identity", "User-Agent": "banger", **headers}
    try:
        with (
            httpx2.Client(
                timeout=timeout,
                follow_redirects=True,
                max_redirects=_MAX_REDIRECTS,
                event_hooks={"request": [check]},
            ) as client,
            client.stream(method, url, headers=sent) as response,
        ):
            wanted = (200, 304) if "If-None-Match" in headers else (200,)
            if response.status_code not in wanted:
                raise Unavailable(f"{shown(url)}: HTTP {response.status_code}")
            yield response
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise Unavailable(f"{shown(url)}: {reason}") from error
