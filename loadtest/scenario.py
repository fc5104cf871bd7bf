"""A scenario: when requests arrive, what they ask, and what counts as good. One YAML file each.

Knows fields, their types, units and limits. Does not make prompts (`planning.py`) or instants (`schedule.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from loadtest.settings import Part, build, override, parse_yaml
from packlight.core.errors import ConfigError

FOLDER = Path(__file__).with_name("scenarios")
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Process = Literal["poisson", "constant"]


def _as_list(value: object) -> object:
    return value if isinstance(value, list | tuple) else (value,)


class Steady(Part):
    """The same rate throughout."""

    kind: Literal["steady"]
    rate_per_s: Positive
    process: Process = "poisson"


class Ramp(Part):
    """A rate that changes evenly from one end of the run to the other."""

    kind: Literal["ramp"]
    from_per_s: NotNegative
    to_per_s: NotNegative
    process: Process = "poisson"


class Burst(Part):
    """`rate_per_s`, and every `every_s` seconds `burst_per_s` for `burst_s` seconds."""

    kind: Literal["burst"]
    rate_per_s: NotNegative
    burst_per_s: Positive
    every_s: Positive
    burst_s: Positive
    process: Process = "poisson"

    @model_validator(mode="after")
    def _has_a_pause(self) -> Self:
        if self.burst_s >= self.every_s:
            raise ValueError(f"burst_s {self.burst_s:g} must be less than every_s {self.every_s:g}")
        return self


class Trace(Part):
    """Recorded arrivals and lengths (`replay.py`). `file` is looked for beside the scenario, then in the working
    directory. `speed` 2 replays twice as fast. `length_scale` multiplies all lengths; by default the longest request
    of the whole file just fits the model."""

    kind: Literal["trace"]
    file: str
    speed: Positive = 1.0
    length_scale: Annotated[float, Field(gt=0, le=1)] | None = None


class Prompts(Part):
    """What is asked: the workloads of `packlight bench serve`, in exact numbers of tokens.

    `prompt_tokens` may be several lengths, drawn evenly. `question_tokens`: what of a shared document's prompt is not
    shared, or what later turns add. `think_s`: mean seconds (exponential) between an answer and the next turn."""

    kind: Literal["chat", "long_document", "shared_document", "multi_turn"]
    prompt_tokens: Annotated[tuple[Count, ...], BeforeValidator(_as_list), Field(min_length=1)]
    max_tokens: Count
    question_tokens: Count = 80
    documents: Count = 1
    turns: Count = 1
    think_s: NotNegative = 0.0

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if self.turns > 1 and self.kind != "multi_turn":
            raise ValueError(f"turns {self.turns}: only prompts of kind multi_turn have several")
        if self.kind == "shared_document" and self.question_tokens >= min(self.prompt_tokens):
            raise ValueError(f"question_tokens {self.question_tokens}: must be less than prompt_tokens")
        return self


class Slo(Part):
    """What a request may take to count for goodput, in seconds."""

    ttft_s: Positive | None = None
    tpot_s: Positive | None = None
    e2e_s: Positive | None = None

    def limits(self) -> dict[str, float]:
        """By the names of `packlight bench serve --slo`."""
        named = {"ttft": self.ttft_s, "tpot": self.tpot_s, "e2e": self.e2e_s}
        return {name: limit for name, limit in named.items() if limit is not None}


class Scenario(Part):
    """`max_in_flight`: conversations at once, their thinking included; one that is due beyond waits, and the report
    says so. `drain_s`: how long answers may still take when the last request is due. `seed`: of arrivals, not words."""

    about: str
    duration_s: Positive
    arrivals: Annotated[Steady | Ramp | Burst | Trace, Field(discriminator="kind")]
    prompts: Prompts | None = None
    slo: Slo = Slo()
    max_in_flight: Count = 256
    drain_s: NotNegative = 60.0
    seed: int = 0

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        is_trace = isinstance(self.arrivals, Trace)
        if is_trace and self.prompts is not None:
            raise ValueError("prompts: a trace brings its own, leave them out")
        if not is_trace and self.prompts is None:
            raise ValueError("prompts: are missing, and only a trace brings its own")
        return self


def scenario_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_scenario(name: str) -> Path:
    """The file of a shipped scenario, or of any other by its path. Raises ConfigError listing the shipped ones."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(scenario_names())
        raise ConfigError(
            f"--scenario {name}: there is no {path}; shipped are {known}; or give the path of a .yaml file"
        )
    return path


def load_scenario(path: Path, changes: Sequence[str] = ()) -> Scenario:
    """With `a.b=value` changes applied. Raises ConfigError naming file, path, value and what is allowed."""
    try:
        tree: Mapping[str, object] = parse_yaml(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    return build(Scenario, override(tree, changes), str(path))
