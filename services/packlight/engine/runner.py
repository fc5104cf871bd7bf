"""Running a model over pages: from plain lists of tokens and pages to logits.

Knows the model, its pool and the attention backend. Does not know requests, queues, the network, or how tokens are
sampled. Called on the compute thread; one call is one step.

Legend: T tokens of the step, R rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from packlight.attention.base import AttentionBackend, DecodeBatch, LayerHook, PrefillBatch, PrefillChunk
from packlight.attention.cpu import CpuAttention
from packlight.attention.upload import upload
from packlight.compress.device_window import DeviceWindow, has_kernel
from packlight.compress.packers import NativePacker, Packer, TorchPacker
from packlight.compress.paged_window import DTYPES, PagedWindow
from packlight.compress.window import StoredWindow
from packlight.kv.pages import PageIds
from packlight.kv.pool import ExactPool, KVPool, PackedPool
from packlight.kv.reading import Reading
from packlight.kv.summaries import PageSummaries
from packlight.kv.table import HeadPageTable
from packlight.models.base import LanguageModel
from packlight.native.library import Library


@dataclass(frozen=True, slots=True)
class ChunkWork:
    """Tokens `start : start + len(token_ids)` of one prompt; `blocks` reach to the end of the chunk at least."""

    token_ids: Sequence[int]
    start: int
    blocks: PageIds
    wants_logits: bool


@contextmanager
def computing(device: torch.device) -> Iterator[None]:
    """Without gradients, and on `device`, which is chosen thread by thread."""
    with torch.inference_mode(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


class DecodeRunner:
    """One model over one pool of packed KV. Runners may share a model: it keeps no state between calls."""

    def __init__(self, model: LanguageModel, pool: PackedPool, backend: AttentionBackend) -> None:
        self.model, self.pool, self.backend = model, pool, backend

    def decode(
        self,
        table: HeadPageTable,
        rows: Sequence[int],
        token_ids: Sequence[int],
        positions: Sequence[int],
        *,
        reads: Sequence[Reading | None] = (),
        summaries: PageSummaries | None = None,
        on_layer: LayerHook | None = None,
    ) -> Tensor:
        """Store one token per row (room was made by `table.grow`) and return the logits `[R, V]` of all rows.

        `reads` has one entry per row; for it, `summaries` and `on_layer` see `DecodeBatch`."""
        batch = DecodeBatch(self.pool, table, tuple(rows), tuple(reads), summaries, on_layer)
        every_row_R = torch.arange(len(rows), device=self.pool.device)
        with computing(self.pool.device):
            return self.model.forward(self._ids(token_ids), self._ids(positions), self.backend.plan(batch), every_row_R)

    def _ids(self, values: Sequence[int] | PageIds) -> Tensor:
        return upload(np.asarray(values, dtype=np.int64), self.pool.device)


class PrefillRunner(Protocol):
    """What a prefill worker needs: a `Runner`, or what is one in several processes. `window`: who replays the
    window's attention over the pool; None: whoever selects. `packer`: who packs out of it."""

    @property
    def model(self) -> LanguageModel: ...
    @property
    def pool(self) -> ExactPool: ...
    @property
    def window(self) -> StoredWindow | None: ...
    @property
    def packer(self) -> Packer: ...

    def prefill(self, works: Sequence[ChunkWork], on_layer: LayerHook | None = None) -> Tensor:
        """See `Runner.prefill`. The pool may be read from `on_layer`."""
        ...


def _window_of(pool: KVPool, library: Library | None) -> StoredWindow | None:
    if has_kernel(pool.device):
        return DeviceWindow(pool)
    return PagedWindow(pool, library) if library is not None and pool.dtype in DTYPES else None


class Runner(DecodeRunner):
    """One model over one pool of whole blocks, which holds exact KV as well."""

    pool: KVPool

    def __init__(self, model: LanguageModel, pool: KVPool, backend: AttentionBackend) -> None:
        super().__init__(model, pool, backend)
        # Who asks for attention without compiled code gets scores and packing without it.
        library = backend.library if isinstance(backend, CpuAttention) else None
        self.window = _window_of(pool, library)
        self.packer: Packer = NativePacker(pool, library) if library is not None else TorchPacker(pool)

    def prefill(self, works: Sequence[ChunkWork], on_layer: LayerHook | None = None) -> Tensor:
        """Store the KV of all chunks; logits `[R, V]` of the last token of each chunk that wants them, in order."""
        chunks, ends = [], []
        start = 0
        for work in works:
            num_tokens = len(work.token_ids)
            num_blocks = -(-(work.start + num_tokens) // self.pool.page_size)
            chunks.append(PrefillChunk(start, num_tokens, work.start, self._ids(work.blocks[:num_blocks])))
            start += num_tokens
            if work.wants_logits:
                ends.append(start - 1)
        batch = PrefillBatch(self.pool, tuple(chunks), on_layer)
        tokens_T = self._ids([token for work in works for token in work.token_ids])
        device = self.pool.device
        positions_T = torch.cat([torch.arange(w.start, w.start + len(w.token_ids), device=device) for w in works])
        with computing(self.pool.device):
            return self.model.forward(tokens_T, positions_T, self.backend.plan(batch), self._ids(ends))
