"""What a user writes for `banger image pull`: a name, a registry's reference, a file.

Owns the grammar of sources and nothing else: no file is looked at, no host is asked. Names and
tags are distribution-spec's, digests image-spec's, short names Docker's (`alpine:3.20` is
`docker.io/library/alpine:3.20`); a word with none of `/ : @` is a name of the catalog.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from banger.errors import InvalidInput, nearest

DOCKER_HUB = "docker.io"
STDIN = "-"
_DEFAULT_TAG = "latest"
_TEXT_LIMIT = 8192  # two of PATH_MAX; what is longer is no reference
_NAME_LIMIT = 255  # of host and repository together, as every registry has it
_ARTIFACT_NAME_LIMIT = 63  # images.artifacts
_TRANSPORTS = ("oci", "oci-archive", "docker-archive", "rootfs")

# distribution-spec 1.1, "Pulling manifests"; `_` and `__` are one separator, three are none.
_REPOSITORY = re.compile(
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
)
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
# image-spec 1.1, annotations.md: org.opencontainers.image.ref.name.
_REF_NAME = re.compile(
    r"[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*(?:/[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*)*"
)
_HOST_PART = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST_NAME = re.compile(rf"{_HOST_PART}(?:\.{_HOST_PART})*")
_HOST_PORT = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[^:\[\]]+)(?::([0-9]{1,5}))?")
_CATALOG_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_TRANSPORT_LIKE = re.compile(r"([A-Za-z][A-Za-z0-9+-]*):(.*)", re.DOTALL)
_ARCHIVE_ENDING = re.compile(
    r"\.(?:tar(?:\.(?:gz|xz|bz2|zst|zstd))?|tgz|txz|tbz2?|tzst)\Z", re.IGNORECASE
)
_SEE = "for example alpine:3.20, ghcr.io/owner/name:tag or oci-archive:FILE.tar"


@dataclass(frozen=True, slots=True)
class RegistryRef:
    """An image of a registry; `tag`, `digest` or both are given, and the digest decides."""

    host: str  # lower case, with the port where one was written; Docker Hub is `docker.io`
    repository: str
    tag: str | None
    digest: str | None

    @property
    def reference(self) -> str:
        """Return what the registry is asked for: the digest, else the tag."""
        return self.digest or self.tag or _DEFAULT_TAG

    @property
    def origin(self) -> str:
        """Return the whole reference, for people."""
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.host}/{self.repository}{tag}{digest}"

    def default_name(self) -> str:
        """Return the image's name here: `alpine-3.20`; `latest` is left out."""
        end = ""
        if self.tag is not None:
            end = "" if self.tag == _DEFAULT_TAG else self.tag
        elif self.digest is not None:
            end = self.digest.partition(":")[2][:12]
        return _artifact_name(self.repository.rpartition("/")[2], end)


@dataclass(frozen=True, slots=True)
class LayoutRef:
    """A directory in OCI's image layout; `tag` is a `ref.name` of its index."""

    path: str
    tag: str | None

    @property
    def origin(self) -> str:
        """Return the reference, for people."""
        return _file_origin("oci", self.path, self.tag)

    def default_name(self) -> str:
        """Return the image's name here, from the directory and the tag."""
        return _file_name(self.path, self.tag, "oci")


@dataclass(frozen=True, slots=True)
class OciArchiveRef:
    """A tar of an OCI image layout; `tag` is a `ref.name` of its index."""

    path: str
    tag: str | None

    @property
    def origin(self) -> str:
        """Return the reference, for people."""
        return _file_origin("oci-archive", self.path, self.tag)

    def default_name(self) -> str:
        """Return the image's name here, from the file and the tag."""
        return _file_name(self.path, self.tag, "oci-archive")


@dataclass(frozen=True, slots=True)
class DockerArchiveRef:
    """What `docker save` wrote; `name` is one of its RepoTags, always with a tag."""

    path: str  # `-` is the standard input
    name: str | None

    @property
    def origin(self) -> str:
        """Return the reference, for people."""
        return _file_origin("docker-archive", self.path, self.name)

    def default_name(self) -> str:
        """Return the image's name here, from the image in it, else from the file."""
        if self.name is not None:
            return _registry(self.name).default_name()
        return _file_name("" if self.path == STDIN else self.path, None, "docker-archive")


