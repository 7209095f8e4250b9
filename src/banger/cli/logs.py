"""`vm logs` and `daemon logs`: the end of a file, followed while it grows."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator

from banger.cli import output
from banger.cli.context import Context
from banger.cli.parsing import Parser, add_json
from banger.errors import InvalidInput, NotFound

_POLL_S = 0.2  # a log is read by a human
_CHUNK_BYTES = 256 * 1024


def build_logs(parser: Parser) -> None:
    """Arguments of `vm logs` and `daemon logs`."""
    of_vm = parser.prog.split()[1] == "vm"
    if of_vm:
        parser.description = "Show a VM's console: the kernel's and init's messages."
        parser.add_argument("name", metavar="NAME")
        which = parser.add_mutually_exclusive_group()
        which.add_argument("--console", action="store_true", help="the console (the default)")
        which.add_argument("--vmm", action="store_true", help="the VMM's own log instead")
    else:
        parser.description = "Show the daemon's log."
        parser.set_defaults(name=None, vmm=False)
    parser.add_argument("-f", "--follow", action="store_true", help="go on as it grows")
    parser.add_argument("-n", "--lines", metavar="N", help="the last N lines only")
    add_json(parser, "print {path, text} instead (not with -f)")


def run_logs(context: Context, args: argparse.Namespace) -> int:
    """Show a log."""
    lines = _parse_lines(args.lines)
    if args.name is None:
        from banger.client.autostart import log_path

        path, what = log_path(context.paths), "the daemon"
    else:
        vm = context.client.get_vm(args.name)
        path, what = (vm["vmm_log"] if args.vmm else vm["console_log"]), args.name
    if not args.follow and not os.path.exists(path):
        raise NotFound(f"{what} has written no log yet", hint=f"it will be {path}")
    if context.json:
        text = b"".join(read_log(path, lines=lines, follow=False)).decode(errors="replace")
        output.write_json({"path": path, "text": text})
        return 0
    clean = Cleaner() if output.is_terminal(sys.stdout) else None
    out = sys.stdout.buffer
    for chunk in read_log(path, lines=lines, follow=args.follow):
        out.write(chunk if clean is None else clean.feed(chunk))
        out.flush()
    return 0


def _parse_lines(text: str | None) -> int | None:
    if text is None or text == "all":
        return None
    if not text.isascii() or not text.isdigit():
        raise InvalidInput(f"--lines must be a number, not {text!r}", hint="for example -n 100")
    return int(text)


def read_log(path: str, *, lines: int | None, follow: bool) -> Iterator[bytes]:
    """Yield a file's last lines (all when None), then, when following, what is added.

    A file that is replaced or cut (a restart, a full log) is read anew from its start.
    """
    fd = _open(path)
    while fd is None:
        if not follow:
            return
        time.sleep(_POLL_S)
        fd = _open(path)
    try:
        if lines is not None:
            os.lseek(fd, _start_of_last_lines(fd, lines), os.SEEK_SET)
        while True:
            while chunk := os.read(fd, _CHUNK_BYTES):
                yield chunk
            if not follow:
                return
            time.sleep(_POLL_S)
            fd = _reopened(path, fd)
    finally:
        os.close(fd)


def _open(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _reopened(path: str, fd: int) -> int:
    here = os.fstat(fd)
    if here.st_size < os.lseek(fd, 0, os.SEEK_CUR):
        os.lseek(fd, 0, os.SEEK_SET)
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return fd
    if (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev):
        return fd
    fresh = _open(path)
    if fresh is None:
        return fd
    os.close(fd)
    return fresh


def _start_of_last_lines(fd: int, lines: int) -> int:
    """Return the offset where the last `lines` lines begin, reading backwards in blocks."""
    end = os.fstat(fd).st_size
    if lines == 0:
        return end
    position = end
    wanted = lines
    while position > 0:
        size = min(_CHUNK_BYTES, position)
        position -= size
        block = os.pread(fd, size, position)
        if position + size == end and block.endswith(b"\n"):
            wanted += 1  # the newline that ends the file begins no line
        at = len(block)
        while (at := block.rfind(b"\n", 0, at)) >= 0:
            wanted -= 1
            if wanted == 0:
                return position + at + 1
    return 0


class Cleaner:
    """Makes a guest's bytes harmless to a terminal: a console log may hold any sequence.

    Colours and cursor movements vanish, other control characters are shown as text. Bytes
    of one escape sequence or one character may come in two chunks.
    """

    def __init__(self) -> None:
        import codecs
        import re

        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        # CSI, OSC (ended by BEL or ST), other two-byte escapes.
        self._whole = re.compile(
            "\x1b\\[[0-?]*[ -/]*[@-~]"
            "|\x1b\\][^\x07\x1b\n]*(?:\x07|\x1b\\\\)"
            "|\x1b[ -/]*[0-OQ-Z\\\\^_`-~]"
        )
        self._partial = re.compile("\x1b(?:\\[[0-?]*[ -/]*|\\][^\x07\x1b\n]{0,256}\x1b?|[ -/]*)?$")
        self._kept = ""

    def feed(self, chunk: bytes) -> bytes:
        """Return the printable form of the next chunk."""
        text = self._whole.sub("", self._kept + self._decode(chunk))
        cut = self._partial.search(text)
        self._kept = ""
        if cut is not None and len(cut.group()) < 512:
            self._kept = cut.group()
            text = text[: cut.start()]
        text = text.replace("\r\n", "\n").replace("\r", "")
        return output.escape(text, keep="\n\t").encode(errors="replace")


VERBS = {"logs": (build_logs, run_logs)}
