"""Layers in, one tar out: the process that reads hostile archives.

`python -m banger.images.flatten TAR_FD` reads lines of JSON from stdin, in this order:

    {"limits": {...}}                                  once; the fields of `layers.Limits`
    {"layer": {"path", "offset", "size", "diff_id"}}   for each, from the bottom up
    (end of file)                                      an empty diff_id is not checked

It indexes each layer as it comes, writes `{"summary": {...}}` to stdout, then the merged tar to
TAR_FD, and ends with `{"done": {...}}`. `{"progress": bytes}`, `{"warning": text}` and
`{"error": {"code", "message"}}` may come at any time. It is a process of its own so that
decoders and header parsers that go wrong take nothing with them but the import, its memory
is bounded and given back, and the daemon goes on answering.

The tar is read twice, once for the index and once for the content: a later layer decides
what an earlier one contributes, and memory and disk are dearer than inflating again.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import stat
import struct
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, cast

from banger.errors import BangerError, Corrupted, InvalidInput
from banger.images.layers import Content, Limits, Member, Node, Tree, check_xattrs
from banger.images.unpacking import UnpackedStream

_MEMORY_CEILING_BYTES = 4 << 30
_XATTR_PREFIX = "SCHILY.xattr."
_CAPABILITY = "security.capability"  # the one that mke2fs takes from a tar
# What fits into an inode's spare room and one block; mke2fs -O ea_inode would allow more.
_MAX_XATTRS_BYTES = 3800
_PROGRESS_INTERVAL_S = 0.1
_BLOCK = 512
# As images.ext4 has it, which imports asyncio.
SOURCE_DATE_EPOCH = 1686355200
_MAX_TIME = (1 << 31) - 1  # mke2fs writes 32 bits
_MAX_ID = (1 << 32) - 2  # 4294967295 is "no id" to chown(2)
_ZEROS = bytes(1 << 20)
_READERS = 4
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's file, and the digest of its unpacked bytes if that is to be checked."""

    path: str
    offset: int
    size: int
    diff_id: str = ""


class _StrictInfo(tarfile.TarInfo):
    """tarfile takes a damaged header for the archive's end; here it is an error."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if not buf or buf.count(0) == _BLOCK == len(buf):
                raise
            raise Corrupted(f"a layer's tar is damaged: {error}") from error


@contextlib.contextmanager
def open_layer(layer: Layer, limits: Limits, *, hashed: bool = False) -> Iterator[UnpackedStream]:
    """Open a layer's file at its offset as the stream of what is packed in it."""
    with open(layer.path, "rb", buffering=0) as file:
        file.seek(layer.offset)
        stream = UnpackedStream(file, layer.size, max_expansion=limits.max_expansion, hashed=hashed)
        try:
            yield stream
        finally:
            stream.close()


def index_layer(tree: Tree, layer: Layer) -> None:
    """Apply a layer's members to the tree; raise InvalidInput or Corrupted for a bad layer."""
    number = tree.begin_layer()
    for member in members_of(layer, number, tree.limits):
        tree.apply(member)


def members_of(
    layer: Layer, number: int, limits: Limits, progress: Progress | None = None
) -> Iterator[Member]:
    """Yield a layer's members; raise InvalidInput or Corrupted for a bad layer."""
    content_end = 0
    with open_layer(layer, limits, hashed=layer.diff_id.startswith("sha256:")) as stream:
        try:
            with tarfile.open(
                fileobj=cast("IO[bytes]", stream),
                mode="r:",
                tarinfo=_StrictInfo,
                encoding="utf-8",
                errors="surrogateescape",
            ) as archive:
                for info in archive:
                    content_end = info.offset_data + (0 if info.sparse else info.size)
                    archive.members = []  # type: ignore[attr-defined]  # else it keeps them all
                    member = member_of(info, number)
                    if member is not None:
                        yield member
                    if progress is not None:
                        progress(stream.tell())
        except tarfile.ReadError as error:
            # umoci writes layers that end with the last file's last byte. What was cut elsewhere
            # ends before it, and its digest would differ anyway.
            is_whole = 0 < content_end <= stream.tell()
            if "empty file" not in str(error) and not is_whole:
                raise Corrupted(f"a layer's tar does not read: {error}") from error
        except (tarfile.TarError, ValueError, OverflowError, IndexError) as error:
            raise Corrupted(f"a layer's tar does not read: {error}") from error
        except RecursionError as error:
            raise InvalidInput("a layer's tar nests its headers without end") from error
        found = stream.drain()
    if found and found != layer.diff_id:
        raise Corrupted(f"a layer unpacks to {found}, the image says {layer.diff_id}")


