"""The kernel's and the VMMs' limits on names, with the longest that we ever give them."""

from __future__ import annotations

from pathlib import Path

import pytest

from banger.errors import InvalidInput, Unavailable
from banger.network.plan import parse_bridge, tap_name
from banger.paths import find_paths
from banger.services.boot import kernel_command_line
from banger.types import check_vm_name
from banger.vmm.base import check_socket_path, mark_of

VM_ID = "f" * 12
LONGEST = "x" * 63


def test_no_name_of_a_vm_reaches_an_interface_a_path_or_the_kernels_command_line() -> None:
    """So none can break them: they carry ids, and a name has its own bound."""
    assert check_vm_name(LONGEST) == LONGEST
    with pytest.raises(InvalidInput):
        check_vm_name(LONGEST + "x")
    bridge = parse_bridge("br-bangerzzzzzz", "172.16.0.1", "172.16.0.0/24")
    assert len(bridge.name) <= 15  # IFNAMSIZ
    assert len(tap_name(bridge, "f" * 8)) <= 15
    for accel in ("kvm", "tcg"):
        for vmm in ("qemu", "firecracker"):
            assert len(kernel_command_line(accel, vmm)) < 2048 // 2  # COMMAND_LINE_SIZE


def test_the_mark_is_an_id_that_firecracker_and_its_jailer_take() -> None:
    runtime = Path(find_paths({"HOME": "/home/somebody"}).runtime_dir) / "vms" / VM_ID
    mark = mark_of(VM_ID, runtime)
    assert len(mark) <= 64
    assert mark.replace("-", "").isalnum()


@pytest.mark.parametrize("base", ["/run/user/4294967295", "/" + "r" * 47, "/" + "r" * 500])
def test_sockets_fit_whatever_the_runtime_directory_is(base: str) -> None:
    runtime = find_paths({"HOME": "/home/somebody", "XDG_RUNTIME_DIR": base}).runtime_dir
    for socket in ("qmp.sock", "p11.lock", "jail/fc.sock"):
        check_socket_path(Path(runtime) / "vms" / VM_ID / socket)


def test_a_socket_path_that_is_too_long_says_what_to_do() -> None:
    with pytest.raises(Unavailable, match="longer than 107 bytes") as caught:
        check_socket_path(Path("/" + "x" * 107))
    assert "XDG_RUNTIME_DIR" in caught.value.hint
    check_socket_path(Path("/" + "x" * 106))
