"""Artifacts are whole or absent, and a damaged one is named with the way out."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

from banger.errors import Conflict, Corrupted, InvalidInput, NotFound
from banger.images import artifacts
from banger.images.artifacts import ImageManifest


def manifest(name: str, files: dict[str, int], digest: str = "sha256:0") -> ImageManifest:
    return ImageManifest(
        name=name, digest=digest, size_bytes=sum(files.values()), allocated_bytes=4096,
        origin="test", description="", created_at="2026-01-01T00:00:00Z", files=files,
    )  # fmt: skip


async def put(data: Path, name: str, content: bytes = b"root", *, force: bool = False) -> None:
    async with artifacts.staging(data, "image", name) as staged:
        out = staged / "artifact"
        out.mkdir()
        (out / "rootfs.ext4").write_bytes(content)
        artifacts.install(
            out, data, "image", manifest(name, {"rootfs.ext4": len(content)}), force=force
        )


async def test_an_installed_artifact_reads_back(tmp_path: Path) -> None:
    await put(tmp_path, "one")
    assert artifacts.names(tmp_path, "image") == ["one"]
    assert artifacts.read(tmp_path, "image", "one", ImageManifest).size_bytes == 4
    assert list((tmp_path / "staging").iterdir()) == []


async def test_an_installed_artifact_is_replaced_only_by_force(tmp_path: Path) -> None:
    await put(tmp_path, "one")
    with pytest.raises(Conflict) as caught:
        await put(tmp_path, "one", b"newer")
    assert "banger image pull --force one" in caught.value.hint
    assert (tmp_path / "images/one/rootfs.ext4").read_bytes() == b"root"
    await put(tmp_path, "one", b"newer", force=True)
    assert (tmp_path / "images/one/rootfs.ext4").read_bytes() == b"newer"
    assert list((tmp_path / "staging").iterdir()) == []


async def test_a_failed_or_cancelled_maker_leaves_nothing(tmp_path: Path) -> None:
    began = asyncio.Event()

    async def make() -> None:
        async with artifacts.staging(tmp_path, "image", "one") as staged:
            (staged / "part").write_bytes(b"x")
            began.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(make())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list((tmp_path / "staging").iterdir()) == []
    assert artifacts.names(tmp_path, "image") == []


async def test_sweep_takes_orphans_and_spares_the_living(tmp_path: Path) -> None:
    async with artifacts.staging(tmp_path, "image", "alive") as staged:
        orphan = tmp_path / "staging" / "image-dead-00000000"
        orphan.mkdir()
        (orphan / "rootfs.ext4").write_bytes(b"x")
        (tmp_path / "staging" / "image-dead-00000000.lock").touch()
        (tmp_path / "staging" / "kernel-gone-00000000.lock").touch()
        assert artifacts.sweep_staging(tmp_path) == ["image-dead-00000000"]
        assert sorted(entry.name for entry in (tmp_path / "staging").iterdir()) == [
            staged.name,
            f"{staged.name}.lock",
        ]


async def test_a_maker_that_was_killed_is_swept(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        staging = artifacts.staging(tmp_path, "image", "dead")
        asyncio.new_event_loop().run_until_complete(staging.__aenter__())
        os._exit(0)  # neither finally nor exit handlers run
    os.waitpid(child, 0)
    assert len(list((tmp_path / "staging").iterdir())) == 2
    assert len(artifacts.sweep_staging(tmp_path)) == 1
    assert list((tmp_path / "staging").iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "manifest.json").write_bytes(b"{"), "its manifest does not read"),
        (lambda d: (d / "manifest.json").write_bytes(b"\xff"), "its manifest does not read"),
        (lambda d: (d / "manifest.json").write_bytes(b"{}"), "its manifest does not read"),
        (lambda d: (d / "manifest.json").unlink(), "it has no manifest"),
        (lambda d: (d / "rootfs.ext4").unlink(), "its file rootfs.ext4 is missing"),
        (lambda d: (d / "rootfs.ext4").write_bytes(b"r"), "has 1 of 4 bytes"),
    ],
)
async def test_a_damaged_artifact_is_named_with_the_way_out(
    tmp_path: Path, damage, words: str
) -> None:
    await put(tmp_path, "one")
    damage(tmp_path / "images" / "one")
    with pytest.raises(Corrupted, match="image one is corrupted") as caught:
        artifacts.read(tmp_path, "image", "one", ImageManifest)
    assert words in caught.value.message
    assert "banger image pull --force one" in caught.value.hint
    assert "banger image delete one" in caught.value.hint
    artifacts.delete(tmp_path, "image", "one")
    assert artifacts.names(tmp_path, "image") == []


async def test_an_absent_artifact_suggests_the_nearest(tmp_path: Path) -> None:
    await put(tmp_path, "debian-bookworm")
    with pytest.raises(NotFound) as caught:
        artifacts.read(tmp_path, "image", "debian-bokworm", ImageManifest)
    assert "debian-bookworm" in caught.value.hint
    with pytest.raises(NotFound):
        artifacts.delete(tmp_path, "image", "other")


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc", "A", "a" * 64, "a\n", ".hidden"])
def test_a_name_never_leaves_the_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput):
        artifacts.artifact_directory(tmp_path, "image", name)


def test_a_sparse_file_has_the_digest_of_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "f"
    with open(file, "wb") as out:
        out.seek(3_000_000)
        out.write(b"middle")
        out.truncate(9_000_001)
    assert artifacts.sha256_of(file) == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


def test_nothing_is_removed_below_which_something_is_mounted(tmp_path: Path, monkeypatch) -> None:
    orphan = tmp_path / "staging" / "image-dead-00000000"
    (orphan / "sys").mkdir(parents=True)
    (orphan / "file").touch()
    table = tmp_path / "mountinfo"
    table.write_text(f"45 27 0:40 / {orphan}/sys ro - sysfs sys ro\n")
    monkeypatch.setattr(artifacts, "MOUNT_TABLE", str(table))
    assert artifacts.sweep_staging(tmp_path) == []
    assert (orphan / "file").exists()
    table.write_text(f"45 27 0:40 / {orphan}-other/sys ro - sysfs sys ro\n")
    assert artifacts.sweep_staging(tmp_path) == ["image-dead-00000000"]
