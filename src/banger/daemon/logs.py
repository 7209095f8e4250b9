"""The daemon's log: JSON lines in a file that cannot grow without end."""

from __future__ import annotations

import json
import logging
import logging.handlers
from datetime import UTC, datetime
from pathlib import Path

_LIMIT_BYTES = 4 << 20
_FIELDS = ("vm", "operation")


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, and the VM or operation it is about."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, str] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in _FIELDS:
            if hasattr(record, name):
                line[name] = str(getattr(record, name))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up_logging(path: Path, level: str) -> None:
    """Send every logger to `path` at `level` (debug, info, warning, error)."""
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=_LIMIT_BYTES, backupCount=1)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # A line for each of Firecracker's answers says nothing that an error would not.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    path.chmod(0o600)
