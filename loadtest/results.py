"""A run as it is kept: what was asked of whom, every request, and the server's own figures meanwhile.

Knows the JSON. What it says follows from it (`summary.py`), so a file can be reported on, or compared, at any time.
Texts of answers are not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from loadtest.samples import Sample
from packlight.bench.serve.answers import STRICT, Answer, Count, Seconds
from packlight.bench.serve.results import Turn
from packlight.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Scrape:
    """Values of a server's metrics at a moment of the run, by the names that `scrape.py` gives them. `at_s` is negative
    before the first request could be due."""

    at_s: float
    values: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Header:
    """What a reader needs to take the run again. `scenario` is a name, `settings` all of it; `seed` that of the words.
    `slo_s` limits `ttft`, `tpot` or `e2e`. `num_planned` counts requests, later turns included."""

    command: str
    scenario: str
    settings: dict[str, Any]
    url: str
    server: str
    model: str
    tokenizer: str
    body: dict[str, Any]
    seed: int
    num_planned: Count
    max_in_flight: Count
    duration_s: Seconds
    slo_s: dict[str, Seconds]
    machine: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class LoadRun:
    """`format` changes when a reader of the JSON would have to. `figures` repeats what the report says."""

    header: Header
    samples: tuple[Sample, ...]
    scrapes: tuple[Scrape, ...] = ()
    figures: dict[str, Any] = Field(default_factory=dict)
    format: Literal[1] = 1

    def to_json(self) -> str:
        return TypeAdapter(LoadRun).dump_json(self, indent=1, exclude_none=True).decode() + "\n"

    @property
    def answers(self) -> Sequence[Answer]:
        return [sample.answer for sample in self.samples]

    def as_turn(self, name: str = "") -> Turn:
        """As `packlight bench serve` has it, for the figures and plots that are defined there."""
        return Turn(round=0, server=name, prompt_tokens=0, load=self.header.scenario, answers=tuple(self.answers))


def load_run(path: Path) -> LoadRun:
    """Raises ConfigError when the file cannot be read or is not a run."""
    try:
        return TypeAdapter(LoadRun).validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "document"
        raise ConfigError(
            f"{path}: {where}: {first['msg']}; it must be what `run --json` of this version wrote"
        ) from None
