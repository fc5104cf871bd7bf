"""The parts that recipes are made of: where each lives, and the constants of its paper.

Knows names, constants and their limits. Imports without torch, because the router checks names with it; a part itself
is imported by whoever calls `Registry.load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from packlight.core.registry import Registry

SCORERS = Registry(
    "scorer",
    {
        "position": "packlight.compress.scorers.position:PositionScorer",
        "window": "packlight.compress.scorers.window:WindowScorer",
        "accumulated": "packlight.compress.scorers.accumulated:AccumulatedScorer",
        "cake": "packlight.compress.scorers.cake:CakeScorer",
    },
)
BUDGETS = Registry(
    "budget",
    {
        "uniform": "packlight.compress.budgets.uniform:UniformBudget",
        "pyramid": "packlight.compress.budgets.pyramid:PyramidBudget",
        "ada": "packlight.compress.budgets.ada:AdaBudget",
        "cake": "packlight.compress.budgets.cake:CakeBudget",
        "mass": "packlight.compress.budgets.mass:MassBudget",
        "rocket": "packlight.compress.budgets.rocket:RocketBudget",
    },
)
READERS = Registry(
    "reader",
    {
        "dense": "packlight.compress.readers.dense:DenseReader",
        "quest": "packlight.compress.readers.quest:QuestReader",
        "hsa": "packlight.compress.readers.hsa:HSAReader",
        "freekv": "packlight.compress.readers.freekv:FreeKVReader",
    },
)
CODECS = Registry(
    "codec",
    {
        "native": "packlight.compress.codecs.native:NativeCodec",
        "bf16": "packlight.compress.codecs.bf16:BF16Codec",
        "fp8": "packlight.compress.codecs.fp8:FP8Codec",
        "int8": "packlight.compress.codecs.kivi:Int8Codec",
        "int4": "packlight.compress.codecs.kivi:Int4Codec",
        "int2": "packlight.compress.codecs.kivi:Int2Codec",
        "turboquant4": "packlight.compress.codecs.turboquant:TurboQuant4",
        "turboquant3": "packlight.compress.codecs.turboquant:TurboQuant3",
        "turboquant2": "packlight.compress.codecs.turboquant:TurboQuant2",
    },
)


@dataclass(frozen=True, slots=True)
class Param:
    """A constant of a method, and a field of the request's `kv` object. Limits are inclusive."""

    name: str
    default: float
    low: float
    high: float
    meaning: str
    is_flag: bool = False


# By the part that reads it: "<kind>:<name>".
PARAMS: Mapping[str, tuple[Param, ...]] = MappingProxyType(
    {
        "scorer:accumulated": (
            Param(
                "recent", 0.5, 0.0, 1.0, "share of the budget for the most recent tokens; the rest are heavy hitters"
            ),
            Param("evict", 0, 0, 1, "evict while decoding too, so that the answer's tokens take no more room", True),
        ),
        "scorer:cake": (
            Param("gamma", 200.0, 0.0, 10_000.0, "weight of an attention's variance beside its mean"),
            Param("tau1", 1.0, 0.1, 10.0, "temperature of a layer's dispersion"),
            Param("tau2", 1.0, 0.1, 10.0, "temperature of a layer's shift"),
        ),
        "budget:pyramid": (Param("beta", 20, 1, 1000, "how steeply layers differ: the last keeps 1/beta of the mean"),),
        "budget:ada": (Param("alpha", 0.2, 0.0, 1.0, "share of the budget that every head is sure of"),),
        "budget:mass": (Param("target", 0.95, 0.01, 1.0, "share of the window's attention mass to retain"),),
        "reader:quest": (Param("dense_layers", 2, 0, 1024, "first layers that read everything"),),
        "reader:freekv": (Param("cosine", 0.8, -1.0, 1.0, "similarity of queries below which a choice is made anew"),),
    }
)


def codecs_for(head_dim: int) -> tuple[str, ...]:
    """The codecs that can code heads of this dimension. A Hadamard rotation needs a power of two."""
    is_power_of_two = head_dim & (head_dim - 1) == 0
    return tuple(name for name in CODECS if is_power_of_two or not name.startswith("turboquant"))
