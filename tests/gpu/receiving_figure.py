"""The figure `receiving`: packed KV goes from the host's memory into pages while steps run.

What arrives is an eighth of the context, layer by layer, as a decode worker takes it in. `slowdown` is by how much
longer a packed step takes meanwhile: they share the device's memory, and Python's lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from packlight.bench.timing import slices_of
from packlight.compress.budget import base_budget
from packlight.decode.unpack import Unpacker
from packlight.decode.uploads import Uploads
from packlight.kv.pool import KVPool
from packlight.kv.side_stream import Done
from tests.gpu.rig import Rig
from tests.gpu.steps import make_runner, make_step


def receiving(rig: Rig) -> dict[str, float]:
    """Gigabytes per second of the plain copy from pinned memory, of arriving alone, and beside steps."""
    arrival, step = Arrival(rig), packed_step(rig)
    copy_s, alone_s = rig.median_s(arrival.copy), rig.median_s(arrival.take_in)
    take = slices_of(step, rig.slice_s)  # a step ends on the host: it waits for its tokens, and for nothing else
    step_s = median([take() for _ in range(rig.num_rounds)])
    with Repeated(arrival.take_in) as beside:
        step_beside_s = median([take() for _ in range(rig.num_rounds)])
    gigabytes = arrival.num_bytes / 1e9
    return {
        "link_gbs": gigabytes / copy_s,
        "alone_gbs": gigabytes / alone_s,
        "beside_gbs": gigabytes / beside.mean_s,
        "share_of_link": copy_s / beside.mean_s,
        "step_ms": 1e3 * step_s,
        "step_beside_ms": 1e3 * step_beside_s,
        "slowdown": step_beside_s / step_s - 1,
    }


def packed_step(rig: Rig) -> Callable[[], object]:
    pack = rig.rocketkv(rig.context)
    rows = rig.rows(rig.batch, base_budget(pack, rig.context), pack, rig.context)
    return make_step(make_runner(rig, rows, graphed=True), rows, rig.context)


class Arrival:
    """One shipment, into a pool of its own, from memory that is not pinned: as gRPC and `shm` bring it."""

    def __init__(self, rig: Rig) -> None:
        spec, page_size = rig.spec, rig.layout.page_size
        num_blocks = max(1, rig.context // 8 // page_size)
        self._pool = KVPool(spec, num_blocks=num_blocks, page_size=page_size, dtype=rig.layout.dtype, device=rig.device)
        self._lengths = [num_blocks * page_size] * spec.num_kv_heads
        self._pages_LX = torch.arange(self._pool.num_head_pages).view(spec.num_layers, -1)
        self._unpacker = Unpacker(self._pool, "native", pool_codec="native")
        self._uploads = Uploads.into(self._pool)
        self._payload = torch.ones(self._unpacker.payload_bytes(self._lengths), dtype=torch.uint8)
        self._source = self._payload.pin_memory() if self._uploads else self._payload
        self._target = torch.empty_like(self._payload, device=rig.device)
        self.num_bytes = spec.num_layers * self._payload.numel()

    def copy(self) -> None:
        """As many bytes, from pinned memory to the device, and nothing else."""
        for _ in self._pages_LX:
            self._target.copy_(self._source, non_blocking=True)

    def take_in(self) -> None:
        """Until all of it is in its pages."""
        done: Done | None = None
        for pages_X in self._pages_LX:
            done = self._begin(partial(self._unpacker.store, pages_X, self._lengths, summaries=None))
        if done is not None:
            done.synchronize()

    def _begin(self, store: Callable[[Tensor], object]) -> Done | None:
        if self._uploads is None:
            store(self._payload)
            return None
        done = self._uploads.start(self._payload, store)
        if (first := self._uploads.in_the_way) is not None:
            first.synchronize()
        return done


class Repeated:
    """Calls a function on a thread of its own, one time after another, while it is entered."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function, self._is_over = function, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.mean_s = float("nan")

    def __enter__(self) -> Repeated:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        started, num_calls = time.perf_counter(), 0
        while not (num_calls and self._is_over.is_set()):
            self._function()
            num_calls += 1
        self.mean_s = (time.perf_counter() - started) / num_calls
