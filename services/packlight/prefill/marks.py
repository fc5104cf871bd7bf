"""What a request that is traced notes on its way: when its chunks were computed, its layers selected and packed.

Plain values. The event loop writes `chunks`, the compute thread the rest; `spans.py` tells of them in the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LayerMark:
    """Work on one layer, in seconds of `time.perf_counter`."""

    layer: int
    started_s: float
    ended_s: float

    @property
    def took_s(self) -> float:
        return self.ended_s - self.started_s


@dataclass(frozen=True, slots=True)
class PackMark(LayerMark):
    """`num_kept_tokens` is the mean over KV heads."""

    num_kept_tokens: float
    num_bytes: int


@dataclass(slots=True)
class Marks:
    """`chunks` are (first token, end, when it was computed by the worker's clock). `retained_mass` by layer is known in
    the end."""

    chunks: list[tuple[int, int, float]] = field(default_factory=list)
    selected: list[LayerMark] = field(default_factory=list)
    packed: list[PackMark] = field(default_factory=list)
    retained_mass: dict[int, float] = field(default_factory=dict)
