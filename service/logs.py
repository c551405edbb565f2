"""What the service writes to its error stream: text for people, JSON lines for machines; never a picture or a key."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

Style = Literal["auto", "text", "json"]
REQUESTS = "service.requests"
"""The logger of answered requests, silent unless asked for."""


def start_logging(style: Style, requests: bool) -> None:
    """Log warnings and worse, and with `requests` every answered request; `auto` is text on a terminal, else JSON."""
    handler = logging.StreamHandler()
    as_json = style == "json" or (style == "auto" and not sys.stderr.isatty())
    handler.setFormatter(JsonLines() if as_json else TextLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(REQUESTS).setLevel(logging.INFO if requests else logging.WARNING)


def told(**fields: Any) -> dict[str, Any]:
    """Fields of a log line, as the `extra` of a logging call."""
    return {"fields": fields}


class JsonLines(logging.Formatter):
    """One object a line: `time` (UTC), `level`, `logger`, `message`, the line's own fields, and `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: dict[str, Any] = {"time": at, "level": record.levelname.lower(), "logger": record.name}
        line |= {"message": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """The same for people."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in getattr(record, "fields", {}).items())
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return f"{record.levelname} {record.getMessage()}{fields}{trace}"
