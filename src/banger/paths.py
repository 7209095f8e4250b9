"""Where things live: XDG directories, and short private ones for sockets.

Owns the base directories only; `store.layout` owns every file name below them.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from banger.errors import Unavailable


class Paths(NamedTuple):
    """The base directories, as absolute strings (pathlib is 7 ms of the hot path)."""

    config_dir: str  # config.toml, ssh/
    data_dir: str  # images/, kernels/, vms/, banger.db
    state_dir: str  # bangerd.log
    cache_dir: str  # what can be made again
    runtime_dir: str  # sockets and locks; 0700; short, for sun_path is 108 bytes


def find_paths(environ: dict[str, str] | None = None) -> Paths:
    """Return the base directories of this user; makes nothing.

    The runtime directory ends with a digest of the data directory, so two HOMEs of one
    user (tests, CI) never share a daemon.
    """
    env = os.environ if environ is None else environ
    home = env.get("HOME") or os.path.expanduser("~")

    def base(variable: str, fallback: str) -> str:
        value = env.get(variable, "")
        # The XDG specification says that a relative path is invalid and to be ignored.
        return value if value.startswith("/") else os.path.join(home, fallback)

    data_dir = os.path.join(base("XDG_DATA_HOME", ".local/share"), "banger")
    return Paths(
        config_dir=os.path.join(base("XDG_CONFIG_HOME", ".config"), "banger"),
        data_dir=data_dir,
        state_dir=os.path.join(base("XDG_STATE_HOME", ".local/state"), "banger"),
        cache_dir=os.path.join(base("XDG_CACHE_HOME", ".cache"), "banger"),
        runtime_dir=os.path.join(_runtime_base(env), _digest(data_dir)),
    )


def _digest(text: str) -> str:
    # zlib.crc32 would do, yet a clash would join two users' daemons; blake2b is built in.
    from _blake2 import blake2b

    return blake2b(os.fsencode(text), digest_size=5).hexdigest()


def _runtime_base(env: os._Environ[str] | dict[str, str]) -> str:
    given = env.get("XDG_RUNTIME_DIR", "")
    if given.startswith("/") and len(given) <= 48:
        return os.path.join(given, "banger")
    uid = os.getuid()
    if uid == 0 and os.access("/run", os.W_OK):
        return "/run/banger"
    if os.path.isdir(f"/run/user/{uid}"):
        return f"/run/user/{uid}/banger"
    return f"/tmp/banger-{uid}"  # noqa: S108 - ownership and mode are checked by make_runtime_dir


def make_runtime_dir(paths: Paths) -> str:
    """Make the runtime directory, private to this user, and return it.

    Raises Unavailable when it, or its parent, belongs to somebody else or is open to
    others: in /tmp any local user may have made the name first.
    """
    for path in (os.path.dirname(paths.runtime_dir), paths.runtime_dir):
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        except FileNotFoundError as error:
            raise Unavailable(
                f"cannot make {path}: its parent does not exist",
                hint="unset XDG_RUNTIME_DIR or point it at a directory of yours",
            ) from error
        found = os.lstat(path)
        if (
            not stat.S_ISDIR(found.st_mode)
            or found.st_uid != os.getuid()
            or stat.S_IMODE(found.st_mode) & 0o077
        ):
            raise Unavailable(
                f"{path} is not a private directory of yours",
                hint=f"remove it (`rm -r {path}`) or set XDG_RUNTIME_DIR",
            )
    return paths.runtime_dir
