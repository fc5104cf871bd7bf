"""The figures of `make gpu-check`, each a function: `python -m tests.gpu.figures step_full`. The last line is JSON.

They measure what a worker does, with its own runner, backend and pool, on a model of the shape of Llama-3.1-8B whose
weights are drawn. A `Rig` says where and how large, so that the same code runs on a CPU at toy size, which is how it is
tested where there is no GPU; the figures of that mean nothing.

Legend: B rows, L layers, K KV heads, H query heads, D head dim.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from packlight.attention.base import DecodeBatch, FixedBackend, FixedShape
from packlight.bench.micro.measure import selection as selecting
from packlight.bench.micro.measure.rows import Layout, Rows, make_rows
from packlight.bench.micro.measure.weights import weight_bytes
from packlight.bench.stream import Stream, synced
from packlight.bench.timing import slices_of
from packlight.compress.base import Selection
from packlight.compress.budget import base_budget
from packlight.compress.options import resolve
from packlight.compress.pack import pack as pack_layer
from packlight.core.config import Config, GraphsConfig, build_config
from packlight.core.types import GenerateRequest, ModelSpec, PackSpec, Role, SamplingParams, StopRules
from packlight.decode.memory import DecodeMemory
from packlight.engine.build import build_attention, build_model
from packlight.engine.graph_choice import Mode
from packlight.engine.graphs import CudaGraphs, GraphedRunner, GraphEngine
from packlight.engine.runner import DecodeRunner
from packlight.engine.sampler import SampleRow, sample
from packlight.kv.pool import KVPool
from packlight.kv.summaries import PageSummaries
from packlight.models.base import LanguageModel
from packlight.models.folder import read_json
from packlight.models.opened import OpenedModel, open_model

NUM_ROUNDS = 5
SLICE_S = 0.3


@dataclass(frozen=True)
class Rig:
    """Where, and how large. `backend` makes an attention backend, `engine` what captures steps (None: nothing does)."""

    model_path: str = "llama-3.1-8b"
    device: str = "cuda"
    dtype: str = "bfloat16"
    batch: int = 16
    context: int = 32_768
    long_context: int = 131_072 - 64
    kept_tokens: int = 512
    kv_bytes: int = 60_000_000_000
    stream_bytes: int = 8 << 30
    backend: Callable[[], FixedBackend] | None = None
    engine: Callable[[], GraphEngine | None] | None = None

    @cached_property
    def config(self) -> Config:
        settings = {
            "model.path": self.model_path, "model.weights": "dummy", "model.device": self.device,
            "model.dtype": self.dtype, "prefill.kv_memory_bytes": 2 * self.kv_tokens_bytes(self.context),
            "prefill.chunk_tokens": 8192, "prefill.shadow_ratio": 0,
        }  # fmt: skip
        return build_config({}, [f"{path}={value}" for path, value in settings.items()])

    @cached_property
    def opened(self) -> OpenedModel:
        return open_model(self.config.model, on_progress=print)

    @cached_property
    def model(self) -> LanguageModel:
        return build_model(self.opened, self.config.model, Role.DECODE, on_progress=print)

    @property
    def num_heads(self) -> int:
        assert self.opened.folder is not None
        return int(read_json(self.opened.folder.path / "config.json")["num_attention_heads"])

    @property
    def layout(self) -> Layout:
        return Layout(self.config.kv.page_size, getattr(torch, self.dtype), device=self.device)

    def kv_tokens_bytes(self, num_tokens: int) -> int:
        """At most: before the model is known, the KV of Llama-3.1-8B in bfloat16."""
        return num_tokens * 2 * 32 * 8 * 128 * 2

    def make_backend(self) -> Any:
        return self.backend() if self.backend else build_attention("flashinfer", self.device)

    def make_engine(self) -> GraphEngine | None:
        return self.engine() if self.engine else CudaGraphs(torch.device(self.device))

    def rows(self, batch: int, tokens: int, pack: PackSpec | None = None, prompt: int = 0) -> Rows:
        spec = self.model.spec
        lengths = [[tokens] * spec.num_kv_heads for _ in range(spec.num_layers)]
        return make_rows(
            spec, self.layout, lengths, num_rows=batch, num_spare_rows=batch, pack=pack, num_prompt_tokens=prompt
        )

    def rocketkv(self, prompt: int) -> PackSpec:
        """The paper's setting: of the tokens kept by stage 1, so many are read in a step."""
        return resolve(
            {"recipe": "rocketkv", "budget": self.kept_tokens}, default_recipe="rocketkv", default_budget=None
        )


