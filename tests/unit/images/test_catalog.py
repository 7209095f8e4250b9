"""The catalog as it ships, and what is said of one that is wrong."""

from __future__ import annotations

import asyncio
import http.server
import os
import re
import threading
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from banger import catalog
from banger.catalog import BundleImage, DebianImage, OciImage, extra
from banger.catalog.entries import examine_images
from banger.catalog.extra import Catalogs
from banger.config import Config
from banger.errors import Corrupted, NotFound
from banger.services.catalogs import check_builtin, check_catalog

ENTRY = "[images.x]\nkind='debian'\ndescription='d'\nsuite='s'\nvariant='apt'\n"


def test_the_shipped_catalog_reads() -> None:
    assert {"debian-bookworm", "debian-bookworm-minimal"} <= catalog.catalog_images().keys()
    assert {"generic-6.12", "generic-6.1"} <= catalog.catalog_kernels().keys()
    full = catalog.image_entry("debian-bookworm")
    assert {"docker.io", "openssh-server", "git", "jq", "ripgrep"} <= set(full.packages)
    assert full.npm[0].path == "/usr/local/bin/mise"


def test_a_text_of_the_catalog_names_no_host() -> None:
    for file in ("images.toml", "kernels.toml"):
        text = resources.files("banger.catalog").joinpath(file).read_text("utf-8")
        assert not re.search(r"https?:|\.(org|com|net|io)/", text)


def test_sshd_takes_keys_only() -> None:
    (sshd,) = [
        file
        for file in catalog.image_entry("debian-bookworm").files
        if file.path.startswith("/etc/ssh/")
    ]
    lines = sshd.text.splitlines()
    assert "PasswordAuthentication no" in lines
    assert "PermitRootLogin yes" in lines
    assert "StrictModes no" in lines


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(NotFound) as caught:
        catalog.image_entry("debian-bokworm")
    assert "debian-bookworm" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[images.x]\nkind = 'ocy'\n", "unknown kind 'ocy'"),
        ("[images.x]\ndescription = 'd'\n", "unknown kind None"),
        ("[images.x]\nkind = 'debian'\n", "missing required field"),
        ("[images.x\n", "is not TOML"),
        (
            ENTRY + "capacity_mib=5\npackages=[]\nset='nowhere'\n",
            "images.toml:8: images.x.set: there is no set 'nowhere'",
        ),
        (
            ENTRY + "capacity_mib='5'\npackages=[]\n",
            "Expected `int`",
        ),
    ],
)
def test_a_wrong_catalog_says_where(text: str, words: str) -> None:
    with pytest.raises(Corrupted, match=words):
        catalog.parse_images(text)


def test_a_wrong_kernel_kind_says_what_there_is() -> None:
    with pytest.raises(Corrupted) as caught:
        catalog.parse_kernels("[kernels.k]\nkind = 'bundle'\n")
    assert caught.value.hint == "the kinds are: debian"


# -- entries of the three kinds

PIN = "ab" * 32
BUNDLE = f"""
[images.base]
kind = "bundle"
description = "Ours"
url = "base.tar.zst"
sha256 = "{PIN}"
kernel = "generic-6.12"
"""
OCI = f"""
[images.alpine]
kind = "oci"
description = "Alpine"
source = "docker.io/library/alpine:3.20@sha256:{PIN}"
platform = "linux/amd64"
"""
DEBIAN = """
[images.team]
kind = "debian"
description = "With our tools"
suite = "bookworm"
variant = "apt"
set = "boot"
capacity_mib = 512
packages = ["systemd", "g++", "libstdc++6"]
disable = ["cron.service"]
"""
BASE = "https://images.example/v1/images.toml"


def examine(text: str, base: str = BASE):
    return examine_images(text, builtin=catalog.images_text(), base=base)


def test_a_catalog_of_others_has_three_kinds() -> None:
    parsed = examine(BUNDLE + OCI + DEBIAN)
    assert parsed.problems == ()
    base, alpine, team = (parsed.images[name] for name in ("base", "alpine", "team"))
    assert isinstance(base, BundleImage)
    assert base.url == "https://images.example/v1/base.tar.zst"
    assert (base.sha256, base.kernel) == (PIN, "generic-6.12")
    assert isinstance(alpine, OciImage)
    assert alpine.source.startswith("docker.io/library/alpine:3.20@sha256:ab")
    assert isinstance(team, DebianImage)
    built_in = catalog.image_entry("debian-bookworm-minimal")
    assert (team.files, team.mask) == (built_in.files, built_in.mask)


