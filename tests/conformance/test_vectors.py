"""The vectors that `go test ./stream ./exec` runs too: one table, two codecs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from banger.guest import frames

VECTORS = Path(__file__).parent / "vectors"


def load(name: str) -> list[dict]:
    return json.loads((VECTORS / f"{name}.json").read_text())


def unhex(text: str) -> bytes:
    """`78*3` is 787878."""
    out = b""
    for word in text.split():
        digits, _, count = word.partition("*")
        out += bytes.fromhex(digits) * int(count or 1)
    return out


@pytest.mark.parametrize("step", [1, 3, 1 << 20])
@pytest.mark.parametrize("case", load("agent_frames"), ids=lambda case: case["name"])
def test_agent_frames_decode_as_the_table_says(case: dict, step: int) -> None:
    raw = unhex(case["bytes"])
    decoder = frames.Decoder()
    got, error = [], False
    try:
        for start in range(0, len(raw), step):
            decoder.feed(raw[start : start + step])
            while (frame := decoder.next_frame()) is not None:
                got.append(frame)
    except frames.ProtocolError:
        error = True
    assert [(kind, unhex(payload)) for kind, payload in case["frames"]] == got
    assert case["error"] == error


@pytest.mark.parametrize("case", load("host_frames"), ids=lambda case: case["name"])
def test_what_we_encode_is_what_the_agent_decodes(case: dict) -> None:
    if not case["error"]:
        encoded = b"".join(frames.encode(kind, unhex(p)) for kind, p in case["frames"])
        assert unhex(case["bytes"])[: len(encoded)] == encoded


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    "case", [c for c in load("hello_scan") if c["side"] == "host"], ids=lambda case: case["name"]
)
def test_hello_ok_is_found_as_the_table_says(case: dict, step: int) -> None:
    raw = unhex(case["bytes"])
    scanner = frames.HelloScanner(case["nonce"])
    for start in range(0, len(raw), step):
        body = scanner.feed(raw[start : start + step])
        if body is not None:
            assert case["found"]
            assert body["nonce"] == case["nonce"]
            assert scanner.rest + raw[start + step :] == unhex(case["rest"])
            return
    assert not case["found"]
