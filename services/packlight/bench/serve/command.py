"""`packlight bench serve`: a line for each turn while it runs, tables and reports in the end.

Knows the terminal and files. What was measured until an interruption is kept, in whole rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

from packlight.bench.output import machine_facts, say
from packlight.bench.serve.client import find_model, make_http
from packlight.bench.serve.figures import MEASURES, figures, good
from packlight.bench.serve.flags import add_arguments, check_arguments, make_cells, make_targets, parse_slo
from packlight.bench.serve.plots import sections
from packlight.bench.serve.prompts import Prompts
from packlight.bench.serve.results import Header, Run, Server, Turn, load
from packlight.bench.serve.rounds import Plan, Row, make_pace, take_turns
from packlight.bench.serve.tables import facts, failed_cells, show, tables
from packlight.bench.serve.workloads import WORKLOADS
from packlight.core.config import ModelConfig
from packlight.evaluate.textfile import write
from packlight.models.opened import open_model
from packlight.report.page import render_page
from packlight.report.tables import to_markdown, to_text

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "OpenAI-compatible servers side by side: latency, throughput, goodput, and ratios within each round"
_SHOWN_WHILE_RUNNING = ("ttft_s", "tpot_s", "output_tokens_per_s", "decode_tokens_per_s")


def run(arguments: argparse.Namespace) -> int:
    """0 when done, 1 when a server answered nothing in a cell, 130 when interrupted. Raises StartupError for flags that
    make no run, and for a server that is not there at the start."""
    check_arguments(arguments)
    if arguments.source is not None:
        return report(load(Path(arguments.source)), arguments)
    return _Session(arguments).run()


class _Session:
    """One run in progress: what has been measured, and where it goes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._workload = WORKLOADS[arguments.workload]
        self._max_tokens = arguments.max_tokens or self._workload.max_tokens
        # A server that is still up remembers the prompts of the last run.
        self._seed = secrets.randbelow(10**6) if arguments.seed is None else arguments.seed
        self._cells = make_cells(arguments, self._workload)
        self._slo = parse_slo(arguments.slo)
        self._targets = make_targets(arguments)
        opened = open_model(ModelConfig(path=arguments.tokenizer), on_progress=say)
        self._prompts = Prompts(opened.tokenizer, arguments.api)
        self._check_prompts()
        self._done: Run | None = None

    def run(self) -> int:
        try:
            asyncio.run(self._measure())
        except KeyboardInterrupt:
            if self._done is not None and self._done.turns:
                report(self._done, self._arguments)
            return 130
        assert self._done is not None
        return report(self._done, self._arguments)

    def _check_prompts(self) -> None:
        """A length that is too short is refused now, not in the middle of a run."""
        for size, _ in self._cells:
            self._workload.make(replace(size, num_conversations=1), "check", self._prompts)

    async def _measure(self) -> None:
        # Paused servers must be let go, and whole rounds kept, however the run is ended.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, signal.raise_signal, signal.SIGINT)
        key = os.environ.get(self._arguments.api_key_from) if self._arguments.api_key_from else None
        async with make_http(self._arguments.timeout, key) as http:
            rows = tuple([Row(target, await find_model(target, http)) for target in self._targets])
            self._done = Run(header=self._header(rows))
            turns: list[Turn] = []
            async with aclosing(take_turns(self._plan(rows), self._prompts, http, make_pace())) as taken:
                async for turn in taken:
                    turns.append(turn)
                    say(describe_turn(turn, self._arguments.rounds, self._slo))
                    if len(turns) % (len(rows) * len(self._cells)) == 0:
                        self._keep(turns)

    def _keep(self, turns: Sequence[Turn]) -> None:
        assert self._done is not None
        self._done = replace(self._done, turns=tuple(turns))
        write_json(self._done, self._arguments.json)

    def _plan(self, rows: tuple[Row, ...]) -> Plan:
        return Plan(
            rows=rows,
            workload=self._workload,
            cells=self._cells,
            num_rounds=self._arguments.rounds,
            max_tokens=self._max_tokens,
            seed=self._seed,
            prefill_first=self._arguments.prefill_first,
            gauge=self._arguments.gauge,
        )

    def _header(self, rows: Sequence[Row]) -> Header:
        return Header(
            command=shlex.join(["packlight", *sys.argv[1:]]),
            workload=self._arguments.workload,
            api=self._arguments.api,
            tokenizer=self._arguments.tokenizer,
            seed=self._seed,
            max_tokens=self._max_tokens,
            prefill_first=self._arguments.prefill_first,
            servers=tuple(_server(row) for row in rows),
            machine=machine_facts(),
            slo_s=dict(self._slo),
        )


def _server(row: Row) -> Server:
    return Server(name=row.target.name, url=row.target.url, model=row.model, body=dict(row.target.body))


def describe_turn(turn: Turn, num_rounds: int, slo: Mapping[str, float]) -> str:
    """One line."""
    found = [(measure, measure.of(turn, slo)) for measure in MEASURES if measure.key in _SHOWN_WHILE_RUNNING]
    told = [f"{m.title} {show(value * m.scale)} {m.unit}" for m, value in found if value is not None]
    num_failed = len(turn.answers) - len(good(turn))
    failed = [f"{num_failed} of {len(turn.answers)} requests failed"] if num_failed else []
    return f"round {turn.round + 1}/{num_rounds} | {turn.cell.label} | {turn.server}: {', '.join([*told, *failed])}"


def report(run: Run, arguments: argparse.Namespace) -> int:
    """Tables on the terminal, files where asked for. 1 if a server answered nothing in a cell."""
    made = tables(run)
    print("\n".join(map(to_text, made)))
    write_json(run, arguments.json)
    if arguments.html:
        write(Path(arguments.html), render_page("Servers side by side", facts(run), sections(run), made))
    if arguments.markdown:
        head = "\n".join(f"- {name}: {value}" for name, value in facts(run))
        write(Path(arguments.markdown), "\n".join([head, "", *map(to_markdown, made)]))
    failed = failed_cells(run)
    for line in failed:
        say(line)
    return 1 if failed else 0


def write_json(run: Run, path: str | None) -> None:
    if path is not None:
        write(Path(path), replace(run, figures=figures(run)).to_json())
