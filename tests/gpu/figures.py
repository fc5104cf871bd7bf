"""The figures of `make gpu-check`, each a function: `python -m tests.gpu.figures step_full link`. One JSON line each.

They measure what a worker does, with its own runner, backend and pool, on a model of the shape of Llama-3.1-8B whose
weights are drawn. A `Rig` says where and how large, so that the same code runs on a CPU at toy size, which is how it is
tested where there is no GPU; the figures of that mean nothing. What several need - the model, a step over full KV - is
made once in a process. Largest of all is a pool of 16 rows of 32k: 69 GB, beside 16 GB of weights.

Legend: K KV heads, S tokens, D head dim.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import torch.profiler
from torch import Tensor
from torch.autograd import DeviceType

from packlight.bench.micro.measure import selection as selecting
from packlight.bench.micro.measure.weights import weight_bytes
from packlight.bench.stream import Stream
from packlight.compress.base import Selection
from packlight.compress.budget import base_budget
from packlight.compress.options import resolve
from packlight.compress.packers import TorchPacker
from packlight.core.types import GenerateRequest, ModelSpec, PackSpec, SamplingParams, StopRules
from packlight.decode.memory import DecodeMemory
from packlight.kv.pool import KVPool
from packlight.prefill.staging import CudaCopier, Staging
from packlight.transfer.base import CPU
from tests.gpu.receiving_figure import receiving
from tests.gpu.rig import Rig
from tests.gpu.steps import attention_seconds, full_step_seconds, make_runner, make_step, step_seconds

GROUPS_ON_CUDA_CORES = (1, 2, 3, 4, 8)  # all that FlashInfer has kernels for


def step_full(rig: Rig) -> dict[str, float]:
    """The step's bytes, weights once and KV of every row, over its time, against a copy's."""
    step_s = full_step_seconds(rig, rig.batch, rig.context)
    kv_bytes = rig.batch * (rig.context + 1) * rig.spec.kv_bytes_per_token(rig.layout.dtype.itemsize)
    gbs, rates = (_read_weight_bytes(rig) + kv_bytes) / 1e9 / step_s, _stream_gbs(rig)
    limit = rates.get("copy", max(rates.values()))
    return {"step_ms": 1e3 * step_s, "gbs": gbs, "copy_gbs": limit, "share_of_copy": gbs / limit, **rates}


def step_packed(rig: Rig) -> dict[str, float]:
    return _full_and_packed(rig, rig.batch, rig.context)


def step_long(rig: Rig) -> dict[str, float]:
    return _full_and_packed(rig, 1, rig.long_context)


def attention(rig: Rig) -> dict[str, float]:
    """One layer's attention: everything, a sixteenth of the pages, and the same with choosing them. And everything on
    the CUDA cores, which is what groups that small do not run on unless it is faster."""
    page_size = rig.layout.page_size
    few = max(2, rig.context // page_size // 16)
    sparse = rig.rows(rig.batch, rig.context, _quest(few * page_size), rig.context)
    assert sparse.reading is not None
    sparse = replace(sparse, reading=replace(sparse.reading, num_pages=few, num_dense_layers=0))
    choosing_s = attention_seconds(rig, sparse)
    dense = replace(sparse, reading=None, summaries=None)
    dense_s, cuda_cores_s = (
        attention_seconds(rig, dense),
        attention_seconds(rig, dense, rig.make_backend(GROUPS_ON_CUDA_CORES)),
    )
    few_s = attention_seconds(rig, rig.rows(rig.batch, few * page_size - 1))
    return {
        "dense_ms": 1e3 * dense_s,
        "dense_on_cuda_cores_ms": 1e3 * cuda_cores_s,
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
    replayed_s, eager_s = step_seconds(rig, rows, context), step_seconds(rig, rows, context, graphed=False)
    return {"replayed_ms": 1e3 * replayed_s, "eager_ms": 1e3 * eager_s, "speedup": eager_s / replayed_s}


def profile(rig: Rig) -> dict[str, float]:
    """Where the time of a step goes: its kernels, how long they run together, and a table of those that take most."""
    pack, found = rig.rocketkv(rig.context), {}
    packed_tokens = base_budget(pack, rig.context)
    for name, tokens, how in (("full", rig.context, None), ("packed", packed_tokens, pack)):
        rows = rig.rows(rig.batch, tokens, how, rig.context if how else 0)
        step = make_step(make_runner(rig, rows, graphed=True), rows, rig.context)
        found |= {f"{name}_{what}": value for what, value in _profiled(step, name).items()}
    return found


def _profiled(step: Callable[[], object], name: str) -> dict[str, float]:
    step()
    with torch.profiler.profile() as profiler:
        step()
    kernels = [event for event in profiler.events() or () if event.device_type is DeviceType.CUDA]
    table = profiler.key_averages().table(sort_by="self_device_time_total", row_limit=20, max_name_column_width=90)
    print(f"{name}:\n{table}", flush=True)
    return {"kernels": float(len(kernels)), "busy_ms": sum(event.self_device_time_total for event in kernels) / 1e3}


def concurrency(rig: Rig) -> dict[str, float]:
    """Requests that the decode worker's own admission lets in."""
    spec = rig.spec
    pool = KVPool.of_size(
        spec, memory_bytes=rig.kv_bytes, page_size=rig.layout.page_size, dtype=rig.layout.dtype, device=rig.device
    )
    counts = {
        name: _num_admitted(spec, pool, rig.context, pack)
        for name, pack in (("full", PackSpec()), ("packed", PackSpec("snapkv", ratio=0.125)))
    }
    return {**counts, "times": counts["packed"] / counts["full"]}


