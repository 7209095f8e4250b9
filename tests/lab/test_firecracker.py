"""The whole main job with the real Firecracker: `banger vm run` and its kin inside the lab."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.lab import Lab

IMAGE = "debian-bookworm-minimal"
HOME = "/root"
SMALL = f"--image {IMAGE} --memory 384M --vcpu 1"
# Emulated twice over, a boot takes 20-40 s; several at once take their turns.
_BOOT_S = 400
# What a name, a connection or an address takes in there.
_PATIENCE_S = 120

# Succeeds when a TCP connection to $1:$2 opens within 10 s; bash is in every Debian, nc is not.
_CONNECT = 'timeout 10 bash -c "exec 3<>/dev/tcp/$1/$2"'


@pytest.fixture(scope="module")
def host(lab: Lab) -> Iterator[Lab]:
    """A root user with images and kernels, and nothing else."""
    lab.link_artifacts(HOME)
    lab.ok(
        f"mkdir -p {HOME}/.config/banger && printf '[vm]\\nboot_timeout_s = 300\\n' "
        f">{HOME}/.config/banger/config.toml; banger daemon stop || true"
    )
    yield lab
    lab.run("banger vm prune --all; banger daemon stop", timeout_s=_PATIENCE_S)


@pytest.fixture(scope="module")
def pair(host: Lab) -> Lab:
    """Two VMs on the bridge, kept apart; `one` publishes its ssh."""
    host.ok(
        f"banger vm create -q {SMALL} --name one --network bridge -p 2022:22 &"
        f"banger vm create -q {SMALL} --name two --network bridge; wait $! && banger vm list",
        timeout_s=2 * _BOOT_S,
    )
    for name in ("one", "two"):
        _wait_for(host, f"banger vm exec {name} -- sh -c 'test -e /run/sshd.pid'")
    return host


def _wait_for(host: Lab, script: str) -> None:
    """Wait until a command in the lab succeeds."""
    host.ok(
        f"for i in $(seq {_PATIENCE_S}); do {script} >/dev/null 2>&1 && exit; sleep 1; done; "
        f"echo 'never: '{shlex.quote(script)} >&2; {script}",
        timeout_s=3 * _PATIENCE_S,
    )


def _vm(host: Lab, name: str) -> dict[str, Any]:
    return host.json("vm", "show", name)  # type: ignore[no-any-return]


def _connects(host: Lab, vm: str, address: str, port: int) -> bool:
    done = host.run(f"banger vm exec {vm} -- sh -c {shlex.quote(_CONNECT)} x {address} {port}")
    return done.returncode == 0


def _processes(host: Lab) -> str:
    """Return the processes that any VM has."""
    return host.run("pgrep -af 'banger-vm-[0-9a-f]{12}'").stdout.decode()


def test_vm_run_takes_firecracker_and_its_stdout_is_the_commands(host: Lab) -> None:
    done = host.run(f"banger vm run --rm -q {SMALL} -- sh -c 'uname -s; exit 7'", timeout_s=_BOOT_S)
    assert (done.returncode, done.stdout, done.stderr) == (7, b"Linux\n", b"")
    assert host.json("vm", "list") == []
    assert _processes(host) == ""


def test_qemu_runs_by_kvm_too_and_the_guest_has_a_clock(host: Lab) -> None:
    """Its machine has no timer of a PC, by which a kernel could find out the processor's rate."""
    script = "uname -s; cat /sys/devices/system/clocksource/clocksource0/current_clocksource"
    done = host.run(
        f"banger vm run --vmm qemu --name q -q {SMALL} -- sh -c {shlex.quote(script)}",
        timeout_s=_BOOT_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() in ([b"Linux", b"kvm-clock"], [b"Linux", b"tsc"])
    shown = _vm(host, "q")
    assert (shown["vmm"], shown["accel"]) == ("qemu", "kvm")
    host.ok("banger vm delete q")


def test_a_repository_arrives_and_the_command_runs_in_it(host: Lab) -> None:
    host.ok(
        "rm -rf /tmp/repo && mkdir -p /tmp/repo && cd /tmp/repo && git init -qb main"
        " && echo ignored >.gitignore && echo hello >'a file' && touch ignored"
        " && printf 'test:\\n\\t@cat \"a file\"; pwd; ls\\n' >Makefile && git add -A"
        " && git -c user.name=T -c user.email=t@example.org commit -qm one"
    )
    done = host.run(
        f"cd /tmp && banger vm run --rm -q {SMALL} ./repo -- sh -c 'cat a*; pwd; ls'",
        timeout_s=_BOOT_S,
    )
    assert done.stdout == b"hello\n/root/repo\nMakefile\na file\n", done.stderr
    assert done.returncode == 0


def test_an_imported_image_without_init_runs_in_firecracker(host: Lab) -> None:
    host.ok(
        "rm -rf /tmp/bb && mkdir -p /tmp/bb/bin && cp /bin/busybox /tmp/bb/bin/"
        " && for name in sh cat tr; do ln -s busybox /tmp/bb/bin/$name; done"
        " && banger image pull -q --force --name bb rootfs:/tmp/bb"
    )
    done = host.run(
        "banger vm run --rm -q --image bb --memory 256M --vcpu 1 --network none -- "
        "sh -c 'cat /proc/1/cmdline | tr \\\\0 .; exit 3'",
        timeout_s=_BOOT_S,
    )
    assert (done.returncode, done.stdout) == (3, b"/init."), done.stderr
    host.ok("banger image delete bb")


def test_isolation_and_vmm_are_shown(pair: Lab) -> None:
    for vm in pair.json("vm", "list"):
        assert (vm["state"], vm["vmm"], vm["accel"]) == ("running", "firecracker", "kvm")


def test_the_vmm_is_jailed(pair: Lab) -> None:
    vm = _vm(pair, "one")
    other = _vm(pair, "two")
    facts = pair.ok(
        f"cat /proc/{vm['pid']}/status; cat /proc/{vm['pid']}/cgroup; "
        f"for n in mnt pid; do readlink /proc/{vm['pid']}/ns/$n /proc/1/ns/$n; done; "
        f"cat /sys/fs/cgroup/banger/banger-vm-{vm['id']}-*/memory.max; "
        f"grep ^Uid /proc/{other['pid']}/status"
    )
    status = dict(line.split(":\t", 1) for line in facts.splitlines() if ":\t" in line)
    uid = status["Uid"].split()[0]
    assert int(uid) >= 1_900_000_000
    # The last Uid line is the other VM's.
    first = next(line for line in facts.splitlines() if line.startswith("Uid"))
    assert first.split()[1] != uid, "two VMs share a uid"
    assert status["CapEff"] == "0000000000000000"
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert f"/banger/banger-vm-{vm['id']}-" in facts
    namespaces = [line for line in facts.splitlines() if line.startswith(("mnt:", "pid:"))]
    assert len(set(namespaces)) == 4
    assert str((384 + 64) << 20) in facts


def test_ssh_reaches_it_by_address_and_by_name(pair: Lab) -> None:
    address = _vm(pair, "one")["address"]
    assert address.startswith("172.16.0.")
    options = (
        "-o BatchMode=yes -o StrictHostKeyChecking=yes -o ConnectTimeout=60 "
        "-o HostKeyAlias=one.vm -i ~/.config/banger/ssh/id_ed25519 "
        "-o UserKnownHostsFile=~/.config/banger/ssh/known_hosts"
    )
    assert pair.ok(f"ssh {options} root@{address} hostname") == "one"
    assert f" {address} " in f" {pair.ok('getent ahostsv4 one.vm')} "
    assert pair.ok(f"ssh {options} root@one.vm hostname") == "one"
    # A name of nobody's is nobody's, and other names are still resolved.
    assert pair.run("getent ahostsv4 nobody.vm").returncode != 0
    assert pair.run("getent ahostsv4 deb.debian.org").returncode == 0


def test_a_published_port_leads_into_the_vm_on_loopback_alone(pair: Lab) -> None:
    banner = pair.ok("timeout 20 bash -c 'exec 3<>/dev/tcp/127.0.0.1/2022; head -1 <&3'")
    assert banner.startswith("SSH-2.0")
    assert "127.0.0.1:2022" in pair.ok("ss -ltnH 'sport = 2022'")
    assert _vm(pair, "one")["publish"] == ["127.0.0.1:2022:22"]
    taken = pair.run(f"banger vm run --rm {SMALL} -p 2022:22 -- true", timeout_s=_BOOT_S)
    assert taken.returncode == 125
    assert b"127.0.0.1:2022 cannot be published" in taken.stderr


def test_two_vms_cannot_reach_each_other_but_the_outside(pair: Lab) -> None:
    one, two = (_vm(pair, name)["address"] for name in ("one", "two"))
    assert not _connects(pair, "one", two, 22)
    assert not _connects(pair, "two", one, 22)
    assert pair.run(f"{_CONNECT.replace('$1', one).replace('$2', '22')}").returncode == 0
    assert pair.run(f"{_CONNECT.replace('$1', two).replace('$2', '22')}").returncode == 0
    # Debian's archive, by name: DNS and NAT.
    assert _connects(pair, "one", "deb.debian.org", 80)


def test_a_guest_reaches_neither_the_hosts_services_nor_a_metadata_server(pair: Lab) -> None:
    # Both are there: the lab's own sshd, and a listener on an address of the lab's.
    pair.ok("ip addr replace 169.254.169.254/32 dev lo")
    try:
        assert pair.run("timeout 5 bash -c '</dev/tcp/169.254.169.254/22'").returncode == 0
        assert not _connects(pair, "one", "169.254.169.254", 22)
        assert not _connects(pair, "one", "172.16.0.1", 22)
        assert not _connects(pair, "one", "10.0.2.15", 22)
    finally:
        pair.ok("ip addr del 169.254.169.254/32 dev lo")


def test_an_exec_does_not_notice_that_the_daemon_is_killed_and_all_is_adopted(pair: Lab) -> None:
    before = {vm["name"]: vm["pid"] for vm in pair.json("vm", "list")}
    running = pair.popen("banger vm exec one -- sh -c 'echo begun; cat; echo ended'")
    assert running.stdout is not None
    assert running.stdout.readline() == b"begun\n"
    rules = pair.ok("nft list ruleset | grep -c vm_")
    daemon = pair.json("daemon", "status")["pid"]
    pair.ok(f"kill -9 {daemon}")
    after = pair.json("vm", "list")
    assert {vm["name"]: vm["pid"] for vm in after} == before
    assert {vm["state"] for vm in after} == {"running"}
    assert pair.json("daemon", "status")["pid"] != daemon
    out, err = running.communicate(b"through\n", timeout=60)
    assert (running.returncode, out, err) == (0, b"through\nended\n", b"")
    assert pair.ok("nft list ruleset | grep -c vm_") == rules
    assert f" {_vm(pair, 'one')['address']} " in f" {pair.ok('getent ahostsv4 one.vm')} "


def test_a_session_lives_on_over_vsock_and_its_whole_tree_ends(pair: Lab) -> None:
    script = "echo up; (setsid setsid sleep 4321 &); while read line; do echo got $line; done"
    pair.ok(f"banger vm session start one --name it -- sh -c {shlex.quote(script)}")
    pair.ok("kill -9 $(banger daemon status --json | jq .pid); banger vm session send one it hello")
    _wait_for(pair, "banger vm session logs one it | grep -q 'got hello'")
    shown = pair.json("vm", "session", "show", "one", "it")
    assert shown["state"] == "running"
    # Any program may use the socket: a line, and the bytes of stdout come.
    ask = '{"read_only": true, "from": "start", "raw": true}'
    client = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        "s.sendall(sys.argv[2].encode() + b'\\n'); f = s.makefile('rb');"
        "print(f.readline()[:11], f.readline(), f.readline())"
    )
    words = " ".join(shlex.quote(word) for word in ("python3", "-c", client, shown["socket"], ask))
    assert pair.ok(words) == "b'{\"ok\": true' b'up\\n' b'got hello\\n'"
    pair.ok("banger vm session stop one it")
    commands = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '"
    left = pair.ok(f"banger vm exec one -- sh -c {shlex.quote(commands)}")
    assert "sleep 4321" not in left
    assert pair.json("vm", "session", "show", "one", "it")["reason"] == "stopped"
    pair.ok("banger vm session rm one it")


