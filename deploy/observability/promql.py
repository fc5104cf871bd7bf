"""Prometheus expressions over the metrics of the catalogue.

Knows how counters, gauges and histograms are asked. A metric that `packlight.telemetry.catalogue` does not have raises
KeyError while a dashboard is written, not on somebody's screen. `$namespace` and `$__rate_interval` are Grafana's.
"""

from __future__ import annotations

from packlight.telemetry.catalogue import CATALOGUE, Kind, full_name

_WINDOW = "$__rate_interval"


def gauge(role: str, name: str, /, *by: str, how: str = "sum", **labels: str) -> str:
    """A gauge over all processes of a role: their `how` (sum, max, min), cut by labels."""
    return f"{how}{_by(*by)}({_series(role, name, Kind.GAUGE, '', labels)})"


def rate(role: str, name: str, /, *by: str, **labels: str) -> str:
    """A counter's growth a second."""
    return _rate(_series(role, name, Kind.COUNTER, "_total", labels), *by)


def events(role: str, name: str, /, *by: str, **labels: str) -> str:
    """A histogram's observations a second."""
    return _rate(_series(role, name, Kind.HISTOGRAM, "_count", labels), *by)


def mean(role: str, name: str, /, *by: str, **labels: str) -> str:
    """A histogram's mean."""
    return f"{total(role, name, *by, **labels)} / {events(role, name, *by, **labels)}"


def total(role: str, name: str, /, *by: str, **labels: str) -> str:
    """The growth a second of what a histogram has seen, summed."""
    return _rate(_series(role, name, Kind.HISTOGRAM, "_sum", labels), *by)


def quantile(q: float, role: str, name: str, /, *by: str, **labels: str) -> str:
    """A histogram's quantile, as exact as its buckets are fine."""
    return f"histogram_quantile({q:g}, {buckets(role, name, *by, **labels)})"


def buckets(role: str, name: str, /, *by: str, **labels: str) -> str:
    """The growth a second of each bucket: a heat map, or the inside of a quantile."""
    return _rate(_series(role, name, Kind.HISTOGRAM, "_bucket", labels), "le", *by)


def share_up_to(bound: float, role: str, name: str, /, *by: str) -> str:
    """The share of a histogram's observations up to one of its bounds. Raises ValueError if it is none."""
    metric = next(metric for metric in CATALOGUE[role] if metric.name == name)
    if bound not in metric.buckets:
        raise ValueError(f"{full_name(role, metric)} has no bucket that ends at {bound}")
    below = _rate(_series(role, name, Kind.HISTOGRAM, "_bucket", {"le": str(float(bound))}), *by)
    return f"{below} / {events(role, name, *by)}"


def _rate(series: str, *by: str) -> str:
    return f"sum{_by(*by)}(rate({series}[{_WINDOW}]))"


def _by(*labels: str) -> str:
    return f" by ({', '.join(labels)}) " if labels else ""


def _series(role: str, name: str, kind: Kind, suffix: str, labels: dict[str, str]) -> str:
    found = {metric.name: metric for metric in CATALOGUE[role]}[name]
    if found.kind is not kind or not set(labels) - {"le"} <= set(found.labels):
        raise KeyError(f"{full_name(role, found)} is a {found.kind} with the labels {found.labels}")
    matchers = ", ".join(['namespace=~"$namespace"', *(f'{key}="{value}"' for key, value in labels.items())])
    return f"{full_name(role, found)}{suffix}{{{matchers}}}"
