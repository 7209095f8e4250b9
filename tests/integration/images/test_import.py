"""Imports from layouts and archives to an ext4, held against umoci's unpacking."""

from __future__ import annotations

import asyncio
import bz2
import gzip
import json
import lzma
import os
import random
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from banger.errors import BangerError, Conflict, Corrupted, InvalidInput, NotFound, Unavailable
from banger.events import NullSink
from banger.host.commands import HostCommands
from banger.images import importing
from banger.images.artifacts import ImageManifest
from banger.images.importing import ImportRequest, import_image
from banger.images.layers import Limits
from banger.images.reference import parse_source
from tests.support.ext4_listing import debugfs, list_image
from tests.support.layouts import (
    OCI,
    Layout,
    as_tar,
    digest,
    directory,
    hard_link,
    make_layout,
    member,
    symlink,
    tar_of,
)

pytestmark = pytest.mark.integration

COMMANDS = HostCommands()
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000").decode("latin-1")


@pytest.fixture(autouse=True, params=["indexed", "streamed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every case twice: with an index of all layers first, and with the top one written at once."""
    floor = 0 if request.param == "streamed" else 1 << 62
    monkeypatch.setattr(importing, "STREAM_FROM_BYTES", floor)
    return str(request.param)


class Stages(NullSink):
    """Remembers what an import said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def stage(self, stage: str) -> None:
        self.said.append(stage)


def import_(tmp_path: Path, source: str, name: str = "it", **fields: Any) -> ImageManifest:
    limits = fields.pop("limits", Limits())
    sink = fields.pop("sink", NullSink())
    return asyncio.run(
        import_image(
            ImportRequest(parse_source(source), name, **fields),  # type: ignore[arg-type]
            data_dir=tmp_path / "data",
            commands=COMMANDS,
            sink=sink,
            limits=limits,
            open_registry=_no_registry,
        )
    )


def _no_registry(*_: Any) -> Any:
    raise AssertionError("nothing here is in a registry")


def rootfs(tmp_path: Path, name: str = "it") -> Path:
    path = tmp_path / "data" / "images" / name / "rootfs.ext4"
    subprocess.run(["/usr/sbin/e2fsck", "-fn", path], check=True, capture_output=True)
    return path


def nothing_left(tmp_path: Path) -> bool:
    data = tmp_path / "data"
    return not list((data / "staging").iterdir()) and not (data / "images" / "it").exists()


# -- the oracle


def unpack(layout: Path, tag: str, into: Path) -> Path:
    subprocess.run(
        ["umoci", "unpack", "--image", f"{layout}:{tag}", into], check=True, capture_output=True
    )
    return into / "rootfs"


def list_tree(root: Path) -> dict[bytes, dict[str, Any]]:
    """Return what `list_image` would, of a directory."""
    found: dict[bytes, dict[str, Any]] = {}
    names: dict[int, set[bytes]] = {}
    for base, directories, files in os.walk(os.fsencode(root)):
        for name in (*directories, *files):
            full = os.path.join(base, name)
            status = os.lstat(full)
            path = full[len(os.fsencode(root)) :]
            facts: dict[str, Any] = {
                "mode": status.st_mode,
                "uid": status.st_uid,
                "gid": status.st_gid,
                "mtime": f"{int(status.st_mtime):x}",
            }
            if not stat.S_ISDIR(status.st_mode):
                facts["names"] = names.setdefault(status.st_ino, set())
                names[status.st_ino].add(path)
            if stat.S_ISREG(status.st_mode):
                facts["data"] = Path(os.fsdecode(full)).read_bytes()
            if stat.S_ISLNK(status.st_mode):
                facts["target"] = os.readlink(full)
            if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
                facts["device"] = (os.major(status.st_rdev), os.minor(status.st_rdev))
            found[path] = facts
    return found


def same_facts(image: dict[bytes, dict[str, Any]]) -> dict[bytes, dict[str, Any]]:
    """Return `list_image`'s answer in the words of `list_tree`."""
    found = {}
    for path, facts in image.items():
        one = {key: facts[key] for key in ("mode", "uid", "gid")}
        one["mtime"] = str(facts["mtime"]).lstrip("0") or "0"
        if not stat.S_ISDIR(facts["mode"]):
            one["names"] = facts["names"]
        if "data" in facts:
            one["data"] = facts["data"]
        if "target" in facts:
            target = facts["target"]
            one["target"] = target.encode("latin-1") if isinstance(target, str) else target
        if "device" in facts:
            major, minor = str(facts["device"]).split(":")
            one["device"] = (int(major), int(minor))
        found[path] = one
    return found


def compare(image: Path, tree: Path) -> None:
    ours, theirs = same_facts(list_image(image)), list_tree(tree)
    assert ours.keys() == theirs.keys()
    assert ours == theirs


needs_root = pytest.mark.skipif(
    os.getuid() != 0, reason="umoci keeps owners and device nodes as root only"
)


@needs_root
def test_one_of_everything_is_what_umoci_unpacks(tmp_path: Path) -> None:
    lower = [
        directory("usr", uid=1, mtime=1234567),
        directory("usr/bin"),
        directory("usr/lib"),
        symlink("bin", "usr/bin"),
        symlink("lib", "/usr/lib"),
        member("usr/bin/su", data=b"s" * 5000, mode=0o4755, uid=3, gid=70000),
        hard_link("usr/bin/su2", "usr/bin/su"),
        member("usr/bin/big", data=b"x", uid=4_000_000_000, gid=3_000_000_000),
        directory("tmp", mode=0o1777),
        member("tmp/fifo", tarfile.FIFOTYPE, mode=0o600),
        directory("dev"),
        member("dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
        member("dev/disk", tarfile.BLKTYPE, devmajor=259, devminor=70000, mode=0o660, gid=6),
        member("latin-\udce9", data=b"caf\xe9"),
        member('new\nline "q" <12> ; rm', data=b"hostile"),
        member("n" * 255, data=b"long"),
        directory("gone"),
        member("gone/x", data=b"1"),
        directory("opaque"),
        member("opaque/old", data=b"1"),
        directory("becomes-file"),
        member("becomes-file/x", data=b"1"),
        member("becomes-dir", data=b"1"),
        symlink("long-link", "n/" * 100),
    ]
    upper = [
        member("lib/through-link", data=b"via"),
        member("bin/also", data=b"via"),
        hard_link("su3", "bin/su"),
        member(".wh.gone"),
        member("opaque/.wh..wh..opq"),
        member("opaque/new", data=b"2"),
        member("becomes-file", data=b"now a file"),
        directory("becomes-dir", mode=0o700),
        member("becomes-dir/x", data=b"3"),
        member("usr/bin/.wh.su2"),
        member("twice", data=b"first"),
        member("twice", data=b"second", mode=0o600),
    ]
    make_layout(tmp_path / "lay", [lower, upper])
    import_(tmp_path, f"oci:{tmp_path}/lay:t")
    compare(rootfs(tmp_path), unpack(tmp_path / "lay", "t", tmp_path / "u"))


@needs_root
@pytest.mark.parametrize("seed", range(8))
def test_random_stacks_are_what_umoci_unpacks(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    layers = [_random_layer(dice) for _ in range(4)]
    make_layout(tmp_path / "lay", layers)
    import_(tmp_path, f"oci:{tmp_path}/lay:t")
    compare(rootfs(tmp_path), unpack(tmp_path / "lay", "t", tmp_path / "u"))


def _random_layer(dice: random.Random) -> list[Any]:
    members: list[Any] = []
    seen: set[str] = set()
    directories: set[str] = set()
    for _ in range(12):
        parts = [dice.choice("abcd") for _ in range(dice.randint(1, 3))]
        for depth in range(1, len(parts)):
            parent = "/".join(parts[:depth])
            if parent not in seen:
                members.append(directory(parent, mode=dice.choice([0o755, 0o700])))
                seen.add(parent)
                directories.add(parent)
            if parent not in directories:
                break
        name = "/".join(parts)
        if any("/".join(parts[:depth]) not in directories for depth in range(1, len(parts))):
            continue
        # A name once: what several members of one name make of each other's children differs
        # between unpackers, and no builder writes it.
        if name in seen or any(one.startswith(f"{name}/") for one in seen):
            continue
        seen.add(name)
        kind = dice.random()
        if kind < 0.5:
            members.append(
                member(name, data=os.urandom(dice.randint(0, 20)), uid=dice.randint(0, 9))
            )
        elif kind < 0.6:
            members.append(symlink(name, dice.choice(["/nowhere", "x", "../y"])))
        elif kind < 0.75:
            members.append(directory(name, mode=0o711))
            directories.add(name)
        elif kind < 0.9:
            members.append(member("/".join((*parts[:-1], f".wh.{parts[-1]}"))))
        elif len(parts) > 1:
            members.append(member("/".join((*parts[:-1], ".wh..wh..opq"))))
    return members


@pytest.mark.parametrize("seed", range(6))
def test_both_ways_make_the_same_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Names that come twice in a layer, and links: what umoci is no judge of."""
    dice = random.Random(seed)
    layers: list[list[Any]] = []
    for _ in range(2):
        members = _random_layer(dice) + _random_layer(dice)
        files = [info.name for info, _ in members if info.isreg() and ".wh." not in info.name]
        members += [hard_link(f"h{n}", dice.choice(files)) for n in range(3) if files]
        members += [member(f"h{n}", data=b"taken over") for n in range(2) if dice.random() < 0.5]
        layers.append(members)
    made = {}
    for floor in (0, 1 << 62):
        monkeypatch.setattr(importing, "STREAM_FROM_BYTES", floor)
        case = tmp_path / str(floor)
        try:
            make_layout(case / "lay", layers)
            import_(case, f"oci:{case}/lay")
            made[floor] = list_image(rootfs(case))
        except InvalidInput as error:
            made[floor] = error.message
    assert made[0] == made[1 << 62]


@pytest.mark.parametrize(
    ("members", "again"),
    [
        ([directory("d"), member("d/x", data=b"1"), member("x"), symlink("l", "x")], False),
        ([member("x", data=b"1"), member("x", data=b"2"), symlink("x", "y")], False),
        ([directory("d"), directory("d", mode=0o700), member("e/f/g")], False),
        ([directory("d"), member("d/x"), member("d", data=b"a file")], True),
        ([member("a"), hard_link("b", "a"), member("a", data=b"other")], True),
        ([member("a", pax_headers={"SCHILY.xattr.user.k": "v"})], True),
        ([member("a", mtime=2_000_000_001)], False),  # `created`, as Go rounds a time
        ([member("a", mtime=2_100_000_000)], True),
    ],
)
def test_what_is_streamed_and_what_wants_an_index(
    tmp_path: Path, way: str, members: list[Any], again: bool
) -> None:
    make_layout(tmp_path / "lay", [members])
    sink = Stages()
    import_(tmp_path, f"oci:{tmp_path}/lay", sink=sink)
    assert ("reading layers once more" in sink.said) == (again and way == "streamed")
    rootfs(tmp_path)


def test_a_layer_that_belies_its_size_is_indexed(tmp_path: Path, way: str) -> None:
    """gzip says the size of its last member alone."""
    tar = tar_of([member(f"f{n}", data=os.urandom(2 << 20)) for n in range(20)])
    layout = Layout(tmp_path / "lay")
    cut = len(tar) - 1024
    layout.add(layout.image([tar], packed=[gzip.compress(tar[:cut], 1) + gzip.compress(tar[cut:])]))
    import_(tmp_path, f"oci:{tmp_path}/lay")
    assert len(list_image(rootfs(tmp_path))) == 20
    # so small a last member that what mke2fs is promised does not hold the rest
    text = b"".join(b"%d\n" % n for n in range(1 << 20))
    tar = tar_of([member(f"t{n}", data=text) for n in range(6)])
    cut = len(tar) - (1 << 21)
    packed = gzip.compress(tar[:cut], 9) + gzip.compress(tar[cut:], 9)
    one = Layout(tmp_path / "one")
    one.add(one.image([tar], packed=[packed]))
    sink = Stages()
    import_(tmp_path, f"oci:{tmp_path}/one", "one", sink=sink)
    assert debugfs(rootfs(tmp_path, "one"), "cat /t5") == text
    assert ("reading layers once more" in sink.said) == (way == "streamed")


# -- content that is not plain


def test_extended_attributes_and_capabilities(tmp_path: Path) -> None:
    pax = {
        "SCHILY.xattr.security.capability": CAPABILITY.encode("latin-1").decode(
            "utf-8", "surrogateescape"
        ),
        "SCHILY.xattr.user.note": "a value\udcff",
        "SCHILY.xattr.trusted.overlay.opaque": "y",
    }
    layer = [
        directory("d", pax_headers={"SCHILY.xattr.user.dir": "1"}),
        member("d/capable", data=b"binary", mode=0o755, pax_headers=pax, mtime=1_600_000_001),
        hard_link("d/other", "d/capable"),
        member("plain", data=b"p", mtime=1_600_000_000),
    ]
    make_layout(tmp_path / "lay", [layer])
    import_(tmp_path, f"oci:{tmp_path}/lay")
    image = rootfs(tmp_path)
    text = debugfs(image, "stat /d/capable").decode("latin-1")
    assert "security.capability (20)" in text
    assert "user.note (8)" in text
    assert "overlay" not in text
    assert debugfs(image, "ea_get -V /d/other user.note").startswith(b"a value\xff")
    assert b"user.dir" in debugfs(image, "ea_list /d")
    facts = list_image(image)
    assert facts[b"/d/capable"]["mtime"] == f"{1_600_000_001:x}"
    assert facts[b"/d/capable"]["names"] == {b"/d/capable", b"/d/other"}


def test_times_later_than_ours_are_kept(tmp_path: Path) -> None:
    layer = [
        directory("d", mtime=2_000_000_000),
        member("f", mtime=1_999_999_999),
        member("old", mtime=5),
    ]
    make_layout(tmp_path / "lay", [layer])
    import_(tmp_path, f"oci:{tmp_path}/lay")
    found = {
        path: int(str(facts["mtime"]), 16) for path, facts in list_image(rootfs(tmp_path)).items()
    }
    assert found == {b"/d": 2_000_000_000, b"/f": 1_999_999_999, b"/old": 5}


def test_sparse_files(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    with open(source / "sparse", "wb") as file:
        file.truncate(3_000_000)
        file.seek(1_000_000)
        file.write(b"middle")
        file.seek(2_999_997)
        file.write(b"end")
    for number, form in enumerate(["posix", "gnu"]):
        tar = tmp_path / f"{form}.tar"
        subprocess.run(
            ["tar", "-C", source, "-S", f"--format={form}", "-cf", tar, "sparse"], check=True
        )
        import_(tmp_path, f"rootfs:{tar}", f"it{number}")
        data = debugfs(rootfs(tmp_path, f"it{number}"), "cat /sparse")
        assert data == (source / "sparse").read_bytes()


def _pack(how: str, tar: bytes) -> bytes:
    half = len(tar) // 1024 * 512
    if how == "gzip members":
        return gzip.compress(tar[:half]) + gzip.compress(tar[half:])
    if how == "zstd frames":
        from backports import zstd

        skippable = b"\x53\x2a\x4d\x18\x03\x00\x00\x00abc"
        return zstd.compress(tar[:half]) + skippable + zstd.compress(tar[half:])
    return {"plain": tar, "gzip": gzip.compress(tar), "xz": lzma.compress(tar),
            "bzip2": bz2.compress(tar)}[how]  # fmt: skip


@pytest.mark.parametrize("how", ["plain", "gzip", "gzip members", "zstd frames", "xz", "bzip2"])
def test_compression_is_told_by_content(tmp_path: Path, how: str) -> None:
    tar = tar_of([member("f", data=os.urandom(100_000)), directory("d"), member("d/g", data=b"g")])
    layout = Layout(tmp_path / "lay")
    # The type says gzip whatever it is, as registries have seen it.
    layout.add(layout.image([tar], packed=[_pack(how, tar)]))
    import_(tmp_path, f"oci:{tmp_path}/lay")
    assert list_image(rootfs(tmp_path)).keys() == {b"/f", b"/d", b"/d/g"}


def test_an_empty_layer_and_an_empty_image(tmp_path: Path) -> None:
    make_layout(tmp_path / "lay", [[], [member("x")], []])
    import_(tmp_path, f"oci:{tmp_path}/lay")
    assert list_image(rootfs(tmp_path)).keys() == {b"/x"}
    (tmp_path / "empty.tar").write_bytes(b"")
    import_(tmp_path, f"rootfs:{tmp_path}/empty.tar", "none")
    assert list_image(rootfs(tmp_path, "none")) == {}


@pytest.mark.parametrize("kept", ["end of the last file", "its padding", "one end block"])
def test_tars_without_their_end(tmp_path: Path, kept: str) -> None:
    """umoci writes the first of them."""
    tar = tar_of([member("x", data=b"abc")])
    cut = {"end of the last file": 515, "its padding": 1024, "one end block": 1536}[kept]
    layout = Layout(tmp_path / "lay")
    layout.add(layout.image([tar[:cut]]))
    import_(tmp_path, f"oci:{tmp_path}/lay")
    assert debugfs(rootfs(tmp_path), "cat /x") == b"abc"


def test_the_same_layers_give_the_same_bytes(tmp_path: Path) -> None:
    make_layout(
        tmp_path / "lay", [[directory("d"), member("d/x", data=b"1")], [member("y", data=b"2")]]
    )
    first = import_(tmp_path, f"oci:{tmp_path}/lay")
    again = import_(tmp_path, f"oci:{tmp_path}/lay", force=True)
    assert first.digest == again.digest


# -- which image


def test_index_nested_index_and_attestations(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "lay")
    amd = layout.image([tar_of([member("amd")])])
    arm = layout.image([tar_of([member("arm")])], architecture="arm64")
    proof = layout.image([tar_of([member("proof")])])
    inner = {
        "schemaVersion": 2,
        "manifests": [
            {**proof, "platform": {"os": "unknown", "architecture": "unknown"},
             "annotations": {"vnd.docker.reference.type": "attestation-manifest"}},
            {**arm, "platform": {"os": "linux", "architecture": "arm64", "variant": "v8"}},
            {**amd, "platform": {"os": "linux", "architecture": "amd64"}},
        ],
    }  # fmt: skip
    layout.add(layout.put_json(inner, f"{OCI}.index.v1+json"), "multi")
    manifest = import_(tmp_path, f"oci:{tmp_path}/lay:multi")
    assert list_image(rootfs(tmp_path)).keys() == {b"/amd"}
    assert manifest.platform == "linux/amd64"
    import_(tmp_path, f"oci:{tmp_path}/lay:multi", "arm", platform="linux/arm64")
    assert list_image(rootfs(tmp_path, "arm")).keys() == {b"/arm"}
    with pytest.raises(NotFound, match="s390x: there are linux/amd64, linux/arm64/v8"):
        import_(tmp_path, f"oci:{tmp_path}/lay:multi", "none", platform="linux/s390x")


def test_docker_schema_2(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "lay")
    docker = "application/vnd.docker.distribution.manifest.v2+json"
    layout.add(layout.image(
        [tar_of([member("x")])], media_type=docker,
        layer_type="application/vnd.docker.image.rootfs.diff.tar.gzip",
    ))  # fmt: skip
    import_(tmp_path, f"oci:{tmp_path}/lay")


def test_what_is_no_image(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "lay")
    schema1 = {"schemaVersion": 1, "fsLayers": [], "signatures": []}
    both = {"schemaVersion": 2, "manifests": [], "layers": []}
    helm = {"schemaVersion": 2, "config": layout.put_json({}, "application/vnd.cncf.helm.config.v1+json"),
            "layers": [{"mediaType": "application/vnd.cncf.helm.chart.content.v1.tar+gzip",
                        **layout.put(b"x")}]}  # fmt: skip
    empty = {"schemaVersion": 2, "manifests": []}
    media = f"{OCI}.manifest.v1+json"
    for tag, document in {
        "s1": schema1,
        "both": both,
        "helm": helm,
        "list": [1],
        "empty": empty,
    }.items():
        layout.add(layout.put_json(document, media), tag)
    cases: dict[str, tuple[type[BangerError], str]] = {
        "s1": (Unavailable, "schema 1"),
        "both": (InvalidInput, "neither"),
        "helm": (InvalidInput, "no image of a root file system"),
        "list": (InvalidInput, "does not read"),
        "empty": (InvalidInput, "is none|empty"),
        "nosuch": (NotFound, "nothing is tagged"),
    }
    for tag, (kind, text) in cases.items():
        with pytest.raises(kind, match=text) as caught:
            import_(tmp_path, f"oci:{tmp_path}/lay:{tag}")
        assert "\n" not in caught.value.message
    with pytest.raises(InvalidInput, match="holds the images"):
        import_(tmp_path, f"oci:{tmp_path}/lay")
    assert nothing_left(tmp_path)


def test_what_an_image_says_of_itself(tmp_path: Path) -> None:
    config = {
        "User": "1000:100", "Env": ["PATH=/opt/bin", "EMPTY=", "EQ=a=b"], "Cmd": ["-c", "x y"],
        "Entrypoint": ["/bin/run"], "WorkingDir": "/srv",
    }  # fmt: skip
    make_layout(tmp_path / "lay", [[member("x")]], config=config)
    found = import_(tmp_path, f"oci:{tmp_path}/lay", kernel="generic-6.1")
    assert found.default_user == "1000:100"
    assert found.default_env == {"PATH": "/opt/bin", "EMPTY": "", "EQ": "a=b"}
    assert (found.entrypoint, found.command) == (("/bin/run",), ("-c", "x y"))
    assert (found.working_dir, found.kernel) == ("/srv", "generic-6.1")
    assert found.source_digest.startswith("sha256:")


# -- archives and root file systems


def test_archive_of_a_layout(tmp_path: Path) -> None:
    make_layout(tmp_path / "lay", [[member("x", data=b"content")]])
    archive = as_tar(tmp_path / "lay", tmp_path / "a.tar")
    import_(tmp_path, f"oci-archive:{archive}:t")
    assert debugfs(rootfs(tmp_path), "cat /x") == b"content"


def test_what_skopeo_saves_for_docker(tmp_path: Path) -> None:
    make_layout(
        tmp_path / "lay",
        [[directory("d"), member("d/x", data=b"1")], [member("d/.wh.x"), member("y")]],
    )
    archive = tmp_path / "docker.tar"
    subprocess.run(
        ["skopeo", "copy", "-q", f"oci:{tmp_path}/lay:t", f"docker-archive:{archive}:app:v1"],
        check=True,
    )
    import_(tmp_path, f"docker-archive:{archive}")
    assert list_image(rootfs(tmp_path)).keys() == {b"/d", b"/y"}
    import_(tmp_path, f"docker-archive:{archive}:app:v1", "named")
    with pytest.raises(NotFound, match="no image is named"):
        import_(tmp_path, f"docker-archive:{archive}:app:v2", "other")


def test_old_docker_archives_link_equal_layers(tmp_path: Path) -> None:
    layer = tar_of([member("x", data=b"1")])
    config = json.dumps({
        "architecture": "amd64", "os": "linux", "config": {"Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": [digest(layer)] * 2},
    }).encode()  # fmt: skip
    name = digest(config).partition(":")[2]
    saved = [
        {"Config": f"{name}.json", "RepoTags": ["app:v1"], "Layers": ["a/layer.tar", "b/layer.tar"]}
    ]
    (tmp_path / "d.tar").write_bytes(tar_of([
        member("manifest.json", data=json.dumps(saved).encode()),
        member(f"{name}.json", data=config),
        directory("a"), member("a/layer.tar", data=layer),
        directory("b"), symlink("b/layer.tar", "../a/layer.tar"),
    ]))  # fmt: skip
    assert import_(tmp_path, f"docker-archive:{tmp_path}/d.tar").command == ("sh",)
    other = config.replace(digest(layer).encode(), digest(b"other").encode())
    (tmp_path / "e.tar").write_bytes(tar_of([
        member("manifest.json", data=json.dumps(saved).replace(f"{name}.json", "c.json").encode()),
        member("c.json", data=other),
        directory("a"), member("a/layer.tar", data=layer),
        directory("b"), symlink("b/layer.tar", "../a/layer.tar"),
    ]))  # fmt: skip
    with pytest.raises(Corrupted, match="the image says"):
        import_(tmp_path, f"docker-archive:{tmp_path}/e.tar", "e")
    (tmp_path / "f.tar").write_bytes(tar_of([
        member("manifest.json", data=json.dumps(saved).encode()), member(f"{name}.json", data=other),
    ]))  # fmt: skip
    with pytest.raises(Corrupted, match="named after"):
        import_(tmp_path, f"docker-archive:{tmp_path}/f.tar", "f")


def test_root_file_systems(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "usr" / "bin").mkdir(parents=True)
    (tree / "bin").symlink_to("usr/bin")
    (tree / "usr" / "bin" / "x").write_text("hi")
    (tree / "usr" / "bin" / "x").chmod(0o4755)
    (tree / "outside").symlink_to("/etc/shadow")
    import_(tmp_path, f"rootfs:{tree}")
    facts = list_image(rootfs(tmp_path))
    assert facts[b"/usr/bin/x"]["mode"] == 0o104755
    assert facts[b"/outside"]["target"] == "/etc/shadow"
    subprocess.run(["tar", "-C", tree, "-cJf", tmp_path / "t.tar.xz", "."], check=True)
    import_(tmp_path, f"rootfs:{tmp_path}/t.tar.xz", "xz")
    assert list_image(rootfs(tmp_path, "xz")).keys() == facts.keys()
    with pytest.raises(InvalidInput, match="neither a tar nor a directory"):
        import_(tmp_path, f"rootfs:{tmp_path}/none", "none")


# -- damage and hostility: one line, nothing installed


def _blob(layout: Layout, index: int) -> Path:
    manifest = json.loads(
        (layout.path / "blobs/sha256" / layout.manifests[0]["digest"].partition(":")[2]).read_text()
    )
    return layout.path / "blobs/sha256" / manifest["layers"][index]["digest"].partition(":")[2]


def test_damaged_blobs(tmp_path: Path) -> None:
    layout = make_layout(tmp_path / "lay", [[member("x", data=os.urandom(50_000))]])
    blob = _blob(layout, 0)
    whole = blob.read_bytes()
    for damage, text in (
        (whole[:-1], "bytes"),
        (whole[:-1] + b"!", "digest differs"),
        (None, "lacks the blob"),
    ):
        if damage is None:
            blob.unlink()
        else:
            blob.write_bytes(damage)
        with pytest.raises(Corrupted, match=text):
            import_(tmp_path, f"oci:{tmp_path}/lay")
        assert nothing_left(tmp_path)


def test_a_blob_that_is_a_link_out_of_the_layout_is_not_read(tmp_path: Path) -> None:
    layout = make_layout(tmp_path / "lay", [[member("x")]])
    blob = _blob(layout, 0)
    (tmp_path / "elsewhere").write_bytes(blob.read_bytes())
    blob.unlink()
    blob.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Corrupted, match="lacks the blob"):
        import_(tmp_path, f"oci:{tmp_path}/lay")


def _hostile(tmp_path: Path, packed: bytes, limits: Limits | None = None) -> BangerError:
    layout = Layout(tmp_path / "lay")
    layout.add(layout.image([], packed=[packed], diff_ids=[]))
    with pytest.raises(BangerError) as caught:
        import_(tmp_path, f"oci:{tmp_path}/lay", limits=limits or Limits())
    assert "\n" not in caught.value.message
    assert nothing_left(tmp_path)
    return caught.value


def test_layers_cut_off_anywhere(tmp_path: Path) -> None:
    tar = tar_of(
        [member("x", data=os.urandom(3000)), directory("d"), member("d/y", data=b"y" * 2000)]
    )
    for cut in (100, 511, 600, 3000, 4500, 6000):
        case = tmp_path / str(cut)
        case.mkdir()
        assert isinstance(_hostile(case, gzip.compress(tar)[:-9]), Corrupted)
        case = tmp_path / f"plain{cut}"
        case.mkdir()
        assert isinstance(_hostile(case, tar[:cut]), Corrupted), cut


def test_a_header_damaged_in_the_middle_is_no_end(tmp_path: Path) -> None:
    tar = bytearray(tar_of([member("x"), member("y"), member("z")]))
    tar[512 + 150] ^= 0xFF  # the checksum of the second header
    assert "damaged" in _hostile(tmp_path, bytes(tar)).message


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("zeros")
    info.size = 3 << 30
    head = gzip.compress(info.tobuf(tarfile.GNU_FORMAT))
    piece = gzip.compress(bytes(64 << 20))
    error = _hostile(tmp_path, head + piece * 48, Limits(max_expansion=5))
    assert "bomb" in error.message
    assert "max_expansion" in error.hint


def test_a_header_that_asks_for_memory_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 8 << 30
    assert (
        "header above 1 MiB"
        in _hostile(tmp_path, info.tobuf(tarfile.GNU_FORMAT) + bytes(10240)).message
    )


def test_headers_nested_without_end(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2
    one = info.tobuf(tarfile.GNU_FORMAT) + b"a\0" + bytes(510)
    assert _hostile(tmp_path, one * 3000).code in ("invalid_input", "corrupted")


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ([hard_link("x", "../../etc/passwd")], "not there"),
        ([symlink("a", "a"), member("a/x")], "circles"),
        ([member("x", uid=-1)], "unusable owner"),
        ([member("x"), member("x/y")], "no directory"),
        ([member(".wh.")], "whiteout of nothing"),
        ([member("x", b"Z")], "unknown kind"),
        ([member("x" * 256)], "longer than 255"),
        ([member("d/" * 300 + "x")], "deep"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_members_no_image_may_hold(tmp_path: Path, members: list[Any], text: str) -> None:
    form = tarfile.PAX_FORMAT
    assert text in _hostile(tmp_path, tar_of(members, form)).message


def test_limits_of_the_configuration(tmp_path: Path) -> None:
    error = _hostile(tmp_path, tar_of([member(str(n)) for n in range(5)]), Limits(max_entries=4))
    assert "max_entries" in error.hint


def test_nothing_of_a_layer_ever_touches_the_host(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    make_layout(tmp_path / "lay", [[
        symlink("out", str(tmp_path)), member("out/canary", data=b"!"),
        member(f"../../../../..{tmp_path}/canary", data=b"!"), member(str(canary), data=b"!"),
    ]])  # fmt: skip
    import_(tmp_path, f"oci:{tmp_path}/lay")
    assert not canary.exists()


# -- the store


def test_a_taken_name_is_said_and_force_replaces(tmp_path: Path) -> None:
    make_layout(tmp_path / "lay", [[member("x")]])
    import_(tmp_path, f"oci:{tmp_path}/lay")
    with pytest.raises(Conflict, match="installed already"):
        import_(tmp_path, f"oci:{tmp_path}/lay")
    make_layout(tmp_path / "two", [[member("y")]])
    import_(tmp_path, f"oci:{tmp_path}/two", force=True)
    assert list_image(rootfs(tmp_path)).keys() == {b"/y"}


def test_too_small_a_size_is_said(tmp_path: Path) -> None:
    make_layout(tmp_path / "lay", [[member("x", data=os.urandom(9 << 20))]])
    with pytest.raises(BangerError, match="does not fit") as caught:
        import_(tmp_path, f"oci:{tmp_path}/lay", size_bytes=6 << 20)
    assert "--size" in caught.value.hint
    assert nothing_left(tmp_path)


def test_cancelled_in_the_middle_nothing_is_left(tmp_path: Path) -> None:
    make_layout(tmp_path / "lay", [[member(f"f{n}", data=os.urandom(1 << 20)) for n in range(40)]])

    async def cut(stage: str) -> None:
        reached = asyncio.Event()

        class Sink(NullSink):
            def stage(self, name: str) -> None:
                if name == stage:
                    reached.set()

        task = asyncio.create_task(
            import_image(
                ImportRequest(parse_source(f"oci:{tmp_path}/lay"), "it"),  # type: ignore[arg-type]
                data_dir=tmp_path / "data", commands=COMMANDS, sink=Sink(), limits=Limits(),
                open_registry=_no_registry,
            )
        )  # fmt: skip
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for stage in ("fetching layers", "writing the file system", "checking the file system"):
        asyncio.run(cut(stage))
        assert nothing_left(tmp_path), stage


def test_a_reader_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that reads layers may be killed (or crash in a decoder)."""
    make_layout(tmp_path / "lay", [[member("x")]])
    monkeypatch.setattr(importing.sys, "executable", "/bin/false")  # type: ignore[attr-defined]
    with pytest.raises(BangerError, match="could not be read"):
        import_(tmp_path, f"oci:{tmp_path}/lay")
    assert nothing_left(tmp_path)


def test_both_ways_of_making_an_ext4_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_layout(tmp_path / "lay", [[
        directory("d", uid=5), member("d/x", data=b"1", mode=0o4711), hard_link("y", "d/x"),
        member("null", tarfile.CHRTYPE, devmajor=1, devminor=3),
        member("a", data=b"a", pax_headers={"SCHILY.xattr.user.k": "v"}),
    ]])  # fmt: skip
    import_(tmp_path, f"oci:{tmp_path}/lay")
    build = importing.build_ext4

    async def staged(*args: Any, **named: Any) -> None:
        await build(*args, **named, strategy="stage")

    monkeypatch.setattr(importing, "build_ext4", staged)
    import_(tmp_path, f"oci:{tmp_path}/lay", "staged")
    assert list_image(rootfs(tmp_path)) == list_image(rootfs(tmp_path, "staged"))
    assert b"user.k" in debugfs(rootfs(tmp_path, "staged"), "ea_list /a")
