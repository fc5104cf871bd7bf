"""One answer as its client saw it, and the durations that follow from that.

Definitions, all on the client's clock, of which an answer's times are seconds since its turn began:

    TTFT   from sending the request - under open load from when it was *due* - to the first event with text
    TPOT   (last token - first event) / (n - 1), with n from the server's `usage`, never a count of events: servers put
           several tokens into one event, and none into others. A server that sends no `usage` has its text tokenised
           here instead, and `counted_by` says so
    ITL    the gap between two neighbouring events with text, undivided: a reader who waits three seconds and then gets
           thirty tokens has waited three seconds. Read it beside `tokens_per_event`
    E2E    from sending, or from when it was due, to the last token

The last token is there when the event with the finish reason is: a token without text (an ignored end of text, half a
character) makes no event of its own, so the last event with text may come too early.

Counting from when a request was due makes up for coordinated omission: a server that stalls also delays the requests
that a slow client would only have sent later, and their waiting counts.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Seconds = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Answer:
    """`is_follow_up`: an earlier prompt of the turn began as this one does. `found`: whether the text holds what was
    asked for, None where nothing was. `kv` is what a Packlight server says of the KV it shipped. An answer with an
    `error` has no durations."""

    due_s: Seconds
    sent_s: Seconds
    event_s: tuple[Seconds, ...] = ()
    end_s: Seconds | None = None
    num_prompt_tokens: Count | None = None
    num_cached_tokens: Count | None = None
    num_output_tokens: Count = 0
    counted_by: Literal["usage", "tokenizer"] = "usage"
    is_follow_up: bool = False
    found: bool | None = None
    text: str = ""
    kv: dict[str, Any] | None = None
    error: str | None = None

    @property
    def first_s(self) -> float | None:
        return self.event_s[0] if self.error is None and self.event_s else None

    @property
    def last_s(self) -> float | None:
        return self.end_s if self.first_s is not None else None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.due_s

    @property
    def e2e_s(self) -> float | None:
        return None if self.last_s is None else self.last_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """None for answers of one token."""
        if self.first_s is None or self.last_s is None or self.num_output_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.num_output_tokens - 1)

    @property
    def gaps_s(self) -> tuple[float, ...]:
        return tuple(after - before for before, after in pairwise(self.event_s)) if self.error is None else ()

    @property
    def tokens_per_event(self) -> float | None:
        return self.num_output_tokens / len(self.event_s) if self.first_s is not None else None
