"""Pulls from Debian's real docker-registry: open, with htpasswd, with tokens."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from banger.errors import NotFound, Unavailable
from banger.events import NullSink
from banger.host.commands import HostCommands
from banger.images.blobcache import BlobCache
from banger.images.credentials import Credentials
from banger.images.oci import Descriptor
from banger.images.reference import RegistryRef, parse_source
from banger.images.registry import RegistrySettings, RegistrySource, open_registry
from tests.support import registries
from tests.support.registries import PASSWORD, USER, RealRegistry, TokenServer

pytestmark = pytest.mark.integration

FILES = {name: os.urandom(2_000_000) for name in ("one", "two", "three")}


class Images:
    """What is in the storage: the same image as public/i:1.0 and private/i:1.0, and as schema2."""

    def __init__(self, directory: Path) -> None:
        self.storage = directory / "storage"
        self.layout = registries.make_layout(directory, "t", FILES)
        self.index = json.loads((self.layout / "index.json").read_text())
        with registries.real_registry(directory / "pushed", self.storage) as registry:
            for name in ("public/i:1.0", "private/i:1.0", "i:latest"):
                registries.push(self.layout, "t", registry.host, name)
            registries.push(self.layout, "t", registry.host, "i:docker", "--format=v2s2")

    @property
    def manifest(self) -> bytes:
        return self.blob(self.index["manifests"][0]["digest"])

    def blob(self, digest: str) -> bytes:
        return (self.layout / "blobs" / digest.replace(":", "/")).read_bytes()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return Images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def plain(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    with registries.real_registry(tmp_path_factory.mktemp("plain"), images.storage) as registry:
        yield registry


@pytest.fixture
def tokens(tmp_path: Path) -> Iterator[TokenServer]:
    server = TokenServer(tmp_path)
    yield server
    server.close()


class Puller:
    """A user with a cache and perhaps a login."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cache = BlobCache(directory / "blobs", 1 << 30)

    def login(self, host: str, **entry: str) -> None:
        path = self.directory / ".docker" / "config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"auths": {host: entry}}))

    @contextlib.asynccontextmanager
    async def open(self, text: str, **settings: object) -> AsyncIterator[RegistrySource]:
        ref = parse_source(text)
        assert isinstance(ref, RegistryRef)
        environment = {"PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(self.directory)}
        async with open_registry(
            ref,
            settings=RegistrySettings(backoff_s=0.01, **settings),  # type: ignore[arg-type]
            credentials=Credentials(environment, self.directory, HostCommands(environment)),
            cache=self.cache,
            sink=NullSink(),
        ) as source:
            yield source

    async def pull(self, text: str) -> tuple[bytes, str, list[bytes]]:
        """Return manifest, its type, and its blobs, asked for all at once."""
        async with self.open(text) as source:
            body, media_type = await source.manifest(None)
            manifest = json.loads(body)
            blobs = await asyncio.gather(
                *(
                    source.blob(msgspec.convert(entry, Descriptor), lambda _: None)
                    for entry in [manifest["config"], *manifest["layers"]]
                )
            )
            return body, media_type, [blob.path.read_bytes() for blob in blobs]


@pytest.fixture
def puller(tmp_path: Path) -> Puller:
    return Puller(tmp_path)


def auth_of(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def check_image(images: Images, pulled: tuple[bytes, str, list[bytes]]) -> None:
    body, media_type, blobs = pulled
    assert body == images.manifest
    assert media_type == registries.OCI_MANIFEST
    manifest = json.loads(body)
    entries = [manifest["config"], *manifest["layers"]]
    assert blobs == [images.blob(entry["digest"]) for entry in entries]
    assert len(manifest["layers"]) == len(FILES)


async def test_image_is_pulled_by_tag_and_by_digest(
    images: Images, plain: RealRegistry, puller: Puller
) -> None:
    check_image(images, await puller.pull(f"{plain.host}/public/i:1.0"))
    digest = images.index["manifests"][0]["digest"]
    check_image(images, await puller.pull(f"{plain.host}/public/i:none@{digest}"))


async def test_second_pull_downloads_no_blob(
    images: Images, plain: RealRegistry, puller: Puller
) -> None:
    await puller.pull(f"{plain.host}/i")
    logged = plain.log.stat().st_size
    check_image(images, await puller.pull(f"{plain.host}/i"))
    said = plain.log.read_bytes()[logged:]
    assert b"/v2/i/manifests/latest" in said
    assert b"/blobs/" not in said


async def test_schema_2_keeps_its_type(plain: RealRegistry, puller: Puller) -> None:
    _, media_type, _ = await puller.pull(f"{plain.host}/i:docker")
    assert media_type == "application/vnd.docker.distribution.manifest.v2+json"


async def test_download_goes_on_by_range(
    images: Images, plain: RealRegistry, puller: Puller
) -> None:
    entry = json.loads(images.manifest)["layers"][0]
    path = puller.cache.path(entry["digest"])
    path.parent.mkdir(parents=True)
    path.with_name(path.name + ".partial").write_bytes(images.blob(entry["digest"])[:1_500_000])
    logged = plain.log.stat().st_size
    check_image(images, await puller.pull(f"{plain.host}/i"))
    lines = plain.log.read_text()[logged:].splitlines()
    [request] = [line for line in lines if f"GET /v2/i/blobs/{entry['digest']}" in line][:1]
    assert (
        f" {entry['size'] - 1_500_000} " in request or f"={entry['size'] - 1_500_000} " in request
    )


async def test_missing_tag_names_the_nearest(plain: RealRegistry, puller: Puller) -> None:
    with pytest.raises(NotFound, match=r"has no tag 1\.1 of public/i") as caught:
        await puller.pull(f"{plain.host}/public/i:1.1")
    assert caught.value.hint == f"did you mean {plain.host}/public/i:1.0?"


async def test_missing_image_and_digest_are_told(plain: RealRegistry, puller: Puller) -> None:
    with pytest.raises(NotFound, match="nothing/here"):
        await puller.pull(f"{plain.host}/nothing/here")
    with pytest.raises(NotFound, match="has no sha256:000000000000 of i"):
        await puller.pull(f"{plain.host}/i@sha256:{'0' * 64}")


async def test_htpasswd_takes_the_login_and_no_other(
    images: Images, puller: Puller, tmp_path: Path
) -> None:
    auth = registries.htpasswd_auth(tmp_path)
    with registries.real_registry(tmp_path / "r", images.storage, auth=auth) as registry:
        with pytest.raises(Unavailable, match="needs a login") as caught:
            await puller.pull(f"{registry.host}/private/i:1.0")
        assert f"docker login {registry.host}" in caught.value.hint
        puller.login(registry.host, auth=auth_of(USER, "wrong"))
        with pytest.raises(Unavailable, match=f"refuses private/i to the user {USER}") as caught:
            await puller.pull(f"{registry.host}/private/i:1.0")
        assert "wrong" not in str(caught.value)
        puller.login(registry.host, auth=auth_of(USER, PASSWORD))
        check_image(images, await puller.pull(f"{registry.host}/private/i:1.0"))


async def test_token_is_had_without_a_login_where_all_may_read(
    images: Images, puller: Puller, tokens: TokenServer, tmp_path: Path
) -> None:
    with registries.real_registry(tmp_path / "r", images.storage, auth=tokens.auth) as registry:
        check_image(images, await puller.pull(f"{registry.host}/public/i:1.0"))
        assert tokens.asked == [
            {"service": "tests", "scope": "repository:public/i:pull", "authorization": ""}
        ]
        with pytest.raises(Unavailable, match="needs a login"):
            await puller.pull(f"{registry.host}/private/i:1.0")


@pytest.mark.parametrize("kind", ["password", "identity token"])
async def test_token_is_had_with_a_login(
    images: Images, puller: Puller, tokens: TokenServer, tmp_path: Path, kind: str
) -> None:
    with registries.real_registry(tmp_path / "r", images.storage, auth=tokens.auth) as registry:
        if kind == "password":
            puller.login(registry.host, auth=auth_of(USER, PASSWORD))
        else:
            puller.login(registry.host, auth=auth_of(USER, ""), identitytoken="identity")
        check_image(images, await puller.pull(f"{registry.host}/private/i:1.0"))
        [asked] = tokens.asked
        if kind == "password":
            assert asked["authorization"] == registries.basic_of(USER, PASSWORD)
        else:
            assert asked["authorization"] == ""
            assert (asked["grant_type"], asked["client_id"]) == ("refresh_token", "banger")
        assert asked["scope"] == "repository:private/i:pull"


async def test_token_that_ran_out_is_renewed(
    images: Images, puller: Puller, tokens: TokenServer, tmp_path: Path
) -> None:
    with registries.real_registry(tmp_path / "r", images.storage, auth=tokens.auth) as registry:
        tokens.lifetime_s = 300
        async with puller.open(f"{registry.host}/public/i:1.0") as source:
            body, _ = await source.manifest(None)
            # As after a long download: what the registry takes no more.
            [place] = source._places
            place.endpoint._authorizer._header = "Bearer " + tokens._token("other/x", allowed=True)
            entries = json.loads(body)["layers"]
            await asyncio.gather(
                *(source.blob(msgspec.convert(e, Descriptor), lambda _: None) for e in entries)
            )
        assert len(tokens.asked) == 2  # once for all downloads together


async def test_wrong_login_at_the_token_server_is_told(
    images: Images, puller: Puller, tokens: TokenServer, tmp_path: Path
) -> None:
    with registries.real_registry(tmp_path / "r", images.storage, auth=tokens.auth) as registry:
        puller.login(registry.host, auth=auth_of(USER, "wrong"))
        with pytest.raises(Unavailable, match="refuses the login to") as caught:
            await puller.pull(f"{registry.host}/private/i:1.0")
        assert caught.value.hint == f"docker login {registry.host}"
