"""Kernels out of directories: found, judged, installed whole or not at all."""

from __future__ import annotations

import asyncio
import gzip
import lzma
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from banger.errors import BangerError, Conflict, InvalidInput, NotFound
from banger.events import NullSink
from banger.host.commands import HostCommands
from banger.images import artifacts
from banger.images.artifacts import ImageManifest, KernelManifest
from banger.kernels.check import check_kernel, list_modules, read_config
from banger.kernels.features import missing_required
from banger.kernels.importer import ImportSource, import_kernel
from banger.kernels.pull import list_kernels, read_kernel
from banger.services.artifact_sources import KernelSource
from banger.services.kernels import KernelService
from tests.support.artifacts import need_kernel
from tests.support.kernels import RELEASE, bzimage, full_config, make_elf, make_module

pytestmark = pytest.mark.integration

COMMANDS = HostCommands()
MODULES = {
    "kernel/drivers/block/virtio_blk.ko.xz": [],
    "kernel/fs/overlayfs/overlay.ko.gz": ["kernel/lib/helper.ko"],
    "kernel/lib/helper.ko": [],
    "kernel/drivers/net/veth.ko": [],
}
MODULAR = full_config(VIRTIO_BLK="m", OVERLAY_FS="m", VETH="m")


class Recorder(NullSink):
    """Remembers warnings; `at` is called at each stage."""

    def __init__(self, at: Callable[[str], None] = lambda stage: None) -> None:
        self.warnings: list[str] = []
        self.at = at

    def stage(self, stage: str) -> None:
        self.at(stage)

    def warning(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root file system's kernel, as a package unpacks it."""
    place = tmp_path / "root"
    write(place / f"boot/vmlinuz-{RELEASE}", bzimage(lzma.compress(make_elf())))
    write(place / f"boot/config-{RELEASE}", MODULAR.encode())
    add_modules(place / "lib/modules" / RELEASE)
    return place


@pytest.fixture(scope="module")
def real() -> Path:
    """The catalog's kernel."""
    return need_kernel()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def add_modules(place: Path, release: str = RELEASE) -> None:
    pack = {"xz": lzma.compress, "gz": gzip.compress, "ko": bytes}
    for path in MODULES:
        write(place / path, pack[path.rpartition(".")[2]](make_module(release)))
    lines = [f"{path}: {' '.join(needs)}".strip() for path, needs in MODULES.items()]
    write(place / "modules.dep", "\n".join(lines).encode())
    write(place / "modules.dep.bin", b"as depmod left it")
    write(place / "modules.builtin", b"kernel/fs/ext4/ext4.ko\n")
    (place / "build").symlink_to("/usr/src")


async def take(
    data: Path, directory: Path, name: str = "mine", *, force: bool = False, sink=None, **named
) -> KernelManifest:
    return await import_kernel(
        name,
        ImportSource(directory, **named),
        data_dir=data,
        commands=COMMANDS,
        sink=sink or NullSink(),
        force=force,
    )


def nothing_left(data: Path) -> bool:
    staging = data / "staging"
    return list_kernels(data) == [] and (not staging.exists() or os.listdir(staging) == [])


async def refused(data: Path, directory: Path, told: str, **named) -> BangerError:
    with pytest.raises(InvalidInput, match=told) as caught:
        await take(data, directory, **named)
    assert nothing_left(data)
    assert caught.value.hint, caught.value
    return caught.value


async def missing(data: Path, name: str = "mine") -> set[str]:
    report = await check_kernel(data, name, commands=COMMANDS)
    return {finding.option for finding in missing_required(report.findings)}


async def test_a_package_becomes_a_kernel(data: Path, root: Path) -> None:
    made = await take(data, root)
    place = data / "kernels/mine"
    assert made == read_kernel(data, "mine")
    assert (made.release, made.origin) == (RELEASE, f"import:{root}")
    assert made.boot_modules == ("virtio_blk", "helper", "overlay")
    assert (place / "vmlinux").read_bytes() == make_elf()
    assert (place / "boot-modules/list").read_text().split() == list(made.boot_modules)
    assert (place / "boot-modules/overlay.ko").read_bytes() == make_module()
    assert read_config(data, "mine") == MODULAR
    found = await list_modules(place / "modules.ext4", commands=COMMANDS)
    assert sorted(found) == ["helper.ko", "overlay.ko.gz", "veth.ko", "virtio_blk.ko.xz"]
    assert await missing(data) == set()
    report = await check_kernel(data, "mine", commands=COMMANDS)
    states = {finding.option: finding.state for finding in report.findings}
    assert (states["VETH"], states["OVERLAY_FS"], states["BRIDGE"]) == (
        "module", "module", "built in",
    )  # fmt: skip


async def test_a_kernel_with_all_built_in_needs_no_modules(data: Path, tmp_path: Path) -> None:
    write(tmp_path / "k/bzImage", bzimage(gzip.compress(make_elf(config=full_config()))))
    made = await take(data, tmp_path / "k")
    assert made.boot_modules == ()
    assert read_config(data, "mine") == full_config()  # the copy inside the image
    place = data / "kernels/mine"
    assert await list_modules(place / "modules.ext4", commands=COMMANDS) == []
    subprocess.run(["/usr/sbin/e2fsck", "-fn", place / "modules.ext4"], check=True)
    assert await missing(data) == set()


@pytest.mark.parametrize("where", ["lib/modules", "usr/lib/modules", "modules"])
async def test_the_modules_are_found_where_trees_have_them(
    data: Path, root: Path, where: str
) -> None:
    if where != "lib/modules":
        (root / where).parent.mkdir(parents=True, exist_ok=True)
        (root / "lib/modules").rename(root / where)
    assert (await take(data, root)).boot_modules == ("virtio_blk", "helper", "overlay")


async def test_a_directory_may_be_the_tree_itself(data: Path, root: Path) -> None:
    tree = root / "lib/modules" / RELEASE
    shutil.copy(root / f"boot/vmlinuz-{RELEASE}", tree / "vmlinuz")
    shutil.copy(root / f"boot/config-{RELEASE}", tree / "config")
    assert len((await take(data, tree)).boot_modules) == 3


async def test_named_files_come_before_found_ones(data: Path, root: Path, tmp_path: Path) -> None:
    kernel = write(tmp_path / "x/other", make_elf("6.6.6"))
    config = write(tmp_path / "x/conf", full_config(ACPI="y").encode())
    add_modules(tmp_path / "x/mods", "6.6.6")
    made = await take(data, root, kernel=kernel, modules=tmp_path / "x/mods", config=config)
    assert made.release == "6.6.6"
    assert read_config(data, "mine") == full_config(ACPI="y")
    made = await take(data, root, "two", kernel=kernel, config=config, force=True)
    assert made.release == "6.6.6"


async def test_one_kernel_of_several_is_taken_when_the_modules_tell(data: Path, root: Path) -> None:
    write(root / "boot/vmlinuz-5.0.0-other", bzimage(gzip.compress(make_elf("5.0.0-other"))))
    assert (await take(data, root)).release == RELEASE
    add_modules(root / "lib/modules/5.0.0-other")
    artifacts.delete(data, "kernel", "mine")
    error = await refused(data, root, "several kernels: boot/vmlinuz-5")
    assert "--kernel FILE" in error.hint
    named = root / "boot/vmlinuz-6.1.0-test"
    assert (await take(data, root, kernel=named)).release == RELEASE


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("OVERLAY_FS", "OVERLAY_FS"),
        ("VIRTIO_BLK", "VIRTIO_BLK"),
        ("EXT4_FS", "EXT4_FS"),
        ("VIRTIO_MMIO", "VIRTIO_MMIO"),
        ("SERIAL_8250_CONSOLE", "SERIAL_8250_CONSOLE"),
    ],
)
async def test_what_a_machine_needs_is_asked_for_by_name(
    data: Path, tmp_path: Path, option: str, told: str
) -> None:
    write(tmp_path / "k/vmlinux", make_elf())
    write(tmp_path / "k/.config", full_config(**{option: "n"}).encode())
    error = await refused(data, tmp_path / "k", f"lacks what a machine needs: {told}")
    assert "--force" in error.hint
    sink = Recorder()
    await take(data, tmp_path / "k", force=True, sink=sink)
    assert any(told in warning for warning in sink.warnings)
    assert await missing(data) == {option}


