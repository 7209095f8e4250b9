"""Which VMM and isolation a host gives."""

from __future__ import annotations

import pytest

from banger.errors import InvalidInput, Unavailable
from banger.vmm.probe import KvmProbe
from banger.vmm.select import VmmChoice, choose_vmm

YES = KvmProbe(True, "/dev/kvm is usable")
NO = KvmProbe(False, "there is no /dev/kvm")


@pytest.mark.parametrize("wanted", ["auto", "qemu"])
def test_kvm_is_taken_where_it_is_usable(wanted: str) -> None:
    assert choose_vmm(wanted, YES) == VmmChoice("qemu", "kvm", YES.reason)


@pytest.mark.parametrize("wanted", ["auto", "qemu"])
def test_emulation_says_why(wanted: str) -> None:
    assert choose_vmm(wanted, NO) == VmmChoice("qemu", "tcg", NO.reason)


@pytest.mark.parametrize("kvm", [YES, NO])
def test_firecracker_is_never_replaced_by_something_else(kvm: KvmProbe) -> None:
    with pytest.raises(Unavailable, match="Firecracker"):
        choose_vmm("firecracker", kvm)


def test_unknown_vmm_suggests_the_nearest() -> None:
    with pytest.raises(InvalidInput) as caught:
        choose_vmm("qmeu", YES)
    assert caught.value.hint == "did you mean qemu?"
