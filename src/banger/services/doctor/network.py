"""What the networks of VMs need of the host: passt, the bridge's programs and rights, names.

The bridge is checked wherever its network may be asked for, and fails only where config makes it
the default. Leaves whether it can be brought up to `network.bridge`, which tries.
"""

from __future__ import annotations

import json
import os
import pwd
import re
from typing import Any

from banger.errors import BangerError, Unavailable
from banger.host.commands import HostCommands
from banger.network.bridge import find_trusted_helper
from banger.network.dns import recipe
from banger.services.doctor.findings import (
    FAIL,
    OK,
    PROBE_TIMEOUT_S,
    WARNING,
    Check,
    Host,
    fail,
    found,
    install,
    ok,
    warning,
)

_BUS_TIMEOUT_S = 5  # resolvectl asks over D-Bus, which answers at once or not at all
_PACKAGES = {"ip": "iproute2", "bridge": "iproute2", "nft": "nftables"}


async def check_passt(host: Host) -> Check:
    """Check passt and pasta, by which the user network reaches the world."""
    missing = [name for name in ("passt", "pasta") if host.commands.find(name) is None]
    if missing:
        return fail(
            f"{' and '.join(missing)} not installed: the user network needs it",
            await install(host, "passt"),
        )
    return ok("passt and pasta are here")


async def check_bridge(host: Host) -> Check:
    """Check programs, root's helper and Docker's firewall for the bridge network."""
    severity = FAIL if host.config.network == "bridge" else WARNING
    for program, package in _PACKAGES.items():
        if host.commands.find(program) is None:
            return found(
                severity,
                f"{program} is not installed: network bridge needs it",
                await install(host, package),
            )
    if not host.is_root:
        rights = await _check_rights(host)
        if rights.status != OK and severity != FAIL:
            return ok(
                f"not set up for this user, and not needed: network is {host.config.network}"
                + (f"; to have it, {rights.fix}" * bool(rights.fix))
            )
        return rights
    name = host.config.bridge_name
    if await docker_drops(host.commands, name):
        return warning(
            f"Docker's firewall drops what {name} forwards: VMs on it do not reach the outside",
            f"sudo iptables -I DOCKER-USER -i {name} -j ACCEPT && "
            f"sudo iptables -I DOCKER-USER -o {name} -m conntrack --ctstate RELATED,ESTABLISHED "
            "-j ACCEPT",
        )
    return ok("ip, bridge and nft are here, and banger runs as root")


async def _check_rights(host: Host) -> Check:
    """Whether a user's daemon may have root's helper; Docker's rules are for root to see."""
    try:
        helper = find_trusted_helper()
    except Unavailable as error:
        return fail(error.message, error.hint)
    if host.commands.find("sudo") is None:
        return fail("network bridge needs root, and there is no sudo")
    # -l lists whether it would be allowed, and runs nothing.
    done = await host.commands.run(
        ["sudo", "-n", "-l", str(helper)], timeout_s=PROBE_TIMEOUT_S, check=False
    )
    if done.exit_status == 0:
        return ok(f"ip, bridge and nft are here, and sudo allows {helper}")
    user = pwd.getpwuid(os.getuid()).pw_name
    return fail(
        f"network bridge needs root, and sudo does not let {user} have it without a password",
        f"as root, add with visudo: {user} ALL=(root) NOPASSWD: {helper}",
    )


async def check_names(host: Host) -> Check:
    """Check that the host can learn `NAME.vm`, which VMs on the bridge have."""
    config = host.config
    if not config.dns_listen_addr:
        return ok("switched off in config: dns_listen_addr")
    if await _has_resolved(host.commands):
        return ok(f"systemd-resolved can be told of NAME.vm at {config.dns_listen_addr}")
    if config.network != "bridge":
        return ok(f"no systemd-resolved, and not needed: network is {config.network}")
    return warning(
        "no systemd-resolved: nothing on this host asks the daemon for NAME.vm",
        recipe(config.dns_listen_addr),
    )


async def _has_resolved(commands: HostCommands) -> bool:
    if commands.find("resolvectl") is None:
        return False
    try:
        done = await commands.run(
            ["resolvectl", "--no-pager", "status"], timeout_s=_BUS_TIMEOUT_S, check=False
        )
    except BangerError:
        return False
    return done.exit_status == 0


# -- Docker: where any chain of the hook drops a packet, no other's accept saves it


async def docker_drops(commands: HostCommands, bridge: str) -> bool:
    """Tell whether the host's FORWARD chain drops what the bridge forwards.

    Docker sets its policy to DROP; `DOCKER-USER` is the chain it leaves to the user. Needs root;
    a host without such chains drops nothing.
    """
    nft = await _nft_chain(commands, "FORWARD")
    if nft:
        rules = nft + await _nft_chain(commands, "DOCKER-USER")
        dropping = any(item.get("chain", {}).get("policy") == "drop" for item in rules)
        return dropping and not all(_nft_accepts(rules, bridge, key) for key in _KEYS)
    if commands.find("iptables") is None:
        return False
    legacy = await _iptables_chain(commands, "FORWARD")
    if "-P FORWARD DROP" not in legacy:
        return False
    legacy += await _iptables_chain(commands, "DOCKER-USER")
    return not all(
        any(re.search(rf" {flag} {re.escape(bridge)} .*-j ACCEPT$", line) for line in legacy)
        for flag in ("-i", "-o")
    )


_KEYS = ("iifname", "oifname")


async def _nft_chain(commands: HostCommands, chain: str) -> list[dict[str, Any]]:
    """Return the objects of a chain of iptables' table, or none when there is no such chain."""
    done = await commands.run(
        ["nft", "-j", "list", "chain", "ip", "filter", chain],
        timeout_s=PROBE_TIMEOUT_S,
        check=False,
    )
    try:
        listed = json.loads(done.stdout)["nftables"] if done.exit_status == 0 else []
    except (ValueError, KeyError, TypeError):
        return []
    return [item for item in listed if "chain" in item or "rule" in item]


def _nft_accepts(rules: list[dict[str, Any]], bridge: str, key: str) -> bool:
    """Tell whether a rule about packets from (`iifname`) or to (`oifname`) the bridge accepts."""
    for item in rules:
        expressions = item.get("rule", {}).get("expr", [])
        about = any(
            match.get("left") == {"meta": {"key": key}} and match.get("right") == bridge
            for match in (part.get("match", {}) for part in expressions)
        )
        if about and any("accept" in part for part in expressions):
            return True
    return False


async def _iptables_chain(commands: HostCommands, chain: str) -> list[str]:
    done = await commands.run(
        ["iptables", "-w", "-S", chain], timeout_s=PROBE_TIMEOUT_S, check=False
    )
    return done.stdout.decode(errors="replace").splitlines() if done.exit_status == 0 else []
