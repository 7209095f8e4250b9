"""Each request of ours against upstream's own description of the API, in two of its versions."""

from __future__ import annotations

import asyncio
import functools
import json
import re
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from banger.errors import VmmFailed
from banger.vmm import firecracker
from banger.vmm import firecracker_api as api
from banger.vmm.base import NetworkSpec
from tests.support.specs import plain_spec

_REFERENCE = Path(__file__).parents[4] / "shared" / "reference"
VERSIONS = ("v1.12.1", "v1.16.1")

NETWORKS = {
    "none": None,
    "user": NetworkSpec("02:00:00:00:00:01"),
    "bridge": NetworkSpec("02:00:00:00:00:01", tap="bt0"),
}


class Description:
    """Upstream's description of its API, as something to hold a request against."""

    def __init__(self, version: str) -> None:
        path = _REFERENCE / f"firecracker-api-{version}.yaml"
        if not path.exists():
            pytest.skip(f"{path} is not here")
        self._document = yaml.safe_load(path.read_text())
        # Swagger lets a body hold more than it names; a field nobody reads is a mistake of ours.
        self._definitions = {
            name: {**definition, "additionalProperties": False}
            if definition.get("type") == "object"
            else definition
            for name, definition in self._document["definitions"].items()
        }

    def check(self, call: api.Call) -> None:
        operation = self._operation(call)
        bodies = [p for p in operation.get("parameters", []) if p["in"] == "body"]
        if not bodies:
            assert call.body == {}, f"{call.method} {call.path} takes no body"
            return
        (body,) = bodies
        schema = {**body["schema"], "definitions": self._definitions}
        jsonschema.Draft4Validator.check_schema(schema)
        jsonschema.Draft4Validator(schema).validate(call.body)

    def _operation(self, call: api.Call) -> dict[str, Any]:
        for template, item in self._document["paths"].items():
            pattern = re.sub(r"\\\{[^}]*\\\}", "[A-Za-z0-9_]+", re.escape(template))
            if re.fullmatch(pattern, call.path):
                assert call.method.lower() in item, f"{template} knows no {call.method}"
                operation: dict[str, Any] = item[call.method.lower()]
                return operation
        raise AssertionError(f"no path {call.path}")


@functools.cache
def _description(version: str) -> Description:
    return Description(version)


@pytest.fixture(params=VERSIONS)
def description(request: pytest.FixtureRequest) -> Description:
    return _description(request.param)


CALLS = {
    "machine_config": api.machine_config(2, 512),
    "boot_source": api.boot_source("/vmlinux", "/initramfs.img", "console=ttyS0"),
    "drive": api.drive("base", "/base.ext4", read_only=True),
    "drive-rw": api.drive("own", "/own.ext4", read_only=False),
    "network_interface": api.network_interface("tap0", "02:00:00:00:00:01"),
    "vsock": api.vsock("/v.sock"),
    "entropy": api.entropy(),
    "instance_start": api.instance_start(),
    "flush_metrics": api.flush_metrics(),
    "vm_state-paused": api.vm_state("Paused"),
    "vm_state-resumed": api.vm_state("Resumed"),
    "instance_info": api.instance_info(),
}


def test_no_request_of_the_client_is_left_out() -> None:
    makers = {
        name
        for name, value in vars(api).items()
        if callable(value) and getattr(value, "__annotations__", {}).get("return") == "Call"
    }
    assert makers == {name.partition("-")[0] for name in CALLS}


@pytest.mark.parametrize("name", CALLS)
def test_a_request_is_as_upstream_describes_it(description: Description, name: str) -> None:
    description.check(CALLS[name])


@pytest.mark.parametrize("network", NETWORKS)
def test_the_configuration_of_a_machine_is_as_upstream_describes_it(
    description: Description, network: str
) -> None:
    spec = plain_spec(Path("/vm"), vcpu=2, network=NETWORKS[network])
    calls = firecracker.configuration(spec, firecracker._place(spec, Path("/firecracker")))
    for call in calls:
        description.check(call)
    assert calls[-1] == api.instance_start()
    # What the guest calls vda, vdb, vdc.
    drives = [call.body["path_on_host"] for call in calls if "/drives/" in call.path]
    assert drives == ["/vm/base.ext4", "/vm/own.ext4", "/vm/mods.ext4"]
    taps = [call.body["host_dev_name"] for call in calls if "/network-interfaces/" in call.path]
    assert taps == {"none": [], "user": ["tap0"], "bridge": ["bt0"]}[network]


@pytest.mark.parametrize("name", [name for name in CALLS if CALLS[name].body])
def test_a_misspelt_field_would_be_seen(description: Description, name: str) -> None:
    call = CALLS[name]
    first, *_ = call.body
    rest = {key: value for key, value in call.body.items() if key != first}
    with pytest.raises(jsonschema.ValidationError):
        description.check(call._replace(body={**call.body, f"{first}s": call.body[first]}))
    with pytest.raises(jsonschema.ValidationError):
        description.check(call._replace(body={**rest, f"{first}s": call.body[first]}))
    with pytest.raises(jsonschema.ValidationError):
        description.check(call._replace(body={**call.body, first: [call.body[first]]}))


