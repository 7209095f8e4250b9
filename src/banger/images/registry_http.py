"""One registry host over HTTP: schemes, redirects, logins, and failures that may pass.

Owns what a request to a registry may do and where its secrets may go:
* plain http is for loopback and for the hosts of `registries.insecure` alone, at every step;
* redirects are followed here, five at most, never from https to http; Authorization goes to the
  registry's own origin and stops for good at the first step away from it;
* a login goes to the registry (Basic) or to the realm it names (tokens), which is not followed
  anywhere;
* no URL of a redirect is ever shown: it may be signed.
Which documents and blobs are asked for, and whether they are right, is `registry`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import email.utils
import ipaddress
import logging
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from types import MappingProxyType
from typing import TYPE_CHECKING

import msgspec

from banger.config import RegistriesConfig
from banger.errors import BangerError, NotFound, Unavailable
from banger.images.credentials import Credential
from banger.images.reference import DOCKER_HUB
from banger.images.registry_auth import Authorizer, TokenRequest, parse_challenges

if TYPE_CHECKING:
    import httpx2

_HUB_HOST = "registry-1.docker.io"
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_REDIRECT_LIMIT = 5
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_ERROR_BODY_BYTES = 64 << 10
_TOKEN_BODY_BYTES = 1 << 20
# Timeouts of httpx2 that have no words of their own.
_SILENT = {"ConnectTimeout": "it cannot be reached", "ReadTimeout": "it sends nothing any more"}


@dataclass(frozen=True, slots=True)
class RegistrySettings:
    """What the config says of registries, and the patience we have with them."""

    mirrors: Mapping[str, Sequence[str]] = field(default_factory=lambda: MappingProxyType({}))
    insecure: frozenset[str] = frozenset()
    max_parallel_downloads: int = 4
    connect_timeout_s: float = 20.0
    answer_timeout_s: float = 60.0  # until the headers, and for a whole document
    # Less than this in a window is a stalled download: slower than 1 KiB/s, nobody waits for it.
    window_s: float = 30.0
    window_bytes: int = 32 << 10
    tries: int = 4
    backoff_s: float = 0.5  # then twice that, and so on
    wait_limit_s: float = 60.0  # whatever Retry-After says
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    @classmethod
    def of(cls, config: RegistriesConfig) -> RegistrySettings:
        """Return the settings of a configuration."""
        return cls(
            mirrors=MappingProxyType({k.lower(): tuple(v) for k, v in config.mirrors.items()}),
            insecure=frozenset(host.lower() for host in config.insecure),
            max_parallel_downloads=config.max_parallel_downloads,
        )


class Transient(Exception):
    """A failure that may pass: `error` is what it is when it does not."""

    def __init__(self, error: BangerError, retry_after_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after_s = retry_after_s


class Retrying:
    """Counts tries of one request and waits between them."""

    def __init__(self, settings: RegistrySettings, warn: Callable[[str], None]) -> None:
        self._settings = settings
        self._warn = warn
        self._failures = 0

    def progressed(self) -> None:
        """Begin to count anew: a long download may be cut more often than a short one."""
        self._failures = 0

    async def wait(self, failure: Transient) -> None:
        """Wait for the next try; raise the failure's error when it was the last one."""
        self._failures += 1
        if self._failures >= self._settings.tries:
            raise failure.error from failure
        delay_s = self._settings.backoff_s * 2 ** (self._failures - 1)
        if failure.retry_after_s is not None:
            delay_s = max(delay_s, failure.retry_after_s)
        delay_s = min(delay_s, self._settings.wait_limit_s)
        if delay_s >= 5:
            self._warn(f"{failure.error.message}; trying again in {delay_s:.0f} s")
        await self._settings.sleep(delay_s)


