"""Registries that misbehave: what is tried again, what is refused, and where secrets never go."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.errors import BangerError, Corrupted, InvalidInput, NotFound, Unavailable
from banger.events import NullSink
from banger.host.commands import HostCommands
from banger.images.blobcache import BlobCache
from banger.images.credentials import Credentials
from banger.images.oci import MAX_DOCUMENT_BYTES, Descriptor
from banger.images.reference import RegistryRef, parse_source
from banger.images.registry import RegistrySettings, RegistrySource, open_registry
from tests.support import registries
from tests.support.ports import free_port
from tests.support.registries import FaultyRegistry, answer, digest_of

pytestmark = pytest.mark.integration

LAYER = os.urandom(1_500_000)
LOGIN = registries.basic_of("me", "hunter2")


class Warnings(NullSink):
    def __init__(self) -> None:
        self.said: list[str] = []

    def warning(self, message: str) -> None:
        self.said.append(message)


class Puller:
    """A user whose waits take no time and are written down."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cache = BlobCache(directory / "blobs", 1 << 30)
        self.sink = Warnings()
        self.waits: list[float] = []
        self.told: list[int] = []

    def login(self, host: str, **entry: str) -> None:
        path = self.directory / ".docker" / "config.json"
        path.parent.mkdir(exist_ok=True)
        entry = entry or {"auth": base64.b64encode(b"me:hunter2").decode()}
        path.write_text(json.dumps({"auths": {host: entry}}))

    async def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)

    @asynccontextmanager
    async def open(self, text: str, **settings: Any) -> AsyncIterator[RegistrySource]:
        ref = parse_source(text)
        assert isinstance(ref, RegistryRef)
        environment = {"PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(self.directory)}
        async with open_registry(
            ref,
            settings=RegistrySettings(sleep=self._sleep, **settings),
            credentials=Credentials(environment, self.directory, HostCommands(environment)),
            cache=self.cache,
            sink=self.sink,
        ) as source:
            yield source

    async def manifest(self, text: str, **settings: Any) -> tuple[bytes, str]:
        async with self.open(text, **settings) as source:
            return await source.manifest(None)

    async def layer(self, text: str, **settings: Any) -> bytes:
        """Return the only layer of an image."""
        async with self.open(text, **settings) as source:
            body, _ = await source.manifest(None)
            [layer] = json.loads(body)["layers"]
            blob = await source.blob(msgspec.convert(layer, Descriptor), self.told.append)
            return blob.path.read_bytes()

    def left(self) -> list[str]:
        """Return the names of what lies in the cache."""
        return [path.name for path in (self.directory / "blobs").rglob("*") if path.is_file()]


@pytest.fixture
def puller(tmp_path: Path) -> Puller:
    return Puller(tmp_path)


@pytest.fixture
def registry() -> Iterator[FaultyRegistry]:
    with registries.faulty_registry() as made:
        made.add_image(layer=LAYER)
        yield made


@pytest.fixture
def elsewhere() -> Iterator[FaultyRegistry]:
    """Another host of loopback that has the same blobs."""
    with registries.faulty_registry("127.0.0.2") as made:
        made.add_image(layer=LAYER)
        yield made


def image(registry: FaultyRegistry, tag: str = "t") -> str:
    return f"{registry.host}/o/n:{tag}"


def layer_of(registry: FaultyRegistry) -> bytes:
    return max(registry.blobs.values(), key=len)


async def check(puller: Puller, registry: FaultyRegistry, **settings: Any) -> None:
    assert await puller.layer(image(registry), **settings) == layer_of(registry)
    assert sum(puller.told) == len(layer_of(registry))


async def test_it_serves_when_nothing_is_wrong(puller: Puller, registry: FaultyRegistry) -> None:
    await check(puller, registry)
    assert {seen.headers["user-agent"] for seen in registry.seen} == {"banger"}
    assert puller.waits == []


# -- what may pass


@pytest.mark.parametrize("path", ["/manifests/", "/blobs/"])
@pytest.mark.parametrize(
    "fault",
    [
        answer(500),
        answer(502, b"<html>"),
        answer(503),
        answer(429),
        registries.hang_up,
        registries.cut(1),
    ],
    ids=["500", "502", "503", "429", "hang-up", "cut"],
)
async def test_failure_that_passes_is_tried_again(
    puller: Puller, registry: FaultyRegistry, path: str, fault: registries.Fault
) -> None:
    registry.fault(path, fault, fault)
    await check(puller, registry)
    assert puller.waits == [0.5, 1.0]


@pytest.mark.parametrize(
    ("said", "waited"),
    [("7", 7), ("0", 0.5), ("100000", 60), ("never", 0.5), ("-1", 0.5), ("1" * 99, 0.5)],
)
async def test_retry_after_is_waited_for_up_to_a_limit(
    puller: Puller, registry: FaultyRegistry, said: str, waited: float
) -> None:
    registry.fault("/manifests/", answer(429, Retry_After=said))
    await check(puller, registry)
    assert puller.waits == [waited]
    assert bool(puller.sink.said) == (waited >= 5)  # a long wait is told


async def test_retry_after_may_be_a_date(puller: Puller, registry: FaultyRegistry) -> None:
    registry.fault(
        "/blobs/",
        answer(503, Retry_After=formatdate(time.time() + 3600, usegmt=True)),
        answer(503, Retry_After=formatdate(time.time() - 3600, usegmt=True)),
    )
    await check(puller, registry)
    assert puller.waits == [60, 1.0]


@pytest.mark.parametrize(
    ("status", "words"), [(429, "limits how much it is asked"), (503, "status 503")]
)
async def test_failure_that_stays_is_told_after_a_few_tries(
    puller: Puller, registry: FaultyRegistry, status: int, words: str
) -> None:
    body = json.dumps({"errors": [{"code": "X", "message": "too \x1b[31m many"}]}).encode()
    registry.fault("/manifests/", answer(status, body), always=True)
    with pytest.raises(Unavailable, match=words) as caught:
        await puller.manifest(image(registry))
    assert "too  [31m many" in caught.value.message
    assert len(registry.requests("/manifests/")) == 4


async def test_host_that_does_not_answer_is_told(puller: Puller) -> None:
    with pytest.raises(Unavailable, match="127.0.0.1"):
        await puller.manifest(f"127.0.0.1:{free_port()}/x")
    assert puller.waits == [0.5, 1.0, 2.0]


async def test_silence_is_not_waited_for_without_end(
    puller: Puller, registry: FaultyRegistry
) -> None:
    registry.fault("/manifests/", registries.silence, always=True)
    with pytest.raises(Unavailable, match="does not answer|sends nothing"):
        await puller.manifest(image(registry), answer_timeout_s=0.2)


# -- bodies


async def test_cut_download_goes_on_after_what_came(
    puller: Puller, registry: FaultyRegistry
) -> None:
    registry.fault("/blobs/", registries.cut(600_000), registries.cut(300_000))
    await check(puller, registry)
    ranges = [seen.headers.get("range") for seen in registry.requests("/blobs/")]
    assert ranges[0] is None
    starts = [int(text.removeprefix("bytes=").removesuffix("-")) for text in ranges[1:] if text]
    assert len(starts) == 2
    assert 0 < starts[0] < starts[1] <= 900_000


async def test_download_of_an_earlier_pull_goes_on(
    puller: Puller, registry: FaultyRegistry
) -> None:
    registry.fault("/blobs/", *[registries.cut(100_000)] * 4)
    with pytest.raises(Unavailable):
        await puller.layer(image(registry))
    puller.told.clear()
    registry.seen.clear()
    await check(puller, registry)
    [seen] = registry.requests("/blobs/")
    assert int(seen.headers["range"].removeprefix("bytes=").removesuffix("-")) > 0


async def test_many_cuts_are_borne_when_each_brings_something(
    puller: Puller, registry: FaultyRegistry
) -> None:
    registry.blobs.clear()
    registry.add_image(layer=os.urandom(8 << 20))
    registry.fault("/blobs/", *[registries.cut(1_200_000)] * 6)
    await check(puller, registry)


@pytest.mark.parametrize(
    "second",
    [
        registries.ignore_range,
        answer(416),
        answer(206, b"x", Content_Range="bytes 0-0/1500000"),
        answer(206, b"x", Content_Range="nonsense"),
    ],
    ids=["ignored", "416", "other-range", "nonsense"],
)
async def test_range_that_is_not_served_begins_anew(
    puller: Puller, registry: FaultyRegistry, second: registries.Fault
) -> None:
    registry.fault("/blobs/", registries.cut(600_000), second)
    await check(puller, registry)


async def test_slow_drip_is_given_up(puller: Puller, registry: FaultyRegistry) -> None:
    registry.fault("/blobs/", registries.drip(), always=True)
    with pytest.raises(Unavailable, match="too slowly"):
        await puller.layer(image(registry), window_s=0.2, window_bytes=10_000, tries=2)
    assert len(registry.requests("/blobs/")) == 2


async def test_wrong_bytes_are_refused_and_leave_nothing(
    puller: Puller, registry: FaultyRegistry
) -> None:
    data = layer_of(registry)
    registry.fault("/blobs/", answer(200, data[:-1] + b"?"), always=True)
    with pytest.raises(Corrupted, match="what arrived is not") as caught:
        await puller.layer(image(registry))
    assert image(registry) in caught.value.message
    assert puller.left() == []


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"?"])
@pytest.mark.parametrize("send", [lambda data: answer(200, data), registries.chunked])
async def test_wrong_length_is_refused_and_leaves_nothing(
    puller: Puller,
    registry: FaultyRegistry,
    change: Callable[[bytes], bytes],
    send: Callable[[bytes], registries.Fault],
) -> None:
    registry.fault("/blobs/", send(change(layer_of(registry))), always=True)
    with pytest.raises(Corrupted):
        await puller.layer(image(registry))
    assert puller.left() == []


