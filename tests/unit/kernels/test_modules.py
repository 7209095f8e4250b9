"""Which modules a kernel boots with, and in which order."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.errors import InvalidInput
from banger.kernels import debian, modules
from tests.support.kernels import bzimage
from tests.unit.kernels.test_vmlinux import ELF

DEP = """\
kernel/drivers/virtio/virtio_mmio.ko.xz:
kernel/drivers/block/virtio_blk.ko.xz:
kernel/drivers/net/virtio_net.ko.xz: kernel/net/core/net_failover.ko.xz kernel/net/failover.ko.xz
kernel/net/core/net_failover.ko.xz: kernel/net/failover.ko.xz
kernel/net/failover.ko.xz:
kernel/drivers/char/hw_random/virtio-rng.ko.xz:
kernel/fs/overlayfs/overlay.ko.xz:
"""
BUILTIN = frozenset({"virtio", "virtio_ring", "ext4", "virtio_console"})


def test_what_a_module_needs_is_loaded_before_it() -> None:
    order = modules.load_order(modules.BOOT_MODULES, modules.parse_dependencies(DEP), BUILTIN)
    assert [modules.module_name(path) for path in order] == [
        "virtio_mmio", "virtio_blk", "failover", "net_failover", "virtio_net", "virtio_rng",
        "overlay",
    ]  # fmt: skip


@given(st.data())
def test_order_respects_any_graph_without_cycles(data) -> None:
    names = [f"m{number}" for number in range(8)]
    graph = {
        name: (f"x/{name}.ko", tuple(data.draw(st.sets(st.sampled_from(names[:i]))) if i else ()))
        for i, name in enumerate(names)
    }
    wanted = tuple(data.draw(st.permutations(names)))
    order = [modules.module_name(path) for path in modules.load_order(wanted, graph, frozenset())]
    assert sorted(order) == names
    for name, (_, needs) in graph.items():
        assert all(order.index(need) < order.index(name) for need in needs)


def test_a_cycle_is_refused() -> None:
    graph = {"a": ("a.ko", ("b",)), "b": ("b.ko", ("a",))}
    with pytest.raises(InvalidInput, match="depend on each other"):
        modules.load_order(("a",), graph, frozenset())


def test_a_chain_without_end_is_refused() -> None:
    graph = {f"m{n}": (f"m{n}.ko", (f"m{n + 1}",)) for n in range(5000)}
    with pytest.raises(InvalidInput, match="chain"):
        modules.load_order(("m0",), graph, frozenset())


def test_a_kernel_without_virtio_blk_is_refused() -> None:
    graph = modules.parse_dependencies(DEP)
    del graph["virtio_blk"]
    with pytest.raises(InvalidInput, match="no module virtio_blk"):
        modules.load_order(modules.BOOT_MODULES, graph, BUILTIN)


@pytest.mark.parametrize(
    ("path", "data"),
    [("a.ko", ELF), ("a.ko.xz", lzma.compress(ELF)), ("a.ko.gz", gzip.compress(ELF))],
)
def test_a_module_is_decompressed(path: str, data: bytes) -> None:
    assert modules.decompress_module(path, data) == ELF


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("a.ko", b"text"),
        ("a.ko.xz", b"xx"),
        ("a.ko.gz", b"yy"),
        ("a.ko.zst", b"zz"),
        ("a.ko.xz", lzma.compress(ELF)[:-40]),
        ("a.ko.gz", gzip.compress(ELF)[:-9]),
        ("a.ko.gz", gzip.compress(ELF + bytes(65 << 20))),
    ],
)
def test_a_damaged_module_is_refused(path: str, data: bytes) -> None:
    with pytest.raises(InvalidInput):
        modules.decompress_module(path, data)


def make_tree(path: Path, *, symbols: bytes = b"s" * 2000, prefix: str = "usr/lib") -> Path:
    base = f"./{prefix}/modules/6.1.0-test"
    files = {
        "./boot/vmlinuz-6.1.0-test": bzimage(lzma.compress(ELF)),
        "./boot/config-6.1.0-test": b"CONFIG_X=y\n",
        f"{base}/modules.dep": DEP.encode(),
        f"{base}/modules.symbols": symbols,
        f"{base}/modules.builtin": b"".join(
            b"kernel/%s.ko\n" % n.encode() for n in sorted(BUILTIN)
        ),
        **{f"{base}/{line.split(':')[0]}": lzma.compress(ELF) for line in DEP.splitlines()},
        "./etc/passwd": b"not ours",
    }
    with tarfile.open(path, "w") as archive:
        root = tarfile.TarInfo(base)
        root.type, root.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(root)
        build = tarfile.TarInfo(f"{base}/build")
        build.type, build.linkname = tarfile.SYMTYPE, "/usr/src/x"
        archive.addfile(build)
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("prefix", ["usr/lib", "lib"])
def test_a_package_is_sorted_into_the_artifact(tmp_path: Path, prefix: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    tree = make_tree(tmp_path / "k.tar", prefix=prefix)
    parts = debian.split_tree(tree, out, tmp_path / "m.tar")
    assert parts.release == "6.1.0-test"
    assert (out / "vmlinux").read_bytes() == ELF
    assert (out / "config").read_bytes() == b"CONFIG_X=y\n"
    assert (out / "boot-modules" / "list").read_text().split() == list(parts.boot_modules)
    assert (out / "boot-modules" / "virtio_rng.ko").read_bytes() == ELF
    with tarfile.open(tmp_path / "m.tar") as archive:
        names = archive.getnames()
    assert "./modules.dep" in names
    assert "./build" not in names
    assert not any("passwd" in name or "boot" in name for name in names)


def test_a_depmod_that_saw_no_symbols_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    tree = make_tree(tmp_path / "k.tar", symbols=b"# none\n")
    with pytest.raises(InvalidInput, match="depmod did not read the modules"):
        debian.split_tree(tree, tmp_path / "out", tmp_path / "m.tar")
