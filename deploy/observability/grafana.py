"""Dashboards as Grafana reads them, from a few typed values.

Knows Grafana's JSON (schema 39, Grafana 11 and newer) and where panels go: left to right, 24 columns a line, a heading
per row. Does not know what is shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Json = dict[str, Any]
COLUMNS = 24
_SOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}


class Kind(StrEnum):
    LINES = "timeseries"
    NUMBER = "stat"
    HEAT = "heatmap"


class Unit(StrEnum):
    """Grafana's own names."""

    SECONDS = "s"
    SHARE = "percentunit"
    BYTES_A_SECOND = "Bps"
    A_SECOND = "cps"
    COUNT = "short"
    NATS = "none"


@dataclass(frozen=True, slots=True)
class Query:
    """An expression and what its lines are called (`{{label}}` is filled in)."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture. `limits` colours a number: (from this value on, colour), the first from nothing."""

    title: str
    description: str
    queries: tuple[Query, ...]
    unit: Unit
    kind: Kind = Kind.LINES
    width: int = 8
    is_stacked: bool = False
    limits: tuple[tuple[float | None, str], ...] = ((None, "text"),)

    @property
    def height(self) -> int:
        return 4 if self.kind is Kind.NUMBER else 8


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Dashboard:
    """`uid` is also the file's name, and what links lead to: it stays when the title changes."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]


def dashboard_json(board: Dashboard) -> str:
    """The file: one line for each panel, so that a difference shows which ones changed."""
    *head, (last, panels) = _dashboard(board).items()
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head]
    rows = ",\n".join(f"    {json.dumps(panel)}" for panel in panels)
    return "\n".join(["{", *lines, f"  {json.dumps(last)}: [", rows, "  ]", "}"]) + "\n"


def _dashboard(board: Dashboard) -> Json:
    return {
        "uid": board.uid,
        "title": board.title,
        "description": board.description,
        "tags": ["packlight"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": _variables()},
        "links": [_link_to_the_others()],
        "panels": list(_placed(board.rows)),
    }


def _variables() -> list[Json]:
    """Where the data is, and whose. Outside Kubernetes series have no namespace: `.*` takes them too."""
    names = {"query": "label_values(packlight_router_ready, namespace)", "refId": "namespaces"}
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        {
            "name": "namespace",
            "label": "Namespace",
            "type": "query",
            "datasource": _SOURCE,
            "query": names,
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def _link_to_the_others() -> Json:
    return {
        "title": "Packlight",
        "type": "dashboards",
        "tags": ["packlight"],
        "asDropdown": True,
        "includeVars": True,
        "keepTime": True,
    }


def _placed(rows: tuple[Row, ...]) -> Iterator[Json]:
    number, y = 1, 0
    for row in rows:
        yield {"id": number, "type": "row", "title": row.title, "collapsed": False, "panels": [], "gridPos": _at(0, y)}
        number, y, x, line_height = number + 1, y + 1, 0, 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, line_height = 0, y + line_height, 0
            yield {"id": number, **_panel(panel), "gridPos": _at(x, y, panel.width, panel.height)}
            number, x, line_height = number + 1, x + panel.width, max(line_height, panel.height)
        y += line_height


def _at(x: int, y: int, width: int = COLUMNS, height: int = 1) -> Json:
    return {"x": x, "y": y, "w": width, "h": height}


def _panel(panel: Panel) -> Json:
    return {
        "type": panel.kind.value,
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "targets": [_target(panel.kind, ref, query) for ref, query in zip("ABCDEFGH", panel.queries, strict=False)],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel),
    }


def _target(kind: Kind, ref: str, query: Query) -> Json:
    return {
        "refId": ref,
        "datasource": _SOURCE,
        "expr": query.expr,
        "legendFormat": query.legend or ("{{le}}" if kind is Kind.HEAT else "__auto"),
        "format": "heatmap" if kind is Kind.HEAT else "time_series",
        "instant": kind is Kind.NUMBER,
        "range": kind is not Kind.NUMBER,
    }


def _defaults(panel: Panel) -> Json:
    steps = [{"value": value, "color": colour} for value, colour in panel.limits]
    defaults: Json = {"unit": panel.unit.value, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.kind is Kind.LINES:
        stacking = {"mode": "normal" if panel.is_stacked else "none", "group": "A"}
        fill = 40 if panel.is_stacked else 8
        defaults |= {"min": 0, "custom": {"fillOpacity": fill, "stacking": stacking, "showPoints": "never"}}
    return defaults


def _options(panel: Panel) -> Json:
    if panel.kind is Kind.NUMBER:
        shown = {"calcs": ["lastNotNull"], "fields": "", "values": False}
        return {"reduceOptions": shown, "colorMode": "value", "graphMode": "none", "textMode": "auto"}
    if panel.kind is Kind.HEAT:
        return {"calculate": False, "yAxis": {"unit": panel.unit.value}, "color": {"scheme": "Blues", "mode": "scheme"}}
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
    return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