async def test_beginning_that_was_wrong_is_fetched_anew(
    puller: Puller, registry: FaultyRegistry
) -> None:
    digest = digest_of(layer_of(registry))
    path = puller.cache.path(digest)
    path.parent.mkdir(parents=True)
    path.with_name(path.name + ".partial").write_bytes(b"wrong" * 1000)
    await check(puller, registry)
    assert len(registry.requests("/blobs/")) == 2


async def test_downloads_are_no_more_than_allowed(puller: Puller, registry: FaultyRegistry) -> None:
    digests = [registry.add_blob(bytes([n]) * 1000) for n in range(6)]
    running, most = 0, 0
    original = RegistrySource._download

    async def counted(self: RegistrySource, endpoint: Any, partial: Any) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        await original(self, endpoint, partial)
        running -= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RegistrySource, "_download", counted)
        async with puller.open(image(registry), max_parallel_downloads=2) as source:
            await asyncio.gather(
                *(source.blob(Descriptor("", digest, 1000), lambda _: None) for digest in digests)
            )
    assert most == 2


async def test_same_blob_asked_for_twice_at_once_is_downloaded_once(
    puller: Puller, registry: FaultyRegistry
) -> None:
    data = layer_of(registry)
    descriptor = Descriptor("", digest_of(data), len(data))
    async with puller.open(image(registry)) as source:
        await asyncio.gather(*(source.blob(descriptor, lambda _: None) for _ in range(3)))
    assert len(registry.requests("/blobs/")) == 1


