"""A language model made of arithmetic, whose answers can be worked out by hand.

It drives schedulers, transports, cancellation and death tests through the real pages, attention and packing, in
microseconds and without weights.

    One layer, one KV head. The value stored for a token is [token id, 1 if it stands at position 0 else 0], all keys
    are equal, so attention returns the mean over the tokens that are seen: their sum is mean * count, and the count is
    1 / (mean of the marks), because position 0 is a sink and always kept. The next token is

        next = (sum of the seen tokens + bias) mod vocabulary

Prefill and decode get different biases, so a test can tell who computed which token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from packlight.core.types import ModelSpec
from packlight.models.base import AttentionSink
from packlight.models.fake_spec import FAKE_VOCABULARY

PREFILL_BIAS, DECODE_BIAS = 1, 2


class FakeModel:
    """`before_step` runs on the compute thread before every step: tests hold, count or fail steps there."""

    def __init__(self, spec: ModelSpec, *, bias: int, before_step: Callable[[], None] | None = None) -> None:
        self.spec = spec
        self._bias, self._before_step = bias, before_step

    def forward(self, tokens_T: Tensor, positions_T: Tensor, batch: AttentionSink, logits_at_R: Tensor) -> Tensor:
        if self._before_step is not None:
            self._before_step()
        v_T1D = torch.stack([tokens_T.float(), (positions_T == 0).float()], dim=-1)[:, None]
        zeros_T1D = torch.zeros_like(v_T1D)
        mean_T1D = batch.attend(0, zeros_T1D, zeros_T1D, v_T1D, scale=1.0, sliding_window=None)
        mean_RD = mean_T1D[logits_at_R, 0].float()
        total_R = (mean_RD[:, 0] / mean_RD[:, 1]).round().long()
        return torch.nn.functional.one_hot((total_R + self._bias) % FAKE_VOCABULARY, FAKE_VOCABULARY).float()


def fake_answer(prompt: list[int], num_tokens: int, *, kept: list[int] | None = None) -> list[int]:
    """The greedy answer of a disaggregated pair, by hand. `kept` are the prompt positions that decode sees."""
    answer = [(sum(prompt) + PREFILL_BIAS) % FAKE_VOCABULARY]
    seen = [prompt[position] for position in kept] if kept is not None else prompt
    while len(answer) < num_tokens:
        answer.append((sum(seen) + sum(answer) + DECODE_BIAS) % FAKE_VOCABULARY)
    return answer
