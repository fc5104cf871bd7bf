"""Decode steps and attention as a worker's compute thread runs them, timed.

Knows runners, plans and captured steps. Does not know what their times are compared with (`figures.py`).

Legend: B rows, K KV heads, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packlight.attention.base import DecodeBatch, FixedBackend, FixedShape
from packlight.bench.micro.measure.rows import Rows
from packlight.core.config import GraphsConfig
from packlight.core.types import SamplingParams
from packlight.engine.graph_choice import Mode
from packlight.engine.graphs import GraphedRunner
from packlight.engine.runner import DecodeRunner
from packlight.engine.sampler import SampleRow, sample
from packlight.kv.pool import KVPool
from packlight.kv.summaries import PageSummaries
from tests.gpu.rig import Rig


def full_step_seconds(rig: Rig, batch: int, context: int) -> float:
    if (batch, context) not in rig.full_steps:
        rig.full_steps[batch, context] = step_seconds(rig, rig.rows(batch, context), context)
    return rig.full_steps[batch, context]


def step_seconds(rig: Rig, rows: Rows, context: int, *, graphed: bool = True) -> float:
    """A step as a decode worker's compute thread makes it, the sampled tokens on the host."""
    runner, modes = make_runner(rig, rows, graphed), set[Mode]()
    if isinstance(runner, GraphedRunner):
        runner.on_mode = modes.add
    seconds = rig.median_s(make_step(runner, rows, context))
    if modes - {Mode.REPLAYED}:
        raise RuntimeError(f"the step was to be replayed, and ran {', '.join(sorted(modes))}")
    return seconds


def make_step(runner: DecodeRunner, rows: Rows, context: int) -> Callable[[], object]:
    places, num_rows = list(rows.rows), len(rows.rows)
    sampled = [SampleRow(SamplingParams(temperature=0.0), context + 1) for _ in places]

    def step() -> None:
        rows.table.grow(places)
        logits_BV = runner.decode(
            rows.table, places, [1] * num_rows, [context] * num_rows,
            reads=rows.reads(num_rows), summaries=rows.summaries,
        )  # fmt: skip
        sample(logits_BV, sampled)

    return step


def make_runner(rig: Rig, rows: Rows, graphed: bool) -> DecodeRunner:
    backend, engine = rig.make_backend(), rig.make_engine() if graphed else None
    if engine is None or not isinstance(rows.pool, KVPool):
        return DecodeRunner(rig.model, rows.pool, backend)
    longest = int(rows.table.new_lengths(list(rows.rows)).max()) + rig.layout.page_size
    sizes = GraphsConfig(batch_sizes=[len(rows.rows)], tokens=[longest], recipes=[])
    runner = GraphedRunner(rig.model, rows.pool, backend, engine, sizes=sizes)
    readings = [rows.reading] if rows.reading is not None else []
    summaries = rows.summaries or PageSummaries(1, rows.pool.head_dim, rows.pool.dtype, rig.device)
    runner.prepare(rows.table, summaries, readings, on_progress=print)
    return runner


def attention_seconds(rig: Rig, rows: Rows, backend: FixedBackend | None = None) -> float:
    """Mean seconds of one layer's attention, replayed where steps can be captured."""
    spec, places = rig.spec, tuple(rows.rows)
    q_BHD = torch.randn(
        len(places), int(rig.read_config()["num_attention_heads"]), spec.head_dim, device=rig.device
    ).to(rows.pool.dtype)
    k_BKD, v_BKD = (
        torch.randn(len(places), spec.num_kv_heads, spec.head_dim, device=rig.device).to(rows.pool.dtype)
        for _ in range(2)
    )
    batch = DecodeBatch(rows.pool, rows.table, places, rows.reads(len(places)), rows.summaries)
    backend, engine = backend or rig.make_backend(), rig.make_engine()
    if engine is None:
        plan: Any = backend.plan(batch)
    else:
        num_pages = -(-int(rows.table.new_lengths(list(places)).max()) // rows.pool.page_size)
        backend.reserve(rows.table, rows.pool, num_pages)
        plan = backend.fixed_plan(batch, FixedShape(len(places), num_pages, rows.reading))
        plan.load(batch)

    def layers() -> Tensor:
        for layer in range(spec.num_layers):
            out = plan.attend(layer, q_BHD, k_BKD, v_BKD, scale=spec.head_dim**-0.5, sliding_window=None)
        return out  # type: ignore[no-any-return]

    with torch.inference_mode():
        layers()
        if engine is not None:
            plan.load(batch)
        return rig.median_s(engine.capture(layers) if engine is not None else layers) / spec.num_layers
