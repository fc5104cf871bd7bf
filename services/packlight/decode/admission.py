"""What a request may need of the decode pool, and whether it can be had. Pure arithmetic on head pages.

Admission reserves the recipe's bound for the prompt and every token the answer may get. So a running request never runs
out of pages, and nothing is preempted. A mass floor may ask for more than the bound, and budgets that depend on scores
mostly need less; what is true is known when the layers arrive, and the reservation follows. It grows at once or not at
all: nobody waits while holding, so two requests can never wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence

from packlight.compress.budget import max_pages, max_pages_by_layer
from packlight.compress.evict import capacity
from packlight.compress.layout import total_pages
from packlight.compress.recipes import find_recipe
from packlight.core.errors import QueueFull, RequestNeverFits
from packlight.core.types import GenerateRequest, ModelSpec

RETRY_AFTER_S = 1.0


class Needs:
    """Head pages that one request comes to hold by the end of its answer: at most, and once lengths are known.

    Resumed tokens arrive with the prompt; new ones are stored by decode. `capacity`: see `compress/evict.py`; None if
    the request does not evict. With several shards of the KV heads every one counts as the fullest: what is free in
    all of them together is then free in each."""

    def __init__(self, request: GenerateRequest, spec: ModelSpec, page_size: int, *, num_shards: int = 1) -> None:
        self._pack, self._spec, self._page_size, self._num_shards = request.pack, spec, page_size, num_shards
        self._windows = spec.sliding_windows or (None,) * spec.num_layers
        self._num_prompt, self._max_tokens = request.num_prompt_tokens, request.stop.max_tokens
        self._num_resumed = len(request.token_ids) - request.num_prompt_tokens
        self.capacity = capacity(request.pack, request.num_prompt_tokens, request.stop.max_tokens)

    def bound(self) -> int:
        """Of all layers, before anything is computed. What a mass floor adds is not in here."""
        if self.capacity is None:
            most = max_pages(self._pack, self._spec, self._num_prompt, self._page_size, num_new_tokens=self._max_tokens)
            recipe = find_recipe(self._pack.recipe)
            # Where heads compete all may go to one shard's; else the bound is the same for each head.
            return most * self._num_shards if recipe.divides_heads or recipe.divides_layers else most
        most = max(self._num_resumed, min(self._max_tokens, self.capacity - self._num_prompt))
        evicting, growing = self._pages_by_layer(most), self._pages_by_layer(self._max_tokens)
        pairs = zip(self._windows, evicting, growing, strict=True)
        return sum(evicts if window is None else grows for window, evicts, grows in pairs)

    def evicts(self, layer: int) -> bool:
        """Whether heads of the layer stop growing at `capacity`."""
        return self.capacity is not None and self._windows[layer] is None

    def layer(self, layer: int, lengths: Sequence[int]) -> int:
        """Of a layer whose heads arrived with `lengths` tokens."""
        num_new = self._max_tokens - self._num_resumed
        ends = [length + num_new for length in lengths]
        if self.capacity is not None and self.evicts(layer):
            ends = [max(length, min(end, self.capacity)) for length, end in zip(lengths, ends, strict=True)]
        size = len(ends) // self._num_shards
        shards = [ends[start : start + size] for start in range(0, len(ends), size)]
        return self._num_shards * max(total_pages(shard, self._page_size) for shard in shards)

    def _pages_by_layer(self, num_new_tokens: int) -> list[int]:
        return max_pages_by_layer(
            self._pack, self._spec, self._num_prompt, self._page_size, num_new_tokens=num_new_tokens
        )


class Reservations:
    """Head pages promised to admitted requests. Not thread-safe: one owner calls it."""

    def __init__(self, num_total: int) -> None:
        self.num_total, self.num_reserved = num_total, 0

    @property
    def num_free(self) -> int:
        return self.num_total - self.num_reserved


class Reservation:
    """What one request was promised, of `pool`: a bound, until it is known what the request takes.

    closed ──open──▶ bound ──arrive (each layer)──▶ bound or more ──settle──▶ what arrived ──close──▶ closed"""

    def __init__(self, pool: Reservations, bound: int) -> None:
        """Raises RequestNeverFits if the pool could not hold the request even when empty."""
        self._pool, self._bound = pool, bound
        self.num_pages = self._num_arrived = 0
        self._check_fits(bound)

    def open(self) -> bool:
        """Take the bound, if that much is free."""
        assert self.num_pages == 0, "opened twice"
        if self._bound > self._pool.num_free:
            return False
        self._hold(self._bound)
        return True

    def arrive(self, num_pages: int) -> None:
        """A layer takes `num_pages` until the answer ends. Changes nothing when it raises: QueueFull if all that has
        arrived is more than was promised and the difference is not free, RequestNeverFits if it never can be."""
        num_arrived = self._num_arrived + num_pages
        self._check_fits(num_arrived)
        if num_arrived - self.num_pages > self._pool.num_free:
            raise QueueFull(
                f"what kv.floor asks for takes {num_arrived} KV head pages so far, {self.num_pages} are reserved and "
                f"{self._pool.num_free} of {self._pool.num_total} are free: try again later, or lower kv.floor",
                retry_after_s=RETRY_AFTER_S,
            )
        self._num_arrived = num_arrived
        self._hold(max(self.num_pages, num_arrived))

    def settle(self) -> None:
        """Every layer is there: give back what was promised and is not needed."""
        self._hold(self._num_arrived)

    def close(self) -> None:
        """Give everything back. Idempotent."""
        self._hold(0)

    def _check_fits(self, num_pages: int) -> None:
        if num_pages > self._pool.num_total:
            raise RequestNeverFits(
                f"the request may need {num_pages} KV head pages, the decode pool has {self._pool.num_total}: lower "
                "max_tokens, choose a smaller kv.budget or kv.floor, or raise decode.kv_memory_bytes"
            )

    def _hold(self, num_pages: int) -> None:
        self._pool.num_reserved += num_pages - self.num_pages
        self.num_pages = num_pages
