"""Runs whose every figure is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loadtest.results import Header, LoadRun, Scrape
from loadtest.samples import Sample
from packlight.bench.serve.answers import Answer

KV = {"recipe": "snapkv", "kept_tokens": 25.0, "prompt_tokens": 100, "shipped_bytes": 300, "exact_bytes": 1000}


def answer(due_s: float = 0.0, ttft_s: float = 0.5, tpot_s: float = 0.1, **fields: Any) -> Answer:
    """Five tokens in five events, sent when due."""
    first = due_s + ttft_s
    events = tuple(first + index * tpot_s for index in range(5))
    told = {"sent_s": due_s, "event_s": events, "end_s": events[-1], "num_output_tokens": 5, "num_prompt_tokens": 100}
    return Answer(**{"due_s": due_s, "num_cached_tokens": 40, "kv": KV} | told | fields)


def plain(due_s: float = 0.0) -> Answer:
    """From a server that says nothing of its own work."""
    return answer(due_s, num_cached_tokens=None, kv=None, num_prompt_tokens=None)


def failure(due_s: float = 0.0, error: str = "HTTP 500: no room") -> Answer:
    return Answer(due_s=due_s, sent_s=due_s, error=error)


def run_of(answers: Sequence[Answer], waits: Sequence[float] = (), **header: Any) -> LoadRun:
    """Conversations of one request each."""
    slot_waits = [*waits, *[0.0] * (len(answers) - len(waits))]
    samples = [
        Sample(conversation=number, turn=0, slot_wait_s=wait, answer=each)
        for number, (each, wait) in enumerate(zip(answers, slot_waits, strict=True))
    ]
    scrapes = tuple(Scrape(at_s=float(at), values={"running": 1.0, "output_tokens": 10.0 * at}) for at in range(-1, 4))
    return LoadRun(header=header_of(len(answers), **header), samples=tuple(samples), scrapes=scrapes)


def header_of(num_planned: int, **fields: Any) -> Header:
    common: dict[str, Any] = {
        "command": "python -m loadtest run",
        "scenario": "made_up",
        "settings": {"about": "made up"},
        "url": "http://127.0.0.1:1",
        "server": "already running",
        "model": "none",
        "tokenizer": "fake",
        "body": {"stream": True},
        "seed": 7,
        "max_in_flight": 4,
        "duration_s": 10.0,
        "slo_s": {"ttft": 1.0, "tpot": 0.2},
        "machine": {"cpu": "none"},
    }
    return Header(**common | {"num_planned": num_planned} | fields)
