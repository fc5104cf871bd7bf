"""`docs/recipes.md`, from the registry: every recipe, constant, codec, and the table of the policy.

Knows Markdown. What a recipe is and what limits hold comes from `compress/`, so the page cannot say otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from inspect import getmodule

import torch

from packlight.compress.options import LIMITS
from packlight.compress.parts import CODECS, Param
from packlight.compress.policy import AUTO_OPTIONS, Policy
from packlight.compress.recipes import RECIPES, Recipe
from packlight.compress.scorers.window import KERNEL, TIGHT_KERNEL, TIGHT_TOKENS
from packlight.core.config import Config, PolicyRow
from packlight.core.kept_map import MAX_BINS, MAX_GROUPS
from packlight.core.types import ModelSpec, PackSpec

PAGE_SIZE, HEAD_DIM = 16, 128
SMALL_CONTEXT = 8192

INTRODUCTION = """# Recipes

A recipe is a published method of deciding what of a prompt's KV a decode worker gets: a **scorer** (how much each token
matters), a **budget** (how many tokens each layer and KV head keep), a **reader** (which pages a decode step looks at)
and a **codec** (how pages become bytes). A request chooses in its `kv` object:

```json
{"model": "smollm2", "messages": [], "kv": {"recipe": "snapkv", "ratio": 0.25, "codec": "int8"}}
```

