"""The merged tree as one tar, for mke2fs.

Owns the order in which names go out, the headers, and what mke2fs has to know before the first of
them. Runs in the process of `images.flatten` alone.
"""

from __future__ import annotations

import stat
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from banger.images.layer_tars import Layer, Progress, open_layer
from banger.images.layers import Content, Node, Tree
from banger.images.unpacking import UnpackedStream

# As images.ext4 has it, which imports asyncio.
SOURCE_DATE_EPOCH = 1686355200
BLOCK = 512
_XATTR_PREFIX = "SCHILY.xattr."
_CAPABILITY = "security.capability"  # the one that mke2fs takes from a tar
_ZEROS = bytes(1 << 20)


@dataclass(slots=True)
class Plan:
    """What is written, in order: inodes without content, files layer by layer, further names."""

    first: list[tuple[bytes, Node]]
    files: list[tuple[Content, bytes, Node]]
    links: list[tuple[bytes, bytes, Node]]
    data_bytes: int
    inodes: int
    newest: int  # the latest modification time, or our own epoch: mke2fs clamps to it
    # Extended attributes that mke2fs leaves out: (path's node, its mark) to find the inode by.
    marks: dict[int, tuple[Node, int]]


def plan_of(tree: Tree) -> Plan:
    """Sort the tree's names into a plan; the same layers give the same plan."""
    first: list[tuple[bytes, Node]] = []
    files: list[tuple[Content, bytes, Node]] = []
    links: list[tuple[bytes, bytes, Node]] = []
    named: dict[int, bytes] = {}
    times = {tree.root.mtime}
    special: list[Node] = [tree.root] if other_xattrs(tree.root) else []
    data = BLOCK * 8
    inodes = 16
    for path, node in tree.walk():
        if node.children is None:
            known = named.setdefault(id(node), path)
            if known is not path:
                links.append((path, known, node))
                continue
        inodes += 1
        times.add(node.mtime)
        if node.xattrs and other_xattrs(node):
            special.append(node)
        if node.content is not None:
            files.append((node.content, path, node))
            data += -(-node.content.size // 4096) * 4096
        else:
            first.append((path, node))
            if node.children is not None:
                # 8 bytes and the name, rounded up, in blocks that are three quarters full
                size = sum(12 + len(name) for name in node.children)
                data += 4096 * (1 + size // 3072)
            elif len(node.target) >= 60:
                data += 4096
    files.sort(key=lambda entry: entry[0])
    newest = max(*times, SOURCE_DATE_EPOCH)
    return Plan(first, files, links, data, inodes, newest, _marks(special, times, newest))


def other_xattrs(node: Node) -> dict[str, bytes]:
    """Return the extended attributes that mke2fs leaves out."""
    return {name: value for name, value in node.xattrs.items() if name != _CAPABILITY}


def _marks(special: list[Node], times: set[int], newest: int) -> dict[int, tuple[Node, int]]:
    """Give each node a modification time that no other has, so that its inode can be found."""
    marks: dict[int, tuple[Node, int]] = {}
    mark = newest - 1  # later ones are clamped by mke2fs, and `newest` is what it makes itself
    for node in special:
        while mark in times:
            mark -= 1
        marks[id(node)] = (node, mark)
        mark -= 1
    return marks


def write_tar(
    plan: Plan, tree: Tree, layers: list[Layer], out: IO[bytes], progress: Progress | None = None
) -> None:
    """Write the plan as a tar; the layers are read once more for the content."""

    def mtime_of(node: Node) -> int:
        marked = plan.marks.get(id(node))
        return node.mtime if marked is None else marked[1]

    out.write(header(b"./", tree.root, mtime_of(tree.root)))
    for path, node in plan.first:
        out.write(header(path, node, mtime_of(node)))
    written = 0
    position = 0
    while position < len(plan.files):
        number = plan.files[position][0].layer
        with open_layer(layers[number], tree.limits) as stream:
            while position < len(plan.files) and plan.files[position][0].layer == number:
                content, path, node = plan.files[position]
                out.write(header(path, node, mtime_of(node)))
                write_content(stream, content, out)
                written += content.size
                position += 1
                if progress is not None:
                    progress(written)
    for path, known, node in plan.links:
        out.write(header(path, node, mtime_of(node), link=known))
    out.write(_ZEROS[: 2 * BLOCK])
    out.flush()


def write_content(stream: UnpackedStream, content: Content, out: IO[bytes]) -> None:
    """Copy a file's content out of its layer, which is at or before it, and fill the last block."""
    stream.seek(content.offset)
    for piece in _content(stream, content):
        out.write(piece)
    out.write(_ZEROS[: -content.size % BLOCK])


def _content(stream: UnpackedStream, content: Content) -> Iterator[bytes | memoryview]:
    if content.extents is None:
        yield from stream.pieces(content.size)
        return
    at = 0
    for offset, count in content.extents:
        yield from _zeros(offset - at)
        yield from stream.pieces(count)
        at = offset + count
    yield from _zeros(content.size - at)


def _zeros(size: int) -> Iterator[bytes]:
    while size > 0:
        piece = _ZEROS[:size]
        yield piece
        size -= len(piece)


_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}
# name, mode, uid, gid, size, mtime, checksum, type, link's target, magic and version, names of
# owner and group, device: tar(5), "GNU tar Archives"
_HEADER = struct.Struct("100s8s8s8s12s12s8ss100s8s32s32s8s8s167x")
_NO_SUM = b" " * 8


def header(path: bytes, node: Node, mtime: int, *, link: bytes | None = None) -> bytes:
    """Return one member's header: GNU's form, whose names are plain bytes.

    A capability goes before it as a pax record. Hard links repeat the attributes of their
    inode, for mke2fs takes the last member's word for them.
    """
    kind = stat.S_IFMT(node.mode)
    target = node.target if link is None else link
    size = node.content.size if node.content is not None and link is None else 0
    major, minor = node.device
    before = b""
    for record, text in ((b"L", path), (b"K", target)):
        if len(text) > 100:
            before += _long(record, text)
    capability = node.xattrs.get(_CAPABILITY)
    if capability is not None:
        before = _pax(f"{_XATTR_PREFIX}{_CAPABILITY}", capability) + before
    return before + _packed(
        path[:100],
        b"%07o\0" % (node.mode & 0o7777),
        _number(node.uid, 8),
        _number(node.gid, 8),
        _number(size, 12),
        _number(mtime, 12),
        _TYPES[kind] if link is None else tarfile.LNKTYPE,
        target[:100],
        _number(major, 8),
        _number(minor, 8),
    )


def _packed(
    name: bytes, mode: bytes, uid: bytes, gid: bytes, size: bytes, mtime: bytes, kind: bytes,
    target: bytes, major: bytes, minor: bytes,
) -> bytes:  # fmt: skip
    def pack(checksum: bytes) -> bytes:
        return _HEADER.pack(
            name, mode, uid, gid, size, mtime, checksum, kind, target, b"ustar  \0", b"", b"",
            major, minor,
        )  # fmt: skip

    return pack(b"%06o\0 " % sum(pack(_NO_SUM)))


def _number(value: int, width: int) -> bytes:
    """Return a field of a header: octal, or base 256 with a high bit where that is too short."""
    if value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return b"\x80" + value.to_bytes(width - 1, "big")


def _long(kind: bytes, text: bytes) -> bytes:
    """Return GNU's member that holds a name longer than a header has room for."""
    text += b"\0"
    zero = _number(0, 8)
    head = _packed(b"././@LongLink", zero, zero, zero, _number(len(text), 12), _number(0, 12), kind,
                   b"", zero, zero)  # fmt: skip
    return head + text + bytes(-len(text) % BLOCK)


def _pax(key: str, value: bytes) -> bytes:
    """Return an extended header of one record: length, key and value, pax(1)."""
    body = b" " + key.encode() + b"=" + value + b"\n"
    length = len(body)
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    record = str(length).encode() + body
    info = tarfile.TarInfo("././@PaxHeader")
    info.type = tarfile.XHDTYPE
    info.size = len(record)
    return info.tobuf(tarfile.USTAR_FORMAT) + record + bytes(-len(record) % BLOCK)