@pytest.mark.parametrize(
    ("method", "path"), [("PUT", "/machine-conf"), ("POST", "/actions"), ("PUT", "/drives/a/b")]
)
def test_a_misspelt_path_or_method_would_be_seen(
    description: Description, method: str, path: str
) -> None:
    with pytest.raises(AssertionError):
        description.check(api.instance_start()._replace(method=method, path=path))


# --- what comes back


@pytest.fixture
def socket() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bng-") as directory:
        yield Path(directory, "fc.sock")


@pytest.fixture
async def answers(socket: Path) -> AsyncIterator[Callable[[bytes], None]]:
    """A server that answers each request with the bytes it is told, and hangs up."""
    said = b""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        await reader.readexactly(int(length[1]) if length else 0)
        try:
            writer.write(said)
            await writer.drain()
        except ConnectionError:  # the client had enough
            pass
        writer.close()

    def tell(what: bytes) -> None:
        nonlocal said
        said = what

    async with await asyncio.start_unix_server(answer, socket):
        yield tell


def _answer(status: int, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def _call(socket: Path, call: api.Call) -> dict[str, Any]:
    async with api.FirecrackerApi(socket) as client:
        return await client.call(call)


async def test_an_answer_is_returned(socket: Path, answers: Callable[[bytes], None]) -> None:
    answers(_answer(200, b'{"state": "Running"}'))
    assert await _call(socket, api.instance_info()) == {"state": "Running"}
    answers(_answer(204, b""))
    assert await _call(socket, api.entropy()) == {}


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b'{"fault_message": "No such file"}', "No such file"),
        (b'{"fault_message": "one\\n\\ttwo\\r\\n three "}', "one two three"),
        (b'{"fault_message": "\\u001b[2Jgone\\ud800"}', "[2Jgone"),
        (b'{"fault_message": {"a": 1}}', "{'a': 1}"),
        (b'{"other": 1}', '{"other": 1}'),
        (b"[1]", "[1]"),
        (b"no\x00 JSON \xff", "no JSON \ufffd"),
        (b"", "status 400"),
        (b" \n", "status 400"),
        (json.dumps({"fault_message": "x" * 9000}).encode(), "x" * 500),
        (b"[" * 60_000, "[" * 500),
    ],
)
async def test_a_refusal_is_one_short_line_that_steers_no_terminal(
    socket: Path, answers: Callable[[bytes], None], body: bytes, shown: str
) -> None:
    answers(_answer(400, body))
    with pytest.raises(VmmFailed) as caught:
        await _call(socket, api.vsock("/v.sock"))
    assert caught.value.message == f"Firecracker refused to add the vsock: {shown}"
    assert caught.value.code == "vmm_refused"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (_answer(200, b"{"), "its answer is no JSON object"),
        (_answer(200, b"[]"), "its answer is no JSON object"),
        (_answer(200, b"[" * 60_000), "its answer is no JSON object"),
        (_answer(200, b"x" * (10 << 20)), "answered with more than 64 KiB"),
        (_answer(400, b"x" * (10 << 20)), "answered with more than 64 KiB"),
        (b"HTTP/1.1 200 x\r\nContent-Length: 9\r\n\r\n{", "without sending complete message"),
        (b"", "without sending a response"),
        (b"\xff\x00SSH-2.0\r\n", "without sending a response"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "illegal status line"),
    ],
)
async def test_an_answer_that_is_none_is_a_failure_of_the_vmm(
    socket: Path, answers: Callable[[bytes], None], said: bytes, why: str
) -> None:
    answers(said)
    with pytest.raises(VmmFailed, match="did not ask for its state") as caught:
        await _call(socket, api.instance_info())
    assert why in caught.value.message
    assert "\n" not in caught.value.message


async def test_what_claims_to_be_compressed_is_not_unpacked(
    socket: Path, answers: Callable[[bytes], None]
) -> None:
    import gzip

    answers(_answer(200, gzip.compress(b'{"a": 1}'), "Content-Encoding: gzip"))
    with pytest.raises(VmmFailed, match="no JSON object"):
        await _call(socket, api.instance_info())


async def test_a_redirect_is_followed_nowhere(
    socket: Path, answers: Callable[[bytes], None]
) -> None:
    answers(_answer(302, b"", "Location: http://127.0.0.1/"))
    with pytest.raises(VmmFailed, match="status 302"):
        await _call(socket, api.instance_info())


async def test_an_answer_that_drips_ends_all_the_same(
    socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(b"HTTP/1.1 200 x\r\nContent-Length: 60000\r\n\r\n")
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.05)
        except ConnectionError:
            pass
        finally:
            writer.close()

    monkeypatch.setattr(api, "_REQUEST_TIMEOUT_S", 0.5)
    async with await asyncio.start_unix_server(drip, socket):
        with pytest.raises(VmmFailed, match=r"did not ask for its state within"):
            await asyncio.wait_for(_call(socket, api.instance_info()), 20)


async def test_a_socket_that_is_gone_says_so(socket: Path) -> None:
    with pytest.raises(VmmFailed, match="API socket is gone"):
        await _call(socket, api.instance_info())


async def test_a_link_to_anothers_socket_is_not_followed(
    socket: Path, answers: Callable[[bytes], None]
) -> None:
    answers(_answer(204, b""))
    link = socket.with_name("link.sock")
    link.symlink_to(socket)
    with pytest.raises(VmmFailed, match="API socket is gone"):
        await _call(link, api.instance_info())
