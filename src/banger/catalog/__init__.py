"""What can be pulled by name.

Owns the entries (`entries`) of the catalog that comes with banger (images.toml and kernels.toml,
package data beside this file) and of those that others publish (`extra`). Leaves making an
artifact of an entry to `images` and `kernels`.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import TypeVar

from banger.catalog.entries import (
    BundleImage,
    DebianImage,
    DebianKernel,
    ImageEntry,
    ImageFile,
    ImageSet,
    NpmExtra,
    OciImage,
    parse_images,
    parse_kernels,
)
from banger.errors import NotFound, nearest

__all__ = [
    "BundleImage",
    "DebianImage",
    "DebianKernel",
    "ImageEntry",
    "ImageFile",
    "ImageSet",
    "NpmExtra",
    "OciImage",
    "catalog_images",
    "catalog_kernels",
    "image_entry",
    "images_text",
    "kernel_entry",
    "parse_images",
    "parse_kernels",
]

_T = TypeVar("_T")


def images_text() -> str:
    """Return the images.toml that comes with banger."""
    return resources.files(__name__).joinpath("images.toml").read_text("utf-8")


@functools.cache
def catalog_images() -> dict[str, ImageEntry]:
    """Return the images of the catalog that comes with banger, by name."""
    return parse_images(images_text())


@functools.cache
def catalog_kernels() -> dict[str, DebianKernel]:
    """Return the kernels this package can pull, by name."""
    return parse_kernels(resources.files(__name__).joinpath("kernels.toml").read_text("utf-8"))


def image_entry(name: str) -> ImageEntry:
    """Return the built-in catalog's entry for an image; raise NotFound with the nearest name."""
    return find_entry("image", name, catalog_images())


def kernel_entry(name: str) -> DebianKernel:
    """Return the catalog's entry for a kernel; raise NotFound with the nearest name."""
    return find_entry("kernel", name, catalog_kernels())


def find_entry(kind: str, name: str, known: dict[str, _T]) -> _T:
    """Return an entry by name; raise NotFound with the nearest."""
    if name in known:
        return known[name]
    close = nearest(name, list(known))
    raise NotFound(
        f"there is no {kind} {name!r} in the catalog",
        hint=f"did you mean {close}?" if close else f"`banger {kind} list` shows what there is",
    )
