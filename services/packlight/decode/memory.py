"""The packed KV of a decode worker: what each admitted request holds, with one way in and one way out.

Knows pages, rows and reservations, and what belongs to pages: summaries for rows that are read sparsely, attention mass
for rows that evict. Does not know queues, events, shipments or the network.

A `Holding` is planned when the request comes, opened when it is admitted, filled layer by layer, settled when its last
layer is there, grown by every step, and closed at its end, wherever it is by then.

Legend: X head pages of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from packlight.compress.evict import Arrived, HeavyHitters
from packlight.compress.readers.shared import Readers
from packlight.core.errors import InternalError, InvalidRequest
from packlight.core.types import GenerateRequest, ModelSpec, PackSpec
from packlight.decode.admission import Needs, Reservation, Reservations
from packlight.decode.uploads import Uploads
from packlight.kv.pool import PackedPool
from packlight.kv.reading import MIN_PAGES, Reading
from packlight.kv.shards import SummarisedPool, open_book
from packlight.kv.side_stream import Done, moved
from packlight.kv.summaries import PageSummaries, SummaryWriter
from packlight.kv.table import HeadPageTable


@dataclass(slots=True, eq=False)
class Holding:
    """One request's share. `row` of the table is its own from `open` to `close`; `reading` None is dense; `hitters`
    are there once all layers are, if the request evicts. Its pages are filled when `filled` is done, or None."""

    pack: PackSpec
    needs: Needs
    reservation: Reservation
    reading: Reading | None
    row: int = -1
    arrived: list[Arrived] = field(default_factory=list)
    hitters: HeavyHitters | None = None
    filled: Done | None = None


class DecodeMemory:
    """The holdings of one worker, in the pages of `pool`. Not thread-safe: one owner calls it, between steps or, for
    holdings that are in no step, during one. `uploads` fill pages beside steps; without them, pages are filled at once.
    """

    def __init__(self, spec: ModelSpec, pool: PackedPool, *, num_rows: int) -> None:
        self.spec, self.pool, self.uploads = spec, pool, Uploads.into(pool)
        self.book = open_book(pool.num_head_pages, num_shards=pool.num_shards, num_kv_heads=pool.num_kv_heads)
        self.reservations = Reservations(pool.num_head_pages)
        self.table = HeadPageTable(
            self.book,
            num_rows=num_rows,
            num_layers=pool.num_layers,
            num_kv_heads=pool.num_kv_heads,
            page_size=pool.page_size,
        )
        num_summaries = 0 if isinstance(pool, SummarisedPool) else pool.num_head_pages
        self.summaries = PageSummaries(num_summaries, pool.head_dim, pool.dtype, str(pool.device))
        self._summary_writer: SummaryWriter = pool.summaries if isinstance(pool, SummarisedPool) else self.summaries
        self._readers = Readers(page_size=pool.page_size, head_dim=pool.head_dim, num_rows=num_rows)

    def plan(self, request: GenerateRequest) -> Holding:
        """Holds nothing yet. Raises RequestNeverFits, InvalidRequest."""
        needs = Needs(request, self.spec, self.pool.page_size, num_shards=self.pool.num_shards)
        reservation = Reservation(self.reservations, needs.bound())
        reading = self._readers.reading_of(request.pack, request.num_prompt_tokens)
        if self.pool.num_shards > 1 and needs.capacity is not None:
            raise InvalidRequest(
                f"recipe {request.pack.recipe!r} evicts while it decodes, which decode.tensor_parallel="
                f"{self.pool.num_shards} cannot: choose another recipe, such as snapkv",
                param="kv.recipe",
            )
        return Holding(request.pack, needs, reservation, reading)

    def readings(self, recipes: Iterable[str], num_tokens: int) -> list[Reading]:
        """How rows packed by `recipes` are read, each head `num_tokens` at most. Recipes that read everything, or
        nothing beyond what the model can hold, have none."""
        found = (self._readers.reading_of(PackSpec(name, num_tokens), self.spec.max_context) for name in recipes)
        num_pages = max(MIN_PAGES, num_tokens // self.pool.page_size)
        return [replace(reading, num_pages=num_pages) for reading in found if reading is not None]

    def open(self, holding: Holding) -> bool:
        """Take a row and the reservation, if both are free."""
        if not self.table.num_free_rows or not holding.reservation.open():
            return False
        holding.row = self.table.open()
        return True

    def claim(self, holding: Holding, layer: int, lengths: Sequence[int]) -> Tensor:
        """Pages for a layer whose heads hold `lengths` tokens, head by head, to be filled: int64 [X] on the host.
        Raises QueueFull or RequestNeverFits when that is more than was reserved, and more than is free."""
        holding.reservation.arrive(holding.needs.layer(layer, lengths))
        return torch.from_numpy(self.table.fill_layer(holding.row, layer, list(lengths))).long()

    def fill(self, holding: Holding, payload: Tensor, store: Callable[[Tensor], object]) -> None:
        """`store` the bytes of `payload` in pages that were claimed: now, or beside steps."""
        if self.uploads is None:
            store(payload)
        else:
            holding.filled = self.uploads.start(payload, store)

    def summaries_for(self, holding: Holding) -> SummaryWriter | None:
        """Where the pages of the holding are to be summarised; None if nobody will ask."""
        return self._summary_writer if holding.reading is not None else None

    @property
    def in_the_way(self) -> Done | None:
        """What must be done before more layers are taken in; None if there is room for them."""
        return None if self.uploads is None else self.uploads.in_the_way

    def remember(self, holding: Holding, layer: int, lengths: Sequence[int], mass: Tensor) -> None:
        """The attention mass that the prompt gave to the layer's tokens, fp32, head by head."""
        if holding.needs.evicts(layer):
            holding.arrived.append(Arrived(layer, lengths, moved(mass, self.pool.device)))

    def settle(self, holding: Holding) -> None:
        """All layers have arrived, and are in their pages."""
        holding.reservation.settle()
        if self.uploads is not None:
            self.uploads.forget_done()
        holding.filled = None
        if holding.arrived:
            cap = holding.needs.capacity
            assert cap is not None, "mass was remembered for a request that does not evict"
            holding.hitters = HeavyHitters(holding.pack, holding.arrived, capacity=cap, num_layers=self.spec.num_layers)
            holding.arrived = []

    def grow(self, holdings: Iterable[Holding]) -> None:
        """Make room for one more token of each: a slot of its own, or that of the token it evicts."""
        rows = []
        for holding in holdings:
            rows.append(holding.row)
            if holding.hitters is not None:
                self.table.overwrite[holding.row] = holding.hitters.place_next().cpu().numpy()
        self.table.grow(rows)

    def advance(self, holdings: Iterable[Holding]) -> None:
        """One token of each was stored."""
        self.table.advance([holding.row for holding in holdings])

    def close(self, holding: Holding) -> None:
        """Release everything, at once, even if it is still being filled."""
        if self.uploads is not None and holding.filled is not None:
            self.uploads.abandon(holding.filled)
        self.pool.release(self.table.held(holding.row))
        self.table.close(holding.row)
        if self.uploads is not None:
            self.uploads.freed()
        self._readers.forget(holding.row)
        holding.reservation.close()
        holding.reading = holding.hitters = holding.filled = None
        holding.arrived = []

    def check_idle(self) -> None:
        """Raise InternalError unless everything is free. Counters only: `check` takes time that grows with the pool."""
        num_held, num_reserved = self.book.num_held, self.reservations.num_reserved
        if num_held or num_reserved:
            raise InternalError(f"no request is here, yet {num_held} pages are held and {num_reserved} reserved")

    def check(self, holdings: Sequence[Holding]) -> None:
        """Raise InternalError unless the books balance when `holdings` are all that are open."""
        self.book.check([self.table.held(holding.row) for holding in holdings])
        num_promised = sum(holding.reservation.num_pages for holding in holdings)
        if self.reservations.num_reserved != num_promised:
            raise InternalError(f"{self.reservations.num_reserved} pages are reserved, {num_promised} were promised")
        for holding in holdings:
            num_held, num_reserved = self.table.num_pages(holding.row), holding.reservation.num_pages
            if num_held > num_reserved:
                raise InternalError(f"row {holding.row} holds {num_held} pages, {num_reserved} are reserved for it")