def make_client(settings: RegistrySettings) -> httpx2.AsyncClient:
    """Return a client that follows nothing, keeps no cookie and takes proxies from the environment.

    Loopback hosts are never asked through a proxy.
    """
    import httpx2  # 150 ms that a daemon which pulls nothing never needs

    # They would log every URL and the headers of answers, signatures among them.
    for name in ("httpx2", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return httpx2.AsyncClient(
        headers={"User-Agent": "banger"},
        timeout=httpx2.Timeout(settings.window_s, connect=settings.connect_timeout_s),
        follow_redirects=False,
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        mounts={f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")},
    )


def is_loopback(host: str) -> bool:
    """Return whether a host name or address, without a port, is this machine's loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Endpoint:
    """Where one repository can be had: the registry itself, or a mirror of it."""

    def __init__(
        self,
        url: str,
        repository: str,
        *,
        client: httpx2.AsyncClient,
        settings: RegistrySettings,
        find_credential: Callable[[str, str], Awaitable[Credential | None]],
    ) -> None:
        """Take `HOST` or, of a mirror, `SCHEME://HOST[/PREFIX]`; no request is made yet."""
        scheme, separator, rest = url.rpartition("://")
        self.host, _, prefix = rest.strip("/").partition("/")
        self.repository = f"{prefix}/{repository}" if prefix else repository
        self._client = client
        self._settings = settings
        asked = _HUB_HOST if self.host == DOCKER_HUB else self.host
        self._schemes = (scheme,) if separator else self._schemes_of(asked)
        self._bases = [f"{scheme}://{asked}" for scheme in self._schemes]
        self._choosing = asyncio.Lock()

        async def find() -> Credential | None:
            return await find_credential(self.host, self.repository)

        self._authorizer = Authorizer(self.host, self.repository, find, self._send_token_request)

    def _schemes_of(self, host: str) -> tuple[str, ...]:
        name = _without_port(host)
        if is_loopback(name):
            return ("http", "https")
        if self._may_be_plain(host, name):
            return ("https", "http")
        return ("https",)

    def _may_be_plain(self, netloc: str, name: str) -> bool:
        return is_loopback(name) or bool({netloc, name} & self._settings.insecure)

    @contextlib.asynccontextmanager
    async def get(self, path: str, headers: Mapping[str, str]) -> AsyncIterator[httpx2.Response]:
        """Ask for `/v2/<repository>/<path>`; yields an answer of status 200, 206 or 416.

        Raises Transient for what may pass, NotFound, Unavailable.
        """
        import httpx2

        origin = httpx2.URL(await self._base())
        url = origin.join(f"/v2/{self.repository}/{path}")
        renewed = False
        while True:
            used = self._authorizer.header
            async with self._followed(url, headers, used) as response:
                at_origin = _origin(response.url) == _origin(origin)
                if response.status_code == 401 and at_origin and not renewed:
                    challenges = parse_challenges(response.headers.get_list("WWW-Authenticate"))
                    renewed = True
                    if await self._authorizer.answer(challenges, used):
                        continue
                if response.status_code not in (200, 206, 416):
                    raise await self._failure_of(response, at_origin=at_origin)
                yield response
                return

    async def _base(self) -> str:
        """Return scheme and host; where both schemes may be, whichever answers first."""
        async with self._choosing:
            failure: Transient | Unavailable | None = None
            for base in self._bases if len(self._bases) > 1 else ():
                try:
                    async with self._send("GET", f"{base}/v2/", {}) as response:
                        # A TLS server answers plain http with 400.
                        if base.startswith("http:") and response.status_code == 400:
                            continue
                except (Transient, Unavailable) as error:
                    # What trying again does not mend says more than what it may.
                    if failure is None or isinstance(error, Unavailable):
                        failure = error
                else:
                    self._bases = [base]
            if len(self._bases) > 1:
                raise failure or Unavailable(f"{self.host} speaks neither http nor https")
            return self._bases[0]

    @contextlib.asynccontextmanager
    async def _followed(
        self, url: httpx2.URL, headers: Mapping[str, str], authorization: str | None
    ) -> AsyncIterator[httpx2.Response]:
        origin = _origin(url)
        for _ in range(_REDIRECT_LIMIT + 1):
            sent = dict(headers)
            if authorization is not None:
                sent["Authorization"] = authorization
            async with self._send("GET", url, sent) as response:
                if response.status_code not in _REDIRECTS:
                    yield response
                    return
                url = self._redirected(url, response.headers.get("Location", ""))
                if _origin(url) != origin:
                    authorization = None
        raise Unavailable(f"{self.host} redirects more than {_REDIRECT_LIMIT} times")

    def _redirected(self, url: httpx2.URL, location: str) -> httpx2.URL:
        import httpx2

        try:
            target = url.join(location)
        except (httpx2.InvalidURL, ValueError):
            target = httpx2.URL("")
        if not location or target.scheme not in ("http", "https") or not target.host:
            raise Unavailable(f"{self.host} redirects to what is no URL")
        if (url.scheme, target.scheme) == ("https", "http"):
            raise Unavailable(f"{self.host} redirects from https to http://{target.host}: refused")
        return target.copy_with(userinfo=b"", fragment=None)

    @contextlib.asynccontextmanager
    async def _send(
        self,
        method: str,
        url: httpx2.URL | str,
        headers: Mapping[str, str],
        *,
        form: dict[str, str] | None = None,
    ) -> AsyncIterator[httpx2.Response]:
        """Make one request; the body is still to be read. Raises Transient, Unavailable."""
        import httpx2

        host = self.host
        try:
            request = self._client.build_request(
                method, url, headers={"Accept-Encoding": "identity", **headers}, data=form
            )
            host, netloc = request.url.host, request.url.netloc.decode("ascii")
            if request.url.scheme == "http" and not self._may_be_plain(netloc, host):
                raise Unavailable(
                    f"{host} would be asked over http, which is not encrypted: refused",
                    hint="registries.insecure in the config allows it for a host",
                )
            async with asyncio.timeout(self._settings.answer_timeout_s):
                # `auth`: else httpx2 would make a login of what stands before an @ in a URL.
                response = await self._client.send(request, stream=True, auth=_as_it_is)
        except TimeoutError as error:
            patience = f"within {self._settings.answer_timeout_s:.0f} s"
            raise Transient(Unavailable(f"{host} does not answer {patience}")) from error
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise failed(host, error) from error
        try:
            yield response
        finally:
            await response.aclose()

    async def _send_token_request(self, request: TokenRequest) -> bytes:
        import httpx2

        try:
            realm = httpx2.URL(request.realm).copy_with(userinfo=b"", fragment=None)
        except (httpx2.InvalidURL, ValueError):
            realm = httpx2.URL("")
        plain = realm.scheme == "http"
        ours = self._bases[0].startswith("http:")
        netloc = realm.netloc.decode("ascii", "replace")
        if realm.scheme not in ("http", "https") or not realm.host:
            raise Unavailable(f"{self.host} names no URL as its token server")
        if plain and not (ours and self._may_be_plain(netloc, realm.host)):
            raise Unavailable(f"{self.host} wants a login over http at {realm.host}: refused")
        headers = {"Authorization": request.basic} if request.basic else {}
        url = realm.copy_merge_params(request.query) if request.query else realm
        method = "GET" if request.form is None else "POST"
        async with self._send(method, url, headers, form=request.form) as response:
            status = response.status_code
            if status in _TRANSIENT:
                raise self._transient(response, realm.host, "")
            if status in (400, 401, 403) and (request.basic or request.form):
                raise Unavailable(
                    f"{realm.host} refuses the login to {self.host}",
                    hint=self._login_command(),
                )
            if status != 200:
                raise Unavailable(f"the token server {realm.host} answers with status {status}")
            return await self.read(response, _TOKEN_BODY_BYTES)

    async def read(self, response: httpx2.Response, limit_bytes: int) -> bytes:
        """Return a whole body; raises Unavailable over the limit, Transient when it is cut."""
        import httpx2

        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.answer_timeout_s):
                async for piece in response.aiter_raw():
                    body += piece
                    if len(body) > limit_bytes:
                        raise Unavailable(
                            f"{response.url.host} answers with more than {limit_bytes >> 10} KiB "
                            "where a document was asked for"
                        )
        except TimeoutError as error:
            raise Transient(Unavailable(f"{response.url.host} answers too slowly")) from error
        except httpx2.TransportError as error:
            raise failed(response.url.host, error) from error
        return bytes(body)

    async def _failure_of(
        self, response: httpx2.Response, *, at_origin: bool
    ) -> Transient | BangerError:
        status = response.status_code
        code, said = await self._said(response)
        if status in _TRANSIENT:
            return self._transient(response, response.url.host, said)
        if not at_origin:
            return Unavailable(
                f"{response.url.host}, where {self.host} redirects to, answers {status}"
            )
        if status == 404:
            if code == "NAME_UNKNOWN":
                return NotFound(f"{self.host} has no image {self.repository}")
            return NotFound(f"{self.host} has no such thing{said}")
        if status in (401, 403):
            user = self._authorizer.user
            hint = f"{self._login_command()}, or podman login, or set REGISTRY_AUTH_FILE"
            if user is None:
                return Unavailable(
                    f"{self.host} has no image {self.repository} for everybody: it is not there, "
                    "or it needs a login",
                    hint=hint,
                )
            return Unavailable(
                f"{self.host} refuses {self.repository} to the user {user}{said}", hint=hint
            )
        return Unavailable(f"{self.host} answers with status {status}{said}")

    def _transient(self, response: httpx2.Response, host: str, said: str) -> Transient:
        wait_s = _retry_after_s(response.headers.get("Retry-After", ""), time.time())
        if response.status_code == 429:
            hint = "" if self._authorizer.user else f"`{self._login_command()}` may raise the limit"
            return Transient(
                Unavailable(f"{host} limits how much it is asked (429){said}", hint=hint), wait_s
            )
        return Transient(
            Unavailable(f"{host} answers with status {response.status_code}{said}"), wait_s
        )

    async def _said(self, response: httpx2.Response) -> tuple[str, str]:
        """Return code and `: words` of a registry's error, or nothing."""
        try:
            body = await self.read(response, _ERROR_BODY_BYTES)
            first = msgspec.json.decode(body, type=_Errors).errors[0]
        except (Transient, BangerError, msgspec.DecodeError, UnicodeDecodeError, IndexError):
            return "", ""
        words = "".join(c if c.isprintable() else " " for c in first.message).strip()[:200]
        return first.code, f": {words}" if words else ""

    def _login_command(self) -> str:
        return "docker login" if self.host == DOCKER_HUB else f"docker login {self.host}"


class _Error(msgspec.Struct, frozen=True):
    code: str = ""
    message: str = ""


class _Errors(msgspec.Struct, frozen=True):
    errors: list[_Error] = []


def failed(host: str, error: Exception) -> Transient | Unavailable:
    """Return what a failure of the transport means."""
    kind = type(error).__name__
    words = str(error) or _SILENT.get(kind, kind)
    reason = "".join(c if c.isprintable() else " " for c in words)[:200]
    if "CERTIFICATE_VERIFY_FAILED" in words:
        return Unavailable(
            f"{host}: its certificate is not to be trusted: {reason}",
            hint="add its authority to the host's store (update-ca-certificates)",
        )
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME:
            return Unavailable(f"there is no host {host}", hint="is its name right?")
        cause = cause.__cause__ or cause.__context__
    return Transient(Unavailable(f"{host}: {reason}"))


def _retry_after_s(text: str, now: float) -> float | None:
    """Return the seconds of a Retry-After header (RFC 9110, 10.2.3), or None."""
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        when = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=datetime.UTC)
    return max(0.0, when.timestamp() - now)


def _origin(url: httpx2.URL) -> tuple[str, str, int]:
    default = 443 if url.scheme == "https" else 80
    return url.scheme, url.host, url.port if url.port is not None else default


def _without_port(netloc: str) -> str:
    return re.sub(r":[0-9]+\Z", "", netloc)


def _as_it_is(request: httpx2.Request) -> httpx2.Request:
    return request