# -- manifests


async def test_huge_manifest_is_not_read_to_its_end(
    puller: Puller, registry: FaultyRegistry
) -> None:
    registry.fault("/manifests/", registries.chunked(b" " * (MAX_DOCUMENT_BYTES + 1)), always=True)
    with pytest.raises(Unavailable, match="more than 4096 KiB"):
        await puller.manifest(image(registry))


async def test_manifest_by_digest_is_checked(puller: Puller, registry: FaultyRegistry) -> None:
    body, _ = registry.manifests["t"]
    registry.fault("/manifests/", answer(200, body + b" "), always=True)
    with pytest.raises(Corrupted, match="not the manifest"):
        await puller.manifest(f"{registry.host}/o/n@{digest_of(body)}")


async def test_manifest_of_an_index_is_checked_by_size_and_digest(
    puller: Puller, registry: FaultyRegistry
) -> None:
    body, _ = registry.manifests["t"]
    async with puller.open(image(registry)) as source:
        found, media_type = await source.manifest(Descriptor("type/x", digest_of(body), len(body)))
        assert (found, media_type) == (body, "type/x")
        with pytest.raises(Corrupted, match="bytes, not 7"):
            await source.manifest(Descriptor("", digest_of(body), 7))
        other = digest_of(b"other")
        registry.manifests[other] = (body, "")
        with pytest.raises(Corrupted, match="not the manifest"):
            await source.manifest(Descriptor("", other, len(body)))
        with pytest.raises(InvalidInput, match="not a digest"):
            await source.manifest(Descriptor("", "../../etc", len(body)))
        with pytest.raises(NotFound, match="lacks the manifest"):
            await source.manifest(Descriptor("", digest_of(b"none"), 1))


