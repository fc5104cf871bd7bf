"""`packlight bench step`: how far a decode step is from the memory it has to read, and how fast a prompt is read.

Knows flags and the report; what is measured is in `measure/step.py`.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from packlight.attention.registry import BACKENDS
from packlight.bench.micro.flags import (
    add_stream_argument,
    add_thread_argument,
    at_least_one,
    num_threads,
    one_of,
    stream_bytes,
)
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
from packlight.core.config import Config
from packlight.core.errors import PacklightError

if TYPE_CHECKING:
    from packlight.bench.micro.measure.step import Prefill, Question, Step
    from packlight.models.base import LanguageModel

SUMMARY = "one decode step of a real model against the bytes it reads, and prefill tokens per second"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--batch", default="1,8", metavar="N,N", help="rows of a step")
    parser.add_argument("--context", default="128,7000", metavar="N,N", help="prompt tokens of each row")
    parser.add_argument("--recipe", default="none", metavar="A,B@8", help="packed by these recipes, ratio 1/8")
    parser.add_argument("--attention", metavar="A,B", help="backends (all but the reference)")
    parser.add_argument("--prefill", metavar="N,N", help="also prefill prompts of so many tokens")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="interleaved rounds")
    parser.add_argument("--prefill-rounds", type=int, default=2, metavar="N")
    parser.add_argument("--slice", type=float, default=0.3, metavar="S", help="seconds of one subject in one round")
    parser.add_argument("--profile", action="store_true", help="print the top operators of each step, on stderr")
    add_thread_argument(parser)
    add_stream_argument(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Raises StartupError for wrong flags and for a model that cannot be loaded."""
    check_output(arguments.json)
    config = config_of(arguments)
    attentions, skipped = _usable(_attentions(arguments.attention), config.model.device)
    for flag in ("rounds", "prefill-rounds"):
        at_least_one(flag, getattr(arguments, flag.replace("-", "_")))
    batches, contexts = counts("batch", arguments.batch), counts("context", arguments.context)
    prompts = counts("prefill", arguments.prefill) if arguments.prefill else []
    model = load_configured(config, open_configured(config), arguments)
    steps = _measure_steps(arguments, config, model, attentions, [(b, c) for b in batches for c in contexts])
    prefills = _measure_prefills(arguments, config, model, attentions, prompts)
    for step in steps:
        if step.profile is not None:
            say(f"{step.attention}, {step.point.batch} x {step.point.context}, {step.point.recipe}\n{step.profile}")
    report = make_report(config, model, steps, prefills, num_threads(arguments)) | {"skipped": skipped}
    emit(report, _lines(report), arguments.json)
    return 0


def make_report(
    config: Config, model: LanguageModel, steps: list[Step], prefills: list[Prefill], threads: int
) -> dict[str, Any]:
    from packlight.bench.micro.measure.weights import weight_bytes

    num_bytes = weight_bytes(model)
    return {
        "bench": "step",
        "model": model.spec.name,
        "lane": type(model).__name__,
        "dtype": model.spec.dtype,
        "kv_codec": config.decode.kv_codec,
        "weight_bytes": num_bytes,
        "steps": [_step(step, num_bytes) for step in steps],
        "prefill": [_prefill(prefill) for prefill in prefills],
        "machine": machine_facts(threads),
    }


def _measure_steps(
    arguments: argparse.Namespace,
    config: Config,
    model: LanguageModel,
    attentions: tuple[str, ...],
    sizes: list[tuple[int, int]],
) -> list[Step]:
    """Every (batch, context) with every recipe."""
    from packlight.bench.micro.measure.packing import parse_pack
    from packlight.bench.micro.measure.step import Point, measure_point
    from packlight.bench.stream import Stream

    packs = {name: parse_pack("recipe", name, model.spec) for name in arguments.recipe.split(",")}
    question = _question(arguments, config, model, attentions, config.decode.kv_codec)
    stream = Stream(num_threads(arguments), stream_bytes(arguments), config.model.device)
    steps: list[Step] = []
    for point in (Point(*size, name, pack) for size in sizes for name, pack in packs.items()):
        say(f"decode: {point.batch} x {point.context} tokens, {point.recipe}")
        steps += measure_point(model, point, question, stream)
    return steps


