"""Kernels from a directory: found, checked, and installed as those of the catalog are.

Owns what is looked for and where (an unpacked package, /boot and /lib/modules of a root file
system, a build tree, or files named one by one), and what a kernel is refused for. Everything
read may be hostile: see `tree` for how, `vmlinux` and `elf` for the image. Nothing of it runs;
the host's depmod reads the modules when their tree has no index.
"""

from __future__ import annotations

import asyncio
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

from banger.errors import Conflict, InvalidInput, Unavailable
from banger.events import EventSink
from banger.host.commands import HostCommands
from banger.host.files import no_space_named
from banger.images import artifacts
from banger.images.artifacts import KernelManifest
from banger.images.ext4 import build_ext4
from banger.kernels import features, modules
from banger.kernels.config import (
    MAX_CONFIG_BYTES,
    checked_config,
    embedded_config,
    parse_config,
)
from banger.kernels.elf import Elf, read_elf
from banger.kernels.parts import (
    BOOT_MODULES,
    CONFIG,
    MODULES,
    MODULES_LABEL,
    VMLINUX,
    KernelParts,
    install_parts,
    write_boot_modules,
)
from banger.kernels.tree import ModulesCopy, Tree, empty_copy, is_module, read_file, unpack_copy
from banger.kernels.vmlinux import MAX_VMLINUX_BYTES, extract_vmlinux

_KERNEL_PLACES = ("", "boot", "arch/x86/boot")
_KERNEL_NAME = re.compile(r"(vmlinux|bzImage|vmlinuz)(?:-(.+))?")
_CONFIG_PLACES = ("", "boot")
_MODULES_PLACES = ("lib/modules", "usr/lib/modules", "modules")
_RELEASE = re.compile(r"[0-9A-Za-z][0-9A-Za-z._+~-]{0,63}")
_INDEXES = ("modules.dep", "modules.order", "modules.builtin")
_MAX_INDEX_BYTES = 64 * 1024 * 1024
_MAX_MODULE_FILE_BYTES = 256 * 1024 * 1024
_DEPMOD_TIMEOUT_S = 300
_FEW_MODULES = 20
_VERMAGIC = re.compile(rb"\0vermagic=([0-9A-Za-z._+~-]{1,64}) ")


class ImportSource(NamedTuple):
    """Where a kernel is: a directory to look in, and what the user named instead."""

    directory: Path
    kernel: Path | None = None
    modules: Path | None = None
    config: Path | None = None


class _Image(NamedTuple):
    elf: Elf
    config: bytes


class _ModulesTree(NamedTuple):
    """A tree of modules: the directory to open, the path below it, and whose its name says."""

    root: Path
    path: str
    release: str | None


async def import_kernel(
    name: str,
    source: ImportSource,
    *,
    data_dir: Path,
    commands: HostCommands,
    sink: EventSink,
    force: bool = False,
) -> KernelManifest:
    """Make a kernel of files on this host and install it; whole or absent.

    `force` replaces an installed one, and takes a kernel that lacks what a machine needs or
    whose modules are another kernel's. Raises Conflict when the name is taken, InvalidInput with
    what is missing or damaged.
    """
    if not force and artifacts.artifact_directory(data_dir, "kernel", name).exists():
        raise Conflict(
            f"kernel {name} is installed already",
            hint=f"take another name, or `banger kernel import {name} --force` with the same "
            "options to replace it",
        )
    async with artifacts.staging(data_dir, "kernel", name) as staged:
        output, work = staged / "artifact", staged / "work"
        output.mkdir(mode=0o700)
        work.mkdir(mode=0o700)
        sink.stage("reading the kernel image")
        image = await asyncio.to_thread(_take_image, source, output)
        sink.stage("collecting the modules")
        release = image.elf.release
        tree = await asyncio.to_thread(_find_modules, source, release, force=force)
        tar = work / "modules.tar"
        copy = await asyncio.to_thread(_copy_modules, tree, tar)
        if copy.modules and not {"modules.dep", "modules.dep.bin"} <= copy.sizes.keys():
            sink.stage("indexing the modules")
            tar, copy = await _index_modules(tar, work, release, commands)
        sink.stage("checking the kernel")
        parts, warnings = await asyncio.to_thread(
            _take_boot_modules, tar, copy, image, output, force=force
        )
        for warning in warnings:
            sink.warning(warning)
        sink.stage("writing the modules' file system")
        await build_ext4(
            tar, output / MODULES, label=MODULES_LABEL, commands=commands, sink=sink, work=work
        )
        sink.stage("installing the kernel")
        return await install_parts(
            output,
            data_dir,
            parts,
            name=name,
            origin=f"import:{source.directory}",
            description=f"Linux {release}, imported",
            force=force,
        )


# --- the image and its configuration