async def test_a_module_that_is_configured_but_not_there_is_missing(data: Path, root: Path) -> None:
    (root / "lib/modules" / RELEASE / "kernel/fs/overlayfs/overlay.ko.gz").unlink()
    await refused(data, root, r"OVERLAY_FS \(set to m, but the module overlay is not")


async def test_an_empty_file_is_no_module(data: Path, root: Path) -> None:
    (root / "lib/modules" / RELEASE / "kernel/drivers/net/veth.ko").write_bytes(b"")
    await take(data, root)
    assert await missing(data) == {"VETH"}


async def test_a_kernel_without_docker_is_taken_with_a_warning(data: Path, tmp_path: Path) -> None:
    write(tmp_path / "k/vmlinux", make_elf())
    write(tmp_path / "k/config", full_config(SECCOMP="n").encode())
    sink = Recorder()
    await take(data, tmp_path / "k", sink=sink)
    assert sink.warnings == ["Docker will not run with this kernel: it lacks SECCOMP"]
    assert await missing(data) == {"SECCOMP"}


async def test_without_a_configuration_it_takes_force(data: Path, tmp_path: Path) -> None:
    write(tmp_path / "k/vmlinux", make_elf())
    await refused(data, tmp_path / "k", "configuration was not found")
    await take(data, tmp_path / "k", force=True)
    report = await check_kernel(data, "mine", commands=COMMANDS)
    assert not report.has_config


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not a Linux kernel image"),
        (b"MZ" * 2000, "not a Linux kernel image"),
        (make_elf(machine=183), "not for x86-64"),
        (make_elf(pvh=False), "PVH"),
        (make_elf()[:-30], "cut off"),
        (bzimage(gzip.compress(make_elf()))[:2700], "cut off"),
        (bzimage(lzma.compress(make_elf())[:-12]), "cut off"),
        (bzimage(gzip.compress(make_elf(machine=40))), "not for x86-64"),
    ],
    ids=["empty", "noise", "arm64", "no pvh", "cut elf", "cut image", "cut stream", "arm bzimage"],
)
async def test_what_no_machine_boots_is_refused(
    data: Path, tmp_path: Path, content: bytes, told: str
) -> None:
    write(tmp_path / "k/vmlinuz", content)
    write(tmp_path / "k/config", full_config().encode())
    await refused(data, tmp_path / "k", told)


