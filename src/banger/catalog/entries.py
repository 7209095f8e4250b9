"""What a catalog says: its entries as frozen values, and what is wrong with a file of them.

Owns the shape of images.toml and kernels.toml and its validation. A catalog that does not come
with banger may say less (`trusted` false): whatever it says must be safe to carry out.
"""

from __future__ import annotations

import re
import tomllib
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from banger.errors import BangerError, Corrupted, nearest
from banger.host import download

IMAGE_KINDS = ("debian", "oci", "bundle")
MAX_CATALOG_BYTES = 1 << 20
_MAX_ENTRIES = 1000
_MAX_PACKAGES = 2000
_MAX_CAPACITY_MIB = 256 << 10
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")  # as images.artifacts has it
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PLATFORM = re.compile(r"linux/[a-z0-9_]+(?:/[a-z0-9]+)?")
# A registry's reference in full. The dot (or localhost) is what keeps transports out: no catalog
# may name a directory of this host. Its grammar in full is `images.reference`'s.
_OCI_SOURCE = re.compile(
    r"(?:localhost|[a-z0-9-]+(?:\.[a-z0-9-]+)+)(?::[0-9]{1,5})?"
    r"/[a-z0-9]+(?:[._/-]+[a-z0-9]+)*(?::[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?"
    r"(?:@sha256:[0-9a-f]{64})?"
)
# debian-policy 5.6.7: what a package is called. Nothing here is an option, a path or a pattern.
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_SUITE = re.compile(r"[a-z][a-z0-9-]*")
_UNIT = re.compile(r"[A-Za-z0-9@_.:-]+\.(?:service|socket|timer|target|path|mount)")
_VARIANTS = ("minbase", "apt", "essential", "important", "standard")


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


class OciImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image of a registry; `source` is its reference in full, best with a digest."""

    name: str
    description: str
    source: str
    platform: str = ""
    kernel: str = ""
    capacity_mib: int = 0  # 0: what fits


class BundleImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image as one file, made by `banger image export`; `sha256` is the file's."""

    name: str
    description: str
    url: str
    sha256: str
    kernel: str = ""


ImageEntry = DebianImage | OciImage | BundleImage


class DebianKernel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kernel taken out of a Debian package and what that package depends on."""

    name: str
    description: str
    suite: str
    package: str


class _DebianEntry(msgspec.Struct, frozen=True):
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


class _OciEntry(msgspec.Struct, frozen=True):
    kind: str
    description: str
    source: str
    platform: str = ""
    kernel: str = ""
    capacity_mib: int = 0


class _BundleEntry(msgspec.Struct, frozen=True):
    kind: str
    description: str
    url: str
    sha256: str
    kernel: str = ""


class _ImagesToml(msgspec.Struct, frozen=True):
    images: dict[str, dict[str, Any]]
    files: dict[str, ImageFile] = {}
    sets: dict[str, ImageSet] = {}


class _ForeignToml(msgspec.Struct, frozen=True):
    images: dict[str, dict[str, Any]]


class _KernelEntry(msgspec.Struct, frozen=True):
    kind: str
    description: str
    suite: str
    package: str


class _KernelsToml(msgspec.Struct, frozen=True):
    kernels: dict[str, dict[str, Any]]


# What runs as root, or reaches into a file system, is not for strangers to say.
_FOREIGN_DEBIAN_KEYS = ("kind", "description", "suite", "variant", "capacity_mib", "packages",
                        "set", "disable")  # fmt: skip
_SHAPES: dict[str, type[msgspec.Struct]] = {
    "debian": _DebianEntry,
    "oci": _OciEntry,
    "bundle": _BundleEntry,
}
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: the line it is on (0: unknown), the key, and what."""

    line: int
    key: str
    message: str
    hint: str = ""

    def shown(self, where: str) -> str:
        """Return it in one line, as `images.toml:12: images.x.url: ...`."""
        at = f"{where}:{self.line}" if self.line else where
        return f"{at}: {self.key}: {self.message}" if self.key else f"{at}: {self.message}"


@dataclass(frozen=True, slots=True)
class Parsed:
    """The entries of a file that are right, and what is wrong with the others."""

    images: dict[str, ImageEntry] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


