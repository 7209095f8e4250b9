"""The catalog as it ships, and what is said of one that is wrong."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from banger import catalog
from banger.errors import Corrupted, NotFound

ENTRY = "[images.x]\nkind='debian'\ndescription='d'\nsuite='s'\nvariant='apt'\n"


def test_the_shipped_catalog_reads() -> None:
    assert {"debian-bookworm", "debian-bookworm-minimal"} <= catalog.catalog_images().keys()
    assert {"generic-6.12", "generic-6.1"} <= catalog.catalog_kernels().keys()
    full = catalog.image_entry("debian-bookworm")
    assert {"docker.io", "openssh-server", "git", "jq", "ripgrep"} <= set(full.packages)
    assert full.npm[0].path == "/usr/local/bin/mise"


def test_a_text_of_the_catalog_names_no_host() -> None:
    for file in ("images.toml", "kernels.toml"):
        text = resources.files("banger.catalog").joinpath(file).read_text("utf-8")
        assert not re.search(r"https?:|\.(org|com|net|io)/", text)


def test_sshd_takes_keys_only() -> None:
    (sshd,) = [
        file
        for file in catalog.image_entry("debian-bookworm").files
        if file.path.startswith("/etc/ssh/")
    ]
    lines = sshd.text.splitlines()
    assert "PasswordAuthentication no" in lines
    assert "PermitRootLogin yes" in lines
    assert "StrictModes no" in lines


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(NotFound) as caught:
        catalog.image_entry("debian-bokworm")
    assert "debian-bookworm" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[images.x]\nkind = 'oci'\n", "unknown kind 'oci'"),
        ("[images.x]\ndescription = 'd'\n", "unknown kind None"),
        ("[images.x]\nkind = 'debian'\n", "missing required field"),
        ("[images.x\n", "is not TOML"),
        (
            ENTRY + "capacity_mib=5\npackages=[]\nset='nowhere'\n",
            "no set or file 'nowhere'",
        ),
        (
            ENTRY + "capacity_mib='5'\npackages=[]\n",
            "Expected `int`",
        ),
    ],
)
def test_a_wrong_catalog_says_where(text: str, words: str) -> None:
    with pytest.raises(Corrupted, match=words):
        catalog.parse_images(text)


def test_a_wrong_kernel_kind_says_what_there_is() -> None:
    with pytest.raises(Corrupted) as caught:
        catalog.parse_kernels("[kernels.k]\nkind = 'bundle'\n")
    assert caught.value.hint == "the kinds are: debian"
