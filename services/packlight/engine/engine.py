"""What a worker process computes with: a model in this process, or in several.

The composition roots open one and ask it for runners; nobody else knows which of the two it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from packlight.core.config import Config, DecodeConfig, PrefillConfig
from packlight.core.workers import Role
from packlight.engine.build import build_model, build_runner
from packlight.engine.parallel.crew import Crew
from packlight.engine.parallel.rank import Rank, refuse_undivided
from packlight.engine.parallel.runner import ParallelDecodeRunner, ParallelRunner
from packlight.engine.runner import DecodeRunner, PrefillRunner
from packlight.models.base import LanguageModel
from packlight.models.opened import OpenedModel


class Engine(Protocol):
    def prefill_runner(self, section: PrefillConfig) -> PrefillRunner:
        """Over a pool of exact KV of its own. Raises ConfigError, NativeUnavailable: see `build_runner`."""
        ...

    def decode_runner(self, section: DecodeConfig) -> DecodeRunner:
        """The same over packed KV."""
        ...

    async def watch(self) -> None:
        """For ever; raises InternalError when a part of the model is gone."""
        ...

    def close(self) -> None: ...


class LocalEngine:
    """In this process."""

    def __init__(self, model: LanguageModel, config: Config) -> None:
        self._model, self._config = model, config

    def prefill_runner(self, section: PrefillConfig) -> PrefillRunner:
        return build_runner(self._model, self._config.model.device, self._config.kv, section)

    def decode_runner(self, section: DecodeConfig) -> DecodeRunner:
        return build_runner(self._model, self._config.model.device, self._config.kv, section)

    async def watch(self) -> None:
        await asyncio.Event().wait()

    def close(self) -> None:
        """Nothing to end."""


class ParallelEngine:
    """In as many processes as the crew has ranks. `rank` is this one's share, of a model that the crew has loaded."""

    def __init__(self, crew: Crew, rank: Rank) -> None:
        self._crew, self._rank = crew, rank

    def prefill_runner(self, section: PrefillConfig) -> PrefillRunner:
        return ParallelRunner(self._crew, self._rank, section.attention, section.kv_memory_bytes)

    def decode_runner(self, section: DecodeConfig) -> DecodeRunner:
        memory_bytes, num_rows = section.kv_memory_bytes, section.max_batch
        return ParallelDecodeRunner(self._crew, self._rank, section.attention, memory_bytes, num_rows=num_rows)

    async def watch(self) -> None:
        await self._crew.watch()

    def close(self) -> None:
        self._crew.close()


def open_engine(opened: OpenedModel, config: Config, role: Role, *, on_progress: Callable[[str], None]) -> Engine:
    """Loads the model, as `<role>.tensor_parallel` says. Raises ConfigError, ModelError, StartupError."""
    section = config.prefill if role is Role.PREFILL else config.decode
    if section.tensor_parallel == 1:
        return LocalEngine(build_model(opened, config.model, role, on_progress=on_progress), config)
    refuse_undivided(opened, config, role, section.tensor_parallel)
    crew = Crew(config, section.tensor_parallel, section.threads, timeout_s=section.rank_timeout_s)
    return ParallelEngine(crew, crew.load(opened, config, on_progress))