def _measure_prefills(
    arguments: argparse.Namespace,
    config: Config,
    model: LanguageModel,
    attentions: tuple[str, ...],
    prompts: list[int],
) -> list[Prefill]:
    from packlight.bench.micro.measure.step import measure_prefill

    question = _question(arguments, config, model, attentions, "native")
    prefills: list[Prefill] = []
    for num_tokens in prompts:
        say(f"prefill: {num_tokens} tokens")
        chunk_tokens = config.prefill.chunk_tokens
        prefills += measure_prefill(model, num_tokens, question, chunk_tokens, arguments.prefill_rounds)
    return prefills


def _question(
    arguments: argparse.Namespace, config: Config, model: LanguageModel, attentions: tuple[str, ...], codec: str
) -> Question:
    import torch

    from packlight.bench.micro.measure.rows import Layout
    from packlight.bench.micro.measure.step import Question

    layout = Layout(config.kv.page_size, getattr(torch, model.spec.dtype), codec, config.model.device)
    return Question(layout, attentions, arguments.rounds, arguments.slice, arguments.profile)


def _attentions(text: str | None) -> list[str]:
    if text is None:
        return [name for name in BACKENDS if name != "reference"]
    return [one_of("attention", name, BACKENDS) for name in text.split(",")]


def _usable(names: list[str], device: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """The backends that this machine has for the device, and why it has not the others."""
    from packlight.engine.build import build_attention

    usable, skipped = [], {}
    for name in names:
        try:
            build_attention(name, device)
            usable.append(name)
        except (PacklightError, ImportError, OSError) as error:
            skipped[name] = str(error) or type(error).__name__
    return tuple(usable), skipped


def _step(step: Step, weight_bytes: int) -> dict[str, Any]:
    """`ratio` is the step's time over its floor, round by round; 1 is the memory limit."""
    num_bytes = weight_bytes + step.kv_bytes
    return {
        "attention": step.attention,
        "batch": step.point.batch,
        "context": step.point.context,
        "recipe": step.point.recipe,
        "step_ms": step.seconds.times(1000).as_json(),
        "tokens_per_s": step.seconds.per(step.point.batch).median,
        "kv_bytes": step.kv_bytes,
        "bytes": num_bytes,
        "stream_gbs": step.floor_s.per(num_bytes / 1e9).median,
        "floor_ms": step.floor_s.median * 1000,
        "ratio": step.seconds.over(step.floor_s).as_json(),
    }


def _prefill(prefill: Prefill) -> dict[str, Any]:
    return {
        "attention": prefill.attention,
        "tokens": prefill.num_tokens,
        "seconds": prefill.seconds.as_json(),
        "tokens_per_s": prefill.seconds.per(prefill.num_tokens).as_json(),
    }


def _lines(report: dict[str, Any]) -> list[str]:
    head = f"{report['model']} {report['dtype']} ({report['lane']}), weights {report['weight_bytes'] / 1e6:.0f} MB"
    lines = [f"{head}: {machine_line(report['machine'])}", ""]
    header = ("attention", "recipe", "batch", "context", "ms/step", "min", "max", "tok/s", "floor ms", "ratio")
    lines += table(header, [_step_row(step) for step in report["steps"]])
    if report["prefill"]:
        lines += ["", *table(("prefill", "tokens", "s", "tok/s"), [_prefill_row(each) for each in report["prefill"]])]
    return lines + [f"skipped: {name}: {reason}" for name, reason in report["skipped"].items()]


def _prefill_row(prefill: dict[str, Any]) -> tuple[str, ...]:
    seconds, rate = prefill["seconds"]["median"], prefill["tokens_per_s"]["median"]
    return (prefill["attention"], str(prefill["tokens"]), f"{seconds:.2f}", f"{rate:.0f}")


def _step_row(step: dict[str, Any]) -> tuple[str, ...]:
    ms = step["step_ms"]
    return (
        step["attention"],
        step["recipe"],
        str(step["batch"]),
        str(step["context"]),
        *(f"{ms[key]:.1f}" for key in ("median", "min", "max")),
        f"{step['tokens_per_s']:.1f}",
        f"{step['floor_ms']:.1f}",
        f"{step['ratio']['median']:.2f}",
    )
