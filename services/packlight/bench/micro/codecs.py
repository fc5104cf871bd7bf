"""`packlight bench codecs`: how fast packed KV is coded and decoded, and how much smaller it gets."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from packlight.bench.micro.flags import add_thread_argument, at_least_one, num_threads, one_of
from packlight.bench.output import add_output_arguments, check_output, emit, machine_facts, machine_line, table
from packlight.compress.parts import CODECS, codecs_for

if TYPE_CHECKING:
    from packlight.bench.micro.measure.codecs import Coded

SUMMARY = "GB/s and size of every codec"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--codecs", metavar="A,B", help="which to compare (all)")
    parser.add_argument("--tokens", type=int, default=7168, metavar="N", help="tokens of each KV head of the layer")
    parser.add_argument("--heads", type=int, default=3, metavar="N", help="KV heads of the layer")
    parser.add_argument("--head-dim", type=int, default=64, metavar="N")
    parser.add_argument("--page-size", type=int, default=16, metavar="N", help="tokens per page")
    parser.add_argument("--dtype", default="bfloat16", metavar="TYPE", help="bfloat16, float32 or float16")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="interleaved rounds")
    parser.add_argument("--slice", type=float, default=0.1, metavar="S", help="seconds of one codec in one round")
    add_thread_argument(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError for flags that cannot be."""
    check_output(arguments.json)
    known = codecs_for(at_least_one("head-dim", arguments.head_dim))
    names = [one_of("codecs", name, known) for name in arguments.codecs.split(",")] if arguments.codecs else known
    # Takes seconds: torch.
    import torch

    from packlight.bench.micro.measure.codecs import LayerShape, measure

    torch.set_num_threads(num_threads(arguments))
    shape = LayerShape(
        num_kv_heads=at_least_one("heads", arguments.heads),
        num_tokens=at_least_one("tokens", arguments.tokens),
        page_size=at_least_one("page-size", arguments.page_size),
        head_dim=arguments.head_dim,
        dtype=getattr(torch, one_of("dtype", arguments.dtype, ("bfloat16", "float32", "float16"))),
    )
    rounds = at_least_one("rounds", arguments.rounds)
    coded = measure(names, shape, num_rounds=rounds, slice_s=arguments.slice)
    report = {
        "bench": "codecs",
        "tokens": shape.num_tokens,
        "kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "page_size": shape.page_size,
        "dtype": arguments.dtype,
        "rounds": rounds,
        "codecs": {name: _coded(each) for name, each in coded.items()},
        "skipped": {name: f"has no form for heads of {shape.head_dim}" for name in CODECS if name not in known},
        "machine": machine_facts(num_threads(arguments)),
    }
    emit(report, _lines(report), arguments.json)
    return 0


def _coded(coded: Coded) -> dict[str, Any]:
    """GB/s of native bytes; `ratio` is how many times smaller the payload is."""
    gigabytes = coded.native_bytes / 1e9
    return {
        "encode_gbs": coded.encode_s.per(gigabytes).as_json(),
        "decode_gbs": coded.decode_s.per(gigabytes).as_json(),
        "native_bytes": coded.native_bytes,
        "payload_bytes": coded.payload_bytes,
        "ratio": coded.native_bytes / coded.payload_bytes,
        "max_error": coded.max_error,
    }


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [
        f"{report['kv_heads']} KV heads x {report['tokens']} tokens x {report['head_dim']}, {report['dtype']}: "
        f"{machine_line(report['machine'])}",
        "",
    ]
    rows = [
        (
            name,
            f"{entry['encode_gbs']['median']:.2f}",
            f"{entry['decode_gbs']['median']:.2f}",
            f"{entry['ratio']:.2f}",
            f"{entry['max_error']:.3f}",
        )
        for name, entry in report["codecs"].items()
    ]
    lines += table(("codec", "encode GB/s", "decode GB/s", "times smaller", "max error"), rows)
    return lines + [f"skipped: {name}: {reason}" for name, reason in report["skipped"].items()]
