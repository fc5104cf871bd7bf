"""The console's routes: a page that anybody may load, and two endpoints with data that an API key guards.

Knows HTTP. What they say is `state.py`'s.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from packlight.core.config import Config
from packlight.router.console.page import page_routes
from packlight.router.console.state import fleet, settings
from packlight.router.endpoint import Services

_PRIVATE = {"cache-control": "no-store"}


def console_routes(config: Config, services: Services) -> list[Route]:
    """The page at `/`, `/console/state` and `/console/fleet`."""
    unchanging = settings(config, services.spec)

    async def show_state(request: Request) -> Response:
        return JSONResponse(unchanging, headers=_PRIVATE)

    async def show_fleet(request: Request) -> Response:
        backend, gate = services.backend, services.gate
        state = fleet(backend.workers(), backend.readiness(), services.metrics.registry)
        inflight = {"draining": gate.draining, "inflight": gate.num_inside, "max_inflight": gate.limit}
        return JSONResponse({**state, **inflight}, headers=_PRIVATE)

    data = [Route("/console/state", show_state, methods=["GET"]), Route("/console/fleet", show_fleet, methods=["GET"])]
    return [*page_routes(), *data]