def step_full(rig: Rig) -> dict[str, float]:
    rows = rig.rows(rig.batch, rig.context)
    step_s = _step_s(rig, rows, rig.context)
    return _against_copy(rig, rows, step_s)


def step_packed(rig: Rig) -> dict[str, float]:
    return _full_and_packed(rig, rig.batch, rig.context)


def step_long(rig: Rig) -> dict[str, float]:
    return _full_and_packed(rig, 1, rig.long_context)


def attention(rig: Rig) -> dict[str, float]:
    """One layer's attention: everything, a sixteenth of the pages, and the same with choosing them."""
    page_size = rig.layout.page_size
    few = max(2, rig.context // page_size // 16)
    sparse = rig.rows(rig.batch, rig.context, _quest(few * page_size), rig.context)
    assert sparse.reading is not None
    sparse = replace(sparse, reading=replace(sparse.reading, num_pages=few, num_dense_layers=0))
    choosing_s = _attend_s(rig, sparse)
    dense_s = _attend_s(rig, replace(sparse, reading=None, summaries=None))
    few_s = _attend_s(rig, rig.rows(rig.batch, few * page_size - 1))
    return {
        "dense_ms": 1e3 * dense_s,
        "sparse_ms": 1e3 * few_s,
        "sparse_with_choosing_ms": 1e3 * choosing_s,
        "speedup": dense_s / few_s,
        "speedup_with_choosing": dense_s / choosing_s,
        "choosing_share": (choosing_s - few_s) / few_s,
    }


def selection(rig: Rig) -> dict[str, float]:
    """What a prefill worker itself says of a prompt whose selection is for 8x packing."""
    packs = {name: resolve({"recipe": name, "ratio": 0.125}, default_recipe=name, default_budget=None)
             for name in ("snapkv", "rocketkv")}  # fmt: skip
    token_ids = tuple(1 + position % 200 for position in range(rig.context))
    costs = asyncio.run(selecting.measure(rig.model, rig.config, token_ids, packs, 3, print))
    shares = {name: costs.share(name).median for name in packs}
    return {"prefill_s": median(costs.prefill_s), "share_of_prefill": shares["snapkv"], **shares}


def graphs(rig: Rig) -> dict[str, float]:
    context = min(rig.context, 4096)
    rows = rig.rows(1, context)
    replayed_s, eager_s = _step_s(rig, rows, context), _step_s(rig, rows, context, graphed=False)
    return {"replayed_ms": 1e3 * replayed_s, "eager_ms": 1e3 * eager_s, "speedup": eager_s / replayed_s}


def concurrency(rig: Rig) -> dict[str, float]:
    """Requests that the decode worker's own admission lets in."""
    spec = rig.model.spec
    pool = KVPool.of_size(
        spec, memory_bytes=rig.kv_bytes, page_size=rig.layout.page_size, dtype=rig.layout.dtype, device=rig.device
    )
    counts = {
        name: _num_admitted(spec, pool, rig.context, pack)
        for name, pack in (("full", PackSpec()), ("packed", PackSpec("snapkv", ratio=0.125)))
    }
    return {**counts, "times": counts["packed"] / counts["full"]}


def link(rig: Rig) -> dict[str, float]:
    """Packing one layer's kept eighth and copying it to pinned memory, against a plain copy of as many bytes."""
    spec, dtype = rig.model.spec, rig.layout.dtype
    shape = (spec.num_kv_heads, rig.context, spec.head_dim)
    k_KSD, v_KSD = (torch.randn(shape, device=rig.device).to(dtype) for _ in range(2))
    every_eighth = torch.arange(0, rig.context, 8, device=rig.device)
    chosen = Selection(indices=(every_eighth,) * spec.num_kv_heads, retained_mass=1.0)
    packed = pack_layer(k_KSD, v_KSD, chosen, rig.layout.page_size).pages
    target = torch.empty(packed.shape, dtype=dtype, pin_memory=rig.device.startswith("cuda"))

    def pack_and_copy() -> None:
        target.copy_(pack_layer(k_KSD, v_KSD, chosen, rig.layout.page_size).pages, non_blocking=True)

    both_s = _median_s(rig, pack_and_copy)
    copy_s = _median_s(rig, partial(target.copy_, packed, non_blocking=True))
    gigabytes = packed.numel() * packed.element_size() / 1e9
    return {"link_gbs": gigabytes / copy_s, "packed_gbs": gigabytes / both_s, "share_of_link": copy_s / both_s}


FIGURES = {
    figure.__name__: figure
    for figure in (step_full, step_packed, step_long, attention, selection, graphs, concurrency, link)
}


def _full_and_packed(rig: Rig, batch: int, context: int) -> dict[str, float]:
    pack = rig.rocketkv(context)
    packed_tokens = base_budget(pack, context)
    packed_s = _step_s(rig, rig.rows(batch, packed_tokens, pack, context), context)
    full_s = _step_s(rig, rig.rows(batch, context), context)
    return {
        "full_ms": 1e3 * full_s,
        "packed_ms": 1e3 * packed_s,
        "speedup": full_s / packed_s,
        "stored_tokens": packed_tokens,
    }


def _step_s(rig: Rig, rows: Rows, context: int, *, graphed: bool = True) -> float:
    """A step as a decode worker's compute thread makes it, the sampled tokens on the host."""
    runner = _runner(rig, rows, graphed)
    places, num_rows = list(rows.rows), len(rows.rows)
    sampled = [SampleRow(SamplingParams(temperature=0.0), context + 1) for _ in places]

    def step() -> None:
        rows.table.grow(places)
        logits_BV = runner.decode(
            rows.table, places, [1] * num_rows, [context] * num_rows,
            reads=rows.reads(num_rows), summaries=rows.summaries,
        )  # fmt: skip
        sample(logits_BV, sampled)

    modes: set[Mode] = set()
    if isinstance(runner, GraphedRunner):
        runner.on_mode = modes.add
    seconds = _median_s(rig, step)
    if modes - {Mode.REPLAYED}:
        raise RuntimeError(f"the step was to be replayed, and ran {', '.join(sorted(modes))}")
    return seconds


def _runner(rig: Rig, rows: Rows, graphed: bool) -> DecodeRunner:
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


def _attend_s(rig: Rig, rows: Rows) -> float:
    """Mean seconds of one layer's attention, replayed where steps can be captured."""
    spec, places = rig.model.spec, tuple(rows.rows)
    q_BHD = torch.randn(len(places), rig.num_heads, spec.head_dim, device=rig.device).to(rows.pool.dtype)
    k_BKD, v_BKD = (
        torch.randn(len(places), spec.num_kv_heads, spec.head_dim, device=rig.device).to(rows.pool.dtype)
        for _ in range(2)
    )
    batch = DecodeBatch(rows.pool, rows.table, places, rows.reads(len(places)), rows.summaries)
    backend, engine = rig.make_backend(), rig.make_engine()
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
        return _median_s(rig, engine.capture(layers) if engine is not None else layers) / spec.num_layers


def _against_copy(rig: Rig, rows: Rows, step_s: float) -> dict[str, float]:
    """The step's bytes, weights once and KV of every row, over its time, against a copy's."""
    num_bytes = weight_bytes(rig.model) + sum(
        rows.layer_bytes(layer, len(rows.rows)) for layer in range(rig.model.spec.num_layers)
    )
    stream = Stream(torch.get_num_threads(), rig.stream_bytes, rig.device)
    seconds = {name: [take() for _ in range(NUM_ROUNDS)] for name, take in stream.subjects().items()}
    rates = {name.removeprefix("stream/"): stream.num_bytes / 1e9 / median(each) for name, each in seconds.items()}
    limit = rates.get("copy", max(rates.values()))
    gbs = num_bytes / 1e9 / step_s
    return {"step_ms": 1e3 * step_s, "gbs": gbs, "copy_gbs": limit, "share_of_copy": gbs / limit, **rates}


def _num_admitted(spec: ModelSpec, pool: KVPool, context: int, pack: PackSpec) -> int:
    memory = DecodeMemory(spec, pool, num_rows=4096)
    request = GenerateRequest(
        request_id="r", token_ids=(1,) * context, num_prompt_tokens=context, sampling=SamplingParams(),
        stop=StopRules(max_tokens=16), pack=pack, prefill_id="p", deadline_s=1.0,
    )  # fmt: skip
    held = []
    while memory.open(holding := memory.plan(request)):
        held.append(holding)
    for holding in held:
        memory.close(holding)
    return len(held)


def _median_s(rig: Rig, function: Callable[[], object]) -> float:
    take = slices_of(synced(function, rig.device), SLICE_S)
    return median([take() for _ in range(NUM_ROUNDS)])


def _quest(num_tokens: int) -> PackSpec:
    return resolve({"recipe": "quest", "budget": num_tokens}, default_recipe="quest", default_budget=None)


def main(argv: Sequence[str]) -> int:
    (name,) = argv
    print(json.dumps(FIGURES[name](Rig())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
