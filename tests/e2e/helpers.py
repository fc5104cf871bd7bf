"""What the end-to-end tests ask of a cluster of arithmetic models, and what arithmetic says they must get.

A message's bytes are its tokens, and log-probabilities show an answer's tokens whatever text they make.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import httpx
import openai

from packlight.models.fake import DECODE_BIAS, PREFILL_BIAS
from packlight.models.fake_spec import FAKE_VOCABULARY
from tests.support.cluster import RunningCluster


def client_of(url: str) -> openai.OpenAI:
    """It asks once, waits a minute at most, and heeds no proxy."""
    http_client = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60.0, http_client=http_client)


def health_of(url: str) -> dict:
    """What the router says of the fleet, ready or not."""
    return httpx.get(f"{url}/health", trust_env=False, timeout=10.0).json()


def decode_in_use(cluster: RunningCluster) -> str:
    """The one of two decode workers that answers the only request."""
    metrics = {name: cluster.metrics(name) for name in ("decode-0", "decode-1")}
    (name,) = (name for name, samples in metrics.items() if samples["packlight_decode_running_requests"] == 1)
    return name


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


def expected(prompt: str, num_tokens: int, breaks: tuple[int, ...] = ()) -> list[int]:
    """The answer, by hand. After each of `breaks` tokens another decode worker took over: the next is prefill's."""
    answer: list[int] = []
    while len(answer) < num_tokens:
        bias = PREFILL_BIAS if len(answer) in (0, *breaks) else DECODE_BIAS
        answer.append(next_token(prompt, answer, bias))
    return answer


def breaks_in(prompt: str, answer: list[int]) -> tuple[int, ...]:
    """After how many tokens the answer was resumed."""
    places = range(1, len(answer))
    return tuple(at for at in places if answer[at] != next_token(prompt, answer[:at], DECODE_BIAS))


def next_token(prompt: str, answer: list[int], bias: int) -> int:
    """0 ends a text and is forbidden here; then all others are equally likely, and the lowest wins."""
    return (sum(prompt.encode()) + sum(answer) + bias) % FAKE_VOCABULARY or 1
