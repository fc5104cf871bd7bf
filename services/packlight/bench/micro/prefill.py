"""`packlight bench prefill`: how fast each attention backend computes a chunk of a prompt, at several contexts."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from packlight.attention.registry import BACKENDS
from packlight.bench.micro.flags import add_thread_argument, at_least_one, num_threads, one_of
from packlight.bench.output import (
    add_output_arguments,
    check_output,
    emit,
    machine_facts,
    machine_line,
    numbers,
    say,
    table,
)

if TYPE_CHECKING:
    from packlight.bench.micro.measure.prefill import Answer, Question

SUMMARY = "prefill attention of every backend, one chunk behind contexts of several lengths"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", default="smollm2", metavar="NAME", help="smollm2 or llama8b")
    parser.add_argument("--context", default="0,2048,6656", metavar="N,N", help="tokens stored before the chunk")
    parser.add_argument("--chunk", type=int, default=512, metavar="N", help="tokens of the chunk")
    parser.add_argument("--dtype", default="bfloat16", metavar="TYPE", help="bfloat16 or float32")
    parser.add_argument("--page-size", type=int, default=16, metavar="N", help="tokens per page")
    parser.add_argument("--backends", default="sdpa,cpu", metavar="A,B", help="which to compare, with the first")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="interleaved rounds")
    parser.add_argument("--slice", type=float, default=0.2, metavar="S", help="seconds of one backend in one round")
    add_thread_argument(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError for flags that cannot be."""
    check_output(arguments.json)
    # Takes seconds: torch.
    from packlight.bench.micro.measure.prefill import measure

    question = make_question(arguments)
    entries = []
    for context in question.contexts:
        say(f"measuring {', '.join(question.backends)} behind {context} tokens, {question.num_rounds} rounds")
        entries.append(make_entry(context, measure(question, context)))
    report = {
        "bench": "prefill",
        "contexts": entries,
        "shape": arguments.shape,
        "chunk": question.chunk,
        "dtype": arguments.dtype,
        "page_size": question.page_size,
        "rounds": question.num_rounds,
        "machine": machine_facts(question.num_threads),
    }
    emit(report, _lines(report), arguments.json)
    return 0


def make_question(arguments: argparse.Namespace) -> Question:
    import torch

    from packlight.bench.micro.measure.attention import SHAPES
    from packlight.bench.micro.measure.prefill import Question

    return Question(
        shape=SHAPES[one_of("shape", arguments.shape, SHAPES)],
        dtype=getattr(torch, one_of("dtype", arguments.dtype, ("bfloat16", "float32"))),
        page_size=at_least_one("page-size", arguments.page_size),
        contexts=tuple(int(value) for value in numbers("context", arguments.context)),
        chunk=at_least_one("chunk", arguments.chunk),
        backends=tuple(one_of("backends", name, BACKENDS) for name in arguments.backends.split(",")),
        num_threads=num_threads(arguments),
        num_rounds=at_least_one("rounds", arguments.rounds),
        slice_s=arguments.slice,
    )


def make_entry(context: int, answer: Answer) -> dict[str, Any]:
    """`speedup`: how many times faster than the first backend, round by round."""
    first = next(iter(answer.seconds.values()), None)
    return {
        "context": context,
        "backends": {
            name: {
                "layer_ms": seconds.median * 1000,
                "gflops": seconds.per(answer.num_flops / 1e9).median,
                "speedup": first.over(seconds).as_json() if first is not None else None,
                "max_error": answer.max_error[name],
            }
            for name, seconds in answer.seconds.items()
        },
        "skipped": answer.skipped,
    }


def _lines(report: dict[str, Any]) -> list[str]:
    head = f"prefill attention, {report['shape']}, {report['chunk']} tokens, {report['dtype']}"
    rows = [
        (
            str(entry["context"]),
            name,
            f"{figures['layer_ms']:.2f}",
            f"{figures['gflops']:.0f}",
            *(f"{figures['speedup'][key]:.2f}" for key in ("median", "min", "max")),
            f"{figures['max_error']:.1e}",
        )
        for entry in report["contexts"]
        for name, figures in entry["backends"].items()
    ]
    lines = [f"{head}: {machine_line(report['machine'])}", ""]
    lines += table(("context", "backend", "ms/layer", "GFLOP/s", "speed-up", "min", "max", "difference"), rows)
    skipped = {name: reason for entry in report["contexts"] for name, reason in entry["skipped"].items()}
    return lines + [f"skipped: {name}: {reason}" for name, reason in skipped.items()]
