"""The networks with real machines under QEMU, in a network namespace of their own.

The namespace has a default route into an interface, so that passt finds one, and nothing
that a packet could reach; no packet leaves this test.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.support.artifacts import need_image, need_kernel
from tests.support.sandbox import Sandbox

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace: needs root"),
]

IMAGE = "debian-bookworm-minimal"
SMALL = ("--image", IMAGE, "--vcpu", "1", "--memory", "384M")
_CONNECT = "timeout 5 bash -c 'exec 3<>/dev/tcp/{}/{} && head -c 4 <&3'"


@pytest.fixture(scope="module")
def namespace() -> Iterator[list[str]]:
    """The words that enter a namespace with lo and a default route to nowhere."""
    name = f"bngsys-{os.getpid()}"
    enter = ["ip", "netns", "exec", name]
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        for words in (
            "ip link set lo up",
            "ip link add d0 type veth peer name d1",
            "ip addr add 192.0.2.1/24 dev d0",
            "ip link set d0 up",
            "ip link set d1 up",
            "ip route add default via 192.0.2.254",
        ):
            subprocess.run([*enter, *words.split()], check=True)
        yield enter
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.fixture(scope="module")
def user(namespace: list[str], request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A user whose daemon and machines live in the namespace, with two VMs on its bridge."""
    need_kernel()
    need_image(IMAGE)
    made = Sandbox(prefix=namespace)
    failed_before = request.session.testsfailed
    try:
        begun = [
            made.popen(
                "vm", "create", "-q", *SMALL, "--name", name, "--network", "bridge", *options
            )
            for name, options in (("one", ("-p", "2022:22")), ("two", ()))
        ]
        for running in begun:
            _, said = running.communicate(timeout=600)
            assert running.returncode == 0, said.decode()
        for name in ("one", "two"):
            _wait_for_ssh(made, name)
        yield made
    finally:
        if request.session.testsfailed > failed_before:
            made.keep_evidence(request.node.nodeid)
        made.close()


def _host(user: Sandbox, *words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*user.prefix, *words], capture_output=True, timeout=60, check=False, env=user.environment
    )


def _wait_for_ssh(user: Sandbox, name: str) -> None:
    deadline = time.monotonic() + 300
    while user.run("vm", "exec", name, "--", "test", "-e", "/run/sshd.pid").returncode != 0:
        assert time.monotonic() < deadline
        time.sleep(0.5)


def _address(user: Sandbox, name: str) -> str:
    return str(user.json("vm", "show", name)["address"])


def _greeting(user: Sandbox, vm: str, address: str, port: int) -> bytes:
    """Return what a service says to a guest; empty when it is not reached."""
    command = ("sh", "-c", _CONNECT.format(address, port))
    return user.run("vm", "exec", vm, "--", *command).stdout


def test_the_host_reaches_each_vm_and_they_not_each_other(user: Sandbox) -> None:
    one, two = _address(user, "one"), _address(user, "two")
    assert {one, two} == {"172.16.0.2", "172.16.0.3"}
    for address in (one, two):
        done = _host(user, "sh", "-c", _CONNECT.format(address, 22))
        assert done.stdout == b"SSH-", done.stderr
    assert _greeting(user, "one", two, 22) == b""
    assert _greeting(user, "two", one, 22) == b""
    assert _greeting(user, "one", one, 22) == b"SSH-"


def test_names_are_answered(user: Sandbox) -> None:
    done = _host(user, "dig", "+short", "-p", "15353", "@127.0.0.1", "one.vm")
    assert done.stdout.decode().strip() == _address(user, "one")


def test_a_published_port_leads_into_the_guest_and_listens_on_loopback_alone(user: Sandbox) -> None:
    done = _host(user, "sh", "-c", _CONNECT.format("127.0.0.1", 2022))
    assert done.stdout == b"SSH-", done.stderr
    assert b"127.0.0.1:2022" in _host(user, "ss", "-ltnH", "sport = 2022").stdout
    assert _host(user, "sh", "-c", _CONNECT.format("192.0.2.1", 2022)).stdout == b""


def test_a_guest_reaches_no_service_of_the_host(user: Sandbox) -> None:
    with _serving(user, "0.0.0.0", 7070):
        assert _host(user, "sh", "-c", _CONNECT.format("127.0.0.1", 7070)).stdout == b"host"
        assert _greeting(user, "one", "172.16.0.1", 7070) == b""
        assert _greeting(user, "one", "192.0.2.1", 7070) == b""


@contextlib.contextmanager
def _serving(user: Sandbox, address: str, port: int) -> Iterator[None]:
    """Listen in the namespace and greet whoever comes."""
    program = (
        f"import socket\ns = socket.create_server(({address!r}, {port}))\nprint('up', flush=True)\n"
        "while True:\n    c, _ = s.accept()\n    c.sendall(b'host')\n    c.close()"
    )
    with subprocess.Popen(
        [*user.prefix, "python3", "-c", program], stdout=subprocess.PIPE
    ) as serving:
        assert serving.stdout is not None
        assert serving.stdout.readline() == b"up\n"
        yield
        serving.kill()


def test_a_killed_daemon_is_noticed_by_nobody_and_the_rules_stay(user: Sandbox) -> None:
    pids = {vm["name"]: vm["pid"] for vm in user.json("vm", "list")}
    before = _host(user, "nft", "list", "ruleset").stdout
    daemon = user.daemon_pid()
    assert daemon is not None
    os.kill(daemon, 9)
    assert {vm["name"]: vm["pid"] for vm in user.json("vm", "list")} == pids
    assert _host(user, "nft", "list", "ruleset").stdout == before
    assert _host(user, "sh", "-c", _CONNECT.format("127.0.0.1", 2022)).stdout == b"SSH-"
    deadline = time.monotonic() + 30
    while (
        b"172.16" not in _host(user, "dig", "+short", "-p", "15353", "@127.0.0.1", "one.vm").stdout
    ):
        assert time.monotonic() < deadline


