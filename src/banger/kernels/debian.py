"""Debian kernels: one package of a suite, taken apart without being installed.

Owns what is picked out of the package's tree; `parts` says where it goes.

The package comes through apt's signed indexes; nothing of it runs but depmod, in the
chroot that mmdebstrap makes.
"""

from __future__ import annotations

import asyncio
import io
import re
import tarfile
from pathlib import Path

from banger.catalog import DebianKernel
from banger.errors import InvalidInput
from banger.events import EventSink
from banger.host.commands import HostCommands
from banger.host.files import make_private_directory, no_space_named
from banger.images.debian import mmdebstrap
from banger.images.ext4 import SOURCE_DATE_EPOCH, build_ext4
from banger.kernels import modules, parts, vmlinux
from banger.kernels.parts import KernelParts

# Of an `extract` variant only the extract hook runs, and links such as /lib64 may be missing
# from what is only unpacked: the loader is called by its own path. Kernel and depmod are of
# the same suite and agree on the place.
_DEPMOD_HOOK = """\
set -eu
cd "$1"
loader=$(ls usr/lib64/ld-linux-x86-64.so.2 lib64/ld-linux-x86-64.so.2 2>/dev/null | head -n 1)
depmod=$(ls usr/sbin/depmod sbin/depmod usr/bin/depmod 2>/dev/null | head -n 1)
base=$(ls -d usr/lib/modules lib/modules 2>/dev/null | head -n 1)
[ -e lib ] || ln -s usr/lib lib
for directory in "$base"/*; do
  chroot . "/$loader" --library-path /usr/lib/x86_64-linux-gnu:/lib/x86_64-linux-gnu \
    "/$depmod" -a "${directory##*/}"
done
"""
_MODULES_PREFIX = re.compile(r"(?:\./)?(?:usr/)?lib/modules/([^/]+)(?:/(.*))?")
_BOOT_FILE = re.compile(r"(?:\./)?boot/(vmlinuz|config)-(.+)")


async def build_debian_kernel(
    entry: DebianKernel,
    output: Path,
    *,
    commands: HostCommands,
    sink: EventSink,
    mirror: str | None,
    work: Path,
) -> KernelParts:
    """Fill `output` with the parts of an entry's kernel. `work` is a private directory."""
    tree = work / "kernel.tar"
    with no_space_named(work), open(tree, "xb") as stdout:
        await mmdebstrap(
            [
                "--variant=extract",
                # depmod opens liblzma by name, which no dependency says.
                f"--include={entry.package},liblzma5",
                f"--extract-hook={_DEPMOD_HOOK}",
            ],
            suite=entry.suite,
            mirror=mirror,
            stdout=stdout,
            commands=commands,
            sink=sink,
            temporary=make_private_directory(work / "tmp"),
        )
    sink.stage("taking the kernel apart")
    modules_tar = work / "modules.tar"
    found = await asyncio.to_thread(split_tree, tree, output, modules_tar)
    tree.unlink()
    await build_ext4(
        modules_tar,
        output / parts.MODULES,
        label=parts.MODULES_LABEL,
        commands=commands,
        sink=sink,
        work=work,
    )
    modules_tar.unlink()
    return found


def split_tree(tree: Path, output: Path, modules_tar: Path) -> KernelParts:
    """Sort a kernel's tree (a tar) into the artifact's files and a tar of its modules."""
    kept: dict[str, bytes] = {}
    files: dict[str, bytes] = {}
    release = ""
    with (
        no_space_named(output),
        tarfile.open(tree, "r:") as source,
        tarfile.open(modules_tar, "x:", format=tarfile.PAX_FORMAT) as sink,
    ):
        for member in source:
            content = source.extractfile(member) if member.isreg() else None
            if (match := _BOOT_FILE.fullmatch(member.name)) and content is not None:
                files[match[1]] = content.read()
            elif match := _MODULES_PREFIX.fullmatch(member.name):
                if release not in ("", match[1]):
                    raise InvalidInput(f"the package has two kernels: {release} and {match[1]}")
                release = match[1]
                path = match[2] or "."
                if path in ("build", "source"):
                    continue
                entry = tarfile.TarInfo(path if path == "." else f"./{path}")
                entry.type, entry.mode, entry.size = member.type, member.mode, member.size
                entry.mtime = min(int(member.mtime), SOURCE_DATE_EPOCH)
                entry.linkname = member.linkname
                if content is None:
                    sink.addfile(entry)
                    continue
                data = content.read()
                kept[path] = data
                sink.addfile(entry, io.BytesIO(data))
    if "vmlinuz" not in files or not release:
        raise InvalidInput("the package has no kernel image with modules")
    # Without a decoder depmod sees no symbols, and says nothing.
    if kept.get("modules.dep", b"").count(b".ko") < 2 or len(kept["modules.symbols"]) < 1024:
        raise InvalidInput(f"depmod did not read the modules of {release}")
    (output / parts.VMLINUX).write_bytes(vmlinux.extract_vmlinux(files["vmlinuz"]))
    (output / parts.CONFIG).write_bytes(files.get("config", b""))
    order = modules.load_order(
        modules.BOOT_MODULES,
        modules.parse_dependencies(kept["modules.dep"].decode()),
        frozenset(
            modules.module_name(line)
            for line in kept.get("modules.builtin", b"").decode().splitlines()
        ),
    )
    names = parts.write_boot_modules(output, order, kept.__getitem__)
    return KernelParts(release, names)
