"""The documents are true: commands parse, links lead somewhere, every dependency has its row."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from banger.catalog import catalog_images, catalog_kernels
from banger.cli import main as cli
from banger.cli.commands import NOUNS, SHORTCUTS
from banger.cli.parsing import parse
from banger.errors import UsageError
from banger.images.reference import RegistryRef, parse_source

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# What stands for a value in prose: `banger image pull NAME` parses as it is, these do not.
_PLACEHOLDERS = re.compile(r"\.\.\.$|\[|\||SHELL$")


def commands_of(text: str) -> list[str]:
    """Return every `banger ...` line of the code blocks and of the code spans of a page."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            for part in line.split("&&"):
                command = part.strip().removeprefix("$ ")
                if command.startswith("banger "):
                    found.append(command)
    without_blocks = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found += [
        span
        for span in re.findall(r"`(banger [^`]+)`", without_blocks)
        if not _PLACEHOLDERS.search(span)
    ]
    return found


CASES = [
    pytest.param(command, id=f"{page.relative_to(ROOT)}: {command[:60]}")
    for page in PAGES
    for command in dict.fromkeys(commands_of(page.read_text()))
]


def parse_command(command: str) -> None:
    """Parse a command line as `banger.cli.main` would; raise what it would."""
    words, guest = cli.split_words(shlex.split(command, comments=True)[1:])
    while words and words[0] in ("--json", "-q"):
        words.pop(0)
    if not words or words[0] == "help":
        for word in words[1:2]:
            assert word in NOUNS or word in SHORTCUTS
        return
    if words[0] in SHORTCUTS:
        noun, verb = SHORTCUTS[words[0]]
        rest = words[1:]
    else:
        noun = words[0]
        assert noun in NOUNS, noun
        if "" in NOUNS[noun].verbs:
            verb, rest = "", words[1:]
        elif len(words) == 1:
            return  # prose about the noun
        else:
            verb, rest = NOUNS[noun].aliases.get(words[1], words[1]), words[2:]
    assert verb in NOUNS[noun].verbs, f"{noun} {verb}"
    builder = cli.load(noun, verb).VERBS[verb or noun][0]
    if "--help" in rest:
        return
    found = parse(noun, verb, builder, rest, guest)
    image, kernel = getattr(found, "image", None), getattr(found, "kernel", None)
    # `app` is what a reader imported; a name with a tag is a registry's.
    if image is not None and not isinstance(parse_source(image), RegistryRef):
        assert image in {*catalog_images(), "app"}
    assert kernel is None or kernel in catalog_kernels()
    for name in getattr(found, "names", None) or []:
        if verb == "pull" and name.islower():
            assert name in {**catalog_images(), **catalog_kernels()}


def test_readme_has_commands() -> None:
    assert len(commands_of((ROOT / "README.md").read_text())) > 15


@pytest.mark.parametrize("command", CASES)
def test_documented_command_parses(command: str) -> None:
    try:
        parse_command(command)
    except UsageError as error:
        # Prose may leave out a name: `banger image pull --force`.
        assert error.message.startswith("the following arguments are required")


def test_commands_of_readme_are_whole() -> None:
    for command in commands_of((ROOT / "README.md").read_text()):
        parse_command(command)


@pytest.mark.parametrize(
    "command", ["banger vm rum", "banger vm list --nope", "banger nope", "banger vm list -- x"]
)
def test_wrong_command_would_be_found(command: str) -> None:
    with pytest.raises(Exception):
        parse_command(command)


def test_quick_start_is_the_promised_one() -> None:
    first = re.search(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert first is not None
    assert first[1] == "make install && banger vm run --name sandbox\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
        spans = re.findall(r"`make ([a-z]+)`", page.read_text())
        lines = [line for block in blocks for line in block.splitlines()]
        spans += [match[1] for line in lines if (match := re.match(r"make ([a-z]+)", line))]
        assert set(spans) <= targets, page


def test_every_dependency_has_a_row_with_licence_and_way_out() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [
        *project["project"]["dependencies"],
        *(name for group in project["dependency-groups"].values() for name in group),
    ]
    names = {re.split(r"[<>=;~! ]", text)[0] for text in wanted}
    text = (ROOT / "docs" / "dependencies.md").read_text()
    rows = {
        cells[0]: cells[1:]
        for line in text.splitlines()
        if (cells := [cell.strip() for cell in line.strip("|").split("|")]) and line.startswith("|")
    }
    assert names <= set(rows)
    for name in names:
        assert len(rows[name]) == 3
        assert all(rows[name]), name


def test_every_package_of_set_up_is_explained() -> None:
    script = (ROOT / "scripts" / "packages.sh").read_text()
    lists = re.findall(r"^\s*(?:\[.*\|\| )?packages\+?=\((.*?)\)", script, re.DOTALL | re.MULTILINE)
    names = {
        word
        for text in lists
        for line in text.splitlines()
        for word in line.partition("#")[0].split()
    }
    assert "mmdebstrap" in names
    page = (ROOT / "docs" / "dependencies.md").read_text()
    assert [name for name in sorted(names) if name not in page] == []
