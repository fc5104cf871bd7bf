"""What the router adds to a request: from its body to the call of a decode worker, and from tokens to bytes sent.

Knows the router's app and the seams around it. Everything is the real thing but the decode worker, which answers at
once, and the fleet, which never changes. Requests come as ASGI calls, so no socket is in the figures.

    body ─▶ parse ─▶ template ─▶ tokenise ─▶ ... ─▶ hash ─▶ match ─▶ place ─▶ Generate is called
            └────────── prepare ─────────────┘      └─────── route ───────┘
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from packlight.core.config import Config, FleetConfig
from packlight.core.errors import InvalidRequest
from packlight.core.hashing import PageHash, page_hashes
from packlight.core.types import (
    Finished,
    FinishReason,
    GenerateEvent,
    GenerateRequest,
    ModelSpec,
    Progress,
    Token,
    Tokens,
    Usage,
)
from packlight.core.workers import Role, WorkerId, WorkerInfo
from packlight.evaluate.tasks.haystack import sentences
from packlight.fleet.registry import build_fleet
from packlight.fleet.view import FleetView
from packlight.models.tokenizer import ChatTokenizer
from packlight.prefix.base import Holder, PrefixIndex
from packlight.router.app import build_app
from packlight.router.clients import LocalDecodeClients
from packlight.router.pipeline import Pipeline
from packlight.router.schema import ChatBody
from packlight.router.service import ServedModel
from packlight.router.validate import read_request
from packlight.telemetry.metrics import RouterMetrics
from packlight.wire.requests import generate_to_proto

PREFILL_IDS = ("prefill-0", "prefill-1")
DECODE_IDS = ("decode-0", "decode-1")
_COMPATIBLE = "bench"
Parts = dict[str, float]


@dataclass(slots=True)
class Stopwatch:
    """When what happened to the request that is being served, one at a time. `_cpu` is the process's CPU time."""

    body_at: float = 0.0
    body_cpu: float = 0.0
    called_cpu: float = 0.0
    tokenise_cpu: float = 0.0
    called_at: float = 0.0
    first_event_at: float = 0.0
    first_sent_at: float = 0.0
    last_sent_at: float = 0.0
    template_s: float = 0.0
    tokenise_s: float = 0.0
    match_s: float = 0.0
    num_tokenised: int = 0
    hashes: Sequence[PageHash] = field(default_factory=list)
    request: GenerateRequest | None = None


class WatchedTokenizer:
    """A tokenizer whose calls are timed."""

    def __init__(self, tokenizer: ChatTokenizer, watch: Stopwatch) -> None:
        self._tokenizer, self._watch = tokenizer, watch
        self.token_bytes, self.is_special = tokenizer.token_bytes, tokenizer.is_special

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        started, started_cpu = time.perf_counter(), time.thread_time()
        token_ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        self._watch.tokenise_s += time.perf_counter() - started
        self._watch.tokenise_cpu += time.thread_time() - started_cpu
        self._watch.num_tokenised += len(token_ids)
        return token_ids

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        started = time.perf_counter()
        text = self._tokenizer.render(messages, **kwargs)
        self._watch.template_s += time.perf_counter() - started
        return self.encode(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class WatchedIndex:
    """A prefix index whose look-ups are timed."""

    def __init__(self, index: PrefixIndex, watch: Stopwatch) -> None:
        self._index, self._watch = index, watch

    async def match(self, fingerprint: str, hashes: Sequence[PageHash]) -> dict[WorkerId, int]:
        started = time.perf_counter()
        found = await self._index.match(fingerprint, hashes)
        self._watch.match_s += time.perf_counter() - started
        self._watch.hashes = hashes
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)


class InstantDecode:
    """A decode worker that has its answer ready: `num_tokens` tokens, one event each."""

    def __init__(self, num_tokens: int, watch: Stopwatch) -> None:
        self._num_tokens, self._watch = num_tokens, watch

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateEvent, None]:
        watch, usage = self._watch, Usage(request.num_prompt_tokens, 0, self._num_tokens)
        watch.called_at, watch.called_cpu, watch.request = time.perf_counter(), time.process_time(), request
        watch.first_event_at = time.perf_counter()
        yield Progress(request.request_id, usage)
        for index in range(self._num_tokens):
            yield Tokens(request.request_id, (Token(100 + index % 1000),))
        yield Finished(request.request_id, FinishReason.LENGTH, usage)


