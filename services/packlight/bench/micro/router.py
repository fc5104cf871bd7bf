"""`packlight bench router`: milliseconds that the router adds to a long request, part by part."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import time
from contextlib import ExitStack
from statistics import median
from typing import Any

from packlight.bench.micro.flags import at_least_one, one_of
from packlight.bench.micro.measure.redis_server import redis_server
from packlight.bench.micro.measure.router import RouterBench, make_body
from packlight.bench.micro.model import add_model_arguments, config_of, open_configured
from packlight.bench.output import add_output_arguments, check_output, emit, machine_facts, machine_line, say, table
from packlight.bench.timing import percentile
from packlight.core.config import Config, IndexConfig
from packlight.core.errors import ConfigError
from packlight.models.opened import OpenedModel
from packlight.models.tokenizer import ChatTokenizer
from packlight.prefix.registry import INDEXES, build_index

SUMMARY = "what the router adds to a request, part by part"
WARM_UP = 3
MEANINGS = {
    "total": "from the body to the call of Generate",
    "tokenise": "the tokenizer alone; once per request",
    "overhead": "total without tokenise",
    "overhead_cpu": "CPU time of that: what it costs when nobody else runs",
    "parse": "JSON and its validation",
    "template": "the chat template",
    "hash": "page hashes",
    "match": "the prefix index",
    "place": "demand and placement",
    "rest": "threads, tasks, packing policy, sampling rules",
    "encode": "beside it: the request as protobuf, for a worker elsewhere",
    "first_chunk": "from the first event to the first bytes sent",
    "per_event": "per SSE message, one token each",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--tokens", type=int, default=7000, metavar="N", help="length of the prompt")
    parser.add_argument("--answer", type=int, default=32, metavar="N", help="tokens of the answer")
    parser.add_argument("--requests", type=int, default=60, metavar="N", help="timed requests, one after another")
    parser.add_argument("--documents", type=int, default=4, metavar="N", help="texts that the requests share")
    parser.add_argument("--index", default="memory", metavar="NAME", help="prefix index: memory or redis")
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Raises StartupError for wrong flags, or a model that cannot be opened."""
    check_output(arguments.json)
    for flag in ("tokens", "answer", "requests", "documents"):
        at_least_one(flag, getattr(arguments, flag))
    config, name = config_of(arguments), one_of("index", arguments.index, INDEXES)
    opened = open_configured(config)
    if not isinstance(opened.tokenizer, ChatTokenizer):
        raise ConfigError(f"--model {arguments.model}: the benchmark needs a model with a tokenizer")
    logging.disable(logging.INFO)  # one line per request would be in the figures, and on the terminal
    with ExitStack() as stack:
        url = stack.enter_context(redis_server(os.environ)) if name == "redis" else None
        index = IndexConfig(backend=name, redis_url=url)
        parts, facts = asyncio.run(_measure(config, opened, opened.tokenizer, index, arguments))
    logging.disable(logging.NOTSET)
    report = {
        "bench": "router",
        "model": opened.spec.name,
        "index": name,
        "requests": arguments.requests,
        **facts,
        "parts_ms": {part: _milliseconds(values) for part, values in parts.items()},
        "machine": machine_facts(1),
    }
    emit(report, _lines(report), arguments.json)
    return 0


async def _measure(
    config: Config, opened: OpenedModel, tokenizer: ChatTokenizer, index_config: IndexConfig, arguments: Any
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    index = build_index(index_config, {}, time.monotonic)
    bench = RouterBench(config, opened.spec, tokenizer, index, arguments.answer)
    await bench.start()
    say(f"{arguments.requests} requests of {arguments.tokens} tokens")
    parts: dict[str, list[float]] = {}
    num_tokens, num_times = [], []
    try:
        for number in range(WARM_UP + arguments.requests):
            document = number % arguments.documents
            body = make_body(tokenizer, opened.spec.name, arguments.tokens, document, number)
            seconds = await bench.request(body)
            if number < WARM_UP:
                continue
            for part, value in seconds.items():
                parts.setdefault(part, []).append(value)
            assert bench.watch.request is not None
            num_tokens.append(bench.watch.request.num_prompt_tokens)
            num_times.append(bench.watch.num_tokenised / num_tokens[-1])
    finally:
        await index.close()
    facts = {"tokens": median(num_tokens), "times_tokenised": max(num_times)}
    return {part: parts[part] for part in MEANINGS if part in parts}, facts


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    values = [1000 * value for value in seconds]
    return {"median": median(values), "min": min(values), "p99": percentile(values, 0.99)}


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [
        f"{report['requests']} requests of {report['tokens']:.0f} tokens, {report['index']} index: "
        f"{machine_line(report['machine'])}",
        "",
    ]
    rows = [
        (part, *(f"{ms[key]:.3f}" for key in ("median", "min", "p99")), "  " + MEANINGS[part])
        for part, ms in report["parts_ms"].items()
    ]
    return lines + table(("part", "median ms", "min", "p99", "what"), rows)