@pytest.mark.parametrize("said", [digest_of(b"another"), "nonsense", "md5:00"])
async def test_manifest_that_belies_its_own_header_is_refused(
    puller: Puller, registry: FaultyRegistry, said: str
) -> None:
    body, _ = registry.manifests["t"]
    registry.fault("/manifests/", answer(200, body, Docker_Content_Digest=said))
    with pytest.raises(Corrupted):
        await puller.manifest(image(registry))


async def test_schema_1_is_passed_on_by_its_type(puller: Puller, registry: FaultyRegistry) -> None:
    media_type = "application/vnd.docker.distribution.manifest.v1+prettyjws"
    registry.fault(
        "/manifests/",
        answer(200, b"{}", Content_Type=media_type, Docker_Content_Digest=digest_of(b"unsigned")),
    )
    assert await puller.manifest(image(registry)) == (b"{}", media_type)


async def test_garbage_is_passed_on_to_who_reads_it(
    puller: Puller, registry: FaultyRegistry
) -> None:
    registry.fault("/manifests/", answer(200, b"\xff{", Content_Type="text/html; charset=x"))
    assert await puller.manifest(image(registry)) == (b"\xff{", "text/html")


@pytest.mark.parametrize("body", [b"\xff", b"[]", b'{"errors": 3}', b'{"errors": []}', b"[" * 999])
async def test_garbage_in_an_error_is_no_error_of_ours(
    puller: Puller, registry: FaultyRegistry, body: bytes
) -> None:
    registry.fault("/manifests/", answer(418, body))
    with pytest.raises(Unavailable, match="status 418"):
        await puller.manifest(image(registry))


@pytest.mark.parametrize("tags", [answer(500), answer(200, b"["), registries.hang_up])
async def test_missing_tag_is_told_when_tags_cannot_be_had(
    puller: Puller, registry: FaultyRegistry, tags: registries.Fault
) -> None:
    registry.fault("/tags/", tags)
    with pytest.raises(NotFound, match="has no tag tt of o/n") as caught:
        await puller.manifest(image(registry, "tt"))
    assert caught.value.hint == ""