def member_of(info: tarfile.TarInfo, layer: int) -> Member | None:
    """Return a tar header as a Member; None for kinds that unpackers skip."""
    name = _bytes(info.name)
    content = None
    device = (0, 0)
    target = b""
    if info.isreg():
        kind = stat.S_IFREG
        extents = None
        if info.sparse is not None:
            extents = _extents(info)
        if info.size:
            content = Content(layer, info.offset_data, info.size, extents)
    elif info.isdir():
        kind = stat.S_IFDIR
    elif info.issym():
        kind = stat.S_IFLNK
        target = _bytes(info.linkname)
        if not target or len(target) > 4095 or b"\0" in target:
            raise InvalidInput(f"a layer has an unusable symbolic link: {info.name[:120]!r}")
    elif info.islnk():
        kind = stat.S_IFREG
        target = _bytes(info.linkname)
    elif info.ischr() or info.isblk():
        kind = stat.S_IFCHR if info.ischr() else stat.S_IFBLK
        device = (info.devmajor, info.devminor)
        if not (0 <= device[0] < 1 << 12 and 0 <= device[1] < 1 << 20):
            raise InvalidInput(f"a layer has an unusable device node: {info.name[:120]!r}")
    elif info.isfifo():
        kind = stat.S_IFIFO
    elif info.type in (tarfile.XGLTYPE, b"V"):  # a volume's label
        return None
    else:
        raise InvalidInput(f"a layer has a member of unknown kind {info.type!r}: {info.name!r}")
    if not (0 <= info.uid <= _MAX_ID and 0 <= info.gid <= _MAX_ID):
        raise InvalidInput(f"a layer has an unusable owner: {info.name[:120]!r}")
    xattrs = _xattrs(info)
    check_xattrs(name, xattrs)
    return Member(
        name=name,
        # Linux has no modes on symbolic links: they show as 0777 whatever a tar says.
        mode=kind | (0o777 if kind == stat.S_IFLNK else info.mode & 0o7777),
        uid=info.uid,
        gid=info.gid,
        mtime=min(max(int(info.mtime), 0), _MAX_TIME),
        is_hard_link=info.islnk(),
        target=target,
        device=device,
        xattrs=xattrs,
        content=content,
    )


def _extents(info: tarfile.TarInfo) -> tuple[tuple[int, int], ...]:
    extents = []
    end = 0
    # typeshed calls it bytes; it is a list of (offset, bytes).
    for offset, count in cast("list[tuple[int, int]]", info.sparse or []):
        if not count:
            continue  # marks the end, or fills the header's table
        if offset < end or count < 0 or offset + count > info.size:
            raise Corrupted(f"a layer has a damaged sparse file: {info.name[:120]!r}")
        end = offset + count
        extents.append((offset, count))
    return tuple(extents)


def _xattrs(info: tarfile.TarInfo) -> dict[str, bytes]:
    if not info.pax_headers:
        return {}
    return {
        key[len(_XATTR_PREFIX) :]: value.encode("utf-8", "surrogateescape")
        for key, value in info.pax_headers.items()
        if key.startswith(_XATTR_PREFIX)
    }


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


# -- the tar that goes to mke2fs


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
    special: list[Node] = [tree.root] if _other_xattrs(tree.root) else []
    data = _BLOCK * 8
    inodes = 16
    for path, node in tree.walk():
        if node.children is None:
            known = named.setdefault(id(node), path)
            if known is not path:
                links.append((path, known, node))
                continue
        inodes += 1
        times.add(node.mtime)
        if node.xattrs and _other_xattrs(node):
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


