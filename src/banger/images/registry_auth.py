"""What a registry's 401 asks for, and the Authorization header that answers it.

Owns the grammar of WWW-Authenticate (RFC 9110, 11.6.1), Basic, and the token protocol of
distribution's docs/spec/auth (anonymous, with a password, with an identity token). Leaves
sending to `registry_http`, credentials to `credentials`.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple, Protocol

import msgspec

from banger.errors import Unavailable
from banger.images.credentials import Credential

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - RFC 9110's word for a word
_SCHEME = re.compile(rf"[ \t,]*({_TOKEN})(?:[ \t]+|[ \t]*(?=,|\Z))")
_PARAMETER = re.compile(rf'[ \t,]*({_TOKEN})[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))')
# What may stand in a header; h11 would repeat any other in its error.
_SENDABLE = re.compile(r"[\x21-\x7e]{1,65536}")
_CHALLENGE_LIMIT = 8192


class Challenge(NamedTuple):
    """One way to authenticate; names in lower case."""

    scheme: str
    parameters: dict[str, str]


class TokenRequest(NamedTuple):
    """A question to a token server: with `form` it is posted, else the query is asked for."""

    realm: str
    query: dict[str, str]
    basic: str | None  # an Authorization header
    form: dict[str, str] | None


class SendTokenRequest(Protocol):
    """Sends a TokenRequest; returns the body of its 200. Refuses a realm that is not safe."""

    async def __call__(self, request: TokenRequest) -> bytes:
        """Return the body."""


class _TokenAnswer(msgspec.Struct, frozen=True):
    token: str = ""
    access_token: str = ""

    def __repr__(self) -> str:
        return "_TokenAnswer(...)"


def parse_challenges(values: Iterable[str]) -> list[Challenge]:
    """Return the challenges of WWW-Authenticate headers; what cannot be read is left out."""
    found: list[Challenge] = []
    for value in values:
        rest = value[:_CHALLENGE_LIMIT]
        while rest:
            parameter = _PARAMETER.match(rest)
            if parameter is not None and found:
                name, quoted, plain = parameter.groups()
                text = plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
                found[-1].parameters.setdefault(name.lower(), text)
                rest = rest[parameter.end() :]
                continue
            scheme = _SCHEME.match(rest)
            if scheme is None:
                break
            found.append(Challenge(scheme[1].lower(), {}))
            rest = rest[scheme.end() :]
    return found


def basic(credential: Credential) -> str:
    """Return the Authorization header of a user and a password."""
    pair = f"{credential.username}:{credential.password}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


class Authorizer:
    """The Authorization header for one repository of one host, and its renewal.

    One pull asks for one scope, so the one header is the cache of tokens.
    """

    def __init__(
        self,
        host: str,
        repository: str,
        find_credential: Callable[[], Awaitable[Credential | None]],
        send: SendTokenRequest,
    ) -> None:
        self.user: str | None = None  # who was logged in with; None: nobody
        self._host = host
        self._scope = f"repository:{repository}:pull"
        self._find_credential = find_credential
        self._send = send
        self._lock = asyncio.Lock()
        self._header: str | None = None

    @property
    def header(self) -> str | None:
        """Return what the last challenge was answered with, or None before the first."""
        return self._header

    async def answer(self, challenges: list[Challenge], used: str | None) -> bool:
        """Renew the header after a 401 to `used`; return whether another try makes sense."""
        async with self._lock:
            if self._header != used:
                return True  # another download has renewed it meanwhile
            by_scheme = {challenge.scheme: challenge.parameters for challenge in challenges}
            credential = await self._find_credential()
            if "bearer" in by_scheme:
                header = f"Bearer {await self._token(by_scheme['bearer'], credential)}"
            elif "basic" in by_scheme and credential is not None and not credential.identity_token:
                header = basic(credential)
            else:
                return False
            if credential is not None:
                self.user = credential.username or "of the identity token"
            self._header = header
            return header != used

    async def _token(self, parameters: dict[str, str], credential: Credential | None) -> str:
        realm = parameters.get("realm", "")
        if not realm:
            raise Unavailable(f"{self._host} asks for a token and does not say where to get it")
        query = {"scope": self._scope}
        if "service" in parameters:
            query["service"] = parameters["service"]
        if credential is not None and credential.identity_token:
            request = TokenRequest(
                realm,
                {},
                None,
                {
                    **query,
                    "grant_type": "refresh_token",
                    "client_id": "banger",
                    "refresh_token": credential.identity_token,
                },
            )
        else:
            request = TokenRequest(realm, query, basic(credential) if credential else None, None)
        try:
            answer = msgspec.json.decode(await self._send(request), type=_TokenAnswer)
        except (msgspec.DecodeError, UnicodeDecodeError):
            answer = _TokenAnswer()
        token = answer.token or answer.access_token
        if not _SENDABLE.fullmatch(token):
            raise Unavailable(f"the token server of {self._host} did not answer with a token")
        return token
