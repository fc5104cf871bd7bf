"""Logs: one event, one line, on standard error; for people, or as JSON for a collector.

Knows Python's logging. Does not know what is logged; by rule that is ids, counts and durations, never prompts or
answers. Every line about a request carries its id: `request` is the HTTP request's (`x-request-id`), `answer` the
answer's, which attempts (`.0`, `.1`, ...) and choices (`-0`, ...) on the workers extend. `trace_id` is there where the
request is part of a trace.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TextIO

from packlight.core.trace import TraceContext

LogFormat = Literal["pretty", "json"]
_PRETTY = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s"


@dataclass(frozen=True, slots=True)
class Event:
    """What happened, and the facts that belong to it. As text: `name a=1 b=2`."""

    name: str
    facts: Mapping[str, object]

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.facts.items())])


def log_event(
    log: logging.Logger,
    level: int,
    name: str,
    /,
    *,
    exc_info: BaseException | None = None,
    trace: TraceContext | None = None,
    **facts: object,
) -> None:
    """Log an event with named facts: `name a=1 b=2` for people, keys of their own in JSON. What belongs to a `trace`
    says so by `trace_id`."""
    if trace is not None:
        facts["trace_id"] = trace.trace_id
    log.log(level, Event(name, facts), exc_info=exc_info)


class OneLine(logging.Formatter):
    """For people. Line breaks become `\\n`, so that no message and no traceback can forge or split a line. Time is
    UTC."""

    def __init__(self) -> None:
        super().__init__(_PRETTY, datefmt="%Y-%m-%dT%H:%M:%S")
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")


class JsonLine(logging.Formatter):
    """For a collector: `time` (RFC 3339, UTC), `level`, `logger`, `message`, the event's own facts, `traceback`."""

    def format(self, record: logging.LogRecord) -> str:
        event = record.msg if isinstance(record.msg, Event) else Event(record.getMessage(), {})
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            **event.facts,  # first, so that no fact can claim another time or level
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": event.name,
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up_logging(level: str, stream: TextIO | None = None, *, format: LogFormat = "pretty") -> None:
    """Send everything of `level` (debug, info, warning, error) and above to `stream`. Calling it again replaces what it
    set up, and nothing else."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler.formatter, OneLine | JsonLine)]:
        root.removeHandler(handler)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLine() if format == "json" else OneLine())
    root.addHandler(handler)
    root.setLevel(level.upper())
    # One line per request is the router's own; uvicorn's would be a second one.
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
