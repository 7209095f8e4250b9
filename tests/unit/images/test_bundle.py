"""A bundle is read in one form only, and equal images give equal bundles."""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import tarfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from banger.errors import BangerError, Corrupted, InvalidInput, Unavailable
from banger.images import bundle_format as form
from banger.images.bundle import BundleRef, _public, parse_bundle

zstd = form._zstd()
KIB = 1024
STEP = 64 * KIB


def quiet(_done: int, _total: int) -> None:
    return None


def write_sparse(path: Path, size: int, ranges: dict[int, bytes]) -> Path:
    with open(path, "wb") as file:
        for offset, data in ranges.items():
            file.seek(offset)
            file.write(data)
        file.truncate(size)
    return path


def describe(path: Path, **fields: object) -> form.BundleManifest:
    with open(path, "rb") as file:
        extents = form.find_extents(file.fileno(), path.stat().st_size)
    digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    return form.BundleManifest(
        format=1, name="tiny", digest=digest, size_bytes=path.stat().st_size, extents=extents,
        **fields,
    )  # fmt: skip


def pack(path: Path, **fields: object) -> bytes:
    out = io.BytesIO()
    with open(path, "rb", buffering=0) as file:
        sha256, count = form.write_bundle(describe(path, **fields), file, out, quiet)
    assert (sha256, count) == (hashlib.sha256(out.getvalue()).hexdigest(), len(out.getvalue()))
    return out.getvalue()


def chunks(data: bytes, size: int = 1000) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def unpack(data: bytes, target: Path, size: int = 1000) -> form.BundleManifest:
    stream = form.PackedStream(chunks(data, size))
    manifest = form.read_manifest(stream)
    with open(target, "wb", buffering=0) as file:
        sha256 = form.read_rootfs(stream, manifest, file, quiet)
    assert sha256 == hashlib.sha256(data).hexdigest()
    return manifest


def repack(plain: bytes) -> bytes:
    return zstd.compress(plain)


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    noise = random.Random(7).randbytes
    return write_sparse(
        tmp_path / "rootfs.ext4",
        20 * STEP + 3 * KIB,
        {0: noise(5000), 3 * STEP: noise(2 * STEP), 9 * STEP + 100: b"x", 20 * STEP: noise(100)},
    )


# -- there and back


def test_content_and_holes_come_back(rootfs: Path, tmp_path: Path) -> None:
    manifest = unpack(pack(rootfs), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == rootfs.read_bytes()
    assert (tmp_path / "back").stat().st_blocks <= rootfs.stat().st_blocks
    assert manifest.extents == (
        (0, STEP),
        (3 * STEP, 2 * STEP),
        (9 * STEP, STEP),
        (20 * STEP, 3 * KIB),
    )


@given(
    ranges=st.dictionaries(
        st.integers(0, 20 * STEP), st.binary(min_size=1, max_size=5000), max_size=6
    ),
    size=st.integers(1, 22 * STEP),
    piece=st.integers(1, 5000),
)
@settings(max_examples=60, deadline=None)
def test_any_file_comes_back(
    ranges: dict[int, bytes], size: int, piece: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("any")
    source = write_sparse(place / "source", size, ranges)
    unpack(pack(source), place / "back", piece)
    assert (place / "back").read_bytes() == source.read_bytes()


def test_equal_content_gives_equal_bytes(rootfs: Path, tmp_path: Path) -> None:
    """However the file system stores it: without holes, and with other times and modes."""
    dense = tmp_path / "dense"
    dense.write_bytes(rootfs.read_bytes())
    dense.chmod(0o600)
    os.utime(dense, (1, 1))
    assert pack(dense) == pack(rootfs)
    assert dense.stat().st_blocks > rootfs.stat().st_blocks


def test_there_are_never_many_extents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "_MAX_EXTENTS", 8)
    path = write_sparse(tmp_path / "f", 32 * STEP, {at * STEP: b"x" for at in range(0, 32, 2)})
    manifest = describe(path)
    assert manifest.extents == ((0, 32 * STEP),)  # steps of 256 KiB
    unpack(pack(path), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == path.read_bytes()


def test_gnu_tar_and_python_unpack_it(rootfs: Path, tmp_path: Path) -> None:
    data = pack(rootfs)
    (tmp_path / "b.tar.zst").write_bytes(data)
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "--zstd", "-xf", "../b.tar.zst"], check=True, cwd=tmp_path / "out")
    assert (tmp_path / "out/rootfs.ext4").read_bytes() == rootfs.read_bytes()
    assert (tmp_path / "out/rootfs.ext4").stat().st_blocks <= rootfs.stat().st_blocks + 256
    with tarfile.open(fileobj=io.BytesIO(zstd.decompress(data))) as archive:
        assert archive.getnames() == ["manifest.json", "rootfs.ext4"]
        content = archive.extractfile("rootfs.ext4")
        assert content is not None
        assert content.read() == rootfs.read_bytes()
        said = archive.extractfile("manifest.json")
        assert said is not None
        assert msgspec.json.decode(said.read())["name"] == "tiny"