Without one, or with `"recipe": "auto"`, [the policy](#policy-auto) chooses. What was done comes back
[in `usage.kv`](#what-comes-back).
"""

OPTIONS_END = """\
An option that a recipe does not have is refused, and so is anything out of its limits: status 400, with the option in
`param` and what is allowed in the message.
"""

POLICY = """## Policy `auto`

The row of the longest `from` that the prompt reaches decides. The table is `kv.policy.rows` of the
[configuration](configuration.md#kvpolicyrows), meant for a context of {reference} tokens. For models with a shorter one
it shrinks in proportion, so that {small} tokens of context have every row but the last.
"""

RULES = """\
- **Why not H2O**, which the first design had for prompts of 8k to 32k: on SmolLM2 at half the tokens it lost most of
  the needles that `snapkv` keeps, at many times the divergence ([docs/fidelity.md](fidelity.md)), and it computes every
  cached prefix again. `h2o_pyramid` in a row of the table brings it back.
- **On a hit.** For a row with `on_hit`: where {reuse:.0%} of the prompt or more is cached on the worker it goes to,
  that recipe is taken instead of one that would compute the prefix again.
- **Reasoning.** A request that reasons never keeps less than {reasoning:.0%}: one with a `reasoning_effort` above
  `minimal`, with `enable_thinking` true in its `chat_template_kwargs`, or whose chat template lets the model think
  unasked. `enable_thinking` false has the last word.
- **Protection.** The system prompt and the turns after it are kept whole: the longest run of them, without the last
  question, that takes half of the budget at most. Only chats have such parts.
- **Floor.** Every layer keeps {floor:.0%} of its window's attention mass at least.
- **A request's own options win**: {options}.
  `ratio` or `budget` replace the row's, also below the share of a request that reasons, and pack a prompt however
  short; `sinks` switches protection off. Other options belong to one method: name it.
- A retry, and an answer resumed on another worker, keep the recipe of the first attempt.
"""

USAGE = """## What comes back

In `usage.kv` of an answer, and of the last chunk of a stream with `include_usage`. Token counts are prompt tokens,
means over layers and KV heads. Of several prompts, tokens and bytes are sums, and the mass is the least.
"""

USAGE_FIELDS = {
    "`policy`": '`"auto"` where the policy chose; else this field and the next two are absent.',
    "`reason`": "Why: length, reasoning, hit.",
    "`protected_tokens`": "First tokens of the prompt that are kept because they instruct.",
    "`recipe`, `codec`": "What was done.",
    "`budget`, `ratio`, `floor`": "What was aimed at; null where the recipe has no such thing, or prompts differ.",
    "`prompt_tokens`": "All of the prompt.",
    "`kept_tokens`": "What the decode worker got.",
    "`grown_tokens`": "Of those, how many the floor added.",
    "`read_tokens`": "Of those, how many a decode step reads at most.",
    "`shipped_bytes`, `exact_bytes`": "KV that travelled, and what the exact KV of the same tokens takes.",
    "`attention_mass_retained`": "Share of the window's attention mass on kept tokens, mean over layers, or null.",
    "`timings_ms`": "Where the time to the first tokens went.",
    "`explain`": "Only if asked for: which parts of the prompt were kept, see below.",
}


EXPLAIN = """## Which tokens were kept

`"explain": true` in the `kv` object adds `usage.kv.explain`. It costs a count of the kept tokens in each layer, and is
off otherwise. The prompt is cut into at most {bins} bins of equal width (the last may be narrower), the model into at
most {groups} groups of consecutive layers. One prompt a request can be explained; its text is repeated in the answer
to that request, and nowhere else. The value is null where a worker of an older release does not say.

| field | meaning |
| --- | --- |
| `bin_tokens` | Prompt tokens to a bin. |
| `texts` | The prompt's text, bin by bin. |
| `groups[].first_layer`, `.last_layer` | The layers of a group. |
| `groups[].kept_tokens` | Prompt tokens kept there, mean over its layers and KV heads. |
| `groups[].shares` | For each bin, the share of (layer, KV head, token) that was kept, from 0 to 1. |

The [console](console.md) draws it.
"""


def recipes_page() -> str:
    usage = _table(("field", "meaning"), USAGE_FIELDS.items())
    explain = EXPLAIN.format(bins=MAX_BINS, groups=MAX_GROUPS)
    parts = [INTRODUCTION, *_recipes(), *_options(), *_constants(), *_codecs(), *_policy(), USAGE, usage, explain]
    return "\n".join(parts)


def _recipes() -> Iterator[str]:
    yield "## The methods\n"
    rows = (
        (f"`{recipe.name}`", _paper(recipe), _parts(recipe), _defaults(recipe), _needs(recipe), recipe.summary)
        for recipe in RECIPES.values()
    )
    yield _table(("recipe", "paper", "scorer × budget × reader × codec", "defaults", "needs", "keeps"), rows)


def _paper(recipe: Recipe) -> str:
    is_arxiv = recipe.paper is not None and recipe.paper[:4].isdigit()
    return f"[{recipe.paper}](https://arxiv.org/abs/{recipe.paper})" if is_arxiv else recipe.paper or "-"


def _parts(recipe: Recipe) -> str:
    return " × ".join((recipe.scorer or "-", recipe.budget or "-", recipe.reader, recipe.codec))


def _defaults(recipe: Recipe) -> str:
    found = []
    if recipe.has_budget:
        found.append("its own length" if recipe.ratio is None else f"ratio {recipe.ratio:g}")
    if recipe.drops_tokens:
        found += [f"window {recipe.window}", f"sinks {PackSpec().sinks}"]
    if recipe.kernel is not None:
        found.append(f"kernel {recipe.kernel}")
    return ", ".join(found) or "-"


def _needs(recipe: Recipe) -> str:
    needs = {
        "the query of every prompt token: a cached prefix is computed again": recipe.needs_all_queries,
        "all layers scored before one is shipped": recipe.divides_layers,
        "two KV heads or more": recipe.divides_heads,
        "page summaries on decode": recipe.reads_pages,
        "room for every token on decode": recipe.reads_pages and not recipe.drops_tokens,
    }
    return "; ".join(need for need, is_so in needs.items() if is_so) or "-"


def _options() -> Iterator[str]:
    limits = {name: f"{low} to {high}" for name, (low, high) in LIMITS.items()}
    tight = f"{TIGHT_KERNEL} where fewer than {TIGHT_TOKENS} tokens are left beside the window"
    rows = {
        "recipe": (
            "a name above, `auto`",
            "The method. Default: `kv.recipe` of the [configuration](configuration.md).",
        ),
        "budget": (
            "1 to the model's context",
            "Prompt tokens per KV head, sinks and window included: kept, or read per step where all are kept.",
        ),
        "ratio": ("above 0, at most 1", "The same as a share of the prompt. A request gives one of the two."),
        "window": (limits["window"], "The last tokens of the prompt, whose queries do the scoring. Always kept."),
        "sinks": (limits["sinks"], "The first tokens of the prompt. Always kept."),
        "kernel": (
            f"{limits['kernel']}, odd",
            f"Width of the pooling over neighbouring tokens. Default of `window` scores: {KERNEL}, or {tight}.",
        ),
        "pooling": ("`max`, `avg`", "How neighbours are pooled."),
        "codec": ("a name below", "How pages become bytes. Default: the recipe's."),
        "floor": (
            "0, below 1",
            "Least share of the window's attention mass that a layer keeps: its budget grows until that holds.",
        ),
    }
    yield "## Options\n"
    yield _table(("option", "limits", "meaning"), ((f"`{name}`", *cells) for name, cells in rows.items()))
    yield OPTIONS_END


def _constants() -> Iterator[str]:
    yield "## Constants of a method\n"
    yield "Options of the `kv` object too, each of the recipes that it stands beside.\n"
    owners: dict[Param, list[str]] = {}
    for recipe in RECIPES.values():
        for param in recipe.params:
            owners.setdefault(param, []).append(f"`{recipe.name}`")
    yield _table(
        ("constant", "default", "limits", "recipes", "meaning"),
        ((f"`{param.name}`", *_values(param), ", ".join(names), param.meaning) for param, names in owners.items()),
    )


def _values(param: Param) -> tuple[str, str]:
    if param.is_flag:
        return str(bool(param.default)).lower(), "true, false"
    return f"{param.default:g}", f"{param.low:g} to {param.high:g}"


def _codecs() -> Iterator[str]:
    yield "## Codecs\n"
    yield f"Bits per number, scales included, of bfloat16 KV in pages of {PAGE_SIZE} tokens with heads of {HEAD_DIM}.\n"
    yield _table(("codec", "bits per number", "exact", "what"), (_codec(name) for name in CODECS))


def _codec(name: str) -> tuple[str, ...]:
    cls = CODECS.load(name)
    codec = cls()
    num_bits = 8 * codec.record_bytes(PAGE_SIZE, HEAD_DIM, torch.bfloat16) / (2 * PAGE_SIZE * HEAD_DIM)
    module = getmodule(cls) or sys.modules[__name__]
    return f"`{name}`", f"{num_bits:.4g}", "yes" if codec.is_exact else "no", (module.__doc__ or "").split("\n\n")[0]


def _policy() -> Iterator[str]:
    config = Config().kv
    policy = config.policy
    yield POLICY.format(reference=policy.reference_context, small=SMALL_CONTEXT)
    small = [start for start, _ in Policy(config, _model_of(SMALL_CONTEXT)).starts()]
    headings = ("from", f"from, at {SMALL_CONTEXT}", "recipe", "ratio", "window", "codec", "on a hit")
    yield _table(headings, (_row(row, start) for row, start in zip(policy.rows, small, strict=True)))
    options = ", ".join(f"`{name}`" for name in AUTO_OPTIONS)
    yield RULES.format(reuse=policy.reuse_ratio, reasoning=policy.reasoning_ratio, floor=policy.floor, options=options)


def _row(row: PolicyRow, small_start: int) -> tuple[str, ...]:
    recipe = RECIPES[row.recipe]
    return (
        f"{row.min_tokens} tokens",
        str(small_start) if small_start < SMALL_CONTEXT else "-",
        f"`{row.recipe}`",
        f"{row.ratio or recipe.ratio:g}" if recipe.has_budget else "-",
        str(row.window or recipe.window) if recipe.drops_tokens else "-",
        f"`{row.codec or recipe.codec}`",
        f"`{row.on_hit}`" if row.on_hit else "-",
    )


def _model_of(max_context: int) -> ModelSpec:
    """The policy asks for nothing else of a model here."""
    return ModelSpec("", "", 1, 2, HEAD_DIM, 1, max_context, (), "bfloat16")


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(headings), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cell.replace(chr(10), ' ') for cell in line)} |" for line in lines) + "\n"
