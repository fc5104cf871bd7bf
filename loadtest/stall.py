"""What a running answer notices of a long prompt: the gaps between its tokens, with and without a bound.

`python loadtest/stall.py` starts `packlight serve` once per bound (`decode.max_stall_s`), streams one answer, sends a
long prompt meanwhile, and prints the answer's longest and median gap until the prompt's first token, and how long that
took. A bound so large that it binds nothing is how it is without one: then a step is `prefill.chunk_tokens` long.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

SENTENCE = "The harbour master counted {} boats that evening, and wrote it down. "


def main() -> None:
    parser = argparse.ArgumentParser(description="Gaps between tokens while a long prompt is prefilled.")
    parser.add_argument(
        "--bounds", type=float, nargs="+", default=[0.2, 1000.0], metavar="S", help="decode.max_stall_s"
    )
    parser.add_argument("--sentences", type=int, default=190, help="of the long prompt, 16 tokens each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    options = parser.parse_args()
    for _ in range(options.rounds):
        for bound in options.bounds:
            asyncio.run(measure(bound, options.sentences, options.set))


async def measure(bound: float, num_sentences: int, settings: list[str]) -> None:
    document = "".join(SENTENCE.format(number) for number in range(num_sentences))
    async with serving([f"decode.max_stall_s={bound}", *settings]) as client:
        await first_token(client, "Hi there.")
        await first_token(client, document[: len(document) // 3] + " Is it warm?")  # speeds are known
        times, has_begun = list[float](), asyncio.Event()
        running = asyncio.create_task(stream(client, times, has_begun))
        await has_begun.wait()
        started = time.perf_counter()
        await first_token(client, f"Once more. {document} How many boats were there first?")
        ended = time.perf_counter()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    meanwhile = [each for each in times if started <= each <= ended]
    gaps = [after - before for before, after in zip([started, *meanwhile], [*meanwhile, ended], strict=True)]
    print(
        f"max_stall_s {bound:g}: longest gap {max(gaps):.3f} s, median {statistics.median(gaps):.3f} s, "
        f"{len(meanwhile)} tokens meanwhile; the long prompt's first token after {ended - started:.1f} s",
        flush=True,
    )


async def stream(client: httpx.AsyncClient, times: list[float], has_begun: asyncio.Event) -> None:
    async with client.stream("POST", "/v1/chat/completions", json=body("Tell a long story.", 4000)) as reply:
        async for _ in reply.aiter_raw():
            times.append(time.perf_counter())
            if len(times) == 10:
                has_begun.set()


async def first_token(client: httpx.AsyncClient, prompt: str) -> None:
    async with client.stream("POST", "/v1/chat/completions", json=body(prompt, 2)) as reply:
        assert reply.status_code == 200, await reply.aread()
        async for _ in reply.aiter_raw():
            return


def body(prompt: str, num_tokens: int) -> dict[str, object]:
    messages = [{"role": "user", "content": prompt}]
    sizes = {"max_tokens": num_tokens, "min_tokens": num_tokens}
    return {"model": "smollm2", "messages": messages, **sizes, "temperature": 0, "stream": True}


@asynccontextmanager
async def serving(settings: list[str]) -> AsyncIterator[httpx.AsyncClient]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = [*settings, f"router.port={port}", "log_level=warning"]
    command = [sys.executable, "-m", "packlight", "serve", *(word for one in settings for word in ("--set", one))]
    environ = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)  # noqa: ASYNC220 - once
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300, trust_env=False) as client:
            async with asyncio.timeout(300):
                while not await is_ready(client):  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.1)
            yield client
    finally:
        process.terminate()
        process.wait(30)


async def is_ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health/ready")).status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()
