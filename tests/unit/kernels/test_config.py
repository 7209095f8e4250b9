"""A kernel's configuration: read from text, and out of an image."""

from __future__ import annotations

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.errors import InvalidInput
from banger.kernels import config
from tests.support.kernels import make_elf


def test_options_are_read_and_comments_are_not() -> None:
    text = '# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_C=m\nCONFIG_D="a=b"\n\nnoise\n'
    assert config.parse_config(text) == {"B": "y", "C": "m", "D": '"a=b"'}


def test_the_copy_in_an_image_is_found_behind_look_alikes() -> None:
    decoy = b"IKCFG_ST" + b"\x1f\x8b garbage" + b"IKCFG_ST" + gzip.compress(b"text") + b"IKCFG_ED"
    elf = make_elf(content=decoy, config="CONFIG_X=y\n")
    assert config.embedded_config(elf) == b"CONFIG_X=y\n"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        make_elf(),
        b"IKCFG_ST" + gzip.compress(b"CONFIG_X=y\n")[:-9],
        b"IKCFG_ST" + gzip.compress(b"CONFIG_X=y\n") + b"no end",
        b"IKCFG_ST" + gzip.compress(b"CONFIG_X=y\n" + bytes(8 << 20)) + b"IKCFG_ED",
    ],
    ids=["empty", "none", "cut off", "no end", "bomb"],
)
def test_without_a_whole_copy_there_is_none(data: bytes) -> None:
    assert config.embedded_config(data) is None


@given(st.binary(max_size=100))
def test_noise_is_no_configuration(noise: bytes) -> None:
    assert config.embedded_config(b"IKCFG_ST\x1f\x8b" + noise) is None


@pytest.mark.parametrize("data", [b"", b"text\n", b"CONFIG_X=y\n\0", b"#" * (5 << 20)])
def test_a_file_that_is_no_configuration_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(InvalidInput, match=r"some/\.config"):
        config.checked_config(data, "some/.config")
