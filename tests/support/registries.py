"""Registries on loopback: Debian's real docker-registry, and one that misbehaves on request.

Owns their processes, threads, keys and token server. What they serve is the test's to say.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import json
import os
import re
import socket
import ssl
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.ports import free_port

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
USER, PASSWORD = "tester", "pass:word"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def basic_of(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


# -- the real one


@dataclass(frozen=True)
class RealRegistry:
    """A docker-registry that runs, as `host` = 127.0.0.1:PORT."""

    host: str
    log: Path


@contextlib.contextmanager
def real_registry(
    directory: Path, storage: Path, *, auth: dict[str, Any] | None = None
) -> Iterator[RealRegistry]:
    """Run a docker-registry over `storage`; several may share one, since pulls only read."""
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    config = {
        "version": "0.1",
        "log": {"accesslog": {"disabled": False}, "level": "info"},
        "storage": {"filesystem": {"rootdirectory": str(storage)}},
        "http": {"addr": f"127.0.0.1:{port}", "secret": "tests"},
    } | ({"auth": auth} if auth else {})
    path = directory / "config.yml"
    path.write_text(json.dumps(config))  # JSON is YAML
    log = directory / "registry.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            ["docker-registry", "serve", path], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            env={"PATH": os.environ["PATH"], "OTEL_TRACES_EXPORTER": "none"},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"docker-registry does not come up:\n{log.read_text()}")
            time.sleep(0.05)
        yield RealRegistry(f"127.0.0.1:{port}", log)
    finally:
        process.terminate()
        process.wait(30)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def htpasswd_auth(directory: Path) -> dict[str, Any]:
    """Return the `auth` of a registry that knows USER and PASSWORD by Basic."""
    path = directory / "htpasswd"
    made = subprocess.run(
        ["htpasswd", "-inB", USER], input=PASSWORD, check=True, capture_output=True, text=True
    )
    path.write_text(made.stdout)
    return {"htpasswd": {"realm": "tests", "path": str(path)}}


class TokenServer:
    """Signs tokens for a registry: to everybody for `public/`, to USER for the rest.

    `asked` holds the query or form of every request, with its Authorization.
    """

    def __init__(self, directory: Path) -> None:
        self.asked: list[dict[str, str]] = []
        self.lifetime_s = 300
        self._key, self._certificate = directory / "token.key", directory / "token.crt"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", self._key,
             "-out", self._certificate, "-days", "2", "-subj", "/CN=token-tests"],
            check=True, capture_output=True,
        )  # fmt: skip
        outer = self

        class Handler(_Quiet):
            def do_GET(self) -> None:
                self.answer(dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query)))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(dict(urllib.parse.parse_qsl(body.decode())))

            def answer(self, asked: dict[str, str]) -> None:
                authorization = self.headers.get("Authorization", "")
                outer.asked.append({**asked, "authorization": authorization})
                known = authorization == basic_of(USER, PASSWORD)
                known = known or asked.get("refresh_token") == "identity"
                if (authorization or "refresh_token" in asked) and not known:
                    return self.send(401, b"{}")
                name = asked["scope"].split(":")[1]
                token = outer._token(name, allowed=known or name.startswith("public/"))
                key = "access_token" if "refresh_token" in asked else "token"
                return self.send(200, json.dumps({key: token}).encode())

        self._server = _serve(Handler)
        self.realm = f"http://127.0.0.1:{self._server.server_address[1]}/token"

    @property
    def auth(self) -> dict[str, Any]:
        """The `auth` of a registry that believes this server."""
        return {
            "token": {
                "realm": self.realm,
                "service": "tests",
                "issuer": "token-tests",
                "rootcertbundle": str(self._certificate),
            }
        }

    def close(self) -> None:
        _stop(self._server)

    def _token(self, name: str, *, allowed: bool) -> str:
        pem = self._certificate.read_text()
        der = "".join(pem.split("-----")[2].split())
        now = int(time.time())
        access = [{"type": "repository", "name": name, "actions": ["pull"]}] if allowed else []
        head = {"typ": "JWT", "alg": "RS256", "x5c": [der]}
        claims = {
            "iss": "token-tests", "sub": "", "aud": "tests", "exp": now + self.lifetime_s,
            "nbf": now - 60, "iat": now, "jti": os.urandom(8).hex(), "access": access,
        }  # fmt: skip
        signed = ".".join(_base64url(json.dumps(part).encode()) for part in (head, claims))
        signature = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", self._key], input=signed.encode(),
            check=True, capture_output=True,
        ).stdout  # fmt: skip
        return f"{signed}.{_base64url(signature)}"


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def make_layout(directory: Path, tag: str, files: dict[str, bytes]) -> Path:
    """Make an OCI layout with one layer per file, with umoci."""
    layout = directory / "layout"
    subprocess.run(["umoci", "init", "--layout", layout], check=True)
    subprocess.run(["umoci", "new", "--image", f"{layout}:{tag}"], check=True)
    for name, data in files.items():
        source = directory / name
        source.write_bytes(data)
        subprocess.run(
            ["umoci", "insert", "--rootless", "--image", f"{layout}:{tag}", source, f"/{name}"],
            check=True,
        )
    return layout


def push(layout: Path, tag: str, host: str, name: str, *options: str) -> None:
    """Copy an image of a layout to `host/name`, with skopeo and no login of this user's."""
    logins = layout.parent / "no-logins.json"
    logins.write_text("{}")
    subprocess.run(
        ["skopeo", "copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false", *options,
         f"oci:{layout}:{tag}", f"docker://{host}/{name}"],
        check=True, env={**os.environ, "REGISTRY_AUTH_FILE": str(logins)},
    )  # fmt: skip


