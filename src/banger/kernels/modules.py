"""Kernel modules: which are needed to boot, in which order, and without their compression.

Owns modules.dep and modules.builtin as text, and a module's compression. Reads no file.
"""

from __future__ import annotations

import lzma
import posixpath
import zlib

from banger.errors import InvalidInput
from banger.kernels.vmlinux import zstd

# What the agent needs before it can mount anything or talk to the host. virtio_ring must
# be there before virtio; modules.dep does not always say so, hence this order.
BOOT_MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "crc32c_generic",
    "libcrc32c",
    "ext4",
    "overlay",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
)
# Without these no machine of ours comes up; the others may be left out of a kernel.
REQUIRED_MODULES = frozenset({"virtio", "virtio_mmio", "virtio_blk", "overlay", "ext4"})
_MAX_MODULE_BYTES = 64 * 1024 * 1024
_MAX_CHAIN = 100  # Debian's longest is 9


def module_name(path: str) -> str:
    """Return the name the kernel knows a module file by."""
    return posixpath.basename(path).split(".ko", 1)[0].replace("-", "_")


def parse_dependencies(text: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return, from modules.dep, each module's path and the names it depends on."""
    modules = {}
    for line in text.splitlines():
        path, colon, rest = line.partition(":")
        if colon:
            modules[module_name(path)] = (path, tuple(module_name(word) for word in rest.split()))
    return modules


def load_order(
    wanted: tuple[str, ...],
    dependencies: dict[str, tuple[str, tuple[str, ...]]],
    builtin: frozenset[str],
    *,
    required: frozenset[str] = REQUIRED_MODULES,
) -> list[str]:
    """Return the paths of the wanted modules and all they need, each after what it needs.

    A wanted module that the kernel has neither as a file nor built in is left out, unless
    it is one of `required`: that raises InvalidInput.
    """
    order: list[str] = []
    done: set[str] = set()

    def add(name: str, chain: tuple[str, ...]) -> None:
        if name in done or name in builtin:
            return
        if name in chain:
            raise InvalidInput(f"the kernel's modules depend on each other: {' -> '.join(chain)}")
        if len(chain) > _MAX_CHAIN:
            raise InvalidInput(f"the kernel's module {chain[0]} needs a chain of {len(chain)}")
        if name not in dependencies:
            if name in required or chain:
                raise InvalidInput(
                    f"the kernel has no module {name}",
                    hint="take a kernel with virtio over MMIO, ext4 and overlayfs, "
                    "such as generic-6.12",
                )
            return
        path, needed = dependencies[name]
        for other in needed:
            add(other, (*chain, name))
        done.add(name)
        order.append(path)

    for name in wanted:
        add(name, ())
    return order


def decompress_module(path: str, data: bytes) -> bytes:
    """Return a module's ELF whatever its file's compression (xz, gzip, zstd, none)."""
    ended = True
    try:
        if path.endswith(".xz"):
            xz = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            data, ended = xz.decompress(data, _MAX_MODULE_BYTES), xz.eof
        elif path.endswith(".gz"):
            gzip = zlib.decompressobj(wbits=31)
            data, ended = gzip.decompress(data, _MAX_MODULE_BYTES), gzip.eof
        elif path.endswith(".zst"):
            data = zstd(data, _MAX_MODULE_BYTES, f"the module {path}")
    except (lzma.LZMAError, zlib.error) as error:
        raise InvalidInput(f"the module {path} does not decompress: {error}") from error
    if not ended:
        raise InvalidInput(f"the module {path} is cut off or above 64 MiB")
    if data[:4] != b"\x7fELF":
        raise InvalidInput(f"the module {path} is not an ELF")
    return data
