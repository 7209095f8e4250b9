"""Publishing a catalog and a bundle, with the words of docs/image-catalog.md and a real daemon."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.layouts import make_layout, member
from tests.support.ports import free_port
from tests.support.registries import push, real_registry
from tests.support.sandbox import Sandbox

pytestmark = pytest.mark.integration

PAGE = Path(__file__).parents[3] / "docs" / "image-catalog.md"


@pytest.fixture
def user() -> Iterator[Sandbox]:
    made = Sandbox(artifacts=False)
    yield made
    made.close()


def make_rootfs(user: Sandbox, name: str = "rootfs.ext4") -> Path:
    path = user.home / name
    subprocess.run(["mke2fs", "-q", "-t", "ext4", str(path), "16M"], check=True)
    return path


def test_the_pages_commands_publish_an_image(user: Sandbox) -> None:
    text = PAGE.read_text()
    section = text[text.index("### Publishing one") : text.index("## Registering")]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 5
    script = user.root / "script"
    words = "".join(blocks).replace("8000", str(free_port()))
    # A server needs a moment until it listens; it ends with the script.
    words = words.replace(" &\n", " 2>/dev/null &\ntrap 'kill $!' EXIT\nsleep 1\n", 1)
    script.write_text(f"set -eux -o pipefail\n{words}")
    done = subprocess.run(
        ["bash", str(script)],
        cwd=user.home,
        env=user.environment,
        capture_output=True,
        timeout=300,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "site/images.toml: ok, 2 images" in done.stdout
    assert "note: images.our-alpine.source: has no digest" in done.stdout
    listed = r"our-base +bundle +http://127.0.0.1:\d+/images.toml +yes +Our base"
    assert re.search(listed, done.stdout)
    images = {image["name"]: image for image in user.json("image", "list")}
    digests = {images[name]["digest"] for name in ("base", "our-base", "copy", "pinned")}
    assert digests == {f"sha256:{done.stdout.splitlines()[-1].split()[0]}"}
    assert images["our-base"]["kernel"] == "generic-6.12"
    assert images["our-alpine"]["installed"] is False
    assert not list((user.layout.data / "staging").iterdir())


def test_register_export_and_delete_as_a_user_types_them(user: Sandbox) -> None:
    make_rootfs(user)
    assert user.ok("image", "register", "--name", "one", "--rootfs", "rootfs.ext4") == b"one\n"
    done = user.run("image", "register", "--name", "one", "--rootfs", "rootfs.ext4")
    assert done.returncode == 125
    assert b"installed already" in done.stderr
    found = user.json("image", "register", "--name", "two", "--rootfs", "rootfs.ext4", "--link")
    assert found["origin"] == f"linked:{user.home}/rootfs.ext4"
    line = user.ok("image", "export", "one", "-o", "one.tar.zst").decode()
    subprocess.run(["sha256sum", "-c"], input=line.encode(), cwd=user.home, check=True)
    assert user.run("image", "export", "one", "-o", "one.tar.zst").returncode == 125
    user.ok("image", "export", "one", "-o", "one.tar.zst", "--force")
    piped = user.run("image", "export", "one", "-o", "-")
    assert piped.stdout == (user.home / "one.tar.zst").read_bytes()
    assert line.split()[0].encode() in piped.stderr
    assert not list(user.layout.cache.glob("export-*"))
    user.ok("image", "pull", "--name", "three", "bundle:one.tar.zst")
    assert user.ok("image", "delete", "one", "three") == b"one deleted\nthree deleted\n"
    with open(user.home / "rootfs.ext4", "r+b") as file:
        file.write(b"changed")
    listed = {image["name"]: image for image in user.json("image", "list")}
    assert "was changed since it was registered" in listed["two"]["description"]
    done = user.run("image", "export", "two", "-o", "two.tar.zst")
    assert done.returncode == 125
    assert b"banger image register --force --link --name two" in done.stderr
    user.ok("image", "delete", "two")
    assert (user.home / "rootfs.ext4").exists()


def test_a_kernel_that_does_not_import_leaves_no_image(user: Sandbox) -> None:
    make_rootfs(user)
    (user.home / "vmlinuz").write_bytes(b"no kernel")
    (user.home / "initrd").write_bytes(b"no initrd")
    words = ["image", "register", "--name", "one", "--rootfs", "rootfs.ext4"]
    done = user.run(*words, "--kernel", "vmlinuz", "--initrd", "initrd")
    assert done.returncode == 125
    assert b"the initrd is not used" in done.stderr
    assert b"not a Linux kernel" in done.stderr
    done = user.run(*words, "--modules", "modules")
    assert b"--kernel FILE names the kernel" in done.stderr
    done = user.run(*words, "--kernel-ref", "generic-6.123")
    assert b"did you mean generic-6.12?" in done.stderr
    done = user.run(*words, "--kernel", "vmlinuz", "--kernel-ref", "generic-6.12")
    assert b"both the name of a kernel and the file" in done.stderr
    done = user.run("image", "register", "--name", "debian-bookworm", "--rootfs", "rootfs.ext4")
    assert b"of the catalog" in done.stderr
    assert [image for image in user.json("image", "list") if image["installed"]] == []
    assert [kernel for kernel in user.json("kernel", "list") if kernel["installed"]] == []


def test_ctrl_c_leaves_nothing(user: Sandbox) -> None:
    path = user.home / "rootfs.ext4"
    (user.home / "tree").mkdir()
    with open("/dev/urandom", "rb") as noise:
        (user.home / "tree/noise").write_bytes(noise.read(200_000_000))
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-d", str(user.home / "tree"), str(path), "512M"], check=True
    )
    user.ok("image", "register", "--name", "one", "--rootfs", str(path))
    process = user.popen("image", "export", "one", "-o", "one.tar.zst")
    assert process.stderr is not None
    for line in process.stderr:
        if b"packing" in line:
            break
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert sorted(item.name for item in user.home.iterdir() if "tar.zst" in item.name) == []


def test_check_and_list_say_what_is_wrong(user: Sandbox) -> None:
    catalog = user.home / "images.toml"
    catalog.write_text('[images.x]\nkind = "bundle"\nurl = "x.tar.zst"\nsha526 = ""\n')
    done = user.run("image", "catalog", "check", "images.toml")
    assert done.returncode == 1
    assert done.stdout.decode().splitlines()[0] == (
        "images.toml:4: images.x.sha526: unknown key 'sha526' (did you mean sha256?)"
    )
    assert user.daemon_pid() is None
    user.layout.config.mkdir(parents=True)
    (user.layout.config / "config.toml").write_text(f'catalogs = ["{catalog}", "~/absent.toml"]\n')
    done = user.run("image", "catalog", "check", "--json")
    assert done.returncode == 1
    assert [report["ok"] for report in json.loads(done.stdout)] == [True, False, False]
    done = user.run("image", "catalog", "list")
    assert done.returncode == 0
    assert b"debian-bookworm " in done.stdout
    assert b"images.toml:4: images.x.sha526" in done.stderr
    assert f"the catalog {user.home}/absent.toml is left out".encode() in done.stderr
    assert user.run("image", "catalog", "lst").returncode == 2


def put_vm(user: Sandbox, **fields: object) -> None:
    """Write the row of a VM as the daemon would; it must not run meanwhile."""
    values: dict[str, object] = {
        "id": "0123456789ab", "name": "box", "state": "stopped", "image": "one",
        "kernel": "generic-6.12", "vcpu": 1, "memory_bytes": 1 << 29, "disk_size_bytes": 1 << 30,
        "vmm": "qemu", "network": "none", "machine_id": "0" * 32, "mac": "02:00:00:00:00:01",
        "created_at": "2026-01-01T00:00:00+00:00", **fields,
    }  # fmt: skip
    database = sqlite3.connect(user.layout.database)
    database.execute(
        f"insert into vms ({', '.join(values)}) values ({', '.join('?' * len(values))})",
        list(values.values()),
    )
    database.commit()
    database.close()


def test_an_image_of_stopped_vms_is_deleted_by_force_only(user: Sandbox) -> None:
    make_rootfs(user)
    user.ok("image", "register", "--name", "one", "--rootfs", "rootfs.ext4")
    user.ok("daemon", "stop")
    put_vm(user)
    done = user.run("image", "delete", "one")
    assert done.returncode == 125
    assert b"used by box" in done.stderr
    done = user.run("image", "register", "--force", "--name", "one", "--rootfs", "rootfs.ext4")
    assert b"cannot be replaced: used by box" in done.stderr
    done = user.run("image", "delete", "--force", "one")
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"one deleted\n"
    assert b"until one is back these do not start: box" in done.stderr
    done = user.run("vm", "start", "box")
    assert done.returncode == 125


def test_a_catalogs_image_of_a_registry_is_pulled_by_name(user: Sandbox) -> None:
    layout = user.root / "layout"
    make_layout(layout, [[member("hello", data=b"app")]])
    with real_registry(user.root / "registry", user.root / "storage") as registry:
        push(layout, "t", registry.host, "team/app:1")
        catalog = user.home / "images.toml"
        catalog.write_text(
            '[images.app]\nkind = "oci"\ndescription = "The app"\nkernel = "generic-6.1"\n'
            f'source = "{registry.host}/team/app:1"\ncapacity_mib = 32\n'
        )
        user.layout.config.mkdir(parents=True)
        (user.layout.config / "config.toml").write_text(f'catalogs = ["{catalog}"]\n')
        user.ok("image", "catalog", "check")
        user.ok("image", "pull", "app")
        found = user.json("image", "show", "app")
        assert (found["description"], found["kernel"]) == ("The app", "generic-6.1")
        assert found["size_bytes"] == 32 << 20
        assert found["origin"] == f"{registry.host}/team/app:1"
        # One that is there is left alone, whatever becomes of the catalog.
        catalog.write_text("")
        user.ok("image", "show", "app")
