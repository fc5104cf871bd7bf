"""`packlight bench selection`: the share of prefill that scoring, choosing and packing take, recipe by recipe."""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING, Any

from packlight.bench.micro.flags import add_thread_argument, at_least_one, num_threads
from packlight.bench.micro.model import add_model_arguments, config_of, load_configured, open_configured
from packlight.bench.output import (
    add_output_arguments,
    check_output,
    counts,
    emit,
    machine_facts,
    machine_line,
    say,
    table,
)
from packlight.bench.timing import Spread
from packlight.core.config import Config
from packlight.core.config_tree import build_config
from packlight.core.errors import ConfigError
from packlight.core.types import ModelSpec
from packlight.evaluate.tasks.haystack import sentences
from packlight.models.opened import OpenedModel

if TYPE_CHECKING:
    from packlight.bench.micro.measure.selection import Costs

SUMMARY = "scoring, choosing and packing against the prefill of the same prompt"
RECIPES = "none,streaming_llm,snapkv@8,pyramidkv@8,adakv@8,cake@8,rocketkv@8,mass"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--tokens", default="1000,2000,4000,7000", metavar="N,N", help="lengths of the prompts")
    parser.add_argument("--recipes", default=RECIPES, metavar="A,B@8", help="recipes, @8 is a ratio of 1/8")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="interleaved rounds, each a whole prefill")
    add_thread_argument(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Raises StartupError for wrong flags, and for a model that cannot be loaded."""
    check_output(arguments.json)
    lengths, rounds = counts("tokens", arguments.tokens), at_least_one("rounds", arguments.rounds)
    config = config_of(arguments)
    opened = open_configured(config)
    _check_lengths(lengths, opened.spec)
    model = load_configured(config, opened, arguments)
    # Takes seconds: torch.
    from packlight.bench.micro.measure.packing import parse_pack
    from packlight.bench.micro.measure.selection import measure

    packs = {name: parse_pack("recipes", name, opened.spec) for name in arguments.recipes.split(",")}
    costs = []
    for length in lengths:
        roomy, prompt = _with_room(config, opened.spec, length), make_prompt(opened, length)
        costs.append(asyncio.run(measure(model, roomy, prompt, packs, rounds, say)))
    report = {
        "bench": "selection",
        "model": opened.spec.name,
        "dtype": opened.spec.dtype,
        "rounds": rounds,
        "chunk_tokens": config.prefill.chunk_tokens,
        "lengths": [_length(each) for each in costs],
        "machine": machine_facts(num_threads(arguments)),
    }
    emit(report, _lines(report), arguments.json)
    return 0


def make_prompt(opened: OpenedModel, num_tokens: int) -> tuple[int, ...]:
    """The first tokens of an endless essay; of a model without a tokenizer, any."""
    encode = getattr(opened.tokenizer, "encode", None)
    if opened.folder is None or encode is None:
        return tuple(1 + position % (opened.spec.vocab_size - 1) for position in range(num_tokens))
    token_ids: list[int] = encode(" ".join(sentences("essay", num_tokens, seed=0)))
    return tuple(token_ids[:num_tokens])


def _check_lengths(lengths: list[int], spec: ModelSpec) -> None:
    if max(lengths) > spec.max_context:
        raise ConfigError(f"--tokens: got {max(lengths)}, but {spec.name} takes {spec.max_context} at most")


def _with_room(config: Config, spec: ModelSpec, num_tokens: int) -> Config:
    """A pool for what is cached of one prompt while it is asked for again, and for the next one."""
    itemsize = 4 if spec.dtype == "float32" else 2
    num_bytes = 3 * (num_tokens + config.kv.page_size) * spec.kv_bytes_per_token(itemsize)
    return build_config(config.model_dump(mode="json"), [f"prefill.kv_memory_bytes={max(num_bytes, 1 << 16)}"])


def _length(costs: Costs) -> dict[str, Any]:
    """`share` of the prefill without any selection, round by round."""
    return {
        "tokens": costs.num_tokens,
        "prefill_ms": Spread(tuple(costs.prefill_s)).times(1000).as_json(),
        "recipes": {
            name: {
                "cost_ms": Spread(tuple(cost_s)).times(1000).as_json(),
                "share": costs.share(name).as_json(),
                "kept_share": costs.kept_share[name],
            }
            for name, cost_s in costs.cost_s.items()
        },
    }


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [f"{report['model']} {report['dtype']}: {machine_line(report['machine'])}", ""]
    rows = [
        (
            name,
            str(length["tokens"]),
            f"{length['prefill_ms']['median']:.0f}",
            f"{entry['cost_ms']['median']:.1f}",
            *(f"{entry['share'][key]:.1%}" for key in ("median", "min", "max")),
            f"{entry['kept_share']:.0%}",
        )
        for length in report["lengths"]
        for name, entry in length["recipes"].items()
    ]
    return lines + table(("recipe", "tokens", "prefill ms", "select ms", "share", "min", "max", "kept"), rows)