def test_stop_start_and_restart_keep_disk_and_address(pair: Lab) -> None:
    address = _vm(pair, "one")["address"]
    pair.ok("banger vm exec one -- sh -c 'echo kept >/root/kept; sync'")
    pair.ok("banger vm stop one", timeout_s=_PATIENCE_S)
    stopped = _vm(pair, "one")
    assert (stopped["state"], stopped["state_reason"]) == ("stopped", "stopped on request")
    left = pair.run(
        f"pgrep -af '[b]anger-vm-{stopped['id']}'; ls -d /sys/fs/cgroup/banger/*{stopped['id']}*; "
        f"ls -d {stopped['directory']}/jail; ls /run/banger/*/vms | grep {stopped['id']}; "
        f"nft list ruleset | grep vm_{stopped['id']}; ip -d link | grep {stopped['id']}; "
        "ss -ltnH 'sport = 2022'"
    )
    assert left.stdout == b""
    pair.ok("banger vm start one", timeout_s=_BOOT_S)
    assert pair.ok("banger vm exec one -- cat /root/kept") == "kept"
    pair.ok("banger vm restart one", timeout_s=_BOOT_S)
    assert pair.ok("banger vm exec one -- cat /root/kept") == "kept"
    assert _vm(pair, "one")["address"] == address