@pytest.mark.parametrize("size", [1, 8**11 - 1, 8**11, 1 << 37])
def test_headers_of_any_size_are_what_tarfile_reads(size: int) -> None:
    header = form._header("rootfs.ext4", size, b"0")
    info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    assert (info.name, info.size, info.uid, info.mtime) == ("rootfs.ext4", size, 0, 0)


def test_a_changed_file_is_not_packed(rootfs: Path) -> None:
    manifest = describe(rootfs)
    with open(rootfs, "r+b") as file:
        file.write(b"changed")
    with open(rootfs, "rb", buffering=0) as file, pytest.raises(Corrupted, match="was changed"):
        form.write_bundle(manifest, file, io.BytesIO(), quiet)


# -- what is refused


def test_truncation_anywhere_is_an_error(rootfs: Path, tmp_path: Path) -> None:
    data = pack(rootfs)
    assert len(data) > 100_000
    for cut in sorted(
        {*range(0, 300, 7), *range(0, len(data), 9001), *range(len(data) - 40, len(data))}
    ):
        with pytest.raises(Corrupted, match="cut off|empty"):
            unpack(data[:cut], tmp_path / "back")


def test_an_altered_byte_anywhere_is_an_error(rootfs: Path, tmp_path: Path) -> None:
    data = pack(rootfs)
    for at in sorted(
        {*range(0, 300, 3), *range(0, len(data), 5003), *range(len(data) - 20, len(data))}
    ):
        altered = bytearray(data)
        altered[at] ^= 0x10
        with pytest.raises(BangerError):
            unpack(bytes(altered), tmp_path / "back")


def test_an_altered_plain_byte_anywhere_is_an_error(rootfs: Path, tmp_path: Path) -> None:
    """Packed anew, so that no checksum of zstd helps."""
    plain = zstd.decompress(pack(rootfs))
    for at in sorted({*range(0, 4096, 11), *range(0, len(plain), 4099), len(plain) - 1}):
        altered = bytearray(plain)
        altered[at] ^= 0x01
        try:
            unpack(repack(bytes(altered)), tmp_path / "back")
        except BangerError:
            continue
        # Only what manifest.json says of the image may differ: nothing proves it but a pin.
        assert at < 1024
        assert (tmp_path / "back").read_bytes() == rootfs.read_bytes()


def member(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(data), "/etc/shadow"
    return info.tobuf() + data + bytes(-len(data) % 512)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plain: plain + bytes(512), "something behind its end"),
        (lambda plain: plain + b"x", "something behind its end"),
        (lambda plain: plain[:-1024] + member("etc/passwd", data=b"root") + bytes(1024), "behind"),
        (lambda plain: plain[:-1024] + member("l", tarfile.SYMTYPE) + bytes(1024), "behind"),
        (lambda plain: member("../../etc/passwd", data=b"x") + plain, "not a bundle"),
        (lambda plain: member("manifest.json", tarfile.SYMTYPE) + plain, "not a bundle"),
        (lambda plain: plain.replace(b"GNUSparseFile.0/rootfs", b"GNUSparseFile.0/../../r"), "not hold"),
        (lambda plain: b"", "cut off"),
        (lambda plain: b"\x7fELF" + plain, "not a bundle"),
        (lambda plain: plain[:-512], "cut off"),
    ],
)  # fmt: skip
def test_no_other_tar_is_taken(change, words: str, rootfs: Path, tmp_path: Path) -> None:
    plain = change(zstd.decompress(pack(rootfs)))
    with pytest.raises(Corrupted, match=words):
        unpack(repack(plain), tmp_path / "back")


@pytest.mark.parametrize("tail", [b"x", b"\0" * 100, repack(b"more"), b"\x50\x2a\x4d\x18\0\0\0\0"])
def test_nothing_may_follow_the_frame(tail: bytes, rootfs: Path, tmp_path: Path) -> None:
    data = pack(rootfs)
    for size in (1000, len(data), len(data) + len(tail)):
        with pytest.raises(Corrupted, match="behind its end"):
            unpack(data + tail, tmp_path / "back", size)


@pytest.mark.parametrize("data", [b"", b"x", b"\x1f\x8b" + bytes(100), bytes(2000), b"<html>" * 99])
def test_what_is_no_zstd_is_named(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(Corrupted, match="empty|cut off|not packed with zstd"):
        unpack(data, tmp_path / "back")


def test_a_bomb_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "_EXPANSION_FLOOR_BYTES", 8 << 20)
    stream = form.PackedStream(chunks(zstd.compress(bytes(300 << 20))))
    with pytest.raises(Corrupted, match="bomb"):
        for _ in stream.pieces(300 << 20):
            pass


def test_a_window_of_gigabytes_is_refused() -> None:
    # RFC 8878: Window_Descriptor 0xA8 asks for 2 GiB.
    frame = b"\x28\xb5\x2f\xfd\x00\xa8" + bytes(100)
    with pytest.raises(Corrupted, match="zstd"):
        form.PackedStream([frame]).read(1)


