"""From rows of the catalogue to Prometheus instruments on a registry.

Knows how each kind of metric is made and registered. Does not know what a role observes (`metrics.py`).
"""

from __future__ import annotations

from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from packlight.core.errors import error_classes
from packlight.telemetry.catalogue import CATALOGUE, full_name

C = TypeVar("C", Counter, Gauge)


class Instruments:
    """The metrics of one role, registered once each."""

    def __init__(self, role: str, registry: CollectorRegistry) -> None:
        self._role, self._registry = role, registry
        self._metrics = {metric.name: metric for metric in CATALOGUE[role]}

    def counter(self, name: str) -> Counter:
        return self._make(name, Counter)

    def errors(self, name: str, *, retryable_only: bool = False) -> Counter:
        """A counter by class of error, of which every class is there from the start: `increase()` does not see the
        first event of a series that begins with it, and some errors must not happen even once unnoticed."""
        counter = self.counter(name)
        for type, cls in error_classes().items():
            if cls.retryable or not retryable_only:
                counter.labels(type)
        return counter

    def gauge(self, name: str) -> Gauge:
        return self._make(name, Gauge)

    def histogram(self, name: str) -> Histogram:
        metric = self._metrics[name]
        return Histogram(
            full_name(self._role, metric), metric.help, metric.labels, buckets=metric.buckets, registry=self._registry
        )

    def _make(self, name: str, kind: type[C]) -> C:
        metric = self._metrics[name]
        return kind(full_name(self._role, metric), metric.help, metric.labels, registry=self._registry)


class Shipments:
    """What packing did, by recipe: the same five metrics in every role."""

    def __init__(self, made: Instruments) -> None:
        self._kept = made.histogram("kept_tokens")
        self._shipped = made.counter("shipped_bytes")
        self._exact = made.counter("exact_bytes")
        self._ratio = made.histogram("compression_ratio")
        self._mass = made.histogram("attention_mass_retained")

    def observe(self, recipe: str, kept: float, shipped_bytes: int, exact_bytes: int, mass: float | None) -> None:
        self._kept.labels(recipe).observe(kept)
        self._shipped.labels(recipe).inc(shipped_bytes)
        self._exact.labels(recipe).inc(exact_bytes)
        if shipped_bytes:
            self._ratio.labels(recipe).observe(exact_bytes / shipped_bytes)
        if mass is not None:
            self._mass.labels(recipe).observe(mass)