@dataclass(frozen=True, slots=True)
class RootfsRef:
    """A tar of a root file system, or a directory that is one."""

    path: str

    @property
    def origin(self) -> str:
        """Return the reference, for people."""
        return _file_origin("rootfs", self.path, None)

    def default_name(self) -> str:
        """Return the image's name here, from the file."""
        return _file_name(self.path, None, "rootfs")


@dataclass(frozen=True, slots=True)
class CatalogRef:
    """A name of the catalog."""

    name: str

    @property
    def origin(self) -> str:
        """Return the name."""
        return self.name

    def default_name(self) -> str:
        """Return the name."""
        return self.name


Source = RegistryRef | LayoutRef | OciArchiveRef | DockerArchiveRef | RootfsRef | CatalogRef


def parse_source(text: str) -> Source:
    """Return what `text` names; paths stay as they were written.

    Raises InvalidInput that says what is wrong with it and how to write it.
    """
    if not text.strip():
        raise InvalidInput("the name of the image to pull is empty", hint=_SEE)
    if len(text) > _TEXT_LIMIT:
        raise InvalidInput(f"{text[:40]}... has {len(text)} characters: no image is named so")
    if not text.isprintable():
        raise InvalidInput(f"{text!r} has characters that no image's name has", hint=_SEE)
    transport = _TRANSPORT_LIKE.fullmatch(text)
    if transport is not None:
        word, rest = transport[1], transport[2]
        if word in _TRANSPORTS:
            return _of_transport(word, rest)
        _refuse_transport(word, rest, text)
    if text.startswith(("/", "./", "../", "~")):
        raise InvalidInput(
            f"{text!r} is a path, and what lies there is not said",
            hint=f"write oci-archive:{text}, docker-archive:{text}, rootfs:{text} or oci:{text}",
        )
    if not set(text) & set("/:@"):
        if not _CATALOG_NAME.fullmatch(text):
            raise InvalidInput(
                f"{text!r} is not a name of the catalog: a-z, 0-9 and inner '.', '_', '-'",
                hint="`banger image list` shows the catalog; an image of a registry has a tag, "
                "as alpine:3.20",
            )
        return CatalogRef(text)
    return _registry(text)


def _of_transport(transport: str, rest: str) -> Source:
    # As skopeo has it: the path ends at the first colon, so a path with one cannot be written.
    path, colon, name = rest.partition(":")
    if transport == "rootfs":
        path, colon, name = rest, "", ""
    if not path:
        raise InvalidInput(f"{transport}: has no path", hint=f"write {transport}:PATH")
    if path == STDIN and transport != "docker-archive":
        raise InvalidInput(
            f"{transport}:- cannot be read from the standard input",
            hint="docker-archive:- can; write others to a file first",
        )
    if transport == "rootfs":
        return RootfsRef(path)
    if colon and not name:
        raise InvalidInput(f"{transport}:{rest} ends with a colon and no name after it")
    if transport == "docker-archive":
        if not name:
            return DockerArchiveRef(path, None)
        ref = _registry(name)
        if ref.digest is not None:
            raise InvalidInput(
                f"{name!r}: an image in a docker archive has a name and a tag, no digest"
            )
        return DockerArchiveRef(path, name if _ends_with_tag(name) else f"{name}:{ref.tag}")
    if name and (not _REF_NAME.fullmatch(name) or len(name) > _NAME_LIMIT):
        raise InvalidInput(
            f"{name!r} is not a tag of an image layout",
            hint=f"write {transport}:{path}:TAG; a path with a colon in it cannot be written here",
        )
    return (LayoutRef if transport == "oci" else OciArchiveRef)(path, name or None)


def _refuse_transport(word: str, rest: str, text: str) -> None:
    """Raise when `word:rest` can only be meant as a transport that banger has not."""
    if rest.startswith("//"):
        without = rest.lstrip("/")
        if word.lower() in ("docker", "http", "https", "oci"):
            raise InvalidInput(f"{text!r}: an image has no {word}://", hint=f"write {without}")
        raise InvalidInput(f"{text!r}: an image has no {word}://", hint=_SEE)
    if word in ("docker-daemon", "containers-storage"):
        program = "docker" if word == "docker-daemon" else "podman"
        raise InvalidInput(
            f"{word}: is not read by banger",
            hint=f"{program} save {rest} | banger image pull docker-archive:-",
        )
    # `name:tag` has no slash after the colon, `host:5000/name` has digits up to it.
    if "/" in rest and not rest.partition("/")[0].isdecimal():
        close = nearest(word.lower(), list(_TRANSPORTS))
        raise InvalidInput(
            f"{text!r}: {word}: is no kind of source",
            hint=f"did you mean {close}:{rest}?"
            if close
            else "there are oci:DIR, oci-archive:FILE, docker-archive:FILE and rootfs:PATH",
        )