def link(rig: Rig) -> dict[str, float]:
    """What a prefill worker does with every layer: an eighth of it packed out of the pool and brought to pinned memory,
    beside the packing of the next. Against plain copies of as many bytes."""
    spec, page_size, dtype = rig.spec, rig.layout.page_size, rig.layout.dtype
    num_blocks = rig.context // page_size
    pool = KVPool(spec, num_blocks=num_blocks, page_size=page_size, dtype=dtype, device=rig.device)
    chosen = Selection((torch.arange(0, rig.context, 8, device=rig.device),) * spec.num_kv_heads, retained_mass=1.0)
    packer, blocks = TorchPacker(pool), torch.arange(num_blocks, device=rig.device)
    staging = Staging(CudaCopier(pool.device)) if pool.device.type == "cuda" else None
    packed, layers = packer.pack(0, blocks, chosen), range(spec.num_layers)
    target = torch.empty(packed.pages.shape, dtype=dtype, pin_memory=staging is not None)

    def copy(pages: Tensor) -> None:
        target.copy_(pages, non_blocking=True)

    def ship() -> None:
        pages = (packer.pack(layer, blocks, chosen).pages for layer in layers)
        if staging is None:
            for layer_pages in pages:
                copy(layer_pages)
            return
        payloads = (layer_pages.flatten().view(torch.uint8) for layer_pages in pages)
        arriving = [staging.frames(Unread(), layer, packed.lengths, payload) for layer, payload in enumerate(payloads)]
        for frames in arriving:
            for pending in frames:
                pending.result()

    ship_s = rig.median_s(ship)
    copy_s = rig.median_s(lambda: [copy(packed.pages) for _ in layers])
    if staging is not None:
        staging.close()
    gigabytes = spec.num_layers * packed.pages.nbytes / 1e9
    return {"link_gbs": gigabytes / copy_s, "packed_gbs": gigabytes / ship_s, "share_of_link": copy_s / ship_s}


class Unread:
    """A sender whose layers nobody reads."""

    device = CPU

    def frames(self, layer: int, lengths: tuple[int, ...], payload: Tensor) -> Iterator[Any]:
        return iter(())

    def release(self) -> None:
        pass


FIGURES = {
    figure.__name__: figure
    for figure in (
        *(step_full, step_packed, step_long, attention, selection),
        *(graphs, profile, concurrency, link, receiving),
    )
}


def _full_and_packed(rig: Rig, batch: int, context: int) -> dict[str, float]:
    pack = rig.rocketkv(context)
    packed_tokens = base_budget(pack, context)
    packed_s = step_seconds(rig, rig.rows(batch, packed_tokens, pack, context), context)
    full_s = full_step_seconds(rig, batch, context)
    return {
        "full_ms": 1e3 * full_s,
        "packed_ms": 1e3 * packed_s,
        "speedup": full_s / packed_s,
        "stored_tokens": packed_tokens,
    }


def _read_weight_bytes(rig: Rig) -> int:
    """Of the embedding a step reads a few rows, unless it is the head as well."""
    config = rig.read_config()
    table_bytes = rig.spec.vocab_size * int(config["hidden_size"]) * rig.layout.dtype.itemsize
    return weight_bytes(rig.model) - (0 if config.get("tie_word_embeddings") else table_bytes)


def _stream_gbs(rig: Rig) -> dict[str, float]:
    """What the device's memory gives, by the way it is asked; a copy's is counted both ways."""
    stream = Stream(torch.get_num_threads(), rig.stream_bytes, rig.device)
    seconds = {name: [take() for _ in range(rig.num_rounds)] for name, take in stream.subjects().items()}
    return {name.removeprefix("stream/"): stream.num_bytes / 1e9 / median(each) for name, each in seconds.items()}


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


def _quest(num_tokens: int) -> PackSpec:
    return resolve({"recipe": "quest", "budget": num_tokens}, default_recipe="quest", default_budget=None)


def main(names: Sequence[str]) -> int:
    """Ends with the first that fails: after an error of the device nothing in this process is to be trusted."""
    rig = Rig()
    for name in names:
        print(json.dumps({"figure": name, **FIGURES[name](rig)}), flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
