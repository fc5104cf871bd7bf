"""Where the figures are measured, and how large: a device, a model whose weights are drawn, and what is made of them.

Knows how to make a worker's parts. Does not know what is measured with them (`figures.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import torch

from packlight.attention.base import FixedBackend
from packlight.attention.flashinfer.backend import FlashInferAttention
from packlight.attention.flashinfer.wrappers import CUDA_CORE_GROUPS, FlashInferKernels
from packlight.bench.micro.measure.rows import Layout, Rows, make_rows
from packlight.bench.stream import synced
from packlight.bench.timing import slices_of
from packlight.compress.options import resolve
from packlight.core.config import Config
from packlight.core.config_tree import build_config
from packlight.core.types import ModelSpec, PackSpec
from packlight.core.workers import Role
from packlight.engine.build import build_model
from packlight.engine.graphs import CudaGraphs, GraphEngine
from packlight.models.base import LanguageModel
from packlight.models.folder import read_json
from packlight.models.opened import OpenedModel, open_model


@dataclass(frozen=True)
class Rig:
    """Where, and how large. `backend` makes an attention backend, `engine` what captures steps (None: nothing does)."""

    model_path: str = "llama-3.1-8b"
    device: str = "cuda"
    dtype: str = "bfloat16"
    batch: int = 16
    context: int = 32_768
    long_context: int = 131_072 - 64
    kept_tokens: int = 512
    kv_bytes: int = 60_000_000_000
    stream_bytes: int = 8 << 30
    num_rounds: int = 5
    slice_s: float = 0.3
    backend: Callable[[], FixedBackend] | None = None
    engine: Callable[[], GraphEngine | None] | None = None

    @cached_property
    def config(self) -> Config:
        settings = {
            "model.path": self.model_path, "model.weights": "dummy", "model.device": self.device,
            "model.dtype": self.dtype, "prefill.kv_memory_bytes": 2 * self.kv_tokens_bytes(self.context),
            "prefill.chunk_tokens": 8192, "prefill.shadow_ratio": 0,
        }  # fmt: skip
        return build_config({}, [f"{path}={value}" for path, value in settings.items()])

    @cached_property
    def opened(self) -> OpenedModel:
        return open_model(self.config.model, on_progress=print)

    @cached_property
    def model(self) -> LanguageModel:
        return build_model(self.opened, self.config.model, Role.DECODE, on_progress=print)

    @property
    def spec(self) -> ModelSpec:
        return self.opened.spec

    @cached_property
    def full_steps(self) -> dict[tuple[int, int], float]:
        """Seconds, by batch and context."""
        return {}

    def read_config(self) -> dict[str, Any]:
        assert self.opened.folder is not None
        return read_json(self.opened.folder.path / "config.json")

    @property
    def layout(self) -> Layout:
        return Layout(self.config.kv.page_size, getattr(torch, self.dtype), device=self.device)

    def kv_tokens_bytes(self, num_tokens: int) -> int:
        """At most: before the model is known, the KV of Llama-3.1-8B in bfloat16."""
        return num_tokens * 2 * 32 * 8 * 128 * 2

    def make_backend(self, cuda_core_groups: Collection[int] = CUDA_CORE_GROUPS) -> FixedBackend:
        if self.backend:
            return self.backend()
        kernels = FlashInferKernels.on(torch.device(self.device), cuda_core_groups=cuda_core_groups)
        return FlashInferAttention(self.device, kernels)

    def make_engine(self) -> GraphEngine | None:
        return self.engine() if self.engine else CudaGraphs(torch.device(self.device))

    def rows(self, batch: int, tokens: int, pack: PackSpec | None = None, prompt: int = 0) -> Rows:
        spec = self.spec
        lengths = [[tokens] * spec.num_kv_heads for _ in range(spec.num_layers)]
        return make_rows(
            spec, self.layout, lengths, num_rows=batch, num_spare_rows=batch, pack=pack, num_prompt_tokens=prompt
        )

    def rocketkv(self, prompt: int) -> PackSpec:
        """The paper's setting: of the tokens kept by stage 1, so many are read in a step."""
        return resolve(
            {"recipe": "rocketkv", "budget": self.kept_tokens}, default_recipe="rocketkv", default_budget=None
        )

    def median_s(self, function: Callable[[], object]) -> float:
        """Of the means of some rounds."""
        take = slices_of(synced(function, self.device), self.slice_s)
        return median([take() for _ in range(self.num_rounds)])