def test_a_guest_that_ends_by_itself_is_seen_as_stopped(pair: Lab) -> None:
    pair.ok("banger vm exec two -- systemctl reboot")
    _wait_for(pair, "banger vm show two --json | jq -e '.state == \"stopped\"'")
    assert _vm(pair, "two")["state_reason"] == "the guest shut down by itself"


def test_open_vms_reach_each_other(pair: Lab) -> None:
    pair.ok("banger vm stop one two", timeout_s=_PATIENCE_S)
    pair.ok("banger vm set one --no-isolate && banger vm set two --no-isolate --no-nat")
    pair.ok("banger vm start one two", timeout_s=2 * _BOOT_S)
    one, two = (_vm(pair, name)["address"] for name in ("one", "two"))
    for name in ("one", "two"):
        _wait_for(pair, f"banger vm exec {name} -- sh -c 'test -e /run/sshd.pid'")
    assert _connects(pair, "one", two, 22)
    assert _connects(pair, "two", one, 22)
    assert not _connects(pair, "two", "deb.debian.org", 80), "no-nat reaches the outside"
    assert _connects(pair, "one", "deb.debian.org", 80)


def test_a_reboot_of_the_host_is_reconciled(pair: Lab) -> None:
    """What a reboot does, done by hand: every process, /run, every interface and rule is gone."""
    pair.ok(
        f"kill -9 {pair.json('daemon', 'status')['pid']}; pkill -9 -f 'banger-vm-[0-9a-f]{12}'; sleep 1; "
        "for l in $(ip -json link | jq -r '.[].ifname' | grep -E '^(bt|br-banger)'); do "
        "ip link del $l; done; nft delete table inet banger; nft delete table netdev banger; "
        "rm -rf /run/banger; cat /proc/sys/kernel/random/uuid >/tmp/boot_id; "
        "mount --bind /tmp/boot_id /proc/sys/kernel/random/boot_id"
    )
    try:
        states = {vm["name"]: (vm["state"], vm["pid"]) for vm in pair.json("vm", "list")}
        assert states == {"one": ("stopped", None), "two": ("stopped", None)}
        assert (
            pair.run("ls /sys/fs/cgroup/banger; ls /root/.local/share/banger/vms/*/jail").stdout
            == b""
        )
        pair.ok("banger vm start one", timeout_s=_BOOT_S)
        assert pair.ok("banger vm exec one -- cat /root/kept") == "kept"
        _wait_for(pair, "getent ahostsv4 one.vm")
    finally:
        pair.ok("banger daemon stop; umount /proc/sys/kernel/random/boot_id")


