"""What is asked of mmdebstrap and npm, and what their failures become; both are played by scripts."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from banger.catalog import DebianImage, ImageFile, NpmExtra, catalog_images
from banger.errors import BangerError, InvalidInput, NoSpace, Unavailable
from banger.host.commands import HostCommands
from banger.images import debian

ENTRY = DebianImage(
    name="tiny", description="", suite="bookworm", variant="essential", packages=("dash",),
    capacity_mib=64,
    files=(ImageFile("/etc/it's here", "with 'quotes' $HOME %s\n"),),
    links=(("/usr/local/bin/fd", "/usr/bin/fdfind"),),
    mask=("modprobe@drm.service",),
)  # fmt: skip


class RecordingSink:
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.warnings: list[str] = []

    def stage(self, stage: str) -> None:
        self.stages.append(stage)

    def progress(self, done_bytes: int, total_bytes: int = 0) -> None:
        pass

    def warning(self, message: str) -> None:
        self.warnings.append(message)


def commands_with(directory: Path, **scripts: str) -> HostCommands:
    """Return a door to the host where these programs are shell scripts."""
    directory.mkdir(exist_ok=True)
    for name, text in scripts.items():
        program = directory / name
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    return HostCommands({**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"})


async def run_mmdebstrap(tmp_path: Path, script: str) -> RecordingSink:
    sink = RecordingSink()
    with open(os.devnull, "wb") as out:
        await debian.mmdebstrap(
            ["--variant=apt"], suite="bookworm", mirror=None, stdout=out,
            commands=commands_with(tmp_path / "bin", mmdebstrap=script), sink=sink,
            temporary=tmp_path,
        )  # fmt: skip
    return sink


LOG = 'for a; do case $a in --logfile=*) exec 2>"${a#--logfile=}";; esac; done\n'


@pytest.fixture(autouse=True)
def keyring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "_debian_keyring", lambda: True)


async def test_its_log_becomes_stages(tmp_path: Path) -> None:
    sink = await run_mmdebstrap(
        tmp_path,
        LOG + "echo 'I: running apt-get update...' >&2; echo 'Get:1 x' >&2;"
        "echo 'I: downloading packages with apt...' >&2; echo 'I: downloading apt...' >&2;"
        "echo 'I: creating tarball...' >&2",
    )
    assert sink.stages == [
        "reading the package index", "downloading packages", "writing the file system",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        ("E: Failed to fetch x  Could not resolve 'x'", Unavailable, "debian_mirror"),
        ("E: Unable to connect to x:80", Unavailable, "debian_mirror"),
        ("E: The repository 'x' is not signed.", Unavailable, "debian-archive-keyring"),
        ("dpkg: error: No space left on device", NoSpace, "banger vm prune"),
        ("E: newuidmap failed", Unavailable, "/etc/subuid"),
        ("E: Unable to locate package nosuch", BangerError, "banger daemon logs"),
    ],
)
async def test_its_failures_say_what_to_do(tmp_path: Path, line: str, kind, words: str) -> None:
    with pytest.raises(kind) as caught:
        await run_mmdebstrap(tmp_path, LOG + f'echo "{line}" >&2; exit 25')
    assert words in caught.value.hint
    assert "\n" not in caught.value.message


async def test_without_a_keyring_the_package_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(debian, "_debian_keyring", lambda: False)
    with pytest.raises(Unavailable) as caught:
        await run_mmdebstrap(tmp_path, "exit 0")
    assert "debian-archive-keyring" in caught.value.hint


def test_the_finishing_script_is_shell_for_every_image() -> None:
    for entry in [ENTRY, *catalog_images().values()]:
        script = debian.finishing_script(entry)
        subprocess.run(["/bin/sh", "-n"], input=script.encode(), check=True)
        assert "rm -f /etc/ssh/ssh_host_*" in script
        assert ": > /etc/machine-id" in script


def test_a_file_keeps_its_quotes_through_the_shell(tmp_path: Path) -> None:
    script = debian.finishing_script(ENTRY)
    lines = [line for line in script.splitlines() if "it'" in line or "quotes" in line]
    relocated = script[script.index(lines[0]) :].split("chmod 0644")[0]
    relocated = relocated.replace("/etc/it", f"{tmp_path}/it")
    subprocess.run(["/bin/sh", "-euc", relocated], check=True)
    assert (tmp_path / "it's here").read_text() == "with 'quotes' $HOME %s\n"


def test_installed_packages_are_read_from_the_status_file() -> None:
    status = (
        "Package: zlib1g\nStatus: install ok installed\nVersion: 1:1.2\nDescription: a\n b: c\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\n"
        "Package: bash\nStatus: install ok installed\nVersion: 5.2\n"
    )
    assert debian.installed_packages(status) == {"bash": "5.2", "zlib1g": "1:1.2"}


def npm_archive(path: Path) -> bytes:
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("package/bin/tool")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"tool"))
    return path.read_bytes()


def extra_for(data: bytes, member: str = "package/bin/tool") -> NpmExtra:
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    return NpmExtra("tool", "@some/tool", "1.0", integrity, member, "/usr/local/bin/tool")


async def fetch(tmp_path: Path, extra: NpmExtra, script: str) -> Path:
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    return await debian.fetch_npm_file(
        extra, commands=commands_with(tmp_path / "bin", npm=script), work=work,
        cache_dir=tmp_path / "cache",
    )  # fmt: skip


async def test_a_file_of_an_npm_package_is_fetched_once(tmp_path: Path) -> None:
    data = npm_archive(tmp_path / "t.tgz")
    fetched = await fetch(tmp_path, extra_for(data), f"cp {tmp_path}/t.tgz some-tool-1.0.tgz")
    assert fetched.read_bytes() == b"tool"
    assert (await fetch(tmp_path, extra_for(data), "exit 1")).read_bytes() == b"tool"


async def test_another_package_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    npm_archive(tmp_path / "t.tgz")
    with pytest.raises(Unavailable, match="is not the one the catalog pins"):
        await fetch(tmp_path, extra_for(b"other"), f"cp {tmp_path}/t.tgz x.tgz")
    assert list((tmp_path / "cache" / "npm").iterdir()) == []


async def test_a_package_without_the_file_is_refused(tmp_path: Path) -> None:
    data = npm_archive(tmp_path / "t.tgz")
    with pytest.raises(Unavailable, match="has no package/other"):
        await fetch(tmp_path, extra_for(data, "package/other"), f"cp {tmp_path}/t.tgz x.tgz")


async def test_a_registry_that_does_not_answer_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="npm cannot fetch @some/tool"):
        await fetch(tmp_path, extra_for(b"x"), "echo ETIMEDOUT >&2; exit 1")


async def test_without_npm_and_uv_the_hint_names_both(tmp_path: Path) -> None:
    commands = HostCommands({"PATH": str(tmp_path)})
    commands.environment["PATH"] = str(tmp_path)
    (tmp_path / "work").mkdir()
    with pytest.raises(Unavailable, match="neither npm nor uv"):
        await debian.fetch_npm_file(
            extra_for(b"x"), commands=commands, work=tmp_path / "work", cache_dir=tmp_path / "c"
        )


async def test_an_integrity_that_is_no_sha512_is_refused(tmp_path: Path) -> None:
    extra = NpmExtra("t", "t", "1", "sha1-AAAA", "m", "/p")
    with pytest.raises(InvalidInput, match="is not a sha512"):
        await fetch(tmp_path, extra, "exit 0")


def test_the_download_cache_holds_what_was_installed_and_nothing_older(tmp_path: Path) -> None:
    fresh, archives = tmp_path / "fresh", tmp_path / "archives"
    fresh.mkdir()
    archives.mkdir()
    for directory, name in [
        (archives, "bash_5.1_amd64.deb"),
        (archives, "zlib1g_1%3a1.2_amd64.deb"),
        (fresh, "bash_5.2_amd64.deb"),
        (fresh, "zlib1g_1%3a1.2_amd64.deb"),
        (fresh, "lock"),
    ]:
        (directory / name).write_bytes(b"deb")
    debian._keep_archives(fresh, archives, {"bash": "5.2", "zlib1g": "1:1.2"})
    assert sorted(file.name for file in archives.iterdir()) == [
        "bash_5.2_amd64.deb", "zlib1g_1%3a1.2_amd64.deb",
    ]  # fmt: skip
    assert not fresh.exists()
