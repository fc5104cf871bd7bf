"""`packlight bench attention`: GB/s of KV that each attention backend reads in a decode step, beside read bandwidth."""

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
from packlight.bench.output import add_output_arguments, check_output, emit, machine_facts, machine_line, say, table
from packlight.compress.parts import CODECS
from packlight.core.errors import ConfigError

if TYPE_CHECKING:
    from packlight.bench.micro.measure.attention import Answer, Question, Timed

SUMMARY = "decode attention of every backend against the machine's read bandwidth"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", default="smollm2", metavar="NAME", help="smollm2 or llama8b")
    parser.add_argument("--context", type=int, default=8192, metavar="N", help="tokens stored per row")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="rows of the step")
    parser.add_argument("--dtype", default="bfloat16", metavar="TYPE", help="bfloat16, float32 or float16")
    parser.add_argument("--codec", default="native", metavar="NAME", help="how KV lies in memory")
    parser.add_argument("--page-size", type=int, default=16, metavar="N", help="tokens per page")
    parser.add_argument("--sparse", type=float, metavar="SHARE", help="also read only this share of the pages (Quest)")
    parser.add_argument("--backends", metavar="A,B", default=",".join(BACKENDS), help="which to compare")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="interleaved rounds")
    parser.add_argument("--budget", type=float, default=20.0, metavar="S", help="seconds that all rounds may take")
    parser.add_argument("--slice", type=float, default=0.3, metavar="S", help="seconds of one backend in one round")
    add_thread_argument(parser)
    add_stream_argument(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError for flags that cannot be."""
    check_output(arguments.json)
    _check(arguments)
    # Takes seconds: torch.
    from packlight.bench.micro.measure.attention import measure

    question = make_question(arguments)
    answer = measure(question, say)
    report = make_report(arguments, question, answer)
    emit(report, _lines(report), arguments.json)
    return 0


def make_question(arguments: argparse.Namespace) -> Question:
    import torch

    from packlight.bench.micro.measure.attention import SHAPES, Question
    from packlight.bench.micro.measure.rows import Layout

    return Question(
        shape=SHAPES[one_of("shape", arguments.shape, SHAPES)],
        layout=Layout(arguments.page_size, getattr(torch, arguments.dtype), arguments.codec),
        context=arguments.context,
        batch=arguments.batch,
        backends=tuple(arguments.backends.split(",")),
        sparse=arguments.sparse,
        num_threads=num_threads(arguments),
        num_rounds=arguments.rounds,
        slice_s=arguments.slice,
        budget_s=arguments.budget,
        stream_bytes=stream_bytes(arguments),
    )


def make_report(arguments: argparse.Namespace, question: Question, answer: Answer) -> dict[str, Any]:
    """`gbs` is KV that has to be read per second, `share` that of `stream_gbs`, round by round."""
    report = {
        "bench": "attention",
        "stream_gbs": answer.stream_gbs.median,
        "stream": {"method": answer.stream_method, **answer.stream_gbs.as_json(), "ways": answer.stream_ways},
        "backends": {name: _timed(timed, answer) for name, timed in answer.dense.items()},
        "skipped": answer.skipped,
        "shape": arguments.shape,
        "num_layers": answer.num_layers,
        "context": question.context,
        "batch": question.batch,
        "dtype": arguments.dtype,
        "codec": arguments.codec,
        "page_size": arguments.page_size,
        "kv_bytes": answer.kv_bytes,
        "rounds": answer.num_rounds,
        "machine": machine_facts(question.num_threads),
    }
    if question.sparse is not None:
        report["sparse"] = {"share": question.sparse, "backends": _sparse(answer)}
    return report


def _timed(timed: Timed, answer: Answer) -> dict[str, Any]:
    gbs = timed.gbs
    return {
        "gbs": gbs.median,
        "gbs_min": min(gbs.values),
        "gbs_max": max(gbs.values),
        "share_of_stream": gbs.over(answer.stream_gbs).median,
        "layer_ms": timed.seconds.median * 1000,
        "layer_bytes": timed.num_bytes,
        "batch": timed.batch,
        "max_error": timed.max_error,
    }


def _sparse(answer: Answer) -> dict[str, Any]:
    return {
        name: {
            **_timed(timed, answer),
            "speedup": answer.dense[name].seconds.over(timed.seconds).median,
        }
        for name, timed in answer.sparse.items()
    }


def _check(arguments: argparse.Namespace) -> None:
    one_of("dtype", arguments.dtype, ("bfloat16", "float32", "float16"))
    one_of("codec", arguments.codec, CODECS)
    for name in arguments.backends.split(","):
        one_of("backends", name, BACKENDS)
    for name in ("context", "batch", "rounds", "page-size"):
        at_least_one(name, getattr(arguments, name.replace("-", "_")))
    if arguments.sparse is not None and not 0 < arguments.sparse <= 1:
        raise ConfigError(f"--sparse: got {arguments.sparse}, must be above 0 and at most 1")


def _lines(report: dict[str, Any]) -> list[str]:
    stream = report["stream"]
    lines = [
        f"decode attention, {report['shape']}, {report['batch']} x {report['context']} tokens, {report['dtype']}, "
        f"{report['codec']}: {machine_line(report['machine'])}",
        f"stream read {stream['median']:.1f} GB/s ({stream['min']:.1f} to {stream['max']:.1f}, {stream['method']})",
        "",
    ]
    rows = [_row(name, entry) for name, entry in report["backends"].items()]
    rows += [_row(f"{name}, sparse", entry) for name, entry in report.get("sparse", {}).get("backends", {}).items()]
    lines += table(("backend", "rows", "ms/layer", "GB/s", "min", "max", "of stream"), rows)
    return lines + [f"skipped: {name}: {reason}" for name, reason in report["skipped"].items()]


def _row(name: str, entry: dict[str, Any]) -> tuple[str, ...]:
    rates = (f"{entry[key]:.2f}" for key in ("gbs", "gbs_min", "gbs_max"))
    return (name, str(entry["batch"]), f"{entry['layer_ms']:.2f}", *rates, f"{entry['share_of_stream']:.0%}")