def _ends_with_tag(name: str) -> bool:
    return ":" in name.rpartition("/")[2]


def _registry(text: str) -> RegistryRef:
    rest, at, digest = text.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise InvalidInput(
            f"{text!r}: after the @ stands no digest",
            hint="a digest is sha256: and 64 of 0-9 and a-f (or sha512: and 128)",
        )
    tag: str | None = None
    if _ends_with_tag(rest):
        rest, _, tag = rest.rpartition(":")
        if not _TAG.fullmatch(tag):
            raise InvalidInput(
                f"{text!r}: {tag!r} is not a tag" if tag else f"{text!r} ends with an empty tag",
                hint="a tag is up to 128 of a-z, A-Z, 0-9, '_', '.' and '-', "
                "not beginning with '.' or '-'",
            )
    host, repository = _split_host(rest, text)
    _check_repository(repository, text)
    if host == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    if len(host) + 1 + len(repository) > _NAME_LIMIT:
        raise InvalidInput(f"{text[:40]}...: host and name have more than {_NAME_LIMIT} characters")
    if tag is None and not at:
        tag = _DEFAULT_TAG
    return RegistryRef(host, repository, tag, digest if at else None)


def _split_host(name: str, text: str) -> tuple[str, str]:
    """Return host and repository: Docker's rule of what in front of the first slash is a host."""
    first, slash, rest = name.partition("/")
    if not slash or not (first.lower() == "localhost" or set(first) & set(".:[")):
        return DOCKER_HUB, name
    host = first.lower()
    found = _HOST_PORT.fullmatch(host)
    if found is None or not _is_host(found[1]) or not 1 <= int(found[2] or 1) <= 65535:
        raise InvalidInput(
            f"{text!r}: {first!r} is not the host of a registry",
            hint="a host is HOST or HOST:PORT, as ghcr.io, localhost:5000 or [::1]:5000",
        )
    if host in ("docker.io", "index.docker.io", "registry-1.docker.io"):
        host = DOCKER_HUB
    return host, rest


def _is_host(host: str) -> bool:
    if host.startswith("["):
        try:
            return ipaddress.IPv6Address(host[1:-1]).version == 6
        except ValueError:
            return False
    return len(host) <= 253 and _HOST_NAME.fullmatch(host) is not None


def _check_repository(repository: str, text: str) -> None:
    if len(repository) <= _NAME_LIMIT and _REPOSITORY.fullmatch(repository):
        return
    if not repository:
        raise InvalidInput(f"{text!r} names no image", hint=_SEE)
    if len(repository) > _NAME_LIMIT:
        raise InvalidInput(f"{text[:40]}...: the name has more than {_NAME_LIMIT} characters")
    lower = repository.lower()
    if lower != repository and _REPOSITORY.fullmatch(lower):
        raise InvalidInput(
            f"{text!r}: an image's name is in lower case",
            hint=f"write {text.replace(repository, lower, 1)}",
        )
    raise InvalidInput(
        f"{text!r}: {repository!r} is not an image's name",
        hint="a name is a-z and 0-9, with single '.', '_', '-' or '/' between them",
    )


def _file_origin(transport: str, path: str, name: str | None) -> str:
    return f"{transport}:{path}:{name}" if name else f"{transport}:{path}"


def _file_name(path: str, name: str | None, otherwise: str) -> str:
    last = path.rstrip("/").rpartition("/")[2]
    end = "" if name is None or name == _DEFAULT_TAG else name
    return _artifact_name(_ARCHIVE_ENDING.sub("", last).strip("."), end, otherwise)


def _artifact_name(stem: str, end: str, otherwise: str = "image") -> str:
    """Return a name that `images.artifacts` takes: what it does not is a `-`."""
    kept = [re.sub(r"[^a-z0-9._-]+", "-", part.lower()).strip("-._") for part in (stem, end)]
    name = "-".join(part for part in (kept[0] or otherwise, kept[1]) if part)
    return name[:_ARTIFACT_NAME_LIMIT].rstrip("-._")