@pytest.mark.parametrize(
    ("text", "line", "key", "words", "hint"),
    [
        ("[images.x\n", 1, "", "is not TOML", ""),
        ("x = 1\n", 1, "x", "unknown key 'x'", "images"),
        ("[image.x]\nkind='oci'\n", 1, "image", "unknown key 'image'", "did you mean images?"),
        ("images = 3\n", 1, "images", "Expected `object`", ""),
        (
            BUNDLE.replace("url =", "ulr ="),
            5,
            "images.base.ulr",
            "unknown key",
            "did you mean url?",
        ),
        (BUNDLE.replace("bundle", "bundel"), 3, "images.base.kind", "unknown kind", "bundle"),
        (BUNDLE.replace('url = "base.tar.zst"\n', ""), 2, "images.base", "missing", ""),
        (BUNDLE.replace('"ab', '"AB'), 6, "images.base.sha256", "64 hexadecimal", "sha256sum"),
        (BUNDLE.replace('"base.t', '"ftp://h/b.t'), 5, "images.base.url", "not an https", ""),
        (BUNDLE.replace('"base.t', '"file:///b.t'), 5, "images.base.url", "a file URL is for", ""),
        (BUNDLE.replace('"base.t', '"https://b.t:x/'), 5, "images.base.url", "not a URL", ""),
        (BUNDLE.replace("generic-6.12", "../x"), 7, "images.base.kernel", "no kernel's name", ""),
        (BUNDLE.replace("images.base", "images.Base"), 2, "images.Base", "no name", "63"),
        (BUNDLE.replace("images.base", 'images."a/../b"'), 2, "images.a/../b", "no name", ""),
        (BUNDLE.replace("Ours", "\\u001b[31m"), 4, "images.base.description", "one line", ""),
        (BUNDLE.replace('"Ours"', "7"), 4, "images.base.description", "Expected `str`", ""),
        (OCI.replace("docker.io/library/", ""), 5, "images.alpine.source", "in full", "docker.io"),
        (OCI.replace("docker.io/", "oci:"), 5, "images.alpine.source", "in full", ""),
        (OCI.replace("docker.io/", "oci:5000/"), 5, "images.alpine.source", "in full", ""),
        (OCI.replace("docker.io/", "rootfs:/"), 5, "images.alpine.source", "in full", ""),
        (OCI.replace("docker.io/", "https://docker.io/"), 5, "images.alpine.source", "full", ""),
        (
            OCI.replace("linux/amd64", "windows"),
            6,
            "images.alpine.platform",
            "no platform",
            "amd64",
        ),
        (OCI + "capacity_mib = 1\n", 7, "images.alpine.capacity_mib", "is not 4 to", ""),
        (DEBIAN.replace('"g++"', '"./x.deb"'), 9, "images.team.packages", "no package's", ""),
        (DEBIAN.replace('"g++"', '"?essential"'), 9, "images.team.packages", "no package's", ""),
        (DEBIAN.replace('"g++"', '"a,b"'), 9, "images.team.packages", "no package's name", ""),
        (DEBIAN.replace('"g++"', '"--x"'), 9, "images.team.packages", "no package's name", ""),
        (DEBIAN.replace('"bookworm"', '"--hook"'), 5, "images.team.suite", "no suite", ""),
        (DEBIAN.replace('"apt"', '"custom"'), 6, "images.team.variant", "not one of", ""),
        (DEBIAN.replace('"boot"', '"boat"'), 7, "images.team.set", "no set", "did you mean boot?"),
        (DEBIAN.replace("cron.service", "../../x"), 10, "images.team.disable", "no unit", ""),
        (DEBIAN + 'links = {"/a" = "/b"}\n', 11, "images.team.links", "for the catalog that", ""),
        (DEBIAN + "[[images.team.npm]]\nname='x'\n", 2, "images.team.npm", "comes with banger", ""),
        ("[files.x]\npath='/etc/x'\ntext='x'\n", 1, "files", "unknown key 'files'", ""),
        ("[sets.x]\nfiles=['x']\n", 1, "sets", "unknown key 'sets'", ""),
    ],
)
def test_a_problem_has_its_line_its_key_and_a_way_out(
    text: str, line: int, key: str, words: str, hint: str
) -> None:
    parsed = examine(text)
    assert parsed.images == {}
    (problem,) = parsed.problems
    assert (problem.line, problem.key) == (line, key)
    assert words in problem.message
    assert hint in problem.hint
    assert "\n" not in problem.shown("images.toml")


