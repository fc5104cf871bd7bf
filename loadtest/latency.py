"""Latency of one server, as a client sees it: TTFT by prompt length and prefix hit, TPOT by batch, bytes shipped.

    python loadtest/latency.py --url http://127.0.0.1:8000 --rounds 3

Definitions. TTFT: from sending the request to the first chunk with a choice. TPOT: (last chunk - first chunk) /
(completion tokens - 1), tokens counted by `usage`. Closed loop; each figure is the median over rounds, with the range.
Prompts are token ids, so their length is exact; every cold prompt differs from its first token on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from packlight.core.config import ModelConfig
from packlight.models.opened import open_model

TEXT = "The mill stood by the river, and every morning the miller counted the sacks before the carts came. "
LENGTHS = (128, 2048, 7000)
NUM_NEW_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Sample:
    ttft_s: float
    tpot_s: float
    usage: dict[str, Any]


class Client:
    def __init__(self, url: str, model: str) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=600.0)
        self._model = model

    async def complete(self, prompt: list[int], kv: dict[str, Any], num_new_tokens: int = NUM_NEW_TOKENS) -> Sample:
        """One streamed answer of exactly `num_new_tokens`."""
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": num_new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "kv": kv,
        }
        started, times, usage = time.perf_counter(), [], {}
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise SystemExit((await response.aread()).decode())
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if event.get("choices"):
                    times.append(time.perf_counter())
                usage = event.get("usage") or usage
        return Sample(times[0] - started, (times[-1] - times[0]) / (usage["completion_tokens"] - 1), usage)


class Prompts:
    """Token prompts of exact lengths that share nothing unless asked to."""

    def __init__(self, text_ids: list[int]) -> None:
        self._text, self._next = text_ids, 1000 + int(time.time()) % 20_000

    def fresh(self, num_tokens: int) -> list[int]:
        self._next += 1
        return [self._next, *(self._text * (num_tokens // len(self._text) + 1))][:num_tokens]

    def continued(self, prompt: list[int], share: float) -> list[int]:
        """The first `share` of `prompt`, and another end."""
        border = int(len(prompt) * share)
        return prompt[:border] + self.fresh(len(prompt) - border)


async def measure(client: Client, prompts: Prompts, rounds: int) -> list[dict[str, Any]]:
    await client.complete(prompts.fresh(256), {"recipe": "none"})  # warm up
    packed = {"recipe": "snapkv", "ratio": 0.125}
    rows: dict[str, list[float]] = {}
    usages: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for length in LENGTHS:
            prompt = prompts.fresh(length)
            cold = await client.complete(prompt, {"recipe": "none"})
            hit = await client.complete(prompts.continued(prompt, 0.9), {"recipe": "none"})
            snap = await client.complete(prompts.fresh(length), packed)
            for name, sample in (("cold", cold), ("90 % prefix hit", hit), ("snapkv 8x, cold", snap)):
                rows.setdefault(f"TTFT, {length} tokens, {name}", []).append(sample.ttft_s)
                rows.setdefault(f"TPOT, {length} tokens, {name}, batch 1", []).append(sample.tpot_s)
                usages[f"TTFT, {length} tokens, {name}"] = sample.usage
        for length in (128, 2048):
            for name, kv in (("none", {"recipe": "none"}), ("snapkv 8x", packed)):
                batch = [prompts.fresh(length) for _ in range(8)]
                for prompt in batch:  # so that no prefill runs beside the decode steps that are measured
                    await client.complete(prompt, kv, 2)
                samples = await asyncio.gather(*(client.complete(prompt, kv, 64) for prompt in batch))
                rows.setdefault(f"TPOT, {length} tokens, {name}, batch 8", []).append(
                    statistics.median(sample.tpot_s for sample in samples)
                )
    return [summary(name, values, usages.get(name)) for name, values in rows.items()]


def summary(name: str, values: Sequence[float], usage: dict[str, Any] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"what": name, "median_ms": round(1000 * statistics.median(values), 1)}
    row |= {"min_ms": round(1000 * min(values), 1), "max_ms": round(1000 * max(values), 1), "rounds": len(values)}
    if usage and "kv" in usage:
        row |= {key: usage["kv"][key] for key in ("shipped_bytes", "exact_bytes", "attention_mass_retained")}
    return row


def table(rows: Iterable[dict[str, Any]]) -> str:
    lines = ["| what | median ms | range ms | shipped / exact MB |", "|---|---|---|---|"]
    for row in rows:
        shipped = f"{row['shipped_bytes'] / 1e6:.1f} / {row['exact_bytes'] / 1e6:.1f}" if "exact_bytes" in row else ""
        lines.append(f"| {row['what']} | {row['median_ms']} | {row['min_ms']} - {row['max_ms']} | {shipped} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="TTFT, TPOT and shipped bytes of a running Packlight server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    arguments = parser.parse_args()
    tokenizer = open_model(ModelConfig(path=arguments.model), on_progress=print).tokenizer
    prompts = Prompts(tokenizer.encode(TEXT))
    rows = asyncio.run(measure(Client(arguments.url, arguments.model), prompts, arguments.rounds))
    print(table(rows))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