class RouterBench:
    """One router, and requests to it one after another. Create it on the event loop, then `start`."""

    def __init__(
        self, config: Config, spec: ModelSpec, tokenizer: ChatTokenizer, index: PrefixIndex, num_answer_tokens: int
    ) -> None:
        self._config, self._spec, self._tokenizer, self._index = config, spec, tokenizer, index
        self.watch = Stopwatch()
        self._registry = CollectorRegistry()
        metrics = RouterMetrics(self._registry)
        fleet = build_fleet(FleetConfig(backend="memory", ttl_s=1e9), {}, time.monotonic)
        self._fleet, self._view = fleet, FleetView(fleet, poll_s=1.0, suspect_s=1.0, clock=time.monotonic)
        clients = LocalDecodeClients({name: InstantDecode(num_answer_tokens, self.watch) for name in DECODE_IDS})
        watched: Any = WatchedIndex(index, self.watch)
        pipeline = Pipeline(config.router, spec, watched, self._view, clients, metrics)
        served = ServedModel(spec, WatchedTokenizer(tokenizer, self.watch))
        self._app: FastAPI = build_app(config, served, pipeline, metrics)

    async def start(self) -> None:
        for name in (*PREFILL_IDS, *DECODE_IDS):
            await self._fleet.heartbeat(self._worker(name))
        await self._view.refresh()

    def _worker(self, name: str) -> WorkerInfo:
        return WorkerInfo(
            worker_id=name,
            generation=1,
            role=Role.PREFILL if name in PREFILL_IDS else Role.DECODE,
            address="nowhere:1",
            model=self._spec.name,
            fingerprint=self._spec.fingerprint,
            compatibility=_COMPATIBLE,
            page_size=self._config.kv.page_size,
            max_context=self._spec.max_context,
        )

    async def request(self, body: bytes) -> Parts:
        """Seconds by part of one streamed request. Its prompt is in the index afterwards, as if it had been prefilled.

        Raises InvalidRequest with what the router answered, if that is not a stream."""
        self._reset()
        before = self._seconds("route")
        answered = await self._exchange(body)
        route_s = self._seconds("route") - before
        watch, alone = self.watch, self._alone(body)
        overhead_s = watch.called_at - watch.body_at - watch.tokenise_s
        parts = {
            "total": watch.called_at - watch.body_at,
            "tokenise": watch.tokenise_s,
            "overhead": overhead_s,
            "overhead_cpu": watch.called_cpu - watch.body_cpu - watch.tokenise_cpu,
            "parse": alone["parse"],
            "template": watch.template_s,
            "hash": alone["hash"],
            "match": watch.match_s,
            "place": max(0.0, route_s - watch.match_s - alone["hash"]),
            "rest": max(0.0, overhead_s - watch.template_s - alone["parse"] - route_s),
        }
        if watch.hashes:
            await self._index.insert(self._spec.fingerprint, Holder(PREFILL_IDS[0], 1), watch.hashes)
        return parts | answered | {"encode": alone["encode"]}

    async def _exchange(self, body: bytes) -> Parts:
        """One ASGI call, from its body to the last byte of its stream."""
        watch, sent = self.watch, []
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                watch.body_at, watch.body_cpu = time.perf_counter(), time.process_time()
                return messages.pop()
            await _never()
            raise AssertionError

        async def send(message: Any) -> None:
            now = time.perf_counter()
            if message["type"] == "http.response.body":
                watch.first_sent_at = watch.first_sent_at or now
                watch.last_sent_at = now
            sent.append(message)

        await self._app(_scope(body), receive, send)
        if sent[0]["status"] != 200:
            raise InvalidRequest(f"the router answered {sent[0]['status']}: {sent[-1]['body'][:500]!r}")
        num_events = sum(message["type"] == "http.response.body" for message in sent)
        return {
            "first_chunk": watch.first_sent_at - watch.first_event_at,
            "per_event": (watch.last_sent_at - watch.first_event_at) / max(1, num_events),
        }

    def _alone(self, body: bytes) -> Parts:
        """Parts that the request cannot be asked for, done once more by themselves."""
        request = self.watch.request
        assert request is not None
        spec = self._spec
        page_size = self._config.kv.page_size
        return {
            "parse": _seconds(partial(read_request, body, ChatBody)),
            "hash": _seconds(partial(page_hashes, request.token_ids, page_size, fingerprint=spec.fingerprint)),
            "encode": _seconds(lambda: generate_to_proto(request).SerializeToString()),
        }

    def _seconds(self, part: str) -> float:
        name = "packlight_router_time_to_first_token_part_seconds_sum"
        return self._registry.get_sample_value(name, {"part": part}) or 0.0

    def _reset(self) -> None:
        watch = self.watch
        watch.first_sent_at = watch.template_s = watch.tokenise_s = watch.tokenise_cpu = watch.match_s = 0.0
        watch.num_tokenised, watch.hashes = 0, []


def make_body(tokenizer: ChatTokenizer, model: str, num_tokens: int, document: int, question: int) -> bytes:
    """A chat about a document, at most `num_tokens` long and less by no more than a sentence. Questions differ,
    documents are shared."""
    written = sentences("essay", max(4, num_tokens // 8), seed=document)
    low, high = 0, len(written)
    while low < high:
        middle = (low + high + 1) // 2
        chat = tokenizer.apply_chat_template(_messages(written[:middle], question), add_generation_prompt=True)
        low, high = (middle, high) if len(chat) <= num_tokens else (low, middle - 1)
    messages = _messages(written[:low], question)
    return json.dumps({"model": model, "messages": messages, "stream": True, "max_tokens": 256, "seed": 1}).encode()


def _messages(written: Sequence[str], question: int) -> list[dict[str, str]]:
    ask = f"Question {question}: what does the text say about it?"
    asked = {"role": "user", "content": " ".join([*written, ask])}
    return [{"role": "system", "content": "Answer from the text."}, asked]


def _scope(body: bytes) -> dict[str, Any]:
    headers = {"content-type": "application/json", "content-length": str(len(body)), "host": "bench"}
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }


def _seconds(function: Any) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


async def _never() -> None:
    await asyncio.Event().wait()