def test_one_wrong_entry_leaves_the_others() -> None:
    parsed = examine(BUNDLE.replace("url", "ulr") + OCI + DEBIAN.replace("apt", "none"))
    assert list(parsed.images) == ["alpine"]
    assert [problem.key for problem in parsed.problems] == [
        "images.base.ulr",
        "images.team.variant",
    ]


def test_a_catalog_that_is_a_file_may_name_files_beside_it() -> None:
    parsed = examine(BUNDLE, "file:///srv/images/images.toml")
    assert parsed.images["base"].url == "file:///srv/images/base.tar.zst"


@pytest.mark.parametrize("text", ["[" * 5000, "a" * 100, "images = {}\n" * 2, "\0", "x = 1e999999"])
def test_no_text_makes_it_fail(text: str) -> None:
    assert examine(text).problems


# -- extra catalogs


class Site:
    """A server of one directory that can be told to misbehave."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seen: list[tuple[str, str, str | None]] = []
        self.status = 200
        self.location = ""
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.seen.append((self.command, self.path, self.headers.get("If-None-Match")))
                body = b""
                path = site.root / self.path.lstrip("/")
                status = site.status
                if status == 200 and not path.is_file():
                    status = 404
                etag = f'"{path.stat().st_mtime_ns}"' if path.is_file() else ""
                if status == 200 and self.headers.get("If-None-Match") == etag:
                    status = 304
                elif status == 200:
                    body = path.read_bytes()
                self.send_response(status)
                if site.location:
                    self.send_header("Location", site.location)
                self.send_header("ETag", etag)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                return

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "site").mkdir()
    made = Site(tmp_path / "site")
    yield made
    made.close()


def test_without_a_configuration_there_is_the_built_in_one() -> None:
    assert Catalogs().current().images == catalog.catalog_images()
    assert set(Catalogs().current().origins.values()) == {"built-in"}


def test_a_catalog_of_a_path_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "images.toml"
    path.write_text(BUNDLE)
    catalogs = Catalogs((str(path),))
    first = catalogs.current()
    assert first.entry("base").url == f"file://{tmp_path}/base.tar.zst"
    assert first.origins["base"] == str(path)
    assert catalogs.current() is first
    path.write_text(BUNDLE + OCI)
    assert "alpine" in catalogs.current().images
    path.unlink()
    assert catalogs.current().images == catalog.catalog_images()
    (warning,) = catalogs.current().warnings
    assert f"the catalog {path} is left out" in warning
    with pytest.raises(NotFound) as caught:
        first.entry("bas")
    assert "did you mean base?" in caught.value.hint


def test_banger_keeps_its_names_and_the_first_catalog_keeps_its(tmp_path: Path) -> None:
    mine, yours = tmp_path / "mine.toml", tmp_path / "yours.toml"
    mine.write_text(BUNDLE.replace("images.base", "images.debian-bookworm") + OCI)
    yours.write_text(OCI.replace("3.20", "3.21"))
    found = Catalogs((str(mine), str(yours))).current()
    assert found.images["debian-bookworm"] == catalog.image_entry("debian-bookworm")
    assert ":3.20@" in found.images["alpine"].source
    assert [str(warning).partition(" is left out: ")[2] for warning in found.warnings] == [
        "banger's own has that name",
        f"that of {mine} has that name",
    ]


def test_many_problems_are_told_shortly(tmp_path: Path) -> None:
    path = tmp_path / "images.toml"
    path.write_text("".join(f"[images.x{n}]\nkind = 'y'\n" for n in range(9)) + OCI)
    found = Catalogs((str(path),)).current()
    assert "alpine" in found.images
    assert len(found.warnings) == 4
    assert "and 6 more" in found.warnings[3]
    assert "catalog check" in found.warnings[3]


def test_a_catalog_of_a_url_is_asked_for_once_an_hour_and_by_etag(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site.root / "images.toml").write_text(BUNDLE)
    url = f"{site.url}/images.toml"
    config = Config(catalogs=[url])
    for _ in range(3):
        found = extra.load(config, tmp_path / "cache").current()
        assert found.entry("base").url == f"{site.url}/base.tar.zst"
        assert found.warnings == ()
    assert len(site.seen) == 1
    monkeypatch.setattr(extra, "_FRESH_S", 0.0)
    assert "base" in extra.load(config, tmp_path / "cache").current().images
    assert site.seen[1][2] == f'"{(site.root / "images.toml").stat().st_mtime_ns}"'
    (site.root / "images.toml").write_text(OCI)
    assert "alpine" in extra.load(config, tmp_path / "cache").current().images
    assert len(site.seen) == 3


@pytest.mark.parametrize("failure", ["down", "500", "html", "huge", "redirect"])
def test_what_is_out_of_reach_or_broken_is_taken_from_its_copy(
    failure: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site.root / "images.toml").write_text(BUNDLE)
    config = Config(catalogs=[f"{site.url}/images.toml"])
    assert "base" in extra.load(config, tmp_path / "cache").current().images
    monkeypatch.setattr(extra, "_FRESH_S", 0.0)
    if failure == "down":
        site.close()
    elif failure == "500":
        site.status = 500
    elif failure == "html":
        (site.root / "images.toml").write_text("<html>your session has ended</html>")
    elif failure == "huge":
        (site.root / "images.toml").write_bytes(BUNDLE.encode() + b"#" * (1 << 20))
    else:
        site.status, site.location = 302, "http://images.example/images.toml"
    catalogs = extra.load(config, tmp_path / "cache")
    found = catalogs.current()
    assert "base" in found.images
    assert "debian-bookworm" in found.images
    (warning,) = found.warnings
    assert site.url in warning
    assert "copy of 20" in warning
    # Who does not answer is not asked at each listing.
    asked = len(site.seen)
    assert catalogs.current() is found
    assert len(site.seen) == asked


def test_what_was_never_there_is_left_out(tmp_path: Path) -> None:
    catalogs = extra.load(Config(catalogs=["http://127.0.0.1:9/images.toml"]), tmp_path)
    begun = time.monotonic()
    for _ in range(5):
        found = catalogs.current()
        assert found.images == catalog.catalog_images()
        assert "is left out" in found.warnings[0]
    assert time.monotonic() - begun < 5


def test_a_damaged_copy_is_fetched_anew(site: Site, tmp_path: Path) -> None:
    (site.root / "images.toml").write_text(BUNDLE)
    config = Config(catalogs=[f"{site.url}/images.toml"])
    extra.load(config, tmp_path).current()
    (notes,) = (tmp_path / "catalogs").glob("*.json")
    notes.write_text("{")
    assert "base" in extra.load(config, tmp_path).current().images
    assert len(site.seen) == 2


async def test_many_threads_may_ask(site: Site, tmp_path: Path) -> None:
    (site.root / "images.toml").write_text(BUNDLE)
    catalogs = extra.load(Config(catalogs=[f"{site.url}/images.toml"]), tmp_path)
    found = await asyncio.gather(*(asyncio.to_thread(catalogs.current) for _ in range(20)))
    assert all(one is found[0] for one in found)
    assert len(site.seen) == 1


# -- check


def test_the_built_in_catalog_passes() -> None:
    report = check_builtin()
    assert report.ok
    assert "debian-bookworm" in report.names


def test_check_asks_for_bundles_and_notes_what_is_not_pinned(site: Site) -> None:
    text = BUNDLE + OCI.replace(f"@sha256:{PIN}", "")
    (site.root / "images.toml").write_text(text)
    report = check_catalog(f"{site.url}/images.toml", online=True)
    (missing, unpinned) = report.findings
    assert (missing.key, missing.line, missing.is_problem) == ("images.base.url", 5, True)
    assert "HTTP 404" in missing.message
    assert (unpinned.key, unpinned.is_problem) == ("images.alpine.source", False)
    assert not report.ok
    assert site.seen[-1][0] == "HEAD"
    (site.root / "base.tar.zst").write_bytes(b"x")
    assert check_catalog(f"{site.url}/images.toml", online=True).ok
    assert check_catalog(str(site.root / "images.toml"), online=True).ok
    (site.root / "base.tar.zst").unlink()
    assert not check_catalog(str(site.root / "images.toml"), online=True).ok
    assert check_catalog(str(site.root / "images.toml"), online=False).ok


def test_check_refuses_names_that_banger_has(tmp_path: Path) -> None:
    path = tmp_path / "images.toml"
    path.write_text(OCI.replace("images.alpine", "images.debian-bookworm"))
    report = check_catalog(str(path), online=False)
    assert not report.ok
    assert "banger comes with" in report.findings[0].message


def test_check_of_what_is_not_there(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for location in (tmp_path / "absent", tmp_path, tmp_path / "pipe"):
        report = check_catalog(str(location), online=True)
        assert not report.ok
        assert str(location) in report.findings[0].where
    assert not check_catalog("http://images.example/images.toml", online=True).ok