class _Wrong(Exception):
    def __init__(self, key: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.key, self.message, self.hint = key, message, hint


@dataclass(frozen=True, slots=True)
class _Shared:
    """What entries may refer to."""

    files: dict[str, ImageFile]
    sets: dict[str, ImageSet]


def examine_images(text: str, *, builtin: str | None = None, base: str = "") -> Parsed:
    """Return what an images.toml holds and every problem of it; never raises for its content.

    `builtin` is the text of the catalog that comes with banger, when `text` is another one: that
    one may refer to the sets of the built-in, and to nothing that reaches further. A relative
    `url` is one beside `base`, the URL of the file.
    """
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        found = re.search(r"\(at line (\d+), column \d+\)", str(error))
        line = int(found[1]) if found else 0
        return Parsed(problems=(Problem(line, "", f"is not TOML: {error}"),))
    lines = text.splitlines()
    shape: type[_ImagesToml | _ForeignToml] = _ImagesToml if builtin is None else _ForeignToml
    try:
        _check_keys(raw, shape.__struct_fields__)
        document = _convert(raw, shape)
        shared = _shared(builtin if builtin is not None else text)
        if len(document.images) > _MAX_ENTRIES:
            raise _Wrong("images", f"{len(document.images)} entries: at most {_MAX_ENTRIES}")
    except _Wrong as wrong:
        line = _line_of(lines, "", wrong.key)
        return Parsed(problems=(Problem(line, wrong.key, wrong.message, wrong.hint),))
    images: dict[str, ImageEntry] = {}
    problems = []
    for name, entry in document.images.items():
        try:
            images[name] = _image(name, entry, shared, trusted=builtin is None, base=base)
        except _Wrong as wrong:
            key = f"images.{name}.{wrong.key}" if wrong.key else f"images.{name}"
            line = _line_of(lines, name, wrong.key)
            problems.append(Problem(line, key, wrong.message, wrong.hint))
    return Parsed(images, tuple(problems))


def parse_images(text: str) -> dict[str, ImageEntry]:
    """Return the entries of the images.toml that comes with banger; raise Corrupted."""
    parsed = examine_images(text)
    for problem in parsed.problems:
        raise Corrupted(problem.shown("images.toml"), hint=problem.hint)
    return parsed.images


def parse_kernels(text: str) -> dict[str, DebianKernel]:
    """Return the kernel entries of a kernels.toml by name; raise Corrupted when it is wrong."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Corrupted(f"kernels.toml is not TOML: {error}") from error
    kernels = {}
    key = ""
    try:
        _check_keys(raw, _KernelsToml.__struct_fields__)
        for name, entry in _convert(raw, _KernelsToml).kernels.items():
            key = f"kernels.{name}"
            _known_kind(entry, ("debian",))
            _check_keys(entry, _KernelEntry.__struct_fields__)
            found = _convert(entry, _KernelEntry)
            kernels[name] = DebianKernel(name, found.description, found.suite, found.package)
    except _Wrong as wrong:
        where = ".".join(part for part in (key, wrong.key) if part)
        raise Corrupted(f"kernels.toml: {where}: {wrong.message}", hint=wrong.hint) from wrong
    return kernels


# -- one entry


def _image(
    name: str, raw: dict[str, Any], shared: _Shared, *, trusted: bool, base: str
) -> ImageEntry:
    if not _NAME.fullmatch(name):
        raise _Wrong(
            "",
            "is no name for an image",
            "up to 63 of a-z 0-9 . _ -, not beginning with one of . _ -",
        )
    kind = _known_kind(raw, IMAGE_KINDS)
    shape = _SHAPES[kind]
    known: Iterable[str] = shape.__struct_fields__
    if kind == "debian" and not trusted:
        for key in raw:
            if key in shape.__struct_fields__ and key not in _FOREIGN_DEBIAN_KEYS:
                raise _Wrong(key, "is for the catalog that comes with banger only",
                             "publish a bundle of such an image")  # fmt: skip
        known = _FOREIGN_DEBIAN_KEYS
    _check_keys(raw, known)
    description = raw.get("description", "")
    if isinstance(description, str) and (len(description) > 300 or not description.isprintable()):
        raise _Wrong("description", "is not one line of up to 300 characters")
    entry: Any = _convert(raw, shape)
    if kind == "oci":
        return _oci(name, entry)
    if kind == "bundle":
        return _bundle(name, entry, base)
    return _debian(name, entry, shared)


def _debian(name: str, entry: _DebianEntry, shared: _Shared) -> DebianImage:
    _need(_SUITE.fullmatch(entry.suite), "suite", f"{entry.suite!r} is no suite of Debian")
    _need(
        entry.variant in _VARIANTS,
        "variant",
        f"{entry.variant!r} is not one of {', '.join(_VARIANTS)}",
    )
    _need(len(entry.packages) <= _MAX_PACKAGES, "packages", f"more than {_MAX_PACKAGES}")
    for package in entry.packages:
        _need(_PACKAGE.fullmatch(package), "packages", f"{package!r} is no package's name")
    for unit in entry.disable:
        _need(_UNIT.fullmatch(unit), "disable", f"{unit!r} is no unit's name")
    _check_capacity(entry.capacity_mib, least=4)
    if entry.set and entry.set not in shared.sets:
        raise _Wrong("set", f"there is no set {entry.set!r}", _did_you_mean(entry.set, shared.sets))
    used = shared.sets[entry.set] if entry.set else ImageSet()
    for key in used.files:
        if key not in shared.files:
            raise _Wrong("set", f"there is no file {key!r}", _did_you_mean(key, shared.files))
    return DebianImage(
        name=name,
        description=entry.description,
        suite=entry.suite,
        variant=entry.variant,
        packages=entry.packages,
        capacity_mib=entry.capacity_mib,
        files=tuple(
            ImageFile(shared.files[key].path, shared.files[key].text.lstrip("\n"))
            for key in used.files
        ),
        links=tuple(entry.links.items()),
        mask=used.mask,
        disable=used.disable + entry.disable,
        exclude=used.exclude,
        keep=used.keep,
        npm=entry.npm,
    )


def _oci(name: str, entry: _OciEntry) -> OciImage:
    _need(
        len(entry.source) <= 512 and _OCI_SOURCE.fullmatch(entry.source),
        "source",
        f"{entry.source[:80]!r} is no reference of a registry in full",
        "write it like docker.io/library/alpine:3.20@sha256:...",
    )
    _need(
        not entry.platform or _PLATFORM.fullmatch(entry.platform),
        "platform",
        f"{entry.platform!r} is no platform",
        "write it like linux/amd64",
    )
    _check_kernel(entry.kernel)
    if entry.capacity_mib:
        _check_capacity(entry.capacity_mib, least=4)
    return OciImage(name, entry.description, entry.source, entry.platform, entry.kernel,
                    entry.capacity_mib)  # fmt: skip


def _bundle(name: str, entry: _BundleEntry, base: str) -> BundleImage:
    _need(_SHA256.fullmatch(entry.sha256), "sha256", "is not 64 hexadecimal digits in lower case",
          "`sha256sum FILE` prints it, and so does `banger image export`")  # fmt: skip
    _check_kernel(entry.kernel)
    try:
        url = urllib.parse.urljoin(base, entry.url) if base else entry.url
        scheme = download.split_url(url).scheme
    except (BangerError, ValueError) as error:
        raise _Wrong("url", str(error), "an https URL, or a path beside the catalog") from error
    # A catalog from elsewhere has no business with the files of this host.
    if scheme == "file" and not base.startswith("file:"):
        raise _Wrong("url", "a file URL is for a catalog that is a file itself")
    return BundleImage(name, entry.description, url, entry.sha256, entry.kernel)


def _check_kernel(kernel: str) -> None:
    _need(not kernel or _NAME.fullmatch(kernel), "kernel", f"{kernel!r} is no kernel's name")


def _check_capacity(capacity_mib: int, *, least: int) -> None:
    _need(least <= capacity_mib <= _MAX_CAPACITY_MIB, "capacity_mib",
          f"{capacity_mib} is not {least} to {_MAX_CAPACITY_MIB}")  # fmt: skip


def _need(sound: object, key: str, message: str, hint: str = "") -> None:
    if not sound:
        raise _Wrong(key, message, hint)


# -- shapes and places


def _shared(text: str) -> _Shared:
    document = _convert(tomllib.loads(text), _ImagesToml)
    return _Shared(document.files, document.sets)


def _known_kind(raw: dict[str, Any], kinds: tuple[str, ...]) -> str:
    kind = raw.get("kind")
    if kind not in kinds:
        raise _Wrong("kind", f"unknown kind {kind!r}", f"the kinds are: {', '.join(kinds)}")
    return str(kind)


def _check_keys(raw: dict[str, Any], known: Iterable[str]) -> None:
    for key in raw:
        if key not in known:
            raise _Wrong(key, f"unknown key {key!r}", _did_you_mean(key, known))


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = nearest(word, list(known))
    return f"did you mean {close}?" if close else f"known are: {', '.join(known)}"


def _convert(raw: Any, shape: type[_T]) -> _T:
    try:
        return msgspec.convert(raw, shape)
    except msgspec.ValidationError as error:
        # msgspec's path, `$.packages[...]`, becomes the key.
        message, _, at = str(error).partition(" - at `$")
        found = re.match(r"\.(\w+)", at)
        raise _Wrong(found[1] if found else "", message) from error


def line_of(text: str, name: str, key: str) -> int:
    """Return the line of a key of an image's entry, else of its table, else 0."""
    return _line_of(text.splitlines(), name, key)


def _line_of(lines: list[str], name: str, key: str) -> int:
    """Return the line of an entry's key, else of its table, else 0; `name` may be empty."""
    if not name:
        plain = re.compile(rf"\s*\[*\s*[\"']?{re.escape(key)}\b")
        return next((number for number, line in enumerate(lines, 1) if plain.match(line)), 0)
    header = re.compile(rf"\s*\[\s*images\s*\.\s*[\"']?{re.escape(name)}[\"']?\s*\]")
    table = next((number for number, line in enumerate(lines, 1) if header.match(line)), 0)
    assignment = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.]")
    for number, line in enumerate(lines[table:], table + 1) if table and key else ():
        if line.lstrip().startswith("["):
            break
        if assignment.match(line):
            return number
    return table