def test_a_change_of_network_waits_for_a_stop_and_a_bad_one_changes_nothing(user: Sandbox) -> None:
    running = user.run("vm", "set", "one", "--no-isolate")
    assert running.returncode == 125
    assert b"banger vm stop one" in running.stderr
    for words, message in (
        (("-p", "1:2:3:4"), b"not [HOST_IP:]PORT:GUEST_PORT"),
        (("-p", "80:80", "-p", "80:81"), b"asked for twice"),
        (("--network", "brigde"), b"did you mean bridge"),
    ):
        refused = user.run("vm", "set", "one", *words)
        assert refused.returncode == 125
        assert message in refused.stderr, refused.stderr
    assert user.json("vm", "show", "one")["publish"] == ["127.0.0.1:2022:22"]


def test_a_taken_port_is_named_and_the_vm_is_not_made(user: Sandbox) -> None:
    done = user.run("vm", "create", *SMALL, "--name", "three", "-p", "2022:80")
    assert done.returncode == 125
    assert b"127.0.0.1:2022 cannot be published: something listens there already" in done.stderr
    assert {vm["name"] for vm in user.json("vm", "list")} == {"one", "two"}


def test_open_vms_reach_each_other_and_a_stop_leaves_no_tap(user: Sandbox) -> None:
    user.ok("vm", "stop", "one", "two")
    links = json.loads(_host(user, "ip", "-json", "link").stdout)
    ids = [vm["id"] for vm in user.json("vm", "list")]
    assert not [link for link in links if any(i in link.get("ifalias", "") for i in ids)]
    assert b"chain vm_" not in _host(user, "nft", "list", "ruleset").stdout
    assert _host(user, "ss", "-ltnH", "sport = 2022").stdout == b""
    for name in ("one", "two"):
        user.ok("vm", "set", name, "--no-isolate")
    user.ok("vm", "start", "one", "two", timeout_s=600)
    for name in ("one", "two"):
        _wait_for_ssh(user, name)
    assert _greeting(user, "one", _address(user, "two"), 22) == b"SSH-"


def test_the_user_network_publishes_and_does_not_reach_the_hosts_loopback(user: Sandbox) -> None:
    user.ok("vm", "delete", "one", "two")
    user.ok("vm", "create", "-q", *SMALL, "--name", "mine", "-p", "3022:22", timeout_s=600)
    _wait_for_ssh(user, "mine")
    done = _host(user, "sh", "-c", _CONNECT.format("127.0.0.1", 3022))
    assert done.stdout == b"SSH-", done.stderr
    assert b"127.0.0.1:3022" in _host(user, "ss", "-ltnH", "sport = 3022").stdout
    with _serving(user, "127.0.0.1", 7070):
        assert _host(user, "sh", "-c", _CONNECT.format("127.0.0.1", 7070)).stdout == b"host"
        assert _greeting(user, "mine", "10.0.2.2", 7070) == b""
    user.ok("vm", "restart", "mine", timeout_s=600)
    assert user.json("vm", "show", "mine")["publish"] == ["127.0.0.1:3022:22"]
    user.ok("vm", "delete", "mine")
    assert _host(user, "pgrep", "-f", "passt --quiet").stdout == b""
    assert _host(user, "ss", "-ltnH", "sport = 3022").stdout == b""


def test_a_bridge_that_is_somebody_elses_is_left_alone(namespace: list[str]) -> None:
    other = Sandbox(prefix=namespace)
    try:
        subprocess.run([*namespace, "ip", "link", "del", "br-banger"], check=False)
        subprocess.run([*namespace, "ip", "link", "add", "br-banger", "type", "bridge"], check=True)
        done = other.run("vm", "create", *SMALL, "--network", "bridge")
        assert done.returncode == 125
        assert b"br-banger" in done.stderr
        assert other.json("vm", "list") == []
        subprocess.run([*namespace, "ip", "link", "del", "br-banger"], check=True)
        subprocess.run([*namespace, *"ip route add 172.16.0.0/16 dev d0".split()], check=True)
        done = other.run("vm", "create", *SMALL, "--network", "bridge")
        assert done.returncode == 125
        assert b"172.16.0.0/16" in done.stderr
        assert b"cidr" in done.stderr
        subprocess.run([*namespace, *"ip route del 172.16.0.0/16 dev d0".split()], check=True)
    finally:
        other.close()


def test_an_exhausted_network_says_so(namespace: list[str]) -> None:
    small = Sandbox(prefix=namespace)
    try:
        config = small.home / ".config" / "banger"
        config.mkdir(parents=True)
        (config / "config.toml").write_text(
            'bridge_name = "br-bangerx"\nbridge_ip = "10.99.0.1"\ncidr = "10.99.0.0/29"\n'
            'network = "bridge"\ntap_pool_size = 1\ndns_listen_addr = ""\n'
        )
        for number in range(5):
            small.ok("vm", "create", "--no-start", *SMALL, "--name", f"v{number}")
        done = small.run("vm", "create", "--no-start", *SMALL, "--name", "v5")
        assert done.returncode == 125
        assert b"10.99.0.0/29" in done.stderr
        small.ok("vm", "delete", "v2")
        small.ok("vm", "create", "--no-start", *SMALL, "--name", "v6")
        assert small.json("vm", "show", "v6")["address"] == "10.99.0.4"
    finally:
        small.close()
