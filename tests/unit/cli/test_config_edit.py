"""`banger config get|set|unset|edit|check`: comments stay, nothing invalid is ever written."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Cli

TEXT = """# mine
vmm = "qemu"  # no KVM here

[vm]
# sizes
memory = "2G"
"""


@pytest.fixture
def file(home: str) -> Path:
    path = Path(home, ".config", "banger", "config.toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(TEXT)
    path.chmod(0o640)
    return path


def test_get_is_the_value_in_force(cli: Cli, file: Path) -> None:
    assert cli.run("config", "get", "vmm").out == "qemu\n"
    assert cli.run("config", "get", "vm.memory").out == "2G\n"
    assert cli.run("config", "get", "bridge_nat").out == "true\n"
    assert cli.run("config", "get", "vm.vcpu").out == ""
    found = json.loads(cli.run("config", "get", "default_dns", "--json").out)
    assert found == {"key": "default_dns", "value": []}
    wrong = cli.run("config", "get", "vm.memry")
    assert wrong.status == 125
    assert "did you mean vm.memory?" in wrong.err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["network", "bridge"], 'network = "bridge"'),
        (["bridge_nat", "false"], "bridge_nat = false"),
        (["tap_pool_size", "2"], "tap_pool_size = 2"),
        (["vm.memory", "4GiB"], 'memory = "4GiB"'),
        (["vm.memory", "2147483648"], "memory = 2147483648"),
        (["default_dns", "9.9.9.9", "1.1.1.1"], 'default_dns = ["9.9.9.9", "1.1.1.1"]'),
        (["default_dns", "9.9.9.9"], 'default_dns = ["9.9.9.9"]'),
        (["default_image_name", "true"], 'default_image_name = "true"'),
        (["registries.insecure", "reg.lan:5000"], 'insecure = ["reg.lan:5000"]'),
    ],
)
def test_set_changes_one_line(cli: Cli, file: Path, words: list[str], line: str) -> None:
    ran = cli.run("config", "set", *words)
    assert ran.status == 0, ran.err
    new = file.read_text()
    assert line in new
    assert "# mine" in new
    assert "# sizes" in new
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert cli.run("config", "check").status == 0
    assert cli.run("config", "unset", words[0]).status == 0
    assert line not in file.read_text()


def test_unset_of_the_last_comment_line_keeps_the_rest(cli: Cli, file: Path) -> None:
    assert cli.run("config", "unset", "vmm").status == 0
    assert file.read_text() == TEXT.replace('vmm = "qemu"  # no KVM here\n', "")
    assert cli.run("config", "unset", "vmm").status == 0  # again: fine
    assert cli.run("config", "get", "vmm").out == "auto\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vmm", "virtualbox"], "not auto, qemu or firecracker"),
        (["vm.memory", "lots"], "vm.memory"),
        (["tap_pool_size", "many"], "tap_pool_size"),
        (["vm.cpus", "2"], "did you mean"),
        (["nosuch", "2"], "no setting nosuch"),
        (["vmm", "qemu", "firecracker"], "vmm"),
    ],
)
def test_what_is_not_valid_changes_nothing(
    cli: Cli, file: Path, words: list[str], said: str
) -> None:
    ran = cli.run("config", "set", *words)
    assert ran.status == 125
    assert said in ran.err
    assert file.read_text() == TEXT


def test_the_first_setting_makes_a_private_file(cli: Cli, file: Path) -> None:
    file.unlink()
    assert cli.run("config", "set", "vm.vcpu", "3").status == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert cli.run("config", "get", "vm.vcpu").out == "3\n"


def test_a_link_into_dotfiles_stays_one(cli: Cli, file: Path, tmp_path: Path) -> None:
    target = tmp_path / "dotfile.toml"
    target.write_text(TEXT)
    file.unlink()
    file.symlink_to(target)
    assert cli.run("config", "set", "network", "none").status == 0
    assert file.is_symlink()
    assert 'network = "none"' in target.read_text()


def test_a_broken_file_is_not_touched(cli: Cli, file: Path) -> None:
    file.write_text("vmm = [")
    ran = cli.run("config", "set", "network", "none")
    assert ran.status == 125
    assert "config edit" in ran.err
    assert file.read_text() == "vmm = ["
    check = cli.run("config", "check")
    assert check.status == 1
    assert "not TOML" in check.err
    found = json.loads(cli.run("config", "check", "--json").out)
    assert found["ok"] is False
    assert cli.run("config", "check", "/no/such/file").status == 1


def _edit(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "banger", "config", "edit"],
        env={**os.environ, "VISUAL": "", "EDITOR": script},
        capture_output=True,
        text=True,
        check=False,
    )


def test_edit_takes_what_is_valid_only(file: Path) -> None:
    ran = _edit("sed -i s/qemu/auto/")
    assert ran.returncode == 0, ran.stderr
    assert 'vmm = "auto"  # no KVM here' in file.read_text()
    assert "nothing is changed" in _edit("true").stderr
    bad = _edit("sed -i s/auto/none/")
    assert bad.returncode == 125
    assert 'vmm = "auto"' in file.read_text()
    kept = Path(bad.stderr.split("your text is in ")[1].split(";")[0])
    assert 'vmm = "none"' in kept.read_text()
    kept.unlink()
    assert _edit("false").returncode == 125
    assert [path.name for path in file.parent.iterdir()] == ["config.toml"]


def test_a_table_of_the_users_own_names_is_one_value(cli: Cli) -> None:
    assert cli.run("config", "get", "acp_agents").out == "{}\n"
    assert cli.run("config", "set", "acp_agents", '{ g = ["gemini", "--acp"] }').status == 0
    assert cli.run("config", "get", "acp_agents").out == '{"g": ["gemini", "--acp"]}\n'
    one = '[{ host = "~/a", guest = "~/b" }]'
    assert cli.run("config", "set", "file_sync", one).status == 0
    told = cli.run("config", "get", "file_sync").out
    assert told == '{"host": "~/a", "guest": "~/b", "mode": "0600"}\n'
