"""The HTTP server around the app."""

from __future__ import annotations

from packlight.router.server import http_settings
from tests.support.router_harness import Harness

# nginx keeps idle connections to a server that long, and so do the load balancers of clouds.
PROXIES_CLOSE_AFTER_S = 60


def test_an_idle_connection_is_closed_by_proxies_first() -> None:
    assert http_settings(Harness().app).timeout_keep_alive > PROXIES_CLOSE_AFTER_S
