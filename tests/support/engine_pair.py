"""A prefill and a decode worker around runners that may be of several processes each."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from prometheus_client import CollectorRegistry

from packlight.core.config import Config
from packlight.decode.worker import DecodeWorker
from packlight.engine.compute import Compute
from packlight.engine.engine import Engine
from packlight.prefill.worker import PrefillWorker
from packlight.telemetry.metrics import DecodeMetrics, PrefillMetrics
from tests.support.fake_pair import running, until


@contextlib.asynccontextmanager
async def pair_of_engines(config: Config, prefill_engine: Engine, decode_engine: Engine) -> AsyncIterator[DecodeWorker]:
    """The decode worker. Both compute on one thread, as they must where the two engines are one."""
    compute = Compute()
    prefill = PrefillWorker(
        config.prefill,
        prefill_engine.prefill_runner(config.prefill),
        compute,
        metrics=PrefillMetrics(CollectorRegistry()),
    )
    decode = DecodeWorker(
        config.decode,
        decode_engine.decode_runner(config.decode),
        compute,
        lambda worker_id, address: prefill,
        metrics=DecodeMetrics(CollectorRegistry()),
    )
    try:
        async with running(prefill.run(), decode.run()):
            yield decode
            await until(lambda: prefill.num_unfinished == 0 and decode.num_unfinished == 0)
        prefill.check()
        decode.check()
        assert decode.load().num_free_pages == decode.load().num_total_pages
    finally:
        compute.close()
