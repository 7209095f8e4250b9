"""An imported kernel boots: found in a directory, through the command line, under QEMU."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from banger.images import artifacts
from banger.images.artifacts import ImageManifest
from tests.support.artifacts import need_kernel
from tests.support.sandbox import Sandbox
from tests.support.tiny import make_tiny_image

pytestmark = pytest.mark.system


def lay_out(kernel: Path, root: Path) -> str:
    """Put an artifact's content where a root file system has it; return the release."""
    release: str = json.loads((kernel / "manifest.json").read_text())["release"]
    modules = root / "lib" / "modules" / release
    modules.mkdir(parents=True)
    (root / "boot").mkdir()
    shutil.copy(kernel / "vmlinux", root / "boot" / f"vmlinux-{release}")
    shutil.copy(kernel / "config", root / "boot" / f"config-{release}")
    subprocess.run(
        ["/usr/sbin/debugfs", "-R", f"rdump / {modules}", kernel / "modules.ext4"],
        check=True,
        capture_output=True,
    )
    (modules / "build").symlink_to("/usr/src/linux")
    return release


def add_tiny_image(data: Path) -> None:
    with_image = data / "staging" / "tiny"
    rootfs = make_tiny_image(with_image)
    size = rootfs.stat().st_size
    manifest = ImageManifest(
        name="tiny", digest=artifacts.sha256_of(rootfs), size_bytes=size, allocated_bytes=size,
        origin="test", description="static busybox", created_at=artifacts.now_rfc3339(),
        files={"rootfs.ext4": size},
    )  # fmt: skip
    artifacts.install(with_image, data, "image", manifest, force=False)


def test_an_imported_kernel_boots_and_loads_its_modules(tmp_path: Path) -> None:
    kernel = need_kernel("generic-6.1")
    release = lay_out(kernel, tmp_path / "root")
    user = Sandbox(artifacts=False)
    try:
        user.layout.data.mkdir(parents=True, mode=0o700)
        add_tiny_image(user.layout.data)
        # A relative path: the command line makes it whole.
        made = user.json("kernel", "import", "mine", "--from", "root", cwd=tmp_path)
        assert (made["name"], made["release"], made["installed"]) == ("mine", release, True)
        assert user.json("kernel", "check", "mine")["ok"]
        assert b"CONFIG_OVERLAY_FS=m" in user.ok("kernel", "show", "mine", "--config")
        user.ok(
            *("vm", "create", "--name", "box", "--image", "tiny", "--kernel", "mine"),
            *("--network", "none", "--vcpu", "1", "--memory", "256M"),
        )
        said = user.ok("vm", "exec", "box", "--", "cat", "/proc/sys/kernel/osrelease")
        assert said.decode().strip() == release
        listed = user.ok("vm", "exec", "box", "--", "ls", f"/lib/modules/{release}")
        assert b"modules.dep.bin" in listed
        used = user.run("kernel", "rm", "mine")
        assert used.returncode == 125
        assert b"used by VM box" in used.stderr
        user.ok("vm", "delete", "box")
        assert user.ok("kernel", "rm", "mine") == b"mine deleted\n"
        assert user.json("kernel", "list")[0]["installed"] is False
    except BaseException:
        user.keep_evidence("test_imported_kernel")
        raise
    finally:
        user.close()
