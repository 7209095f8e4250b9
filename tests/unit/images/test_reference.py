"""What a user may write for `banger image pull`, and what is said about the rest."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.errors import InvalidInput
from banger.images.artifacts import artifact_directory
from banger.images.reference import (
    CatalogRef,
    DockerArchiveRef,
    LayoutRef,
    OciArchiveRef,
    RegistryRef,
    RootfsRef,
    parse_source,
)

SHA256 = "sha256:" + "0123456789abcdef" * 4
SHA512 = "sha512:" + "0123456789abcdef" * 8
_ARTIFACT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")

_part = st.from_regex(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*", fullmatch=True).filter(
    lambda text: len(text) < 40
)
_repository = st.lists(_part, min_size=1, max_size=4).map("/".join)
_tag = st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}", fullmatch=True)
_host = st.sampled_from(
    ["localhost", "localhost:5000", "ghcr.io", "a.b-c.example:443", "127.0.0.1:1", "[::1]:5000"]
)


@pytest.mark.parametrize(
    ("text", "expected", "name"),
    [
        ("debian-bookworm", CatalogRef("debian-bookworm"), "debian-bookworm"),
        (
            "alpine:3.20",
            RegistryRef("docker.io", "library/alpine", "3.20", None),
            "alpine-3.20",
        ),
        ("alpine:latest", RegistryRef("docker.io", "library/alpine", "latest", None), "alpine"),
        ("docker.io/alpine", RegistryRef("docker.io", "library/alpine", "latest", None), "alpine"),
        (
            "index.docker.io/o/n:1",
            RegistryRef("docker.io", "o/n", "1", None),
            "n-1",
        ),
        ("owner/name", RegistryRef("docker.io", "owner/name", "latest", None), "name"),
        ("localhost/x", RegistryRef("localhost", "x", "latest", None), "x"),
        ("localhost:5000/x", RegistryRef("localhost:5000", "x", "latest", None), "x"),
        ("[::1]:5000/x:V1", RegistryRef("[::1]:5000", "x", "V1", None), "x-v1"),
        ("GHCR.io/o/n:v_1", RegistryRef("ghcr.io", "o/n", "v_1", None), "n-v_1"),
        (
            f"alpine@{SHA256}",
            RegistryRef("docker.io", "library/alpine", None, SHA256),
            "alpine-0123456789ab",
        ),
        (
            f"h.example:5000/a/b:t@{SHA512}",
            RegistryRef("h.example:5000", "a/b", "t", SHA512),
            "b-t",
        ),
        ("oci:./d", LayoutRef("./d", None), "d"),
        ("oci:/x/Some Dir:3.20", LayoutRef("/x/Some Dir", "3.20"), "some-dir-3.20"),
        ("oci:d:docker.io/a/b:1", LayoutRef("d", "docker.io/a/b:1"), "d-docker.io-a-b-1"),
        ("oci:.", LayoutRef(".", None), "oci"),
        ("oci-archive:a.tar:latest", OciArchiveRef("a.tar", "latest"), "a"),
        ("oci-archive:/x/a.TAR.gz", OciArchiveRef("/x/a.TAR.gz", None), "a"),
        ("docker-archive:-", DockerArchiveRef("-", None), "docker-archive"),
        ("docker-archive:-:alpine:3", DockerArchiveRef("-", "alpine:3"), "alpine-3"),
        ("docker-archive:a.tar", DockerArchiveRef("a.tar", None), "a"),
        ("docker-archive:a.tar:n", DockerArchiveRef("a.tar", "n:latest"), "n"),
        (
            "docker-archive:a:localhost:5000/n",
            DockerArchiveRef("a", "localhost:5000/n:latest"),
            "n",
        ),
        ("rootfs:/x/y:z.tar.zst", RootfsRef("/x/y:z.tar.zst"), "y-z"),
        ("rootfs:/", RootfsRef("/"), "rootfs"),
    ],
)
def test_source_is_read(text: str, expected: object, name: str) -> None:
    source = parse_source(text)
    assert (source, source.default_name()) == (expected, name)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "empty", "alpine:3.20"),
        ("  ", "empty", ""),
        ("Alpine:3", "lower case", "alpine:3"),
        ("ghcr.io/Owner/x", "lower case", "ghcr.io/owner/x"),
        ("Alpine", "not a name of the catalog", "banger image list"),
        ("https://ghcr.io/a/b", "no https://", "ghcr.io/a/b"),
        ("docker://alpine:1", "no docker://", "alpine:1"),
        ("ftp://x/y", "no ftp://", "for example"),
        ("a\nb:1", "characters", ""),
        ("a\x1b[31m", "characters", ""),
        ("a b:1", "not an image's name", ""),
        ("a//b:1", "not an image's name", ""),
        ("a___b:1", "not an image's name", ""),
        ("-a:1", "not an image's name", ""),
        ("x:", "empty tag", "128"),
        ("x:-t", "not a tag", ""),
        ("x:" + "t" * 129, "not a tag", ""),
        ("x@sha256:12", "no digest", "64"),
        (f"x@{SHA256.upper()}", "no digest", ""),
        ("x@", "no digest", ""),
        ("localhost:99999/x", "not the host", ""),
        ("localhost:0/x", "not the host", ""),
        ("-h.example/x", "not the host", ""),
        ("[::g]/x", "not the host", ""),
        ("docker.io/", "names no image", ""),
        (":1", "names no image", ""),
        ("h.example/" + "a" * 250, "more than 255", ""),
        ("a" * 9000, "characters", ""),
        ("oci:", "no path", "oci:PATH"),
        ("oci:-", "standard input", "docker-archive"),
        ("oci:d:", "ends with a colon", ""),
        ("oci:d:a b", "not a tag", ""),
        (f"docker-archive:a:n@{SHA256}", "no digest", ""),
        ("docker-archive:a:N", "lower case", ""),
        ("oci-archve:./x.tar", "no kind of source", "oci-archive:./x.tar"),
        ("rotfs:./x", "no kind of source", "rootfs:./x"),
        ("foo:bar/baz", "no kind of source", "docker-archive:FILE"),
        ("docker-daemon:alpine:3", "not read", "docker save alpine:3"),
        ("containers-storage:x", "not read", "podman save x"),
        ("./x.tar", "is a path", "oci-archive:./x.tar"),
    ],
)
def test_wrong_source_is_refused_with_a_way_out(text: str, message: str, hint: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        parse_source(text)
    assert hint in caught.value.hint
    assert caught.value.message.isprintable()


@given(
    host=_host, repository=_repository, tag=st.none() | _tag, digest=st.sampled_from(["", SHA256])
)
def test_every_reference_of_the_specification_is_taken(
    host: str, repository: str, tag: str | None, digest: str
) -> None:
    text = f"{host}/{repository}" + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
    source = parse_source(text)
    assert source == RegistryRef(
        host, repository, tag or (None if digest else "latest"), digest or None
    )
    assert parse_source(source.origin) == source


@given(st.text(max_size=80) | st.text(alphabet="a0.:/@-_[]A ", max_size=40))
def test_any_text_is_a_source_with_a_usable_name_or_refused(text: str) -> None:
    try:
        source = parse_source(text)
    except InvalidInput:
        return
    assert _ARTIFACT_NAME.fullmatch(source.default_name())
    assert parse_source(source.origin) == source


@given(
    st.sampled_from(["oci", "oci-archive", "docker-archive", "rootfs"]),
    st.text(min_size=1).filter(str.isprintable),
)
def test_file_of_any_name_has_a_name_here(transport: str, path: str) -> None:
    try:
        source = parse_source(f"{transport}:{path}")
    except InvalidInput:
        return
    assert _ARTIFACT_NAME.fullmatch(source.default_name())


def test_default_names_are_what_artifacts_take(tmp_path) -> None:
    long = parse_source(f"h.example/{'a' * 70}:{'b' * 70}").default_name()
    assert artifact_directory(tmp_path, "image", long).name == long