# -- the one that misbehaves


class Seen(NamedTuple):
    """One request that came: its host as the client wrote it, and its headers."""

    host: str
    path: str
    headers: dict[str, str]

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")


class _Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send an answer; `Content_Type` becomes Content-Type."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | named).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


Fault = Callable[["Handler"], None]


@dataclass
class FaultyRegistry:
    """A small registry; `faults` for a path take the place of its answers, one request each.

    With `login` every request needs that Authorization, and `challenge` is what is said if not.
    """

    manifests: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    login: str | None = None
    challenge: str = 'Basic realm="tests"'
    port: int = 0
    _faults: list[tuple[re.Pattern[str], list[Fault], bool]] = field(default_factory=list)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def fault(self, path: str, *faults: Fault, always: bool = False) -> None:
        """Let the next requests for paths with `path` (a pattern) meet these, in order."""
        self._faults.append((re.compile(path), list(faults), always))

    def add_blob(self, data: bytes) -> str:
        digest = digest_of(data)
        self.blobs[digest] = data
        return digest

    def add_image(self, tag: str = "t", layer: bytes = b"layer") -> dict[str, Any]:
        """Serve an image of one layer; returns its manifest."""
        layer = gzip.compress(layer, mtime=0)
        manifest = {
            "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": {
                "mediaType": OCI_CONFIG, "digest": self.add_blob(b"{}"), "size": 2,
            },
            "layers": [
                {"mediaType": OCI_LAYER, "digest": self.add_blob(layer), "size": len(layer)}
            ],
        }  # fmt: skip
        body = json.dumps(manifest).encode()
        self.manifests[tag] = self.manifests[digest_of(body)] = (body, OCI_MANIFEST)
        self.tags.append(tag)
        return manifest

    def requests(self, part: str) -> list[Seen]:
        return [seen for seen in self.seen if part in seen.path]

    def next_fault(self, path: str) -> Fault | None:
        for pattern, faults, always in self._faults:
            if faults and pattern.search(path):
                return faults[0] if always else faults.pop(0)
        return None


