"""What a maintainer asks of a catalog before publishing it: is everything in it right.

In this process, with no daemon: it runs in the maintainer's own checks, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from banger.catalog import BundleImage, ImageEntry, OciImage, catalog_images, images_text
from banger.catalog.entries import examine_images, line_of
from banger.catalog.extra import base_of, read_text
from banger.errors import BangerError
from banger.host import download
from banger.images.reference import RegistryRef, parse_source


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a check: where, what, and whether it is wrong or only worth a thought."""

    where: str
    line: int  # 0: unknown
    key: str
    message: str
    hint: str
    is_problem: bool


@dataclass(frozen=True, slots=True)
class CatalogReport:
    """What a catalog holds and what there is to say of it."""

    location: str
    names: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not any(finding.is_problem for finding in self.findings)


def check_builtin() -> CatalogReport:
    """Check the catalog that comes with banger."""
    return _report("images.toml", images_text(), builtin=True, online=False)


def check_catalog(location: str, *, online: bool) -> CatalogReport:
    """Check a catalog of a path or a URL; `online` also asks for what its bundles' URLs name."""
    try:
        text = read_text(location)
    except BangerError as error:
        finding = Finding(download.shown(location), 0, "", error.message, error.hint, True)
        return CatalogReport(location, (), (finding,))
    return _report(location, text, builtin=False, online=online)


def _report(location: str, text: str, *, builtin: bool, online: bool) -> CatalogReport:
    where = download.shown(location)
    parsed = examine_images(
        text, builtin=None if builtin else images_text(), base="" if builtin else base_of(location)
    )
    findings = [
        Finding(where, problem.line, problem.key, problem.message, problem.hint, True)
        for problem in parsed.problems
    ]

    def add(name: str, key: str, message: str, hint: str, *, is_problem: bool) -> None:
        line = line_of(text, name, key)
        dotted = f"images.{name}.{key}" if key else f"images.{name}"
        findings.append(Finding(where, line, dotted, message, hint, is_problem))

    for name, entry in parsed.images.items():
        if not builtin and name in catalog_images():
            hint = "whoever uses this catalog gets banger's; choose another name"
            add(name, "", "is a name that banger comes with", hint, is_problem=True)
        try:
            if note := _look(entry, online=online):
                add(name, "source", note, "", is_problem=False)
        except BangerError as error:
            key = "source" if isinstance(entry, OciImage) else "url"
            add(name, key, error.message, error.hint, is_problem=True)
    findings.sort(key=lambda finding: finding.line)
    return CatalogReport(location, tuple(parsed.images), tuple(findings))


def _look(entry: ImageEntry, *, online: bool) -> str:
    """Raise what is wrong with an entry, or return what is worth a thought."""
    if isinstance(entry, OciImage):
        source = parse_source(entry.source)
        assert isinstance(source, RegistryRef)  # by the grammar of catalog.entries
        if source.digest is None:
            return "has no digest: whoever has the registry decides what comes"
    elif isinstance(entry, BundleImage) and online:
        download.check_there(entry.url, plain_http="any")
    return ""
