"""What every worker process stands on: its name, the fleet's board, its model, and where metrics and traces go.

Knows how these are opened for a role and closed again. Does not know what is built on them (`prefill/app.py`,
`colocated.py`) or how it is run (`host.py`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import torch

from packlight.core.config import Config, DecodeConfig, PrefillConfig
from packlight.core.credentials import CredentialFiles, open_credentials
from packlight.core.workers import Role, WorkerId
from packlight.engine.engine import Engine, open_engine
from packlight.engine.health import HealthServer
from packlight.fleet.base import Fleet
from packlight.fleet.heart import worker_identity
from packlight.fleet.registry import build_fleet
from packlight.models.grammar import Grammars, open_grammars
from packlight.models.opened import OpenedModel, open_model
from packlight.telemetry.metrics import ProcessMetrics
from packlight.telemetry.traces import Traces, open_traces


@dataclass(frozen=True, slots=True)
class Foundation:
    """`identity` is (worker id, generation)."""

    config: Config
    role: Role
    environ: Mapping[str, str]
    identity: tuple[WorkerId, int]
    http: HealthServer
    traces: Traces
    tls: CredentialFiles | None
    fleet: Fleet
    opened: OpenedModel
    engine: Engine
    grammars: Grammars | None

    @property
    def section(self) -> PrefillConfig | DecodeConfig:
        return _section(self.config, self.role)


@asynccontextmanager
async def open_foundation(
    config: Config, role: Role, environ: Mapping[str, str], on_progress: Callable[[str], None]
) -> AsyncIterator[Foundation]:
    """Loads the model. Raises StartupError if anything is wrong; what is quick to check comes first."""
    section = _section(config, role)
    async with AsyncExitStack() as closing:
        http = closing.enter_context(HealthServer(role, section))
        traces = open_traces(config.telemetry)
        closing.push_async_callback(asyncio.to_thread, traces.close)
        tls = open_credentials(config.tls)
        if tls is not None:
            ProcessMetrics(role, http.registry).follow_certificate(tls.valid_until)
        fleet = build_fleet(config.fleet, environ, time.monotonic)
        closing.push_async_callback(fleet.close)
        if section.threads:
            torch.set_num_threads(section.threads)
        opened = open_model(config.model, on_progress=on_progress)
        engine = open_engine(opened, config, role, on_progress=on_progress)
        closing.callback(engine.close)
        identity = worker_identity(role, section, environ)
        grammars = open_grammars(opened.tokenizer, opened.spec)
        yield Foundation(config, role, environ, identity, http, traces, tls, fleet, opened, engine, grammars)


def _section(config: Config, role: Role) -> PrefillConfig | DecodeConfig:
    return config.prefill if role is Role.PREFILL else config.decode
