"""Firecracker's releases: versions, digests, and an install that is whole or did not happen."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.server
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger.errors import BangerError, Conflict, Corrupted, InvalidInput, NotFound, Unavailable
from banger.events import NullSink
from banger.host.commands import HostCommands
from banger.vmm import firecracker_release as release
from banger.vmm.firecracker_release import Version

VERSION = Version(1, 17, 0)
ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\x3e\x00" + bytes(200)
TOP = "release-v{0}-x86_64"


def member(name: str, data: bytes = b"", **attributes: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o755
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, data


def names(version: Version = VERSION) -> tuple[str, str]:
    top = TOP.format(version)
    return f"{top}/firecracker-v{version}-x86_64", f"{top}/jailer-v{version}-x86_64"


def good(version: Version = VERSION) -> list[tuple[tarfile.TarInfo, bytes]]:
    top = TOP.format(version)
    return [
        member(f"{top}/LICENSE", b"Apache"),
        member(names(version)[0], ELF + b"firecracker"),
        member(names(version)[0] + ".debug", b"symbols"),
        member(names(version)[1], ELF + b"jailer"),
        member(f"{top}/SHA256SUMS", b"sums"),
    ]


def pack(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    # Without the time: the same members have the same digest.
    return gzip.compress(out.getvalue(), mtime=0)


class Server:
    """A web server with one answer; `asked` has the paths."""

    def __init__(self) -> None:
        self.body = b""
        self.status = 200
        self.answer: Callable[[http.server.BaseHTTPRequestHandler], None] | None = None
        self.asked: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                with contextlib.suppress(ConnectionError):
                    if outer.answer is not None:
                        outer.answer(self)
                        return
                    self.send_response(outer.status)
                    self.send_header("Content-Length", str(len(outer.body)))
                    self.end_headers()
                    self.wfile.write(outer.body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/dl"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    made.body = pack(good())
    yield made
    made.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "share" / "banger"


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def install(
    server: Server, data: Path, sha256: str | None = None, version: Version = VERSION
) -> release.Installed:
    return release.install(version, server.url, sha256 or digest(server.body), data, NullSink())


def tree(data: Path) -> list[str]:
    root = data / "firecracker"
    return sorted(str(p.relative_to(root)) for p in root.rglob("*")) if root.exists() else []


def assert_nothing_installed(data: Path) -> None:
    assert [name for name in tree(data) if name != ".lock"] == []


# -- versions


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("Firecracker v1.12.1\n\n2025-08-07T12:00:00 [anonymous] exiting", (1, 12, 1)),
        ("Jailer v1.17.0\n", (1, 17, 0)),
        ("Firecracker v1.17.0-dev\n", (1, 17, 0)),
        ("", None),
        ("\n\n", None),
        ("error: 1.2\nFirecracker v1.12.1", None),
        ("Firecracker v1.12", None),
    ],
)
def test_version_is_read_from_the_first_line(
    text: str, version: tuple[int, int, int] | None
) -> None:
    assert release.parse_version(text) == version


@pytest.mark.parametrize(
    ("version", "status", "said"),
    [
        ((1, 11, 9), "fail", "older than 1.12.1"),
        ((1, 12, 1), "ok", "1.12.1"),
        ((1, 15, 1), "ok", ""),
        ((1, 16, 0), "warning", "6074"),
        ((1, 16, 1), "warning", "6074"),
        ((1, 17, 0), "ok", "newer"),
        ((2, 0, 0), "warning", "API"),
        (None, "warning", "does not say"),
    ],
)
def test_firecracker_is_judged(
    version: tuple[int, int, int] | None, status: str, said: str
) -> None:
    found = release.judge_firecracker(Version(*version) if version else None)
    assert found.status == status
    assert said in found.message


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ((1, 12, 1), "warning"),
        ((1, 13, 1), "warning"),
        ((1, 13, 2), "ok"),
        ((1, 14, 0), "warning"),
        ((1, 14, 1), "ok"),
        ((1, 17, 0), "ok"),
        (None, "warning"),
    ],
)
def test_jailer_is_judged(version: tuple[int, int, int] | None, status: str) -> None:
    found = release.judge_jailer(Version(*version) if version else None)
    assert found.status == status
    assert version is None or ("CVE-2026-1386" in found.message) == (status == "warning")


def test_pinned_default_is_one_that_both_judges_accept() -> None:
    assert release.DEFAULT in release.RELEASES
    assert release.judge_firecracker(release.DEFAULT).status == "ok"
    assert release.judge_jailer(release.DEFAULT).status == "ok"
    for value in release.RELEASES.values():
        assert len(bytes.fromhex(value)) == 32


@pytest.mark.parametrize("text", ["", "1.17", "1.17.0-dev", "../1.2.3", "1.2.3\n", "latest", "v"])
def test_odd_version_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        release.version_of(text)


# -- installing


def test_install_puts_two_programs_in_place_and_nothing_else(server: Server, data: Path) -> None:
    old = os.umask(0o077)
    try:
        found = install(server, data)
    finally:
        os.umask(old)
    assert server.asked == ["/dl/v1.17.0/firecracker-v1.17.0-x86_64.tgz"]
    assert tree(data) == [
        ".lock", "1.17.0", "1.17.0/archive.sha256", "1.17.0/firecracker", "1.17.0/jailer", "current",
    ]  # fmt: skip
    assert found == release.Installed(VERSION, data / "firecracker" / "1.17.0", True)
    for program in ("firecracker", "jailer"):
        path = data / "firecracker" / "current" / program
        assert path.read_bytes() == ELF + program.encode()
        assert path.stat().st_mode & 0o7777 == 0o755
    assert os.readlink(data / "firecracker" / "current") == "1.17.0"


def test_install_again_downloads_nothing(server: Server, data: Path) -> None:
    install(server, data)
    install(server, data)
    assert len(server.asked) == 1
    with pytest.raises(Conflict, match="another archive"):
        install(server, data, sha256="0" * 64)
    (data / "firecracker" / "1.17.0" / "jailer").unlink()
    with pytest.raises(Conflict, match="damaged") as caught:
        install(server, data)
    assert caught.value.hint == "banger firecracker remove 1.17.0"


def test_current_flips_between_versions(server: Server, data: Path) -> None:
    install(server, data)
    other = Version(1, 15, 1)
    server.body = pack(good(other))
    install(server, data, version=other)
    assert [(e.version, e.current) for e in release.list_installed(data)] == [
        (VERSION, False),
        (other, True),
    ]
    server.body = pack(good())
    install(server, data)
    assert [e.current for e in release.list_installed(data)] == [True, False]
    assert len(server.asked) == 2


def test_file_url(server: Server, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a b" / "v1.17.0"
    folder.mkdir(parents=True)
    (folder / "firecracker-v1.17.0-x86_64.tgz").write_bytes(server.body)
    url = (tmp_path / "a b").as_uri()
    release.install(VERSION, url, digest(server.body), data, NullSink())
    assert [entry.version for entry in release.list_installed(data)] == [VERSION]
    with pytest.raises(Unavailable, match="No such file"):
        release.install(Version(1, 17, 1), url, digest(server.body), data, NullSink())


def test_progress_is_told(server: Server, data: Path) -> None:
    class Sink(NullSink):
        stages: list[str] = []
        bytes: list[tuple[int, int]] = []
        warnings: list[str] = []

        def stage(self, stage: str) -> None:
            self.stages.append(stage)

        def progress(self, done_bytes: int, total_bytes: int = 0) -> None:
            self.bytes.append((done_bytes, total_bytes))

        def warning(self, message: str) -> None:
            self.warnings.append(message)

    bad = Version(1, 14, 0)
    server.body = pack(good(bad))
    release.install(bad, server.url, digest(server.body), data, Sink())
    assert Sink.stages == ["download Firecracker 1.14.0", "unpack"]
    assert Sink.bytes[-1] == (len(server.body), len(server.body))
    assert ["CVE-2026-1386" in text for text in Sink.warnings] == [True]


def test_unknown_digest_is_asked_for_and_never_taken_from_the_server(
    server: Server, data: Path
) -> None:
    with pytest.raises(InvalidInput, match="not known here") as caught:
        release.install(Version(1, 14, 1), server.url, None, data, NullSink())
    assert "--sha256" in caught.value.hint
    assert server.asked == []
    with pytest.raises(InvalidInput):
        release.install(VERSION, server.url, "abc", data, NullSink())


def test_wrong_digest_installs_nothing_and_is_not_unpacked(server: Server, data: Path) -> None:
    with pytest.raises(Corrupted, match="another digest"):
        release.install(VERSION, server.url, None, data, NullSink())
    assert_nothing_installed(data)


def cut(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(b"x" * 1000)


def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(65536))


def trickling(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.02)


def silent(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.connection.recv(1)  # until the client goes


def endless_redirect(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(302)
    handler.send_header("Location", "/dl/again")
    handler.end_headers()


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (cut, Unavailable, "127.0.0.1"),
        (endless, Corrupted, "more than"),
        (trickling, Unavailable, "did not arrive"),
        (silent, Unavailable, "127.0.0.1"),
        (endless_redirect, Unavailable, "redirect"),
    ],
)
def test_bad_servers_are_bounded_and_leave_nothing(
    server: Server, data: Path, monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[http.server.BaseHTTPRequestHandler], None], error: type[BangerError], said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(release, "_ARCHIVE_LIMIT_BYTES", 1 << 20)
    monkeypatch.setattr(release, "_DOWNLOAD_TIMEOUT_S", 0.3)
    monkeypatch.setattr(release, "_SILENCE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(release, "_CHUNK_BYTES", 16)
    if answer is endless:
        monkeypatch.setattr(release, "_CHUNK_BYTES", 1 << 16)
        monkeypatch.setattr(release, "_DOWNLOAD_TIMEOUT_S", 60)
    server.answer = answer
    with pytest.raises(error, match=said):
        install(server, data)
    assert_nothing_installed(data)


@pytest.mark.parametrize("status", [404, 403, 500])
def test_http_error_is_named(server: Server, data: Path, status: int) -> None:
    server.status = status
    with pytest.raises(Unavailable, match=f"HTTP {status}") as caught:
        install(server, data)
    assert "firecracker_base_url" in caught.value.hint
    assert_nothing_installed(data)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "ftp://x", "file://elsewhere/x", "http://[", "file:///nowhere"]
)
def test_url_that_leads_nowhere_is_designed_text(data: Path, url: str) -> None:
    with pytest.raises((Unavailable, InvalidInput)):
        release.install(VERSION, url, None, data, NullSink())
    assert_nothing_installed(data)


FC, JAILER = names()
LINKS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([member(FC, ELF)], "no .*jailer"),
        ([member(JAILER, ELF)], "no .*firecracker"),
        ([], "no "),
        *(([member(FC, type=kind, linkname="/etc/passwd"), member(JAILER, ELF)], "regular") for kind in LINKS),
        ([member(FC, ELF), member(FC, ELF), member(JAILER, ELF)], "twice"),
        ([member(FC, b"#!/bin/sh\n" + bytes(100)), member(JAILER, ELF)], "x86-64"),
        ([member(FC, ELF[:18] + b"\xb7" + ELF[19:]), member(JAILER, ELF)], "x86-64"),
        ([member(FC, ELF[:20]), member(JAILER, ELF)], "x86-64"),
        ([member(f"../../{FC}", ELF), member(f"/{JAILER}", ELF)], "no "),
        ([member(f"./{FC}", ELF), member(JAILER, ELF)], "no "),
        ([member(f"x{n}") for n in range(300)], "members"),
    ],
)  # fmt: skip
def test_hostile_archive_with_a_right_digest_installs_nothing(
    server: Server, data: Path, members: list[tuple[tarfile.TarInfo, bytes]], said: str
) -> None:
    server.body = pack(members)
    with pytest.raises(Corrupted, match=said):
        install(server, data)
    assert_nothing_installed(data)
    assert not (data.parent / "firecracker").exists()


def test_large_program_and_bomb_are_bounded(
    server: Server, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = tarfile.TarInfo(FC)
    huge.size = 1 << 40
    server.body = gzip.compress(huge.tobuf() + bytes(4096))
    with pytest.raises(Corrupted, match="bytes"):
        install(server, data)
    monkeypatch.setattr(release, "_UNPACKED_LIMIT_BYTES", 1 << 20)
    server.body = pack([member("bomb", bytes(8 << 20)), *good()])
    with pytest.raises(Corrupted, match="more than"):
        install(server, data)
    assert_nothing_installed(data)


@pytest.mark.parametrize(
    "body", [b"", b"no gzip", pack(good())[:150], gzip.compress(b"no tar" * 200, mtime=0)]
)
def test_what_is_no_archive_installs_nothing(server: Server, data: Path, body: bytes) -> None:
    server.body = body
    with pytest.raises(Corrupted):
        install(server, data)
    assert_nothing_installed(data)


def test_full_file_system_installs_nothing_and_says_so(tmp_path: Path) -> None:
    """A real tmpfs of 256 KiB, in a mount namespace of its own."""
    folder = tmp_path / "v1.17.0"
    folder.mkdir()
    members = good()
    members[0] = member("noise", os.urandom(400_000))
    body = pack(members)
    (folder / "firecracker-v1.17.0-x86_64.tgz").write_bytes(body)
    script = f"""