def _take_image(source: ImportSource, output: Path) -> _Image:
    """Find the image, write its ELF, and find its configuration."""
    with Tree(source.directory) as tree:
        if source.kernel is not None:
            shown = str(source.kernel)
            raw = read_file(source.kernel, MAX_VMLINUX_BYTES)
        else:
            found = _choose_image(tree)
            shown = str(source.directory / found)
            raw = tree.read(found, MAX_VMLINUX_BYTES) or b""
        try:
            data = extract_vmlinux(raw)
            elf = read_elf(data)
        except (InvalidInput, Unavailable) as error:
            raise type(error)(
                f"{shown}: {error.message}",
                hint=error.hint or "name another image, such as a vmlinux: `--kernel FILE`",
            ) from error
        del raw
        with no_space_named(output):
            (output / VMLINUX).write_bytes(data)
        config = _find_config(source, tree, data, elf.release)
    return _Image(elf, config)


def _choose_image(tree: Tree) -> str:
    """Return the path of the one kernel in a directory."""
    found: list[tuple[bool, int, str, str]] = []
    own_modules = [place for place in _module_directories(tree) if place.path]
    places = [*_KERNEL_PLACES, *(place.path for place in own_modules)]
    for rank, place in enumerate(places):
        for name in tree.names(place):
            path = f"{place}/{name}" if place else name
            match = _KERNEL_NAME.fullmatch(name)
            if match and tree.is_file(path):
                of = match[2] or (place.rpartition("/")[2] if rank >= len(_KERNEL_PLACES) else "")
                # An ELF before an image that has to be unpacked.
                found.append((match[1] != "vmlinux", rank, path, of))
    if not found:
        raise InvalidInput(
            f"{tree.path} has no kernel image: no vmlinux, bzImage or vmlinuz* is in it or in "
            "boot/ (links are not followed)",
            hint="name the file: `--kernel FILE`",
        )
    releases = {place.release for place in own_modules}
    if len({of for *_, of in found}) > 1 and len(releases) == 1:
        found = [entry for entry in found if entry[3] in releases] or found
    if len({of for *_, of in found}) > 1:
        names = ", ".join(path for _, _, path, _ in found[:5])
        raise InvalidInput(
            f"{tree.path} has several kernels: {names}",
            hint="name the one to take: `--kernel FILE`",
        )
    return min(found)[2]


def _find_config(source: ImportSource, tree: Tree, vmlinux: bytes, release: str) -> bytes:
    """Return a kernel's configuration, empty when there is none.

    The copy inside the image comes before files of the directory: it cannot be another kernel's.
    """
    if source.config is not None:
        return checked_config(read_file(source.config, MAX_CONFIG_BYTES), str(source.config))
    if embedded := embedded_config(vmlinux):
        return embedded
    own = [place.path for place in _module_directories(tree) if place.release == release]
    paths = [f"{place}/config-{release}" for place in _CONFIG_PLACES]
    paths += [
        f"{place}/{name}" for place in (*_CONFIG_PLACES, *own) for name in ("config", ".config")
    ]
    for path in paths:
        data = tree.read(path, MAX_CONFIG_BYTES)
        if data is not None:
            return checked_config(data, str(source.directory / path.lstrip("/")))
    return b""


# --- the modules


def _module_directories(tree: Tree) -> list[_ModulesTree]:
    """Return the trees of modules in a directory; it may be one itself."""
    found = []
    if any(tree.is_file(index) for index in _INDEXES):
        found.append(_ModulesTree(tree.path, "", None))
    for place in _MODULES_PLACES:
        for name in tree.names(place):
            path = f"{place}/{name}"
            if _RELEASE.fullmatch(name) and _is_modules_tree(tree, path):
                found.append(_ModulesTree(tree.path, path, name))
    return found


def _is_modules_tree(tree: Tree, path: str) -> bool:
    return tree.is_directory(f"{path}/kernel") or any(
        tree.is_file(f"{path}/{index}") for index in _INDEXES
    )


def _find_modules(source: ImportSource, release: str, *, force: bool) -> _ModulesTree | None:
    """Return the tree of a kernel's modules, None when there is none at all."""
    root = source.modules or source.directory
    with Tree(root) as tree:
        found = _module_directories(tree)
        if source.modules is not None:
            # The word of the user: DIR/<release> and a bare tree will do as well.
            found += [
                _ModulesTree(root, name, name)
                for name in tree.names()
                if _RELEASE.fullmatch(name) and _is_modules_tree(tree, name)
            ]
            if not found and tree.is_directory("kernel"):
                found.append(_ModulesTree(root, "", None))
            if not found:
                raise InvalidInput(
                    f"{root} has no kernel modules",
                    hint="give the directory lib/modules/RELEASE of the kernel",
                )
    for wanted in (release, None):
        for place in found:
            if place.release == wanted:
                return place
    if not found:
        return None
    others = ", ".join(dict.fromkeys(place.release or "" for place in found))
    if force and len(found) == 1:
        return found[0]
    raise InvalidInput(
        f"the kernel is {release}, but the modules in {root} are of {others}",
        hint=f"name the modules of {release}: `--modules DIR`"
        + ("; or take these all the same: `--force`" if len(found) == 1 else ""),
    )


def _copy_modules(found: _ModulesTree | None, tar: Path) -> ModulesCopy:
    with no_space_named(tar.parent):
        if found is None:
            return empty_copy(tar)
        with Tree(found.root) as tree:
            return tree.copy_modules(found.path, tar)


