"""`packlight bench NAME ...`: which benchmarks there are, and handing the rest of the command line to one of them.

Knows names and where their modules lie. Imports the one that is asked for and no other: some need torch. A benchmark is
a module with `SUMMARY`, `add_arguments(parser)` and `run(arguments)`, which returns the exit code.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Protocol, cast

SUMMARY = "measure servers side by side, or one part of this one"

BENCHES: Mapping[str, str] = MappingProxyType(
    {
        "serve": "packlight.bench.serve.command",
        "step": "packlight.bench.micro.step",
        "prefill": "packlight.bench.micro.prefill",
        "attention": "packlight.bench.micro.attention",
        "selection": "packlight.bench.micro.selection",
        "packing": "packlight.bench.micro.packing",
        "codecs": "packlight.bench.micro.codecs",
        "transport": "packlight.bench.micro.transport",
        "index": "packlight.bench.micro.index",
        "router": "packlight.bench.micro.router",
    }
)


class Bench(Protocol):
    """What a benchmark's module offers."""

    SUMMARY: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The name of a benchmark; what follows is read by the benchmark itself."""
    parser.add_argument("bench", metavar="NAME", choices=BENCHES, help=f"one of {', '.join(BENCHES)}")
    parser.add_argument("rest", metavar="...", nargs=argparse.REMAINDER, help="see `packlight bench NAME --help`")


def run(arguments: argparse.Namespace) -> int:
    """Runs the benchmark. Raises StartupError for flags it cannot work with; a wrong flag exits with 2."""
    bench = find_bench(arguments.bench)
    return bench.run(parse(arguments.bench, bench, arguments.rest))


def find_bench(name: str) -> Bench:
    return cast(Bench, import_module(BENCHES[name]))


def parse(name: str, bench: Bench, argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"packlight bench {name}", description=bench.SUMMARY)
    bench.add_arguments(parser)
    return parser.parse_args(argv)