def _other_xattrs(node: Node) -> dict[str, bytes]:
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
                stream.seek(content.offset)
                for piece in _content(stream, content):
                    out.write(piece)
                out.write(_ZEROS[: -content.size % _BLOCK])
                written += content.size
                position += 1
                if progress is not None:
                    progress(written)
    for path, known, node in plan.links:
        out.write(header(path, node, mtime_of(node), link=known))
    out.write(_ZEROS[: 2 * _BLOCK])
    out.flush()


def _content(stream: Any, content: Content) -> Iterator[bytes | memoryview]:
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
    return head + text + bytes(-len(text) % _BLOCK)


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
    return info.tobuf(tarfile.USTAR_FORMAT) + record + bytes(-len(record) % _BLOCK)


# -- the process


def main() -> int:
    """Serve one import; see the module's docstring."""
    # Memory, not address space alone, is what a hostile index would eat.
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_CEILING_BYTES, _MEMORY_CEILING_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A decoder's thread wants the interpreter for microseconds every 2 ms; at the default it waits
    # for 5 ms each time, and the index takes a third longer.
    sys.setswitchinterval(0.0001)
    try:
        _serve(int(sys.argv[1]), sys.stdin.buffer)
    except BangerError as error:
        _say({"error": {"code": error.code, "message": error.message, "hint": error.hint}})
        return 1
    except MemoryError:
        _say({"error": {"code": "invalid_input", "message": "the image needs too much memory"}})
        return 1
    except BrokenPipeError:
        return 2  # mke2fs ended first and says why
    return 0


def _serve(tar_fd: int, lines: Iterable[bytes]) -> None:
    layers: list[Layer] = []
    limits = Limits()
    teller = _Teller()
    # Layers are read side by side and applied in order: the decoders need no lock.
    readers = ThreadPoolExecutor(max_workers=_READERS)
    reading: list[Future[list[Member]]] = []
    for line in lines:
        message = json.loads(line)
        if "limits" in message:
            limits = Limits(**message["limits"])
            continue
        layer = Layer(**message["layer"])
        reading.append(readers.submit(_collect, layer, len(layers), limits, teller))
        layers.append(layer)
    tree = Tree(limits)
    for one in reading:
        tree.begin_layer()
        for member in one.result():
            tree.apply(member)
    plan = plan_of(tree)
    xattrs = _checked_xattrs(plan)
    summary = {"data_bytes": plan.data_bytes, "inodes": plan.inodes, "newest": plan.newest}
    _say({"summary": summary})
    told = _Teller()
    with os.fdopen(tar_fd, "wb", buffering=1 << 18) as out:
        write_tar(plan, tree, layers, out, lambda done: told.tell(0, done))
        with contextlib.suppress(BrokenPipeError):
            out.flush()
    _say({"done": {"entries": tree.entries, "xattrs": xattrs}})


def _collect(layer: Layer, number: int, limits: Limits, teller: _Teller) -> list[Member]:
    """Return a layer's members, no more of them than an image may have in all."""
    members: list[Member] = []
    for member in members_of(layer, number, limits, lambda done: teller.tell(number, done)):
        members.append(member)
        if len(members) > limits.max_entries:
            break  # applying them says so
    return members


def _checked_xattrs(plan: Plan) -> list[dict[str, Any]]:
    """Return what is left for debugfs: mark, real time and attributes (hex) of each inode."""
    found = []
    for node, mark in plan.marks.values():
        wanted = _other_xattrs(node)
        if sum(len(name) + len(value) + 16 for name, value in wanted.items()) > _MAX_XATTRS_BYTES:
            _say({"warning": "extended attributes above 3800 bytes of one file are left out"})
            wanted = {}
        found.append(
            {
                "mark": mark,
                "mtime": node.mtime,
                "xattrs": {name: value.hex() for name, value in sorted(wanted.items())},
            }
        )
    return found


class _Teller:
    """Tells bytes done of all layers, at most ten times a second."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}
        self._told_at = 0.0

    def tell(self, part: int, done: int) -> None:
        self._done[part] = done
        now = time.monotonic()
        if now - self._told_at >= _PROGRESS_INTERVAL_S:
            self._told_at = now
            _say({"progress": sum(self._done.values())})


def _say(message: dict[str, Any]) -> None:
    # One write: two threads may tell at once.
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    # Not sys.exit: readers of other layers may still be at it, and nobody waits for them.
    _status = main()
    sys.stdout.flush()
    os._exit(_status)
