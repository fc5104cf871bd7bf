"""Shadow fidelity: for a sample of requests, how far packed KV moves the next token's distribution.

The prefill worker is the one place where both are at hand: the exact KV, and the packed copy as decode will have it,
after its codec. So once a sampled request is answered, both predict the token after the first one, and the difference
goes to metrics. Nobody waits for it except the next step.

Legend: V vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

import numpy as np
import xxhash
from torch import Tensor

from packlight.compress.budget import keeps_all
from packlight.compress.recipes import codec_of, find_recipe
from packlight.core.hashing import counter_uniform
from packlight.core.types import PackSpec, PrefillRequest
from packlight.engine.compute import Compute
from packlight.engine.packed_rows import PackedRows
from packlight.engine.runner import ChunkWork, PrefillRunner, Runner
from packlight.kv.pages import PageBook, PageIds
from packlight.prefill.shipper import ShadowLayer
from packlight.telemetry.metrics import PrefillMetrics

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shadow:
    """One request to compare: its packed layers, and the blocks of its exact KV, on which a reference is held."""

    pack: PackSpec
    layers: tuple[ShadowLayer, ...]
    blocks: PageIds
    num_tokens: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Divergence:
    """`kl_nats`: KL(exact || packed) of the next token's distribution."""

    kl_nats: float
    is_same_token: bool


class Shadows:
    """The sampled requests of one worker, from the end of their prefill until they are compared."""

    def __init__(
        self, ratio: float, runner: PrefillRunner, compute: Compute, book: PageBook, metrics: PrefillMetrics
    ) -> None:
        """With a ratio above 0 `runner` is a `Runner`: one that holds all KV heads."""
        self._ratio, self._runner, self._compute, self._book, self._metrics = ratio, runner, compute, book, metrics
        self._waiting: list[Shadow] = []

    def wants(self, request: PrefillRequest) -> bool:
        """Whether the request is in the sample: decided by its id alone, and only if packing can change anything."""
        pack, num_tokens = request.pack, request.num_prompt_tokens
        recipe = find_recipe(pack.recipe)
        changes = recipe.reads_pages or not keeps_all(pack, num_tokens) or codec_of(pack) != "native"
        return changes and counter_uniform(xxhash.xxh3_64_intdigest(request.request_id.encode()), 0) < self._ratio

    def add(
        self, pack: PackSpec, layers: tuple[ShadowLayer, ...], blocks: PageIds, num_tokens: int, token: int
    ) -> None:
        """Hold the blocks until the comparison is done. Without a free block for one more token there is none."""
        needs_block = num_tokens % self._runner.pool.page_size == 0
        if needs_block and self._book.num_free == 0:
            return
        self._book.share(blocks)
        if needs_block:
            blocks = np.concatenate([blocks, self._book.allocate(1)])
        self._waiting.append(Shadow(pack, layers, blocks, num_tokens, token))

    async def compare_all(self) -> None:
        """Compare what waits and give the blocks back. A comparison that fails is logged and hurts no request."""
        while self._waiting:
            shadow = self._waiting.pop()
            try:
                assert isinstance(self._runner, Runner), "no shadows of a model that is in several processes"
                divergence = (await self._compute.prefill(partial(compare, self._runner, shadow))).result
                self._metrics.observe_shadow(shadow.pack.recipe, divergence.kl_nats, divergence.is_same_token)
            except Exception:
                self._metrics.count_error("ShadowFailed")
                log.exception("a shadow of recipe %s could not be compared", shadow.pack.recipe)
            finally:
                self._book.release(shadow.blocks)


def compare(runner: Runner, shadow: Shadow) -> Divergence:
    """One step from the exact and one from the packed KV."""
    work = ChunkWork((shadow.token_id,), shadow.num_tokens, shadow.blocks, wants_logits=True)
    return divergence(runner.prefill([work])[0], _packed_logits(runner, shadow))


def divergence(exact_V: Tensor, packed_V: Tensor) -> Divergence:
    log_p_V, log_q_V = exact_V.double().log_softmax(0), packed_V.double().log_softmax(0)
    kl = float((log_p_V.exp() * (log_p_V - log_q_V)).sum().clamp(min=0))
    return Divergence(kl, bool(exact_V.argmax() == packed_V.argmax()))


def _packed_logits(runner: Runner, shadow: Shadow) -> Tensor:
    spec = runner.model.spec
    num_pages = sum(layer.k_pages.shape[0] for layer in shadow.layers) + spec.num_layers * spec.num_kv_heads
    rows = PackedRows(runner, num_rows=1, num_head_pages=num_pages)
    row = rows.open(shadow.pack, shadow.num_tokens)
    for index, layer in enumerate(shadow.layers):
        rows.store(row, index, layer.lengths, layer.k_pages, layer.v_pages)
    return rows.decode([row], [shadow.token_id], [shadow.num_tokens])[0]