def test_delete_leaves_nothing(pair: Lab) -> None:
    pair.ok("banger vm delete one two", timeout_s=_PATIENCE_S)
    assert pair.json("vm", "list") == []
    assert _processes(pair) == ""
    left = pair.ok(
        "ls ~/.local/share/banger/vms /run/banger/*/vms/ /sys/fs/cgroup/banger 2>/dev/null; "
        "nft list ruleset | grep -c 'chain vm_' || true"
    )
    assert [line for line in left.splitlines() if line and not line.endswith(":")] == ["0"]


def test_the_user_network_of_root_is_pastas_own_and_outbound_only(host: Lab) -> None:
    host.ok(
        "systemd-run -q --unit=onlo --collect python3 -m http.server --bind 127.0.0.1 7070;"
        "for i in $(seq 60); do timeout 5 bash -c '</dev/tcp/127.0.0.1/7070' && exit; sleep 1; done"
    )
    try:
        done = host.run(
            f"banger vm run --rm -q {SMALL} --network user -- sh -c "
            + shlex.quote(
                "cut -d' ' -f1 /proc/net/route | sort -u | tail -1; ip -4 -o addr show eth0;"
                f" for a in 'deb.debian.org 80' '10.0.2.2 7070' '127.0.0.1 7070'; do set -- $a;"
                f" {_CONNECT} 2>/dev/null; echo $1 $?; done"
            ),
            timeout_s=_BOOT_S,
        )
    finally:
        host.ok("systemctl stop onlo")
    lines = done.stdout.decode().splitlines()
    assert "10.0.2.15/24" in done.stdout.decode(), done.stderr
    assert "deb.debian.org 0" in lines
    assert not {"10.0.2.2 0", "127.0.0.1 0"} & set(lines)
    assert _processes(host) == ""