import pathlib, sys
from banger.errors import NoSpace
from banger.events import NullSink
from banger.vmm import firecracker_release as release
data = pathlib.Path({str(tmp_path / "full")!r})
try:
    release.install(release.Version(1, 17, 0), {tmp_path.as_uri()!r}, {digest(body)!r}, data, NullSink())
except NoSpace:
    print(sorted(p.name for p in (data / "firecracker").iterdir()))
"""
    (tmp_path / "full").mkdir()
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c",
         f'mount -t tmpfs -o size=256k none "{tmp_path}/full" && exec "{sys.executable}" "{tmp_path}/script.py"'],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()}")
    assert done.stdout == "['.lock']\n", done.stderr


CHILD = """
import pathlib, sys
from banger.events import NullSink
from banger.vmm import firecracker_release as release
release.install(release.Version(1, 17, 0), sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]), NullSink())
"""


def start_child(server: Server, data: Path) -> subprocess.Popen[bytes]:
    # Reads SIGINT as Ctrl-C whatever this test's own shell made of it.
    command = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + CHILD
    words = [sys.executable, "-c", command, server.url, digest(server.body), str(data)]
    return subprocess.Popen(words, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_install_leaves_nothing_or_is_swept_by_the_next(
    server: Server, data: Path, number: signal.Signals
) -> None:
    begun = threading.Event()

    def half(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(server.body)))
        handler.end_headers()
        handler.wfile.write(server.body[:100])
        begun.set()
        handler.connection.recv(1)

    server.answer = half
    child = start_child(server, data)
    assert begun.wait(30)
    child.send_signal(number)
    assert child.wait(30) != 0
    if number == signal.SIGINT:
        assert_nothing_installed(data)
    else:
        assert any(name.startswith(".staging-") for name in tree(data))
    server.answer = None
    install(server, data)
    assert not any(name.startswith(".staging-") for name in tree(data))
    assert [entry.version for entry in release.list_installed(data)] == [VERSION]


def test_concurrent_installs_download_once(server: Server, data: Path) -> None:
    children = [start_child(server, data) for _ in range(4)]
    assert [child.wait(60) for child in children] == [0] * 4
    assert len(server.asked) == 1
    assert [entry.current for entry in release.list_installed(data)] == [True]


# -- finding and removing


def test_default_name_means_the_installed_one_then_path(
    server: Server, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("firecracker", "jailer", "other"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    commands = HostCommands({"PATH": str(folder)})
    assert release.find_firecracker(commands, "firecracker", data) == str(folder / "firecracker")
    install(server, data)
    place = data / "firecracker" / "1.17.0"
    assert release.find_firecracker(commands, "firecracker", data) == str(place / "firecracker")
    assert release.find_jailer(commands, "jailer", data) == str(place / "jailer")
    assert release.find_firecracker(commands, "other", data) == str(folder / "other")
    assert release.find_firecracker(commands, str(folder / "other"), data) == str(folder / "other")
    assert release.find_jailer(commands, "/nowhere/jailer", data) is None
    assert release.remove(VERSION, data) is True
    assert release.find_firecracker(commands, "firecracker", data) == str(folder / "firecracker")


def test_remove_keeps_the_others_and_names_what_is_absent(server: Server, data: Path) -> None:
    with pytest.raises(NotFound):
        release.remove(VERSION, data)
    install(server, data)
    other = Version(1, 15, 1)
    server.body = pack(good(other))
    install(server, data, version=other)
    assert release.remove(VERSION, data) is False
    assert [(e.version, e.current) for e in release.list_installed(data)] == [(other, True)]
    assert tree(data) == [
        ".lock", "1.15.1", "1.15.1/archive.sha256", "1.15.1/firecracker", "1.15.1/jailer", "current",
    ]  # fmt: skip
