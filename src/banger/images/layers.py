"""The merge of image layers: tar members in, one tree out. Pure: no file is opened here.

Owns the rules of image-spec's layer.md as an unpacking onto a file system would show them:
whiteouts and opaque directories act on lower layers only, the last member of a name wins,
hard links cross layers, and parents are resolved inside the image, through the symbolic links
that lower layers made of them. The tree holds what every inode is and where its content lies;
no byte of content, and nothing of it is ever a path of the host.
Leaves reading tars to `images.flatten`.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from banger.errors import InvalidInput

WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_AUFS = b".wh..wh."  # AUFS's own bookkeeping; Docker's first layers hold some
_MAX_NAME_BYTES = 255  # ext4's
_MAX_PATH_BYTES = 4096  # PATH_MAX
_MAX_LINKS = 40  # MAXSYMLINKS of path_resolution(7)
_MAX_XATTR_BYTES = 64 * 1024  # XATTR_SIZE_MAX
# overlayfs keeps its own notes under these; in a base image they would steer the guest's.
_OVERLAY_XATTRS = ("trusted.overlay.", "user.overlay.")
_DEFAULT_DIRECTORY = stat.S_IFDIR | 0o755


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one image may ask of this host."""

    max_entries: int = 1_000_000
    max_bytes: int = 64 << 30  # content of all layers, unpacked
    max_depth: int = 256
    max_expansion: int = 200  # unpacked bytes for each packed one, once above the floor below


class Content(NamedTuple):
    """Where a file's bytes lie in the unpacked stream of a layer.

    `extents` is None for a plain file; for a sparse one (offset in the file, bytes), packed one
    behind the other from `offset`.
    """

    layer: int
    offset: int
    size: int
    extents: tuple[tuple[int, int], ...] | None = None


class Member(NamedTuple):
    """One tar member. `mode` has the type bits; `target` is a link's, of either kind."""

    name: bytes
    mode: int
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    is_hard_link: bool = False
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = {}  # noqa: RUF012 - a NamedTuple's default; nobody changes it
    content: Content | None = None


class Placed(NamedTuple):
    """Where a member went: the directories walked to it, with the names taken, and what was there.

    `node` is the member's own, or the one it links to; `replaced` is another that had its name.
    """

    trail: list[tuple[Node, bytes]]
    parent: Node
    name: bytes
    node: Node
    replaced: Node | None

    @property
    def path(self) -> bytes:
        """Return the name from the root on."""
        return b"/".join((*(name for _, name in self.trail), self.name))


class Node:
    """One inode. Hard links are several names of one Node."""

    __slots__ = (
        "children", "content", "device", "fresh", "fresh_layer", "gid", "mode", "mtime",
        "target", "uid", "xattrs",
    )  # fmt: skip

    def __init__(self, mode: int) -> None:
        self.mode = mode
        self.uid = 0
        self.gid = 0
        self.mtime = 0
        self.target = b""
        self.device = (0, 0)
        self.xattrs: dict[str, bytes] = {}
        self.content: Content | None = None
        self.children: dict[bytes, Node] | None = {} if stat.S_ISDIR(mode) else None
        # The names that the layer `fresh_layer` put here: its own whiteouts spare them.
        self.fresh: set[bytes] | None = None
        self.fresh_layer = -1

    def describe(self, member: Member) -> None:
        """Take a member's attributes."""
        self.mode = member.mode
        self.uid, self.gid, self.mtime = member.uid, member.gid, member.mtime
        self.device = member.device
        self.xattrs = {
            name: value
            for name, value in member.xattrs.items()
            if not name.startswith(_OVERLAY_XATTRS)
        }

    def freshen(self, name: bytes, layer: int) -> None:
        """Note that `layer` has put a name here."""
        if self.fresh_layer != layer or self.fresh is None:
            self.fresh_layer, self.fresh = layer, set()
        self.fresh.add(name)

    def is_fresh(self, name: bytes, layer: int) -> bool:
        """Tell whether `layer` has put this name here."""
        return self.fresh_layer == layer and self.fresh is not None and name in self.fresh


