"""Decoding request bodies against `api.models`, and the OpenAPI page of the route table.

Daemon only: it imports msgspec, which the command line's hot path does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_type_hints

import msgspec

from banger import __version__
from banger.api import models
from banger.api.routes import ROUTES, Route
from banger.errors import InvalidInput, nearest


def decode(shape: type[Any], body: bytes) -> Any:
    """Return a request body as `shape`; raise InvalidInput naming the field that is wrong."""
    try:
        value = msgspec.json.decode(body) if body.strip() else {}
        decoded = msgspec.convert(value, shape)
    except msgspec.DecodeError as error:
        raise InvalidInput(f"the request body is not valid: {error}") from error
    # msgspec lets unknown keys of a TypedDict pass; a misspelt one must not be ignored.
    known = list(get_type_hints(shape))
    for key in value:
        if key not in known:
            close = nearest(key, known)
            raise InvalidInput(
                f"unknown field {key!r}",
                hint=f"did you mean {close}?" if close else f"known: {', '.join(known)}",
            )
    return decoded


def encode(value: Any) -> bytes:
    """Return a value as JSON."""
    return msgspec.json.encode(value)


def openapi() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of the route table."""
    shapes = [*_shapes()]
    _, components = msgspec.json.schema_components(
        shapes, ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, Any] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _describe(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "bangerd", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }


def _shapes() -> Iterator[Any]:
    yield models.ErrorAnswer
    yield models.Operation
    for route in ROUTES:
        if route.request is not None:
            yield route.request
        yield route.result


def _schema(shape: Any) -> dict[str, Any]:
    (schema,), _ = msgspec.json.schema_components(
        [shape], ref_template="#/components/schemas/{name}"
    )
    return schema


def _describe(route: Route) -> dict[str, Any]:
    answer = models.Operation if route.kind == "operation" else route.result
    media = "application/x-ndjson" if route.kind == "events" else "application/json"
    described: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary or route.name.replace("_", " "),
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)}", route.path)
        ],
        "responses": {
            "202" if route.kind == "operation" else "200": {
                "description": "accepted" if route.kind == "operation" else "done",
                "content": {media: {"schema": _schema(answer)}},
            },
            "default": {
                "description": "an error",
                "content": {"application/json": {"schema": _schema(models.ErrorAnswer)}},
            },
        },
    }
    if route.request is not None:
        described["requestBody"] = {
            "content": {"application/json": {"schema": _schema(route.request)}}
        }
    return described
