"""One answer in the making: tokens in, text out.

Knows token bytes, UTF-8 and stop strings. Does not know JSON, HTTP or where tokens come from. Pure: the same tokens
give the same text, however they are grouped, which is why a stream and a plain answer agree.

    token ids ──bytes──▶ incremental UTF-8 decoder ──characters──▶ StopFinder ──text that is safe to show──▶ Delta
                                                                               └──▶ CallReader ──content, calls──┘
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from packlight.compress.policy import Decision, Plan
from packlight.core.types import Finished, FinishReason, GenerateRequest, Token, Usage
from packlight.router.service import Tokenizer
from packlight.router.stops import StopFinder
from packlight.router.tools.calls import CallDelta, Heard
from packlight.router.tools.reader import CallReader


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token that is part of the shown text, which its own text enters at character `offset`."""

    token: Token
    offset: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What one event adds to the choice `index`. `tokens` begin in `text` or in calls; they are there only when
    log-probabilities are wanted. The last delta of a choice has a finish reason."""

    index: int
    text: str = ""
    calls: tuple[CallDelta, ...] = ()
    tokens: tuple[ShownToken, ...] = ()
    finish_reason: FinishReason | None = None


class Choice:
    """The text of one answer so far.

    Hidden, though counted: special tokens, and the token that ends the answer. A token's log-probability is shown with
    the text it begins in; tokens that begin at or after a completed stop string are dropped with their text. With a
    `reader` the text is read for calls, and special tokens that mark them are read with it.
    """

    def __init__(
        self,
        index: int,
        request: GenerateRequest,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        plan: Plan | None = None,
        reader: CallReader | None = None,
    ) -> None:
        self.index = index
        self.request = request
        self.plan = plan or Plan(Decision(request.pack))
        self.packing = self.plan.usual
        self.num_generated = 0
        self.finish_reason: FinishReason | None = None
        self.usage: Usage | None = None
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._finder = StopFinder(stops)
        self._reader = reader
        self._marks = {} if reader is None else {token: mark.encode() for token, mark in reader.marks.items()}
        self._num_decoded = 0
        self._num_shown = 0
        self._pending: list[ShownToken] = []

    def push(self, tokens: Sequence[Token], at: float = 0.0) -> Delta:
        """Take `tokens`, which arrived at time `at`. Those after a completed stop string are not counted."""
        if self.first_token_at is None:
            self.first_token_at = at
        self.last_token_at = at
        pieces = []
        for token in tokens:
            pieces.append(self._take(token))
            if self._finder.matched:
                self.finish_reason = FinishReason.STOP
                break
        return self._delta("".join(pieces))

    @property
    def ending(self) -> str | None:
        """Why it ended, in OpenAI's words. An answer that was cut is cut, whatever it called."""
        calls = self._reader is not None and self._reader.num_calls > 0
        return "tool_calls" if calls and self.finish_reason is FinishReason.STOP else self.finish_reason

    def finish(self, finished: Finished) -> Delta:
        """The backend is done: whatever was held back comes out, half a character as U+FFFD."""
        self.usage = finished.usage
        self.num_generated = finished.usage.num_generated_tokens
        text = self._decoded(b"", final=True)
        if not self._finder.matched:
            text += self._finder.flush()
        self.finish_reason = FinishReason.STOP if self._finder.matched else finished.reason
        return self._delta(text)

    def _take(self, token: Token) -> str:
        self.num_generated += 1
        if self._is_hidden(token.token_id):
            return self._decoded(self._marks[token.token_id]) if token.token_id in self._marks else ""
        if self.request.sampling.num_logprobs is not None:
            self._pending.append(ShownToken(token, self._num_decoded))
        return self._decoded(self._tokenizer.token_bytes(token.token_id))

    def _is_hidden(self, token_id: int) -> bool:
        ends = self.request.stop.ends(token_id, self.num_generated)
        return ends is FinishReason.STOP or self._tokenizer.is_special(token_id)

    def _decoded(self, data: bytes, *, final: bool = False) -> str:
        piece = self._decoder.decode(data, final)
        self._num_decoded += len(piece)
        # Like stop tokens, stop strings do not count before min_tokens: such text passes unsearched.
        return piece if self.num_generated < self.request.stop.min_tokens else self._finder.push(piece)

    def _delta(self, text: str) -> Delta:
        self._num_shown += len(text)
        if self._reader is None:
            return Delta(self.index, text, (), self._release(), self.finish_reason)
        heard = self._heard(self._reader, text)
        return Delta(self.index, heard.content, heard.calls, self._release(), self.finish_reason)

    def _heard(self, reader: CallReader, text: str) -> Heard:
        heard = reader.push(text)
        if reader.is_done and self.finish_reason is None:
            self.finish_reason = FinishReason.STOP
        if self.finish_reason is None:
            return heard
        rest = reader.finish()
        return Heard(heard.content + rest.content, heard.calls + rest.calls)

    def _release(self) -> tuple[ShownToken, ...]:
        whole_text_shown = self.finish_reason is not None and not self._finder.matched
        num_ready = len(self._pending)
        while num_ready and not whole_text_shown and self._pending[num_ready - 1].offset >= self._num_shown:
            num_ready -= 1
        ready, self._pending = self._pending[:num_ready], self._pending[num_ready:]
        return tuple(ready)
