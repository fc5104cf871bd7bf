"""Everything around answers: errors, paths, headers, health, models."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from packlight.core.errors import (
    Draining,
    InternalError,
    NoWorker,
    PacklightError,
    QueueFull,
    RequestNeverFits,
    ShipmentCorrupt,
    WorkerLost,
)
from packlight.router.service import Readiness
from tests.support.router_harness import CHAT, JSON, MODEL, Harness, chat_body, serving
from tests.support.scripted_backend import End, Fail, Say, Throw, one_by_one
from tests.support.tiny_tokenizer import tiny_tokenizer

ENCODE = tiny_tokenizer().encode


ERRORS: list[tuple[Exception, int, str, str, bool]] = [
    (QueueFull("full", retry_after_s=2.5), 429, "rate_limit_error", "rate_limit_exceeded", True),
    (NoWorker("no decode worker"), 503, "server_error", "no_capacity", True),
    (Draining("bye"), 503, "server_error", "draining", True),
    (WorkerLost("10.0.0.7:1234 is gone"), 503, "server_error", "worker_lost", True),
    (ShipmentCorrupt("10.0.0.7:1234 sent a bad page"), 502, "server_error", "shipment_corrupt", True),
    (RequestNeverFits("too big for the pool"), 400, "invalid_request_error", "kv_never_fits", False),
    (InternalError("10.0.0.7 /home/x.py"), 500, "server_error", "internal_error", False),
    (ZeroDivisionError("10.0.0.7 /home/x.py"), 500, "server_error", "internal_error", False),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "kind", "code", "again"), ERRORS, ids=lambda value: str(value)[:20])
async def test_an_error_before_the_first_event_is_a_clean_status(
    error: Exception, status: int, kind: str, code: str, again: bool, stream: bool
) -> None:
    scripts = [[Throw(error)], [Fail(error)]] if isinstance(error, PacklightError) else [[Throw(error)]]
    for script in scripts:
        harness = Harness(script)
        response = await harness.chat(stream=stream)
        assert response.status_code == status
        assert {**response.json()["error"], "message": 0} == {"message": 0, "type": kind, "param": None, "code": code}
        assert response.headers["x-should-retry"] == str(again).lower()
        assert "10.0.0.7" not in response.text
        assert ("retry-after" in response.headers) == (status in (429, 503))
        assert harness.metric("errors_total", type=type(error).__name__) == 1
        assert harness.backend.num_open == 0


async def test_retry_after_is_in_seconds_and_milliseconds() -> None:
    response = await Harness([Throw(QueueFull("full", retry_after_s=2.5))]).chat()
    assert response.headers["retry-after"] == "3"
    assert response.headers["retry-after-ms"] == "2500"


async def test_an_answer_without_an_end_is_our_bug() -> None:
    response = await Harness([Say([80])]).chat()
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"


async def test_one_failed_choice_fails_the_request_and_closes_the_others() -> None:
    def script(request: Any) -> Any:
        return [Fail(WorkerLost("gone"))] if request.request_id.endswith("-1") else [Say([80]), End()]

    harness = Harness(script)
    response = await harness.chat(n=3)
    assert response.status_code == 503
    assert harness.backend.num_open == 0
    assert harness.outcomes() == {"failed": 1.0}


async def test_models() -> None:
    harness = Harness()
    async with harness.client() as client:
        (model,) = (await client.get("/v1/models")).json()["data"]
        assert model.keys() == {"id", "object", "created", "owned_by", "root", "max_model_len"}
        assert (model["id"], model["object"], model["max_model_len"]) == (MODEL, "model", 256)
        assert (await client.get(f"/v1/models/{MODEL}")).json() == model
        missing = await client.get("/v1/models/other")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"


async def test_health() -> None:
    harness = Harness()
    async with harness.client() as client:
        for path in ("/health", "/health/ready"):
            ready = await client.get(path)
            assert ready.status_code == 200
            assert ready.json()["details"] == {"decode_workers": 1, "prefill_workers": 1, "index_available": True}
        harness.backend.readiness_now = Readiness(False, {"decode_workers": 0})
        unready = await client.get("/health/ready")
        assert (unready.status_code, unready.json()["ready"]) == (503, False)
        assert unready.json()["details"] == {"decode_workers": 0}
        assert (await client.get("/health/live")).status_code == 200


@pytest.mark.parametrize(
    ("accept", "is_open"),
    [
        ("", False),
        ("application/openmetrics-text; version=1.0.0", True),
        ("application/openmetrics-text; version=secret", False),
    ],
)
async def test_metrics_are_exposed(accept: str, is_open: bool) -> None:
    harness = Harness(one_by_one([80]))
    await harness.chat()
    async with harness.client() as client:
        response = await client.get("/metrics", headers={"accept": accept})
    assert response.status_code == 200
    assert 'packlight_router_requests_total{endpoint="chat",outcome="completed"} 1.0' in response.text
    assert response.text.rstrip().endswith("# EOF") == is_open


@pytest.mark.parametrize("path", ["/v1/models", f"/v1/models/{MODEL}", "/health", "/health/live", "/metrics", "/"])
async def test_what_can_be_got_can_be_asked_for_its_headers(path: str) -> None:
    """Monitors ask with HEAD. Over a socket: there the body is left out."""
    async with serving(Harness().app) as url, httpx.AsyncClient(base_url=url) as client:
        head, get = await client.head(path), await client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/", 405, "method_not_allowed"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", CHAT + "/", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/openapi.json", 404, "not_found"),
    ],
)
async def test_paths_and_methods_that_do_not_exist_answer_in_json(
    method: str, path: str, status: int, code: str
) -> None:
    async with Harness().client() as client:
        response = await client.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert ("allow" in response.headers) == (status == 405)
    assert response.headers["x-request-id"].startswith("req_")


async def test_large_bodies_are_refused_unread() -> None:
    harness = Harness(max_body_bytes=2048)
    response = await harness.chat("x" * 2048)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert response.headers["connection"] == "close"

    async def chunks() -> Any:
        for _ in range(100):
            yield b" " * 1024

    async with harness.client() as client:
        response = await client.post(CHAT, content=chunks(), headers=JSON)
    assert response.status_code == 413
    assert harness.outcomes() == {"invalid": 2.0}


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_a_web_page_cannot_post_without_asking(kind: str) -> None:
    """These are the media types that browsers send to other origins without a preflight request."""
    response = await Harness(one_by_one([80])).post(CHAT, chat_body(), {"content-type": kind})
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"


async def test_json_with_a_charset_is_json() -> None:
    kind = {"content-type": "Application/JSON; charset=utf-8"}
    assert (await Harness(one_by_one([80])).post(CHAT, chat_body(), kind)).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "x/?", "x/v1/models?", "router:99999", "[::1", "a b"])
async def test_the_host_header_decides_nothing(host: str) -> None:
    harness = Harness(one_by_one([80]))
    assert (await harness.post(CHAT, chat_body(), {"host": host})).status_code == 200
    async with harness.client() as client:
        assert (await client.get("/v1/nothing", headers={"host": host})).status_code == 404
        assert (await client.get("/health/live/", headers={"host": host})).status_code == 404


@pytest.mark.parametrize("given", ["abc-123", "trace:4.5_6"])
async def test_a_good_request_id_is_echoed(given: str) -> None:
    harness = Harness(one_by_one([80]))
    for response in (
        await harness.post(CHAT, chat_body(), {"x-request-id": given}),
        await harness.post(CHAT, b"{", {"x-request-id": given}),
    ):
        assert response.headers["x-request-id"] == given
        assert response.headers["openai-version"] == "2020-10-01"
        assert int(response.headers["openai-processing-ms"]) >= 0
    assert given not in harness.backend.requests[0].request_id


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\tb", "é"])
async def test_a_bad_request_id_is_replaced(given: str) -> None:
    harness = Harness(one_by_one([80]))
    async with harness.client() as client:
        headers = [(b"content-type", b"application/json"), (b"x-request-id", given.encode())]
        response = await client.post(CHAT, json=chat_body(), headers=headers)
    assert response.headers["x-request-id"].startswith("req_")


async def test_a_bug_in_a_route_is_a_plain_500(caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness()
    harness.backend.readiness_now = None  # type: ignore[assignment]
    async with harness.client() as client:
        response = await client.get("/health", headers={"x-request-id": "the-id"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert response.headers["x-request-id"] == "the-id"
    assert "the-id" in caplog.text
    assert "AttributeError" in caplog.text
