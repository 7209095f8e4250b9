"""`config show` and `config path`."""

from __future__ import annotations

import argparse
import json as json_module
import os
from typing import Any

from banger.cli import output
from banger.cli.context import Context
from banger.cli.parsing import Parser, add_json


def build_path(parser: Parser) -> None:
    """Arguments of `config path`."""
    parser.description = "Print the path of config.toml; it need not exist."
    add_json(parser)


def run_path(context: Context, _args: argparse.Namespace) -> int:
    """Print the path."""
    path = os.path.join(context.paths.config_dir, "config.toml")
    if context.json:
        output.write_json({"path": path, "exists": os.path.exists(path)})
    else:
        output.write_line(path)
    return 0


def build_show(parser: Parser) -> None:
    """Arguments of `config show`."""
    parser.description = "Show every setting with the value in force (docs/config.md explains)."
    add_json(parser)


def run_show(context: Context, _args: argparse.Namespace) -> int:
    """Show every setting."""
    from banger import config

    settings = as_dict(config.load_config(context.paths.config_dir))
    if context.json:
        output.write_json(settings)
        return 0
    _show(settings)
    return 0


def as_dict(value: Any) -> Any:
    """Turn a settings value (Struct, dataclass or NamedTuple) into plain containers."""
    if hasattr(value, "_asdict"):
        return {name: as_dict(found) for name, found in value._asdict().items()}
    fields = getattr(type(value), "__struct_fields__", None) or getattr(
        type(value), "__dataclass_fields__", None
    )
    if fields is not None:
        return {name: as_dict(getattr(value, name)) for name in fields}
    if isinstance(value, dict):
        return {str(name): as_dict(found) for name, found in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_dict(found) for found in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _show(settings: dict[str, Any], prefix: str = "") -> None:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            _show(value, f"{prefix}{name}.")
        else:
            output.write_line(f"{prefix}{name} = {json_module.dumps(value)}")


VERBS = {"show": (build_show, run_show), "path": (build_path, run_path)}
