"""Whether Firecracker and its jailer are here, and whether their versions serve."""

from __future__ import annotations

from banger.errors import BangerError
from banger.services.doctor.findings import (
    OK,
    PROBE_TIMEOUT_S,
    Check,
    Host,
    Mend,
    fail,
    found,
    ok,
    warning,
)
from banger.vmm.firecracker_release import (
    Version,
    find_firecracker,
    find_jailer,
    judge_firecracker,
    judge_jailer,
    parse_version,
)

# Pinned by its digest, so --fix may run it: what arrives is what was released, or nothing.
_INSTALL = Mend("banger firecracker install", fixable=True)


async def check_firecracker(host: Host) -> Check:
    """Check Firecracker; where KVM is of no use it is not missed."""
    config = host.config
    program = find_firecracker(host.commands, config.firecracker_bin, host.layout.data)
    if program is not None:
        verdict = judge_firecracker(await _version(host, program))
        where = f"{verdict.message} ({program})"
        return found(verdict.status, where, "" if verdict.status == OK else _mend(host))
    if config.vmm == "firecracker":
        return fail(f"{config.firecracker_bin} is not installed, and vmm names it", _mend(host))
    if not host.kvm.usable:
        return ok("not installed, and not needed without KVM")
    if config.vmm == "qemu":
        return ok("not installed, and not needed: vmm names QEMU")
    return warning("not installed: QEMU runs the VMs", _mend(host))


async def check_jailer(host: Host) -> Check:
    """Check the jailer, which only a daemon of root can use."""
    config = host.config
    if not host.is_root:
        return ok("not needed: without root a user namespace takes its place")
    if not config.jailer_enabled:
        return ok("switched off in config: jailer_enabled")
    firecracker = find_firecracker(host.commands, config.firecracker_bin, host.layout.data)
    if firecracker is None:
        return ok("not needed without Firecracker")
    program = find_jailer(host.commands, config.jailer_bin, host.layout.data)
    if program is None:
        message = f"{config.jailer_bin} is not installed: as root no Firecracker starts without it"
        is_needed = config.vmm == "firecracker" or (config.vmm == "auto" and host.kvm.usable)
        return fail(message, _mend(host)) if is_needed else warning(message, _mend(host))
    version = await _version(host, program)
    verdict = judge_jailer(version)
    if verdict.status != OK:
        return found(verdict.status, f"{verdict.message} ({program})", _mend(host))
    other = await _version(host, firecracker)
    if other != version:
        return warning(f"{verdict.message} is not of the release of Firecracker {other}", _INSTALL)
    return ok(f"{verdict.message} ({program})")


def _mend(host: Host) -> Mend | str:
    if (host.config.firecracker_bin, host.config.jailer_bin) == ("firecracker", "jailer"):
        return _INSTALL
    return "banger firecracker install, and take firecracker_bin and jailer_bin out of config.toml"


async def _version(host: Host, program: str) -> Version | None:
    try:
        done = await host.commands.run(
            [program, "--version"], timeout_s=PROBE_TIMEOUT_S, check=False
        )
    except (BangerError, OSError):  # hangs, or is no program
        return None
    return parse_version(done.stdout.decode(errors="replace"))
