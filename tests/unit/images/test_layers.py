"""The merge of layers, held against a plain model of the specification and against its letter."""

from __future__ import annotations

import stat
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from banger.errors import InvalidInput
from banger.images.layers import Content, Limits, Member, Tree, split

DIR, FILE, LINK = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777


def d(name: str, mode: int = 0o755) -> Member:
    return Member(name.encode(), stat.S_IFDIR | mode)


def f(name: str, mark: int = 0) -> Member:
    return Member(name.encode(), FILE, mtime=mark)


def ln(name: str, target: str) -> Member:
    return Member(name.encode(), LINK, target=target.encode())


def hard(name: str, target: str) -> Member:
    return Member(name.encode(), FILE, is_hard_link=True, target=target.encode())


def merged(*layers: list[Member], limits: Limits | None = None) -> Tree:
    tree = Tree(limits)
    for layer in layers:
        tree.begin_layer()
        for member in layer:
            tree.apply(member)
    return tree


def names(*layers: list[Member]) -> set[str]:
    return {path.decode() for path, _ in merged(*layers).walk()}


# -- the letter of layer.md


def test_whiteout_hides_a_lower_file_and_a_lower_directory() -> None:
    assert names([d("a"), f("a/x"), d("b"), f("b/y")], [f("a/.wh.x"), f(".wh.b")]) == {"a"}


def test_whiteout_spares_its_own_layer_in_either_order() -> None:
    for order in ([f("x", 2), f(".wh.x")], [f(".wh.x"), f("x", 2)]):
        tree = merged([f("x", 1)], order)
        assert {path: node.mtime for path, node in tree.walk()} == {b"x": 2}


def test_whiteout_of_a_directory_spares_what_its_own_layer_put_below() -> None:
    assert names([d("a"), f("a/old")], [d("a"), f("a/new"), f(".wh.a")]) == {"a", "a/new"}


def test_opaque_hides_lower_entries_only_wherever_it_stands() -> None:
    lower = [d("a"), f("a/x"), d("a/b"), f("a/b/y")]
    for upper in (
        [d("a"), f("a/.wh..wh..opq"), f("a/n")],
        [d("a"), f("a/n"), f("a/.wh..wh..opq")],
    ):
        assert names(lower, upper) == {"a", "a/n"}


def test_opaque_root() -> None:
    assert names([d("a"), f("a/x"), f("y")], [f(".wh..wh..opq"), f("z")]) == {"z"}


def test_whiteouts_of_what_is_not_there_do_nothing() -> None:
    assert names([f("x")], [f(".wh.y"), f("no/such/.wh.z"), f("no/.wh..wh..opq")]) == {"x"}


def test_aufs_bookkeeping_is_passed_over() -> None:
    assert names([f("x")], [d(".wh..wh.plnk"), f(".wh..wh.aufs"), f(".wh..wh.orph")]) == {"x"}


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "a/.wh.."])
def test_a_whiteout_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="whiteout of nothing"):
        merged([f(name)])


def test_a_directory_becomes_a_file_and_back() -> None:
    assert names([d("a"), f("a/x")], [f("a")]) == {"a"}
    assert names([f("a")], [d("a"), f("a/x")]) == {"a", "a/x"}
    # what the file hid does not come back with the directory
    assert names([d("a"), f("a/x")], [f("a"), d("a"), f("a/n")]) == {"a", "a/n"}


def test_a_directory_again_keeps_its_content_and_takes_its_attributes() -> None:
    tree = merged([d("a"), f("a/x")], [d("a", 0o700)])
    assert {path: node.mode & 0o7777 for path, node in tree.walk()} == {b"a": 0o700, b"a/x": 0o644}


def test_the_last_member_of_a_name_wins_within_a_layer() -> None:
    tree = merged([f("x", 1), f("x", 2), ln("x", "y"), f("x", 3)])
    assert [(path, node.mtime) for path, node in tree.walk()] == [(b"x", 3)]


# -- hard links


