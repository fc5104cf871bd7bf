"""A prefill and a decode worker around a real model, in one process, and the masked oracle they are held against."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from packlight.attention.sdpa import SdpaAttention
from packlight.core.config import DecodeConfig, PrefillConfig
from packlight.core.types import GenerateRequest, PackSpec, SamplingParams, StopRules
from packlight.decode.worker import DecodeWorker
from packlight.engine.compute import Compute
from packlight.engine.runner import Runner
from packlight.kv.pool import KVPool
from packlight.models.base import LanguageModel
from packlight.prefill.worker import PrefillWorker
from packlight.telemetry.metrics import DecodeMetrics, PrefillMetrics
from tests.support.fake_pair import running, until

PAGE = 16


@dataclass
class RealPair:
    prefill: PrefillWorker
    decode: DecodeWorker
    decode_logits: list[Tensor]


class RecordingRunner(Runner):
    """Keeps the logits of every decode step."""

    def __init__(self, *args, into: list[Tensor]) -> None:
        super().__init__(*args)
        self._into = into

    def decode(self, *args) -> Tensor:
        logits = super().decode(*args)
        self._into.append(logits)
        return logits


@contextlib.asynccontextmanager
async def real_pair(
    model: LanguageModel, *, chunk_tokens: int = 512, num_tokens: int = 9000
) -> AsyncIterator[RealPair]:
    """Two workers that share `model`, with room for `num_tokens` tokens of exact KV each."""
    compute, logits, backend = Compute(), [], SdpaAttention()

    def pool() -> KVPool:
        return KVPool(model.spec, num_blocks=num_tokens // PAGE, page_size=PAGE, dtype=getattr(torch, model.spec.dtype))

    prefill = PrefillWorker(
        PrefillConfig(chunk_tokens=chunk_tokens),
        Runner(model, pool(), backend),
        compute,
        metrics=PrefillMetrics(CollectorRegistry()),
    )
    decode = DecodeWorker(
        DecodeConfig(),
        RecordingRunner(model, pool(), backend, into=logits),
        compute,
        lambda worker_id, address: prefill,
        metrics=DecodeMetrics(CollectorRegistry()),
    )
    try:
        async with running(prefill.run(), decode.run()):
            yield RealPair(prefill, decode, logits)
            await until(lambda: prefill.num_unfinished == 0 and decode.num_unfinished == 0)
        prefill.check()
        decode.check()
        assert decode.load().num_free_pages == decode.load().num_total_pages
    finally:
        compute.close()


def greedy(token_ids: Sequence[int], max_tokens: int, *, pack: PackSpec | None = None, **kwargs) -> GenerateRequest:
    """A request at temperature 0 that runs to `max_tokens`."""
    return GenerateRequest(
        request_id=kwargs.pop("request_id", "r"),
        token_ids=tuple(token_ids),
        num_prompt_tokens=len(token_ids),
        sampling=SamplingParams(temperature=0.0),
        stop=replace(StopRules(max_tokens=max_tokens, ignore_eos=True), **kwargs.pop("stop", {})),
        pack=pack or PackSpec(),
        prefill_id="prefill",
        deadline_s=250.0,
        **kwargs,
    )


class MaskedAttention:
    """Dense attention over one whole sequence in one pass. Rows of the prompt see everything before them; rows of the
    answer see, of the prompt, only what each (layer, KV head) kept. Written without our pages, selection or kernels.

    Legend: n prompt tokens, T all tokens, H query heads, K KV heads, D head dim."""

    def __init__(self, num_prompt: int, pack: PackSpec) -> None:
        self._num_prompt, self._pack = num_prompt, pack
        self.kept: list[list[list[int]]] = []

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        group = q_THD.shape[1] // k_TKD.shape[1]
        q_HTD = q_THD.transpose(0, 1).double()
        k_HTD = k_TKD.transpose(0, 1).double().repeat_interleave(group, 0)
        v_HTD = v_TKD.transpose(0, 1).double().repeat_interleave(group, 0)
        scores_HTT = q_HTD @ k_HTD.transpose(1, 2) * scale
        causal_TT = torch.ones(scores_HTT.shape[1:], dtype=torch.bool).tril()
        kept = self._select(scores_HTT.masked_fill(~causal_TT, -torch.inf).softmax(-1), group)
        self.kept.append(kept)
        mask_HTT = causal_TT.repeat(len(q_HTD), 1, 1)
        for head in range(len(q_HTD)):
            dropped = sorted(set(range(self._num_prompt)) - set(kept[head // group]))
            mask_HTT[head, self._num_prompt :, dropped] = False
        probs_HTT = scores_HTT.masked_fill(~mask_HTT, -torch.inf).softmax(-1)
        return (probs_HTT @ v_HTD).transpose(0, 1).to(q_THD.dtype)

    def _select(self, probs_HTT: Tensor, group: int) -> list[list[int]]:
        """SnapKV by its paper, one head at a time in plain Python."""
        n, pack = self._num_prompt, self._pack
        budget = pack.budget_tokens
        if budget is None or budget >= n:
            return [list(range(n))] * (len(probs_HTT) // group)
        kept = []
        for head in range(len(probs_HTT) // group):
            rows = probs_HTT[head * group : (head + 1) * group, n - pack.window : n, : n - pack.window]
            mass = rows.sum((0, 1)).tolist()
            reach = (pack.kernel or 63) // 2
            pooled = [max(mass[max(0, i - reach) : i + reach + 1]) for i in range(len(mass))]
            sinks = list(range(pack.sinks))
            order = sorted(range(pack.sinks, len(mass)), key=lambda i: (-pooled[i], i))
            chosen = order[: budget - pack.window - pack.sinks]
            kept.append(sorted([*sinks, *chosen, *range(n - pack.window, n)]))
        return kept
