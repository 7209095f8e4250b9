"""The cpio archives a guest starts from, read back by a reader written for the test and by cpio."""

from __future__ import annotations

import base64
import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.errors import Corrupted, InvalidInput
from banger.guest import boot

component = st.binary(min_size=1, max_size=40).filter(
    lambda b: b"\0" not in b and b"/" not in b and b not in (b".", b"..", b"TRAILER!!!")
)
entries = st.lists(
    st.builds(
        boot.CpioEntry,
        name=st.lists(component, min_size=1, max_size=3).map(b"/".join),
        mode=st.sampled_from([0o644, 0o600, 0o755]).map(lambda mode: stat.S_IFREG | mode),
        data=st.binary(max_size=300),
        device=st.just((0, 0)),
    ),
    max_size=6,
)


def read_cpio(archive: bytes) -> list[boot.CpioEntry]:
    """Read newc archives one after the other, with zeros between them, as the kernel does."""
    found, at = [], 0
    while at < len(archive):
        if archive[at] == 0:
            at += 1
            continue
        assert at % 4 == 0
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + 110 : at + 110 + fields[11]]
        assert name[-1:] == b"\0"
        at += -(-(110 + fields[11]) // 4) * 4
        data = archive[at : at + fields[6]]
        at += -(-fields[6] // 4) * 4
        if name != b"TRAILER!!!\0":
            found.append(boot.CpioEntry(name[:-1], fields[1], data, (fields[9], fields[10])))
    return found


@given(entries, entries)
def test_archives_one_after_the_other_read_back(first, second) -> None:
    joined = boot.cpio_archive(first) + boot.cpio_archive(second)
    assert read_cpio(joined) == [*first, *second]


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")
def test_cpio_lists_what_was_written() -> None:
    archive = boot.cpio_archive(
        [
            boot.directory_entry("dev"),
            boot.CpioEntry(b"dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
            boot.file_entry("init", b"#!", 0o755),
            boot.file_entry("odd", b"12345", 0o600),
        ]
    )
    listed = subprocess.run(
        ["cpio", "-tv", "--quiet"], input=archive, capture_output=True, check=True
    ).stdout.decode()
    assert [line.split()[0] for line in listed.splitlines()] == [
        "drwxr-xr-x", "crw-------", "-rwxr-xr-x", "-rw-------",
    ]  # fmt: skip
    assert "5,   1" in listed


@pytest.mark.parametrize("name", [b"", b"/init", b"a\0b", b"TRAILER!!!", b"n" * 5000])
def test_names_the_kernel_would_not_unpack_are_refused(name: bytes) -> None:
    with pytest.raises(InvalidInput):
        boot.cpio_archive([boot.CpioEntry(name, stat.S_IFREG | 0o644)])


def make_kernel(directory: Path) -> Path:
    modules = directory / "boot-modules"
    modules.mkdir(parents=True)
    (modules / "list").write_text("virtio_mmio\noverlay\n")
    (modules / "virtio_mmio.ko").write_bytes(b"\x7fELF mmio")
    (modules / "overlay.ko").write_bytes(b"\x7fELF overlay")
    return directory


def test_base_segment_holds_agent_and_modules_in_order(tmp_path: Path) -> None:
    agent = tmp_path / "agent"
    agent.write_bytes(b"\x7fELF agent")
    kernel = make_kernel(tmp_path / "k")
    segment = boot.base_segment(kernel, cache_dir=tmp_path / "c", agent=agent)
    found = {entry.name: entry for entry in read_cpio(segment.read_bytes())}
    assert found[b"init"].data == b"\x7fELF agent"
    assert found[b"init"].mode == stat.S_IFREG | 0o755
    assert found[b"banger/modules.list"].data == b"virtio_mmio\noverlay\n"
    assert found[b"banger/modules/overlay.ko"].data == b"\x7fELF overlay"
    assert found[b"dev/console"].device == (5, 1)


def test_base_segment_is_kept_until_agent_or_kernel_change(tmp_path: Path) -> None:
    agent = tmp_path / "agent"
    agent.write_bytes(b"\x7fELF agent")
    kernel = make_kernel(tmp_path / "k")
    first = boot.base_segment(kernel, cache_dir=tmp_path / "c", agent=agent)
    made = first.stat().st_mtime_ns
    assert boot.base_segment(kernel, cache_dir=tmp_path / "c", agent=agent) == first
    assert first.stat().st_mtime_ns == made
    first.unlink()  # swept from the cache
    assert boot.base_segment(kernel, cache_dir=tmp_path / "c", agent=agent) == first
    assert first.exists()
    agent.write_bytes(b"\x7fELF newer")
    second = boot.base_segment(kernel, cache_dir=tmp_path / "c", agent=agent)
    assert second != first
    (kernel / "boot-modules" / "overlay.ko").write_bytes(b"\x7fELF other")
    assert boot.base_segment(kernel, cache_dir=tmp_path / "c", agent=agent) not in (first, second)


def test_a_kernel_without_its_modules_is_named(tmp_path: Path) -> None:
    agent = tmp_path / "agent"
    agent.write_bytes(b"x")
    kernel = make_kernel(tmp_path / "generic-6.12")
    (kernel / "boot-modules" / "overlay.ko").unlink()
    with pytest.raises(Corrupted, match=r"kernel generic-6\.12 is corrupted") as caught:
        boot.base_segment(kernel, cache_dir=tmp_path / "c", agent=agent)
    assert "banger kernel pull --force generic-6.12" in caught.value.hint


def test_the_initramfs_of_a_vm_is_private_and_ends_with_its_configuration(tmp_path: Path) -> None:
    base = tmp_path / "base.cpio"
    base.write_bytes(boot.cpio_archive([boot.file_entry("init", b"i")]))
    boot.write_initramfs(tmp_path / "initramfs", base, {"version": 1, "hostname": "h"})
    out = tmp_path / "initramfs"
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    last = read_cpio(out.read_bytes())[-1]
    assert last.name == b"banger/boot.json"
    assert last.mode == stat.S_IFREG | 0o600
    assert json.loads(last.data) == {"version": 1, "hostname": "h"}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["base.cpio", "initramfs"]


def content_of(config: dict, path: str) -> tuple[str, int]:
    (entry,) = [file for file in config["files"] if file["path"] == path]
    return base64.b64decode(entry["content_b64"]).decode(), entry["mode"]


def test_boot_configuration_gives_the_guest_its_identity() -> None:
    config = boot.boot_config(
        hostname="box",
        machine_id="0" * 31 + "1",
        network=boot.GuestNetwork("10.0.2.15/24", "10.0.2.2", ("10.0.2.3",)),
        authorized_key="ssh-ed25519 AAAA banger\n",
        host_keys={"ssh_host_ed25519_key": b"PRIVATE", "ssh_host_ed25519_key.pub": b"PUBLIC"},
        time_unix_ns=5,
    )
    assert config["version"] == 1
    assert config["time_unix_ns"] == 5
    assert config["network"] == {
        "interface": "eth0",
        "address_cidr": "10.0.2.15/24",
        "gateway": "10.0.2.2",
        "dns": ["10.0.2.3"],
    }
    assert content_of(config, "/etc/hostname") == ("box\n", 0o644)
    assert "127.0.1.1\tbox\n" in content_of(config, "/etc/hosts")[0]
    assert content_of(config, "/etc/machine-id")[0] == "0" * 31 + "1\n"
    assert "nameserver 10.0.2.3\n" in content_of(config, "/etc/resolv.conf")[0]
    assert content_of(config, "/root/.ssh/authorized_keys") == ("ssh-ed25519 AAAA banger\n", 0o600)
    assert content_of(config, "/etc/ssh/ssh_host_ed25519_key") == ("PRIVATE", 0o600)
    assert content_of(config, "/etc/ssh/ssh_host_ed25519_key.pub") == ("PUBLIC", 0o644)
    modes = {entry["path"]: entry["mode"] for entry in config["directories"]}
    assert modes["/root/.ssh"] == 0o700
    json.dumps(config)


def test_without_a_network_the_resolver_is_left_alone() -> None:
    config = boot.boot_config(
        hostname="box", machine_id="1" * 32, network=None, authorized_key="k", host_keys={}
    )
    assert config["network"] is None
    assert "/etc/resolv.conf" not in [file["path"] for file in config["files"]]
