"""Logs: one event, one line, on standard error.

Knows Python's logging. Does not know what is logged; by rule that is ids, counts and durations, never prompts or
answers.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TextIO

_FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s"


class OneLine(logging.Formatter):
    """Line breaks become `\\n`, so that no message and no traceback can forge or split a line. Time is UTC."""

    def __init__(self) -> None:
        super().__init__(_FORMAT, datefmt="%Y-%m-%dT%H:%M:%S")
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")


def set_up_logging(level: str, stream: TextIO | None = None) -> None:
    """Send everything of `level` (debug, info, warning, error) and above to `stream`. Calling it again replaces what it
    set up, and nothing else."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler.formatter, OneLine)]:
        root.removeHandler(handler)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(OneLine())
    root.addHandler(handler)
    root.setLevel(level.upper())
    # One line per request is the router's own; uvicorn's would be a second one.
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
