"""The configuration file: `~/.config/banger/config.toml`, all of it optional.

Owns its keys, their types and defaults; `docs/config.md` describes each, and a test compares
the two. Keys whose feature comes with a later issue are taken and checked already.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Callable

import msgspec

from banger.errors import InvalidInput, nearest
from banger.network.plan import parse_bridge
from banger.types import NETWORK_MODES, parse_size

CONFIG_NAME = "config.toml"
_LOG_LEVELS = ("debug", "info", "warning", "error")


class VmConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of a new VM; an absent one comes from the host."""

    vcpu: int | None = None
    memory: str | int | None = None
    disk_size: str | int | None = None
    boot_timeout_s: float | None = None


class RegistriesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How images of registries are had."""

    mirrors: dict[str, list[str]] = {}
    insecure: list[str] = []
    max_parallel_downloads: int = 4


class ImportLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one image may ask of this host; see `images.layers.Limits`."""

    max_entries: int = 1_000_000
    max_size: str | int = "64GiB"
    max_depth: int = 256
    max_expansion: int = 200


class FileSync(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of this host that every VM gets at its start; `~/` is the home here, /root there."""

    host: str
    guest: str
    mode: str = "0600"


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every key of the file."""

    default_image_name: str = "debian-bookworm"
    default_kernel_name: str = "generic-6.12"
    vmm: str = "auto"
    network: str = "user"
    ssh_key_path: str = ""
    qemu_bin: str = "qemu-system-x86_64"
    firecracker_bin: str = "firecracker"
    firecracker_base_url: str = (
        "https://github.com/firecracker-microvm/firecracker/releases/download"
    )
    jailer_bin: str = "jailer"
    jailer_enabled: bool = True
    jailer_uid_base: int = 1_900_000_000
    debian_mirror: str = ""
    default_dns: list[str] = []
    log_level: str = "info"
    web_listen_addr: str = ""
    bridge_name: str = "br-banger"
    bridge_ip: str = "172.16.0.1"
    cidr: str = "172.16.0.0/24"
    tap_pool_size: int = 4
    bridge_nat: bool = True
    bridge_isolation: bool = True
    dns_listen_addr: str = "127.0.0.1:15353"
    blob_cache_size: str | int = "10GiB"
    registries: RegistriesConfig = RegistriesConfig()
    import_limits: ImportLimits = ImportLimits()
    catalogs: list[str] = []
    credential_sync: bool = True
    file_sync: list[FileSync] = []
    acp_agent: str = "opencode"
    acp_agents: dict[str, list[str]] = {}
    vm: VmConfig = VmConfig()


def config_path(config_dir: str) -> str:
    """Return where the file is looked for."""
    return os.path.join(config_dir, CONFIG_NAME)


def load_config(config_dir: str) -> Config:
    """Return the configuration; an absent file is an empty one.

    Raises InvalidInput naming file, key and, for an unknown key, the nearest known one.
    """
    path = config_path(config_dir)
    try:
        with open(path, "rb") as file:
            text = file.read()
    except FileNotFoundError:
        return Config()
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error
    return parse_config(text, path)


def parse_config(text: bytes, path: str) -> Config:
    """Return the configuration of a file's text; see `load_config` for what it raises."""
    try:
        raw = tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 1000 brackets
        raise InvalidInput(f"{path} is not TOML: {error}", hint="see docs/config.md") from error
    _check_keys(raw, Config, path, "")
    if isinstance(raw.get("vm"), dict):
        _check_keys(raw["vm"], VmConfig, path, "vm.")
    if isinstance(raw.get("import_limits"), dict):
        _check_keys(raw["import_limits"], ImportLimits, path, "import_limits.")
    if isinstance(raw.get("registries"), dict):
        _check_keys(raw["registries"], RegistriesConfig, path, "registries.")
    try:
        config = msgspec.convert(raw, Config)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"{path}: {error}", hint="see docs/config.md") from error
    _check_values(config, path)
    return config


def size_of(value: str | int) -> int:
    """Return the bytes of a size in the file: a number of bytes, or text such as "2GiB"."""
    return value if isinstance(value, int) else parse_size(value)


def _check_keys(
    raw: dict[str, object], shape: type[msgspec.Struct], path: str, prefix: str
) -> None:
    known = list(shape.__struct_fields__)
    for key in raw:
        if key not in known:
            close = nearest(key, known)
            raise InvalidInput(
                f"{path}: unknown key {prefix}{key}",
                hint=f"did you mean {prefix}{close}?" if close else "docs/config.md has every key",
            )


