"""Published ports: their notation, and whether they are free."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.errors import Conflict, InvalidInput
from banger.network.publish import Forward, check_free, parse_publish, parse_publishes
from tests.support.ports import free_port

WAIT_S = 30.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8080:80", Forward("127.0.0.1", 8080, 80)),
        ("1:65535", Forward("127.0.0.1", 1, 65535)),
        ("0.0.0.0:8080:80", Forward("0.0.0.0", 8080, 80)),
        ("192.168.1.2:65535:1", Forward("192.168.1.2", 65535, 1)),
        ("00080:080", Forward("127.0.0.1", 80, 80)),
    ],
)
def test_a_forward_is_read(text: str, expected: Forward) -> None:
    assert parse_publish(text) == expected
    assert parse_publish(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "::", ":::", "80", "80:", ":80", "1:2:3:4", "127.0.0.1:80", "127.0.0.1:80:"),
        *(
            "0:80",
            "80:0",
            "65536:80",
            "80:65536",
            "-1:80",
            "+1:80",
            "80:80/tcp",
            "80:80 ",
            " 80:80",
        ),
        *("8 0:80", "8_0:80", "0x50:80", "8e1:80", "８０:80", "²:80", "1" * 5000 + ":80"),
        *("000001999999:80", "80:0000065536"),  # what stands behind the sixth digit counts too
        *("localhost:8080:80", "[::1]:8080:80", "::1:8080:80", "256.0.0.1:1:1", "1.2.3:1:1"),
        *("01.2.3.4:1:1", "*:1:1", "1.2.3.4/24:1:1", "80:80\n", "80\0:80", "\ud800:80:80"),
    ],
)
def test_what_is_no_forward_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_publish(text)
    assert caught.value.hint
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith("--publish ")


@given(st.text(alphabet="0123456789.:", max_size=40))
def test_whatever_is_read_can_be_listened_on(text: str) -> None:
    try:
        forward = parse_publish(text)
    except InvalidInput:
        return
    assert 1 <= forward.host_port <= 65535
    assert 1 <= forward.guest_port <= 65535
    socket.inet_aton(forward.host)


def test_one_port_of_the_host_leads_to_one_place() -> None:
    assert len(parse_publishes(["80:80", "81:80"])) == 2
    assert parse_publishes([]) == ()
    for other in ("80:81", "80:80", "0.0.0.0:80:22"):
        with pytest.raises(InvalidInput, match="port 80 of the host is asked for twice"):
            parse_publishes(["80:80", other])


# --- is it free


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that something listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_taken_port_is_a_conflict_that_names_another(taken: int) -> None:
    with pytest.raises(Conflict) as caught:
        check_free([Forward("127.0.0.1", free_port(), 80), Forward("127.0.0.1", taken, 80)])
    assert caught.value.code == "port_taken"
    assert caught.value.message == (
        f"port 127.0.0.1:{taken} cannot be published: something listens there already"
    )
    other = re.search(r"--publish (\d+):80", caught.value.hint)
    assert other is not None
    assert parse_publish(f"{other[1]}:80").host_port != taken


def test_a_free_port_is_free_again_afterwards() -> None:
    forward = Forward("127.0.0.1", free_port(), 80)
    check_free([forward])
    check_free([forward])


def test_a_connection_that_is_closing_keeps_no_port(taken: int) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    client = socket.create_connection(("127.0.0.1", port))
    accepted = server.accept()[0]
    accepted.close()  # first, so that the server's side is the one in TIME_WAIT
    client.close()
    server.close()
    check_free([Forward("127.0.0.1", port, 80)])


def test_an_address_of_another_host_is_a_conflict() -> None:
    # 192.0.2.0/24 is nobody's (RFC 5737).
    with pytest.raises(Conflict, match="this host does not have that address"):
        check_free([Forward("192.0.2.1", free_port(), 80)])


def test_a_port_of_roots_is_refused_to_others() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if lowest < 2:
        pytest.skip("every port is anybody's here")
    program = (
        "import os, sys\n"
        "from banger.network.publish import Forward, check_free\n"
        "if os.geteuid() == 0:\n"
        "    os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "check_free([Forward('127.0.0.1', int(sys.argv[1]), 80)])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(lowest - 1)],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert f"127.0.0.1:{lowest - 1} cannot be published: ports below 1024 are root's" in done.stderr
