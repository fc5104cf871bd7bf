"""A streamed reply, read after it is over.

While a reply streams only raw pieces and their times are kept, so that the client takes as little as possible from the
cores that it shares with the server it measures. An event's time is that of the piece which completed its line.

Knows server-sent events (WHATWG HTML, section 9.2) as far as OpenAI-compatible servers use them, one `data` line each,
and the stream's JSON for both kinds of completions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_DONE = "[DONE]"


class Piece(NamedTuple):
    """Bytes as they came, when they came."""

    at_s: float
    data: bytes


@dataclass(slots=True)
class Reading:
    """`event_s`: times of the events with text. `end_s`: when the finish reason came. `error`: why it is no answer."""

    event_s: list[float] = field(default_factory=list)
    end_s: float | None = None
    text: str = ""
    usage: dict[str, Any] | None = None
    error: str | None = None


def read_stream(pieces: Sequence[Piece]) -> Reading:
    """What a whole stream said. A stream that is cut, is not JSON or carries an error is no answer."""
    reading = Reading()
    for at_s, payload in _payloads(pieces):
        if payload == _DONE:
            break
        try:
            _read_event(reading, at_s, json.loads(payload))
        except (ValueError, TypeError, KeyError, AttributeError):
            reading.error = f"an event that is none of the API's: {payload[:200]!r}"
        if reading.error is not None:
            return reading
    if reading.end_s is None:
        reading.error = "the stream ended without a finish reason"
    elif not reading.event_s:
        reading.error = "the answer has no text"
    return reading


def _payloads(pieces: Sequence[Piece]) -> Iterator[tuple[float, str]]:
    """The `data` of each complete line, with the time of the piece that completed it."""
    rest = b""
    for at_s, data in pieces:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield at_s, line[5:].strip().decode("utf-8", errors="replace")


def _read_event(reading: Reading, at_s: float, event: dict[str, Any]) -> None:
    if event.get("error"):
        reading.error = describe_error(event["error"])
        return
    reading.usage = event.get("usage") or reading.usage
    for choice in event.get("choices") or ():
        text = choice["text"] if "text" in choice else (choice.get("delta") or {}).get("content")
        if text:
            reading.event_s.append(at_s)
            reading.text += text
        if choice.get("finish_reason"):
            reading.end_s = at_s


def describe_error(error: Any) -> str:
    """The message of an OpenAI error object, or whatever else a server sends in its place."""
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or error)[:300]
