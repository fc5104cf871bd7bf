"""What a worker process says of itself: before it listens, while it serves, when its registry or its loop is away."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import Counter

from packlight.core.config import PrefillConfig
from packlight.core.errors import StartupError
from packlight.core.workers import Role
from packlight.engine.health import STUCK_S, Health, HealthServer
from tests.support.clock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def health(clock: FakeClock) -> Health:
    return Health(Role.PREFILL, clock=clock)


def flags_of(health: Health) -> tuple[bool, bool, bool]:
    return health.started, health.live, health.ready


def test_loading_takes_as_long_as_it_takes(health, clock):
    clock.advance(100 * STUCK_S)
    assert flags_of(health) == (False, True, False)
    assert health.why_not == "loading the model"


def test_serving_is_ready_while_the_registry_is_there(health):
    listed = True
    health.serving(lambda: listed)
    assert flags_of(health) == (True, True, True)
    assert health.why_not is None
    listed = False
    assert flags_of(health) == (True, True, False)
    assert "REDIS_URL" in health.why_not


def test_an_event_loop_that_stands_still_is_neither_live_nor_ready(health, clock):
    health.serving(lambda: True)
    clock.advance(STUCK_S - 1)
    assert health.live
    clock.advance(2)
    assert flags_of(health) == (True, False, False)
    assert "stuck for 31 s" in health.why_not
    health.pulse()
    assert flags_of(health) == (True, True, True)


def test_draining_is_live_and_not_ready(health):
    health.serving(lambda: True)
    health.draining()
    assert flags_of(health) == (True, True, False)
    assert health.why_not == "draining"


@pytest.fixture(params=["127.0.0.1", "::1"])
def server(request: pytest.FixtureRequest) -> Iterator[HealthServer]:
    with HealthServer(Role.PREFILL, PrefillConfig(host=request.param, metrics_port=0)) as server:
        yield server


def get(server: HealthServer, path: str) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", trust_env=False)


def test_it_answers_by_status_and_says_why(server):
    loading = {path: get(server, f"/health/{path}").status_code for path in ("startup", "live", "ready")}
    assert loading == {"startup": 503, "live": 200, "ready": 503}
    server.health.serving(lambda: True)
    assert {get(server, f"/health/{path}").status_code for path in ("startup", "live", "ready")} == {200}
    server.health.draining()
    answer = get(server, "/health/ready")
    assert answer.status_code == 503
    assert answer.json()["why_not"] == "draining"
    assert answer.json()["role"] == "prefill"


def test_metrics_are_beside_it(server):
    Counter("things", "Some.", registry=server.registry).inc(3)
    assert "things_total 3.0" in get(server, "/metrics").text


def test_without_a_port_there_is_no_server():
    with HealthServer(Role.PREFILL, PrefillConfig()) as server:
        assert server.url is None


def test_a_taken_port_is_said():
    with HealthServer(Role.PREFILL, PrefillConfig(metrics_port=0)) as first:
        port = int(first.url.rpartition(":")[2])
        with pytest.raises(StartupError, match=rf"127.0.0.1:{port}.*prefill.metrics_port="):
            HealthServer(Role.PREFILL, PrefillConfig(metrics_port=port))
