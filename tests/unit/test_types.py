"""Names and sizes, checked at the edge."""

from __future__ import annotations

import pytest

from banger.errors import InvalidInput
from banger.types import (
    HostLimits,
    check_disk_size,
    check_memory,
    check_vcpu,
    check_vm_name,
    default_disk_size_bytes,
    default_memory_bytes,
    default_vcpu,
    format_size,
    generate_name,
    host_limits,
    parse_size,
)

MIB, GIB = 1 << 20, 1 << 30
HOST = HostLimits(cpus=4, memory_bytes=8 * GIB, disk_free_bytes=100 * GIB)


@pytest.mark.parametrize("name", ["a", "sandbox", "a-b", "1a", "x" * 63, "a--b"])
def test_dns_label_is_a_name(name: str) -> None:
    assert check_vm_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "A",
        "a_b",
        "-a",
        "a-",
        "a.b",
        "a b",
        "a\n",
        "x" * 64,
        "123",
        "ä",
        "a/b",
        "..",
        "a\0",
        "١a",
    ],
)
def test_anything_else_is_no_name(name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_vm_name(name)
    assert caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["My Box", "a_b", "-x-", "Ünïcode"])
def test_suggested_name_is_one(name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_vm_name(name)
    suggestion = caught.value.hint.rpartition(" ")[2]
    assert check_vm_name(suggestion) == suggestion


def test_generated_names_are_names_and_not_taken() -> None:
    taken: set[str] = set()
    for _ in range(500):
        name = generate_name(taken)
        assert check_vm_name(name) not in taken
        taken.add(name)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0), ("4096", 4096), ("1k", 1024), ("512M", 512 * MIB), ("512mb", 512 * MIB),
        ("512MiB", 512 * MIB), ("2GiB", 2 * GIB), ("1.5g", 3 * GIB // 2), (" 1 G ", GIB), ("1T", 1 << 40),
        ("0.5G", GIB // 2), ("9007199254740993", 9007199254740993),
    ],
)  # fmt: skip
def test_size_is_read_in_powers_of_1024(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "G", "-1G", "1.5", "1e9", "1 G B", "0x10", "1P", "1..5G", "nan", "1_000"]
)
def test_anything_else_is_no_size(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_size(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (512 * MIB, "512 MiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_size_is_shown_in_its_largest_unit(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@pytest.mark.parametrize(("cpus", "vcpu"), [(1, 1), (2, 2), (3, 2), (4, 2), (8, 4), (64, 8)])
def test_default_vcpu_is_half_of_the_host(cpus: int, vcpu: int) -> None:
    assert default_vcpu(HOST._replace(cpus=cpus)) == vcpu


@pytest.mark.parametrize(("host_gib", "mib"), [(1, 512), (4, 1024), (8, 2048), (256, 8192)])
def test_default_memory_is_a_quarter_of_the_host(host_gib: int, mib: int) -> None:
    assert default_memory_bytes(HOST._replace(memory_bytes=host_gib * GIB)) == mib * MIB


@pytest.mark.parametrize(("free_gib", "gib"), [(1, 8), (40, 20), (1000, 64)])
def test_default_disk_is_half_of_what_is_free(free_gib: int, gib: int) -> None:
    assert default_disk_size_bytes(HOST._replace(disk_free_bytes=free_gib * GIB)) == gib * GIB


def test_defaults_of_this_host_pass_their_checks(tmp_path: object) -> None:
    limits = host_limits(str(tmp_path))
    check_vcpu(default_vcpu(limits), limits)
    check_memory(default_memory_bytes(limits), limits)
    check_disk_size(default_disk_size_bytes(limits))


@pytest.mark.parametrize("count", [0, -1, 9, 10**9])
def test_absurd_vcpu_count_is_refused(count: int) -> None:
    with pytest.raises(InvalidInput, match="1 to 8"):
        check_vcpu(count, HOST)


@pytest.mark.parametrize("size_bytes", [0, -1, 128 * MIB - 1, 8 * GIB + 1, 1 << 80])
def test_absurd_memory_is_refused(size_bytes: int) -> None:
    with pytest.raises(InvalidInput, match="128 MiB to 8 GiB"):
        check_memory(size_bytes, HOST)


@pytest.mark.parametrize("size_bytes", [0, -1, 256 * MIB - 1, (16 << 40) + 1])
def test_absurd_disk_is_refused(size_bytes: int) -> None:
    with pytest.raises(InvalidInput, match="256 MiB to 16 TiB"):
        check_disk_size(size_bytes)


def test_sizes_are_cut_to_whole_mib() -> None:
    assert check_memory(512 * MIB + 5, HOST) == 512 * MIB
    assert check_disk_size(GIB + 5) == GIB
