"""The largest value of a server's Prometheus gauge while a turn lasts.

Knows the text format just enough to find one sample by its name and labels: parsing a whole page several times a second
would take a share of the cores that are measured. Polling still costs the server a rendering each time, so memory is
best watched in a run of its own.
"""

from __future__ import annotations

import asyncio
import re
from types import TracebackType

import httpx

DECODE_PAGES = 'packlight_decode_pages{state="held"}'


class PeakGauge:
    """Polls inside `async with`, at its beginning and its end too. `peak` is None if the gauge was never seen."""

    def __init__(self, url: str, sample: str, http: httpx.AsyncClient, period_s: float = 0.2) -> None:
        self._url, self._http, self._period_s = url, http, period_s
        self._line = re.compile(rf"^{re.escape(sample)} (\S+)", re.MULTILINE)
        self.peak: float | None = None

    async def __aenter__(self) -> PeakGauge:
        await self._poll()
        self._task = asyncio.create_task(self._keep_polling())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._poll()

    async def _keep_polling(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            await self._poll()

    async def _poll(self) -> None:
        """A page that does not come is no reason to end a benchmark: the next one may."""
        try:
            reply = await self._http.get(self._url)
        except httpx.HTTPError:
            return
        if match := self._line.search(reply.text):
            self.peak = max(float(match[1]), self.peak or 0.0)
