"""Who we are to a registry: what `docker login` and `podman login` left, read and never written.

Owns the files of containers-auth.json(5), their order and their matching, and the protocol of
credential helpers. The daemon lives in the environment of who started it first, so environment
and home are arguments. No secret is ever part of a repr, a log line or an error.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from banger.errors import BangerError, InvalidInput, Unavailable
from banger.host.commands import HostCommands
from banger.images.reference import DOCKER_HUB

_FILE_LIMIT_BYTES = 1 << 20
_HELPER_NAME = re.compile(r"[a-z0-9-]{1,64}")
_HELPER_TIMEOUT_S = 30.0  # some ask a cloud's API; none may hold a pull for ever
_HELPER_OUTPUT_BYTES = 64 << 10
# What docker-credential-helpers prints, with status 1, for a host it does not know.
_HELPER_KNOWS_NOTHING = b"credentials not found"
# What helpers give as the user when the secret is an identity token (docker/cli).
_TOKEN_USER = "<token>"  # noqa: S105 - a marker, no secret
# Docker Hub's key in Docker's own files, and the name its helpers know it by.
_HUB_KEY = "https://index.docker.io/v1/"
_HUB_NAMES = ("index.docker.io", "registry-1.docker.io")


@dataclass(frozen=True, slots=True)
class Credential:
    """A user and a password, or an identity token in their place."""

    username: str
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)


class _Auth(msgspec.Struct, frozen=True, rename="lower"):
    auth: str = ""
    username: str = ""
    password: str = ""
    identity_token: str = msgspec.field(default="", name="identitytoken")

    def __repr__(self) -> str:
        return "_Auth(...)"


class _AuthFile(msgspec.Struct, frozen=True, rename="camel"):
    auths: dict[str, _Auth | None] | None = None
    cred_helpers: dict[str, str] | None = None
    creds_store: str = ""


class Credentials:
    """Finds the credential for a repository in the user's files; each is read when asked."""

    def __init__(
        self,
        environment: Mapping[str, str],
        home: Path,
        commands: HostCommands,
        *,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._environment = environment
        self._home = home
        self._commands = commands
        self._warn = warn

    def files(self) -> list[Path]:
        """Return the files that are looked at, in order; they need not exist."""
        given = self._environment.get("REGISTRY_AUTH_FILE", "")
        if given:
            return [Path(given)]  # the only one, as for podman and skopeo
        runtime = self._environment.get("XDG_RUNTIME_DIR", "")
        config = self._environment.get("XDG_CONFIG_HOME", "")
        docker = self._environment.get("DOCKER_CONFIG", "")
        return [
            Path(runtime, "containers/auth.json")
            if runtime
            else Path(f"/run/containers/{os.getuid()}/auth.json"),
            Path(config or self._home / ".config", "containers/auth.json"),
            Path(docker or self._home / ".docker", "config.json"),
        ]

    async def find(self, host: str, repository: str) -> Credential | None:
        """Return the credential of the most specific entry for `host/repository`, or None.

        The first file that has one wins. Raises InvalidInput for a file that cannot be
        understood; a credential helper that fails is warned of, and passed over.
        """
        for path in self.files():
            content = _read(path)
            if content is not None:
                found = await self._find_in(content, path, host, repository)
                if found is not None:
                    return found
        return None

    async def _find_in(
        self, content: _AuthFile, path: Path, host: str, repository: str
    ) -> Credential | None:
        helpers = {_normal(key): name for key, name in (content.cred_helpers or {}).items()}
        auths = {_normal(key): auth for key, auth in (content.auths or {}).items() if auth}
        for key in _keys(host, repository):
            if key in helpers:
                return await self._ask(helpers[key], host, path)
            if key in auths:
                found = _decode(auths[key], path, key)
                if found is not None:
                    return found
        # With a store, `auths` has empty entries: they say only who logged in.
        return await self._ask(content.creds_store, host, path) if content.creds_store else None

    async def _ask(self, name: str, host: str, path: Path) -> Credential | None:
        if not _HELPER_NAME.fullmatch(name):
            raise InvalidInput(f"{path}: {name!r} is not the name of a credential helper")
        for server in (_HUB_KEY, DOCKER_HUB) if host == DOCKER_HUB else (host,):
            try:
                found = await self._run(f"docker-credential-{name}", server)
            except BangerError as error:
                self._warn(f"{path}: {error}; going on without a login to {host}")
                return None
            if found is not None:
                return found
        return None

    async def _run(self, program: str, server: str) -> Credential | None:
        """Ask a helper for a server's credential. What it says on stderr is nobody's to see."""
        self._commands.need(program, hint="")
        status, output = await _output_of(
            self._commands, [program, "get"], server.encode(), self._environment
        )
        if status != 0:
            if _HELPER_KNOWS_NOTHING in output:
                return None
            raise Unavailable(f"{program} failed with status {status}")
        try:
            answer = msgspec.json.decode(output, type=dict[str, object])
        except msgspec.DecodeError:
            answer = {}
        user, secret = answer.get("Username"), answer.get("Secret")
        if not isinstance(user, str) or not isinstance(secret, str):
            raise Unavailable(f"{program} did not answer with a user and a secret")
        if user == _TOKEN_USER:
            return Credential("", identity_token=secret)
        return Credential(user, secret) if user or secret else None


async def _output_of(
    commands: HostCommands, argv: list[str], stdin: bytes, environment: Mapping[str, str]
) -> tuple[int, bytes]:
    """Run a command that may print a little; raise Unavailable when it prints more."""
    with contextlib.ExitStack() as stack:
        read_fd, write_fd = os.pipe()
        reading = stack.enter_context(os.fdopen(read_fd, "rb", buffering=0))
        writing = stack.enter_context(os.fdopen(write_fd, "wb", buffering=0))
        os.set_blocking(read_fd, False)
        running = asyncio.ensure_future(
            commands.run(
                argv,
                stdin=stdin,
                stdout=writing,
                env=environment,
                timeout_s=_HELPER_TIMEOUT_S,
                check=False,
            )
        )
        output = b""
        try:
            while True:
                done = running.done()
                # A pipe holds 64 KiB: what is there now is all, once the helper has ended.
                with contextlib.suppress(BlockingIOError):
                    output += reading.read(_HELPER_OUTPUT_BYTES + 1) or b""
                if len(output) > _HELPER_OUTPUT_BYTES:
                    raise Unavailable(f"{argv[0]} printed more than any credential has")
                if done:
                    return running.result().exit_status, output
                await asyncio.wait({running}, timeout=0.05)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


def _read(path: Path) -> _AuthFile | None:
    try:
        with open(path, "rb") as file:
            text = file.read(_FILE_LIMIT_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InvalidInput(f"cannot read the registry logins in {path}: {error.strerror}") from None
    if not text.strip():
        return None  # podman makes an empty one
    try:
        if len(text) > _FILE_LIMIT_BYTES:
            raise msgspec.DecodeError("it is too large")
        return msgspec.json.decode(text, type=_AuthFile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        # msgspec's words name types and places, never values. Not chained: the text is secret.
        raise InvalidInput(
            f"{path} does not hold registry logins: {error}",
            hint="mend it, or `docker login` and `podman login` anew",
        ) from None


def _decode(auth: _Auth, path: Path, key: str) -> Credential | None:
    user, password = auth.username, auth.password
    if auth.auth:
        try:
            plain = base64.b64decode(auth.auth, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError, ValueError):
            plain = ""
        user, colon, password = plain.partition(":")
        if not colon:
            raise InvalidInput(
                f"{path}: the login for {key} is not base64 of USER:PASSWORD",
                hint=f"docker login {key.partition('/')[0]}",
            )
        password = password.rstrip("\0")  # Docker's own files may end so
    if auth.identity_token:
        return Credential(user, identity_token=auth.identity_token)
    return Credential(user, password) if user else None


def _keys(host: str, repository: str) -> Iterator[str]:
    """Yield host/ns/repo, host/ns, host: the most specific first."""
    key = f"{host}/{repository}"
    while key != host:
        yield key
        key = key.rpartition("/")[0]
    yield host


def _normal(key: str) -> str:
    """Return a key of a file as `host[/namespace]`: Docker writes URLs, podman names."""
    bare = re.sub(r"^https?://", "", key)
    if bare != key:
        bare = bare.partition("/")[0]
    host, slash, rest = bare.rstrip("/").partition("/")
    host = host.lower()
    if host in _HUB_NAMES:
        host, slash, rest = DOCKER_HUB, "", ""
    if slash and rest in ("v1", "v2"):
        slash, rest = "", ""
    return f"{host}{slash}{rest}"