async def _index_modules(
    tar: Path, work: Path, release: str, commands: HostCommands
) -> tuple[Path, ModulesCopy]:
    """Let depmod index a copy of the modules, and copy that anew."""
    if commands.find("depmod") is None:
        raise Unavailable(
            "the modules have no index (modules.dep), and depmod is not installed to make it",
            hint="install depmod: `apt-get install kmod`",
        )
    base = work / "depmod"
    place = base / "lib" / "modules" / release
    place.mkdir(parents=True, mode=0o700)
    with no_space_named(work):
        await asyncio.to_thread(unpack_copy, tar, place)
    tar.unlink()
    await commands.run(["depmod", "-b", str(base), release], timeout_s=_DEPMOD_TIMEOUT_S)
    indexed = work / "indexed.tar"
    copy = await asyncio.to_thread(
        _copy_modules, _ModulesTree(base, f"lib/modules/{release}", release), indexed
    )
    # A depmod without a decoder for the modules' compression sees no symbols, and says nothing.
    if len(copy.modules) > _FEW_MODULES and copy.sizes.get("modules.symbols", 0) < 1024:
        raise InvalidInput(
            f"depmod did not read the modules of {release}",
            hint="index them where their kernel is installed: `depmod RELEASE`",
        )
    return indexed, copy


def _take_boot_modules(
    tar: Path, copy: ModulesCopy, image: _Image, output: Path, *, force: bool
) -> tuple[KernelParts, list[str]]:
    """Write the configuration and what the initramfs loads; refuse what would not boot."""
    release = image.elf.release
    config = parse_config(image.config.decode("utf-8", "replace"))
    (output / CONFIG).write_bytes(image.config)
    warnings: list[str] = []
    with tarfile.open(tar, "r:") as archive:

        def read(path: str) -> bytes:
            limit = _MAX_MODULE_FILE_BYTES if is_module(path) else _MAX_INDEX_BYTES
            if copy.sizes[path] > limit:
                raise InvalidInput(f"{path} is larger than {limit >> 20} MiB")
            content = archive.extractfile(f"./{path}")
            assert content is not None
            return content.read()

        def text(path: str) -> str:
            return read(path).decode("utf-8", "replace") if path in copy.sizes else ""

        # A line of the index whose file is not there is worth nothing.
        dependencies = {
            name: entry
            for name, entry in modules.parse_dependencies(text("modules.dep")).items()
            if entry[0] in copy.sizes and is_module(entry[0])
        }
        builtin = frozenset(
            modules.module_name(line) for line in text("modules.builtin").splitlines()
        )
        order = modules.load_order(
            modules.BOOT_MODULES,
            dependencies,
            builtin | features.builtin_modules(config),
            required=frozenset(),
        )
        names = write_boot_modules(output, order, read)
        _check_vermagic(output, names, release, force=force)
    if not image.config:
        told = "the kernel's configuration was not found"
        if not force:
            raise InvalidInput(
                f"{told}: what it can do is unknown", hint="name it: `--config FILE`, or `--force`"
            )
        warnings.append(f"{told}: `kernel check` cannot tell what is built in")
    else:
        findings = features.check_features(
            config,
            early_modules=frozenset(names),
            modules=frozenset(modules.module_name(path) for path in copy.modules),
            pvh=image.elf.pvh,
        )
        warnings += _refuse_or_warn(findings, force=force)
    if copy.modules and "modules.order" not in copy.sizes and "modules.builtin" not in copy.sizes:
        warnings.append(
            "the modules' tree has no modules.builtin: modprobe may miss what is built in"
        )
    return KernelParts(release, names), warnings


def _refuse_or_warn(findings: list[features.Finding], *, force: bool) -> list[str]:
    missing = features.missing_required(findings, features.MACHINE, features.VMM)
    if missing:
        shown = ", ".join(
            f"{finding.option} ({finding.note or finding.why})" for finding in missing[:6]
        )
        more = f" and {len(missing) - 6} more" if len(missing) > 6 else ""
        told = f"the kernel lacks what a machine needs: {shown}{more}"
        if not force:
            raise InvalidInput(
                told,
                hint="build it with these options, or import it all the same: `--force`",
            )
        return [told]
    docker = features.missing_required(findings, features.DOCKER)
    if docker:
        shown = ", ".join(finding.option for finding in docker)
        return [f"Docker will not run with this kernel: it lacks {shown}"]
    return []


def _check_vermagic(output: Path, names: tuple[str, ...], release: str, *, force: bool) -> None:
    """Refuse modules that were built for another kernel: it would not load them."""
    for name in names:
        data = (output / BOOT_MODULES / f"{name}.ko").read_bytes()
        found = _VERMAGIC.search(data)
        if found and found[1].decode("ascii") != release and not force:
            raise InvalidInput(
                f"the module {name} is of {found[1].decode('ascii')}, the kernel is {release}",
                hint="name the kernel's own modules: `--modules DIR`; or `--force`",
            )
