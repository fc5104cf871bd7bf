"""Fetching the KV of one request: calling the prefill worker and taking its shipment in, event by event.

Knows the call and its silence limit, and waits for pages that are filled beside steps. Leaves the checks to `intake.py`
and what an event means for the request to `worker.py`. Ending the iterator ends the call, which frees everything on the
prefill worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

from packlight.core.config import DecodeConfig
from packlight.core.errors import (
    CapacityError,
    InternalError,
    PacklightError,
    RequestError,
    ShipmentCorrupt,
    WorkerLost,
)
from packlight.core.shipping import Accepted, FirstToken, PrefillClient, PrefillEvent, Shipped, Waiting
from packlight.core.types import GenerateRequest, PrefillRequest
from packlight.decode.intake import Intake
from packlight.decode.memory import DecodeMemory
from packlight.decode.task import Task
from packlight.kv.side_stream import Done
from packlight.transfer.base import Site
from packlight.transfer.registry import build_transport

PrefillClients = Callable[[str, str], PrefillClient]
"""(worker id, address) -> client."""


class Fetcher:
    """Fetches into holdings of `memory`."""

    def __init__(
        self, config: DecodeConfig, memory: DecodeMemory, compatibility: str, clients: PrefillClients, site: Site
    ) -> None:
        self._config, self._memory = config, memory
        self._compatibility, self._clients = compatibility, clients
        self._transports = {name: build_transport(name, site) for name in config.transports}

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()

    async def fetch(self, task: Task) -> AsyncGenerator[Accepted | FirstToken | Shipped, None]:
        """The events the worker cares about; layers are stored as they pass. `Shipped` comes last and only when every
        layer is in its pages. Raises what the prefill worker raised (`worker_id` names it), WorkerLost on silence,
        InternalError if the device does not take a layer, or what `Intake` raised."""
        request = task.request
        client = self._clients(request.prefill_id, request.prefill_address)
        intake = self._intake(task)
        try:
            async with aclosing(client.prefill(self._prefill_request(request, intake.wishes))) as events:
                while (event := await self._next(events, request.prefill_id)) is not None:
                    match event:
                        case Waiting():
                            pass
                        case Accepted():
                            task.transport = intake.accept(event)
                            yield event
                        case FirstToken():
                            intake.begin(event)
                            yield event
                        case Shipped():
                            intake.finish(event)
                            await _ended(task.holding.filled)
                            yield event
                            return
                        case _:
                            intake.take(event)
                            task.received_bytes = intake.num_bytes
                            await _ended(self._memory.in_the_way)
        except (CapacityError, RequestError):
            intake.refused()
            raise
        finally:
            intake.release()
        raise ShipmentCorrupt("the prefill stream ended without saying so")

    async def _next(self, events: AsyncIterator[PrefillEvent], worker_id: str) -> PrefillEvent | None:
        try:
            async with asyncio.timeout(self._config.prefill_timeout_s):
                return await anext(events, None)
        except PacklightError as error:
            error.worker_id = error.worker_id or worker_id
            raise
        except TimeoutError:
            silence = f"prefill worker {worker_id} was silent for {self._config.prefill_timeout_s:.0f} s"
            raise WorkerLost(silence, worker_id=worker_id) from None

    def _intake(self, task: Task) -> Intake:
        return Intake(
            self._memory,
            task.holding,
            compatibility=self._compatibility,
            transports=self._transports,
            pool_codec=self._config.kv_codec,
            max_tokens=len(task.request.token_ids),
        )

    def _prefill_request(self, request: GenerateRequest, transports: tuple[str, ...]) -> PrefillRequest:
        num_resumed = len(request.token_ids) - request.num_prompt_tokens
        return PrefillRequest(
            request_id=request.request_id,
            token_ids=request.token_ids,
            num_prompt_tokens=request.num_prompt_tokens,
            sampling=request.sampling,
            pack=request.pack,
            cache_salt=request.cache_salt,
            transports=transports,
            banned_token_ids=request.stop.banned(num_resumed),
            deadline_s=request.deadline_s,
            explain=request.explain,
            trace=request.trace,
        )


async def _ended(copy: Done | None) -> None:
    """Waits on a thread: an event of a device has nobody to call. A caller that is cancelled does not stop the copy."""
    try:
        if copy is not None and not copy.query():
            await asyncio.to_thread(copy.synchronize)
    except RuntimeError as error:
        raise InternalError(f"arrived KV could not be copied to the device: {error}") from error
