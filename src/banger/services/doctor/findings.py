"""What every check shares: the host it looks at, what it may find, and how that is mended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from banger.config import Config
from banger.host.commands import HostCommands
from banger.paths import Paths
from banger.store.layout import Layout
from banger.vmm.probe import KvmProbe

OK = "ok"
WARNING = "warning"
FAIL = "fail"

PROBE_TIMEOUT_S = 30  # `qemu -machine help` takes 0.1 s here; a loaded host 5 s


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found; `fix` is a command (or empty), run by `--fix` when `fixable`."""

    name: str
    status: str  # ok | warning | fail
    message: str
    fix: str = ""
    fixable: bool = False


@dataclass(frozen=True, slots=True)
class Host:
    """What the checks look at, probed once."""

    commands: HostCommands
    paths: Paths
    layout: Layout
    config: Config
    kvm: KvmProbe
    qemu: tuple[int, int] | None
    is_root: bool


class Mend(NamedTuple):
    """The command that mends, and whether `--fix` may run it."""

    command: str
    fixable: bool


# The table of checks puts its name on what a check returns.


def ok(message: str) -> Check:
    """Return that all is well."""
    return Check("", OK, message)


def warning(message: str, mend: Mend | str = "") -> Check:
    """Return what banger works without, and less well."""
    return found(WARNING, message, mend)


def fail(message: str, mend: Mend | str = "") -> Check:
    """Return what banger, as it is configured, does not work without."""
    return found(FAIL, message, mend)


def found(status: str, message: str, mend: Mend | str = "") -> Check:
    """Return a finding; a `mend` of plain text is for the user to weigh, never run."""
    command, fixable = (mend, False) if isinstance(mend, str) else mend
    return Check("", status, message, command, fixable)


async def install(host: Host, package: str, *, backports: bool = False) -> Mend:
    """Return the command that installs a package, and whether it may be run by --fix.

    With `backports` it is fixable only where apt knows bookworm-backports already: whose
    archive to trust is not ours to choose here (`make install` asks apt's own sources).
    """
    if host.commands.find("apt-get") is None:
        return Mend(f"install {package} (Debian's name for it)", fixable=False)
    command = f"sudo apt-get install -y --no-install-recommends {package}"
    if not backports:
        return Mend(command, fixable=True)
    policy = await host.commands.run(
        ["apt-cache", "policy"], timeout_s=PROBE_TIMEOUT_S, check=False
    )
    known = b"bookworm-backports" in policy.stdout
    return Mend(f"{command} -t bookworm-backports", fixable=known)
