"""The table of what a kernel must have, and one kernel held against it."""

from __future__ import annotations

import pytest

from banger.kernels import features
from banger.kernels.config import parse_config
from tests.support.kernels import full_config

NONE: frozenset[str] = frozenset()


def check(config: str, early=NONE, modules=NONE, pvh: bool = True) -> dict[str, features.Finding]:
    found = features.check_features(
        parse_config(config), early_modules=early, modules=modules, pvh=pvh
    )
    assert len(found) == len(features.FEATURES)
    return {finding.option: finding for finding in found}


def test_all_built_in_is_all_there() -> None:
    assert {finding.state for finding in check(full_config()).values()} == {"built in"}


def test_an_empty_kernel_lacks_every_required_row() -> None:
    found = list(check("", pvh=False).values())
    lacking = features.missing_required(found)
    assert {finding.option for finding in lacking} == {
        row.options[0][0] for row in features.FEATURES if row.need == "required"
    }
    assert {f.group for f in features.missing_required(found, "docker")} == {"docker"}


@pytest.mark.parametrize(
    ("early", "modules", "state"),
    [
        (NONE, NONE, "missing"),
        (frozenset({"overlay"}), NONE, "module"),
        # On the modules' disk it comes too late to mount anything.
        (NONE, frozenset({"overlay"}), "missing"),
    ],
)
def test_an_early_module_counts_in_the_initramfs_alone(early, modules, state) -> None:
    found = check(full_config(OVERLAY_FS="m"), early, modules)["OVERLAY_FS"]
    assert found.state == state
    assert ("overlay" in found.note) == (state == "missing")


def test_a_later_module_counts_on_either_disk() -> None:
    config = full_config(VETH="m")
    assert check(config)["VETH"].state == "missing"
    assert check(config, modules=frozenset({"veth"}))["VETH"].state == "module"
    assert check(config, early=frozenset({"veth"}))["VETH"].state == "module"


def test_what_cannot_be_a_module_counts_built_in_only() -> None:
    assert check(full_config(ACPI="m"), modules=frozenset({"acpi"}))["ACPI"].state == "missing"


def test_nftables_stands_in_for_legacy_iptables() -> None:
    config = full_config(IP_NF_FILTER="n", NFT_COMPAT="y")
    assert check(config)["NFT_COMPAT"].state == "built in"
    without = full_config(IP_NF_FILTER="n", NFT_COMPAT="n")
    assert check(without)["IP_NF_FILTER"].state == "missing"


def test_the_image_itself_tells_of_its_pvh_entry() -> None:
    assert check(full_config(PVH="y"), pvh=False)["PVH"].state == "missing"
    assert check(full_config(PVH="n"), pvh=True)["PVH"].state == "built in"


def test_every_early_module_is_one_the_initramfs_is_given() -> None:
    from banger.kernels.modules import BOOT_MODULES

    early = {m for row in features.FEATURES if row.early for _, m in row.options if m}
    assert early - {"unix"} <= set(BOOT_MODULES)  # AF_UNIX cannot be loaded by what needs it
