"""The router's app over a scripted backend, and three ways to talk to it: in memory, as raw ASGI, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from packlight.core.config import Config
from packlight.core.config_tree import build_config
from packlight.router.app import build_app
from packlight.router.limits import Gate
from packlight.telemetry.metrics import RouterMetrics
from tests.support.scripted_backend import Script, ScriptedBackend, Step
from tests.support.tiny_tokenizer import tiny_model

MODEL = "tiny/model"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
JSON = {"content-type": "application/json"}


# A recipe that cannot use a cached prefix, and what to do instead where one is.
H2O_POLICY = {
    "rows": [
        {"min_tokens": 0, "recipe": "none"},
        {"min_tokens": 8192, "recipe": "h2o_pyramid", "ratio": 0.5, "on_hit": "pyramidkv"},
        {"min_tokens": 32_768, "recipe": "snapkv", "ratio": 0.25, "window": 64},
    ]
}


class Harness:
    """One app with everything it stands on."""

    def __init__(
        self,
        script: Script | Sequence[Step] = (),
        max_context: int = 256,
        *,
        kv: Mapping[str, Any] | None = None,
        model: Mapping[str, Any] | None = None,
        **router_config: Any,
    ) -> None:
        """`kv` is that section of the configuration; `model` has fields of the `ModelSpec` that shall be others."""
        self.config: Config = build_config({"router": router_config, "kv": dict(kv or {})})
        tiny = tiny_model(max_context)
        self.model = replace(tiny, spec=replace(tiny.spec, **(model or {})))
        self.use_backend(ScriptedBackend(script))

    def use_backend(self, backend: ScriptedBackend) -> None:
        self.backend = backend
        self.registry = CollectorRegistry()
        self.app: FastAPI = build_app(self.config, self.model, self.backend, RouterMetrics(self.registry))

    @property
    def gate(self) -> Gate:
        gate: Gate = self.app.state.gate
        return gate

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://router")

    async def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> httpx.Response:
        async with self.client() as client:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await client.post(path, content=content, headers={**JSON, **(headers or {})})

    async def chat(self, content: str = "Hello", **fields: Any) -> httpx.Response:
        return await self.post(CHAT, chat_body(content, **fields))

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"packlight_router_{name}", labels) or 0.0

    def outcomes(self, endpoint: str = "chat") -> dict[str, float]:
        """How many requests ended how."""
        return {
            sample.labels["outcome"]: sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == "packlight_router_requests_total" and sample.labels["endpoint"] == endpoint
        }

    def ids(self, text: str) -> list[int]:
        return self.model.tokenizer.encode(text)


def chat_body(content: str = "Hello", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


def events_of(response: httpx.Response) -> list[Any]:
    """The `data:` payloads of a stream, parsed, except `[DONE]`. Comments are left out."""
    payloads = [block.removeprefix("data: ") for block in response.text.split("\n\n") if block.startswith("data: ")]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


def streamed_text(events: list[Any], index: int = 0) -> str:
    choices = [choice for event in events if event != "[DONE]" for choice in event["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices if choice["index"] == index)


class Connection:
    """A client that speaks raw ASGI, so that it can leave at any moment, or stop reading after `max_parts` messages."""

    def __init__(
        self, app: FastAPI, path: str, body: Any, *, more_body: bool = False, max_parts: int | None = None
    ) -> None:
        self.max_parts = max_parts
        self.sent: list[dict[str, Any]] = []
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._inbox.put_nowait({"type": "http.request", "body": data, "more_body": more_body})
        self._arrived = asyncio.Event()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(key.encode(), value.encode()) for key, value in JSON.items()],
            "server": ("router", 80),
            "client": ("client", 1),
        }
        self.task = asyncio.create_task(app(scope, self._inbox.get, self._receive_part))

    def leave(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})

    async def until_received(self, num_parts: int) -> None:
        async with asyncio.timeout(5):
            while len(self.sent) < num_parts:
                self._arrived.clear()
                await self._arrived.wait()

    async def _receive_part(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        self._arrived.set()
        if self.max_parts is not None and len(self.sent) >= self.max_parts:
            await asyncio.Event().wait()


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[str]:
    """The app behind a real socket; yields its base URL."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="on"))
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(10):
            while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task
