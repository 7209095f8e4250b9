"""A VM becomes an image: what was put there is in it, and who the machine was is not."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.support.artifacts import need_image
from tests.support.sandbox import Sandbox
from tests.support.tiny import make_tiny_image

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

MACHINE = ("--network", "none", "--memory", "512M", "--vcpu", "1")
MINIMAL = "debian-bookworm-minimal"


@pytest.fixture
def user(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A user with images of their own: promoting adds to the store, which tests share."""
    made = Sandbox.with_own_images()
    try:
        yield made
    finally:
        made.keep_evidence(request.node.name)
        made.close()


def _run(user: Sandbox, vm: str, script: str) -> str:
    return user.ok("vm", "exec", vm, "--", "sh", "-c", script).decode()


def test_the_smallest_machine_becomes_an_image(user: Sandbox) -> None:
    rootfs = make_tiny_image(user.home / "own")
    user.ok("image", "register", "--name", "tiny", "--rootfs", str(rootfs))
    user.ok("vm", "create", "--name", "a", "--image", "tiny", *MACHINE)
    refused = user.run("image", "promote", "a", "--name", "mine")
    assert refused.returncode == 125
    assert b"banger vm stop a" in refused.stderr
    _run(
        user,
        "a",
        "set -e; bb=/bin/busybox; echo kept > /root/file; $bb ln /root/file /root/again; "
        "$bb rm /bin/ps; $bb mknod /root/null c 1 3; $bb mkfifo /root/pipe; $bb chmod 4755 /bin/ls;"
        "$bb chown 7:8 /root/pipe; echo mine >> /root/.ssh/authorized_keys; "
        "echo 10.1.2.3 other >> /etc/hosts; echo in-docker > /var/lib/docker/x; $bb cp /bin/busybox"
        " /root/program; $bb ln -s /nowhere /root/link; echo x > /run/volatile",
    )
    keys = _run(user, "a", "cat /root/.ssh/authorized_keys")
    assert keys.splitlines()[1] == "mine"
    user.ok("vm", "stop", "a")
    before = user.json("vm", "show", "a")
    entry = user.json("image", "promote", "a", "--name", "mine", "--kernel-ref", "generic-6.12")
    assert (entry["kernel"], entry["origin"]) == ("generic-6.12", "vm:a on tiny")
    after = user.json("vm", "show", "a")
    assert {k: v for k, v in after.items() if k != "disk_used_bytes"} == {
        k: v for k, v in before.items() if k != "disk_used_bytes"
    }
    assert user.processes() == []

    user.ok("vm", "create", "--name", "b", "--image", "mine", *MACHINE)
    assert _run(user, "b", "cat /root/file /root/again") == "kept\nkept\n"
    assert _run(user, "b", "/bin/busybox stat -c '%F %h %u:%g %a %t,%T' /root/* /bin/ls") == (
        "regular file 2 0:0 644 0,0\n"
        "regular file 2 0:0 644 0,0\n"
        "symbolic link 1 0:0 777 0,0\n"
        "character special file 1 0:0 644 1,3\n"
        "fifo 1 7:8 644 0,0\n"
        "regular file 1 0:0 4755 0,0\n"
        "symbolic link 1 0:0 777 0,0\n"
    )
    assert _run(user, "b", "cat /root/.ssh/authorized_keys").splitlines()[0] == "mine"
    hosts = _run(user, "b", "cat /etc/hosts").splitlines()
    assert "10.1.2.3 other" in hosts
    assert ("127.0.1.1\ta" in hosts, "127.0.1.1\tb" in hosts) == (False, True)
    assert (
        _run(user, "b", "ls /var/lib/docker /bin/ps /run/volatile 2>&1; true").count("No such") == 2
    )
    # The VM it was made of goes on where it was.
    user.ok("vm", "start", "a")
    assert _run(user, "a", "cat /root/file /var/lib/docker/x") == "kept\nin-docker\n"
    used = user.run("image", "promote", "a", "--name", "mine", "--force")
    assert used.returncode == 125


@pytest.mark.slow
def test_a_debian_with_systemd_becomes_an_image_with_an_identity_of_its_own(user: Sandbox) -> None:
    (user.layout.data / "images" / MINIMAL).symlink_to(need_image(MINIMAL))
    machine = ("--memory", "512M", "--vcpu", "2")
    user.ok("vm", "create", "--name", "a", "--image", MINIMAL, *machine)
    user.ok("vm", "cp", "/bin/busybox", "a:/usr/local/bin/busybox")
    _run(
        user,
        "a",
        "set -e; useradd -m someone; echo mine > /home/someone/file; chown someone: "
        "/home/someone/file; ssh-keygen -q -t rsa -N '' -f /etc/ssh/ssh_host_rsa_key; "
        "rm /etc/motd; echo 'unwritten to disk' > /root/late",
    )
    who = "cat /etc/machine-id; cat /etc/ssh/ssh_host_*.pub; cat /etc/hostname"
    first = _run(user, "a", who).splitlines()
    user.ok("vm", "stop", "a")

    # Ctrl-C half way: nothing is left, and the machine is as it was.
    begun = user.popen("image", "promote", "a", "--name", "mine")
    assert begun.stderr is not None
    for line in begun.stderr:
        if b"reading the machine" in line:
            break
    assert user.json("vm", "show", "a")["state"] == "stopping"
    begun.send_signal(signal.SIGINT)
    begun.communicate(timeout=120)
    assert begun.returncode == 130
    assert user.json("vm", "show", "a")["state"] == "stopped"
    assert not (user.layout.data / "images" / "mine").exists()
    assert list((user.layout.data / "staging").iterdir()) == []
    assert user.processes() == []

    assert user.ok("image", "promote", "a", "--name", "mine") == b"mine\n"
    user.ok("vm", "delete", "a")
    user.ok("vm", "create", "--name", "b", "--image", "mine", *machine)
    user.ok("vm", "exec", "--wait", "b", "--", "true")
    assert _run(user, "b", "systemctl is-system-running; systemctl --failed --plain --no-legend")
    assert _run(user, "b", "su someone -c 'cat ~/file'") == "mine\n"
    assert _run(
        user, "b", "/usr/local/bin/busybox echo ran; cat /root/late; ls /etc/motd 2>&1 || true"
    ) == ("ran\nunwritten to disk\nls: cannot access '/etc/motd': No such file or directory\n")
    second = _run(user, "b", who).splitlines()
    assert (first[0] != second[0], len(first), len(second)) == (True, 4, 3)
    assert not set(first) & set(second)
    keys = _run(user, "b", "cat /root/.ssh/authorized_keys").splitlines()
    assert len(keys) == 1
    assert user.ok("vm", "ssh", "b", "--", "hostname") == b"b\n"
