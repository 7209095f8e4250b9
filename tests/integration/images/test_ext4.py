"""Both ways of turning a tar into an ext4, against one oracle: what debugfs says is inside."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

from banger.errors import BangerError, Corrupted, InvalidInput, NoSpace
from banger.host.commands import HostCommands
from banger.host.files import allocated_bytes, remove_tree
from banger.images import ext4, staged
from tests.support.ext4_listing import debugfs, list_image

pytestmark = pytest.mark.integration

COMMANDS = HostCommands()
# A file capability: cap_net_raw+ep, VFS_CAP_REVISION_2.
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")


def add(
    archive: tarfile.TarFile, name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields
) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.mode = kind, len(data), 0o644
    for key, value in fields.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(data))


def make_tar(path: Path) -> Path:
    """Write a tar with one of everything a root file system may hold."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as archive:
        add(archive, ".", tarfile.DIRTYPE, mode=0o755, mtime=1000000)
        add(archive, "./dir", tarfile.DIRTYPE, mode=0o1777, uid=7, gid=70000, mtime=1234567)
        add(archive, "./dir/setuid", data=b"s" * 5000, mode=0o4755, uid=65534, gid=0, mtime=99999)
        add(
            archive, "./dir/hard", tarfile.LNKTYPE, linkname="./dir/setuid",
            mode=0o4755, uid=65534, mtime=99999,
        )  # fmt: skip
        add(archive, "./dir/big-uid", data=b"x", mode=0o2640, uid=4000000, gid=3000000)
        add(archive, "./link", tarfile.SYMTYPE, linkname="dir/setuid", mode=0o777, mtime=77777)
        add(archive, "./long-link", tarfile.SYMTYPE, linkname="n/" * 100, mode=0o777)
        add(archive, "./fifo", tarfile.FIFOTYPE, mode=0o600, uid=3)
        add(archive, "./null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
        add(archive, "./disk", tarfile.BLKTYPE, devmajor=259, devminor=70000, mode=0o660, gid=6)
        add(archive, "./latin-\udce9", data=b"caf\xe9")
        add(archive, "./new\nline \"quoted\" 'so' <12> ; rm", data=b"hostile")
        add(archive, "./empty", mtime=42)
        add(archive, "./zeros", data=bytes(3_000_000) + b"end")
        add(
            archive,
            "./capable",
            data=b"binary",
            mode=0o755,
            pax_headers={
                "SCHILY.xattr.security.capability": CAPABILITY.decode("utf-8", "surrogateescape"),
                "SCHILY.xattr.user.note": "a value",
            },
        )
        add(archive, "./many", tarfile.DIRTYPE, mode=0o750)
        for number in range(400):
            add(archive, f"./many/{'n' * 40}{number}", data=b"%d" % number, uid=number)
    return path


def build(source: Path, output: Path, strategy: ext4.Strategy, **options) -> Path:
    asyncio.run(
        ext4.build_ext4(
            source, output, label="oracle", commands=COMMANDS, strategy=strategy, **options
        )
    )
    return output


needs_tar_input = pytest.mark.skipif(
    asyncio.run(ext4.probe_strategy(COMMANDS)) != "tar",
    reason="this mke2fs takes no tar: the other strategy is the one in use here",
)


def test_staged_strategy_keeps_all_that_the_tar_says(tmp_path: Path) -> None:
    image = build(make_tar(tmp_path / "t.tar"), tmp_path / "s.ext4", "stage")
    found = list_image(image)
    assert found[b"/dir/setuid"]["mode"] == 0o104755
    assert found[b"/dir/setuid"]["uid"] == 65534
    assert found[b"/dir/hard"]["names"] == {b"/dir/setuid", b"/dir/hard"}
    assert found[b"/dir"]["gid"] == 70000
    assert found[b"/null"]["mode"] == 0o020666
    assert "01:03" in str(found[b"/null"]["device"])
    assert "259:70000" in str(found[b"/disk"]["device"])
    assert found[b"/latin-\xe9"]["data"] == b"caf\xe9"
    assert found[b"/new\nline \"quoted\" 'so' <12> ; rm"]["data"] == b"hostile"
    assert found[b"/capable"]["capability"]
    assert b"a value" in debugfs(image, "ea_get /capable user.note")
    assert found[b"/empty"]["mtime"] == f"{42:08x}"


@needs_tar_input
def test_both_strategies_make_the_same_file_system(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "t.tar")
    by_tar = list_image(build(tar, tmp_path / "a.ext4", "tar"))
    by_stage = list_image(build(tar, tmp_path / "b.ext4", "stage"))
    assert by_tar.keys() == by_stage.keys()
    for path, facts in by_tar.items():
        assert facts == by_stage[path], path


@pytest.mark.parametrize("strategy", ["tar", "stage"])
def test_the_same_tar_gives_the_same_content(tmp_path: Path, strategy: ext4.Strategy) -> None:
    if strategy == "tar" and asyncio.run(ext4.probe_strategy(COMMANDS)) != "tar":
        pytest.skip("this mke2fs takes no tar")
    tar = make_tar(tmp_path / "t.tar")
    one, two = (build(tar, tmp_path / name, strategy) for name in ("1.ext4", "2.ext4"))
    if strategy == "tar":
        assert one.read_bytes() == two.read_bytes()
    else:
        assert list_image(one) == list_image(two)


@needs_tar_input
def test_a_pipe_is_as_good_as_a_file(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "t.tar")

    async def through_a_pipe() -> None:
        read_fd, write_fd = os.pipe()
        feeder = asyncio.create_task(COMMANDS.run(["cat", str(tar)], stdout=write_fd))
        feeder.add_done_callback(lambda _: os.close(write_fd))
        await ext4.build_ext4(
            read_fd, tmp_path / "p.ext4", size_bytes=64 << 20, label="p", commands=COMMANDS
        )
        await feeder
        os.close(read_fd)

    asyncio.run(through_a_pipe())
    assert b"/capable" in list_image(tmp_path / "p.ext4")


@pytest.mark.parametrize("strategy", ["tar", "stage"])
def test_content_that_does_not_fit_is_no_space_and_leaves_no_file(
    tmp_path: Path, strategy: ext4.Strategy
) -> None:
    if strategy == "tar" and asyncio.run(ext4.probe_strategy(COMMANDS)) != "tar":
        pytest.skip("this mke2fs takes no tar")
    tar = tmp_path / "t.tar"
    with tarfile.open(tar, "w") as archive:
        add(archive, "big", data=os.urandom(12 << 20))
    with pytest.raises(NoSpace):
        build(tar, tmp_path / "o.ext4", strategy, size_bytes=4 << 20)
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.tar"]


@pytest.mark.parametrize("strategy", ["tar", "stage"])
def test_a_tar_cut_off_is_refused(tmp_path: Path, strategy: ext4.Strategy) -> None:
    if strategy == "tar" and asyncio.run(ext4.probe_strategy(COMMANDS)) != "tar":
        pytest.skip("this mke2fs takes no tar")
    tar = make_tar(tmp_path / "t.tar")
    tar.write_bytes(tar.read_bytes()[:4_000])
    with pytest.raises(BangerError):
        build(tar, tmp_path / "o.ext4", strategy, size_bytes=16 << 20)
    assert not (tmp_path / "o.ext4").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("strategy", ["tar", "stage"])
def test_a_user_without_root_makes_root_owned_files(
    tmp_path: Path, strategy: ext4.Strategy, request: pytest.FixtureRequest
) -> None:
    tar = make_tar(tmp_path / "t.tar")
    # Not below tmp_path, which only root may enter.
    work = Path(tempfile.mkdtemp(prefix="banger-test-"))
    request.addfinalizer(lambda: remove_tree(work))
    os.chown(work, 65534, 65534)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # everything is imported: no path is looked up as the other user
        status = 1
        try:
            os.close(reader)
            source = os.open(tar, os.O_RDONLY)
            os.chdir(work)
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            os.environ["TMPDIR"] = "."
            asyncio.run(
                ext4.build_ext4(
                    source, Path("o.ext4"), size_bytes=64 << 20, label="u",
                    commands=HostCommands(), strategy=strategy,
                )
            )  # fmt: skip
            status = 0
        except BaseException as error:  # noqa: BLE001 - the parent shows it
            os.write(writer, repr(error).encode())
        finally:
            os._exit(status)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    assert status == 0, os.read(reader, 4096)
    found = list_image(work / "o.ext4")
    assert found[b"/dir/setuid"]["mode"] == 0o104755
    assert found[b"/null"]["mode"] == 0o020666
    assert found[b"/many"]["uid"] == 0


def test_probe_finds_a_mke2fs_without_tar_input(tmp_path: Path) -> None:
    fake = tmp_path / "mke2fs"
    fake.write_text('#!/bin/sh\necho "mke2fs: No such file or directory" >&2\nexit 1\n')
    fake.chmod(0o755)
    commands = HostCommands({**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert asyncio.run(ext4.probe_strategy(commands)) == "stage"


def test_check_names_a_damaged_file_system(tmp_path: Path) -> None:
    image = tmp_path / "d.ext4"
    asyncio.run(ext4.make_disk(image, 64 << 20, cache_dir=tmp_path / "c", commands=COMMANDS))
    with open(image, "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096)
    with pytest.raises(Corrupted, match=r"d\.ext4 does not pass e2fsck"):
        asyncio.run(ext4.check_ext4(image, commands=COMMANDS))


def test_a_disk_is_sparse_clean_and_made_once(tmp_path: Path) -> None:
    async def make_some() -> None:
        await asyncio.gather(
            *(
                ext4.make_disk(
                    tmp_path / f"{number}.ext4", 20 << 30, cache_dir=tmp_path / "c",
                    commands=COMMANDS,
                )
                for number in range(4)
            )
        )  # fmt: skip

    asyncio.run(make_some())
    for number in range(4):
        disk = tmp_path / f"{number}.ext4"
        assert disk.stat().st_size == 20 << 30
        assert allocated_bytes(disk) <= 2 << 20
        asyncio.run(ext4.check_ext4(disk, commands=COMMANDS))
    assert [entry.name for entry in (tmp_path / "c" / "disks").glob("*.ext4")] == [
        ext4.disk_template(tmp_path / "c", 20 << 30).name
    ]


def test_a_disk_has_nothing_left_for_the_guest_to_initialise(tmp_path: Path) -> None:
    disk = tmp_path / "d.ext4"
    asyncio.run(ext4.make_disk(disk, 1 << 30, cache_dir=tmp_path / "c", commands=COMMANDS))
    said = subprocess.run(
        ["/usr/sbin/dumpe2fs", disk], capture_output=True, check=True, text=True
    ).stdout
    assert said.count("Group ") >= 8
    assert said.count("ITABLE_ZEROED") >= 8


def test_inode_numbers_are_found_without_names(tmp_path: Path) -> None:
    tar = tmp_path / "t.tar"
    with tarfile.open(tar, "w") as archive:
        add(archive, "one", mtime=123456789)
    image = build(tar, tmp_path / "o.ext4", "stage")
    assert [inode for inode, mtime in staged.inode_mtimes(image) if mtime == 123456789] == [12]


def test_a_member_that_climbs_out_is_refused(tmp_path: Path) -> None:
    tar = tmp_path / "t.tar"
    with tarfile.open(tar, "w") as archive:
        add(archive, "a/../../escaped", data=b"x")
    with pytest.raises(InvalidInput, match="unusable name"):
        build(tar, tmp_path / "o.ext4", "stage")
    assert not list(tmp_path.parent.glob("escaped"))
