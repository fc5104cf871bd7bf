"""The values that cross between the router, the workers and the engine.

Knows what a request, an answer event, a usage report and a model's shape are. Does not know HTTP, protobuf, tensors or
files, nor what the fleet's board says of a worker (`workers.py`).

Life of a request, and the events that report it:

    router ── GenerateRequest ──▶ decode worker ── PrefillRequest ──▶ prefill worker
    router ◀── Tokens and Progress ..., then exactly one of Finished | Failed ── decode worker
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from packlight.core.errors import InvalidRequest, PacklightError
from packlight.core.kept_map import KeptMap
from packlight.core.trace import TraceContext
from packlight.core.workers import WorkerId

RequestId = str


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one token is drawn. The noise is `counter_uniform(seed, position)`: nothing else is random.

    temperature 0 means greedy. `top_k` 0 and `top_p` 1 and `min_p` 0 mean off. `repetition_penalty` counts prompt and
    generated tokens, presence and frequency penalties count generated tokens only. `num_logprobs` None means that no
    log-probabilities are wanted; 0 means the chosen token's only. `grammar` is what the answer must match, in the form
    of `models/grammar.py`; empty is anything.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    num_logprobs: int | None = None
    grammar: str = ""

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def is_plain_greedy(self) -> bool:
        """The token is the argmax of the raw logits."""
        return self.temperature == 0.0 and not (self.has_penalties or self.logit_bias or self.grammar)


@dataclass(frozen=True, slots=True)
class StopRules:
    """When generation ends, in token terms. Stop *strings* are the router's, which knows text.

    `max_tokens` counts all generated tokens of the answer, including those of a resumed request's earlier life.
    """

    max_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0

    def banned(self, num_generated: int) -> tuple[int, ...]:
        """The tokens that may not come next, after `num_generated` of the answer: ends, while it is too short."""
        if num_generated >= self.min_tokens:
            return ()
        return self.stop_token_ids if self.ignore_eos else (*self.eos_token_ids, *self.stop_token_ids)

    def ends(self, token_id: int, num_generated: int) -> FinishReason | None:
        """Why the answer ends with `token_id`, its `num_generated`-th token, or None."""
        is_eos = token_id in self.eos_token_ids and not self.ignore_eos
        if is_eos or token_id in self.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_generated >= self.max_tokens else None


class Pooling(StrEnum):
    MAX = "max"
    AVG = "avg"


@dataclass(frozen=True, slots=True)
class PackSpec:
    """A recipe with its parameters: what to keep of a prompt's KV, in what form, and how to read it.

    `budget_tokens` is what one KV head may cost, in prompt tokens, sinks and window included: tokens kept, or tokens
    read per step where the recipe keeps all and reads few. `ratio` gives it as a share of the prompt instead; exactly
    one of the two is set unless the recipe has no budget. `kernel` None lets the scorer choose its pooling width.
    `codec` None is the recipe's own. `params` are the method's own constants, by name; one that is absent has the
    table's default. `mass_floor` is the least share of the window's attention mass that a layer may keep: its budget
    grows until that holds; 0 is no floor. See `compress/recipes.py` for the tables.
    """

    recipe: str = "none"
    budget_tokens: int | None = None
    ratio: float | None = None
    window: int = 32
    sinks: int = 4
    kernel: int | None = None
    pooling: Pooling = Pooling.MAX
    codec: str | None = None
    params: tuple[tuple[str, float], ...] = ()
    mass_floor: float = 0.0


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One answer to produce.

    `token_ids` is the prompt, followed by tokens already generated when an answer is resumed on another worker;
    `num_prompt_tokens` marks the border, and selection is anchored there. `prefill_address` names the prefill worker
    that the router chose. `deadline_s` is the time left, in seconds, when the message is sent. `explain` asks for
    `KVUsage.kept_map`. `trace` is the span of whoever asks.
    """

    request_id: RequestId
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingParams
    stop: StopRules
    pack: PackSpec = PackSpec()
    cache_salt: str = ""
    prefill_id: WorkerId = ""
    prefill_address: str = ""
    deadline_s: float = 600.0
    explain: bool = False
    trace: TraceContext | None = None


@dataclass(frozen=True, slots=True)
class PrefillRequest:
    """What a decode worker asks of a prefill worker.

    Tokens after `num_prompt_tokens` were generated earlier; `banned_token_ids` may not be sampled as the first token
    (an end that comes before `min_tokens`). `transports` are those the caller can receive by, best first; behind a
    name, `:` and what its sender needs to know (`transfer/registry.py`)."""

    request_id: RequestId
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingParams
    pack: PackSpec
    cache_salt: str = ""
    transports: tuple[str, ...] = ("grpc",)
    banned_token_ids: tuple[int, ...] = ()
    deadline_s: float = 600.0
    explain: bool = False
    trace: TraceContext | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token. `logprob` and `top_logprobs` (id, value; best first) come from the raw distribution, before
    penalties, temperature and filters."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class KVUsage:
    """What packing did to one request. All token counts are prompt tokens, means over layers and KV heads.

    `num_grown_tokens` of those kept were added to hold the fidelity floor. `num_read_tokens` is what a decode step
    reads at most of those kept. `kept_map` is there if the request asked for it, once its KV has arrived."""

    recipe: str = "none"
    num_kept_tokens: float = 0.0
    shipped_bytes: int = 0
    exact_bytes: int = 0
    retained_mass: float | None = None
    codec: str = "native"
    num_grown_tokens: float = 0.0
    num_read_tokens: float = 0.0
    kept_map: KeptMap | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time to the first tokens went, in seconds. Each is the gap between two events of the request's life."""

    decode_queue_s: float = 0.0
    prefill_queue_s: float = 0.0
    prefill_s: float = 0.0
    select_s: float = 0.0
    transfer_s: float = 0.0
    first_step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer, as billed: a retry or a resumption does not change them."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    kv: KVUsage = KVUsage()
    timings: Timings = Timings()


@dataclass(frozen=True, slots=True)
class Tokens:
    """Some more tokens of an answer, in order."""

    request_id: RequestId
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """What is known of the usage so far: with the first token, and again when the KV has arrived. So a reader that
    stops early (a stop string) still has it."""

    request_id: RequestId
    usage: Usage


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete. Terminal."""

    request_id: RequestId
    reason: FinishReason
    usage: Usage


@dataclass(frozen=True, slots=True)
class Failed:
    """The answer could not be completed. Terminal. `error.retryable` says whether another worker may succeed."""

    request_id: RequestId
    error: PacklightError


GenerateEvent = Tokens | Progress | Finished | Failed


def is_terminal(event: GenerateEvent) -> bool:
    """Whether nothing follows `event`."""
    return isinstance(event, Finished | Failed)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the control plane and the page books need to know of a model. `fingerprint` names weights, tokenizer and
    dtype: two workers with the same one compute the same KV."""

    name: str
    fingerprint: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    sliding_windows: tuple[int | None, ...] = ()

    def check_prompt(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Raise InvalidRequest for tokens the model does not have: they would fail a whole step, not one request."""
        if not 1 <= num_prompt_tokens <= len(token_ids):
            raise InvalidRequest(f"the prompt has {num_prompt_tokens} of {len(token_ids)} tokens: at least 1 is needed")
        largest, smallest = max(token_ids), min(token_ids)
        if smallest < 0 or largest >= self.vocab_size:
            wrong = smallest if smallest < 0 else largest
            raise InvalidRequest(f"token id {wrong} is not in the vocabulary, which ends at {self.vocab_size - 1}")

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of exact K and V of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize
