"""Images that say nothing of banger: with every init that Debian packages, with none, with no shell.

They are made once and kept under the CI cache, keyed by their recipe.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import banger
from banger.events import NullSink
from banger.host.commands import HostCommands
from banger.host.locks import locked
from banger.images.importing import ImportRequest, import_image
from banger.images.layers import Limits
from banger.images.reference import LayoutRef
from tests.support.artifacts import cache_root
from tests.support.layouts import Layout

_PACKAGE = Path(banger.__file__).parent
_BUSYBOX = Path("/bin/busybox")
_MMDEBSTRAP_TIMEOUT_S = 900
_DAMAGED = 'rm -rf "$1"/etc/resolv.conf; ln -s /run/systemd/resolve/stub.conf "$1"/etc/resolv.conf'
_TOOL = (
    'mkdir -p "$1"/opt/app/bin; printf "#!/bin/sh\\necho own tool\\n" >"$1"/opt/app/bin/tool; '
    'chmod 755 "$1"/opt/app/bin/tool'
)
# In place of a service manager's own set-up: no package of Debian makes s6 PID 1.
_S6_INIT = (
    'printf "#!/bin/sh -e\\nmkdir -p /run/service\\nexec s6-svscan /run/service\\n" '
    '>"$1"/sbin/init; chmod 755 "$1"/sbin/init'
)


@dataclass(frozen=True)
class Recipe:
    """How an image is made: Debian packages and hooks, or files that are all busybox."""

    name: str
    pid1: bytes  # how /proc/1/cmdline begins
    include: str = ""
    hooks: Sequence[str] = ()
    busybox: Sequence[str] = ()  # paths; with none it is a Debian
    links: dict[str, str] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)  # what the image says of itself
    has_shell: bool = True


_APP_PATH = "/opt/app/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_APPLETS = ("sh", "cat", "echo", "true", "sleep", "ls", "env", "httpd", "wget", "tty", "id", "pwd")

RECIPES = (
    Recipe(
        "slim",
        b"/init\0",
        # A container's Debian: no init, though a link to one; the resolver's file leads nowhere.
        hooks=(
            'ln -sf /lib/systemd/systemd "$1"/sbin/init',
            _DAMAGED,
            _TOOL,
        ),
        config={
            "User": "www-data",
            "Env": [f"PATH={_APP_PATH}", "APP=it's the image's $x"],
            "Entrypoint": ["sh", "-c", 'echo "$(id -un) $(pwd) $APP:" "$@"', "sh"],
            "Cmd": ["default", "command"],
            "WorkingDir": "/srv/app",
        },
    ),
    Recipe("no-init", b"/init\0", busybox=["bin/busybox"],
           links={f"bin/{name}": "busybox" for name in _APPLETS}),
    Recipe("busybox-init", b"init\0", busybox=["bin/busybox"],
           links={**{f"bin/{name}": "busybox" for name in _APPLETS}, "sbin/init": "/bin/busybox"}),
    Recipe("openrc", b"init [", include="openrc,sysvinit-core"),
    Recipe("runit", b"runit\0", include="runit-init"),
    Recipe("s6", b"s6-svscan\0", include="s6", hooks=(_S6_INIT,)),
    Recipe(
        "distroless",
        b"/init\0",
        busybox=[f"app/{name}" for name in ("cat", "httpd", "env", "sleep", "echo", "true", "wget")],
        config={"Env": ["PATH=/app"], "Entrypoint": ["echo", "hello"]},
        has_shell=False,
    ),
)  # fmt: skip


def need_any_image(recipe: Recipe) -> Path:
    """Return the directory of an installed image, making it when absent."""
    text = json.dumps(asdict(recipe), default=str, sort_keys=True)
    makers = (path.read_bytes() for path in sorted((_PACKAGE / "images").glob("*.py")))
    digest = hashlib.sha256(text.encode() + _BUSYBOX.read_bytes())
    for maker in makers:
        digest.update(maker)
    store = cache_root() / f"any-image-{recipe.name}-{digest.hexdigest()[:12]}"
    installed = store / "images" / recipe.name
    with locked(cache_root() / f".any-image-{recipe.name}.lock"):
        if not installed.exists():
            for other in cache_root().glob(f"any-image-{recipe.name}-*"):
                shutil.rmtree(other)
            asyncio.run(_make(recipe, store))
    return installed


async def _make(recipe: Recipe, store: Path) -> None:
    """Import the image as users do: from an OCI layout of one layer and its configuration."""
    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store) as work:
        tar = Path(work) / "rootfs.tar"
        tar.write_bytes(_busybox_tar(recipe)) if recipe.busybox else _debian_tar(recipe, tar)
        layout = Layout(Path(work) / "layout")
        layout.add(layout.image([tar.read_bytes()], config=recipe.config))
        await import_image(
            ImportRequest(LayoutRef(str(layout.path), None), recipe.name),
            data_dir=store,
            commands=HostCommands(),
            sink=NullSink(),
            limits=Limits(),
            open_registry=_no_registry,
        )


def _no_registry(*_: object) -> Any:
    raise AssertionError("a layout is no registry")


def _debian_tar(recipe: Recipe, output: Path) -> None:
    done = subprocess.run(
        [
            # In a namespace of its own, as the product does: killed, it leaves no mount of the host's.
            *(["unshare", "--mount", "--propagation", "private", "--"] if os.getuid() == 0 else []),
            "mmdebstrap", "--variant=minbase", '--aptopt=Acquire::Languages "none"',
            "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*",
            *([f"--include={recipe.include}"] if recipe.include else []),
            *(f"--customize-hook={hook}" for hook in recipe.hooks),
            "bookworm", str(output),
        ],
        capture_output=True, text=True, timeout=_MMDEBSTRAP_TIMEOUT_S, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"mmdebstrap of {recipe.name}: {done.stderr[-2000:]}")


def _busybox_tar(recipe: Recipe) -> bytes:
    out = io.BytesIO()
    data = _BUSYBOX.read_bytes()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in sorted({os.path.dirname(path) for path in (*recipe.busybox, *recipe.links)}):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for path in recipe.busybox:
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(data), 0o755
            tar.addfile(entry, io.BytesIO(data))
        for path, target in recipe.links.items():
            entry = tarfile.TarInfo(path)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
    return out.getvalue()
