"""What a step costs besides computing: a server of the arithmetic model, whose steps take next to nothing.

`python loadtest/overhead.py` starts `packlight serve` with the fake model, keeps 8 streams decoding together, and
prints milliseconds per step: the whole of it, the part on the compute thread, and what is left - event loop, messages,
text, HTTP. Then the time to the first token of short prompts, one at a time. `--pythonpath` measures another tree;
rounds of several trees alternate, and medians are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx

BATCH, NUM_TOKENS, PROMPT_TOKENS, NUM_FIRST_TOKENS = 8, 400, 128, 30
SETTINGS = (
    "model.path=fake",
    "model.max_context=8192",
    "prefill.attention=sdpa",
    "decode.attention=sdpa",
    "prefill.kv_memory_bytes=1048576",  # about as many pages as SmolLM2 has by default
    "decode.kv_memory_bytes=134217728",
    "prefill.shadow_ratio=0",
    "log_level=warning",
)


@dataclass(frozen=True)
class Round:
    """Milliseconds. `between` is what of a step is not on the compute thread."""

    step: float
    computing: float
    first_token: float

    @property
    def between(self) -> float:
        return self.step - self.computing


def main() -> None:
    parser = argparse.ArgumentParser(description="Milliseconds per step that are not computing.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pythonpath", action="append", default=[], help="another tree to measure, repeatable")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    trees: Sequence[str] = ["services", *options.pythonpath]
    rounds: dict[str, list[Round]] = {tree: [] for tree in trees}
    for _ in range(options.rounds):
        for tree in trees:
            rounds[tree].append(asyncio.run(measure(tree)))
    report = {tree: {name: median(found, name) for name in NAMES} for tree, found in rounds.items()}
    for tree, figures in report.items():
        print(f"{tree}: " + ", ".join(f"{name} {value:.2f} ms" for name, value in figures.items()))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


NAMES = ("step", "computing", "between", "first_token")


def median(rounds: Sequence[Round], name: str) -> float:
    return float(statistics.median(getattr(each, name) for each in rounds))


async def measure(tree: str) -> Round:
    async with serving(tree) as url, httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        await first_token_s(client, "w" * PROMPT_TOKENS)  # warm
        firsts = [await first_token_s(client, f"{number:0{PROMPT_TOKENS}}") for number in range(NUM_FIRST_TOKENS)]
        before = await steps_of(client)
        started = time.perf_counter()
        await asyncio.gather(*(read(client, f"{number:0{PROMPT_TOKENS}}", NUM_TOKENS) for number in range(BATCH)))
        elapsed_s = time.perf_counter() - started
        num_steps, computing_s = (now - then for now, then in zip(await steps_of(client), before, strict=True))
        assert num_steps < 1.2 * NUM_TOKENS, f"{num_steps} steps: the streams did not run together"
        return Round(1e3 * elapsed_s / num_steps, 1e3 * computing_s / num_steps, 1e3 * statistics.median(firsts))


@asynccontextmanager
async def serving(tree: str) -> AsyncIterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    flags = [flag for setting in (*SETTINGS, f"router.port={port}") for flag in ("--set", setting)]
    environ = {**os.environ, "PYTHONPATH": tree, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "packlight", "serve", *flags]
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)  # noqa: ASYNC220 - once, not in a server
    try:
        await until_ready(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


async def until_ready(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client, asyncio.timeout(90):
        while True:
            try:
                if (await client.get("/health/ready")).status_code == 200:
                    return
            except httpx.TransportError:
                await asyncio.sleep(0.05)


def request_for(prompt: str, num_tokens: int) -> dict[str, object]:
    return {
        "model": "fake",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": num_tokens,
        "min_tokens": num_tokens,
        "temperature": 0,
        "stream": True,
        "kv": {"recipe": "none"},
    }


async def read(client: httpx.AsyncClient, prompt: str, num_tokens: int) -> None:
    async with client.stream("POST", "/v1/chat/completions", json=request_for(prompt, num_tokens)) as reply:
        assert reply.status_code == 200, await reply.aread()
        async for _ in reply.aiter_raw():
            pass


async def first_token_s(client: httpx.AsyncClient, prompt: str) -> float:
    """Until the first event of the stream: it carries the role, and comes with the first token."""
    started = time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=request_for(prompt, 2)) as reply:
        async for _ in reply.aiter_raw():
            return time.perf_counter() - started
    raise AssertionError("an empty stream")


async def steps_of(client: httpx.AsyncClient) -> tuple[float, float]:
    """(decode steps so far, seconds of them)."""
    text = (await client.get("/metrics")).text
    values = [re.search(rf"(?m)^packlight_decode_step_seconds_{part} (\S+)$", text) for part in ("count", "sum")]
    assert all(values), "no decode step yet"
    count, seconds = (float(value[1]) for value in values if value)
    return count, seconds


if __name__ == "__main__":
    main()
