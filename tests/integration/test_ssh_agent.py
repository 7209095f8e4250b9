"""`--forward-agent` with a real ssh-agent, the real agent of the guest, and OpenSSH's programs.

The guest is this host (the agent's test mode); its ssh-agent is started here, with keys of its own.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.integration.test_workspaces import Machine

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

WAIT_S = 30.0


class SshAgent:
    """A user's ssh-agent with one key."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.socket = str(root / "ssh-agent")
        self.environment = {"PATH": os.environ["PATH"], "SSH_AUTH_SOCK": self.socket}
        self.process = subprocess.Popen(
            ["ssh-agent", "-D", "-a", self.socket], stdout=subprocess.DEVNULL
        )
        wait_until(lambda: os.path.exists(self.socket))
        self.key = self.make_key("key")
        self.add(str(self.key))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def make_key(self, name: str) -> Path:
        path = self.root / name
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", path], check=True
        )
        return path

    def add(self, *words: str) -> None:
        subprocess.run(["ssh-add", "-q", *words], env=self.environment, check=True)

    def keys(self) -> bytes:
        done = subprocess.run(
            ["ssh-add", "-L"], env=self.environment, stdout=subprocess.PIPE, check=True
        )
        return done.stdout


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with tempfile.TemporaryDirectory(prefix="bng-") as root:
        # Where the agent, in its test mode, makes the guest's sockets.
        os.mkdir(f"{root}/tmp")
        monkeypatch.setenv("TMPDIR", f"{root}/tmp")
        made = Machine(Path(root))
        try:
            yield made
        finally:
            made.close()


@pytest.fixture
def ssh_agent(machine: Machine) -> Iterator[SshAgent]:
    with SshAgent(machine.root) as started:
        machine.environment["SSH_AUTH_SOCK"] = started.socket
        yield started


def sockets(machine: Machine) -> list[Path]:
    return list((machine.root / "tmp").glob("banger-ssh-*/agent"))


