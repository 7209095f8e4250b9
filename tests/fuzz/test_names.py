"""Names, sizes and the configuration, on whatever hypothesis thinks of."""

from __future__ import annotations

import contextlib
import json
import re

from hypothesis import example, given
from hypothesis import strategies as st

from banger.config import Config, parse_config
from banger.errors import BangerError, InvalidInput
from banger.types import check_vm_name, format_size, parse_size

# RFC 1123 section 2.1, in lower case: what may become a host name.
_LABEL = re.compile(r"\A[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")
_NAMEISH = st.text(alphabet="abz019-_.A /\n\0é", max_size=70)


@given(_NAMEISH | st.text(max_size=80))
@example("a\n")
@example("x" * 63)
@example("x" * 64)
def test_accepted_name_is_a_dns_label_that_is_no_number(name: str) -> None:
    try:
        accepted = check_vm_name(name)
    except InvalidInput as error:
        assert "\n" not in error.message
        assert not _LABEL.match(name) or name.isdigit()
    else:
        assert accepted == name
        assert _LABEL.match(name)
        assert not name.isdigit()


@given(st.integers(min_value=0, max_value=1 << 62))
def test_shown_size_reads_back_within_its_last_digit(size_bytes: int) -> None:
    shown = format_size(size_bytes)
    unit = 1 << {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}[shown.split()[1]]
    assert abs(parse_size(shown) - size_bytes) <= unit / 10


@given(st.integers(min_value=0, max_value=1023), st.sampled_from(["", "K", "M", "G", "T"]))
def test_whole_size_round_trips(count: int, unit: str) -> None:
    size_bytes = parse_size(f"{count}{unit}")
    assert parse_size(format_size(size_bytes)) == size_bytes


@given(st.text(max_size=40) | st.text(alphabet="0123456789.kKMGTiB -", max_size=20))
def test_size_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidInput):
        assert parse_size(text) >= 0


@given(
    st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "ignore"))
)
@example(b"vm = " + b"9" * 5000)
@example(b"vm = " + b"[" * 5000)
@example(b'[vm]\nmemory = "' + b"9" * 5000 + b'"')
def test_arbitrary_bytes_are_read_or_refused(text: bytes) -> None:
    with contextlib.suppress(BangerError):
        assert isinstance(parse_config(text, "config.toml"), Config)


_VALUES = st.recursive(
    st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=20)
    | st.sampled_from(["1G", "qemu", "none", "10.0.0.1", "debug", "9" * 400 + "T"]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(
    st.dictionaries(st.sampled_from(Config.__struct_fields__), _VALUES, max_size=5),
    st.dictionaries(st.sampled_from(["vcpu", "memory", "disk_size", "x"]), _VALUES, max_size=3),
)
def test_any_value_of_any_key_is_read_or_refused(
    keys: dict[str, object], vm: dict[str, object]
) -> None:
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    if "vm" not in keys:
        lines += ["[vm]", *(f"{key} = {json.dumps(value)}" for key, value in vm.items())]
    with contextlib.suppress(BangerError):
        assert isinstance(parse_config("\n".join(lines).encode(), "config.toml"), Config)
