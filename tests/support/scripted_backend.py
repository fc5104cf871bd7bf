"""A backend whose every event is written down beforehand, for tests of the HTTP half.

It keeps account of what the router does to it: the requests it got, how far each was read, and how each ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from packlight.compress.policy import Plan
from packlight.core.errors import PacklightError
from packlight.core.types import (
    Failed,
    Finished,
    FinishReason,
    GenerateEvent,
    GenerateRequest,
    KVUsage,
    Progress,
    Timings,
    Token,
    Tokens,
    Usage,
)
from packlight.core.workers import WorkerInfo
from packlight.router.service import Readiness

KV = KVUsage(
    "snapkv",
    num_kept_tokens=12.5,
    shipped_bytes=1000,
    exact_bytes=8000,
    retained_mass=0.97,
    codec="int8",
    num_grown_tokens=2.5,
    num_read_tokens=6.25,
)
TIMINGS = Timings(decode_queue_s=0.001, prefill_queue_s=0.002, prefill_s=0.03, select_s=0.004, transfer_s=0.005)
NUM_CACHED = 3


@dataclass(frozen=True)
class Say:
    """One `Tokens` event."""

    token_ids: Sequence[int]


@dataclass(frozen=True)
class End:
    """`Finished`, with a usage that counts what was said."""

    reason: FinishReason = FinishReason.STOP


@dataclass(frozen=True)
class Fail:
    """A `Failed` event."""

    error: PacklightError


@dataclass(frozen=True)
class Throw:
    """The generator raises, instead of an event."""

    error: Exception


@dataclass(frozen=True)
class Wait:
    """Nothing happens until `event` is set; never, by default."""

    event: asyncio.Event = field(default_factory=asyncio.Event)


Step = Say | End | Fail | Throw | Wait
Script = Callable[[GenerateRequest], Sequence[Step]]


class ScriptedBackend:
    """`ended` tells for each request id whether its script ran to its end ("exhausted"), was closed early ("closed") or
    raised ("raised")."""

    def __init__(self, script: Script | Sequence[Step] = ()) -> None:
        self.script = script
        self.readiness_now = Readiness(True, {"decode_workers": 1, "prefill_workers": 1, "index_available": True})
        self.workers_now: tuple[WorkerInfo, ...] = ()
        self.requests: list[GenerateRequest] = []
        self.num_steps: dict[str, int] = {}
        self.ended: dict[str, str] = {}
        self.changed = asyncio.Event()

    def readiness(self) -> Readiness:
        return self.readiness_now

    def workers(self) -> tuple[WorkerInfo, ...]:
        return self.workers_now

    async def generate(self, request: GenerateRequest, plan: Plan | None = None) -> AsyncGenerator[GenerateEvent, None]:
        self.requests.append(request)
        ending = "raised"
        self._note()
        try:
            async with aclosing(self._play(request)) as events:
                async for event in events:
                    yield event
            ending = "exhausted"
        except (asyncio.CancelledError, GeneratorExit):
            ending = "closed"
            raise
        finally:
            self.ended[request.request_id] = ending
            self._note()

    @property
    def num_open(self) -> int:
        return len(self.requests) - len(self.ended)

    async def until(self, condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
        """Returns once `condition` holds; it is looked at whenever something happens here."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def _play(self, request: GenerateRequest) -> AsyncGenerator[GenerateEvent, None]:
        num_said = 0
        for step in self.script(request) if callable(self.script) else self.script:
            self.num_steps[request.request_id] = self.num_steps.get(request.request_id, 0) + 1
            self._note()
            match step:
                case Say(token_ids=token_ids):
                    if num_said == 0:
                        yield Progress(request.request_id, Usage(request.num_prompt_tokens, NUM_CACHED, 0, KV, TIMINGS))
                    num_said += len(token_ids)
                    yield Tokens(request.request_id, tuple(self._token(request, token_id) for token_id in token_ids))
                case End(reason=reason):
                    usage = Usage(request.num_prompt_tokens, NUM_CACHED, num_said, KV, TIMINGS)
                    yield Finished(request.request_id, reason, usage)
                case Fail(error=error):
                    yield Failed(request.request_id, error)
                case Throw(error=error):
                    raise error
                case Wait(event=event):
                    await event.wait()

    def _token(self, request: GenerateRequest, token_id: int) -> Token:
        wanted = request.sampling.num_logprobs
        if wanted is None:
            return Token(token_id)
        others = [(token_id + step) % 300 for step in range(wanted)]
        return Token(token_id, -0.25, tuple((other, -0.25 - step) for step, other in enumerate(others)))

    def _note(self) -> None:
        self.changed.set()


def one_by_one(token_ids: Sequence[int], reason: FinishReason = FinishReason.STOP) -> list[Step]:
    """A script that says one token per event."""
    return [*(Say([token_id]) for token_id in token_ids), End(reason)]
