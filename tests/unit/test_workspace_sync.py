"""Here, sent and there: what goes, what stays, and a manifest that nobody has to trust."""

from __future__ import annotations

import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.errors import InvalidInput, Unavailable
from banger.services.copy_changes import (
    Seen,
    ancestors,
    changes,
    is_as,
    is_object,
    judge,
    split_git,
)
from banger.services.copy_manifest import (
    Manifest,
    check_path,
    parse_begun,
    parse_manifest,
    parse_row,
    render_begun,
    render_manifest,
    render_row,
)
from banger.services.guest_paths import check_guest_path, parse_look
from banger.services.workspaces import Entry

S = 1_000_000_000
TOKEN = "a" * 32
NAMES = st.sampled_from([b"a", b"b", b"d", b"d/x", b"d/y", b"d/e/f", b"-rf", b"n\nl", b"\xff"])


def entry(size: int, at: int, kind: str = "f") -> Entry:
    return Entry(kind, 0o777 if kind == "l" else 0o644, size, at * S + 5)


def seen_of(one: Entry) -> Seen:
    return Seen(one.kind, one.mode, one.size, one.mtime_ns // S, True)


ENTRIES = st.builds(entry, st.integers(0, 3), st.integers(0, 3), st.sampled_from(["f", "l"]))
# Of each side, no file is above another.
SIDES = st.dictionaries(NAMES, ENTRIES).map(
    lambda side: {
        path: one for path, one in side.items() if not any(a in side for a in ancestors(path))
    }
)


def with_directories(side: dict[bytes, Entry]) -> dict[bytes, Seen]:
    seen = {path: seen_of(one) for path, one in side.items()}
    for path in side:
        for above in ancestors(path):
            seen[above] = Seen("d", 0o755, 4096, 1, True)
    return seen


@given(SIDES, SIDES, SIDES)
def test_no_change_of_the_guests_is_lost(
    host: dict[bytes, Entry], base: dict[bytes, Entry], there: dict[bytes, Entry]
) -> None:
    guest = with_directories(there)
    todo = changes(host, base)
    verdict = judge(todo, host, base, guest)
    for path in [*verdict.write, *verdict.delete]:
        seen = guest.get(path)
        assert is_as(seen, base.get(path)) or is_as(seen, host.get(path))
    decided = [*verdict.write, *verdict.delete, *verdict.same, *verdict.doubts, *verdict.after]
    assert sorted(decided) == sorted([*todo.write, *todo.delete])
    for path in verdict.write:
        for above in ancestors(path):
            way = guest.get(above)
            assert way is None or way.kind == "d" or is_as(way, base.get(above))


@given(SIDES, SIDES)
def test_a_guest_that_changed_nothing_becomes_what_is_here(
    host: dict[bytes, Entry], base: dict[bytes, Entry]
) -> None:
    verdict = judge(changes(host, base), host, base, with_directories(base))
    assert verdict.doubts == {}
    left = {p: e for p, e in base.items() if p not in {*verdict.delete, *verdict.write}}
    for path in [*verdict.write, *verdict.after, *verdict.same]:
        if path in host:
            left[path] = host[path]
    assert left == host


@given(SIDES, SIDES)
def test_what_changed_there_alone_is_not_even_asked_about(
    base: dict[bytes, Entry], there: dict[bytes, Entry]
) -> None:
    assert changes(base, base) == ([], [])
    assert judge(changes(base, base), base, base, with_directories(there)) == ([], [], [], {}, [])


@given(SIDES, SIDES, st.data())
def test_a_run_that_was_killed_leaves_no_conflict(
    host: dict[bytes, Entry], base: dict[bytes, Entry], data: st.DataObject
) -> None:
    flat_host = {path: one for path, one in host.items() if b"/" not in path}
    flat_base = {path: one for path, one in base.items() if b"/" not in path}
    todo = changes(flat_host, flat_base)
    done = set(data.draw(st.lists(st.sampled_from(sorted({*todo.write, *todo.delete})))
                         if todo.write or todo.delete else st.just([])))  # fmt: skip
    there = {path: one for path, one in flat_base.items() if path not in done}
    there.update((path, flat_host[path]) for path in done if path in flat_host)
    intent = {path: flat_host[path] for path in todo.write}
    verdict = judge(todo, flat_host, flat_base, with_directories(there), intent=intent)
    assert verdict.doubts == {}


def test_one_second_and_one_size_are_no_proof_of_sameness() -> None:
    """An edit within the second of the last must go, though `stat` shows the same."""
    base, host = {b"a": Entry("f", 0o644, 4, S)}, {b"a": Entry("f", 0o644, 4, S + 7)}
    guest = {b"a": Seen("f", 0o644, 4, 1, True)}
    assert judge(changes(host, base), host, base, guest).write == [b"a"]
    # A run that was broken off before it came to this file would have said the same of it.
    assert judge(changes(host, base), host, base, guest, intent=host).write == [b"a"]
    # One that is as it was to be, and not as it was, has arrived.
    longer = {b"a": Entry("f", 0o644, 5, S + 7)}
    guest = {b"a": Seen("f", 0o644, 5, 1, True)}
    assert judge(changes(longer, base), longer, base, guest, intent=longer).same == [b"a"]


def test_a_fraction_of_a_second_is_the_guests_hand() -> None:
    assert not is_as(Seen("f", 0o644, 4, 1, False), Entry("f", 0o644, 4, S))


def test_a_link_of_the_guests_on_the_way_is_a_conflict() -> None:
    base, host = {b"d/x": entry(1, 1)}, {b"d/x": entry(2, 2)}
    guest = {b"d": Seen("l", 0o777, 4, 9, False), b"d/x": seen_of(entry(1, 1))}
    verdict = judge(changes(host, base), host, base, guest)
    assert (verdict.write, list(verdict.doubts)) == ([], [b"d/x"])


# -- the manifest


ROWS = st.dictionaries(
    st.binary(min_size=1, max_size=9).filter(lambda path: b"\0" not in path),
    st.builds(Entry, st.sampled_from("fld"), st.integers(0, 0o7777), st.integers(0, 1 << 50),
              st.integers(-S, S << 33), st.binary(max_size=9).filter(lambda t: b"\0" not in t)),
)  # fmt: skip


@given(ROWS)
def test_a_manifest_reads_back(entries: dict[bytes, Entry]) -> None:
    rows = {path: render_row(one) for path, one in entries.items()}
    objects = {b".git/objects/aa/" + b"b" * 38}
    made = Manifest("repo", True, False, rows, objects, {b"": "0" * 64}, {b"in": ("1" * 40,)})
    assert parse_manifest(render_manifest(made, TOKEN)) == (made, TOKEN)
    assert {path: parse_row(row) for path, row in rows.items()} == entries
    assert parse_begun(render_begun(TOKEN, rows)) == (entries, TOKEN)


def header(**changed: object) -> bytes:
    body = {
        "version": 1, "token": TOKEN, "name": "repo", "shallow": False, "untracked": True,
        "staged": {}, "heads": {}, "rows": 0, **changed,
    }  # fmt: skip
    return zlib.compress(json.dumps(body).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"", b"garbage", zlib.compress(b"x"), zlib.compress(b"[]"), zlib.compress(b"[" * 100_000),
        zlib.compress(bytes(300 << 20), 1), header()[:-3], header(version=2), header(token="x"),
        header(name=1), header(shallow="no"), header(rows=1), header(rows=-1), header(rows=True),
        header(staged={"": "x"}), header(staged={"../x": "0" * 64}), header(heads={"": ["--all"]}),
        header(heads={"": "x"}), header(heads={"": ["0" * 40] * 2000}), header(heads={"/x": []}),
    ],
    ids=range(20),
)  # fmt: skip
def test_a_forged_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        parse_manifest(data)


