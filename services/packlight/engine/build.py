"""From configuration to a runner: the model's weights, a KV pool and an attention backend, put together."""

from __future__ import annotations

from collections.abc import Callable

import torch

from packlight.attention.registry import BACKENDS
from packlight.core.config import KVConfig, ModelConfig, WorkerSection
from packlight.core.types import Role
from packlight.engine.runner import Runner
from packlight.kv.pool import KVPool
from packlight.models.base import LanguageModel, load_model
from packlight.models.fake import DECODE_BIAS, PREFILL_BIAS, FakeModel
from packlight.models.opened import OpenedModel


def build_model(
    opened: OpenedModel, config: ModelConfig, role: Role, *, on_progress: Callable[[str], None]
) -> LanguageModel:
    """The weights on their device. The fake model computes differently by role, so that tests can tell who did."""
    if opened.folder is None:
        return FakeModel(opened.spec, bias=PREFILL_BIAS if role is Role.PREFILL else DECODE_BIAS)
    return load_model(opened.folder, opened.spec, device=config.device, on_progress=on_progress)


def build_runner(model: LanguageModel, device: str, kv: KVConfig, section: WorkerSection) -> Runner:
    """`model` over a pool of `section.kv_memory_bytes`."""
    pool = KVPool.of_size(
        model.spec,
        memory_bytes=section.kv_memory_bytes,
        page_size=kv.page_size,
        dtype=getattr(torch, model.spec.dtype),
        device=device if model.spec.name != "fake" else "cpu",
    )
    return Runner(model, pool, BACKENDS.load(section.attention)())