def test_hard_links_cross_layers_and_outlive_the_other_name() -> None:
    tree = merged([f("a", 7)], [hard("b", "a"), f(".wh.a")])
    assert [(path, node.mtime) for path, node in tree.walk()] == [(b"b", 7)]


def test_a_replaced_name_leaves_the_other_alone() -> None:
    tree = merged([f("a", 1), hard("b", "a")], [f("a", 2)])
    assert {path: node.mtime for path, node in tree.walk()} == {b"a": 2, b"b": 1}


def test_hard_link_through_a_symbolic_link_of_a_directory() -> None:
    tree = merged([d("usr"), d("usr/lib"), f("usr/lib/x", 5), ln("lib", "usr/lib")],
                  [hard("y", "lib/x")])  # fmt: skip
    assert dict(tree.walk())[b"y"] is dict(tree.walk())[b"usr/lib/x"]


@pytest.mark.parametrize("target", ["nothing", "", "d/nothing", "x/below"])
def test_a_hard_link_to_nothing_is_refused(target: str) -> None:
    with pytest.raises(InvalidInput, match="not there"):
        merged([f("x"), d("d"), hard("y", target)])


def test_a_hard_link_to_a_directory_is_refused() -> None:
    with pytest.raises(InvalidInput, match="directory"):
        merged([d("d"), hard("y", "d")])


# -- parents


def test_parents_are_resolved_inside_the_image() -> None:
    usr = [d("usr"), d("usr/lib"), ln("lib", "usr/lib"), ln("abs", "/usr"), ln("up", "../../usr")]
    assert {"usr/lib/a", "usr/b", "usr/c"} <= names(usr, [f("lib/a"), f("abs/b"), f("up/c")])
    assert "usr/lib/x" not in names([*usr, f("usr/lib/x")], [f("lib/.wh.x")])
    assert "usr/lib/x" not in names([*usr, f("usr/lib/x")], [f("lib/.wh..wh..opq")])


def test_a_dangling_parent_makes_its_target() -> None:
    assert names([ln("run", "/var/run")], [f("run/x")]) == {"run", "var", "var/run", "var/run/x"}


def test_a_directory_entry_replaces_a_symbolic_link() -> None:
    assert names([d("u"), ln("l", "u")], [d("l"), f("l/x")]) == {"u", "l", "l/x"}


def test_circles_of_links_end() -> None:
    with pytest.raises(InvalidInput, match="circles"):
        merged([ln("a", "b"), ln("b", "a"), f("a/x")])


def test_nothing_lies_below_a_file() -> None:
    with pytest.raises(InvalidInput, match="no directory"):
        merged([f("a"), f("a/x")])


def test_dotdot_never_leaves_the_image() -> None:
    assert names([f("../../etc/passwd"), f("/a/../../b")]) == {"etc", "etc/passwd", "b"}


def test_the_root_is_a_directory() -> None:
    tree = merged([Member(b"./", stat.S_IFDIR | 0o711, uid=3)])
    assert (tree.root.mode & 0o7777, tree.root.uid) == (0o711, 3)
    with pytest.raises(InvalidInput, match="root"):
        merged([f("./")])


# -- names and limits


def test_names_of_any_bytes() -> None:
    odd = [b"\xff\xfe", b"new\nline", b"x" * 255, "ü".encode(), b"-rf", b" "]
    tree = merged([Member(name, FILE) for name in odd])
    assert {path for path, _ in tree.walk()} == set(odd)


def test_names_no_file_system_takes() -> None:
    for name in (b"x" * 256, b"a\0b", b"/".join([b"d" * 200] * 30)):
        with pytest.raises(InvalidInput):
            merged([Member(name, FILE)])


