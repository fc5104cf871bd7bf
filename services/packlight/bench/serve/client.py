"""Asking one server and timing what it answers.

Knows HTTP and the two streaming APIs. Whatever goes wrong becomes an answer with an error: a benchmark counts
failures, it does not die of them. Connections are not reused (some servers close idle ones just when the next request
is on its way), so TTFT includes connecting: a round trip.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from packlight.bench.serve.answers import Answer
from packlight.bench.serve.prompts import Exchange, Prompts, Question
from packlight.bench.serve.stream import Piece, Reading, describe_refusal, read_stream, to_answer
from packlight.bench.serve.targets import Target
from packlight.core.errors import ConfigError

Clock = Callable[[], float]


def make_http(timeout_s: float, api_key: str | None) -> httpx.AsyncClient:
    """No proxy stands between a benchmark and what it measures."""
    return httpx.AsyncClient(
        timeout=timeout_s,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        headers={} if api_key is None else {"authorization": f"Bearer {api_key}"},
        trust_env=False,
    )


async def find_model(target: Target, http: httpx.AsyncClient) -> str:
    """The model to name in requests. Raises ConfigError if the server cannot be asked and `--model` does not say."""
    if target.model is not None:
        return target.model
    try:
        reply = await http.get(f"{target.url}/v1/models")
        return str(reply.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"--server {target.name}={target.url}: /v1/models does not say which model it serves ({error!r}). "
            f"Is the server up? Otherwise name the model: --model {target.name}=MODEL"
        ) from None


class Client:
    """One server. `clock` is the turn's: its times are those in the answers."""

    def __init__(
        self, target: Target, model: str, http: httpx.AsyncClient, prompts: Prompts, clock: Clock, max_tokens: int
    ) -> None:
        self._url, self._http, self._prompts, self._clock = target.url + prompts.path, http, prompts, clock
        fixed: dict[str, Any] = {
            "model": model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        self._body = fixed | dict(target.body)

    async def ask(
        self,
        tag: str,
        question: Question,
        past: Sequence[Exchange] = (),
        *,
        due_s: float | None = None,
        is_follow_up: bool = False,
        **fields: Any,
    ) -> Answer:
        """One streamed answer. `fields` replace those of the body."""
        body = self._body | self._prompts.fields(tag, question, past) | fields
        data = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
        sent_s = self._clock()
        reading = await self._read(data)
        return to_answer(
            reading,
            sent_s if due_s is None else due_s,
            sent_s,
            references=question.references,
            is_follow_up=is_follow_up,
            count_text=self._prompts.count_text,
        )

    async def _read(self, data: bytes) -> Reading:
        pieces: list[Piece] = []
        headers = {"content-type": "application/json"}
        try:
            async with self._http.stream("POST", self._url, content=data, headers=headers) as reply:
                if reply.status_code != httpx.codes.OK:
                    return Reading(error=f"HTTP {reply.status_code}: {describe_refusal(await reply.aread())}")
                async for piece in reply.aiter_bytes():
                    pieces.append(Piece(self._clock(), piece))
        except httpx.HTTPError as error:
            return Reading(error=f"{type(error).__name__}: {error}")
        return read_stream(pieces)
