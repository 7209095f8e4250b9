"""Configuration for the system's ssh: how it reaches a VM, with which key, trusting whom.

Owns the text of `Host` blocks and the one `Include` line of `~/.ssh/config`. Nothing is
trusted on first use: host keys are made by banger before boot, and the daemon keeps one
known_hosts with a line per VM that answers to `<name>.vm` and to `banger-<id>`.
"""

from __future__ import annotations

import os
import shlex
import stat
import sys
from typing import NamedTuple

from banger.errors import InvalidInput
from banger.paths import Paths


class SshFiles(NamedTuple):
    """The files ssh needs of us; both are made by the daemon."""

    key: str
    known_hosts: str


def find_ssh_files(paths: Paths, key_path: str = "") -> SshFiles:
    """Return where the key (`ssh_key_path` of the configuration, or ours) and hosts are."""
    directory = os.path.join(paths.config_dir, "ssh")
    key = os.path.expanduser(key_path) if key_path else os.path.join(directory, "id_ed25519")
    return SshFiles(key, os.path.join(directory, "known_hosts"))


def banger_argv() -> list[str]:
    """Return the words that run this very banger again, from any directory."""
    script = os.path.abspath(sys.argv[0]) if sys.argv and sys.argv[0] else ""
    if os.path.basename(script) == "banger" and os.access(script, os.X_OK):
        return [script]
    source = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    python = [sys.executable, "-P", "-m", "banger"]
    if "site-packages" in source or "dist-packages" in source:
        return python
    return ["/usr/bin/env", f"PYTHONPATH={source}", *python]


def vm_block(vm_id: str, name: str, files: SshFiles, banger: list[str]) -> str:
    """Return the block for one VM: reached by `ssh -F FILE NAME`, known by its id."""
    words = [*banger, "internal", "connect", name, "22"]
    return _block(f'Host "{name}"', _proxy(words), files, [("HostKeyAlias", f"banger-{vm_id}")])


def every_vm_block(files: SshFiles, banger: list[str]) -> str:
    """Return the block for `NAME.vm`, for the user's own ssh.

    ssh puts the host name into a shell command unquoted, and a name can come from a
    hostile place (a submodule's URL: CVE-2023-51385). It is put between single quotes,
    and the block refuses names that hold one.
    """
    proxy = _proxy([*banger, "internal", "connect"]) + " '%n' 22"
    return _block('Host "*.vm" "!*\'*"', proxy, files, [])


def _proxy(words: list[str]) -> str:
    text = " ".join(shlex.quote(word) for word in words)
    if "\n" in text:
        raise InvalidInput("the path of banger contains a newline", hint="install it elsewhere")
    return text.replace("%", "%%")


def _block(head: str, proxy: str, files: SshFiles, extra: list[tuple[str, str]]) -> str:
    options = [
        ("User", "root"),
        ("IdentityFile", _quote(files.key)),
        ("IdentitiesOnly", "yes"),
        ("UserKnownHostsFile", _quote(files.known_hosts)),
        ("GlobalKnownHostsFile", "/dev/null"),
        ("StrictHostKeyChecking", "yes"),
        ("CheckHostIP", "no"),
        ("UpdateHostKeys", "no"),
        ("PasswordAuthentication", "no"),
        ("KbdInteractiveAuthentication", "no"),
        ("ServerAliveInterval", "30"),
        # A connection of ours is a pipe inside this host; a banner needs no second guess.
        ("ConnectTimeout", "120"),
        ("ProxyCommand", proxy),
        *extra,
    ]
    return "\n".join([head, *(f"    {name} {value}" for name, value in options)]) + "\n"


def _quote(path: str) -> str:
    """Quote a path for ssh_config, where % and ${} expand and no escape is portable."""
    if any(found in path for found in ('"', "\n", "\\", "${")):
        raise InvalidInput(
            f"ssh cannot take the path {path!r}", hint="set ssh_key_path to a plainer one"
        )
    return '"' + path.replace("%", "%%") + '"'


# -- the user's own ~/.ssh/config


def include_line(config_path: str) -> str:
    """Return the line that makes ssh read our file."""
    return f"Include {_quote(config_path)}"


def with_include(text: str, line: str) -> str:
    """Return an ssh configuration with `line` first; unchanged when it is there already.

    First, because an Include below a `Host` line belongs to that host alone.
    """
    if line in text.splitlines():
        return text
    return f"{line}\n{text}"


def without_include(text: str, line: str) -> str:
    """Return an ssh configuration without `line`, every other byte kept."""
    return "".join(kept for kept in text.splitlines(keepends=True) if kept.rstrip("\r\n") != line)


def rewrite(path: str, text: str, *, mode: int = 0o600) -> None:
    """Replace a file whole, keeping its mode, and what a symbolic link points to."""
    target = os.path.realpath(path)
    try:
        mode = stat.S_IMODE(os.stat(target).st_mode)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
    staged = f"{target}.banger-{os.getpid()}"
    fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(text.encode(errors="surrogateescape"))
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, target)
    except BaseException:
        os.unlink(staged)
        raise


def read_text(path: str) -> str:
    """Return a file's text, byte for byte (surrogateescape); empty when it does not exist."""
    try:
        with open(path, "rb") as file:
            return file.read().decode(errors="surrogateescape")
    except FileNotFoundError:
        return ""
