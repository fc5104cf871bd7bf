"""Everything a run will send, decided before it starts: conversations, when they are due, how long answers are.

Knows the JSON that the sending process reads, and needs nothing but it: no tokenizer is at work while a server is
measured. Who makes plans is `planning.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from packlight.bench.serve.answers import STRICT, Count, Seconds
from packlight.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class PlannedTurn:
    """`think_s`: the pause between the answer before and this question. `references`: what a right answer contains."""

    content: str
    max_tokens: Count
    think_s: Seconds = 0.0
    references: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class PlannedConversation:
    """`system` is the first message. `is_follow_up`: an earlier conversation begins with the same text."""

    due_s: Seconds
    system: str
    turns: tuple[PlannedTurn, ...]
    is_follow_up: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Plan:
    """Conversations by ascending `due_s`. `body`: fields of every request beyond what a turn says. `notes`: what a
    reader of the report must know of how the plan was made."""

    scenario: str
    duration_s: Seconds
    drain_s: Seconds
    max_in_flight: Count
    body: dict[str, Any]
    conversations: tuple[PlannedConversation, ...]
    notes: tuple[str, ...] = ()

    @property
    def end_s(self) -> float:
        """When whatever is unanswered has failed."""
        return max(self.duration_s, self.conversations[-1].due_s) + self.drain_s

    def write(self, path: Path) -> None:
        path.write_bytes(TypeAdapter(Plan).dump_json(self))


def read_plan(path: Path) -> Plan:
    """Raises ConfigError when the file cannot be read or is no plan."""
    try:
        return TypeAdapter(Plan).validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"--plan {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"--plan {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
