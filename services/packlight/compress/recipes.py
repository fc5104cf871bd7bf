"""The table of packing methods.

A recipe is a scorer, a budget, a reader and a codec, each named here and implemented in one file elsewhere, and each
with the constants of its paper. This file knows names, papers, constants and their limits; `options.py` reads what a
request asks for. It imports without torch, because the router validates requests with it; the parts are imported by
whoever calls `Registry.load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from packlight.core.errors import InvalidRequest
from packlight.core.registry import Registry
from packlight.core.types import PackSpec

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


@dataclass(frozen=True, slots=True)
class Recipe:
    """One method. `scorer` and `budget` are None where every token is kept. `paper` is an arXiv number or a venue.
    `kernel`, `window` and `ratio` are its defaults; without a ratio it finds its own length unless it is given one."""

    name: str
    scorer: str | None
    budget: str | None
    reader: str
    paper: str | None
    summary: str
    codec: str = "native"
    window: int = PackSpec().window
    kernel: int | None = None
    ratio: float | None = 0.25

    @property
    def drops_tokens(self) -> bool:
        return self.scorer is not None

    @property
    def reads_pages(self) -> bool:
        """A decode step reads some of the pages only."""
        return self.reader != "dense"

    @property
    def has_budget(self) -> bool:
        return self.drops_tokens or self.reads_pages

    @property
    def needs_all_queries(self) -> bool:
        """The scorer looks at the queries of every prompt token, so cached ones have to be computed again."""
        return self.scorer == "accumulated"

    @property
    def looks_at_keys(self) -> bool:
        """The scorer looks at keys itself, beyond what the window attends to."""
        return self.scorer == "cake"

    @property
    def divides_layers(self) -> bool:
        """Lengths are known only when every layer has been scored, so nothing is shipped before that."""
        return self.budget == "cake"

    @property
    def grades_layers(self) -> bool:
        """What a layer may keep depends on its place among the others."""
        return self.budget == "pyramid"

    @property
    def divides_heads(self) -> bool:
        """The KV heads of a layer compete for its budget."""
        return self.budget == "ada"

    @property
    def finds_length(self) -> bool:
        """The method itself finds how many tokens to keep; a budget is only an upper bound to that."""
        return self.budget == "mass"

    @property
    def options(self) -> tuple[str, ...]:
        """The fields of a request's `kv` object that mean something here, the method's constants last."""
        names = ["recipe", "codec"]
        names += ["budget", "ratio"] * self.has_budget
        names += ["window", "sinks", "floor"] * self.drops_tokens
        names += ["kernel"] * (self.scorer in ("window", "cake"))
        names += ["pooling"] * (self.scorer == "window")
        return (*names, *(param.name for param in self.params))

    @property
    def params(self) -> tuple[Param, ...]:
        parts = (f"scorer:{self.scorer}", f"budget:{self.budget}", f"reader:{self.reader}")
        return tuple(param for part in parts for param in PARAMS.get(part, ()))


_TABLE = (
    Recipe("none", None, None, "dense", None, "Ships every token: exact."),
    Recipe(
        "streaming_llm",
        "position",
        "uniform",
        "dense",
        "2309.17453",
        "The first tokens (attention sinks) and the most recent ones. Fluent, but cannot recall the middle.",
    ),
    Recipe(
        "h2o",
        "accumulated",
        "uniform",
        "dense",
        "2306.14048",
        "Heavy hitters: the tokens that all queries of the prompt attended to most, and the most recent ones.",
    ),
    Recipe(
        "h2o_pyramid",
        "accumulated",
        "pyramid",
        "dense",
        "2306.14048",
        "Heavy hitters, more of them in early layers.",
    ),
    Recipe(
        "snapkv",
        "window",
        "uniform",
        "dense",
        "2404.14469",
        "The tokens that the last queries of the prompt attend to, with their neighbours.",
    ),
    Recipe(
        "pyramidkv",
        "window",
        "pyramid",
        "dense",
        "2406.02069",
        "As `snapkv`, more tokens in early layers and fewer in late ones.",
    ),
    Recipe(
        "adakv",
        "window",
        "ada",
        "dense",
        "2407.11550",
        "As `snapkv`, the heads of a layer compete for its budget.",
    ),
    Recipe(
        "cake",
        "cake",
        "cake",
        "dense",
        "ICLR 2025",
        "Layers whose attention is spread out and moves keep more; tokens whose attention varies count more.",
    ),
    Recipe(
        "rocketkv",
        "window",
        "rocket",
        "hsa",
        "2502.14051",
        "Keeps more than it reads: a coarse eviction, then each step reads the best pages of what is left.",
        kernel=63,
    ),
    Recipe(
        "rocketkv_mt",
        "window",
        "rocket",
        "hsa",
        "2502.14051",
        "The multi-turn form: a wider window, for selections that are made anew for every turn.",
        window=128,
        kernel=63,
    ),
    Recipe(
        "quest",
        None,
        None,
        "quest",
        "2406.10774",
        "Ships every token; each step reads the pages whose keys may score highest.",
    ),
    Recipe(
        "freekv",
        None,
        None,
        "freekv",
        "2505.13109",
        "Ships every token; each step reads the pages that the step before would have chosen.",
    ),
    Recipe(
        "mass",
        "window",
        "mass",
        "dense",
        "this project",
        "As few tokens per head as retain a target share of the window's attention.",
        ratio=None,
    ),
)
RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _TABLE})


def find_recipe(name: str) -> Recipe:
    """The row called `name`. Raises InvalidRequest listing the known names."""
    recipe = RECIPES.get(name)
    if recipe is None:
        raise InvalidRequest(
            f"kv.recipe: unknown recipe {name!r}; choose one of {', '.join(RECIPES)}", param="kv.recipe"
        )
    return recipe


def codec_of(spec: PackSpec) -> str:
    """The name of the codec that the request's KV travels in."""
    return spec.codec or find_recipe(spec.recipe).codec


def codecs_for(head_dim: int) -> tuple[str, ...]:
    """The codecs that can code heads of this dimension. A Hadamard rotation needs a power of two."""
    is_power_of_two = head_dim & (head_dim - 1) == 0
    return tuple(name for name in CODECS if is_power_of_two or not name.startswith("turboquant"))


def param_of(spec: PackSpec, name: str) -> float:
    """A method's constant: the request's, else the table's default."""
    for key, value in spec.params:
        if key == name:
            return value
    return next(param.default for param in find_recipe(spec.recipe).params if param.name == name)


def recipe_table_markdown() -> str:
    """The table of recipes for the README, one row a recipe."""
    rows = ["| recipe | scorer | budget | reader | paper | keeps |", "|---|---|---|---|---|---|"]
    for recipe in RECIPES.values():
        is_arxiv = recipe.paper is not None and recipe.paper[:4].isdigit()
        paper = f"[{recipe.paper}](https://arxiv.org/abs/{recipe.paper})" if is_arxiv else recipe.paper or "-"
        parts = (recipe.scorer or "-", recipe.budget or "-", recipe.reader)
        rows.append(f"| `{recipe.name}` | {' | '.join(parts)} | {paper} | {recipe.summary} |")
    return "\n".join(rows) + "\n"
