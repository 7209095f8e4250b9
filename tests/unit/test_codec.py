"""The route table, the handlers and the OpenAPI page agree, and bodies are checked strictly."""

from __future__ import annotations

import inspect
import re

import pytest

from banger.api import codec, models
from banger.api.routes import ROUTES
from banger.daemon.handlers import Handlers
from banger.errors import InvalidInput


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_each_route_has_a_handler_of_its_parameters(route) -> None:  # type: ignore[no-untyped-def]
    wanted = re.findall(r"{(\w+)}", route.path) + (["body"] if route.request else [])
    handler = inspect.signature(getattr(Handlers, route.name))
    assert list(handler.parameters)[1:] == wanted


def test_no_handler_is_without_a_route() -> None:
    public = {name for name in vars(Handlers) if not name.startswith("_")}
    assert public == {route.name for route in ROUTES}


def test_the_openapi_page_names_every_route_and_resolves_every_reference() -> None:
    page = codec.openapi()
    operations = [row for path in page["paths"].values() for row in path.values()]
    assert {row["operationId"] for row in operations} == {route.name for route in ROUTES}
    references = set(re.findall(r"#/components/schemas/(\w+)", codec.encode(page).decode()))
    assert references <= set(page["components"]["schemas"])


def test_a_misspelt_field_is_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidInput) as caught:
        codec.decode(models.VmCreate, b'{"memory_byte": 1}')
    assert caught.value.hint == "did you mean memory_bytes?"


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"vcpu": "two"}', b'"x"', b"\xff"])
def test_a_wrong_body_is_an_input_error(body: bytes) -> None:
    with pytest.raises(InvalidInput):
        codec.decode(models.VmCreate, body)


def test_an_empty_body_is_an_empty_object() -> None:
    assert codec.decode(models.VmCreate, b"") == {}