# -- redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirect_to_another_host_takes_no_login_along(
    puller: Puller, registry: FaultyRegistry, elsewhere: FaultyRegistry, status: int
) -> None:
    registry.login = LOGIN
    puller.login(registry.host)
    target = f"http://user:secret@127.0.0.2:{elsewhere.port}"
    registry.fault("/blobs/", registries.redirect(target + "{path}?signed=secret", status))
    await check(puller, registry)
    assert registry.requests("/blobs/")[0].authorization == LOGIN
    [seen] = elsewhere.seen
    assert seen.authorization is None
    assert seen.path.endswith("?signed=secret")


@pytest.mark.parametrize("name", ["localhost:{port}", "127.0.0.1:{other}"])
async def test_another_name_or_port_of_the_host_is_another_host(
    puller: Puller, registry: FaultyRegistry, name: str
) -> None:
    with registries.faulty_registry() as other:
        other.add_image(layer=LAYER)
        target = name.format(port=registry.port, other=other.port)
        registry.login = LOGIN
        puller.login(registry.host)
        registry.fault("/blobs/", registries.redirect(f"http://{target}{{path}}"))
        if "localhost" in target:
            registry.fault("/blobs/", registries.Handler.serve)
            with pytest.raises(Unavailable, match="where .* redirects to, answers 401"):
                await puller.layer(image(registry))
            assert registry.seen[-1].host == target
            assert registry.seen[-1].authorization is None
        else:
            await check(puller, registry)
            assert [seen.authorization for seen in other.seen] == [None]


async def test_login_does_not_come_back_with_a_redirect_home(
    puller: Puller, registry: FaultyRegistry, elsewhere: FaultyRegistry
) -> None:
    registry.login = LOGIN
    puller.login(registry.host)
    registry.fault("/blobs/", registries.redirect(f"http://127.0.0.2:{elsewhere.port}{{path}}"))
    elsewhere.fault("/blobs/", registries.redirect(f"http://{registry.host}/home{{path}}"))
    with pytest.raises(BangerError):
        await puller.layer(image(registry))
    assert registry.requests("/home/")[0].authorization is None


async def test_redirect_on_the_same_host_keeps_the_login(
    puller: Puller, registry: FaultyRegistry
) -> None:
    registry.login = LOGIN
    puller.login(registry.host)
    registry.fault("^/v2/o/n/blobs/", registries.redirect("/moved{path}"))
    await check(puller, registry)
    assert registry.requests("/moved/")[0].authorization == LOGIN


async def test_cut_download_asks_the_registry_again_for_a_new_redirect(
    puller: Puller, registry: FaultyRegistry, elsewhere: FaultyRegistry
) -> None:
    registry.fault(
        "/blobs/",
        registries.redirect(f"http://127.0.0.2:{elsewhere.port}{{path}}"),
        always=True,
    )
    elsewhere.fault("/blobs/", registries.cut(600_000))
    await check(puller, registry)
    assert len(registry.requests("/blobs/")) == len(elsewhere.seen) == 2
    assert elsewhere.seen[1].headers["range"].startswith("bytes=")


async def test_redirect_loop_ends(puller: Puller, registry: FaultyRegistry) -> None:
    registry.fault("/blobs/", registries.redirect("{path}"), always=True)
    with pytest.raises(Unavailable, match="redirects more than 5 times"):
        await puller.layer(image(registry))
    assert len(registry.requests("/blobs/")) == 6


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("http://registry.example/secret", "registry.example would be asked over http"),
        ("http://127.0.0.1.example/secret", "would be asked over http"),
        ("http://[::ffff:8.8.8.8]/secret", "would be asked over http"),
        ("file:///etc/passwd", "no URL"),
        ("ftp://127.0.0.1/x", "no URL"),
        ("http://[", "would be asked over http"),
        ("", "no URL"),
    ],
)
async def test_redirect_to_what_is_not_safe_is_refused(
    puller: Puller, registry: FaultyRegistry, target: str, words: str
) -> None:
    registry.fault("/blobs/", registries.redirect(target))
    with pytest.raises(Unavailable, match=words) as caught:
        await puller.layer(image(registry))
    assert "secret" not in caught.value.message


