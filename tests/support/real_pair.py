"""A prefill and a decode worker around a real model, in one process, and the masked oracle they are held against."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from packlight.core.config import DecodeConfig, PrefillConfig
from packlight.core.types import GenerateRequest, PackSpec, SamplingParams, StopRules
from packlight.decode.worker import DecodeWorker
from packlight.engine.build import build_attention, packed_pool
from packlight.engine.compute import Compute
from packlight.engine.runner import DecodeRunner, Runner
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


class RecordingRunner(DecodeRunner):
    """Keeps the logits of every decode step."""

    def __init__(self, *args, into: list[Tensor]) -> None:
        super().__init__(*args)
        self._into = into

    def decode(self, *args, **kwargs) -> Tensor:
        logits = super().decode(*args, **kwargs)
        self._into.append(logits)
        return logits


@contextlib.asynccontextmanager
async def real_pair(
    model: LanguageModel,
    *,
    chunk_tokens: int = 512,
    num_tokens: int = 9000,
    kv_codec: str = "native",
    attention: str = "sdpa",
) -> AsyncIterator[RealPair]:
    """Two workers that share `model`, with as much memory each as `num_tokens` tokens of exact KV take."""
    compute, logits, backend = Compute(), [], build_attention(attention, "cpu")
    dtype = getattr(torch, model.spec.dtype)
    memory_bytes = num_tokens // PAGE * PAGE * model.spec.kv_bytes_per_token(dtype.itemsize)
    config = DecodeConfig(kv_memory_bytes=memory_bytes, kv_codec=kv_codec)
    prefill = PrefillWorker(
        PrefillConfig(chunk_tokens=chunk_tokens),
        Runner(model, KVPool(model.spec, num_blocks=num_tokens // PAGE, page_size=PAGE, dtype=dtype), backend),
        compute,
        metrics=PrefillMetrics(CollectorRegistry()),
    )
    decode = DecodeWorker(
        config,
        RecordingRunner(model, packed_pool(model.spec, "cpu", PAGE, config), backend, into=logits),
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


class EvictingAttention:
    """Dense attention over one whole sequence, of which every row of the answer sees what H2O (arXiv 2306.14048) has
    kept until then: per (layer, KV head) a list of positions and their masses, plain Python, one token at a time. The
    prompt is attended to at once where nothing of it is evicted. Layers with a sliding window see that window.

    Legend as in `MaskedAttention`, S tokens seen."""

    def __init__(self, num_prompt: int, *, budget: int, num_recent: int, num_sinks: int, window: int) -> None:
        self._num_prompt, self._budget, self._window = num_prompt, budget, window
        self._num_recent, self._num_sinks = num_recent, num_sinks

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        group = q_THD.shape[1] // k_TKD.shape[1]
        out_THD = torch.empty_like(q_THD)
        for head in range(k_TKD.shape[1]):
            heads = slice(head * group, (head + 1) * group)
            mass: dict[int, float] = {}
            num_dense = self._num_prompt if sliding_window is None else 0
            if num_dense:
                own = q_THD[:num_dense, heads], k_TKD[:num_dense, head], v_TKD[:num_dense, head]
                out_THD[:num_dense, heads], mass = self._attend_to_all(*own, scale)
            for row in range(num_dense, len(q_THD)):
                if sliding_window is not None:
                    mass = dict.fromkeys(range(max(0, row - sliding_window + 1), row), 0.0)
                else:
                    self._make_room(mass, row)
                mass[row] = 0.0
                seen = sorted(mass)
                scores_GS = q_THD[row, heads].double() @ k_TKD[seen, head].double().T * scale
                probs_GS = scores_GS.softmax(-1)
                out_THD[row, heads] = (probs_GS @ v_TKD[seen, head].double()).to(q_THD.dtype)
                for position, share in zip(seen, probs_GS.sum(0).tolist(), strict=True):
                    mass[position] += share
        return out_THD

    def _attend_to_all(
        self, q_nGD: Tensor, k_nD: Tensor, v_nD: Tensor, scale: float
    ) -> tuple[Tensor, dict[int, float]]:
        """One KV head's part of the prompt, of which nothing is evicted, and what mass its positions have gathered."""
        scores_Gnn = q_nGD.transpose(0, 1).double() @ k_nD.double().T * scale
        causal_nn = torch.ones(scores_Gnn.shape[1:], dtype=torch.bool).tril()
        probs_Gnn = scores_Gnn.masked_fill(~causal_nn, -torch.inf).softmax(-1)
        out_nGD = (probs_Gnn @ v_nD.double()).transpose(0, 1).to(q_nGD.dtype)
        return out_nGD, dict(enumerate(probs_Gnn.sum((0, 1)).tolist()))

    def _make_room(self, mass: dict[int, float], row: int) -> None:
        if row == self._num_prompt:
            while len(mass) > self._budget:
                self._evict(mass, max(self._num_recent, self._window))
        while len(mass) >= self._budget:
            self._evict(mass, self._num_recent)

    def _evict(self, mass: dict[int, float], num_safe: int) -> None:
        safe = {*range(self._num_sinks), *sorted(mass)[len(mass) - num_safe :]}
        del mass[min(mass.keys() - safe, key=lambda position: (mass[position], position))]
