"""Layers of any bytes: read, or refused by a designed error; never anything else."""

from __future__ import annotations

import gzip
import io
import tarfile
import tempfile
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from banger.errors import BangerError
from banger.images.layer_tars import Layer, members_of
from banger.images.layers import Limits, Node, Tree
from banger.images.merged_tar import plan_of, write_tar
from banger.images.top_layer import CannotStream, write_streamed
from tests.support.layouts import directory, hard_link, member, symlink, tar_of

_SEED = tar_of([
    directory("d"), member("d/x", data=b"x" * 700), symlink("l", "d"), hard_link("h", "d/x"),
    member("l/y", data=b"y", pax_headers={"SCHILY.xattr.user.k": "v", "path": "l/long" * 30}),
    member(".wh.d"), member("d/.wh..wh..opq"), member("n" * 200, tarfile.FIFOTYPE),
])  # fmt: skip
_LIMITS = Limits(max_entries=200, max_bytes=1 << 24)


def index_layer(tree: Tree, layer: Layer) -> None:
    """Apply a layer to a tree, as `images.flatten` does."""
    number = tree.begin_layer()
    for one in members_of(layer, number, tree.limits):
        tree.apply(one)


def _read(data: bytes) -> list[tuple[str, bytes]] | None:
    """Index a layer and write it out again; return what the tar then holds."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        layer = Layer(file.name, 0, len(data))
        tree = Tree(_LIMITS)
        try:
            index_layer(tree, layer)
            plan = plan_of(tree)
            out = io.BytesIO()
            write_tar(plan, tree, [layer], out)
        except BangerError:
            return None
    out.seek(0)
    with tarfile.open(fileobj=out, errors="surrogateescape") as archive:
        return [(info.name, info.type) for info in archive]


def _plain(found: list[tuple[str, bytes]]) -> None:
    """What goes to mke2fs has every name once, below the root, parents first."""
    names = [name for name, _ in found]
    assert len(set(names)) == len(names)
    known = {""}
    for name, kind in found[1:]:
        assert not name.startswith("/")
        assert ".." not in name.split("/")
        assert name.rpartition("/")[0] in known
        if kind == tarfile.DIRTYPE:
            known.add(name)


def test_the_seed_is_read() -> None:
    found = _read(_SEED)
    assert found is not None
    assert len(found) > 3
    assert _read(gzip.compress(_SEED)) == found


@settings(max_examples=300)
@given(st.binary(max_size=2048))
def test_any_bytes(data: bytes) -> None:
    found = _read(data)
    if found is not None:
        _plain(found)


@settings(max_examples=600)
@given(
    st.lists(
        st.tuples(st.integers(0, len(_SEED) - 1), st.binary(min_size=1, max_size=12)), max_size=4
    ),
    st.booleans(),
)
def test_a_tar_with_bytes_changed(changes: list[tuple[int, bytes]], repaired: bool) -> None:
    data = bytearray(_SEED)
    for at, new in changes:
        data[at : at + len(new)] = new
    if repaired:
        _repair(data)
    found = _read(bytes(data))
    if found is not None:
        _plain(found)


def _repair(data: bytearray) -> None:
    """Make the checksum of every block that looks like a header right again."""
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])


@settings(max_examples=200)
@given(st.integers(0, 4000), st.binary(min_size=1, max_size=8))
def test_a_packed_stream_with_bytes_changed(at: int, new: bytes) -> None:
    packed = bytearray(gzip.compress(_SEED))
    at %= len(packed)
    packed[at : at + len(new)] = new
    _read(bytes(packed))


_names = st.lists(
    st.sampled_from(["a", "b", "..", ".", "", ".wh.a", "x" * 120]), min_size=1, max_size=4
)
_members: st.SearchStrategy[Any] = st.one_of(
    _names.map(lambda parts: member("/".join(parts), data=b"1")),
    _names.map(lambda parts: directory("/".join(parts))),
    st.tuples(_names, _names).map(lambda two: symlink("/".join(two[0]), "/".join(two[1]) or "x")),
    st.tuples(_names, _names).map(lambda two: hard_link("/".join(two[0]), "/".join(two[1]))),
)


@settings(max_examples=500)
@given(st.lists(_members, max_size=8))
def test_any_members(members: list[Any]) -> None:
    found = _read(tar_of(members, tarfile.GNU_FORMAT))
    if found is not None:
        _plain(found)


def _facts(tree: Tree, tars: list[bytes]) -> dict[bytes, object]:
    """Return what each name of a tree is, with its content and the names it shares its inode with."""
    names: dict[int, set[bytes]] = {}
    for path, node in tree.walk():
        names.setdefault(id(node), set()).add(path)

    def content(node: Node) -> bytes:
        if node.content is None:
            return b""
        layer, offset, size, _ = node.content
        return tars[layer][offset : offset + size]

    return {
        path: (node.mode, node.uid, node.mtime, node.target, content(node), names[id(node)])
        for path, node in tree.walk()
    }


@settings(max_examples=800)
@given(st.lists(_members, max_size=6), st.lists(_members, min_size=1, max_size=10))
def test_a_streamed_top_layer_unpacks_to_the_merged_tree(lower: list[Any], top: list[Any]) -> None:
    """Whoever unpacks what is streamed, member by member, has what the index would have made."""
    for number, (info, _) in enumerate((*lower, *top)):
        info.uid, info.mtime = number, 1000 + number
    tars = [tar_of(lower, tarfile.GNU_FORMAT), tar_of(top, tarfile.GNU_FORMAT)]
    with tempfile.TemporaryDirectory() as directory_name:
        layers = []
        for number, tar in enumerate(tars):
            path = f"{directory_name}/{number}"
            with open(path, "wb") as file:
                file.write(tar)
            layers.append(Layer(path, 0, len(tar)))
        tree = Tree(_LIMITS)
        out = io.BytesIO()
        try:
            index_layer(tree, layers[0])
            write_streamed(tree, layers, 1 << 30, out)
        except (BangerError, CannotStream):
            return
        with open(f"{directory_name}/out", "wb") as file:
            file.write(out.getvalue())
        unpacked = Tree(_LIMITS)
        index_layer(unpacked, Layer(f"{directory_name}/out", 0, len(out.getvalue())))
    assert _facts(unpacked, [out.getvalue()]) == _facts(tree, tars)
