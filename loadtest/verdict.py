"""What a run's exit code says.

0    the run is over, and what was required holds
1    too many requests failed, or a `--require` floor was missed
2    a flag or a file is wrong
3    no server answers
130  interrupted, or a sending process died
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packlight.core.errors import ConfigError, StartupError

OK, FAILED, BAD_INPUT, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130
FLOORS: Mapping[str, str] = {"goodput": "slo_share", "found": "found_share"}


class ServerUnreachable(StartupError):
    """Nobody answers at the URL."""


@dataclass(frozen=True, slots=True)
class Requirements:
    """`floors` by figure, shares of 1. `max_failed` is the share of requests that may fail."""

    floors: Mapping[str, float]
    max_failed: float


def parse_requirements(texts: Sequence[str], max_failed: float) -> Requirements:
    """`goodput=0.9`. Raises ConfigError naming the flag, the value and what is allowed."""
    floors = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in FLOORS:
            raise ConfigError(f"--require {text}: must be one of {', '.join(FLOORS)}, such as goodput=0.9")
        floors[FLOORS[name]] = _share(f"--require {name}", value)
    return Requirements(floors, _share("--max-errors", str(max_failed)))


def check_slo(requirements: Requirements, slo: Mapping[str, float]) -> None:
    """Raises ConfigError if goodput is required and nothing says what is good."""
    if FLOORS["goodput"] in requirements.floors and not slo:
        raise ConfigError("--require goodput: the scenario has no slo; add one, such as --set slo.ttft_s=1")


def shortfalls(figures: Mapping[str, Any], requirements: Requirements) -> list[str]:
    """What is not as it should be, a line each."""
    failed = figures["failed_share"]
    lines = []
    if failed > requirements.max_failed:
        asked = f"{figures['num_failed']:.0f} of {figures['num_requests']:.0f}"
        lines.append(f"{asked} requests failed; at most {requirements.max_failed:.1%} may (--max-errors)")
    for key, floor in requirements.floors.items():
        found = figures.get(key)
        if found is None or found < floor:
            lines.append(f"{key} is {'not known' if found is None else f'{found:.3f}'}, required is {floor:g}")
    return lines


def _share(flag: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ConfigError(f"{flag}: got {text!r}, must be a share from 0 to 1")
    return value
