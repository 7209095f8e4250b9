"""The lab is what the other tests here take it for."""

from __future__ import annotations

import banger
from tests.support.lab import Lab


def test_installed_product_is_this_source_tree(lab: Lab) -> None:
    assert lab.ok(["banger", "version"]) == f"banger {banger.__version__}"


def test_doctor_finds_kvm_usable_and_nothing_failing(lab: Lab) -> None:
    found = lab.json("doctor")
    status = {check["name"]: check["status"] for check in found["checks"]}
    assert status["kvm"] == "ok", found
    assert found["ok"], found


def test_firecracker_and_jailer_run(lab: Lab) -> None:
    assert lab.ok(["firecracker", "--version"]).startswith("Firecracker v1.12.1")
    assert lab.ok(["jailer", "--version"]).startswith("Jailer v1.12.1")


def test_every_unit_of_the_lab_started(lab: Lab) -> None:
    state = lab.run(["systemctl", "is-system-running", "--wait"])
    assert state.stdout == b"running\n", lab.run(["systemctl", "--failed"]).stdout.decode()


def test_images_and_kernels_are_installed_without_pulling(lab: Lab) -> None:
    found = {
        artifact["name"]
        for kind in ("image", "kernel")
        for artifact in lab.json(kind, "list")
        if artifact["installed"]
    }
    assert {"debian-bookworm", "debian-bookworm-minimal", "generic-6.12"} <= found


def test_status_and_bytes_of_a_command_come_back_unchanged(lab: Lab) -> None:
    done = lab.run("cat; echo gone >&2; exit 7", stdin=bytes(range(256)))
    assert (done.returncode, done.stdout, done.stderr) == (7, bytes(range(256)), b"gone\n")


def test_files_and_directories_go_in_and_out(lab: Lab, tmp_path) -> None:  # type: ignore[no-untyped-def]
    source = tmp_path / "in" / "a folder"
    source.mkdir(parents=True)
    (source / "script").write_bytes(b"#!/bin/sh\necho ran\n")
    (source / "script").chmod(0o755)
    lab.push(source.parent, "/tmp/pushed")
    assert lab.ok(["/tmp/pushed/a folder/script"]) == "ran"
    lab.push(source / "script", "/tmp/pushed/one file")
    lab.pull("/tmp/pushed", tmp_path / "out")
    assert (tmp_path / "out" / "one file").read_bytes() == (source / "script").read_bytes()
    assert (tmp_path / "out" / "a folder" / "script").stat().st_mode & 0o777 == 0o755
