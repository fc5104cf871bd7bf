"""What the end-to-end tests ask of a cluster of arithmetic models, and what arithmetic says they must get.

A message's bytes are its tokens, and log-probabilities show an answer's tokens whatever text they make.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import accumulate
from threading import Event

import httpx
import openai

from packlight.models.fake import DECODE_BIAS, PREFILL_BIAS
from packlight.models.fake_spec import FAKE_VOCABULARY
from tests.support.cluster import PATIENCE_S, RunningCluster, eventually

LONG_CONTEXT = "model.max_context=50000"
DECODES = ("decode-0", "decode-1")
NUM_READ = 20
ENDLESS = 40_000
"""Tokens of an answer that no test lives to see the end of, however slow it is: to be left. Needs `LONG_CONTEXT`."""


def client_of(url: str, timeout_s: float = PATIENCE_S) -> openai.OpenAI:
    """It asks once, and heeds no proxy."""
    http_client = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=timeout_s, http_client=http_client
    )


def health_of(url: str) -> dict:
    """What the router says of the fleet, ready or not."""
    return httpx.get(f"{url}/health", trust_env=False, timeout=PATIENCE_S).json()


def chat(url: str, body: dict) -> httpx.Response:
    """One request as it is, whatever the client library would make of it."""
    return httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False, timeout=PATIENCE_S)


def num_retries(cluster: RunningCluster) -> float:
    """How often the router tried somebody else."""
    samples = cluster.metrics("router").items()
    return sum(value for name, value in samples if name.startswith("packlight_router_retries_total"))


def request_for(prompt: str, num_tokens: int) -> dict:
    """Exactly `num_tokens`, greedily: the end of text (token 0) may not come before."""
    return {
        "model": "fake",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": num_tokens,
        "temperature": 0,
        "logprobs": True,
        "extra_body": {"min_tokens": num_tokens, "kv": {"recipe": "none"}},
    }


def ask(client: openai.OpenAI, prompt: str, num_tokens: int = 8):
    """(tokens, usage)."""
    answer = client.chat.completions.create(**request_for(prompt, num_tokens))
    (choice,) = answer.choices
    return [byte for item in choice.logprobs.content for byte in item.bytes], answer.usage


class Stream:
    """An answer as it comes."""

    def __init__(self, client: openai.OpenAI, prompt: str, num_tokens: int) -> None:
        self._stream = client.chat.completions.create(
            **request_for(prompt, num_tokens), stream=True, stream_options={"include_usage": True}
        )
        self._tokens = self._read()
        self.tokens: list[int] = []
        self.usage, self.finish_reason = None, None

    def read(self, num_tokens: int) -> None:
        while len(self.tokens) < num_tokens:
            self.tokens.append(next(self._tokens))

    def read_beyond(self, event: Event, num_more: int = 200) -> list[int]:
        """Till some tokens after the event, which somebody else sets."""
        while not event.is_set():
            self.read(len(self.tokens) + 1)
        self.read(len(self.tokens) + num_more)
        return self.tokens

    def read_all(self) -> list[int]:
        self.tokens.extend(self._tokens)
        return self.tokens

    def leave(self) -> None:
        self._stream.close()

    def _read(self) -> Iterator[int]:
        with closing(self._stream):
            for chunk in self._stream:
                self.usage = chunk.usage or self.usage
                for choice in chunk.choices:
                    self.finish_reason = choice.finish_reason or self.finish_reason
                    for item in choice.logprobs.content if choice.logprobs else []:
                        yield from item.bytes


def begin(
    cluster: RunningCluster, client: openai.OpenAI, prompt: str, num_tokens: int, *, among: Sequence[str] = DECODES
) -> tuple[Stream, str]:
    """An answer of which `NUM_READ` tokens have come, and its decode worker: of those `among` which it is, the only one
    that was busy since. The answer may have ended by now; what the worker counted stays."""
    before = num_generated(cluster, among)
    stream = Stream(client, prompt, num_tokens)
    stream.read(NUM_READ)
    return stream, busy_since(cluster, before)


def num_generated(cluster: RunningCluster, among: Sequence[str] = DECODES) -> dict[str, float]:
    return {name: cluster.metrics(name)["packlight_decode_generated_tokens_total"] for name in among}


def busy_since(cluster: RunningCluster, before: dict[str, float]) -> str:
    """The one worker that has generated tokens since, once there is one."""

    def busy() -> list[str]:
        return [name for name, number in num_generated(cluster, list(before)).items() if number > before[name]]

    eventually(busy)
    (name,) = busy()
    return name


def expected(prompt: str, num_tokens: int, breaks: tuple[int, ...] = ()) -> list[int]:
    """The answer, by hand. After each of `breaks` tokens another decode worker took over: the next is prefill's."""
    answer: list[int] = []
    total = sum(prompt.encode())
    for number in range(num_tokens):
        answer.append(next_token(total, PREFILL_BIAS if number in (0, *breaks) else DECODE_BIAS))
        total += answer[-1]
    return answer


def breaks_in(prompt: str, answer: list[int]) -> tuple[int, ...]:
    """After how many tokens the answer was resumed. One in nine breaks cannot be seen: both workers would have drawn
    the same token."""
    totals = accumulate(answer, initial=sum(prompt.encode()))
    drawn = enumerate(zip(totals, answer, strict=False))
    return tuple(at for at, (total, token) in drawn if at and token != next_token(total, DECODE_BIAS))


def next_token(total: int, bias: int) -> int:
    """After tokens of that sum. 0 ends a text and is forbidden here; then all others are equally likely, and the lowest
    wins."""
    return (total + bias) % FAKE_VOCABULARY or 1
