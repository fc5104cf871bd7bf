"""A worker's state as JSON, readable by the release before and the release after.

    {"v": 1, "worker_id": "prefill-0", "generation": 7, "role": "prefill", ..., "load": {"num_running": 2, ...}}

Within a version fields may be added: a reader ignores those it does not know, and takes the default of those that are
missing. `v` changes when a field changes its meaning; a reader that does not know a version cannot use the worker.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from packlight.core.workers import LocalPrefill, Role, WorkerInfo, WorkerLoad

VERSION = 1


def encode_worker(info: WorkerInfo) -> str:
    return json.dumps({"v": VERSION, **asdict(info)}, separators=(",", ":"))


def decode_worker(text: str | bytes) -> WorkerInfo | None:
    """None if it was written in a version, or for a role, that this release does not know."""
    try:
        card: dict[str, Any] = json.loads(text)
        if card["v"] != VERSION:
            return None
        values = _known(card, WorkerInfo) | {"role": Role(card["role"]), "load": _load(card)}
        local = card.get("local_prefill")
        if local is not None:
            values["local_prefill"] = LocalPrefill(**_known(local, LocalPrefill) | {"load": _load(local)})
        return WorkerInfo(**values)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _load(card: Mapping[str, Any]) -> WorkerLoad:
    return WorkerLoad(**_known(card.get("load", {}), WorkerLoad))


def _known(values: Mapping[str, Any], cls: type) -> dict[str, Any]:
    return {item.name: values[item.name] for item in fields(cls) if item.name in values}