# -- logins


async def test_nothing_is_sent_before_it_is_asked_for(
    puller: Puller, registry: FaultyRegistry
) -> None:
    puller.login(registry.host)
    await check(puller, registry)
    assert {seen.authorization for seen in registry.seen} == {None}


@pytest.mark.parametrize(
    "challenge",
    ["", "Negotiate", "Bearer", 'Bearer service="x"', "=,=", 'Bearer realm="', "Basic" * 9999],
)
async def test_challenge_that_cannot_be_answered_is_told(
    puller: Puller, registry: FaultyRegistry, challenge: str
) -> None:
    registry.login, registry.challenge = LOGIN, challenge
    puller.login(registry.host)
    with pytest.raises(Unavailable, match="needs a login|where to get it"):
        await puller.manifest(image(registry))


@pytest.mark.parametrize(
    ("realm", "words"),
    [
        ("http://evil.example/token", "wants a login over http at evil.example"),
        ("ftp://x/", "names no URL"),
        ("nonsense", "names no URL"),
        ("http://[", "wants a login over http"),
    ],
)
async def test_realm_that_is_not_safe_gets_no_login(
    puller: Puller, registry: FaultyRegistry, realm: str, words: str
) -> None:
    registry.login, registry.challenge = "Bearer t", f'Bearer realm="{realm}"'
    puller.login(registry.host)
    with pytest.raises(Unavailable, match=words):
        await puller.manifest(image(registry))


async def test_token_is_asked_for_once_and_only_its_realm_gets_the_password(
    puller: Puller, registry: FaultyRegistry, elsewhere: FaultyRegistry
) -> None:
    registry.login = "Bearer sesame"
    realm = f"http://127.0.0.2:{elsewhere.port}/token?extra=1"
    registry.challenge = f'Basic realm="x", Bearer realm="{realm}",service="s s", scope="all:all:*"'
    elsewhere.fault("/token", answer(200, b'{"access_token": "sesame"}'), always=True)
    puller.login(registry.host)
    await check(puller, registry)
    [asked] = elsewhere.requests("/token")
    assert asked.authorization == LOGIN
    assert "extra=1" in asked.path
    assert "scope=repository%3Ao%2Fn%3Apull" in asked.path  # what we need, not what it offers
    assert "service=s+s" in asked.path or "service=s%20s" in asked.path
    assert LOGIN not in {seen.authorization for seen in registry.seen}


@pytest.mark.parametrize(
    "reply",
    [
        answer(200, b"{}"),
        answer(200, b"\xff"),
        answer(200, b'{"token": 3}'),
        answer(200, b'{"token": "a\\r\\nX-Evil: hunter2"}'),
        answer(200, b"x" * (2 << 20)),
        answer(404),
        registries.redirect("http://127.0.0.1:1/"),
    ],
    ids=["none", "garbage", "number", "injection", "huge", "404", "redirect"],
)
async def test_token_server_that_gives_none_is_told(
    puller: Puller, registry: FaultyRegistry, reply: registries.Fault
) -> None:
    registry.login = "Bearer sesame"
    registry.challenge = f'Bearer realm="http://{registry.host}/token"'
    registry.fault("/token", reply, always=True)
    with pytest.raises(Unavailable) as caught:
        await puller.manifest(image(registry))
    assert "hunter2" not in caught.value.message


async def test_token_server_that_is_busy_is_asked_again(
    puller: Puller, registry: FaultyRegistry
) -> None:
    registry.login = "Bearer sesame"
    registry.challenge = f'Bearer realm="http://{registry.host}/token"'
    registry.fault(
        "/token", answer(503, Retry_After="3"), answer(200, b'{"token": "sesame"}')
    )  # fmt: skip
    await check(puller, registry)
    assert puller.waits == [3]