GOOD = {
    "format": 1, "name": "tiny", "digest": f"sha256:{'0' * 64}", "size_bytes": 4096,
    "extents": [[0, 4096]],
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../up"},
        {"name": ""},
        {"digest": "sha256:1"},
        {"digest": "md5:0"},
        {"size_bytes": 0},
        {"size_bytes": 1 << 62},
        {"size_bytes": -1},
        {"size_bytes": "4096"},
        {"extents": [[0, 4097]]},
        {"extents": [[-1, 10]]},
        {"extents": [[0, 0]]},
        {"extents": [[100, 10], [0, 10]]},
        {"extents": [[0, 10], [5, 10]]},
        {"extents": [[0, 1 << 70]]},
        {"kernel": "../../k"},
        {"platform": "linux"},
        {"created_at": "yesterday\n"},
        {"description": "two\nlines"},
        {"description": "x" * 2000},
        {"default_user": ""},
        {"default_env": {"A=B": "c"}},
        {"default_env": {"": "c"}},
        {"default_env": {"A": "c\0d"}},
        {"entrypoint": ["a\0b"]},
        {"command": "sh"},
    ],
)
def test_a_wrong_manifest_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(Corrupted, match="manifest.json"):
        form.decode_manifest(msgspec.json.encode({**GOOD, **change}))


def test_a_manifest_of_the_future_names_its_format() -> None:
    with pytest.raises(Unavailable, match="format 2") as caught:
        form.decode_manifest(b'{"format": 2, "blocks": []}')
    assert "newer banger" in caught.value.hint
    assert form.decode_manifest(msgspec.json.encode({**GOOD, "later": 1})).name == "tiny"


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"{}"])
def test_a_manifest_that_does_not_read(raw: bytes) -> None:
    with pytest.raises(Corrupted, match="does not read"):
        form.decode_manifest(raw)


@given(st.binary(max_size=3000))
@settings(max_examples=200, deadline=None)
def test_no_bytes_make_it_fail_otherwise(data: bytes) -> None:
    for packed in (data, repack(data), repack(form.manifest_head(len(data)) + data)):
        with pytest.raises(BangerError):
            form.read_manifest(form.PackedStream([packed]))


# -- what is written for one


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("bundle:base.tar.zst", "base.tar.zst"),
        ("bundle:/srv/any-name", "/srv/any-name"),
        ("bundle:https://h.example/x", "https://h.example/x"),
        ("https://h.example/a/base.tar.zst", "https://h.example/a/base.tar.zst"),
        ("https://h.example/base.tar.zst?token=1", "https://h.example/base.tar.zst?token=1"),
        ("http://127.0.0.1:8000/base.tar.zst", "http://127.0.0.1:8000/base.tar.zst"),
        ("file:///srv/base.tar.zst", "file:///srv/base.tar.zst"),
    ],
)
def test_bundles_are_told_by_what_is_written(text: str, location: str) -> None:
    assert parse_bundle(text) == BundleRef(location)


@pytest.mark.parametrize(
    "text", ["alpine:3.20", "docker.io/x/y.tar.zst", "base.tar.zst", "https://h.example/x", "oci:x"]
)
def test_the_rest_is_for_others(text: str) -> None:
    assert parse_bundle(text) is None


def test_a_url_may_carry_its_pin() -> None:
    pin = "AB" * 32
    found = parse_bundle(f"https://h.example/base.tar.zst#sha256={pin}")
    assert found == BundleRef("https://h.example/base.tar.zst", pin.lower())


@pytest.mark.parametrize(
    "text",
    [
        "bundle:",
        "bundle:ftp://h.example/base.tar.zst",
        "bundle:https:///base.tar.zst",
        "https://h.example/base.tar.zst#md5=1",
        "https://h.example/base.tar.zst#sha256=12",
        "https://h.example:port/base.tar.zst",
        "file://other.example/base.tar.zst",
    ],
)
def test_a_wrong_one_is_one_line(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_bundle(text)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("/srv/My Base.tar.zst", "my-base"),
        ("base.tar.zst", "base"),
        ("https://h.example/a/base-1.2.tar.zst?token=1", "base-1.2"),
        ("https://h.example/", "bundle"),
        ("file:///srv/caf%C3%A9.tar.zst", "caf"),
    ],
)
def test_the_default_name_is_the_files(location: str, name: str) -> None:
    assert BundleRef(location).default_name() == name


def test_origins_keep_secrets_and_paths_to_themselves() -> None:
    secret = BundleRef("https://me:secret@h.example/base.tar.zst?token=secret")
    assert secret.origin == "bundle:https://h.example/base.tar.zst?..."
    assert _public("file:/home/me/work/base.ext4") == "file:base.ext4"
    assert _public("bundle:file:///home/me/base.tar.zst") == "bundle:base.tar.zst"
    assert _public("debian:bookworm") == "debian:bookworm"
    assert _public("docker.io/library/alpine:3.20") == "docker.io/library/alpine:3.20"
