"""One answer over all of its attempts: what the client has of it, what went wrong, and what is asked next.

Knows when another attempt is worth it. Does not know how pairs are found, nor how they are called.

- Before the first token a failed attempt is simply made again, with the workers at fault left out.
- After it the answer is resumed: prompt + tokens so far go to another worker, selection anchored at the prompt's end.
  Noise depends on (seed, position) only, so at recipe `none` the tokens are those of an unbroken run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from packlight.compress.policy import Decision, Plan
from packlight.core.errors import PacklightError
from packlight.core.types import Failed, Finished, GenerateEvent, GenerateRequest, Progress, Tokens, Usage
from packlight.core.workers import WorkerId
from packlight.router.placement import Pair


@dataclass(slots=True)
class Attempts:
    """`request` and `plan` are as they came until the first pair is found; from then on they are what was decided.
    `avoid`: the workers at fault. `token_ids` and `usage`: what the client has. `error`: of the last attempt."""

    request: GenerateRequest
    plan: Plan
    num_made: int = 0
    avoid: frozenset[WorkerId] = frozenset()
    token_ids: list[int] = field(default_factory=list)
    usage: Usage | None = None
    error: PacklightError | None = None

    def resumed(self) -> GenerateRequest:
        """What the next attempt has to answer."""
        if not self.token_ids:
            return self.request
        return replace(self.request, token_ids=(*self.request.token_ids, *self.token_ids))

    def decide(self, pair: Pair) -> Decision:
        """How the KV is packed. Whoever takes over selects as the first one did, whatever it has cached."""
        decision = self.plan.decide(pair.num_cached_tokens)
        self.plan = Plan(decision)
        if decision.pack is not self.request.pack:
            self.request = replace(self.request, pack=decision.pack)
        return decision

    def begin(self, pair: Pair, spent_s: float) -> GenerateRequest:
        """What this attempt sends, `spent_s` seconds after the request came."""
        number, self.num_made = self.num_made, self.num_made + 1
        return replace(
            self.resumed(),
            request_id=f"{self.request.request_id}.{number}",
            prefill_id=pair.prefill.worker_id,
            prefill_address=pair.prefill.address,
            deadline_s=max(0.001, self.request.deadline_s - spent_s),
        )

    def see(self, event: GenerateEvent) -> GenerateEvent:
        """Take note of `event`. Returns it as the client shall see it: under the request's own id, and cached is what
        the first try found cached."""
        if isinstance(event, Tokens):
            self.token_ids += [token.token_id for token in event.tokens]
        elif isinstance(event, Progress | Finished):
            num_cached = self.usage.num_cached_tokens if self.usage else event.usage.num_cached_tokens
            self.usage = replace(event.usage, num_cached_tokens=num_cached)
            event = replace(event, usage=self.usage)
        return replace(event, request_id=self.request.request_id)

    def fail(self, error: PacklightError, culprit: WorkerId) -> None:
        self.error, self.avoid = error, self.avoid | {culprit}

    @property
    def is_worth_another(self) -> bool:
        """After a failure: whether the rest is missing, and another worker may have it."""
        return self.error is not None and self.error.retryable and self._lost_end() is None

    def end(self) -> Finished | Failed:
        """The answer's last event, once nothing more is tried."""
        assert self.error is not None, "an answer that did not fail has an end of its own"
        return self._lost_end() or Failed(self.request.request_id, self.error)

    def _lost_end(self) -> Finished | None:
        """The end that was lost with a worker which had already sent the last token."""
        num_tokens = len(self.token_ids)
        reason = self.request.stop.ends(self.token_ids[-1], num_tokens) if self.token_ids else None
        if reason is None or self.usage is None:
            return None
        return Finished(self.request.request_id, reason, replace(self.usage, num_generated_tokens=num_tokens))