@given(st.binary())
def test_any_bytes_are_a_manifest_or_an_error(data: bytes) -> None:
    for text in (data, zlib.compress(data)):
        try:
            parse_manifest(text)
        except ValueError:
            continue


@pytest.mark.parametrize(
    "path", [b"", b"/etc/passwd", b"../x", b"a/../../x", b"a//b", b"a/", b"./a", b".git/banger/x"]
)
def test_paths_of_a_manifest_stay_below_the_copy(path: bytes) -> None:
    with pytest.raises(ValueError):
        check_path(path)


@pytest.mark.parametrize("row", [b"", b"x 644 1 1 ", b"f 9 1 1 ", b"f 644 -1 1 ", b"f 644 1"])
def test_rows_are_strict(row: bytes) -> None:
    with pytest.raises(ValueError):
        parse_row(row)


def test_parts_of_git_directories() -> None:
    assert split_git(b".git/HEAD") == (b"", b"HEAD")
    assert split_git(b"in/side/.git/objects/aa/bb") == (b"in/side", b"objects/aa/bb")
    assert split_git(b".gitignore") is split_git(b"a/.github/x") is None
    assert is_object(b"in/.git/objects/aa/bb")
    assert not is_object(b"objects/aa/bb")


# -- what the guest says


def test_stats_lines_are_matched_to_the_names_asked_for() -> None:
    asked = [b"-x", b"a\nb", b"gone", b"\xff"]
    stamp = b"2026-01-02 03:04:05.%b +0000"
    said = (
        b"81a4 3 1767323045 " + stamp % b"000000000" + b" ./-x/\n"
        b"a1ff 4 1767323045 " + stamp % b"120000000" + b" ./a\nb/\n"
        b"41ed 4096 1767323045 " + stamp % b"000000000" + b" ./\xff/\nok\n"
    )
    assert parse_look(asked, said) == {
        b"-x": Seen("f", 0o644, 3, 1767323045, True),
        b"a\nb": Seen("l", 0o777, 4, 1767323045, False),
        b"\xff": Seen("d", 0o755, 4096, 1767323045, True),
    }
    for wrong in (b"", b"ok", said[:-3], b"x" + said, said + b"more"):
        with pytest.raises(Unavailable):
            parse_look(asked, wrong)


@pytest.mark.parametrize(
    ("text", "path"),
    [("/root/x", "/root/x"), ("//srv//a/./b/", "/srv/a/b"), ("/repo", "/repo"),
     ("/usr/src/x", "/usr/src/x"), ("/root/-x", "/root/-x")],
)  # fmt: skip
def test_guest_paths(text: str, path: str) -> None:
    assert check_guest_path(text) == path


@pytest.mark.parametrize(
    "text",
    ["", "-x", "--upload-pack=x", "repo", "../x", "/root/../etc", "/", "//", "/.", "/etc", "/usr",
     "/proc", "/proc/1", "/sys/x", "/dev/shm", "/run/x", "/var/lib/banger", "/var/lib/banger/x",
     "/root/x\0y", "/root/.git/x", "/" + "x" * 2000, "/root", "/usr/bin/x"],
)  # fmt: skip
def test_guest_paths_that_lead_elsewhere_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_guest_path(text)
    assert caught.value.hint
