"""Verbs against the fake daemon: what they ask, what they print, how they exit."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from banger.cli import completion
from banger.cli.commands import NOUNS
from banger.guest import ssh
from banger.guest.agent import ExecRequest
from banger.paths import Paths
from tests.unit.cli.conftest import Cli
from tests.unit.client.fake_daemon import FakeDaemon, make_vm


def asked(daemon: FakeDaemon, method: str = "POST") -> list[tuple[str, Any]]:
    return [(path, body) for m, path, body in daemon.requests if m == method]


# -- listings


def test_list_is_a_table_with_isolation(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["GET /v1/vms"] = [make_vm(), make_vm("off", state="stopped", accel="kvm")]
    ran = cli.run("vm", "list")
    lines = ran.out.splitlines()
    assert lines[0].split() == ["NAME", "STATE", "ISOLATION", "IMAGE", "NETWORK", "VCPU", "MEMORY",
                                "DISK", "UPTIME"]  # fmt: skip
    assert lines[1].split()[:4] == ["box", "running", "tcg", "debian-bookworm"]
    assert lines[2].split()[:3] == ["off", "stopped", "kvm"]
    assert lines[2].split()[-1] == "-"
    assert cli.run("vm", "list", "-q").out == "box\noff\n"
    assert len(json.loads(cli.run("vm", "list", "--json").out)) == 2


def test_empty_list_keeps_stdout_empty(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["GET /v1/vms"] = []
    ran = cli.run("vm", "list")
    assert (ran.status, ran.out) == (0, "")
    assert "banger vm run" in ran.err


def test_show_tells_isolation_and_why(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["GET /v1/vms/box"] = make_vm()
    ran = cli.run("vm", "show", "box")
    assert "isolation: tcg (/dev/kvm is absent)" in ran.out
    assert json.loads(cli.run("vm", "show", "box", "--json").out)["name"] == "box"


@pytest.mark.parametrize("noun", ["image", "kernel"])
def test_artifacts(noun: str, cli: Cli, daemon: FakeDaemon) -> None:
    entry = {
        "name": "thing", "installed": True, "digest": "sha256:1", "size_bytes": 1, "disk_bytes": 2,
        "origin": "debian", "created_at": "2026", "description": "A thing", "used_by": ["box"],
        "release": "6.12", "platform": "", "kernel": "", "user": "root", "env": {},
        "entrypoint": ["/bin/run it"], "command": [], "working_dir": "",
    }  # fmt: skip
    other = {**entry, "name": "other", "installed": False, "used_by": []}
    base = f"/v1/{noun}s"
    daemon.answers[f"GET {base}"] = [entry, other]
    daemon.answers[f"GET {base}/thing"] = entry
    pull = base if noun == "image" else f"{base}/thing/pull"
    daemon.answers[f"POST {pull}"] = daemon.operation(result=entry)
    daemon.answers[f"DELETE {base}/thing"] = {"ok": True}
    assert "A thing" in cli.run(noun, "list").out
    assert cli.run(noun, "ls", "-q").out == "thing\n"
    assert "sha256:1" in cli.run(noun, "show", "thing").out
    assert cli.run(noun, "pull", "--force", "thing").out == "thing\n"
    body = {"force": True, **({"source": "thing"} if noun == "image" else {})}
    assert asked(daemon)[-1] == (pull, body)
    for verb in ("rm", "delete"):
        ran = cli.run(noun, verb, "thing", "missing")
        assert ran.status == 125
        assert ran.out == "thing deleted\n"
        assert "missing" in ran.err


# -- changes


def test_create_sends_only_what_was_given(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["POST /v1/vms"] = daemon.operation(result=make_vm())
    ran = cli.run("vm", "create", "--vcpu", "4", "--memory", "1.5G", "--no-start", "--vmm", "qemu")
    assert (ran.status, ran.out) == (0, "box\n")
    body = {"vcpu": 4, "memory_bytes": 3 << 29, "vmm": "qemu", "start": False}
    assert asked(daemon) == [("/v1/vms", body)]


@pytest.mark.parametrize("verb", ["start", "stop", "restart", "kill"])
def test_several_names_are_begun_before_the_first_is_followed(
    verb: str, cli: Cli, daemon: FakeDaemon
) -> None:
    for name in ("one", "two"):
        daemon.answers[f"POST /v1/vms/{name}/{verb}"] = daemon.operation(result=make_vm(name))
    ran = cli.run("vm", verb, "one", "missing", "two", "one")
    assert ran.status == 125
    assert [line.split()[0] for line in ran.out.splitlines()] == ["one", "two"]
    assert "missing" in ran.err
    order = [(m, p.rpartition("/")[2]) for m, p, _ in daemon.requests if p != "/v1/daemon"]
    assert order == [("POST", verb)] * 3 + [("GET", "events")] * 2


def test_failures_of_several_are_reported_each_as_json(cli: Cli, daemon: FakeDaemon) -> None:
    error = {"code": "vmm_failed", "message": "QEMU died", "hint": ""}
    daemon.answers["POST /v1/vms/one/start"] = daemon.operation(error=error)
    daemon.answers["POST /v1/vms/two/start"] = daemon.operation(result=make_vm("two"))
    ran = cli.run("vm", "start", "one", "two", "--json")
    found = json.loads(ran.out)
    assert ran.status == 125
    assert [(entry["name"], entry["ok"]) for entry in found] == [("one", False), ("two", True)]
    assert found[0]["error"]["code"] == "vmm_failed"


def test_all_takes_those_it_fits(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["GET /v1/vms"] = [make_vm("on"), make_vm("off", state="stopped")]
    daemon.answers["POST /v1/vms/on/stop"] = daemon.operation(result=make_vm("on"))
    assert cli.run("vm", "stop", "--all", "--timeout", "5").out == "on stopped\n"
    assert asked(daemon) == [("/v1/vms/on/stop", {"timeout_s": 5.0})]


def test_delete_all_needs_a_yes(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["GET /v1/vms"] = [make_vm("on")]
    daemon.answers["DELETE /v1/vms/on"] = daemon.operation(result={"ok": True})
    ran = cli.run("vm", "delete", "--all")
    assert ran.status == 125
    assert "--yes" in ran.err
    assert cli.run("vm", "rm", "--all", "--yes").out == "on deleted\n"


def test_prune(cli: Cli, daemon: FakeDaemon) -> None:
    pruned = {"vms": ["off"], "freed_bytes": 1 << 20}
    daemon.answers["POST /v1/vms/prune"] = daemon.operation(result=pruned)
    assert cli.run("vm", "prune", "--dry-run").out == "off\n"
    assert cli.run("vm", "prune").status == 125
    assert all(body["dry_run"] for _, body in asked(daemon))
    ran = cli.run("vm", "prune", "--yes", "--all")
    assert (ran.status, ran.out) == (0, "off\n")
    assert asked(daemon)[-1] == ("/v1/vms/prune", {"dry_run": False, "all": True})


def test_set(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["PATCH /v1/vms/box"] = make_vm("new")
    assert cli.run("vm", "set", "box", "--name", "new", "--memory", "1G").out == "new changed\n"
    assert asked(daemon, "PATCH") == [("/v1/vms/box", {"name": "new", "memory_bytes": 1 << 30})]
    assert cli.run("vm", "set", "box").status == 2
    assert cli.run("vm", "set", "box", "--name", "Not_OK").status == 125


def test_quiet_keeps_stderr_empty(cli: Cli, daemon: FakeDaemon) -> None:
    stage = {"type": "stage", "stage": "boot"}
    daemon.answers["POST /v1/vms"] = daemon.operation(stage, result=make_vm())
    assert cli.run("vm", "create", "-q").err == ""
    assert "boot" in cli.run("vm", "create").err


def test_duplicate_name_has_a_hint(cli: Cli, daemon: FakeDaemon) -> None:
    body = {"error": {"code": "conflict", "message": "a VM named box exists", "hint": ""}}
    daemon.answers["POST /v1/vms"] = (409, body)
    ran = cli.run("vm", "run", "--name", "box", "--vcpu", "2", "--", "true")
    assert ran.status == 125
    assert "banger vm delete box" in ran.err


# -- logs


def test_logs_read_the_files_of_the_vm(cli: Cli, daemon: FakeDaemon, tmp_path: Path) -> None:
    console, vmm = tmp_path / "console", tmp_path / "vmm"
    console.write_bytes(b"one\ntwo\n\x1b[31mred\n")
    vmm.write_text("qemu says\n")
    daemon.answers["GET /v1/vms/box"] = make_vm(console_log=str(console), vmm_log=str(vmm))
    assert cli.run("vm", "logs", "box", "-n", "2").out == "two\n\x1b[31mred\n"
    assert cli.run("vm", "logs", "--vmm", "box").out == "qemu says\n"
    assert json.loads(cli.run("vm", "logs", "box", "--json").out)["path"] == str(console)
    assert cli.run("vm", "logs", "box", "-n", "x").status == 125
    console.unlink()
    assert cli.run("vm", "logs", "box").status == 125


def test_daemon_logs_need_no_daemon(cli: Cli, paths: Paths) -> None:
    assert cli.run("daemon", "logs").status == 125
    os.makedirs(paths.state_dir)
    Path(paths.state_dir, "bangerd.log").write_text("started\n")
    assert cli.run("daemon", "logs").out == "started\n"


def test_daemon_status_starts_none(cli: Cli, paths: Paths) -> None:
    ran = cli.run("daemon", "status")
    assert ran.status == 1
    assert "not running" in ran.out
    assert json.loads(cli.run("daemon", "status", "--json").out) == {"running": False}
    assert cli.run("daemon", "stop").out == "the daemon was not running\n"
    assert not os.path.exists(paths.runtime_dir)


def test_daemon_status(cli: Cli, daemon: FakeDaemon) -> None:
    assert "running:" in cli.run("daemon", "status").out
    assert json.loads(cli.run("daemon", "status", "--json").out)["running"] is True


# -- config


def test_config(cli: Cli, paths: Paths) -> None:
    assert cli.run("config", "path").out == f"{paths.config_dir}/config.toml\n"
    os.makedirs(paths.config_dir)
    Path(paths.config_dir, "config.toml").write_text('vmm = "qemu"\n[vm]\nvcpu = 3\n')
    shown = cli.run("config", "show").out
    assert 'vmm = "qemu"\n' in shown
    assert "vm.vcpu = 3\n" in shown
    assert json.loads(cli.run("config", "show", "--json").out)["vm"]["vcpu"] == 3
    Path(paths.config_dir, "config.toml").write_text("vnm_ = 1\nlog_levl = 1\n")
    ran = cli.run("config", "show")
    assert ran.status == 125
    assert "unknown key" in ran.err


# -- completion


def complete(*words: str) -> list[str]:
    return completion.candidates(list(words[:-1]), words[-1])


def test_completion_knows_words_options_and_names(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["GET /v1/vms"] = [make_vm("one"), make_vm("two")]
    daemon.answers["GET /v1/images"] = [{"name": "alpine"}]
    assert complete("v") == ["vm", "version"]
    assert complete("vm", "res") == ["restart"]
    assert "--memory" in complete("vm", "run", "--m")
    assert complete("vm", "stop", "one", "") == ["two"]
    assert complete("ssh", "t") == ["two"]
    assert complete("vm", "run", "--image", "") == ["alpine"]
    assert complete("vm", "create", "--vmm", "q") == ["qemu"]
    assert complete("vm", "cp", "o") == ["one:"]
    assert complete("vm", "run", "x", "--", "") == ["__files__"]
    assert complete("nonsense", "") == []
    assert cli.run("__complete", "vm", "run", "__dd__js").out == "--json\n"


def test_completion_without_a_daemon_starts_none(cli: Cli, paths: Paths) -> None:
    assert complete("vm", "stop", "") == []
    assert not os.path.exists(paths.runtime_dir)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_of_their_shell(shell: str, cli: Cli) -> None:
    script = cli.run("completion", shell).out
    assert "__complete" in script
    if shutil.which(shell) is not None:
        subprocess.run([shell, "-n"], input=script.encode(), check=True)


def test_bash_completes(cli: Cli, tmp_path: Path) -> None:
    fake = tmp_path / "banger"
    fake.write_text('#!/bin/sh\nfor word; do echo "<$word>"; done\n')
    fake.chmod(0o755)
    script = cli.run("completion", "bash").out
    script += "\nCOMP_WORDS=(banger vm --json -- 'a b'); COMP_CWORD=4; _banger"
    script += "\nprintf '%s\\n' \"${COMPREPLY[@]}\"\n"
    done = subprocess.run(["bash", "-c", script], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
                          check=True, capture_output=True, text=True)  # fmt: skip
    assert done.stdout.splitlines() == ["<__complete>", "<vm>", "<__dd__json>", "<__dd__>", "<a b>"]


def test_every_shortcut_of_the_table_completes() -> None:
    for noun in NOUNS:
        assert noun in complete(noun[:1])


# -- ssh


FILES = ssh.SshFiles("/home/a b/key%h", "/home/a b/known_hosts")


def ssh_g(tmp_path: Path, text: str, host: str) -> dict[str, str]:
    path = tmp_path / "config"
    path.write_text(text)
    done = subprocess.run(["ssh", "-G", "-F", path, host], check=True, capture_output=True,
                          text=True)  # fmt: skip
    pairs = (line.partition(" ") for line in done.stdout.splitlines())
    return {name: value for name, _, value in pairs}


def test_block_of_one_vm_is_what_ssh_understands(tmp_path: Path) -> None:
    text = ssh.vm_block("0a1b", "box", FILES, ["/opt/my tools/100%/banger"])
    found = ssh_g(tmp_path, text, "box")
    assert found["hostkeyalias"] == "banger-0a1b"
    assert found["user"] == "root"
    assert found["stricthostkeychecking"] in ("true", "yes")
    assert found["userknownhostsfile"] == "/home/a b/known_hosts"
    assert found["proxycommand"] == "'/opt/my tools/100%%/banger' internal connect box 22"


def test_block_of_every_vm_leaves_hostile_names_alone(tmp_path: Path) -> None:
    text = ssh.every_vm_block(FILES, ["/usr/bin/banger"])
    assert ssh_g(tmp_path, text, "box.vm")["proxycommand"] == (
        "/usr/bin/banger internal connect '%n' 22"
    )
    for host in ("x.example", "a'$(touch x)'.vm"):
        try:
            assert "proxycommand" not in ssh_g(tmp_path, text, host)
        except subprocess.CalledProcessError:
            pass  # newer ssh refuses such a name by itself


def test_hostile_host_name_runs_nothing(tmp_path: Path) -> None:
    recorder = tmp_path / "banger"
    recorder.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > ' + str(tmp_path / "seen") + "\n")
    recorder.chmod(0o755)
    text = ssh.every_vm_block(ssh.SshFiles("/k", "/h"), [str(recorder)])
    (tmp_path / "config").write_text(text)
    for host in (
        "$(touch${IFS}evil).vm",
        "`touch evil`.vm",
        "a;touch evil;.vm",
        "x'`touch evil`'.vm",
    ):
        subprocess.run(["ssh", "-F", "config", host], cwd=tmp_path, stdin=subprocess.DEVNULL,
                       capture_output=True, check=False)  # fmt: skip
        assert not (tmp_path / "evil").exists()
    subprocess.run(["ssh", "-F", "config", "box.vm"], cwd=tmp_path, stdin=subprocess.DEVNULL,
                   capture_output=True, check=False)  # fmt: skip
    assert (tmp_path / "seen").read_text().split() == ["internal", "connect", "box.vm", "22"]


def test_ssh_config_is_installed_once_and_taken_out_exactly(cli: Cli, home: str) -> None:
    config = Path(home, ".ssh/config")
    real = Path(home, "dotfiles")
    real.mkdir()
    (real / "config").write_bytes(b"Host other\n  User \xff\r\n# no newline at the end")
    (real / "config").chmod(0o640)
    config.parent.mkdir()
    config.symlink_to(real / "config")
    before = config.read_bytes()
    assert cli.run("ssh-config").status == 0
    assert config.read_bytes() == before
    assert cli.run("ssh-config", "--install").status == 0
    installed = config.read_bytes()
    assert installed.endswith(before)
    assert installed.startswith(b"Include ")
    cli.run("ssh-config", "--install")
    assert config.read_bytes() == installed
    assert config.is_symlink()
    assert stat.S_IMODE(config.stat().st_mode) == 0o640
    cli.run("ssh-config", "--uninstall")
    assert config.read_bytes() == before
    assert cli.run("ssh-config", "--uninstall").status == 0


def test_ssh_config_is_made_private_when_absent(cli: Cli, home: str) -> None:
    cli.run("ssh-config", "--install")
    assert stat.S_IMODE(os.stat(f"{home}/.ssh/config").st_mode) == 0o600
    assert stat.S_IMODE(os.stat(f"{home}/.ssh").st_mode) == 0o700
    done = subprocess.run(["ssh", "-G", "-F", f"{home}/.ssh/config", "box.vm"], check=True,
                          capture_output=True, text=True)  # fmt: skip
    assert "internal connect" in done.stdout


@pytest.fixture
def reachable(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A VM whose sshd listens, and an ssh that is only written down."""
    from banger.cli import vm_run
    from banger.guest import agent

    started: list[list[str]] = []
    endpoint = {"kind": "unix", "path": "/nonexistent"}
    daemon.answers["GET /v1/vms/box/connection"] = {"vm": make_vm(), "endpoint": endpoint}
    monkeypatch.setattr(agent, "find_shell", lambda *_: agent.Shell([b"/bin/bash"], "up"))

    def become(path: str, argv: list[str]) -> None:
        started.append([path, *argv[1:]])
        raise SystemExit(0)

    def run(argv: list[str]) -> int:
        started.append(argv)
        return 7

    monkeypatch.setattr(os, "execv", become)
    monkeypatch.setattr(vm_run, "_run_interactive", run)
    return started


