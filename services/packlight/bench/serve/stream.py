"""A streamed reply, read after it is over, and the answer that it was.

While a reply streams only raw pieces and their times are kept, so that the client takes as little as possible from the
cores that it shares with the server it measures. An event's time is that of the piece which completed its line.

Knows server-sent events (WHATWG HTML, section 9.2) as far as OpenAI-compatible servers use them, one `data` line each,
and the stream's JSON for both kinds of completions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from packlight.bench.serve.answers import Answer

_DONE = "[DONE]"
_MICROSECOND = 6


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


def to_answer(
    reading: Reading,
    due_s: float,
    sent_s: float,
    *,
    references: Sequence[str],
    is_follow_up: bool,
    count_text: Callable[[str], int] = lambda _: 0,
) -> Answer:
    """`references` are what the text should hold. Without the server's usage the tokens are those that `count_text`
    counts in it."""
    usage = reading.usage or {}
    counted = usage.get("completion_tokens")
    is_asked = bool(references) and reading.error is None
    return Answer(
        due_s=round(due_s, _MICROSECOND),
        sent_s=round(sent_s, _MICROSECOND),
        event_s=tuple(round(at_s, _MICROSECOND) for at_s in reading.event_s),
        end_s=None if reading.end_s is None else round(reading.end_s, _MICROSECOND),
        num_prompt_tokens=usage.get("prompt_tokens"),
        num_cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        num_output_tokens=count_text(reading.text) if counted is None else counted,
        counted_by="tokenizer" if counted is None else "usage",
        is_follow_up=is_follow_up,
        found=all(reference in reading.text for reference in references) if is_asked else None,
        text=reading.text,
        kv=usage.get("kv"),
        error=reading.error,
    )


def describe_refusal(body: bytes) -> str:
    """What a server says instead of an answer: OpenAI's error object, or any text."""
    try:
        said = json.loads(body)
    except ValueError:
        return body.decode("utf-8", errors="replace")[:300]
    return describe_error(said.get("error") or said.get("detail") or said if isinstance(said, dict) else said)


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
