"""What a guest is told of its image's environment, and the script that has an sshd in it."""

from __future__ import annotations

import base64
import subprocess

from hypothesis import given
from hypothesis import strategies as st

from banger.guest import boot

NETWORK = boot.GuestNetwork("10.0.2.15/24", "10.0.2.2", ("10.0.2.3",))
ODD = {"A": 'it\'s $HOME `x`\n"q"', "PATH": "/go/bin:/bin", "not a name": "x", "E": ""}


def _config(**changes):  # type: ignore[no-untyped-def]
    options = {"hostname": "h", "machine_id": "0" * 32, "network": NETWORK,
               "authorized_key": "k", "host_keys": {}, **changes}  # fmt: skip
    return boot.boot_config(**options)


def test_the_script_travels_only_where_it_can_do_something() -> None:
    assert _config()["once"] is None
    assert _config(with_sshd=True, network=None)["once"] is None
    once = _config(with_sshd=True)["once"]
    assert once["log"] == "/var/log/banger-sshd.log"
    assert base64.b64decode(once["script_b64"]).startswith(b"# shellcheck shell=sh\n# Has an sshd")


def test_an_environment_reaches_the_agent_and_what_ssh_starts() -> None:
    config = _config(environment=ODD)
    assert config["environment"] == ODD
    paths = [file["path"] for file in config["files"]]
    assert "/etc/profile.d/banger-image.sh" in paths
    assert "/etc/ssh/sshd_config.d/20-banger-image.conf" in paths
    assert not any("banger-image" in file["path"] for file in _config()["files"])


@given(st.dictionaries(st.from_regex(r"[A-Z_][A-Z0-9_]{0,5}", fullmatch=True),
                       st.text(st.characters(codec="utf-8", exclude_characters="\0")), max_size=3))  # fmt: skip
def test_a_login_shell_reads_every_value_as_it_is(environment: dict[str, str]) -> None:
    environment = {f"V_{name}": value for name, value in environment.items()}
    script = boot.profile_script(environment)
    names = " ".join(f'"${name}"' for name in sorted(environment))
    done = subprocess.run(
        ["/bin/sh", "-c", script + f"printf '%s\\0' {names}"], capture_output=True, check=True
    )
    expected = [environment[name].encode() for name in sorted(environment)] or [b""]
    assert done.stdout.split(b"\0")[:-1] == expected


def test_sshd_is_told_what_it_can_say() -> None:
    text = boot.sshd_environment({**ODD, "B": "two words $x", "C": "it's"})
    assert text.splitlines()[1] == 'SetEnv "B=two words $x" "C=it\'s" "E=" "PATH=/go/bin:/bin"'
    assert "SetEnv" not in boot.sshd_environment({})
