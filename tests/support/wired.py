"""A router's app, a decode and a prefill worker around the arithmetic model, joined by real gRPC on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from packlight.core.config import RouterConfig
from packlight.core.config_tree import build_config
from packlight.core.workers import Role
from packlight.engine.host import Identity, describe
from packlight.fleet.memory import MemoryFleet
from packlight.fleet.view import FleetView
from packlight.models.fake_spec import FakeTokenizer, fake_spec
from packlight.prefix.memory import MemoryPrefixIndex
from packlight.router.app import build_app
from packlight.router.clients import GrpcDecodeClients
from packlight.router.pipeline import Pipeline
from packlight.router.service import ServedModel
from packlight.telemetry.metrics import RouterMetrics
from packlight.telemetry.traces import Traces
from packlight.wire.decode import decode_handler
from packlight.wire.prefill import GrpcPrefillClient, prefill_handler
from tests.support.clock import FakeClock
from tests.support.cluster import Later, LoopbackServer, loopback
from tests.support.fake_pair import PAGE, FakePair, fake_pair


@dataclass
class Wired:
    app: FastAPI
    pair: FakePair
    prefill: LoopbackServer
    decode: LoopbackServer


@asynccontextmanager
async def wired(traces: Traces, **pair_options) -> AsyncIterator[Wired]:
    """Nothing of the fleet changes after it was seen once."""
    later = Later()
    async with (
        fake_pair(client=lambda _: later, traces=traces, **pair_options) as pair,
        loopback(prefill_handler(pair.prefill)) as (prefill, channel),
        loopback(decode_handler(pair.decode)) as (decode, _),
        _decode_clients() as clients,
    ):
        later.target = GrpcPrefillClient(channel, "prefill-0")
        clock, spec, metrics = FakeClock(), fake_spec(max_context=1024), RouterMetrics(CollectorRegistry())
        board = MemoryFleet(5.0, clock)
        for role, worker, server in ((Role.PREFILL, pair.prefill, prefill), (Role.DECODE, pair.decode, decode)):
            await board.heartbeat(describe(Identity(f"{role}-0", 1, role, server.address), worker, spec, PAGE))
        view = FleetView(board, poll_s=1.0, suspect_s=5.0, clock=clock)
        await view.refresh()
        tracer = traces.tracer("router", "router-0")
        pipeline = Pipeline(RouterConfig(), spec, MemoryPrefixIndex(1000), view, clients, metrics, tracer=tracer)
        app = build_app(build_config({}), ServedModel(spec, FakeTokenizer()), pipeline, metrics, tracer=tracer)
        yield Wired(app, pair, prefill, decode)


@asynccontextmanager
async def _decode_clients() -> AsyncIterator[GrpcDecodeClients]:
    clients = GrpcDecodeClients()
    yield clients
    await clients.close()
