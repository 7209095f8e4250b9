"""The bridge network, asked for by the daemon: a bridge, a pool of idle taps, the rules.

Owns the pool and the way to root: the helper, directly or through sudo. Leaves what is done as
root to `network.helper`, addresses and rules to `network.plan`, and which VM has what to the store.
A tap is marked with its VM before it is used, so `reconcile` finds whatever a kill left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import secrets
import stat
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from banger.errors import BangerError, Conflict, InvalidInput, TimedOut, Unavailable
from banger.host.commands import Completed, HostCommands
from banger.network import plan
from banger.network.plan import Bridge, Port

HELPER_NAME = "banger-net-helper"
_HELPER_MODULE = "banger.network.helper"
# The helper bounds itself to a second less. An emulated host that boots machines has taken 12 s.
_HELPER_TIMEOUT_S = 30
_NO_RESOLVED_STATUS = 3  # the helper's exit status on a host without systemd-resolved
_WITHOUT_ROOT = "leave --network bridge out: the user network needs no root"


class BridgeNetwork:
    """The host's end of the network: one per daemon, one daemon per bridge."""

    def __init__(
        self, commands: HostCommands, bridge: Bridge, *, pool_size: int, tap_uid: int
    ) -> None:
        self.bridge = bridge
        self._commands = commands
        self._pool_size = pool_size
        self._tap_uid = tap_uid
        self._pool_lock = asyncio.Lock()
        self._idle: list[str] = []
        self._ports: tuple[Port, ...] = ()
        self._tasks: set[asyncio.Task[None]] = set()

    async def check(self) -> None:
        """Raise Unavailable or Conflict, with what to do, when this host cannot have the bridge.

        One call of the helper when the bridge is up already. Changes nothing.
        """
        for program in ("ip", "bridge", "nft"):
            self._commands.need(program)
        shown = await self._show()
        if not shown["nft"]:
            raise Unavailable("nft does not work on this host", hint="banger doctor")
        if self._is_up(shown):
            return
        found = shown["bridge"]
        if found is not None and found["owner"] != os.getuid():
            whose = "no bridge of banger's"
            if found["owner"] is not None:
                whose = f"a bridge of the user {_user_name(found['owner'])}"
            raise Conflict(
                f"the interface {self.bridge.name} is {whose}",
                hint="give another `bridge_name` (and `cidr`) in banger's config",
            )
        listed = await self._commands.run(
            ["ip", "-json", "route", "show", "table", "all"], timeout_s=_HELPER_TIMEOUT_S
        )
        overlap = plan.find_overlap(self.bridge, json.loads(listed.stdout or b"[]"))
        if overlap is not None:
            raise Conflict(
                f"the VMs' network {self.bridge.network} overlaps the host's route {overlap}",
                hint="give another `cidr` (and `bridge_ip`) in banger's config",
            )

    async def ensure(self) -> None:
        """Bring the bridge up and its rules in force; nothing changes when they are.

        Rules that someone flushed are loaded as `apply` or `reconcile` gave them last.
        """
        shown = await self._show()
        if not self._is_up(shown):
            await self._bridge_up()
        if not shown["rules"]:
            await self._load(self._ports)

    async def take(
        self, vm_id: str, mac: str, address: IPv4Address, *, uid: int, isolated: bool
    ) -> str:
        """Return the name of a tap that is the VM's from here on, open to `uid`.

        It comes out of the pool, which refills behind it, or is made. The VM has no rules yet: call
        `apply` before a VMM attaches. On an error the tap is gone.
        """
        async with self._pool_lock:
            tap = await self._take(vm_id, mac, address, uid, isolated)
        self._spawn(self.fill)
        return tap

    async def give_back(self, tap: str) -> None:
        """Remove a tap, also one that is gone: what a guest did to it must not reach the next."""
        async with self._pool_lock:
            await self._remove(tap)

    async def apply(self, ports: Sequence[Port]) -> None:
        """Put the rules of exactly these VMs in force, in one step."""
        plan.check_ports(ports)
        self._ports = tuple(ports)
        await self._load(ports)

    async def reconcile(self, ports: Sequence[Port]) -> list[str]:
        """Make the host's state that of `ports`; return the names of the taps it removed.

        For the daemon's start. A missing bridge is made when there are ports. Taps of no port's VM
        go, and idle ones beyond the pool's size; the other idle ones are the pool.
        """
        plan.check_ports(ports)
        self._ports = tuple(ports)
        async with self._pool_lock:
            shown = await self._show()
            if shown["bridge"] is None and not ports and not shown["taps"]:
                self._idle = []
                return []
            if not self._is_up(shown):
                await self._bridge_up()
            owned = {(port.tap, port.vm_id) for port in ports}
            idle: list[str] = []
            removed: list[str] = []
            for tap in shown["taps"]:
                if tap["vm_id"] is None and len(idle) < self._pool_size:
                    idle.append(tap["name"])
                elif (tap["name"], tap["vm_id"]) not in owned:
                    await self._remove(tap["name"])
                    removed.append(tap["name"])
            self._idle = idle
            await self._load(ports)
        return removed

    async def fill(self) -> None:
        """Make idle taps until the pool is full; idle ones that are there already join it."""
        async with self._pool_lock:
            shown = await self._show()
            self._idle = [tap["name"] for tap in shown["taps"] if tap["vm_id"] is None]
            while len(self._idle) < self._pool_size:
                self._idle.append(await self._make())

    async def close(self) -> None:
        """End what runs in the background. The bridge, its taps and its rules stay."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def register_names(self, listen: str) -> bool:
        """Have the host ask `listen` (127.0.0.1:PORT) for names below .vm; empty text ends that.

        Returns whether it does: False on a host without systemd-resolved.
        """
        name = self.bridge.name
        words = ["names", name, listen] if listen else ["names-off", name]
        done = await self._start(words)
        if done.exit_status == _NO_RESOLVED_STATUS:
            return False
        self._answer(done)
        return bool(listen)

    # ---- the pool, under its lock

    async def _take(
        self, vm_id: str, mac: str, address: IPv4Address, uid: int, isolated: bool
    ) -> str:
        reach = "isolated" if isolated else "open"
        while True:
            is_new = not self._idle
            tap = await self._make() if is_new else self._idle.pop(0)
            words = ["tap-take", self.bridge.name, tap, vm_id, str(uid), mac, str(address), reach]
            try:
                await self._call(words)
            except Conflict:
                # One of the pool may be gone or another's by now; a new one may not.
                if is_new:
                    await self._remove(tap)
                    raise
            except BaseException:
                with contextlib.suppress(BangerError):
                    await self._remove(tap)
                raise
            else:
                return tap

    async def _make(self) -> str:
        tap = plan.tap_name(self.bridge, secrets.token_hex(4))
        await self._call(["tap-add", self.bridge.name, tap, str(self._tap_uid)])
        return tap

    async def _remove(self, tap: str) -> None:
        if tap in self._idle:
            self._idle.remove(tap)
        await self._call(["tap-del", self.bridge.name, tap])

    def _spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def quietly() -> None:
            # What failed here is asked for again, and then tells its caller: the pool's next
            # take makes its own tap, and `reconcile` removes what is left.
            with contextlib.suppress(BangerError):
                await work()

        task = asyncio.create_task(quietly())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- the helper

    async def _bridge_up(self) -> None:
        await self._call(["bridge-up", self.bridge.name, str(self.bridge.interface)])

    async def _load(self, ports: Sequence[Port]) -> None:
        lines = "".join(f"{port}\n" for port in ports).encode()
        await self._call(["rules", self.bridge.name, str(self.bridge.interface)], stdin=lines)

    async def _show(self) -> dict[str, Any]:
        return await self._call(["show", self.bridge.name])

    def _is_up(self, shown: dict[str, Any]) -> bool:
        return bool(
            shown["bridge"]
            == {"up": True, "owner": os.getuid(), "addresses": [str(self.bridge.interface)]}
        )

    async def _call(self, words: Sequence[str], stdin: bytes | None = None) -> dict[str, Any]:
        return self._answer(await self._start(words, stdin))

    async def _start(self, words: Sequence[str], stdin: bytes | None = None) -> Completed:
        argv = [*self._helper(), *words]
        task = asyncio.create_task(
            self._commands.run(
                argv,
                stdin=stdin,
                # A daemon that sudo started as root acts for root, as its taps' owner says.
                env={"SUDO_UID": ""},
                timeout_s=_HELPER_TIMEOUT_S,
                check=False,
            )
        )
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # What sudo runs is not ours to kill, and half a step helps nobody: it ends first.
            await asyncio.gather(task, return_exceptions=True)
            raise
        except PermissionError as error:
            raise TimedOut(f"bridge network: {words[0]} took over {_HELPER_TIMEOUT_S} s") from error

    def _helper(self) -> list[str]:
        """The words that start the helper; raise Unavailable when there is no safe way to root."""
        if os.geteuid() == 0:
            return [sys.executable, "-I", "-m", _HELPER_MODULE]
        sudo = self._commands.find("sudo")
        if sudo is None:
            raise Unavailable(
                "the bridge network needs root, and there is no sudo on this host",
                hint=_WITHOUT_ROOT,
            )
        return [sudo, "-n", str(find_trusted_helper())]

    def _answer(self, done: Completed) -> dict[str, Any]:
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            answer = None
        if isinstance(answer, dict) and done.exit_status == 0:
            return answer
        if isinstance(answer, dict) and isinstance(told := answer.get("error"), dict):
            message = f"bridge network: {told['message']}"
            if told["code"] == "conflict":
                raise Conflict(message, hint=told["hint"])
            if told["code"] == "invalid_input":
                raise InvalidInput(message)
            raise Unavailable(message, hint=told["hint"])
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1].strip()
        if done.argv[0].endswith("/sudo"):
            user = _user_name(os.getuid())
            raise Unavailable(
                f"the bridge network needs root, and sudo does not let {user} have it: {last}",
                hint=f"as root, add with visudo: {user} ALL=(root) NOPASSWD: {done.argv[2]}",
            )
        raise Unavailable(f"bridge network: the helper ended with {done.exit_status}: {last}")


def find_trusted_helper() -> Path:
    """Return the helper's program, beside our interpreter's; raise Unavailable unless root's alone.

    A sudo rule for a file that its user can write would make that user root. So the program, the
    interpreter, this package and every directory above them have to be root's and writable by
    nobody else.
    """
    program = Path(sys.executable).parent / HELPER_NAME
    if not program.exists():
        raise Unavailable(
            f"the bridge network needs root, and {program} is not installed", hint=_WITHOUT_ROOT
        )
    for path in (program, Path(sys.executable), Path(plan.__file__)):
        for part in _every_part(path):
            status = part.lstat()
            is_sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
            is_link = stat.S_ISLNK(status.st_mode)
            if status.st_uid != 0 or (status.st_mode & 0o022 and not is_sticky and not is_link):
                raise Unavailable(
                    "the bridge network needs root through sudo, but others than root can write "
                    f"{part}: a sudo rule for it would make them root",
                    hint="install banger as root, below /opt or /usr/local, and start it there",
                )
    return program


def _every_part(path: Path) -> Iterator[Path]:
    """The file and every directory and link on the way to it, each hop of each link included."""
    ways = [path.absolute()]
    for _ in range(40):  # MAXSYMLINKS (linux/namei.h): the kernel follows no more either
        if not ways:
            return
        way = ways.pop()
        for part in (*reversed(way.parents), way):
            yield part
            if part.is_symlink():
                ways.append(part.parent / part.readlink() / way.relative_to(part))
                break
    raise Unavailable(f"{path} is behind too many links")


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"
