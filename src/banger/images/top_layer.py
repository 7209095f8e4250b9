"""The top layer, written out while it is read: no layer above it decides what it contributes.

An index of everything first (`merged_tar.plan_of`) means to inflate everything twice. The top layer
can go out at once: mke2fs takes members as an unpacker does, a later one in place of an
earlier. What is below it follows, as far as it still shows. Where that is not enough
(a directory with content becomes a file, one of several names is taken over, extended attributes,
times later than promised) `CannotStream` is raised, and the import begins anew with an index.
"""

from __future__ import annotations

import struct
from typing import IO

from banger.images.layer_tars import Layer, Progress, members_in, open_layer
from banger.images.layers import Node, Placed, Tree
from banger.images.merged_tar import Plan, header, other_xattrs, plan_of, write_content, write_tar
from banger.images.unpacking import sniff

_BYTES_PER_INODE = 8192  # what is promised to mke2fs; images have 10 KB to 100 KB for each file
_SPARE_INODES = 4096


class CannotStream(Exception):
    """This layer wants an index before anything of it can be written."""


def unpacked_size(layer: Layer) -> int | None:
    """Return what a layer says that it unpacks to, None when it does not say or cannot be right.

    A plain tar is its own size; gzip has it modulo 4 GiB in its last four bytes (RFC 1952, ISIZE).
    """
    with open(layer.path, "rb") as file:
        file.seek(layer.offset)
        compression = sniff(file.read(min(8, layer.size)))
        if compression == "none":
            return layer.size
        if compression != "gzip" or layer.size < 18:
            return None
        file.seek(layer.offset + layer.size - 4)
        (size,) = struct.unpack("<I", file.read(4))
    return size if size > layer.size else None


def summary_of(lower: Tree, top_bytes: int, newest: int) -> dict[str, int] | None:
    """Return what mke2fs is promised before the top layer is read; None: index it."""
    plan = plan_of(lower)
    if plan.marks or plan.newest > newest:
        return None
    return {
        "data_bytes": plan.data_bytes + top_bytes + top_bytes // 8,
        "inodes": plan.inodes + top_bytes // _BYTES_PER_INODE + _SPARE_INODES,
        "newest": newest,
    }


def write_streamed(
    tree: Tree, layers: list[Layer], newest: int, out: IO[bytes], progress: Progress | None = None
) -> None:
    """Apply the last of `layers` to the tree of the others, writing the merged tar meanwhile."""
    top = _Top(tree, newest, out)
    number = tree.begin_layer()
    with open_layer(layers[number], tree.limits) as stream:
        for member in members_in(stream, layers[number], number, progress):
            placed = tree.apply(member)
            if placed is None:
                continue
            top.check(placed)
            top.show_above(placed)
            if member.is_hard_link:
                top.show_link(placed)
                continue
            top.show(placed.path, placed.node)
            if placed.node.content is not None and placed.node.children is None:
                write_content(stream, placed.node.content, out)
    if tree.root.mtime > newest or other_xattrs(tree.root):
        raise CannotStream
    write_tar(top.rest(), tree, layers, out)


class _Top:
    """What mke2fs has been shown: by path, and the path of each inode that is no directory."""

    def __init__(self, tree: Tree, newest: int, out: IO[bytes]) -> None:
        self._tree = tree
        self._newest = newest
        self._out = out
        self._shown: dict[bytes, Node] = {}
        # With the nodes, so that none of them is forgotten and its id given to another.
        self._paths: dict[int, tuple[bytes, Node]] = {}
        self._linked: set[int] = set()

    def check(self, placed: Placed) -> None:
        """Raise CannotStream for what cannot be taken back or was not promised."""
        node, replaced = placed.node, placed.replaced
        if node.mtime > self._newest or (node.xattrs and other_xattrs(node)):
            raise CannotStream
        if replaced is None or self._shown.get(placed.path) is not replaced:
            return
        if replaced.children is not None or id(replaced) in self._linked:
            raise CannotStream
        del self._paths[id(replaced)]

    def show_above(self, placed: Placed) -> None:
        """Show the directories above a member: mke2fs makes none by itself."""
        path = b""
        walked = [node for node, _ in placed.trail] + [placed.parent]
        for (_, name), node in zip(placed.trail, walked[1:], strict=True):
            path = path + b"/" + name if path else name
            if self._shown.get(path) is not node:
                self.show(path, node)

    def show(self, path: bytes, node: Node) -> None:
        """Write a name with its attributes; content follows, if it has any."""
        self._out.write(header(path, node, node.mtime))
        self._shown[path] = node
        if node.children is None:
            self._paths[id(node)] = (path, node)

    def show_link(self, placed: Placed) -> None:
        """Write another name of what was shown; of a lower layer's, `rest` does."""
        known = self._paths.get(id(placed.node))
        if known is None:
            self._shown.pop(placed.path, None)
            return
        self._linked.add(id(placed.node))
        if known[0] != placed.path:
            self._out.write(header(placed.path, placed.node, placed.node.mtime, link=known[0]))
        self._shown[placed.path] = placed.node

    def rest(self) -> Plan:
        """Return what is left to write: the lower layers', as far as they show."""
        plan = plan_of(self._tree)
        links = []
        for path, known, node in plan.links:
            if self._shown.get(path) is not node:
                links.append((path, self._paths.get(id(node), (known,))[0], node))
        first, files = [], []
        for path, node in plan.first:
            if self._shown.get(path) is node:
                continue
            if id(node) in self._paths:
                links.append((path, self._paths[id(node)][0], node))
            else:
                first.append((path, node))
        for content, path, node in plan.files:
            if self._shown.get(path) is node:
                continue
            if id(node) in self._paths:
                links.append((path, self._paths[id(node)][0], node))
            else:
                files.append((content, path, node))
        return Plan(first, files, links, 0, 0, self._newest, {})
