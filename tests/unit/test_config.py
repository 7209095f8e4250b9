"""The configuration file, and its page in docs/."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import msgspec
import pytest

from banger.config import (
    Config,
    VmConfig,
    config_path,
    load_config,
    parse_config,
    size_of,
)
from banger.errors import InvalidInput

PAGE = Path(__file__).parents[2] / "docs" / "config.md"
_ROW = re.compile(r"^\| `([a-z_.]+)` \| (.+?) \| (.+) \|$", re.MULTILINE)


def _documented() -> dict[str, str]:
    """Return every key of the page with the text of its default."""
    rows = _ROW.findall(PAGE.read_text())
    found = {key: default for key, default, _ in rows}
    assert len(found) == len(rows), "a key has two rows"
    return found


def _in_code() -> dict[str, str]:
    keys: dict[str, str] = {}
    for name in Config.__struct_fields__:
        value = getattr(Config(), name)
        if isinstance(value, VmConfig):
            keys |= dict.fromkeys((f"vm.{one}" for one in value.__struct_fields__), "from the host")
        elif isinstance(value, msgspec.Struct):
            parts = {one: getattr(value, one) for one in value.__struct_fields__}
            keys |= {f"{name}.{one}": f"`{json.dumps(part)}`" for one, part in parts.items()}
        else:
            keys[name] = f"`{json.dumps(value)}`"
    return keys


def test_page_has_every_key_with_its_default() -> None:
    assert _documented() == _in_code()


def test_examples_of_the_page_are_valid() -> None:
    examples = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert examples
    for example in examples:
        parse_config(example.encode(), "docs/config.md")


def test_every_documented_default_is_accepted_from_the_file() -> None:
    lines = [f"{key} = {text.strip('`')}" for key, text in _documented().items() if "`" in text]
    assert parse_config("\n".join(lines).encode(), "x") == Config()


def test_absent_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(str(tmp_path)) == Config()


def test_file_is_read(tmp_path: Path) -> None:
    Path(config_path(str(tmp_path))).write_text('vmm = "qemu"\n[vm]\nmemory = "2G"\nvcpu = 3\n')
    config = load_config(str(tmp_path))
    assert (config.vmm, config.vm.vcpu, size_of(config.vm.memory or 0)) == ("qemu", 3, 2 << 30)


def test_directory_in_its_place_is_named(tmp_path: Path) -> None:
    Path(config_path(str(tmp_path))).mkdir()
    with pytest.raises(InvalidInput, match="cannot read .*config.toml"):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    "location",
    [
        "/srv/images.toml",
        "~/images.toml",
        "file:///srv/images.toml",
        "https://h.example:8443/a/images.toml",
        "http://127.0.0.1:8000/images.toml",
        "http://localhost/images.toml",
        "http://[::1]:8000/images.toml",
    ],
)
def test_places_of_catalogs(location: str) -> None:
    text = f"catalogs = [{json.dumps(location)}]"
    assert parse_config(text.encode(), "c").catalogs == [location]


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("defualt_image_name = 1", "unknown key defualt_image_name", "default_image_name"),
        ("[vm]\nmemroy = 1", r"unknown key vm\.memroy", "vm.memory"),
        ("zzzzzz = 1", "unknown key zzzzzz", "docs/config.md"),
        ("vmm = 3", r"Expected `str`.*\$\.vmm", ""),
        ("vm = 3", r"Expected `object`.*\$\.vm", ""),
        ("= 3", "is not TOML", ""),
        ('vmm = "xen"', "vmm: 'xen' is not", ""),
        ('network = "brigde"', "network: 'brigde' is not one of user, bridge, none", ""),
        ('bridge_name = "docker0"', "not a bridge of banger's", ""),
        ('cidr = "8.8.8.0/24"', "not a private network", ""),
        ('cidr = "172.16.0.0/30"', "prefix has to be 16 to 29", ""),
        ('bridge_ip = "172.16.0.255"', "not a host's address", ""),
        ('dns_listen_addr = "0.0.0.0:5353"', "dns_listen_addr: a loopback", ""),
        ('dns_listen_addr = "127.0.0.1:53"', "dns_listen_addr: .* above 1023", ""),
        ("jailer_uid_base = 1000", "jailer_uid_base: 1879048192 to", ""),
        ('firecracker_base_url = "ftp://x"', "firecracker_base_url", ""),
        ("[vm]\nboot_timeout_s = 0", r"vm\.boot_timeout_s", ""),
        ('log_level = "loud"', "log_level", ""),
        ("tap_pool_size = 65", "tap_pool_size", ""),
        ("tap_pool_size = -1", "tap_pool_size", ""),
        ('bridge_name = "a-name-of-16-char"', "bridge_name", ""),
        ('bridge_name = "a b"', "bridge_name", ""),
        ('bridge_ip = "1.2.3"', "bridge_ip", ""),
        ('cidr = "172.16.0.1/24"', "host bits", ""),
        ('default_dns = ["one.one"]', "default_dns", ""),
        ("[vm]\nvcpu = 0", r"vm\.vcpu", ""),
        ('[vm]\nmemory = "much"', r"vm\.memory", ""),
        ("[vm]\ndisk_size = -1", r"vm\.disk_size", ""),
        ("blob_cache_size = -1", "blob_cache_size", ""),
        ('blob_cache_size = "much"', "blob_cache_size", ""),
        ('file_sync = [{ host = "a", guest = "/a" }]', "file_sync: host = 'a' is not the", ""),
        ('file_sync = [{ host = "/a", guest = "~x/a" }]', "guest = '~x/a' is not the", ""),
        ('file_sync = [{ host = "/a", guest = "/a/" }]', "guest = '/a/' is not the", ""),
        ('file_sync = [{ host = "/a", guest = "/a/../b" }]', "holds an empty part", ""),
        ('file_sync = [{ host = "/a", guest = "/a//b" }]', "holds an empty part", ""),
        ('file_sync = [{ host = "/a", guest = "/a", mode = "4755" }]', "is not octal", ""),
        ('file_sync = [{ host = "/a" }]', "missing required field `guest`", ""),
        ('catalogs = ["images.toml"]', "'images.toml' is not an absolute path", ""),
        ('catalogs = ["ftp://h/images.toml"]', "is not an absolute path, an https", ""),
        ('catalogs = ["http://h.example/images.toml"]', "is plain http", ""),
        ('catalogs = ["https://h.example"]', "is not an absolute path, an https", ""),
        ('catalogs = "/srv/images.toml"', r"Expected `array`.*\$\.catalogs", ""),
        ("[registries]\nmirors = {}", r"unknown key registries\.mirors", "registries.mirrors"),
        ("[registries]\nmax_parallel_downloads = 0", "max_parallel_downloads: 1 to 32", ""),
        ('[registries]\ninsecure = ["http://x"]', "'http://x' is not HOST", ""),
        ('[registries]\nmirrors = { "a/b" = [] }', "'a/b' is not HOST", ""),
        ('[registries]\nmirrors = { x = ["m.example"] }', "'m.example' is not https://", ""),
        ('[registries]\nmirrors = { x = ["http://m.example"] }', "http needs its host", ""),
    ],
)
def test_wrong_file_is_refused_by_name(text: str, message: str, hint: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        parse_config(text.encode(), "/etc/c.toml")
    assert caught.value.message.startswith("/etc/c.toml")
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message


def test_mirror_over_http_is_taken_on_loopback_and_where_it_is_allowed() -> None:
    text = """
    [registries]
    insecure = ["lan.example"]
    mirrors = { x = ["http://127.0.0.1:5000", "http://[::1]", "http://lan.example:80/hub"] }
    """
    assert len(parse_config(text.encode(), "x").registries.mirrors["x"]) == 3


def test_bytes_that_are_not_utf8_are_refused() -> None:
    with pytest.raises(InvalidInput, match="is not TOML"):
        parse_config(b'vmm = "\xff"', "x")


def test_toml_of_pyproject_is_not_ours() -> None:
    text = (PAGE.parents[1] / "pyproject.toml").read_bytes()
    assert tomllib.loads(text.decode())
    with pytest.raises(InvalidInput, match="unknown key"):
        parse_config(text, "x")