class Tree:
    """The file system that the layers applied so far make."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.root = Node(_DEFAULT_DIRECTORY)
        self.layer = -1
        self.entries = 0
        self.bytes = 0

    def begin_layer(self) -> int:
        """Begin the next layer, from the bottom up, and return its number."""
        self.layer += 1
        return self.layer

    def apply(self, member: Member) -> Placed | None:
        """Apply one member of the present layer; raise InvalidInput for what no image may hold.

        Returns where it went; None for whiteouts and for the root.
        """
        self.entries += 1
        if self.entries > self.limits.max_entries:
            raise InvalidInput(
                f"the image has more than {self.limits.max_entries} entries",
                hint="raise import_limits.max_entries in the configuration if you trust it",
            )
        if member.content is not None:
            self.bytes += member.content.size
            if self.bytes > self.limits.max_bytes:
                raise InvalidInput(
                    f"the image unpacks to more than {self.limits.max_bytes} bytes",
                    hint="raise import_limits.max_size in the configuration if you trust it",
                )
        parts = split(member.name, self.limits.max_depth)
        if not parts:
            if not stat.S_ISDIR(member.mode):
                raise InvalidInput("a layer makes the image's root something else than a directory")
            self.root.describe(member)
            return None
        name = parts[-1]
        if any(part.startswith(_AUFS) for part in parts[:-1]):
            return None
        if name.startswith(WHITEOUT):
            self._white_out(parts[:-1], name)
            return None
        if len(name) > _MAX_NAME_BYTES:
            raise InvalidInput(f"a layer has a name longer than 255 bytes: {_shown(member.name)}")
        parent, trail = self._parent(parts[:-1], member.name)
        node = self._linked(member) if member.is_hard_link else self._placed(parent, name, member)
        assert parent.children is not None
        found = parent.children.get(name)
        parent.children[name] = node
        parent.freshen(name, self.layer)
        return Placed(trail, parent, name, node, None if found is node else found)

    def _placed(self, parent: Node, name: bytes, member: Member) -> Node:
        assert parent.children is not None
        found = parent.children.get(name)
        if found is not None and found.children is not None and stat.S_ISDIR(member.mode):
            found.describe(member)  # a directory again: what is below stays
            return found
        node = Node(member.mode)
        node.describe(member)
        node.target = member.target
        node.content = member.content
        return node

    def _linked(self, member: Member) -> Node:
        target = split(member.target, self.limits.max_depth)
        directory = self._find_directory(target[:-1]) if target else None
        node = None
        if directory is not None and directory.children is not None:
            node = directory.children.get(target[-1])
        if node is None:
            raise InvalidInput(
                f"a layer links {_shown(member.name)} to {_shown(member.target)}, "
                "which is not there"
            )
        if node.children is not None:
            raise InvalidInput(
                f"a layer makes a hard link to the directory {_shown(member.target)}"
            )
        return node

    def _white_out(self, parents: tuple[bytes, ...], name: bytes) -> None:
        victim = name[len(WHITEOUT) :]
        if victim in (b"", b".", b".."):
            raise InvalidInput(f"a layer has a whiteout of nothing: {_shown(name)}")
        if name != _OPAQUE and name.startswith(_AUFS):
            return
        directory = self._find_directory(parents)
        if directory is None or directory.children is None:
            return  # nothing below is there to be hidden
        if name == _OPAQUE:
            for child in list(directory.children):
                self._hide(directory, child)
        elif victim in directory.children:
            self._hide(directory, victim)

    def _hide(self, directory: Node, name: bytes) -> None:
        """Remove a name, but for what the present layer has put at or below it."""
        assert directory.children is not None
        if not directory.is_fresh(name, self.layer):
            del directory.children[name]
            return
        child = directory.children[name]
        for below in list(child.children or ()):
            self._hide(child, below)

    def _parent(
        self, parts: tuple[bytes, ...], member_name: bytes
    ) -> tuple[Node, list[tuple[Node, bytes]]]:
        """Return the directory of a new name, making what is missing, marked as this layer's."""
        walked = self._walk(parts, make=True)
        if walked is None:
            raise InvalidInput(
                f"a layer has {_shown(member_name)} below something that is no directory"
            )
        return walked

    def _find_directory(self, parts: tuple[bytes, ...]) -> Node | None:
        walked = self._walk(parts, make=False)
        return None if walked is None else walked[0]

    def _walk(
        self, parts: tuple[bytes, ...], *, make: bool
    ) -> tuple[Node, list[tuple[Node, bytes]]] | None:
        """Walk to a directory inside the image; `..` of a link stops at the root, as chroot's does.

        Returns it and the directories above it, each with the name taken there; None when something
        on the way is no directory, or (without `make`) is not there.
        """
        trail: list[tuple[Node, bytes]] = []  # the directories above `here`, and the names taken
        here = self.root
        waiting = list(reversed(parts))
        links = 0
        while waiting:
            part = waiting.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                if trail:
                    here = trail.pop()[0]
                continue
            if here.children is None:
                return None
            below = here.children.get(part)
            if below is None:
                if not make:
                    return None
                if part.startswith(WHITEOUT):
                    raise InvalidInput(
                        f"a layer has a directory named as a whiteout: {_shown(part)}"
                    )
                if len(part) > _MAX_NAME_BYTES:
                    raise InvalidInput(f"a layer has a name longer than 255 bytes: {_shown(part)}")
                if len(trail) >= self.limits.max_depth:
                    raise InvalidInput(
                        f"a layer goes more than {self.limits.max_depth} directories deep"
                    )
                below = here.children[part] = Node(_DEFAULT_DIRECTORY)
                here.freshen(part, self.layer)
            elif stat.S_ISLNK(below.mode):
                links += 1
                if links > _MAX_LINKS:
                    raise InvalidInput(
                        f"a layer runs in circles of symbolic links at {_shown(part)}"
                    )
                if below.target.startswith(b"/"):
                    trail.clear()
                    here = self.root
                waiting.extend(reversed(below.target.split(b"/")))
                continue
            trail.append((here, part))
            here = below
        if here.children is None:
            return None
        if make:
            for directory, name in trail:
                directory.freshen(name, self.layer)
        return here, trail

    def walk(self) -> Iterator[tuple[bytes, Node]]:
        """Yield every name below the root with its node, parents first, in byte order."""
        stack: list[tuple[bytes, Node]] = [(b"", self.root)]
        while stack:
            path, node = stack.pop()
            if path:
                yield path, node
            if node.children:
                prefix = path + b"/" if path else b""
                stack.extend(
                    (prefix + name, node.children[name])
                    for name in sorted(node.children, reverse=True)
                )


def split(name: bytes, max_depth: int) -> tuple[bytes, ...]:
    """Return a member's name as components below the root; `..` never leaves it.

    As unpackers do: a leading slash falls away and `..` is taken lexically.
    """
    if b"\0" in name or len(name) > _MAX_PATH_BYTES:
        raise InvalidInput(f"a layer has an unusable name: {_shown(name)}")
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part in (b"", b"."):
            continue
        if part == b"..":
            if parts:
                parts.pop()
            continue
        parts.append(part)
    if len(parts) > max_depth:
        raise InvalidInput(f"a layer goes more than {max_depth} directories deep")
    return tuple(parts)


def check_xattrs(name: bytes, xattrs: dict[str, bytes]) -> None:
    """Raise InvalidInput for extended attributes that no file system would keep."""
    for key, value in xattrs.items():
        if len(key) > _MAX_NAME_BYTES or len(value) > _MAX_XATTR_BYTES or "\0" in key:
            raise InvalidInput(f"{_shown(name)} has an unusable extended attribute {key[:80]!r}")


def _shown(name: bytes) -> str:
    text = name.decode("utf-8", "backslashreplace")
    return repr(text if len(text) <= 120 else text[:117] + "...")