def test_docker_runs_inside_the_full_image(host: Lab) -> None:
    # The host's static busybox makes the smallest container: no compiler runs twice emulated.
    done = host.run(
        "banger vm delete docks 2>/dev/null; banger vm run -q --name docks --image debian-bookworm --memory 1G --vcpu 1 -- true"
        " && banger vm cp /usr/bin/busybox docks:/tmp/busybox"
        " && banger vm exec --wait docks -- sh -c "
        + shlex.quote(
            "docker info --format '{{.Driver}}' && cd /tmp && tar c busybox | docker import - e"
            " >/dev/null && docker run --rm --network none e /busybox echo from a container"
        ),
        timeout_s=3 * _BOOT_S,
    )
    assert done.stdout == b"overlay2\nfrom a container\n", done.stderr.decode()[-2000:]
    host.ok("banger vm delete docks", timeout_s=_PATIENCE_S)


# -- without root


@pytest.fixture(scope="module")
def user(host: Lab) -> Iterator[Lab]:
    """`dev`, who may open /dev/kvm and is nobody else."""
    host.link_artifacts("/home/dev", user="dev")
    host.ok(
        "chmod -R a+rX /home/dev/.local; install -d -o dev -g dev /home/dev/.config/banger;"
        "printf '[vm]\\nboot_timeout_s = 300\\n' >/home/dev/.config/banger/config.toml;"
        "runuser -u dev -- env HOME=/home/dev banger daemon stop;"
        "chmod 660 /dev/kvm; chgrp kvm /dev/kvm; usermod -aG kvm dev; rm -f /etc/sudoers.d/dev"
    )
    yield host
    host.run("runuser -u dev -- env HOME=/home/dev banger vm prune --all", timeout_s=_PATIENCE_S)
    host.ok("chmod 666 /dev/kvm; rm -f /etc/sudoers.d/dev")