async def test_identity_token_is_posted(puller: Puller, registry: FaultyRegistry) -> None:
    registry.login = "Bearer sesame"
    registry.challenge = f'Bearer realm="http://{registry.host}/token",service="s"'
    registry.fault("/token", answer(200, b'{"access_token": "sesame"}'))
    puller.login(registry.host, identitytoken="identity")
    await check(puller, registry)
    [asked] = registry.requests("/token")
    assert asked.path == "/token"
    assert "grant_type=refresh_token" in asked.headers["body"]
    assert "refresh_token=identity" in asked.headers["body"]


async def test_token_that_never_helps_is_renewed_once(
    puller: Puller, registry: FaultyRegistry
) -> None:
    registry.login = "Bearer never"
    registry.challenge = f'Bearer realm="http://{registry.host}/token"'
    registry.fault("/token", answer(200, b'{"token": "sesame"}'), always=True)
    with pytest.raises(Unavailable, match="needs a login"):
        await puller.manifest(image(registry))
    assert len(registry.requests("/token")) == 1


async def test_no_secret_is_logged_or_shown(
    puller: Puller, registry: FaultyRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    registry.login = "Bearer sesame"
    registry.challenge = f'Bearer realm="http://{registry.host}/token"'
    registry.fault("/token", answer(200, b'{"token": "sesame"}'), always=True)
    registry.fault("/blobs/", registries.redirect("{path}?signed=signature"))
    puller.login(registry.host)
    await check(puller, registry)
    registry.login = "Bearer changed"
    with pytest.raises(Unavailable) as caught:
        await puller.layer(image(registry))
    shown = caplog.text + repr(caught.value) + str(puller.sink.said)
    for secret in ("sesame", "hunter2", LOGIN, "signature", LOGIN.removeprefix("Basic ")):
        assert secret not in shown


# -- schemes, proxies and mirrors


async def test_loopback_is_asked_over_http_and_never_through_a_proxy(
    puller: Puller, registry: FaultyRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    await check(puller, registry)
    assert registry.seen[0].path == "/v2/"


async def test_proxy_of_the_environment_is_used_and_gets_no_login(
    puller: Puller, registry: FaultyRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://{registry.host}")
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{free_port()}")
    registry.login = LOGIN
    puller.login("registry.test")
    registry.fault("/v2/", answer(200, b"{}"))
    body, _ = await puller.manifest("registry.test/o/n:t", insecure=frozenset({"registry.test"}))
    assert body == registry.manifests["t"][0]
    assert {seen.host for seen in registry.seen} == {"registry.test"}


async def test_host_that_is_not_allowed_is_never_asked_over_http(
    puller: Puller, registry: FaultyRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://{registry.host}")
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(Unavailable):
        await puller.manifest("registry.test/o/n:t")
    assert registry.seen == []


@pytest.fixture
def secure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyRegistry]:
    """A registry over TLS whose certificate is trusted here."""
    certificate = registries.make_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with registries.faulty_registry(tls=certificate) as made:
        made.add_image(layer=LAYER)
        yield made


async def test_loopback_with_tls_is_asked_over_https(
    puller: Puller, secure: FaultyRegistry
) -> None:
    await check(puller, secure)


async def test_certificate_that_is_not_trusted_is_told_at_once(
    puller: Puller, secure: FaultyRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(Unavailable, match="certificate is not to be trusted"):
        await puller.manifest(image(secure), mirrors={secure.host: [f"https://{secure.host}/m"]})
    [said] = puller.sink.said
    assert "not to be trusted" in said
    assert secure.seen == []


async def test_redirect_from_https_to_http_is_refused(
    puller: Puller, secure: FaultyRegistry, registry: FaultyRegistry
) -> None:
    secure.login = LOGIN
    puller.login(secure.host)
    secure.fault("/blobs/", registries.redirect(f"http://{registry.host}{{path}}"))
    with pytest.raises(Unavailable, match="redirects from https to http://127.0.0.1: refused"):
        await puller.layer(image(secure))
    assert registry.seen == []


async def test_redirect_from_http_to_https_of_the_same_host_takes_no_login_along(
    puller: Puller, secure: FaultyRegistry, registry: FaultyRegistry
) -> None:
    registry.login = LOGIN
    puller.login(registry.host)
    registry.blobs, secure.blobs = secure.blobs, registry.blobs
    registry.fault("/blobs/", registries.redirect(f"https://{secure.host}{{path}}"))
    await puller.layer(image(registry))
    assert [seen.authorization for seen in secure.seen] == [None]


async def test_realm_over_http_gets_no_login_of_a_registry_over_https(
    puller: Puller, secure: FaultyRegistry, registry: FaultyRegistry
) -> None:
    secure.login = "Bearer sesame"
    secure.challenge = f'Bearer realm="http://{registry.host}/token"'
    puller.login(secure.host)
    with pytest.raises(Unavailable, match="wants a login over http"):
        await puller.manifest(image(secure))
    assert registry.seen == []


async def test_mirror_is_asked_first_and_the_registry_after_it(
    puller: Puller, registry: FaultyRegistry, elsewhere: FaultyRegistry
) -> None:
    mirrors = {registry.host: [f"http://127.0.0.2:{elsewhere.port}/hub/"]}
    await check(puller, registry, mirrors=mirrors)
    assert registry.seen == []
    assert {seen.path.rpartition("/")[0] for seen in elsewhere.seen} == {
        "/v2/hub/o/n/manifests",
        "/v2/hub/o/n/blobs",
    }
    elsewhere.manifests.clear()
    elsewhere.seen.clear()
    await puller.manifest(image(registry), mirrors=mirrors)
    assert [len(elsewhere.requests("/manifests/")), len(registry.requests("/manifests/"))] == [1, 1]
    assert puller.sink.said == []  # that a mirror lacks an image is no news


@pytest.mark.parametrize(
    "fault",
    [answer(200, b"x"), answer(403), registries.hang_up, registries.cut(100_000)],
    ids=["wrong", "403", "hang-up", "cut"],
)
async def test_mirror_that_fails_is_warned_of_and_left(
    puller: Puller, registry: FaultyRegistry, elsewhere: FaultyRegistry, fault: registries.Fault
) -> None:
    elsewhere.fault("/blobs/", fault, always=True)
    mirrors = {registry.host: [f"http://127.0.0.2:{elsewhere.port}"]}
    await check(puller, registry, mirrors=mirrors)
    [said] = [text for text in puller.sink.said if "mirror" in text]
    assert f"127.0.0.2:{elsewhere.port}" in said
    assert registry.requests("/manifests/") == []
    assert len(registry.requests("/blobs/")) == 1


async def test_bytes_of_a_wrong_mirror_do_not_spoil_the_download(
    puller: Puller, registry: FaultyRegistry, elsewhere: FaultyRegistry
) -> None:
    digest = digest_of(layer_of(registry))
    good = elsewhere.blobs[digest]
    elsewhere.blobs[digest] = b"?" * len(good)
    elsewhere.fault("/blobs/", registries.cut(600_000), answer(403))
    await check(puller, registry, mirrors={registry.host: [f"http://127.0.0.2:{elsewhere.port}"]})


async def test_mirror_gets_no_login_of_the_registry(
    puller: Puller, registry: FaultyRegistry, elsewhere: FaultyRegistry
) -> None:
    puller.login(registry.host)
    elsewhere.login = LOGIN
    registry.login = LOGIN
    await check(puller, registry, mirrors={registry.host: [f"http://127.0.0.2:{elsewhere.port}"]})
    assert {seen.authorization for seen in elsewhere.seen} == {None}