async def test_modules_of_another_kernel_are_refused(data: Path, root: Path) -> None:
    (root / "lib/modules" / RELEASE).rename(root / "lib/modules/9.9.9")
    await refused(data, root, "the modules in .* are of 9.9.9")
    shutil.rmtree(root / "lib/modules/9.9.9")
    add_modules(root / "lib/modules" / RELEASE, "9.9.9")  # by name ours, by content not
    await refused(data, root, f"is of 9.9.9, the kernel is {RELEASE}")
    assert (await take(data, root, force=True)).release == RELEASE


async def test_nothing_outside_the_directory_is_taken(
    data: Path, root: Path, tmp_path: Path
) -> None:
    secret = write(tmp_path / "outside/secret.ko", b"\x7fELF secret")
    tree = root / "lib/modules" / RELEASE
    (tree / "kernel/secret.ko").symlink_to(secret)
    (tree / "kernel/there").symlink_to(secret.parent)
    (tree / "modules.alias").symlink_to(secret)
    await take(data, root)
    found = await list_modules(data / "kernels/mine/modules.ext4", commands=COMMANDS)
    assert len(found) == 4 and "secret.ko" not in found
    assert b"secret" not in (data / "kernels/mine/modules.ext4").read_bytes()


@pytest.mark.parametrize("link", ["lib", f"boot/vmlinuz-{RELEASE}", f"boot/config-{RELEASE}"])
async def test_a_link_in_the_place_of_the_thing_is_not_followed(
    data: Path, root: Path, tmp_path: Path, link: str
) -> None:
    moved = tmp_path / "moved"
    (root / link).rename(moved)
    (root / link).symlink_to(moved)
    with pytest.raises(InvalidInput, match="no kernel image|not found|lacks"):
        await take(data, root)
    assert nothing_left(data)


async def test_an_index_that_points_outside_leads_nowhere(data: Path, root: Path) -> None:
    dep = root / "lib/modules" / RELEASE / "modules.dep"
    hostile = "../../../../etc/overlay.ko:\n/etc/virtio_blk.ko: /etc/passwd\n"
    dep.write_text(
        dep.read_text().replace("kernel/fs/overlayfs/overlay.ko.gz:", "x:") + "\n" + hostile
    )
    await refused(data, root, "OVERLAY_FS")


async def test_a_tree_without_an_index_is_given_one(data: Path, tmp_path: Path, real: Path) -> None:
    release = read_kernel(real.parents[1], real.name).release
    root = tmp_path / "root"
    write(root / "vmlinux", make_elf(release))
    write(root / ".config", full_config(VIRTIO_NET="m").encode())
    for name in ("virtio_net", "net_failover", "failover"):
        target = root / "lib/modules" / release / f"kernel/{name}.ko"
        write(target, (real / f"boot-modules/{name}.ko").read_bytes())
    made = await take(data, root)
    assert made.boot_modules == ("failover", "net_failover", "virtio_net")
    assert not (root / "lib/modules" / release / "modules.dep").exists()
    listed = subprocess.run(
        ["/usr/sbin/debugfs", "-R", "cat modules.dep", data / "kernels/mine/modules.ext4"],
        capture_output=True, check=True, text=True,
    ).stdout  # fmt: skip
    assert "kernel/virtio_net.ko: kernel/net_failover.ko kernel/failover.ko" in listed


