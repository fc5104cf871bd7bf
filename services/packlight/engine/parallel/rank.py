"""One rank's share of a model that is in several processes: its heads, and pools for their KV.

Every process of the group has one of each model, the first as well as its followers. Knows nothing of the others: that
its matrix products end in a sum over all ranks is the model's affair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from packlight.compress.window import StoredWindow, WindowAttention, attention_given
from packlight.core.config import Config, Weights
from packlight.core.errors import ConfigError
from packlight.core.types import ModelSpec
from packlight.core.workers import Role
from packlight.engine.build import build_attention
from packlight.engine.parallel.group import Group, Meeting
from packlight.engine.runner import DecodeRunner, Runner
from packlight.kv.pool import ExactPool, KVPool
from packlight.models.opened import OpenedModel


class Rank:
    """This process's share of the model of that number: models are counted as they are loaded, by every rank alike."""

    def __init__(
        self,
        opened: OpenedModel,
        config: Config,
        model_number: int,
        group: Group,
        meeting: Meeting,
        on_progress: Callable[[str], None],
    ) -> None:
        """Loads the model. Raises ModelError if transformers cannot divide it."""
        # Importing transformers takes seconds, and every worker imports this file.
        from packlight.models.sharded import load_sharded_model

        assert opened.folder is not None, "the fake model is refused beforehand"
        self.model_number, self.num_ranks = model_number, group.num_ranks
        self.device = rank_device(config.model.device, group.rank)
        self._spec, self._page_size = rank_spec(opened.spec, self.num_ranks), config.kv.page_size
        self.model = load_sharded_model(
            opened.folder,
            opened.spec,
            device=self.device,
            num_ranks=self.num_ranks,
            meet=lambda name: meeting.meet(f"{name} {model_number}"),
            on_progress=on_progress,
        )

    def exact(self, attention: str, memory_bytes: int) -> Runner:
        """A runner over this rank's share of `memory_bytes` of exact KV. Raises ConfigError if it holds no block."""
        return Runner(self.model, self._pool(memory_bytes), build_attention(attention, str(self.device), self._spec))

    def packed(self, attention: str, memory_bytes: int) -> DecodeRunner:
        """The same for packed KV."""
        backend = build_attention(attention, str(self.device), self._spec)
        return DecodeRunner(self.model, self._pool(memory_bytes), backend)

    def _pool(self, memory_bytes: int) -> KVPool:
        return KVPool.of_size(
            self._spec,
            memory_bytes=memory_bytes // self.num_ranks,
            page_size=self._page_size,
            dtype=getattr(torch, self._spec.dtype),
            device=str(self.device),
        )


class ReadWindow:
    """The window's attention in torch, over keys that are copied out of the pool."""

    def __init__(self, pool: ExactPool) -> None:
        self._pool = pool

    def attend(
        self, layer: int, q_WHD: Tensor, blocks: Tensor, num_tokens: int, scale: float, lse_WH: Tensor | None = None
    ) -> WindowAttention:
        return attention_given(q_WHD, self._pool.read_keys(layer, blocks, num_tokens), scale, lse_WH)


def window_of(runner: Runner) -> StoredWindow:
    return runner.window or ReadWindow(runner.pool)


def rank_device(device: str, index: int) -> torch.device:
    """The CPU for all; of GPUs the configured one for rank 0, and those after it."""
    first = torch.device(device)
    return first if first.type == "cpu" else torch.device(first.type, (first.index or 0) + index)


def rank_spec(spec: ModelSpec, num_ranks: int) -> ModelSpec:
    """The model as one rank's pool sees it."""
    return replace(spec, num_kv_heads=spec.num_kv_heads // num_ranks)


def refuse_undivided(opened: OpenedModel, config: Config, role: Role, num_ranks: int) -> None:
    """Raises ConfigError for what cannot be had in several processes."""
    name, spec = f"{role}.tensor_parallel={num_ranks}", opened.spec
    if opened.folder is None:
        raise ConfigError(f"{name}: the fake model has nothing to divide. Choose a real one")
    if spec.num_kv_heads % num_ranks:
        raise ConfigError(
            f"{name}: {spec.name} has {spec.num_kv_heads} KV heads, which do not divide evenly. Choose a divisor of "
            f"{spec.num_kv_heads}"
        )
    if config.model.weights in (Weights.INT8, Weights.INT4):
        raise ConfigError(f"{name}: model.weights={config.model.weights} is for one process. Set model.weights=native")
    if role is Role.DECODE and config.decode.kv_codec != "native":
        raise ConfigError(f"{name}: decode.kv_codec={config.decode.kv_codec} is for one process. Set it to native")