def run(machine: Machine, *command: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
    ran = machine.run("vm", "exec", "-i", "--forward-agent", "box", "--", *command, stdin=stdin)
    return ran.returncode, ran.stdout, ran.stderr


def test_programs_in_the_guest_list_and_use_the_hosts_keys(
    machine: Machine, ssh_agent: SshAgent
) -> None:
    assert run(machine, "ssh-add", "-L") == (0, ssh_agent.keys(), b"")
    status, out, _ = run(machine, "ssh-add", "-l")
    assert (status, b"ED25519" in out) == (0, True)
    public = f"{ssh_agent.key}.pub"
    ssh_agent.key.unlink()  # only the ssh-agent has it now
    sign = ("ssh-keygen", "-q", "-Y", "sign", "-n", "file", "-f", public)
    status, signature, stderr = run(machine, *sign, stdin=b"hello")
    assert status == 0, stderr
    (machine.root / "sig").write_bytes(signature)
    checked = subprocess.run(
        ["ssh-keygen", "-Y", "check-novalidate", "-n", "file", "-s", machine.root / "sig"],
        input=b"hello", capture_output=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr


def test_without_the_option_nothing_is_forwarded(machine: Machine, ssh_agent: SshAgent) -> None:
    ran = machine.run("vm", "exec", "box", "--", "sh", "-c", 'echo "${SSH_AUTH_SOCK-none}"')
    assert ran.stdout == b"none\n"
    assert sockets(machine) == []


def test_the_socket_is_private_and_goes_with_the_command(
    machine: Machine, ssh_agent: SshAgent
) -> None:
    script = 'stat -c %a "$SSH_AUTH_SOCK" "${SSH_AUTH_SOCK%/*}"; exit 7'
    assert run(machine, "sh", "-c", script) == (7, b"600\n700\n", b"")
    assert sockets(machine) == []
    assert list((machine.root / "tmp").iterdir()) == []
    # Every stream ended in order: no port is left dirty.
    locks = {path.read_text() for path in (machine.root / "agent").glob("p*.lock")}
    assert locks == {"C"}


@pytest.mark.parametrize(
    "words",
    [["-D"], ["-d", "KEY.pub"], ["NEW"], ["-x"]],
    ids=["remove all", "remove", "add", "lock"],
)
def test_a_guest_cannot_change_the_ssh_agent(
    machine: Machine, ssh_agent: SshAgent, words: list[str]
) -> None:
    new = ssh_agent.make_key("new")
    before = ssh_agent.keys()
    words = [w.replace("KEY", str(ssh_agent.key)).replace("NEW", str(new)) for w in words]
    # What asks for the lock's password.
    asked = machine.root / "asked"
    asked.write_text("#!/bin/sh\necho secret\n")
    asked.chmod(0o755)
    script = 'SSH_ASKPASS="$0" SSH_ASKPASS_REQUIRE=force setsid -w ssh-add "$@"'
    status, _, stderr = run(machine, "sh", "-c", script, str(asked), *words)
    assert status != 0, stderr
    assert ssh_agent.keys() == before


def test_a_key_bound_to_certain_hosts_is_not_there_for_a_guest(
    machine: Machine, ssh_agent: SshAgent
) -> None:
    bound = ssh_agent.make_key("bound")
    host_key = ssh_agent.make_key("host").with_suffix(".pub").read_text()
    (machine.root / "known").write_text(f"example.org {host_key}")
    before = ssh_agent.keys()
    ssh_agent.add("-H", str(machine.root / "known"), "-h", "example.org", str(bound))
    public = bound.with_suffix(".pub").read_bytes()
    assert public.split()[1] in ssh_agent.keys()
    assert run(machine, "ssh-add", "-L") == (0, before, b"")


def test_many_at_once_are_served_each(machine: Machine, ssh_agent: SshAgent) -> None:
    script = "for i in $(seq 40); do ssh-add -L & done; wait"
    command = ("vm", "exec", "--forward-agent", "box", "--", "sh", "-c", script)
    both = [
        machine.start(*command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) for _ in range(2)
    ]
    for process in both:
        assert process.communicate(timeout=60)[0] == ssh_agent.keys() * 40
        assert process.returncode == 0
    assert sockets(machine) == []


def test_a_killed_command_line_leaves_no_socket(machine: Machine, ssh_agent: SshAgent) -> None:
    process = machine.start(
        "vm", "exec", "--forward-agent", "box", "--", "sh", "-c", "echo up; exec sleep 60",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    (found,) = sockets(machine)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(found))
        process.kill()
        process.wait()
        process.stdout.close()
        client.settimeout(WAIT_S)
        assert client.recv(1) == b""
    wait_until(lambda: not found.parent.exists())


@pytest.fixture
def guest_socket(machine: Machine, ssh_agent: SshAgent) -> Iterator[str]:
    """The guest's socket while a command runs; what it says of it afterwards is checked."""
    process = machine.start(
        "vm", "exec", "-i", "--forward-agent", "box", "--", "sh", "-c",
        'echo "$SSH_AUTH_SOCK"; read line; ssh-add -L',
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    yield process.stdout.readline().decode().strip()
    out, _ = process.communicate(b"\n", timeout=60)
    assert out == ssh_agent.keys()
    assert sockets(machine) == []


def connect(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(WAIT_S)
    client.connect(path)
    return client


@pytest.mark.parametrize(
    "data",
    [b"\xff" * 4, b"\0\0\0\0", b"\0\4\0\1x", os.urandom(64) + b"\xff" * (2 << 20)],
    ids=["longest", "empty", "one too long", "garbage"],
)
def test_nonsense_closes_its_own_connection(guest_socket: str, data: bytes) -> None:
    with connect(guest_socket) as client:
        try:
            client.sendall(data)
            assert client.recv(64) == b""
        except (ConnectionResetError, BrokenPipeError):
            pass


def test_refusals_and_answers_keep_their_order(guest_socket: str) -> None:
    listing, lock, extension = b"\0\0\0\1\x0b", b"\0\0\0\2\x16x", b"\0\0\0\6\x1b\0\0\0\1x"
    with connect(guest_socket) as client:
        client.sendall(lock + listing + extension + listing + b"\0\0\0\1\x13")
        kinds = []
        for _ in range(5):
            length = int.from_bytes(client.recv(4, socket.MSG_WAITALL), "big")
            kinds.append(client.recv(length, socket.MSG_WAITALL)[0])
    assert kinds == [5, 12, 5, 12, 5]


def test_clients_that_never_read_hold_up_nobody(guest_socket: str) -> None:
    clients = [connect(guest_socket) for _ in range(8)]
    for client in clients:
        client.settimeout(0.2)
        try:
            while True:
                client.sendall(b"\0\0\0\1\x0b" * 10000)
        except OSError:  # its own buffers are full, or it is cut off
            pass
    # The fixture asks through a ninth.
    guest = subprocess.run(
        ["ssh-add", "-l"], env={"PATH": os.environ["PATH"], "SSH_AUTH_SOCK": guest_socket},
        capture_output=True, timeout=WAIT_S, check=False,
    )  # fmt: skip
    assert guest.returncode == 0
    for client in clients:
        client.close()


def test_an_ssh_agent_that_ends_meanwhile_ends_no_command(
    machine: Machine, ssh_agent: SshAgent
) -> None:
    process = machine.start(
        "vm", "exec", "-i", "--forward-agent", "box", "--", "sh", "-c",
        "echo up; read line; ssh-add -l || echo none; exit 7",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    ssh_agent.process.kill()
    ssh_agent.process.wait()
    out, _ = process.communicate(b"\n", timeout=60)
    assert (out, process.returncode) == (b"none\n", 7)


def test_interrupts_still_reach_the_command(machine: Machine, ssh_agent: SshAgent) -> None:
    script = "trap 'ssh-add -l >/dev/null && exit 9' INT; echo up; while :; do sleep 0.1; done"
    process = machine.start(
        "vm", "exec", "--forward-agent", "box", "--", "sh", "-c", script,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 9
    process.stdout.close()


def test_run_acp_and_a_shell_without_sshd_forward_too(
    machine: Machine, ssh_agent: SshAgent
) -> None:
    keys = ssh_agent.keys()
    ran = machine.run("vm", "run", "--rm", "--forward-agent", "--", "ssh-add", "-L")
    assert (ran.returncode, ran.stdout) == (0, keys), ran.stderr
    ran = machine.run("vm", "acp", "box", "--forward-agent", "--", "ssh-add", "-L")
    assert (ran.returncode, ran.stdout) == (0, keys), ran.stderr
    # Without ssh on the host the agent's shell is the way in.
    tools = machine.root / "tools"
    tools.mkdir()
    machine.environment["PATH"] = str(tools)
    for words in (["vm", "ssh", "--forward-agent", "box"], ["vm", "run", "--forward-agent"]):
        ran = machine.run(*words, stdin=b"ssh-add -L\n")
        assert (ran.returncode, ran.stdout) == (0, keys), ran.stderr
    ran = machine.run("vm", "ssh", "--forward-agent", "box", "--", "ssh-add -L")
    assert (ran.returncode, ran.stdout) == (0, keys), ran.stderr
    assert sockets(machine) == []


def test_without_an_ssh_agent_no_vm_is_made(machine: Machine) -> None:
    for sock, said in ((None, b"SSH_AUTH_SOCK is not set"), ("/nonexistent", b"does not answer")):
        if sock is not None:
            machine.environment["SSH_AUTH_SOCK"] = sock
        for words in (
            ["vm", "run", "--forward-agent", "--", "true"],
            ["vm", "exec", "--forward-agent", "box", "--", "true"],
            ["vm", "ssh", "--forward-agent", "box"],
            ["vm", "acp", "--forward-agent", "box"],
        ):
            ran = machine.run(*words)
            assert ran.returncode == 125
            assert said in ran.stderr
            assert b'hint: start one: `eval "$(ssh-agent)"; ssh-add`' in ran.stderr
    assert machine.daemon.requests == []


def test_an_ssh_agent_without_keys_is_forwarded_with_a_word(
    machine: Machine, ssh_agent: SshAgent
) -> None:
    subprocess.run(["ssh-add", "-q", "-D"], env=ssh_agent.environment, check=True)
    status, out, stderr = run(machine, "ssh-add", "-l")
    assert (status, out) == (1, b"The agent has no identities.\n")
    assert b"your ssh-agent holds no key yet: `ssh-add` gives it one" in stderr
