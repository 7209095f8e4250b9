"""What reaches the terminal: tables, JSON, notices, and the escaping of everybody's bytes.

Names, paths and messages come from guests, images and repositories: on their way to a
terminal every control character is shown as text, never sent.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from banger.errors import BangerError

# Bidirectional controls reorder what is read; the separators break lines in some terminals.
_TRICKS = frozenset(
    [0x061C, 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF]
)


def escape(text: str, *, keep: str = "") -> str:
    """Return `text` with control characters, undecodable bytes and bidi tricks made visible.

    `keep` lists control characters that may pass (a newline, a tab).
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape_character(character, keep) for character in text)


def _escape_character(character: str, keep: str) -> str:
    if character in keep:
        return character
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # a byte that is not UTF-8, carried by surrogateescape
        return f"\\x{number - 0xDC00:02x}"
    if number < 0x20 or 0x7F <= number <= 0x9F:
        return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(character, f"\\x{number:02x}")
    if number in _TRICKS or 0xD800 <= number <= 0xDFFF:
        return f"\\u{number:04x}"
    return character


def is_terminal(stream: IO[str]) -> bool:
    """Tell whether a stream is a terminal; a closed one is not."""
    try:
        return stream.isatty()
    except (ValueError, AttributeError):
        return False


def wants_colour(stream: IO[str]) -> bool:
    """Tell whether colours are welcome: a terminal, and NO_COLOR (no-color.org) not set."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and _term() != "dumb"


def wants_live() -> bool:
    """Tell whether the terminal can rewrite a line."""
    return _term() != "dumb"


def terminal_width() -> int:
    """Return the columns of the terminal on stderr, or 80."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _term() -> str:
    return os.environ.get("TERM", "dumb")


def paint(text: str, code: str, stream: IO[str]) -> str:
    """Wrap `text` in an SGR code where colours are welcome."""
    return f"\x1b[{code}m{text}\x1b[0m" if wants_colour(stream) else text


def write_json(value: Any, stream: IO[str] | None = None) -> None:
    """Print a value as indented JSON."""
    import json

    out = sys.stdout if stream is None else stream
    # ASCII: lone surrogates (names that are not UTF-8) would not encode otherwise.
    out.write(json.dumps(value, indent=2) + "\n")


def write_json_line(value: Any, stream: IO[str]) -> None:
    """Print a value as one line of JSON and flush it."""
    import json

    stream.write(json.dumps(value) + "\n")
    stream.flush()


def write_line(text: str = "") -> None:
    """Print one line on stdout, escaped."""
    _write(sys.stdout, escape(text))


def notice(text: str) -> None:
    """Print one line on stderr."""
    _write(sys.stderr, f"banger: {escape(text)}")


def warn(text: str) -> None:
    """Print a warning on stderr."""
    _write(sys.stderr, f"banger: {paint('warning:', '33', sys.stderr)} {escape(text)}")


def write_error(error: BangerError, subject: str = "") -> None:
    """Print an error and its hint on stderr."""
    head = paint("banger:", "31", sys.stderr)
    about = f"{escape(subject)}: " if subject else ""
    _write(sys.stderr, f"{head} {about}{escape(error.message)}")
    if error.hint:
        _write(sys.stderr, f"hint: {escape(error.hint)}")


def error_body(error: BangerError) -> dict[str, Any]:
    """Return an error as the JSON of `--json` and of the wire."""
    return {"error": {"code": error.code, "message": error.message, "hint": error.hint}}


def _write(stream: IO[str], text: str) -> None:
    try:
        stream.write(text + "\n")
    except UnicodeEncodeError:  # a terminal that is not UTF-8
        stream.write(text.encode("ascii", "backslashreplace").decode() + "\n")
    if stream is sys.stderr:
        stream.flush()


def write_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()
) -> None:
    """Print rows in columns as wide as their widest cell; columns named in `right` end flush."""
    cells = [list(header), *([escape(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    flush = {column for column, name in enumerate(header) if name in right}
    for number, row in enumerate(cells):
        line = "  ".join(
            cell.rjust(widths[column]) if column in flush else cell.ljust(widths[column])
            for column, cell in enumerate(row)
        ).rstrip()
        _write(sys.stdout, paint(line, "1", sys.stdout) if number == 0 else line)


def write_fields(fields: Iterable[tuple[str, str]]) -> None:
    """Print `name: value` lines with the values in one column."""
    found = list(fields)
    width = max((len(name) for name, _ in found), default=0) + 2
    for name, value in found:
        _write(sys.stdout, f"{name + ':':<{width}}{escape(value)}")


def format_bytes(count: int) -> str:
    """Return bytes in the largest unit that keeps three digits: `512 MiB`, `1.5 GiB`."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1023.95 or unit == "TiB":
            break
    return f"{value:.{0 if value >= 100 else 1}f}".removesuffix(".0") + f" {unit}"


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units: `42s`, `3m 5s`, `2d 4h`."""
    left = max(0, int(seconds))
    if left < 60:
        return f"{left}s"
    if left < 3600:
        return f"{left // 60}m {left % 60}s"
    if left < 86400:
        return f"{left // 3600}h {left % 3600 // 60}m"
    return f"{left // 86400}d {left % 86400 // 3600}h"


def confirm(question: str) -> bool:
    """Ask on the terminal; anything but a yes is a no."""
    sys.stderr.write(f"{escape(question)} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
