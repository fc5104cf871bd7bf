"""The routes that only read: models, health, metrics.

Knows the served model, the gate and the backend's own word on its readiness.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from packlight import __version__
from packlight.core.errors import ModelNotFound
from packlight.router.endpoint import Services


def read_only_routes(services: Services) -> APIRouter:
    router = APIRouter()
    get = partial(router.api_route, methods=["GET", "HEAD"])
    created = int(services.wall_clock())

    @get("/v1/models")
    async def list_models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_model(services, created)]})

    # A path: names of models may have slashes.
    @get("/v1/models/{name:path}")
    async def show_model(name: str) -> JSONResponse:
        if name != services.spec.name:
            raise ModelNotFound(f"This model does not exist. This server has '{services.spec.name}'.", param="model")
        return JSONResponse(_model(services, created))

    @get("/health/live")
    async def live() -> JSONResponse:
        return JSONResponse({"live": True})

    @get("/health")
    @get("/health/ready")
    async def ready() -> JSONResponse:
        health = _health(services)
        return JSONResponse(health, 200 if health["ready"] else 503)

    @get("/metrics")
    async def metrics(request: Request) -> Response:
        encode, content_type = _encoder(request.headers.get("accept", ""))
        services.metrics.set_draining(services.gate.draining)
        services.metrics.set_ready(_health(services)["ready"])  # and, on the way, the gauges of the fleet
        return Response(encode(services.metrics.registry), media_type=content_type)

    return router


def _encoder(accept: str) -> tuple[Callable[[CollectorRegistry], bytes], str]:
    """The library trips over a version that is none."""
    try:
        return choose_encoder(accept)
    except (TypeError, ValueError):
        return choose_encoder("")


def _model(services: Services, created: int) -> dict[str, Any]:
    spec = services.spec
    return {
        "id": spec.name,
        "object": "model",
        "created": created,
        "owned_by": "packlight",
        "root": spec.name,
        "max_model_len": spec.max_context,
    }


def _health(services: Services) -> dict[str, Any]:
    readiness, gate = services.backend.readiness(), services.gate
    return {
        "ready": readiness.ready and not gate.draining,
        "draining": gate.draining,
        "inflight_requests": gate.num_inside,
        "max_inflight_requests": gate.limit,
        "model": services.spec.name,
        "version": __version__,
        "details": dict(readiness.details),
    }
