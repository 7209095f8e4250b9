"""Images of one's own boot: linked in place, and out to a bundle and in again."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.artifacts import need_kernel
from tests.support.sandbox import Sandbox
from tests.support.tiny import make_tiny_image

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]


@pytest.fixture
def user(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    kernels = need_kernel().parent
    made = Sandbox(artifacts=False)
    made.layout.data.mkdir(parents=True, mode=0o700)
    (made.layout.data / "kernels").symlink_to(kernels)
    try:
        yield made
    finally:
        made.keep_evidence(request.node.name)
        made.close()


def test_a_linked_image_and_its_bundle_boot(user: Sandbox) -> None:
    rootfs = make_tiny_image(user.home / "own")
    before = rootfs.read_bytes()
    user.ok("image", "register", "--name", "own", "--rootfs", str(rootfs), "--link")
    machine = ("--network", "none", "--memory", "256M", "--vcpu", "1")
    said = user.ok(
        "vm", "run", "--name", "a", "--image", "own", *machine, "--", "cat", "/etc/group"
    )
    assert said == b"root:x:0:\n"
    user.ok("vm", "exec", "a", "--", "sh", "-c", "echo written > /root/file")
    refused = user.run("image", "delete", "--force", "own")
    assert refused.returncode == 125
    assert b"a runs from it" in refused.stderr
    user.ok("vm", "stop", "a")
    assert rootfs.read_bytes() == before

    user.ok("image", "export", "own", "-o", "own.tar.zst")
    user.ok("image", "delete", "--force", "own")
    user.ok("image", "pull", "--name", "own", "bundle:own.tar.zst")
    # The same image under the same name: the VM goes on where it was.
    user.ok("vm", "start", "a")
    assert user.ok("vm", "exec", "a", "--", "cat", "/root/file") == b"written\n"
    user.ok("vm", "delete", "a")


def test_a_vm_does_not_start_from_a_linked_file_that_changed(user: Sandbox) -> None:
    rootfs = make_tiny_image(user.home / "own")
    user.ok("image", "register", "--name", "own", "--rootfs", str(rootfs), "--link")
    user.ok("vm", "create", "--name", "a", "--image", "own", "--network", "none", "--no-start")
    with open(rootfs, "r+b") as file:
        file.seek(1 << 20)
        file.write(b"changed")
    started = user.run("vm", "start", "a")
    assert started.returncode == 125
    assert b"was changed since it was registered" in started.stderr
    assert b"banger image register --force --link" in started.stderr


def test_an_image_registered_with_its_own_kernel_boots_it(user: Sandbox) -> None:
    rootfs = make_tiny_image(user.home / "own")
    installed = need_kernel("generic-6.1")
    release = json.loads((installed / "manifest.json").read_text())["release"]
    modules = user.home / "modules" / release
    modules.mkdir(parents=True)
    subprocess.run(
        ["/usr/sbin/debugfs", "-R", f"rdump / {modules}", installed / "modules.ext4"],
        check=True, capture_output=True,
    )  # fmt: skip
    (user.layout.data / "kernels").unlink()
    initrd = user.home / "initrd"
    initrd.write_bytes(b"whatever")
    said = user.run(
        "image", "register", "--name", "own", "--rootfs", str(rootfs), "--kernel",
        str(installed / "vmlinux"), "--modules", str(modules), "--initrd", str(initrd),
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert b"initrd is not used" in said.stderr
    kernel = user.json("image", "show", "own")["kernel"]
    machine = ("--rm", "--network", "none", "--memory", "256M", "--vcpu", "1")
    ran = user.ok("vm", "run", "--image", "own", *machine, "--", "cat", "/proc/version")
    assert release.encode() in ran
    refused = user.run("kernel", "rm", kernel)
    assert refused.returncode == 125
    assert b"own" in refused.stderr
