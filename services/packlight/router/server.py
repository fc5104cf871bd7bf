"""The router process: the HTTP server around the app, and what the app stands on."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from packlight.core.config import Config, FleetConfig, RouterConfig
from packlight.core.credentials import open_credentials
from packlight.core.errors import StartupError
from packlight.core.workers import WorkerInfo
from packlight.fleet.base import Fleet
from packlight.fleet.registry import build_fleet
from packlight.fleet.view import FleetView
from packlight.models.opened import open_model
from packlight.prefix.base import PrefixIndex
from packlight.prefix.registry import build_index
from packlight.router.app import build_app
from packlight.router.clients import GrpcDecodeClients
from packlight.router.limits import Gate
from packlight.router.pipeline import Pipeline
from packlight.router.service import ServedModel
from packlight.telemetry.metrics import ProcessMetrics, RouterMetrics
from packlight.telemetry.traces import open_traces
from packlight.wire.channel import Dialer

log = logging.getLogger(__name__)

_LAST_WORDS_S = 1.0
# Longer than proxies keep an idle connection (nginx and load balancers: 60 s). Whoever is the first to close one may do
# so under a request that is on its way, and a POST is not sent again.
_IDLE_CONNECTION_S = 75


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: signals belong to the CLI."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(config: RouterConfig) -> socket.socket:
    """Raises StartupError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=1024)
    except OSError as error:
        where = f"{config.host}:{config.port}"
        raise StartupError(
            f"cannot listen on {where}: {error.strerror}. Choose another --set router.port=..."
        ) from None


def http_settings(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=_IDLE_CONNECTION_S,
        timeout_graceful_shutdown=1,
    )


async def serve_http(app: FastAPI, config: RouterConfig, bound: socket.socket, stop: asyncio.Event) -> None:
    """Serve until `stop`, then refuse new requests, let running ones end for `drain_s`, and return. Those that have not
    ended by then end with an error."""
    server = HttpServer(http_settings(app))
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not serving.done():
        await _drain(app.state.gate, config.drain_s)
        server.should_exit = True
    await serving


async def _drain(gate: Gate, drain_s: float) -> None:
    gate.drain()
    try:
        async with asyncio.timeout(drain_s):
            await gate.drained()
    except TimeoutError:
        log.warning("giving up %d requests after %g s", gate.num_inside, drain_s)
        gate.give_up()
        with suppress(TimeoutError):  # a client that reads nothing cannot be told
            async with asyncio.timeout(_LAST_WORDS_S):
                await gate.drained()


def base_url(bound: socket.socket) -> str:
    """Where a client on this machine reaches the server."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def ready_message(bound: socket.socket, model: str) -> str:
    """One line that says it is ready, and one to try it with."""
    url = base_url(bound)
    question = {"role": "user", "content": "What is the capital of France?"}
    body = json.dumps({"model": model, "temperature": 0, "messages": [question]})
    curl = f"curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'"
    return f"ready: {model} at {url}/v1\n  {curl}"


async def serve(
    config: Config, environ: Mapping[str, str], stop: asyncio.Event, on_progress: Callable[[str], None]
) -> None:
    """Runs until `stop`. Raises StartupError if it cannot start."""
    tls, traces = open_credentials(config.tls), open_traces(config.telemetry)
    index = build_index(config.index, environ, time.monotonic)
    fleet = build_fleet(config.fleet, environ, time.monotonic)
    opened = open_model(config.model, on_progress=on_progress)
    clients = GrpcDecodeClients(Dialer(tls))
    view = _view(config.fleet, fleet, index, clients)
    metrics = RouterMetrics(CollectorRegistry())
    if tls is not None:
        ProcessMetrics("router", metrics.registry).follow_certificate(tls.valid_until)
    tracer = traces.tracer("router", environ.get("POD_NAME") or f"router-{socket.gethostname()}-{os.getpid()}")
    pipeline = Pipeline(
        config.router, opened.spec, index, view, clients, metrics, tracer=tracer, speaks_tls=tls is not None
    )
    app = build_app(config, ServedModel(opened.spec, opened.tokenizer), pipeline, metrics, tracer=tracer)
    with listen(config.router) as bound:
        await view.start()
        url = base_url(bound)
        on_progress(f"the router listens on {url}; {url}/health/ready says when a pair of workers can serve")
        try:
            await serve_http(app, config.router, bound, stop)
        finally:
            await view.close()
            await clients.close()
            await index.close()
            await fleet.close()
            await asyncio.to_thread(traces.close)


def _view(config: FleetConfig, fleet: Fleet, index: PrefixIndex, clients: GrpcDecodeClients) -> FleetView:
    """Whoever vanishes from the board is forgotten by the index and disconnected."""

    async def forget(worker: WorkerInfo) -> None:
        holder = worker.local_prefill or worker
        await index.drop_worker(worker.fingerprint, holder.worker_id, worker.generation)
        await clients.forget(worker)

    poll_s, suspect_s = config.heartbeat_s, config.ttl_s
    return FleetView(fleet, poll_s=poll_s, suspect_s=suspect_s, clock=time.monotonic, on_vanished=forget)
