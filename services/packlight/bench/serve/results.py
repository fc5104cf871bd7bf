"""A run as it is kept: who took part, what was asked, and every answer of every turn.

Knows the JSON. A *turn* is one server under one cell (prompt length and load) in one round; figures follow from turns
(`figures.py`), so a file can be reported on again without measuring again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from packlight.bench.serve.answers import STRICT, Answer, Count, Seconds
from packlight.core.errors import ConfigError


class Cell(NamedTuple):
    """What is compared under the same conditions: prompts of so many tokens, under one load."""

    prompt_tokens: int
    load: str

    @property
    def label(self) -> str:
        return f"{self.prompt_tokens} tokens, {self.load}"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Turn:
    """`concurrency` is None under open load. `peak` is the largest value that the watched gauge had."""

    round: Count
    server: str
    prompt_tokens: Count
    load: str
    answers: tuple[Answer, ...]
    concurrency: Count | None = None
    peak: float | None = None

    @property
    def cell(self) -> Cell:
        return Cell(self.prompt_tokens, self.load)


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Server:
    """`body` holds the fields that its requests had beyond the common ones."""

    name: str
    url: str
    model: str
    body: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Header:
    """What a reader needs to take the run again. The first server is the one that ratios are against. `slo_s` limits
    `ttft`, `tpot` or `e2e`."""

    command: str
    workload: str
    api: str
    tokenizer: str
    seed: int
    max_tokens: Count
    prefill_first: bool
    servers: tuple[Server, ...]
    machine: dict[str, Any]
    slo_s: dict[str, Seconds] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Run:
    """`format` changes when a reader of the JSON would have to. `figures` repeats what the report says, for programs;
    it is made anew from the turns whenever a run is written."""

    header: Header
    turns: tuple[Turn, ...] = ()
    figures: dict[str, Any] = Field(default_factory=dict)
    format: Literal[1] = 1

    def to_json(self) -> str:
        return TypeAdapter(Run).dump_json(self, indent=1, exclude_none=True).decode() + "\n"

    def cells(self) -> list[Cell]:
        """In the order in which they were run."""
        return list(dict.fromkeys(turn.cell for turn in self.turns))

    def by_server(self, cell: Cell) -> Mapping[str, Sequence[Turn]]:
        """The turns of each server that had any, the first server first, by round."""
        own = [turn for turn in self.turns if turn.cell == cell]
        named = {server.name: [turn for turn in own if turn.server == server.name] for server in self.header.servers}
        return {name: turns for name, turns in named.items() if turns}


def load(path: Path) -> Run:
    """Raises ConfigError when the file cannot be read or is not a run."""
    try:
        return TypeAdapter(Run).validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "document"
        raise ConfigError(f"{path}: {where}: {first['msg']}; take the run again with this version") from None
