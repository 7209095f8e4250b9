"""A copy in a running guest: what it holds, what it says of itself, and removing from it.

Owns the scripts that run there (busybox is enough for them) and what is read of their answers.
Nothing the guest says is trusted: answers are matched to the paths that were asked about.
"""

from __future__ import annotations

import io
import os
import re
import stat
import tarfile
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from banger.errors import BangerError, Conflict, InvalidInput, NotFound, Unavailable
from banger.guest import agent
from banger.guest.transport import Endpoint
from banger.services.copy_changes import Seen
from banger.services.copy_manifest import Manifest, parse_begun, parse_manifest
from banger.services.workspaces import Entry, Workspace

_MAX_PACKED_BYTES = 64 << 20
_EXEC_TIMEOUT_S = 300.0  # 100,000 paths in an emulated guest take a minute
_GET_TIMEOUT_S = 120.0  # between two answers of a guest that swaps
_HASH = re.compile(r"[0-9a-f]{64}\Z")
_TOP_LEVEL = frozenset(
    ["bin", "boot", "dev", "etc", "home", "lib", "lib32", "lib64", "libx32", "lost+found", "media",
     "mnt", "opt", "proc", "root", "run", "sbin", "srv", "sys", "tmp", "usr", "var"]
)  # fmt: skip
_SYSTEM = ("/bin", "/boot", "/dev", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/run", "/sbin",
           "/sys", "/usr/bin", "/usr/lib", "/usr/sbin", "/var/lib/banger", "/var/run")  # fmt: skip


class Target(NamedTuple):
    """A copy in a running guest."""

    vm: str
    endpoint: Endpoint
    workspace: Workspace

    @property
    def directory(self) -> bytes:
        """Where it is there."""
        return os.fsencode(self.workspace.guest_directory)


# Busybox has them all, and may have no links to them.
_TOOLS = (
    'cd "$1" || exit 3; '
    't() { command -v "$1" >/dev/null 2>&1 && echo "$1" || echo "busybox $1"; }; '
)
_LOOK = (
    f"{_TOOLS} s=$(t stat); x=$(t xargs); $s -c %f . >/dev/null || exit 4; "
    "$x -0 $s -c '%f %s %Y %y %n/' 2>/dev/null; echo ok"
)
_DIGEST = (
    f"{_TOOLS} x=$(t xargs); H=$(t sha256sum) && export H; "
    "$x -0 sh -c 'for f; do $H <\"$f\" 2>/dev/null || echo -; done' sh; echo ok"
)
_PREFIX = (
    f"{_TOOLS} x=$(t xargs); H=$(t sha256sum); D=$(t head); export H D; "
    '$x -0 -n 2 sh -c \'$D -c "$1" <"$2" 2>/dev/null | $H || echo -\' sh; echo ok'
)
_REMOVE = f"{_TOOLS} $(t xargs) -0 $(t rm) -f; echo ok"
_REMOVE_DIRECTORIES = f"{_TOOLS} $(t xargs) -0 $(t rmdir) 2>/dev/null; echo ok"
_STAGED = (
    f"{_TOOLS} git -c core.fsmonitor=false -c core.hooksPath=/dev/null ls-files -s -z | "
    "$(t sha256sum)"
)
_LINE = re.compile(
    rb"([0-9a-f]{1,8}) (\d{1,20}) (-?\d{1,20}) [0-9-]{8,20} [0-9:]{8}(\.\d{1,9})? \S+ "
)
_KINDS = {stat.S_IFREG: "f", stat.S_IFLNK: "l", stat.S_IFDIR: "d"}


def _script(target: Target, script: str, paths: Iterable[bytes], where: bytes = b"") -> bytes:
    """Run a script of ours in the copy with paths on its stdin, and return what it says."""
    stdin = b"".join(b"%b\0" % path for path in paths)
    directory = os.path.join(target.directory, where)
    argv = [b"sh", b"-c", script.encode(), b"sh", directory]
    status, out, stderr = agent.capture_exec(
        target.endpoint, argv, input=stdin, timeout_s=_EXEC_TIMEOUT_S, limit_bytes=256 << 20
    )
    if status.exit_code != 0:
        lines = stderr.decode(errors="replace").strip().splitlines() or [f"{status.exit_code}"]
        said = "".join(c if c.isprintable() else "?" for c in lines[-1][:300])
        raise Unavailable(
            f"{target.vm} cannot tell what its copy holds: {said}",
            hint="this needs sh, stat, xargs, rm and sha256sum in the guest (busybox has them)",
        )
    return out


def look(target: Target, paths: Collection[bytes]) -> dict[bytes, Seen]:
    """Return what the guest has at these paths; those that are absent are left out."""
    if not paths:
        return {}
    asked = sorted(paths)
    return parse_look(asked, _script(target, _LOOK, (b"./" + path for path in asked)))


def parse_look(asked: Iterable[bytes], said: bytes) -> dict[bytes, Seen]:
    """Read what `stat` said, one line a path in the order asked, absent ones without one."""
    found: dict[bytes, Seen] = {}
    at = 0
    for path in asked:
        match = _LINE.match(said, at)
        end = b"./%b/\n" % path
        if match is None or not said.startswith(end, match.end()):
            continue
        at = match.end() + len(end)
        mode = int(match[1], 16)
        found[path] = Seen(
            _KINDS.get(stat.S_IFMT(mode), "o"), mode & 0o7777, int(match[2]), int(match[3]),
            int((match[4] or b".0")[1:]) == 0,
        )  # fmt: skip
    if said[at:] != b"ok\n":
        raise Unavailable("the guest's stat says what no stat says")
    return found


