"""Puts the HTTP half of the router together.

Knows FastAPI. Everything it builds is handed in, so two apps can live in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.routing import Route

from packlight import __version__
from packlight.core.config import Config
from packlight.core.errors import PacklightError
from packlight.router.chat import ChatDialect
from packlight.router.completions import CompletionDialect
from packlight.router.console.routes import console_routes
from packlight.router.endpoint import GenerationEndpoint, Services
from packlight.router.errors import answer_problem
from packlight.router.job import JobReader
from packlight.router.keys import ApiKeyMiddleware, ApiKeys
from packlight.router.limits import Gate
from packlight.router.middleware import RequestIdMiddleware
from packlight.router.prompts import PromptLimits
from packlight.router.routes import read_only_routes
from packlight.router.service import Backend, ServedModel
from packlight.telemetry.metrics import RouterMetrics
from packlight.telemetry.traces import NO_TRACER, Tracer

OPEN_PATHS = ("/", "/console/static/", "/health", "/health/", "/metrics")
"""What needs no API key: probes, metrics, and the console's page, which has no data in itself."""


def build_app(
    config: Config,
    model: ServedModel,
    backend: Backend,
    metrics: RouterMetrics,
    *,
    tracer: Tracer = NO_TRACER,
    clock: Callable[[], float] = time.monotonic,
    wall_clock: Callable[[], float] = time.time,
) -> FastAPI:
    """The OpenAI API over `backend`. `app.state.gate` is the `Gate` that drains it: `gate.drain()` refuses new requests
    and makes the server unready, `await gate.drained()` returns when the last request has ended.

    Raises ConfigError if the fleet's default recipe, or a row of its policy, cannot be, or for a file of API keys that
    cannot be used."""
    gate = Gate(config.router.max_inflight, clock=clock)
    reader = JobReader(config, model.spec)
    services = Services(config.router, model, backend, metrics, gate, reader, tracer, clock, wall_clock)
    limits = PromptLimits(model)
    # No redirects: Starlette builds their target from the Host header.
    app = FastAPI(title="Packlight", version=__version__, openapi_url=None, redirect_slashes=False)
    app.state.gate = gate
    app.router.routes += [
        Route("/v1/chat/completions", GenerationEndpoint(services, ChatDialect(model, limits)), methods=["POST"]),
        Route("/v1/completions", GenerationEndpoint(services, CompletionDialect(model, limits)), methods=["POST"]),
    ]
    app.include_router(read_only_routes(services))
    if config.router.console:
        app.router.routes += console_routes(config, services)
    app.add_exception_handler(PacklightError, answer_problem)
    app.add_exception_handler(HTTPException, answer_problem)
    if config.router.api_keys_file is not None:
        keys = ApiKeys(Path(config.router.api_keys_file), clock=clock)
        app.add_middleware(ApiKeyMiddleware, keys=keys, open_paths=OPEN_PATHS, on_refused=metrics.count_error)
    app.add_middleware(RequestIdMiddleware, clock=clock)
    return app
