"""Deleting several artifacts: each is tried and told of by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from banger.cli import output
from banger.cli.context import Context
from banger.errors import BangerError


def delete_each(context: Context, names: Iterable[str], delete: Callable[[str], Any]) -> int:
    """Delete every name once; report each, and return 125 when any failed."""
    results: list[dict[str, Any]] = []
    failed = False
    for name in dict.fromkeys(names):
        try:
            done = delete(name)
        except BangerError as error:
            failed = True
            results.append({"name": name, "ok": False, **output.error_body(error)})
            if not context.json:
                output.write_error(error, name if name not in error.message else "")
            continue
        results.append({"name": name, "ok": True, "result": done})
        if not context.json:
            output.write_line(f"{name} deleted")
            if stranded := done.get("stranded"):
                output.warn(f"until {name} is back these do not start: {', '.join(stranded)}")
    if context.json:
        output.write_json(results)
    return 125 if failed else 0
