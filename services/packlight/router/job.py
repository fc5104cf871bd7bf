"""From the bytes of a request to the work it asks for.

Knows the model, the limits and the dialects' prompts. Pure but slow (parsing, templates, tokenising), so the endpoint
runs it on a thread.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from packlight.compress.policy import Plan, Policy
from packlight.core.config import Config
from packlight.core.errors import InvalidRequest, ModelNotFound
from packlight.core.trace import TraceContext
from packlight.core.types import GenerateRequest, ModelSpec
from packlight.router.dialect import Dialect
from packlight.router.formats import answer_format
from packlight.router.params import answer_room, derive_seed, sampling_params, stop_rules
from packlight.router.schema import Body, StreamOptions
from packlight.router.tools.model import CallRules
from packlight.router.validate import read_request


@dataclass(frozen=True, slots=True)
class Job:
    """A valid request. `requests` and `plans` hold one entry per choice, in the order of the choices' indices.
    `ignored` are fields that are not known, `loosened` what of a schema the answer is not held to, `calls` what may be
    called in it."""

    answer_id: str
    requests: tuple[GenerateRequest, ...]
    plans: tuple[Plan, ...]
    num_samples: int
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    running_usage: bool
    explain: bool
    ignored: list[str]
    loosened: tuple[str, ...] = ()
    calls: CallRules | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Every prompt once, however many samples are drawn from it."""
        return sum(request.num_prompt_tokens for request in self.requests[:: self.num_samples])


class JobReader:
    """Reads requests for one model under one configuration."""

    def __init__(self, config: Config, spec: ModelSpec) -> None:
        """Raises ConfigError for packing that cannot be."""
        self._config, self._spec, self._policy = config.router, spec, Policy(config.kv, spec)

    def read(
        self,
        data: bytes,
        dialect: Dialect[Any],
        answer_id: str,
        time_left_s: Callable[[], float],
        trace: TraceContext | None = None,
    ) -> Job:
        """`trace` is the request's span. Raises InvalidRequest, ContextLengthExceeded or ModelNotFound."""
        body, ignored = read_request(data, dialect.body_type)
        if body.model != self._spec.name:
            raise ModelNotFound(f"This model does not exist. This server has '{self._spec.name}'.", param="model")
        prompts = dialect.prompts(body, self._most_prompts(body))
        _check_explained(body, prompts)
        rooms = [self._room(body, tokens, dialect.prompt_param) for tokens in prompts]
        plans = [self._plan(body, tokens, dialect) for tokens in prompts]
        options = body.stream_options or StreamOptions()
        calls = dialect.call_rules(body, prompts[0])
        wanted = answer_format(body, self._spec, is_reasoning=dialect.is_reasoning(body))
        grammar = calls.grammar if calls else wanted.grammar
        return Job(
            answer_id=answer_id,
            requests=self._requests(body, prompts, rooms, plans, grammar, answer_id, time_left_s(), trace),
            plans=tuple(plan for plan in plans for _ in range(body.n)),
            num_samples=body.n,
            stops=tuple(body.stop),
            stream=body.stream,
            include_usage=options.include_usage,
            running_usage=options.continuous_usage_stats,
            explain=body.explain,
            ignored=ignored,
            loosened=calls.loosened if calls else wanted.loosened,
            calls=calls,
        )

    def _most_prompts(self, body: Body) -> int:
        """How many prompts may come with `body.n` samples each. Raises InvalidRequest when not even one may."""
        limit = self._config.max_inflight
        if body.n > limit:
            raise InvalidRequest(
                f"Invalid 'n': integer above maximum value. Expected a value <= {limit}, but got {body.n} instead.",
                param="n",
                code="integer_above_max_value",
            )
        return limit // body.n

    def _room(self, body: Body, tokens: list[int], param: str) -> int:
        default = self._config.default_max_tokens
        return answer_room(len(tokens), body.max_new_tokens, default, self._spec.max_context, param)

    def _plan(self, body: Body, tokens: list[int], dialect: Dialect[Any]) -> Plan:
        plan = self._policy.plan(body.packing, len(tokens), is_reasoning=dialect.is_reasoning(body))
        if not plan.max_protected:
            return plan
        return plan.protecting(dialect.num_instructing(body, tokens, plan.max_protected))

    def _requests(
        self,
        body: Body,
        prompts: list[list[int]],
        rooms: list[int],
        plans: list[Plan],
        grammar: str,
        answer_id: str,
        deadline_s: float,
        trace: TraceContext | None,
    ) -> tuple[GenerateRequest, ...]:
        seed = secrets.randbits(63) if body.seed is None else body.seed
        # An explicit cache policy without breakpoints means "do not share": a salt that nobody else has.
        salt = answer_id if body.prompt_cache_options.mode == "explicit" else body.cache_salt
        return tuple(
            GenerateRequest(
                request_id=f"{answer_id}-{prompt_index * body.n + sample}",
                token_ids=tokens,
                num_prompt_tokens=len(tokens),
                sampling=sampling_params(body, derive_seed(seed, sample), self._spec, grammar),
                stop=stop_rules(body, room, self._spec),
                pack=plan.usual.pack,
                cache_salt=salt,
                deadline_s=deadline_s,
                explain=body.explain and sample == 0,
                trace=trace,
            )
            for prompt_index, (tokens, room, plan) in enumerate(zip(map(tuple, prompts), rooms, plans, strict=True))
            for sample in range(body.n)
        )


def _check_explained(body: Body, prompts: list[list[int]]) -> None:
    """An explanation is of one prompt; its samples are packed alike."""
    if body.explain and len(prompts) > 1:
        problem = f"got {len(prompts)} prompts, and only one can be explained; ask for each by itself"
        raise InvalidRequest(f"kv.explain: {problem}", param="kv.explain")
