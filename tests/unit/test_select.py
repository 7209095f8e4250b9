"""Which VMM and isolation a host gives."""

from __future__ import annotations

import pytest

from banger.errors import InvalidInput, Unavailable
from banger.vmm.probe import KvmProbe
from banger.vmm.select import VmmChoice, choose_vmm

YES = KvmProbe(True, "/dev/kvm is usable")
NO = KvmProbe(False, "there is no /dev/kvm")


ABSENT = "Firecracker is not installed"


@pytest.mark.parametrize("wanted", ["auto", "firecracker"])
def test_firecracker_is_the_first_choice_where_kvm_is_usable(wanted: str) -> None:
    assert choose_vmm(wanted, YES, "") == VmmChoice("firecracker", "kvm", YES.reason)


def test_without_firecracker_qemu_takes_kvm_and_says_why() -> None:
    choice = choose_vmm("auto", YES, ABSENT)
    assert choice == VmmChoice("qemu", "kvm", f"{YES.reason}; {ABSENT}")


def test_qemu_is_taken_where_it_is_asked_for() -> None:
    assert choose_vmm("qemu", YES, "") == VmmChoice("qemu", "kvm", YES.reason)


@pytest.mark.parametrize("wanted", ["auto", "qemu"])
@pytest.mark.parametrize("no_firecracker", ["", ABSENT])
def test_emulation_says_why(wanted: str, no_firecracker: str) -> None:
    assert choose_vmm(wanted, NO, no_firecracker) == VmmChoice("qemu", "tcg", NO.reason)


def test_firecracker_is_never_replaced_by_something_else() -> None:
    with pytest.raises(Unavailable, match="needs KVM, and there is no /dev/kvm"):
        choose_vmm("firecracker", NO, "")
    with pytest.raises(Unavailable, match=ABSENT):
        choose_vmm("firecracker", YES, ABSENT)


def test_unknown_vmm_suggests_the_nearest() -> None:
    with pytest.raises(InvalidInput) as caught:
        choose_vmm("qmeu", YES, "")
    assert caught.value.hint == "did you mean qemu?"
