"""The table of packing methods.

A recipe is a scorer, a budget, a reader and a codec (`parts.py`), with the defaults of its paper. This file knows
names, papers and defaults; `options.py` reads what a request asks for. It imports without torch, because the router
validates requests with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from packlight.compress.parts import PARAMS, Param
from packlight.core.errors import InvalidRequest
from packlight.core.types import PackSpec


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
