"""Which files the dashboards are: the chart carries them, and Compose mounts them from there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deploy.observability.fleet import FLEET
from deploy.observability.grafana import dashboard_json
from deploy.observability.packing import PACKING
from deploy.observability.request_life import REQUEST_LIFE

FILES = Path(__file__).resolve().parents[2] / "helm" / "packlight" / "files"
DASHBOARDS = (FLEET, PACKING, REQUEST_LIFE)


def dashboards() -> Iterator[tuple[Path, str]]:
    """Every dashboard's file and its text."""
    for board in DASHBOARDS:
        yield FILES / f"{board.uid}.json", dashboard_json(board)