def test_limits_are_said_by_name() -> None:
    with pytest.raises(InvalidInput, match="3 entries") as caught:
        merged([f(str(n)) for n in range(4)], limits=Limits(max_entries=3))
    assert "import_limits.max_entries" in caught.value.hint
    big = Member(b"x", FILE, content=Content(0, 0, 600))
    with pytest.raises(InvalidInput, match="1000 bytes"):
        merged([big], [big], limits=Limits(max_bytes=1000))
    with pytest.raises(InvalidInput, match="4 directories deep"):
        merged([f("a/b/c/d/e")], limits=Limits(max_depth=4))
    # links make a short name deep
    deep = [ln("l", "a/b/c"), f("l/m/x")]
    with pytest.raises(InvalidInput, match="deep"):
        merged(deep, limits=Limits(max_depth=3))


def test_overlayfs_notes_do_not_reach_the_guest() -> None:
    member = Member(b"d", DIR, xattrs={"trusted.overlay.opaque": b"y", "user.mine": b"1"})
    assert dict(merged([member]).walk())[b"d"].xattrs == {"user.mine": b"1"}


@given(st.binary(max_size=60))
def test_split_never_yields_what_climbs(name: bytes) -> None:
    if b"\0" in name:
        return
    assert not {b"", b".", b".."} & set(split(name, 256))


# -- a plain model: each layer as an overlay over the ones below


@dataclass
class Model:
    """Paths to marks; a layer is laid over the whole below, not walked member by member."""

    files: dict[tuple[str, ...], tuple[str, int]] = field(default_factory=dict)

    def lay(self, members: list[tuple[str, tuple[str, ...], int]]) -> None:
        upper: dict[tuple[str, ...], tuple[str, int]] = {}
        hidden: set[tuple[str, ...]] = set()  # nothing of the lower layers shows here or below
        opaque: set[tuple[str, ...]] = set()  # nothing of the lower layers shows below
        for kind, path, mark in members:
            if kind == "wh":
                hidden.add(path)
            elif kind == "opq":
                opaque.add(path)
            elif kind == "dir":
                if path in upper and upper[path][0] != "dir":
                    del upper[path]
                below = {**self.files, **upper}.get(path)
                if below is not None and below[0] != "dir":
                    hidden.add(path)
                upper[path] = ("dir", mark)
            else:
                for other in [one for one in upper if one[: len(path)] == path]:
                    del upper[other]
                hidden.add(path)
                upper[path] = (kind, mark)
        lower = {
            path: entry
            for path, entry in self.files.items()
            if not any(path[:n] in hidden for n in range(1, len(path) + 1))
            and not any(path[:n] in opaque for n in range(len(path)))
        }
        self.files = {**lower, **upper}


_parts = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(tuple)
_steps = st.lists(
    st.tuples(st.sampled_from(["dir", "file", "file", "wh", "opq"]), _parts, st.integers(1, 99)),
    max_size=8,
)


@settings(max_examples=400, deadline=None)
@given(st.lists(_steps, min_size=1, max_size=4))
def test_any_stack_is_what_the_model_says(
    stacks: list[list[tuple[str, tuple[str, ...], int]]],
) -> None:
    model, tree = Model(), Tree()
    for steps in stacks:
        tree.begin_layer()
        members: list[tuple[str, tuple[str, ...], int]] = []
        for kind, path, mark in steps:
            # As builders do: a layer names the directories above what it changes.
            for depth in range(1, len(path)):
                members.append(("dir", path[:depth], mark))
            if kind == "opq":
                members.append(("dir", path, mark))
            members.append((kind, path, mark))
        model.lay(members)
        for kind, path, mark in members:
            name = "/".join(path)
            if kind == "wh":
                tree.apply(f("/".join((*path[:-1], ".wh." + path[-1]))))
            elif kind == "opq":
                tree.apply(f(name + "/.wh..wh..opq"))
            elif kind == "dir":
                tree.apply(Member(name.encode(), DIR, mtime=mark))
            else:
                tree.apply(f(name, mark))
    found = {
        tuple(path.decode().split("/")): (
            "dir" if node.children is not None else "file",
            node.mtime,
        )
        for path, node in tree.walk()
    }
    assert found == model.files