def _check_values(config: Config, path: str) -> None:
    def refuse(key: str, why: str) -> None:
        raise InvalidInput(f"{path}: {key}: {why}", hint="see docs/config.md")

    if config.vmm not in ("auto", "qemu", "firecracker"):
        refuse("vmm", f"{config.vmm!r} is not auto, qemu or firecracker")
    if config.network not in NETWORK_MODES:
        refuse("network", f"{config.network!r} is not one of {', '.join(NETWORK_MODES)}")
    if config.log_level not in _LOG_LEVELS:
        refuse("log_level", f"{config.log_level!r} is not one of {', '.join(_LOG_LEVELS)}")
    if not 0 <= config.tap_pool_size <= 64:
        refuse("tap_pool_size", "0 to 64")
    try:
        parse_bridge(config.bridge_name, config.bridge_ip, config.cidr)
    except InvalidInput as error:
        refuse("bridge_name, bridge_ip or cidr", error.message)
    try:
        for server in config.default_dns:
            ipaddress.ip_address(server)
    except ValueError as error:
        refuse("default_dns", str(error))
    if config.dns_listen_addr and not _is_loopback_address(config.dns_listen_addr):
        refuse("dns_listen_addr", "a loopback address and a port above 1023, as 127.0.0.1:15353")
    # systemd leaves the uids from 1879048192 to 2147483647 to others (UIDS-GIDS.md); none below
    # the ranges of people, system users and containers may become a VM's.
    if not 1_879_048_192 <= config.jailer_uid_base <= 2_147_418_112:
        refuse("jailer_uid_base", "1879048192 to 2147418112: outside all other ranges of uids")
    if not re.match(r"(https?|file)://", config.firecracker_base_url):
        refuse("firecracker_base_url", "an http, https or file URL")
    limit = config.vm.boot_timeout_s
    if limit is not None and not 1 <= limit <= 3600:
        refuse("vm.boot_timeout_s", "1 to 3600 seconds")
    if config.vm.vcpu is not None and config.vm.vcpu < 1:
        refuse("vm.vcpu", "at least 1")
    try:
        if size_of(config.blob_cache_size) < 0:
            refuse("blob_cache_size", "a size; 0 keeps nothing between pulls")
    except InvalidInput as error:
        refuse("blob_cache_size", error.message)
    _check_registries(config.registries, refuse)
    limits = config.import_limits
    for key in ("max_entries", "max_depth", "max_expansion"):
        if getattr(limits, key) < 1:
            refuse(f"import_limits.{key}", "at least 1")
    if limits.max_depth > 256:
        refuse("import_limits.max_depth", "at most 256")
    try:
        if size_of(limits.max_size) < 1:
            refuse("import_limits.max_size", "a size above 0")
    except InvalidInput as error:
        refuse("import_limits.max_size", error.message)
    for location in config.catalogs:
        if why := _why_no_catalog(location):
            refuse("catalogs", f"{location!r} {why}")
    for name, argv in config.acp_agents.items():
        if not argv or not argv[0]:
            refuse(f"acp_agents.{name}", "the words of a command")
    for file in config.file_sync:
        if why := _why_no_sync(file):
            refuse("file_sync", why)
    for key, value in (("vm.memory", config.vm.memory), ("vm.disk_size", config.vm.disk_size)):
        try:
            if value is not None and size_of(value) < 1:
                refuse(key, "a size above 0")
        except InvalidInput as error:
            refuse(key, error.message)


def _check_registries(registries: RegistriesConfig, refuse: Callable[[str, str], None]) -> None:
    host = r"(?:[a-zA-Z0-9.-]+|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?"
    if not 1 <= registries.max_parallel_downloads <= 32:
        refuse("registries.max_parallel_downloads", "1 to 32")
    for name in (*registries.insecure, *registries.mirrors):
        if not re.fullmatch(host, name):
            refuse("registries", f"{name!r} is not HOST or HOST:PORT")
    for mirror in [url for urls in registries.mirrors.values() for url in urls]:
        found = re.fullmatch(rf"(https?)://({host})(?:/[a-z0-9._/-]*)?", mirror)
        if found is None:
            refuse("registries.mirrors", f"{mirror!r} is not https://HOST or https://HOST/PREFIX")
        elif found[1] == "http" and not _may_be_plain(found[2], registries.insecure):
            refuse("registries.mirrors", f"{mirror!r}: http needs its host in registries.insecure")


def _may_be_plain(host: str, insecure: list[str]) -> bool:
    name = re.sub(r":[0-9]+\Z", "", host)
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name == "localhost" or host in insecure or name in insecure


def _why_no_sync(file: FileSync) -> str:
    """Return what is wrong with an entry of file_sync; empty when nothing is."""
    for key, path in (("host", file.host), ("guest", file.guest)):
        parts = path.removeprefix("~").split("/")
        if not path.startswith(("/", "~/")) or not path.isprintable() or not parts[-1]:
            return f"{key} = {path!r} is not the absolute path of a file"
        if ".." in parts or "." in parts or "" in parts[1:]:
            return f"{key} = {path!r} holds an empty part, `.` or `..`"
    if not re.fullmatch(r"0?[0-7]{3}", file.mode):
        return f'mode = {file.mode!r} is not octal, as "0600"'
    return ""


def _why_no_catalog(location: str) -> str:
    """Return what is wrong with the place of a catalog; empty when nothing is."""
    if not location.isprintable() or " " in location.partition("://")[1]:
        return "is not a path or a URL"
    if location.startswith(("/", "~/", "file:///")):
        return ""
    found = re.match(r"(https?)://(\[[0-9a-f:.]+\]|[^/:@]+)(?::[0-9]+)?/", location)
    if found is None:
        return "is not an absolute path, an https or a file URL"
    if found[1] == "http" and not _may_be_plain(found[2], []):
        return "is plain http, which tells nobody who answers: https, or this host"
    return ""


def _is_loopback_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    try:
        return ipaddress.IPv4Address(host).is_loopback and 1024 <= int(port) <= 65535
    except ValueError:
        return False
