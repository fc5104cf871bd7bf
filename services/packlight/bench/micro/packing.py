"""`packlight bench packing`: what packing a layer's kept tokens costs, against a copy of as many bytes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from packlight.bench.micro.flags import add_thread_argument, at_least_one, num_threads, one_of
from packlight.bench.output import add_output_arguments, check_output, emit, machine_facts, machine_line, table

if TYPE_CHECKING:
    from packlight.bench.micro.measure.packers import Packed

SUMMARY = "packing a layer's kept tokens, against a plain copy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=7168, metavar="N", help="tokens of the prompt")
    parser.add_argument("--layers", type=int, default=30, metavar="N", help="layers of the pool, which take turns")
    parser.add_argument("--heads", type=int, default=3, metavar="N", help="KV heads of a layer")
    parser.add_argument("--head-dim", type=int, default=64, metavar="N")
    parser.add_argument("--page-size", type=int, default=16, metavar="N", help="tokens per page")
    parser.add_argument("--dtype", default="bfloat16", metavar="TYPE", help="bfloat16, float32 or float16")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="interleaved rounds")
    parser.add_argument("--slice", type=float, default=0.1, metavar="S", help="seconds of one way in one round")
    add_thread_argument(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError for flags that cannot be."""
    check_output(arguments.json)
    # Takes seconds: torch.
    import torch

    from packlight.bench.micro.measure.packers import PoolShape, measure

    torch.set_num_threads(num_threads(arguments))
    shape = PoolShape(
        num_layers=max(2, at_least_one("layers", arguments.layers)),  # K alone is what a copy reads
        num_kv_heads=at_least_one("heads", arguments.heads),
        num_tokens=at_least_one("tokens", arguments.tokens),
        page_size=at_least_one("page-size", arguments.page_size),
        head_dim=at_least_one("head-dim", arguments.head_dim),
        dtype=getattr(torch, one_of("dtype", arguments.dtype, ("bfloat16", "float32", "float16"))),
    )
    rounds = at_least_one("rounds", arguments.rounds)
    packed = measure(shape, num_rounds=rounds, slice_s=arguments.slice)
    report = {
        "bench": "packing",
        "tokens": shape.num_tokens,
        "layers": shape.num_layers,
        "kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "page_size": shape.page_size,
        "dtype": arguments.dtype,
        "rounds": rounds,
        "kept": {name: _packed(each) for name, each in packed.items()},
        "machine": machine_facts(num_threads(arguments)),
    }
    emit(report, _lines(report), arguments.json)
    return 0


def _packed(packed: Packed) -> dict[str, Any]:
    """Milliseconds of a layer by each way, and how many times a plain copy of its bytes that is."""
    copy_s = packed.layer_s["copy"]
    return {
        "bytes": packed.num_bytes,
        "ways": {
            name: {"layer_ms": seconds.times(1e3).as_json(), "copies": seconds.over(copy_s).as_json()}
            for name, seconds in packed.layer_s.items()
        },
    }


def _lines(report: dict[str, Any]) -> list[str]:
    shape = f"{report['layers']} layers, {report['kv_heads']} KV heads x {report['tokens']} tokens"
    lines = [f"{shape} x {report['head_dim']}, {report['dtype']}: {machine_line(report['machine'])}", ""]
    rows = [
        (
            kept,
            way,
            f"{entry['bytes'] / 1e6:.2f}",
            f"{cost['layer_ms']['median']:.3f}",
            f"{cost['copies']['median']:.2f}",
        )
        for kept, entry in report["kept"].items()
        for way, cost in entry["ways"].items()
    ]
    return lines + table(("kept", "way", "MB", "ms a layer", "times a copy"), rows)
