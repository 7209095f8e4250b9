"""Keys by which user and VM know each other before the first boot.

Owns the user's ssh key (made once), each VM's host key, and the one known_hosts file that
names them all; so nothing is ever trusted on first use.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from banger.errors import InvalidInput
from banger.host.commands import HostCommands
from banger.host.files import make_private_directory, write_atomic
from banger.host.locks import locked
from banger.store.layout import Layout
from banger.store.vms import VmRow


class IdentityService:
    """Makes and finds keys."""

    def __init__(self, layout: Layout, commands: HostCommands, ssh_key: Path) -> None:
        self._layout = layout
        self._commands = commands
        self._ssh_key = ssh_key
        self._key_lock = asyncio.Lock()

    async def authorized_key(self) -> str:
        """Return the public half of the user's key in authorized_keys form, making the key once.

        Raises InvalidInput when `ssh_key_path` names a key without a readable public half.
        """
        public = self._ssh_key.with_name(self._ssh_key.name + ".pub")
        directory = make_private_directory(self._layout.default_ssh_key.parent)
        if not self._ssh_key.exists():
            if self._ssh_key != self._layout.default_ssh_key:
                raise InvalidInput(
                    f"the ssh key {self._ssh_key} does not exist",
                    hint="make it with ssh-keygen, or take ssh_key_path out of the config",
                )
            # Ours in line first: waiting for the file's lock stops the whole daemon, and with it
            # who holds it. The file's is for a daemon of another data directory.
            async with self._key_lock:
                with locked(directory / ".lock"):
                    if not self._ssh_key.exists():
                        await self._make_key(self._ssh_key, "banger")
        try:
            return public.read_text().strip()
        except OSError as error:
            raise InvalidInput(
                f"the ssh key {self._ssh_key} has no readable public half: {error.strerror}",
                hint=f"make it: ssh-keygen -y -f {self._ssh_key} > {public}",
            ) from error

    async def make_host_key(self, path: Path) -> None:
        """Make a VM's ed25519 host key at `path` and `path`.pub."""
        await self._make_key(path, "banger")

    def write_known_hosts(self, rows: Iterable[VmRow]) -> None:
        """Rewrite known_hosts so that it names exactly the VMs of `rows`."""
        lines = []
        for row in rows:
            # Absent while the VM is being made.
            with contextlib.suppress(OSError):
                public = self._layout.vm(row.id).host_key.with_suffix(".pub").read_text()
                kind, key = public.split()[:2]
                lines.append(f"{row.name}.vm,banger-{row.id} {kind} {key}\n")
        make_private_directory(self._layout.known_hosts.parent)
        write_atomic(self._layout.known_hosts, "".join(lines).encode())

    async def _make_key(self, path: Path, comment: str) -> None:
        staged = path.with_name(f".{path.name}.new")
        for leftover in (staged, staged.with_name(staged.name + ".pub")):
            leftover.unlink(missing_ok=True)
        await self._commands.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(staged)],
            timeout_s=30,
        )
        # The public half first: who sees the private one finds both.
        os.replace(staged.with_name(staged.name + ".pub"), path.with_name(path.name + ".pub"))
        os.replace(staged, path)