def digests(target: Target, paths: Iterable[bytes]) -> list[bytes]:
    """Return the SHA-256 of each file there; `-` of one that does not read."""
    words = [b"./" + path for path in paths]
    return _digests(target, _DIGEST, words, len(words))


def prefix_digests(target: Target, sizes: Mapping[bytes, int]) -> list[bytes]:
    """Return the SHA-256 of the first so many bytes of each file there."""
    words = [word for path, size in sizes.items() for word in (b"%d" % size, b"./" + path)]
    return _digests(target, _PREFIX, words, len(sizes))


def remove(target: Target, paths: Iterable[bytes]) -> None:
    """Remove files and links of the copy; those that are absent are no error."""
    _script(target, _REMOVE, (b"./" + path for path in sorted(paths)))


def remove_directories(target: Target, paths: Iterable[bytes]) -> None:
    """Remove those of these directories that are empty, the deepest first."""
    deepest = sorted(paths, key=lambda path: (-path.count(b"/"), path))
    if deepest:
        _script(target, _REMOVE_DIRECTORIES, (b"./" + path for path in deepest))


def _digests(target: Target, script: str, words: list[bytes], count: int) -> list[bytes]:
    lines = _script(target, script, words).splitlines()
    if len(lines) != count + 1 or lines[-1] != b"ok":
        raise Unavailable("the guest's sha256sum says what no sha256sum says")
    return [line[:64] for line in lines[:-1]]


def staged_there(target: Target, repository: bytes) -> str | None:
    """Return the hash of what the guest's index holds; None where git does not read it."""
    said = _script(target, _STAGED, (), repository)[:64].decode("ascii", "replace")
    return said if _HASH.match(said) else None


class Known(NamedTuple):
    """What the copy says of itself. `manifest` is None when it has none (an absent copy, too)."""

    manifest: Manifest | None
    intent: dict[bytes, Entry] | None  # of a run that did not end
    present: bool  # whether there is anything of ours


def read_known(target: Target, *, forgive: bool = False) -> Known:
    """Read the manifest from the guest; `forgive` takes one that does not read for none."""
    data = bytearray()

    def take(piece: bytes) -> None:
        data.extend(piece)
        if len(data) > _MAX_PACKED_BYTES:
            raise unreadable(target)

    place = target.directory + b"/.git/banger"
    try:
        try:
            agent.get_tar(target.endpoint, place, take, timeout_s=_GET_TIMEOUT_S)
        except NotFound:
            return Known(None, None, False)
        except BangerError as error:
            if error.code in ("agent_not_a_directory", "agent_io"):
                return Known(None, None, False)  # something else is in its place: put will tell
            raise
        files = _files_of(bytes(data))
        begun = files.get("begun")
        intent, latest = ({}, "") if begun is None else parse_begun(begun)
        if "manifest" not in files:
            return Known(None, intent, begun is not None)
        manifest, token = parse_manifest(files["manifest"])
    except (ValueError, tarfile.TarError, BangerError) as error:
        if isinstance(error, BangerError) and error.code != "banger_manifest":
            raise
        if forgive:
            return Known(None, {}, True)
        raise unreadable(target) from error
    return Known(manifest, None if latest in ("", token) else intent, True)


def _files_of(data: bytes) -> dict[str, bytes]:
    """Return the plain files of a tar by their last name: in memory, and only two can matter."""
    files = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for number, member in enumerate(archive):
            file = archive.extractfile(member) if member.isreg() else None
            if number > 100:
                raise ValueError("too many files")
            if file is not None and member.size <= len(data):
                files[os.path.basename(member.name)] = file.read()
    return files


def unreadable(target: Target) -> Conflict:
    """Return the error for a manifest that we would not have written."""
    where = os.fsdecode(target.directory)
    return Conflict(
        f"what {target.vm} has noted of the copy in {where} does not read",
        hint="`banger vm workspace diff` shows what it has; prepare --overwrite sends all anew",
        code="banger_manifest",
    )


def check_guest_path(text: str) -> str:
    """Return a directory of the guest for a copy, normalised; raise InvalidInput for no such."""
    hint = "as /root/repo"
    if not text.startswith("/"):
        raise InvalidInput("--guest-path is an absolute path in the VM", hint=hint)
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if "\0" in text or ".." in parts or len(os.fsencode(text)) > 1024:
        raise InvalidInput(f"--guest-path {text[:100]!r} is no plain path", hint=hint)
    path = "/" + "/".join(parts)
    if not parts or (len(parts) == 1 and parts[0] in _TOP_LEVEL):
        raise InvalidInput(
            f"{path} is the system's: a copy needs a directory of its own", hint=hint
        )
    if ".git" in parts or any(path == one or path.startswith(f"{one}/") for one in _SYSTEM):
        raise InvalidInput(f"{path} is no place for a copy", hint=hint)
    return path