async def test_a_taken_name_is_replaced_by_force_only(data: Path, root: Path) -> None:
    await take(data, root)
    with pytest.raises(Conflict) as caught:
        await take(data, root)
    assert "--force" in caught.value.hint
    write(root / f"boot/config-{RELEASE}", f"{MODULAR}CONFIG_NEW=y\n".encode())
    await take(data, root, force=True)
    assert "CONFIG_NEW" in read_config(data, "mine")
    assert os.listdir(data / "staging") == []


@pytest.mark.parametrize("name", ["../x", "A", "", "a/b", ".hidden"])
async def test_a_name_is_checked_before_anything_is_made(data: Path, root: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="not a name for a kernel"):
        await take(data, root, name)
    assert nothing_left(data)


@pytest.mark.parametrize("when", range(5))
async def test_a_cancelled_import_leaves_nothing(data: Path, root: Path, when: int) -> None:
    stages: list[str] = []

    def at(stage: str) -> None:
        stages.append(stage)
        if len(stages) == when + 1:
            task.cancel()

    task = asyncio.ensure_future(take(data, root, sink=Recorder(at)))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(stages) == when + 1
    assert nothing_left(data)


def _service(data: Path, *vms: str) -> KernelService:
    async def used_by(name: str) -> list[str]:
        return list(vms) if name == "mine" else []

    return KernelService(KernelSource(data, data / "cache", COMMANDS, None), used_by)


def _image(data: Path, name: str, kernel: str) -> None:
    staged = data / "staging" / name
    write(staged / "rootfs.ext4", b"x")
    manifest = ImageManifest(
        name=name, digest="sha256:0", size_bytes=1, allocated_bytes=1, origin="", description="",
        created_at="", files={"rootfs.ext4": 1}, kernel=kernel,
    )  # fmt: skip
    artifacts.install(staged, data, "image", manifest, force=False)


async def test_a_kernel_in_use_is_neither_deleted_nor_replaced(data: Path, root: Path) -> None:
    service = _service(data, "box")
    request = {"directory": str(root)}
    assert (await _service(data).import_("mine", request, NullSink()))["used_by"] == []
    _image(data, "base", "mine")
    _image(data, "other", "generic-6.12")
    shown = await service.get("mine")
    assert (shown["used_by"], shown["used_by_images"]) == (["box"], ["base"])
    with pytest.raises(Conflict, match="VM box and image base") as caught:
        await service.delete("mine")
    assert "banger vm delete box" in caught.value.hint
    assert "banger image delete base" in caught.value.hint
    with pytest.raises(Conflict, match="replaced: used by VM box"):
        await service.import_("mine", {**request, "force": True}, NullSink())
    # An image names it: deleting is refused, another build of it is welcome.
    with pytest.raises(Conflict, match="image base"):
        await _service(data).delete("mine")
    await _service(data).import_("mine", {**request, "force": True}, NullSink())
    artifacts.delete(data, "image", "base")
    await _service(data).delete("mine")
    assert list_kernels(data) == []


async def test_relative_paths_are_refused_by_the_daemon(data: Path) -> None:
    with pytest.raises(InvalidInput, match="not an absolute path"):
        await _service(data).import_("mine", {"directory": "x"}, NullSink())


async def test_only_what_is_installed_is_checked(data: Path) -> None:
    with pytest.raises(NotFound):
        await _service(data).check_features("generic-6.12")
    with pytest.raises(NotFound):
        await _service(data).config("nothing")


async def test_a_manifest_of_an_earlier_day_reads(data: Path, root: Path) -> None:
    made = await take(data, root)
    old = {**msgspec.to_builtins(made)}
    fields = "name release digest size_bytes allocated_bytes origin description created_at files"
    kept = {name: old[name] for name in fields.split()}
    (data / "kernels/mine/manifest.json").write_bytes(msgspec.json.encode(kept))
    assert read_kernel(data, "mine").release == RELEASE


async def test_the_catalogs_kernel_has_all_that_is_required(real: Path) -> None:
    report = await check_kernel(real.parents[1], real.name, commands=COMMANDS)
    lacking = [f for f in report.findings if f.state == "missing" and f.need == "required"]
    assert (report.has_config, lacking) == (True, [])
    by_state = {f.option: f.state for f in report.findings}
    assert (by_state["OVERLAY_FS"], by_state["VETH"], by_state["EXT4_FS"]) == (
        "module", "module", "built in",
    )  # fmt: skip
