"""A server's own metrics while it is under load, from its Prometheus pages.

Knows which of Packlight's metrics tell how a load is borne, on the router's page and on workers' pages alike. Another
server's page has none of them, and then there is nothing to plot. A page that does not come is no reason to end a run.
"""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from loadtest.results import Scrape

PERIOD_S = 1.0
_TIMEOUT_S = 2.0
_LINE = re.compile(r"^([a-z_:]+)(\{[^}]*\})? (\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Watched:
    """Samples of one metric whose labels contain `label`, added up. `is_counter`: only differences mean something."""

    key: str
    title: str
    metric: str
    label: str = ""
    is_counter: bool = False


WATCHED = (
    Watched("running", "requests decoding", "packlight_decode_running_requests"),
    Watched("queued_decode", "queued for decode", "packlight_decode_queued_requests"),
    Watched("queued_prefill", "queued for prefill", "packlight_prefill_queued_requests"),
    Watched("held_pages", "decode pages held", "packlight_decode_pages", 'state="held"'),
    Watched("cached_pages", "prefill pages cached", "packlight_prefill_pages", 'state="cached"'),
    Watched("prompt_tokens", "prompt tokens", "packlight_router_prompt_tokens_total", is_counter=True),
    Watched("cached_tokens", "cached tokens", "packlight_router_cached_prompt_tokens_total", is_counter=True),
    Watched("output_tokens", "output tokens", "packlight_router_generated_tokens_total", is_counter=True),
    Watched("shipped_bytes", "KV bytes shipped", "packlight_router_shipped_bytes_total", is_counter=True),
    Watched("exact_bytes", "KV bytes exact", "packlight_router_exact_bytes_total", is_counter=True),
)


def read_metrics(page: str) -> dict[str, float]:
    """The watched values that a page has."""
    found: dict[str, float] = {}
    for name, labels, value in _LINE.findall(page):
        for watched in WATCHED:
            if name == watched.metric and watched.label in labels:
                found[watched.key] = found.get(watched.key, 0.0) + float(value)
    return found


def fetch(url: str) -> str:
    """Past any proxy. Empty when the page does not come."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_TIMEOUT_S) as reply:
            return str(reply.read().decode("utf-8", errors="replace"))
    except (OSError, urllib.error.URLError):
        return ""


class Scraper:
    """Scrapes of one run, by Unix time; `since` gives them the run's own."""

    def __init__(
        self, urls: Sequence[str], clock: Callable[[], float] = time.time, get: Callable[[str], str] = fetch
    ) -> None:
        self._urls, self._clock, self._get = urls, clock, get
        self._taken: list[tuple[float, Mapping[str, float]]] = []

    def take(self) -> None:
        values: dict[str, float] = {}
        for url in self._urls:
            for key, value in read_metrics(self._get(url)).items():
                values[key] = values.get(key, 0.0) + value
        if values:
            self._taken.append((self._clock(), values))

    def since(self, began_at: float) -> tuple[Scrape, ...]:
        return tuple(Scrape(at_s=round(at - began_at, 3), values=dict(values)) for at, values in self._taken)
