"""Flags that several micro-benchmarks have, and checking them. Free of torch."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable

from packlight.core.errors import ConfigError


def add_thread_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads that compute (all cores)")


def add_stream_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stream-mb",
        type=int,
        default=512,
        metavar="MB",
        help="memory that is read to learn the read bandwidth; several times the last-level cache",
    )


def stream_bytes(arguments: argparse.Namespace) -> int:
    """Raises ConfigError for less than one."""
    return at_least_one("stream-mb", arguments.stream_mb) << 20


def num_threads(arguments: argparse.Namespace) -> int:
    """Raises ConfigError for less than one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads: int = cores if arguments.threads is None else arguments.threads
    if threads < 1:
        raise ConfigError(f"--threads: got {threads}, must be at least 1")
    return threads


def one_of(flag: str, value: str, known: Iterable[str]) -> str:
    """`value`. Raises ConfigError unless it is `known`."""
    names = list(known)
    if value not in names:
        raise ConfigError(f"--{flag}: unknown {value!r}; choose one of {', '.join(names)}")
    return value


def at_least_one(flag: str, value: int) -> int:
    """`value`. Raises ConfigError naming the flag."""
    if value < 1:
        raise ConfigError(f"--{flag}: got {value}, must be at least 1")
    return value
