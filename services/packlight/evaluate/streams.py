"""What is fed to one row of packed KV, token by token, and what is noted of it.

Knows one row at a time: its next token, its position, and when it is done. Knows neither pages nor recipes.

Shapes: V vocabulary, L layers, C = query heads x head dim, N tokens of a continuation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from packlight.core.errors import InternalError
from packlight.prefill.shadow import divergence


class Stream(Protocol):
    """`token_id` at `position` is fed next, unless `is_done`; then `take` gets what came of it."""

    @property
    def is_done(self) -> bool: ...
    @property
    def token_id(self) -> int: ...
    @property
    def position(self) -> int: ...
    def take(self, logits_V: Tensor, outputs_LC: Tensor) -> None:
        """The distribution after the token, and what each layer's attention made of it."""
        ...


@dataclass(frozen=True, eq=False, slots=True)
class Continuation:
    """How the model goes on from exact KV: N tokens that were fed, and what came after each.

    logits_NV, outputs_NLC: fp32, after the i-th token."""

    token_ids: tuple[int, ...]
    logits_NV: Tensor
    outputs_NLC: Tensor


@dataclass(slots=True)
class ContinuationStream:
    """The model's own greedy continuation, written down, up to `max_tokens` or the end of the answer."""

    token_id: int
    position: int
    max_tokens: int
    eos_token_ids: Sequence[int]
    fed: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        # An answer that ends at once is continued all the same, so that there is something to compare.
        return len(self.fed) >= self.max_tokens or (self.token_id in self.eos_token_ids and bool(self.fed))

    def take(self, logits_V: Tensor, outputs_LC: Tensor) -> None:
        self.fed.append(self.token_id)
        self.logits.append(logits_V)
        self.outputs.append(outputs_LC)
        self.token_id, self.position = greedy(logits_V), self.position + 1

    def result(self) -> Continuation:
        return Continuation(tuple(self.fed), torch.stack(self.logits), torch.stack(self.outputs))


@dataclass(slots=True)
class ForcedStream:
    """Feeds the exact continuation to packed KV and notes, after each token, how far the packed model is off.

    kl_nats: KL(exact || packed) of the next token. agrees: whether the most likely one is the same. errors: relative L2
    error of attention outputs, mean over layers; a layer's error includes what earlier layers passed on."""

    exact: Continuation
    start: int
    kl_nats: list[float] = field(default_factory=list)
    agrees: list[bool] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.kl_nats) >= len(self.exact.token_ids)

    @property
    def token_id(self) -> int:
        return self.exact.token_ids[len(self.kl_nats)]

    @property
    def position(self) -> int:
        return self.start + len(self.kl_nats)

    def take(self, logits_V: Tensor, outputs_LC: Tensor) -> None:
        index = len(self.kl_nats)
        differs = divergence(self.exact.logits_NV[index], logits_V)
        self.kl_nats.append(differs.kl_nats)
        self.agrees.append(differs.is_same_token)
        self.errors.append(relative_error(self.exact.outputs_NLC[index], outputs_LC))


@dataclass(slots=True)
class AnswerStream:
    """Feeds `script`, then whatever the model answers, greedily.

    `answer` may be given its beginning: the token that the exact prefill predicts. Done at the end of the answer, at
    `max_tokens` of it, or as soon as `is_complete` says that more tokens cannot matter."""

    position: int
    max_tokens: int
    eos_token_ids: Sequence[int]
    is_complete: Callable[[Sequence[int]], bool]
    script: Sequence[int] = ()
    answer: list[int] = field(default_factory=list)
    num_fed: int = 0

    @property
    def is_done(self) -> bool:
        if not self.answer:
            return False
        return (
            len(self.answer) >= self.max_tokens
            or self.answer[-1] in self.eos_token_ids
            or self.is_complete(self.answer)
        )

    @property
    def token_id(self) -> int:
        return self.script[self.num_fed] if self.num_fed < len(self.script) else self.answer[-1]

    def take(self, logits_V: Tensor, outputs_LC: Tensor) -> None:
        self.num_fed, self.position = self.num_fed + 1, self.position + 1
        if self.num_fed >= len(self.script):
            self.answer.append(greedy(logits_V))


def greedy(logits_V: Tensor) -> int:
    """The most likely token; the lowest of equals."""
    if not bool(torch.isfinite(logits_V).all()):
        raise InternalError("the model's logits are not finite")
    return int(logits_V.argmax())


def relative_error(exact_LC: Tensor, packed_LC: Tensor) -> float:
    """||packed - exact|| / ||exact||, mean over layers."""
    exact_LC, packed_LC = exact_LC.double(), packed_LC.double()
    error_L = (packed_LC - exact_LC).norm(dim=1) / exact_LC.norm(dim=1).clamp(min=torch.finfo(torch.double).tiny)
    return float(error_L.mean())
