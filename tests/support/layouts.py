"""Image layouts and archives, written member by member: what a builder would not let us make."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OCI = "application/vnd.oci.image"
REF_NAME = "org.opencontainers.image.ref.name"


def member(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: Any) -> Any:
    """Return a tar member and its content."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode = kind, len(data), 0o755 if kind == tarfile.DIRTYPE else 0o644
    info.mtime = 1_500_000_000
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def directory(name: str, **fields: Any) -> Any:
    return member(name, tarfile.DIRTYPE, **fields)


def symlink(name: str, target: str, **fields: Any) -> Any:
    return member(name, tarfile.SYMTYPE, linkname=target, mode=0o777, **fields)


def hard_link(name: str, target: str) -> Any:
    return member(name, tarfile.LNKTYPE, linkname=target)


def tar_of(members: Sequence[Any], form: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar of members in their order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, errors="surrogateescape") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Layout:
    """An OCI layout on disk to which anything can be put."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs" / "sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self.manifests: list[dict[str, Any]] = []
        self.write_index()

    def put(self, data: bytes) -> dict[str, Any]:
        """Store a blob and return digest and size."""
        (self.path / "blobs" / "sha256" / digest(data).partition(":")[2]).write_bytes(data)
        return {"digest": digest(data), "size": len(data)}

    def put_json(self, document: Any, media_type: str) -> dict[str, Any]:
        return {"mediaType": media_type, **self.put(json.dumps(document).encode())}

    def image(
        self,
        layers: Sequence[bytes],
        *,
        packed: Sequence[bytes] | None = None,
        config: dict[str, Any] | None = None,
        architecture: str = "amd64",
        system: str = "linux",
        media_type: str = f"{OCI}.manifest.v1+json",
        layer_type: str = f"{OCI}.layer.v1.tar+gzip",
        diff_ids: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Store an image of layer tars and return its descriptor, not yet in the index."""
        packed = [gzip.compress(one, 1) for one in layers] if packed is None else packed
        settings = {
            "architecture": architecture,
            "os": system,
            "config": config or {},
            "created": "2033-05-18T03:33:20.4Z",
            "rootfs": {
                "type": "layers",
                "diff_ids": [digest(one) for one in layers] if diff_ids is None else list(diff_ids),
            },
            "history": [{"created_by": "test"} for _ in layers],
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": self.put_json(settings, f"{OCI}.config.v1+json"),
            "layers": [{"mediaType": layer_type, **self.put(one)} for one in packed],
        }
        return self.put_json(manifest, media_type)

    def add(self, descriptor: dict[str, Any], tag: str | None = None, **fields: Any) -> None:
        """Put a descriptor into index.json."""
        entry = {**descriptor, **fields}
        if tag is not None:
            entry["annotations"] = {**entry.get("annotations", {}), REF_NAME: tag}
        self.manifests.append(entry)
        self.write_index()

    def write_index(self) -> None:
        index = {
            "schemaVersion": 2,
            "mediaType": f"{OCI}.index.v1+json",
            "manifests": self.manifests,
        }
        (self.path / "index.json").write_text(json.dumps(index))


def make_layout(
    path: Path, layers: Sequence[Sequence[Any]], tag: str = "t", **image: Any
) -> Layout:
    """Write a layout of one image of layers of members."""
    layout = Layout(path)
    layout.add(layout.image([tar_of(one) for one in layers], **image), tag)
    return layout


def as_tar(directory: Path, output: Path) -> Path:
    """Write a directory as a plain tar, as `oci-archive` and `docker save` have it."""
    with tarfile.open(output, "w") as archive:
        for path in sorted(directory.rglob("*")):
            archive.add(path, str(path.relative_to(directory)), recursive=False)
    return output
