"""Any Linux root file system boots, and everything works in it at once: no network, no sshd."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import pytest

from tests.support.any_image import RECIPES, Recipe, need_any_image
from tests.support.artifacts import need_kernel
from tests.support.ports import free_port
from tests.support.sandbox import Sandbox

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(900)]

SLIM = RECIPES[0]


class Guest(NamedTuple):
    """A VM of one image, with a copy of a repository and a port of the host."""

    user: Sandbox
    recipe: Recipe
    port: int

    @property
    def name(self) -> str:
        return self.recipe.name

    def exec(self, *argv: str, stdin: bytes = b"") -> bytes:
        return self.user.ok("vm", "exec", self.name, "--", *argv, stdin=stdin)


@pytest.fixture(scope="module")
def user() -> Iterator[Sandbox]:
    """A user whose store has the images of this module."""
    kernels = need_kernel().parent
    made = Sandbox(artifacts=False)
    (made.layout.data / "images").mkdir(parents=True, mode=0o700)
    (made.layout.data / "kernels").symlink_to(kernels)
    try:
        yield made
    finally:
        made.keep_evidence("test_any_image")
        made.close()


@pytest.fixture(scope="module", params=RECIPES, ids=lambda recipe: recipe.name)
def guest(
    request: pytest.FixtureRequest, user: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guest]:
    """One VM per image, made as a user makes it."""
    recipe = request.param
    _install(user, recipe)
    repo = tmp_path_factory.mktemp("repo") / "repo"
    repo.mkdir()
    (repo / "file").write_bytes(b"from the repository\n")
    subprocess.run(["git", "-C", repo, "init", "-q"], check=True)
    port = free_port()
    done = user.ok(
        "vm", "run", "-d", "--name", recipe.name, "--image", recipe.name, "--network", "none",
        "--vcpu", "1", "--memory", "256M", "-p", f"{port}:8000", str(repo),
    )  # fmt: skip
    assert done == f"{recipe.name}\n".encode()
    yield Guest(user, recipe, port)
    user.ok("vm", "delete", recipe.name)


def _install(user: Sandbox, recipe: Recipe) -> None:
    link = user.layout.data / "images" / recipe.name
    if not link.exists():
        link.symlink_to(need_any_image(recipe))


def test_the_images_init_is_used_and_with_none_the_agent_is(guest: Guest) -> None:
    # Another init may only just have been told to begin.
    deadline = time.monotonic() + 60
    while not (said := guest.exec("cat", "/proc/1/cmdline")).startswith(guest.recipe.pid1):
        assert time.monotonic() < deadline, said
        time.sleep(0.2)


def test_exec_has_streams_status_and_the_images_environment(guest: Guest) -> None:
    data = os.urandom(100_000)
    assert guest.exec("cat", stdin=data) == data
    environment = guest.exec("env").decode().splitlines()
    assert set(guest.recipe.config.get("Env", [])) <= set(environment)  # type: ignore[call-overload]
    assert "HOME=/root" in environment
    missing = guest.user.run("vm", "exec", guest.name, "--", "no-such-program")
    assert missing.returncode == 127
    given = guest.user.ok("vm", "exec", "-e", "APP=mine", guest.name, "--", "env")
    assert b"APP=mine\n" in given


def test_a_user_is_a_name_or_a_number_without_any_entry(guest: Guest) -> None:
    status = "/proc/self/status"
    said = guest.user.ok("vm", "exec", "--user", "4242:77", guest.name, "--", "cat", status)
    assert b"Uid:\t4242\t4242" in said and b"Gid:\t77\t77" in said
    unknown = guest.user.run("vm", "exec", "--user", "nobody-here", guest.name, "--", "true")
    assert unknown.returncode == 125
    assert b"no user" in unknown.stderr and b"a number needs no entry" in unknown.stderr


def test_the_shell_is_there_at_once(guest: Guest) -> None:
    begun = time.monotonic()
    if not guest.recipe.has_shell:
        for words in (("vm", "ssh", guest.name), ("vm", "run", "--name", guest.name)):
            refused = guest.user.run(*words)
            assert (refused.returncode, refused.stdout) == (125, b"")
            assert b"no shell" in refused.stderr
            assert f"banger vm exec {guest.name} -- PROGRAM".encode() in refused.stderr
        return
    for words in (("vm", "ssh", guest.name), ("vm", "run", "--name", guest.name)):
        status, screen = guest.user.on_a_terminal(*words, typed=b"tty && exit 3\n")
        assert status == 3, screen
        assert b"/dev/pts/" in screen
    assert time.monotonic() - begun < 30
    piped = guest.user.run("vm", "ssh", guest.name, stdin=b"echo $((6*7))\nexit 4\n")
    assert (piped.returncode, piped.stdout) == (4, b"42\n"), piped.stderr


def test_ssh_with_a_command_needs_no_sshd(guest: Guest) -> None:
    words = guest.user.run("vm", "ssh", guest.name, "--", "echo", "two  words", "$HOME")
    assert (words.returncode, words.stdout) == (0, b"two  words $HOME\n"), words.stderr
    if guest.recipe.has_shell:
        line = guest.user.run("vm", "ssh", guest.name, "--", "echo $HOME; exit 6")
        assert (line.returncode, line.stdout) == (6, b"/root\n"), line.stderr
    refused = guest.user.run("vm", "ssh", "-L", "1:localhost:1", guest.name)
    assert refused.returncode == 125
    assert b"has no sshd" in refused.stderr


def test_cp_goes_both_ways(guest: Guest, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(b"\0\xff")
    (tree / "link").symlink_to("file")
    guest.user.ok("vm", "cp", str(tree), f"{guest.name}:/tmp/")
    guest.user.ok("vm", "cp", f"{guest.name}:/tmp/tree", str(tmp_path / "back"))
    assert (tmp_path / "back" / "file").read_bytes() == b"\0\xff"
    assert (tmp_path / "back" / "link").readlink() == Path("file")


def test_a_published_port_leads_to_the_workspace(guest: Guest) -> None:
    assert guest.exec("cat", "/root/repo/file") == b"from the repository\n"
    guest.user.ok("vm", "cp", "/bin/busybox", f"{guest.name}:/tmp/httpd")
    guest.user.ok(
        "vm", "exec", "-d", guest.name, "--",
        "/tmp/httpd", "-f", "-p", "127.0.0.1:8000", "-h", "/root/repo",
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not any(port["port"] == 8000 for port in guest.user.json("vm", "ports", guest.name)):
        assert time.monotonic() < deadline
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{guest.port}/file", timeout=30) as answer:
        assert answer.read() == b"from the repository\n"


def _event(lines: IO[bytes], guest_port: int) -> dict[str, Any]:
    """Return what `vm forward --json` says next of a port."""
    while (said := json.loads(lines.readline()))["guest_port"] != guest_port:
        pass
    found: dict[str, Any] = said
    return found


def test_forwards_lead_to_what_listens(guest: Guest) -> None:
    shown = guest.user.popen("vm", "forward", guest.name, "--auto", "--json")
    named = guest.user.popen("vm", "forward", guest.name, f"8000:{free_port()}", "--json")
    try:
        assert shown.stdout is not None
        assert named.stdout is not None
        # The guest's httpd listens on 8000 already.
        for one in (shown, named):
            said = _event(one.stdout, 8000)
            assert said["type"] == "open"
            with socket.create_connection(("127.0.0.1", said["port"]), timeout=60) as client:
                client.sendall(b"GET /file HTTP/1.0\r\n\r\n")
                assert client.recv(100).startswith(b"HTTP/1.")
        # What begins to listen is opened, and closed when it ends: with the command that runs it.
        words = ("vm", "exec", guest.name, "--", "/tmp/httpd", "-f", "-p", "127.0.0.1:8001")
        second = guest.user.popen(*words)
        opened = _event(shown.stdout, 8001)
        assert opened["type"] == "open"
        second.kill()
        second.communicate()
        assert _event(shown.stdout, 8001)["type"] == "closed"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", opened["port"]), timeout=60)
    finally:
        for one in (shown, named):
            one.send_signal(signal.SIGINT)
            one.communicate(timeout=60)
            assert one.returncode == 130
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    with taken:
        ran = guest.user.run("vm", "forward", guest.name, f"8000:{port}")
    assert ran.returncode == 125
    assert b"is taken" in ran.stderr


def test_the_entrypoint_runs_as_the_image_says(guest: Guest) -> None:
    if not guest.recipe.config:
        ran = guest.user.run("vm", "run", "--image", guest.name, "--entrypoint")
        assert ran.returncode == 125
        assert b"names neither an entrypoint nor a command" in ran.stderr
        return
    run = ("vm", "run", "--rm", "--image", guest.name, "--network", "none", "--vcpu", "1",
           "--memory", "256M", "--entrypoint")  # fmt: skip
    words = ("--", "a  b", "c")
    if guest.recipe is SLIM:
        assert guest.user.ok(*run) == b"www-data /srv/app it's the image's $x: default command\n"
        said = guest.user.ok(*run, "-e", "APP=x", "--user", "root", *words)
        assert said == b"root /srv/app x: a  b c\n"
    else:
        assert guest.user.ok(*run, *words) == b"hello a  b c\n"


def test_stop_and_start_keep_what_was_written(guest: Guest) -> None:
    guest.user.ok("vm", "cp", "/etc/hostname", f"{guest.name}:/root/kept")
    begun = time.monotonic()
    guest.user.ok("vm", "stop", guest.name)
    stopped = guest.user.json("vm", "show", guest.name)
    assert (stopped["state"], stopped["state_reason"]) == ("stopped", "stopped on request")
    assert time.monotonic() - begun < 60
    guest.user.ok("vm", "restart", guest.name)
    assert guest.exec("cat", "/root/kept") == Path("/etc/hostname").read_bytes()
    # At once: the image's init has hardly begun.
    guest.user.ok("vm", "stop", guest.name)
    stopped = guest.user.json("vm", "show", guest.name)
    assert stopped["state_reason"] == "stopped on request"
    guest.user.ok("vm", "start", guest.name)


def test_a_branch_needs_git_in_the_guest_and_says_so(user: Sandbox, tmp_path: Path) -> None:
    _install(user, SLIM)
    repo = tmp_path / "repo"
    repo.mkdir()
    git = ["git", "-c", "user.name=T", "-c", "user.email=t@example.org", "-C", str(repo)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    done = user.run("vm", "run", "--rm", "--image", "slim", "--network", "none", "--vcpu", "1",
                          "--memory", "256M", str(repo), "--branch", "b", "--", "true")  # fmt: skip
    assert done.returncode == 125
    assert b"--branch needs git in the guest" in done.stderr


# -- an sshd where the image has none


def test_an_imported_debian_gets_an_sshd_that_knows_us(user: Sandbox) -> None:
    _install(user, SLIM)
    begun = time.monotonic()
    user.ok("vm", "create", "--name", "sshd", "--image", "slim", "--vcpu", "2", "--memory", "512M")
    assert user.json("vm", "show", "sshd")["with_sshd"] is True
    # Meanwhile nothing waits for it.
    assert user.ok("vm", "ssh", "sshd", "--", "echo $APP") == b"it's the image's $x\n"
    assert time.monotonic() - begun < 120
    log = _await_log(user, "sshd", b"sshd listens", b"no sshd:")
    if b"sshd listens" not in log:
        assert user.run("vm", "exec", "sshd", "--", "apt-get", "-q", "update").returncode != 0, log
        pytest.skip(f"Debian's archive does not answer from the guest: {log[-300:]!r}")
    ports = user.json("vm", "ports", "sshd")
    assert any(port["port"] == 22 for port in ports)
    _ssh_knows_us(user)
    said = user.ok("vm", "exec", "sshd", "--", "/usr/sbin/sshd", "-T").decode().splitlines()
    assert [line for line in said if line.startswith("hostkey ")] == [
        "hostkey /etc/ssh/ssh_host_ed25519_key"
    ]
    assert "permitrootlogin without-password" in said
    locked = user.run("vm", "exec", "sshd", "--", "ls", "/etc/apt/apt.conf.d/00banger-lock")
    assert locked.returncode != 0
    # No init starts it again: the agent's script does.
    user.ok("vm", "restart", "sshd")
    _await_log(user, "sshd", b"sshd listens\n", b"does not start", count=2)
    _ssh_knows_us(user)
    user.ok("vm", "delete", "sshd")


def _ssh_knows_us(user: Sandbox) -> None:
    """Plain ssh gets in by our key and host key, into the image's environment."""
    user.ok("ssh-config", "--install")
    config = user.home / ".ssh" / "config"
    for line, said in (("tool; echo $APP", b"own tool\nit's the image's $x\n"),
                       ("sh -lc tool", b"own tool\n")):  # fmt: skip
        done = subprocess.run(
            ["ssh", "-F", str(config), "-o", "BatchMode=yes", "sshd.vm", line],
            env=user.environment, capture_output=True, timeout=120, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, said), done.stderr.decode()
    by_password = subprocess.run(
        ["ssh", "-F", str(config), "-o", "BatchMode=yes", "-o", "PubkeyAuthentication=no", "sshd.vm"],
        env=user.environment, capture_output=True, timeout=120, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert b"Permission denied (publickey)" in by_password.stderr


def _await_log(user: Sandbox, name: str, *ends: bytes, count: int = 1) -> bytes:
    deadline = time.monotonic() + 600
    while True:
        done = user.run("vm", "exec", name, "--", "cat", "/var/log/banger-sshd.log")
        if sum(done.stdout.count(end) for end in ends) >= count:
            return done.stdout
        assert time.monotonic() < deadline, done
        time.sleep(1)


def test_no_sshd_is_installed_where_none_is_wanted(user: Sandbox) -> None:
    _install(user, SLIM)
    user.ok("vm", "create", "--no-start", "--no-with-sshd", "--name", "without", "--image", "slim")
    assert json.loads(user.ok("vm", "show", "without", "--json"))["with_sshd"] is False
    user.ok("vm", "delete", "without")
