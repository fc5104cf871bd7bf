"""From configuration to a runner: the model's weights, a KV pool and an attention backend, put together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import overload

import torch

from packlight.attention.base import AttentionBackend, FixedBackend
from packlight.attention.flashinfer.backend import FlashInferAttention
from packlight.attention.registry import AUTO, BACKENDS, FLASHINFER, NATIVE, TORCH
from packlight.compress.parts import CODECS
from packlight.core.config import DecodeConfig, KVConfig, ModelConfig, PrefillConfig
from packlight.core.errors import ConfigError, InvalidRequest
from packlight.core.types import ModelSpec
from packlight.core.workers import Role
from packlight.engine.graphs import CudaGraphs, GraphedRunner
from packlight.engine.runner import DecodeRunner, Runner
from packlight.kv.coded import CodedPool
from packlight.kv.fp8_pool import FP8Pool
from packlight.kv.pool import KVPool, PackedPool
from packlight.models.base import LanguageModel, load_model
from packlight.models.fake import DECODE_BIAS, PREFILL_BIAS, FakeModel
from packlight.models.opened import OpenedModel
from packlight.native.compile import NativeUnavailable

log = logging.getLogger(__name__)

# A form that packed KV may lie in, but does not travel in.
FP8_UNSCALED = "fp8_unscaled"


def build_model(
    opened: OpenedModel, config: ModelConfig, role: Role, *, on_progress: Callable[[str], None]
) -> LanguageModel:
    """The weights on their device. The fake model computes differently by role, so that tests can tell who did."""
    if opened.folder is None:
        return FakeModel(opened.spec, bias=PREFILL_BIAS if role is Role.PREFILL else DECODE_BIAS)
    return load_model(opened.folder, opened.spec, device=config.device, weights=config.weights, on_progress=on_progress)


@overload
def build_runner(model: LanguageModel, device: str, kv: KVConfig, section: PrefillConfig) -> Runner: ...
@overload
def build_runner(model: LanguageModel, device: str, kv: KVConfig, section: DecodeConfig) -> DecodeRunner: ...
def build_runner(
    model: LanguageModel, device: str, kv: KVConfig, section: PrefillConfig | DecodeConfig
) -> Runner | DecodeRunner:
    """`model` over a pool of `section.kv_memory_bytes`: of exact KV for prefill, of packed KV for decode.

    Raises ConfigError for an unknown backend or codec, or if not one block fits; NativeUnavailable where the `cpu`
    backend is asked for by name and cannot be had."""
    where = device if model.spec.name != "fake" else "cpu"
    backend = build_attention(section.attention, where, model.spec)
    if isinstance(section, DecodeConfig):
        pool = packed_pool(model.spec, where, kv.page_size, section)
        if pool.device.type == "cuda" and isinstance(backend, FixedBackend) and not isinstance(pool, CodedPool):
            return GraphedRunner(model, pool, backend, CudaGraphs(pool.device), sizes=section.graphs)
        return DecodeRunner(model, pool, backend)
    return Runner(model, _exact_pool(model.spec, where, kv.page_size, section.kv_memory_bytes), backend)


def build_attention(name: str, device: str, spec: ModelSpec | None = None) -> AttentionBackend:
    """The backend `name`; for `auto` the native one on CPUs and FlashInfer on GPUs, or where they cannot be had, or
    have no kernel for the model `spec`, torch's. Raises ConfigError, NativeUnavailable."""
    if name not in (AUTO, *BACKENDS):
        raise ConfigError(f"unknown attention backend {name!r}: choose one of {', '.join((AUTO, *BACKENDS))}")
    is_cpu = torch.device(device).type == "cpu"
    if name == NATIVE and not is_cpu:
        raise ConfigError(f"attention {name!r} computes on CPUs, model.device is {device!r}: choose {AUTO} or {TORCH}")
    if name != AUTO:
        return _load_backend(name, device, spec)
    try:
        return _load_backend(NATIVE if is_cpu else FLASHINFER, device, spec)
    except (NativeUnavailable, ConfigError) as error:
        log.warning("attention by %s, which is slower: %s", TORCH, error.message)
        return _load_backend(TORCH, device, spec)


def _load_backend(name: str, device: str, spec: ModelSpec | None) -> AttentionBackend:
    if name == FLASHINFER:
        flashinfer = FlashInferAttention(device)
        if spec is not None:
            flashinfer.require(spec.head_dim, getattr(torch, spec.dtype))
        return flashinfer
    backend: AttentionBackend = BACKENDS.load(name)()
    return backend


def packed_pool(spec: ModelSpec, device: str, page_size: int, section: DecodeConfig) -> PackedPool:
    """The pool of a decode worker: as it is computed with, as plain FP8 numbers, or coded."""
    known, memory_bytes, dtype = (*CODECS, FP8_UNSCALED), section.kv_memory_bytes, getattr(torch, spec.dtype)
    if section.kv_codec not in known:
        raise ConfigError(f"decode.kv_codec: unknown codec {section.kv_codec!r}; choose one of {', '.join(known)}")
    if section.kv_codec == "native":
        return _exact_pool(spec, device, page_size, memory_bytes)
    if section.kv_codec == FP8_UNSCALED:
        return FP8Pool.of_size(spec, memory_bytes=memory_bytes, page_size=page_size, dtype=dtype, device=device)
    try:
        return CodedPool.of_size(
            spec,
            CODECS.load(section.kv_codec)(),
            memory_bytes=memory_bytes,
            # One per head that is being appended to; a layer that arrives has no more.
            max_open_pages=section.max_batch * spec.num_layers * spec.num_kv_heads,
            page_size=page_size,
            dtype=dtype,
            device=device,
        )
    except InvalidRequest as error:  # the codec has no form for this head dim
        raise ConfigError(f"decode.kv_codec: {error.message}") from None


def _exact_pool(spec: ModelSpec, device: str, page_size: int, memory_bytes: int) -> KVPool:
    dtype = getattr(torch, spec.dtype)
    return KVPool.of_size(spec, memory_bytes=memory_bytes, page_size=page_size, dtype=dtype, device=device)
