"""Opening a shipment: which transport and codec carry it, and the manifest that announces it.

Knows the worker's identity on the wire. Does not know what is selected (`shipper.py`) or when (`worker.py`).
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from packlight.attention.upload import upload
from packlight.compress.accumulate import AccumulatedMass
from packlight.compress.base import Codec
from packlight.compress.kept_counts import KeptCounts
from packlight.compress.parts import CODECS
from packlight.compress.recipes import codec_of
from packlight.compress.select import Selector
from packlight.core.errors import QueueFull
from packlight.core.shipping import Accepted, Manifest, compatibility_hash
from packlight.engine.runner import PrefillRunner
from packlight.prefill.shipper import Shipment
from packlight.prefill.staging import CudaCopier, Staging
from packlight.prefill.stopwatch import stopwatch
from packlight.prefill.task import Task
from packlight.transfer.base import KVSender, Site
from packlight.transfer.registry import TRANSPORTS, build_transport, connect
from packlight.wire.manifest import encode_manifest


class Dispatch:
    """Makes the shipments of one worker. Transports are built once, codecs on first use."""

    def __init__(self, runner: PrefillRunner, site: Site) -> None:
        self._spec, self._pool = spec, pool = runner.model.spec, runner.pool
        self.window, self.packer = runner.window, runner.packer
        self.staging = Staging(CudaCopier(pool.device)) if pool.device.type == "cuda" else None
        self._transports = {name: build_transport(name, site) for name in TRANSPORTS}
        self._codecs: dict[str, Codec] = {}
        self.compatibility = compatibility_hash(spec, pool.page_size, str(pool.dtype))

    def connect(self, wanted: tuple[str, ...]) -> tuple[str, KVSender]:
        """The best transport of `wanted` that reaches who asks. Raises ShipmentIncompatible if none does."""
        return connect(wanted, self._transports)

    def close(self) -> None:
        if self.staging is not None:
            self.staging.close()
        for transport in self._transports.values():
            transport.close()

    def mass_for(self, task: Task) -> AccumulatedMass | None:
        """What the prompt's queries will look at, if its selection asks. Raises QueueFull if there is no memory for it:
        requests take it from beside the pool."""
        if not task.needs_all_queries:
            return None
        try:
            return AccumulatedMass(self._spec.num_layers, self._spec.num_kv_heads, task.anchor, self._pool.device)
        except (RuntimeError, MemoryError) as error:
            raise QueueFull(
                f"no memory for the attention mass of {task.anchor} tokens ({error}): try again later, or choose a "
                "recipe that needs none, such as snapkv",
                retry_after_s=1.0,
            ) from error

    def open(self, task: Task, start: int, context: int) -> Shipment:
        """The shipment of `task`, whose last chunk is rows `start` on of the step, after `context` stored tokens."""
        assert task.sender is not None, "a task is connected when it is accepted"
        return Shipment(
            pack=task.request.pack,
            anchor=task.anchor,
            num_tokens=task.num_tokens,
            blocks=self.block_ids(task),
            start=start,
            context=context,
            window=task.window,
            sender=task.sender,
            codec=self._codec(codec_of(task.request.pack)),
            outbox=task.outbox,
            selector=Selector(
                task.request.pack,
                num_prompt_tokens=task.anchor,
                num_tokens=task.num_tokens,
                reads_late=self._pool.device.type != "cpu",
            ),
            stopwatch=stopwatch(self._pool.device),
            accumulated=task.accumulated,
            shadow=[] if task.has_shadow else None,
            marks=task.marks,
            kept=KeptCounts(self._spec, task.anchor) if task.request.explain else None,
        )

    def block_ids(self, task: Task) -> Tensor:
        """int64 on the pool's device."""
        return upload(task.blocks.astype(np.int64), self._pool.device)

    def announce(self, task: Task) -> Accepted:
        """The shipment's first event."""
        manifest = Manifest(
            request_id=task.request.request_id,
            transport=task.transport,
            recipe=task.request.pack.recipe,
            codec=codec_of(task.request.pack),
            dtype=self._spec.dtype,
            page_size=self._pool.page_size,
            num_layers=self._spec.num_layers,
            num_kv_heads=self._spec.num_kv_heads,
            head_dim=self._spec.head_dim,
            num_tokens=task.num_tokens,
        )
        return Accepted(self.compatibility, encode_manifest(manifest))

    def _codec(self, name: str) -> Codec:
        if name not in self._codecs:
            self._codecs[name] = CODECS.load(name)()
        return self._codecs[name]
