"""`packlight bench index`: prefix lookups in a fleet's index, by its size, against a bare PING."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

from packlight.bench.micro.flags import at_least_one, one_of
from packlight.bench.micro.measure.index import Calls, PathShape, Pinger, Subject, Tree, spread_numbers, take_rounds
from packlight.bench.micro.measure.redis_server import redis_server
from packlight.bench.output import (
    add_output_arguments,
    check_output,
    counts,
    emit,
    machine_facts,
    machine_line,
    say,
    table,
)
from packlight.bench.timing import percentile
from packlight.core.config import IndexConfig
from packlight.core.errors import StartupError
from packlight.prefix.registry import INDEXES, build_index

REPLY_TIMEOUT_S = 5.0  # here every call has to come back; a router gives up much earlier
SUMMARY = "prefix lookups and insertions by index size, against a Redis PING"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pages", default="1e4,1e6", metavar="N,N", help="sizes of the index, ascending")
    parser.add_argument("--indexes", default=",".join(INDEXES), metavar="A,B", help="which to measure")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="interleaved rounds")
    parser.add_argument("--calls", type=int, default=300, metavar="N", help="lookups in one round")
    parser.add_argument("--insertions", type=int, default=100, metavar="N", help="timed insertions at each size")
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Uses `REDIS_URL`, or a server of its own. Raises StartupError if there is neither."""
    check_output(arguments.json)
    sizes = sorted(counts("pages", arguments.pages))
    names = [one_of("indexes", name, INDEXES) for name in arguments.indexes.split(",")]
    for flag in ("rounds", "calls", "insertions"):
        at_least_one(flag, getattr(arguments, flag))
    with ExitStack() as stack:
        url = stack.enter_context(redis_server(os.environ)) if "redis" in names else None
        points = [asyncio.run(_measure(name, sizes, url, arguments)) for name in names]
    report = {
        "bench": "index",
        "path_pages": PathShape().num_pages,
        "rounds": arguments.rounds,
        "calls": arguments.calls,
        "indexes": {name: {"sizes": each} for name, each in zip(names, points, strict=True)},
        "machine": machine_facts(1),
    }
    for entry in report["indexes"].values():
        first, last = entry["sizes"][0], entry["sizes"][-1]
        entry["growth"] = last["match_us"]["p50"] / first["match_us"]["p50"]
    emit(report, _lines(report), arguments.json)
    return 0


async def _measure(name: str, sizes: list[int], url: str | None, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry per size; the tree grows from one to the next."""
    config = IndexConfig(backend=name, redis_url=url, timeout_s=REPLY_TIMEOUT_S)
    index = build_index(config, {}, time.monotonic)
    fingerprint = f"bench-{uuid4().hex}"
    tree, pinger = Tree(index, PathShape(), fingerprint), Pinger(url) if name == "redis" and url else None
    try:
        entries = []
        for size in sizes:
            say(f"{name}: growing to {size} pages")
            started = time.perf_counter()
            await tree.grow(size)
            entries.append(await _measure_size(tree, pinger, arguments) | {"grow_s": time.perf_counter() - started})
        if index.num_dropped:
            raise StartupError(f"{index.num_dropped} calls got no reply within {REPLY_TIMEOUT_S:.0f} s")
        return entries
    finally:
        if pinger is not None:
            await pinger.forget(fingerprint)
            await pinger.close()
        await index.close()


async def _measure_size(tree: Tree, pinger: Pinger | None, arguments: argparse.Namespace) -> dict[str, Any]:
    num_pages, num_paths = tree.num_pages, tree.num_paths
    numbers = list(spread_numbers(num_paths, arguments.rounds * arguments.calls))
    subjects: dict[str, Subject] = {"match": lambda call: tree.match(numbers[call])}
    if pinger is not None:
        subjects["ping"] = pinger.ping
    calls = await take_rounds(subjects, arguments.rounds, arguments.calls)
    insertions = Calls([[await tree.insert_next() for _ in range(arguments.insertions)]])
    entry: dict[str, Any] = {
        "pages": num_pages,
        "paths": num_paths,
        "match_us": _microseconds(calls["match"]),
        "lookups_per_s": len(calls["match"].all()) / sum(calls["match"].all()),
        "insert_us": _microseconds(insertions),
    }
    if pinger is not None:
        entry["ping_us"] = _microseconds(calls["ping"])
        entry["match_over_ping"] = calls["match"].medians().over(calls["ping"].medians()).as_json()
    return entry


def _microseconds(calls: Calls) -> dict[str, float]:
    values = [1e6 * seconds for seconds in calls.all()]
    return {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99)}


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [f"paths of {report['path_pages']} pages: {machine_line(report['machine'])}", ""]
    rows = [_row(name, entry) for name, index in report["indexes"].items() for entry in index["sizes"]]
    header = ("index", "pages", "match p50 us", "p99", "insert p50 us", "p99", "ping p50 us", "match/ping", "lookups/s")
    lines += table(header, rows)
    growths = {name: index["growth"] for name, index in report["indexes"].items()}
    return lines + [f"{name}: {growth:.2f} x from the smallest to the largest" for name, growth in growths.items()]


def _row(name: str, entry: dict[str, Any]) -> tuple[str, ...]:
    has_ping = "ping_us" in entry
    return (
        name,
        str(entry["pages"]),
        *(f"{entry[what][share]:.0f}" for what in ("match_us", "insert_us") for share in ("p50", "p99")),
        f"{entry['ping_us']['p50']:.0f}" if has_ping else "-",
        f"{entry['match_over_ping']['median']:.2f}" if has_ping else "-",
        f"{entry['lookups_per_s']:.0f}",
    )
