"""The command line of `packlight bench serve`, and what it means.

Knows flags and their limits, which are refused here with the flag's name. Asks nobody anything.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from packlight.bench.output import counts, numbers
from packlight.bench.serve.figures import SLO_NAMES
from packlight.bench.serve.gauge import DECODE_PAGES
from packlight.bench.serve.loads import Load
from packlight.bench.serve.targets import Target, parse_targets
from packlight.bench.serve.workloads import WORKLOADS, Size, Workload
from packlight.core.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_server_arguments(parser)
    _add_load_arguments(parser)
    reports = parser.add_argument_group("reports")
    reports.add_argument("--json", metavar="FILE", help="every answer and all figures, rewritten after every round")
    reports.add_argument("--html", metavar="FILE", help="tables and plots")
    reports.add_argument("--markdown", metavar="FILE", help="the tables")
    reports.add_argument("--from", metavar="FILE", dest="source", help="report on this JSON instead of measuring")


def _add_server_arguments(parser: argparse.ArgumentParser) -> None:
    servers = parser.add_argument_group("servers; the first is what the others are compared with")
    repeated = {"action": "append", "default": []}
    for flag, metavar, text in (
        ("--server", "NAME=URL", "a row of the report; several may share a URL"),
        ("--model", "NAME=MODEL", "its model, where /v1/models does not say"),
        ("--kv", "NAME:JSON", "the `kv` object of its requests"),
        ("--body", "NAME:JSON", "further fields of its requests; null leaves one out"),
        ("--metrics", "NAME=URL", "its Prometheus page, polled for --gauge while it is measured"),
        ("--pid", "NAME=PID", "its process, stopped with its descendants while others are measured"),
    ):
        servers.add_argument(flag, metavar=metavar, help=text, **repeated)  # type: ignore[arg-type]
    servers.add_argument("--gauge", default=DECODE_PAGES, help=f"the sample to watch (default {DECODE_PAGES})")
    servers.add_argument("--api", choices=("completions", "chat"), default="completions")
    servers.add_argument("--api-key-from", metavar="VARIABLE", help="the environment variable that holds an API key")
    servers.add_argument("--timeout", metavar="S", type=float, default=900.0, help="for each wait on a server")


def _add_load_arguments(parser: argparse.ArgumentParser) -> None:
    work = parser.add_argument_group("load")
    summaries = ", ".join(f"{name}: {workload.summary}" for name, workload in WORKLOADS.items())
    work.add_argument("--workload", choices=WORKLOADS, default="chat", help=summaries)
    work.add_argument("--tokenizer", default="smollm2", help="as `model.path`; it measures prompts (default smollm2)")
    work.add_argument("--prompt-tokens", metavar="N,N", help="lengths of the first prompts; each is run")
    work.add_argument("--question-tokens", metavar="N", type=int, help="what of it is not shared, or later turns add")
    work.add_argument("--turns", metavar="N", type=int, help="of each multi_turn conversation")
    work.add_argument("--max-tokens", metavar="N", type=int, help="tokens of each answer")
    loads = work.add_mutually_exclusive_group()
    loads.add_argument("--concurrency", metavar="N,N", help="closed loop, so many at once (default 1); each is run")
    loads.add_argument("--rate", metavar="R,R", help="open loop, Poisson arrivals, so many a second; each is run")
    work.add_argument("--requests", metavar="N", type=int, help="conversations of a turn (default: one for each user)")
    work.add_argument("--rounds", metavar="N", type=int, default=5)
    work.add_argument("--seed", metavar="N", type=int, help="of prompts and arrivals (default: new in each run)")
    work.add_argument("--prefill-first", action="store_true", help="have prompts cached before the clock starts")
    work.add_argument("--slo", metavar="ttft=2,tpot=0.1", default="", help="seconds that goodput allows")


def check_arguments(arguments: argparse.Namespace) -> None:
    """Before minutes are spent. Raises ConfigError for a count below 1, a report that could not be written and a key
    that is not there."""
    for flag in ("rounds", "requests", "question_tokens", "turns", "max_tokens"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag.replace('_', '-')}: got {value}, must be at least 1")
    for path in (arguments.json, arguments.html, arguments.markdown):
        if path is not None and not Path(path).resolve().parent.is_dir():
            raise ConfigError(f"cannot write {path}: there is no such folder; make it first")
    if (variable := arguments.api_key_from) is not None and not os.environ.get(variable):
        raise ConfigError(f"--api-key-from {variable}: there is no such environment variable, or it is empty")


def make_targets(arguments: argparse.Namespace) -> tuple[Target, ...]:
    return parse_targets(
        arguments.server,
        models=arguments.model,
        kvs=arguments.kv,
        bodies=arguments.body,
        metrics=arguments.metrics,
        pids=arguments.pid,
    )


def make_cells(arguments: argparse.Namespace, workload: Workload) -> tuple[tuple[Size, Load], ...]:
    """Every prompt length under every load. Raises ConfigError naming the flag at fault."""
    lengths = counts("prompt-tokens", arguments.prompt_tokens or str(workload.prompt_tokens))
    return tuple((_size(arguments, workload, length, load), load) for length in lengths for load in _loads(arguments))


def _loads(arguments: argparse.Namespace) -> list[Load]:
    if arguments.rate is None:
        return [Load(concurrency=number) for number in counts("concurrency", arguments.concurrency or "1")]
    rates = numbers("rate", arguments.rate)
    if min(rates) <= 0:
        raise ConfigError(f"--rate {arguments.rate}: requests per second must be above 0")
    return [Load(rate=rate) for rate in rates]


def _size(arguments: argparse.Namespace, workload: Workload, prompt_tokens: int, load: Load) -> Size:
    num_conversations = arguments.requests or workload.num_conversations or load.concurrency
    if num_conversations is None:
        raise ConfigError("--requests is missing: say how many a turn of --rate has")
    if load.concurrency is not None and num_conversations < load.concurrency:
        raise ConfigError(f"--requests {num_conversations}: fewer than the {load.concurrency} that run at once")
    size = Size(
        prompt_tokens=prompt_tokens,
        num_conversations=num_conversations,
        question_tokens=arguments.question_tokens or workload.question_tokens,
        num_turns=arguments.turns or workload.num_turns,
    )
    if size.question_tokens >= prompt_tokens and arguments.workload == "shared_document":
        raise ConfigError(f"--question-tokens {size.question_tokens}: the prompt has only {prompt_tokens} tokens")
    return size


def parse_slo(text: str) -> Mapping[str, float]:
    """`ttft=2,tpot=0.1`, in seconds. Raises ConfigError."""
    slo: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, limit = part.partition("=")
        if name not in SLO_NAMES:
            raise ConfigError(f"--slo {part}: {', '.join(SLO_NAMES)} can have a limit, such as ttft=2")
        (slo[name],) = numbers(f"slo {name}", limit)
    return slo
