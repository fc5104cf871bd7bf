"""The results of one evaluation run, and their JSON.

Knows what was measured and the range each measure may take. Does not know how it was measured (`harness.py`), what a
task asks (`tasks/`), or how results are shown (`report/`).

A run is a header and a flat list of points. A point is one (recipe, codec, factor, task): a *task* is a name of
`tasks.TASKS`, `TWO_TURN_ANEW` or `TWO_TURN_REUSED`, or `TEACHER_FORCED` for the measures that compare next-token
distributions over a given continuation. A measure that a point does not have is None, never 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from packlight.core.errors import ConfigError

TEACHER_FORCED = "teacher_forced"
# The second question of a two-turn sample, answered from a selection made for it, or from the first question's.
TWO_TURN_ANEW = "two_turn_anew"
TWO_TURN_REUSED = "two_turn_reused"

# Sums of many fp32 numbers leave their range by about this much; anything more is a mistake, and refused.
_ROUNDING = 1e-4


def _to_fraction(value: object) -> object:
    if isinstance(value, float) and -_ROUNDING <= value <= 1 + _ROUNDING:
        return min(max(value, 0.0), 1.0)
    return value


def _to_non_negative(value: object) -> object:
    return 0.0 if isinstance(value, float) and -_ROUNDING <= value < 0 else value


Fraction = Annotated[float, BeforeValidator(_to_fraction), Field(ge=0, le=1)]
Nats = Annotated[float, BeforeValidator(_to_non_negative), Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]

# NaN and infinity are refused everywhere: JSON has no word for them, and a plot would silently drop them.
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Cell:
    """The score of one square of a needle grid: prompts of `length` tokens with the needle `depth` (0..1) of the way
    in."""

    length: Count
    depth: Fraction
    score: Fraction
    num_samples: Count


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Point:
    """What one recipe and codec, asked for one compression, did on one task.

    factor            x-fold compression asked for; 1 keeps everything
    num_kept_tokens   prompt tokens kept, mean over layers, KV heads and samples
    kept_share        packed bytes / exact bytes of the same prompts; a little above 1 when padding exceeds the savings
    read_share        KV bytes read per decode step / what dense attention over the exact KV reads
    retained_mass     share of the window's attention on kept tokens
    kl_mean, kl_p95   KL(exact || packed) of next-token distributions, nats: mean and 95th percentile over positions
    top1_agreement    share of positions whose most likely token is the same
    attention_error   relative L2 error of attention outputs against exact KV, mean over layers
    score             task score, by `scoring.py`
    select_share      time spent scoring, selecting and packing / time of the whole prefill
    """

    recipe: str
    codec: str
    factor: Annotated[float, Field(ge=1)]
    task: str
    num_samples: Count
    num_kept_tokens: NonNegative
    kept_share: NonNegative
    read_share: NonNegative
    retained_mass: Fraction | None = None
    kl_mean: Nats | None = None
    kl_p95: Nats | None = None
    top1_agreement: Fraction | None = None
    attention_error: NonNegative | None = None
    score: Fraction | None = None
    select_share: Fraction | None = None
    cells: tuple[Cell, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Header:
    """What a reader needs to take the run again. `versions` maps package to version, `durations_s` stage to seconds.

    `protocol` says in words what the numbers depend on and a table cannot show, such as whether the question was in
    the window when tokens were selected."""

    model: str
    dtype: str
    machine: str
    started_at: AwareDatetime
    command: str
    seed: int
    protocol: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    durations_s: dict[str, NonNegative] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Results:
    """One run: `format` changes when a reader of the JSON would have to."""

    header: Header
    points: tuple[Point, ...]
    format: Literal[1] = 1

    def to_json(self) -> str:
        """Readable JSON, equal for equal results."""
        return _adapter().dump_json(self, indent=1, exclude_none=True).decode() + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "results") -> Results:
        """The inverse of `to_json`. Raises ConfigError naming `source`, the first field at fault and its problem."""
        try:
            return _adapter().validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "document"
            raise ConfigError(f"{source}: {where}: {first['msg']}; take the run again with this version") from None


def load(path: Path) -> Results:
    """Reads a results file. Raises ConfigError when it cannot be read or is not one."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    return Results.from_json(text, source=str(path))


def _adapter() -> TypeAdapter[Results]:
    return TypeAdapter(Results)