def test_without_root_a_user_namespace_confines_the_vmm(user: Lab) -> None:
    user.ok(
        f"banger vm delete mine 2>/dev/null; banger vm create -q {SMALL} --name mine --network user -p 127.0.0.1:3022:22",
        user="dev",
        timeout_s=_BOOT_S,
    )
    vm = user.json("vm", "show", "mine", user="dev")
    assert (vm["vmm"], vm["accel"]) == ("firecracker", "kvm")
    facts = user.ok(
        f"cat /proc/{vm['pid']}/status; readlink /proc/{vm['pid']}/ns/user /proc/1/ns/user "
        f"/proc/{vm['pid']}/ns/net /proc/1/ns/net; stat -c %a $(dirname {vm['directory']})"
    )
    status = dict(line.split(":\t", 1) for line in facts.splitlines() if ":\t" in line)
    assert (status["CapEff"], status["CapBnd"]) == ("0000000000000000", "0000000000000000")
    assert status["NoNewPrivs"] == "1"
    assert status["Uid"].split()[0] == user.ok(["id", "-u", "dev"])
    links = [line for line in facts.splitlines() if line.startswith(("user:", "net:"))]
    assert len(set(links)) == 4
    assert facts.endswith("\n700")
    assert user.ok("banger vm exec mine -- getent hosts deb.debian.org", user="dev")
    user.ok("banger vm exec mine -- sh -c 'echo to the console >/dev/console'", user="dev")
    _wait_for(user, "runuser -u dev -- env HOME=/home/dev banger vm logs mine | grep 'to the con'")
    _wait_for(
        user, "timeout 20 bash -c 'exec 3<>/dev/tcp/127.0.0.1/3022; head -c 4 <&3 | grep SSH'"
    )
    user.ok("banger vm delete mine", user="dev", timeout_s=_PATIENCE_S)
    assert _processes(user) == ""


def test_the_bridge_needs_the_helper_and_says_how_to_allow_it(user: Lab) -> None:
    refused = user.run(f"banger vm create {SMALL} --network bridge", user="dev")
    assert refused.returncode == 125
    assert b"NOPASSWD" in refused.stderr
    assert user.json("vm", "list", user="dev") == []
    rule = refused.stderr.decode().split("visudo: ")[1].strip()
    # Root's own bridge is there and stays root's: a second user takes another.
    user.ok(f"echo {shlex.quote(rule)} >/etc/sudoers.d/dev")
    other = user.run(f"banger vm create {SMALL} --network bridge", user="dev")
    assert other.returncode == 125
    assert b"bridge_name" in other.stderr, other.stderr
    user.ok(
        'printf \'bridge_name = "br-bangerdev"\\ncidr = "172.17.5.0/24"\\n'
        'bridge_ip = "172.17.5.1"\\ndns_listen_addr = "127.0.0.1:15354"\\n[vm]\\nboot_timeout_s = 300\\n\''
        " >/home/dev/.config/banger/config.toml"
    )
    user.ok("banger daemon stop", user="dev")
    user.ok(
        f"banger vm delete bridged 2>/dev/null; banger vm create -q {SMALL} --name bridged --network bridge",
        user="dev",
        timeout_s=_BOOT_S,
    )
    vm = user.json("vm", "show", "bridged", user="dev")
    assert (vm["address"], vm["vmm"]) == ("172.17.5.2", "firecracker")
    _wait_for(user, _CONNECT.replace("$1", vm["address"]).replace("$2", "22"))
    assert user.ok("banger vm exec bridged -- getent hosts deb.debian.org", user="dev")
    user.ok("banger vm delete bridged", user="dev", timeout_s=_PATIENCE_S)


def test_a_user_without_access_to_kvm_is_told_how_to_get_it(user: Lab) -> None:
    user.ok("gpasswd -d dev kvm; chmod 660 /dev/kvm")
    try:
        user.ok("banger daemon stop", user="dev")
        refused = user.run(f"banger vm create {SMALL} --vmm firecracker", user="dev")
        assert refused.returncode == 125
        assert b"usermod -aG kvm" in refused.stderr
        assert user.json("vm", "list", user="dev") == []
    finally:
        user.ok(
            "usermod -aG kvm dev; chmod 666 /dev/kvm; runuser -u dev -- env HOME=/home/dev banger daemon stop || true"
        )
