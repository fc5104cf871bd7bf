"""The `Server-Timing` header (https://www.w3.org/TR/server-timing/): where the time to the first tokens went.

Knows the names of `usage.kv.timings_ms`, which says the same in the body. A stream has sent its headers by the time
this is known: its last chunk has the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def server_timing_header(report: Mapping[str, Any]) -> dict[str, str]:
    """Of a usage report: `prepare;dur=1.2, ...` in milliseconds; nothing where nothing was packed."""
    kv = report["kv"]
    if kv is None:
        return {}
    return {"server-timing": ", ".join(f"{name};dur={value:.3f}" for name, value in kv["timings_ms"].items())}
