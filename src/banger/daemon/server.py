"""The HTTP face of the daemon: the route table joined to its handlers.

Owns decoding, encoding and the one mapping of errors to HTTP; holds no rule of its own.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route as StarletteRoute

from banger import __version__
from banger.api import codec
from banger.api.routes import ROUTES, Route
from banger.daemon.handlers import Handlers
from banger.errors import BangerError, InvalidInput
from banger.services.operations import Operation

log = logging.getLogger(__name__)

# Every answer says who gave it: the command line sees a version that differs at no extra cost.
_HEADERS = {"X-Banger-Version": __version__}
_BODY_LIMIT_BYTES = 1 << 20

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(handlers: Handlers) -> Starlette:
    """Return the ASGI app of the route table."""
    routes = [
        StarletteRoute(
            route.path,
            _endpoint(route, getattr(handlers, route.name)),
            name=route.name,
            methods=[route.method],
        )
        for route in ROUTES
    ]
    routes.append(StarletteRoute("/v1/openapi.json", _openapi, methods=["GET"]))
    return Starlette(
        routes=routes,
        exception_handlers={
            BangerError: _banger_error,
            HTTPException: _http_error,
            Exception: _internal_error,
        },
    )


def _endpoint(route: Route, handler: Callable[..., Awaitable[Any]]) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        arguments: dict[str, Any] = dict(request.path_params)
        if route.request is not None:
            arguments["body"] = codec.decode(route.request, await _body(request))
        result = await handler(**arguments)
        if route.kind == "events":
            return StreamingResponse(
                _lines(result), media_type="application/x-ndjson", headers=_HEADERS
            )
        if route.kind == "operation":
            return _json(result.wire(), status=202)
        return _json(result)

    return endpoint


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _BODY_LIMIT_BYTES:
            raise InvalidInput("the request body is larger than 1 MiB")
    return body


async def _lines(operation: Operation) -> AsyncIterator[bytes]:
    async for event in operation.follow():
        yield codec.encode(event) + b"\n"


async def _openapi(_: Request) -> Response:
    return _json(codec.openapi())


def _json(value: Any, status: int = 200) -> Response:
    return Response(codec.encode(value), status, _HEADERS, "application/json")


def _error(error: BangerError, status: int) -> Response:
    body = {"code": error.code, "message": error.message, "hint": error.hint}
    return _json({"error": body}, status)


async def _banger_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, BangerError)
    return _error(error, error.http_status)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _error(BangerError(message, code="no_route"), error.status_code)


async def _internal_error(_: Request, error: Exception) -> Response:
    log.error("a handler failed", exc_info=error)
    shown = BangerError(
        f"internal error: {type(error).__name__}: {error}", hint="see `banger daemon logs`"
    )
    return _error(shown, 500)
