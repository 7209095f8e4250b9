"""Escaping, sizes, tables, logs: what may reach a terminal."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.cli import logs, output


@given(st.text() | st.binary().map(os.fsdecode))
def test_escaped_text_is_printable(text: str) -> None:
    escaped = output.escape(text)
    assert not any(ord(c) < 0x20 or 0x7F <= ord(c) <= 0x9F for c in escaped)
    escaped.encode()  # no lone surrogate is left


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E)))
def test_plain_text_stays(text: str) -> None:
    assert output.escape(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("t\u00e9t\u00e9", "t\u00e9t\u00e9"),
        ("a\nb", "a\\nb"),
        ("\x1b]0;x\x07", "\\x1b]0;x\\x07"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        (os.fsdecode(b"\xff"), "\\xff"),
    ],
)
def test_escape(text: str, shown: str) -> None:
    assert output.escape(text) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (3 << 20, "3 MiB"),
     ((1 << 20) - 1, "1 MiB"), (20 << 30, "20 GiB"), (5 << 50, "5120 TiB")],
)  # fmt: skip
def test_format_bytes(count: int, shown: str) -> None:
    assert output.format_bytes(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0s"), (61, "1m 1s"), (3700, "1h 1m"), (90000, "1d 1h"), (-5, "0s")]
)
def test_format_duration(seconds: float, shown: str) -> None:
    assert output.format_duration(seconds) == shown


# -- logs


@given(st.lists(st.binary(max_size=20)))
def test_cleaned_console_has_no_control_characters(chunks: list[bytes]) -> None:
    cleaner = logs.Cleaner()
    text = b"".join(cleaner.feed(chunk) for chunk in chunks).decode()
    assert not any((ord(c) < 0x20 and c not in "\n\t") or 0x7F <= ord(c) <= 0x9F for c in text)


@given(st.integers(1, 30))
def test_escape_sequences_vanish_wherever_the_chunks_are_cut(size: int) -> None:
    raw = b"ok \x1b[32mgreen\x1b[0m\r\n\x1b]0;title\x07x\x1b(B t\xc3\xa9\n"
    cleaner = logs.Cleaner()
    pieces = [raw[i : i + size] for i in range(0, len(raw), size)]
    text = b"".join(cleaner.feed(piece) for piece in pieces).decode()
    assert text == "ok green\nx t\u00e9\n"


@given(st.binary(max_size=200).map(lambda data: data.replace(b"\r", b"\n")), st.integers(0, 8))
def test_last_lines_are_those_of_tail(data: bytes, count: int) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        found = b"".join(logs.read_log(file.name, lines=count, follow=False))
    lines = data.split(b"\n")
    parts = [line + b"\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
    assert found == b"".join(parts[-count:] if count else [])


def test_follow_sees_what_is_added_and_a_cut_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\n")
    found: list[bytes] = []
    stream = logs.read_log(str(path), lines=None, follow=True)

    def reader() -> None:
        for chunk in stream:
            found.append(chunk)
            if b"end" in chunk:
                return

    thread = threading.Thread(target=reader)
    thread.start()

    def wait_for(text: bytes) -> None:
        deadline = time.monotonic() + 10
        while text not in b"".join(found):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    wait_for(b"one\n")
    with open(path, "ab") as file:
        file.write(b"two\n")
    wait_for(b"two\n")
    path.write_bytes(b"3\n")
    wait_for(b"3\n")
    (tmp_path / "new").write_bytes(b"replaced end\n")
    os.replace(tmp_path / "new", path)
    wait_for(b"replaced end\n")
    thread.join(10)
    stream.close()


@given(st.integers(0, 4_000_000_000))
def test_elapsed_since_reads_rfc_3339(seconds: int) -> None:
    from banger.cli import vm_show

    text = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
    expected = max(0.0, time.time() - seconds)
    assert abs(vm_show.elapsed_since(text) - expected) < 5
    assert vm_show.elapsed_since("soon") == vm_show.elapsed_since(None) == 0.0