class Handler(_Quiet):
    """Serves a FaultyRegistry."""

    registry: FaultyRegistry

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.registry.seen.append(Seen(headers.get("host", ""), self.path, headers))
        fault = self.registry.next_fault(self.path)
        (fault or Handler.serve)(self)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        headers = {name.lower(): value for name, value in self.headers.items()} | {"body": body}
        self.registry.seen.append(Seen(headers.get("host", ""), self.path, headers))
        fault = self.registry.next_fault(self.path)
        (fault or Handler.serve)(self)

    def serve(self) -> None:
        registry = self.registry
        if registry.login is not None and self.headers.get("Authorization") != registry.login:
            return self.send(401, b"{}", WWW_Authenticate=registry.challenge)
        kind, _, key = self.path.partition("?")[0].rpartition("/")
        if self.path == "/v2/":
            return self.send(200, b"{}")
        if kind.endswith("/manifests") and key in registry.manifests:
            body, media_type = registry.manifests[key]
            return self.send(
                200, body, Content_Type=media_type, Docker_Content_Digest=digest_of(body)
            )
        if kind.endswith("/tags"):
            return self.send(200, json.dumps({"tags": registry.tags}).encode())
        if kind.endswith("/blobs") and key in registry.blobs:
            return self.send_blob(registry.blobs[key])
        code = {"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}
        return self.send(404, json.dumps(code).encode())

    def send_blob(self, data: bytes) -> None:
        wanted = re.fullmatch(r"bytes=([0-9]+)-", self.headers.get("Range", ""))
        if wanted is None:
            return self.send(200, data)
        start = int(wanted[1])
        return self.send(
            206, data[start:], Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}"
        )

    def blob(self) -> bytes:
        return self.registry.blobs[self.path.partition("?")[0].rpartition("/")[2]]


@contextlib.contextmanager
def faulty_registry(
    address: str = "127.0.0.1", *, tls: Path | None = None
) -> Iterator[FaultyRegistry]:
    """Run a FaultyRegistry on a free port; `tls` is a file of `make_certificate`."""
    registry = FaultyRegistry()
    server = _serve(type("Bound", (Handler,), {"registry": registry}), address, tls)
    registry.port = server.server_address[1]
    try:
        yield registry
    finally:
        _stop(server)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        pass  # a client that hangs up is what many tests are about


def make_certificate(directory: Path) -> Path:
    """Make a file with a key and its own certificate for the names of loopback."""
    path, key = directory / "tls.pem", directory / "tls.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", path,
         "-days", "2", "-subj", "/CN=tests", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_text(path.read_text() + key.read_text())
    return path


def _serve(
    handler: type[BaseHTTPRequestHandler], address: str = "127.0.0.1", tls: Path | None = None
) -> _Server:
    server = _Server((address, 0), handler)
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls)
        # The handshake is the handler thread's, at its first read.
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


def _stop(server: _Server) -> None:
    server.shutdown()
    server.server_close()


# -- faults


def answer(status: int, body: bytes = b"", **headers: str) -> Fault:
    """Answer with this."""
    return lambda handler: handler.send(status, body, **headers)


def redirect(url: str, status: int = 307) -> Fault:
    """Redirect to a URL; `{path}` is the request's."""
    return lambda handler: handler.send(status, Location=url.format(path=handler.path))


def cut(size: int) -> Fault:
    """Send what was asked for, and hang up after `size` bytes of it."""

    def fault(handler: Handler) -> None:
        class Cut:
            left = size

            def write(self, data: bytes) -> int:
                if not data.startswith(b"HTTP/1.1"):  # the headers go whole
                    data = data[: self.left]
                    self.left -= len(data)
                real.write(data)
                return len(data)

            def flush(self) -> None:
                real.flush()

        real, handler.wfile = handler.wfile, Cut()  # type: ignore[assignment]
        handler.serve()
        handler.wfile = real
        handler.close_connection = True

    return fault


def ignore_range(handler: Handler) -> None:
    """Send all of a blob, whatever was asked for."""
    handler.send(200, handler.blob())


def chunked(data: bytes) -> Fault:
    """Send `data` without saying how much it is."""

    def fault(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))

    return fault


def drip(pause_s: float = 0.02) -> Fault:
    """Send a blob byte by byte, until the client has had enough."""

    def fault(handler: Handler) -> None:
        data = handler.blob()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        with contextlib.suppress(OSError):
            for byte in data:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                time.sleep(pause_s)
        handler.close_connection = True

    return fault


def silence(handler: Handler) -> None:
    """Answer nothing until the client hangs up."""
    with contextlib.suppress(OSError):
        handler.rfile.read(1)
    handler.close_connection = True


def hang_up(handler: Handler) -> None:
    """Close the connection without a word."""
    handler.close_connection = True