def test_ssh_becomes_the_systems_ssh(cli: Cli, paths: Paths, reachable: list[list[str]]) -> None:
    cli.run("vm", "ssh", "-o", "ForwardAgent=yes", "box", "--", "printf", "%s", "a b")
    cli.run("vm", "ssh", "box", "--", "cd /srv && ls")
    config = f"{paths.runtime_dir}/ssh/id-box.conf"
    ssh_path = shutil.which("ssh")
    assert reachable == [
        [ssh_path, "-o", "ForwardAgent=yes", "-F", config, "box", "--", "printf %s 'a b'"],
        [ssh_path, "-F", config, "box", "--", "cd /srv && ls"],
    ]
    text = Path(config).read_text()
    assert "HostKeyAlias banger-id-box" in text
    assert stat.S_IMODE(os.stat(config).st_mode) == 0o600


@pytest.fixture
def entered(reachable: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> list[ExecRequest]:
    """What the agent was asked to run in a VM whose sshd does not listen."""
    from banger.cli import vm_exec
    from banger.guest import agent

    requests: list[ExecRequest] = []

    def execute(_: Any, request: ExecRequest, *, json: bool) -> int:
        requests.append(request)
        return 5

    monkeypatch.setattr(vm_exec, "execute", execute)
    monkeypatch.setattr(agent, "find_shell", lambda *_: agent.Shell([b"/bin/bash"], "none"))
    return requests


def test_ssh_without_an_sshd_enters_through_the_agent_at_once(
    cli: Cli, reachable: list[list[str]], entered: list[ExecRequest]
) -> None:
    assert cli.run("vm", "ssh", "box") == (5, "", "")
    assert cli.run("vm", "ssh", "box", "--", "cd /srv && ls").status == 5
    assert cli.run("vm", "ssh", "-t", "box", "--", "printf", "%s", "a b").status == 5
    assert [request.argv for request in entered] == [
        [b"/bin/bash"],
        [b"/bin/bash", b"-c", b"cd /srv && ls"],
        [b"printf", b"%s", b"a b"],
    ]
    assert [request.tty is not None for request in entered] == [False, False, True]
    assert reachable == []
    ran = cli.run("vm", "ssh", "-L", "8080:localhost:80", "box")
    assert ran.status == 125
    assert "--with-sshd" in ran.err


def test_ssh_of_a_silent_guest_enters_through_the_agent_after_its_time(
    cli: Cli, entered: list[ExecRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    from banger.guest import agent

    waits: list[float] = []
    monkeypatch.setattr(agent, "find_shell", lambda *_: agent.Shell([b"/bin/sh"], "coming"))
    monkeypatch.setattr(agent, "probe_port", lambda *_, wait_s: waits.append(wait_s))
    ran = cli.run("vm", "ssh", "box")
    assert (ran.status, ran.out) == (5, "")
    assert "banger vm logs box" in ran.err
    assert waits == [180.0]


def test_a_host_without_ssh_enters_through_the_agent(
    cli: Cli, entered: list[ExecRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert cli.run("vm", "ssh", "box").status == 5
    assert entered[0].argv == [b"/bin/bash"]


def test_an_image_without_a_shell_says_what_works(
    cli: Cli, daemon: FakeDaemon, entered: list[ExecRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    from banger.guest import agent

    monkeypatch.setattr(agent, "find_shell", lambda *_: agent.Shell(None, "none"))
    daemon.answers["POST /v1/vms"] = daemon.operation(result=make_vm())
    for words in (("vm", "ssh", "box"), ("vm", "ssh", "box", "--", "ls"), ("vm", "run")):
        ran = cli.run(*words)
        assert ran.status == 125
        assert "no shell" in ran.err
        assert "banger vm exec box -- PROGRAM" in ran.err
    assert cli.run("vm", "ssh", "box", "--", "/app", "x").status == 5


IMAGE = {
    "name": "app", "installed": True, "user": "1000:app", "env": {"A": "image"},
    "entrypoint": ["/app", "-v"], "command": ["serve"], "working_dir": "/srv",
}  # fmt: skip


def test_entrypoint_runs_as_docker_would(
    cli: Cli, daemon: FakeDaemon, entered: list[ExecRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    from banger.guest import agent

    made: list[bytes] = []
    monkeypatch.setattr(agent, "stat_path", lambda *_: None)
    monkeypatch.setattr(agent, "put_tar", lambda _, path, *__: made.append(path))
    daemon.answers["GET /v1/images/app"] = IMAGE
    daemon.answers["GET /v1/images/debian-bookworm"] = IMAGE  # what make_vm's is
    daemon.answers["POST /v1/vms"] = daemon.operation(result=make_vm())
    run = ("vm", "run", "--image", "app", "--entrypoint")
    assert cli.run(*run).status == 5
    assert cli.run(*run, "--", "check", "it").status == 5
    assert cli.run(*run, "--user", "root", "--cwd", "/", "--rm", "--env", "B=1").status == 5
    first, second, third = entered
    assert (first.argv, first.user, first.cwd) == ([b"/app", b"-v", b"serve"], "1000:app", b"/srv")
    assert second.argv == [b"/app", b"-v", b"check", b"it"]
    assert (third.user, third.cwd, third.env) == ("root", b"/", {b"B": b"1"})
    assert made == [b"/srv", b"/srv"]
    bodies = [body for path, body in asked(daemon) if path == "/v1/vms"]
    assert ["with_sshd" in body for body in bodies] == [False, False, True]


def test_no_credentials_is_asked_for_and_shown(cli: Cli, daemon: FakeDaemon) -> None:
    daemon.answers["POST /v1/vms"] = daemon.operation(result=make_vm())
    assert cli.run("vm", "create", "--no-credentials").status == 0
    assert cli.run("vm", "create").status == 0
    bodies = [body for path, body in asked(daemon) if path == "/v1/vms"]
    assert [body.get("credentials") for body in bodies] == [False, None]
    for told, more in (
        ("none of yours", {}),
        ("none of yours, by --no-credentials", {"credentials": False}),
        ("/root/a /root/b", {"synced_files": ["/root/a", "/root/b"]}),
    ):
        daemon.answers["GET /v1/vms/box"] = {**make_vm(), **more}
        assert f"files:     {told}\n" in cli.run("vm", "show", "box").out


def test_entrypoint_of_an_image_with_none_is_told_before_a_vm_is_made(
    cli: Cli, daemon: FakeDaemon
) -> None:
    daemon.answers["GET /v1/images/app"] = {**IMAGE, "entrypoint": [], "command": []}
    ran = cli.run("vm", "run", "--image", "app", "--entrypoint")
    assert ran.status == 125
    assert "names neither an entrypoint nor a command" in ran.err
    assert asked(daemon) == []


def test_run_of_an_existing_name_enters_it_again(
    cli: Cli, daemon: FakeDaemon, reachable: list[list[str]]
) -> None:
    daemon.answers["GET /v1/vms/box"] = make_vm(state="stopped")
    daemon.answers["POST /v1/vms/box/start"] = daemon.operation(result=make_vm())
    ran = cli.run("vm", "run", "--name", "box")
    assert ran.status == 7
    assert asked(daemon) == [("/v1/vms/box/start", None)]
    assert "box exists and is stopped: starting it" in ran.err
    assert "banger vm ssh box` comes back" in ran.err
    daemon.answers["GET /v1/vms/box"] = make_vm()
    assert "entering it again" in cli.run("run", "--name", "box").err
    assert len(asked(daemon)) == 1


def test_run_without_a_command_opens_a_shell(
    cli: Cli, daemon: FakeDaemon, reachable: list[list[str]]
) -> None:
    daemon.answers["POST /v1/vms"] = daemon.operation(result=make_vm())
    ran = cli.run("vm", "run")
    assert (ran.status, ran.out) == (7, "")
    assert reachable[0][-1] == "box"
    assert "banger vm delete box` deletes it" in ran.err


def test_run_detached_without_a_command_prints_the_name(
    cli: Cli, daemon: FakeDaemon, reachable: list[list[str]]
) -> None:
    daemon.answers["POST /v1/vms"] = daemon.operation(result=make_vm())
    assert cli.run("vm", "run", "-d").out == "box\n"
    assert reachable == []


def test_doctor_works_without_a_daemon_and_with_a_broken_config(
    cli: Cli, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    from banger.services import doctor

    fixed: list[str] = []

    async def run_checks(*_: Any) -> list[doctor.Check]:
        status = "ok" if fixed else "fail"
        return [
            doctor.Check("git", status, "not installed", "apt install git", fixable=True),
            doctor.Check("kvm", "warning", "no\x1b[2J kvm", "reboot", fixable=False),
        ]

    async def fix(check: doctor.Check, *_: Any) -> bool:
        fixed.append(check.name)
        return True

    monkeypatch.setattr(doctor, "run_checks", run_checks)
    monkeypatch.setattr(doctor, "fix", fix)
    os.makedirs(paths.config_dir)
    Path(paths.config_dir, "config.toml").write_text("not toml")
    ran = cli.run("doctor")
    assert ran.status == 1
    assert "fail     git: not installed\n         mend it: apt install git\n" in ran.out
    assert "\x1b" not in ran.out
    assert json.loads(cli.run("doctor", "--json").out)["ok"] is False
    assert cli.run("doctor", "--fix").status == 0
    assert fixed == ["git"]
