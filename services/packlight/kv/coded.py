"""The coded pool: packed KV that lies in memory as records of a codec, and is decoded when it is read.

Knows which head pages are coded and which are open. Does not know how records are made (the codec comes in as an
object) nor who holds which page (`kv/pages.py`).

Legend as in `kv/pool.py`, R bytes of a record, O places for open pages. A head page is in one of three states:

    empty ──append──▶ open ──append of its last token──▶ coded
      ▲  └────────────fill_* (write_*: any page)───────────┘
      └──────────────────────release────────────────────────

Open pages, at most one per running (row, layer, KV head), lie exact in a store of their own: so a token that was just
written is exact until its page is full, and what a codec sees is always a whole page.

On a GPU, pages may be filled on another stream than the one that steps run on. Which places are free is known on the
host, and a place becomes free when the host has waited for whatever read it: no stream needs to wait for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from packlight.core.errors import ConfigError, InternalError
from packlight.core.types import ModelSpec
from packlight.kv.pages import PageIds
from packlight.kv.pool import zeros_on_first_touch
from packlight.kv.side_stream import moved

EMPTY, CODED = -1, -2  # states of a page that has no place in the open store
STATE = torch.int32
# Pages decoded at once: few enough for the intermediate numbers to stay in the CPU's cache.
PAGES_PER_DECODE = 512


class PageCodec(Protocol):
    """Whole head pages <-> records of a fixed size, each readable alone. `encode` may let the pages of a head share
    something; the pool codes every page for itself."""

    def record_bytes(self, page_size: int, head_dim: int, dtype: torch.dtype) -> int: ...

    def encode(self, k_PTD: Tensor, v_PTD: Tensor, pages_per_head: Sequence[int]) -> Tensor: ...

    def decode(self, records: Tensor, page_size: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class IntegerRecords:
    """Records of asymmetric integers of `bits`, K with a range per channel and V with one per token and `value_group`
    channels: the layout of `compress/codecs/kivi.py`, which a kernel may read without the codec."""

    bits: int
    value_group: int


@runtime_checkable
class IntegerCodec(PageCodec, Protocol):
    def integer_records(self, head_dim: int) -> IntegerRecords: ...


class CodedMemory(NamedTuple):
    """The tensors of a coded pool, for kernels that read them. `state_N` is an open page's place, else negative."""

    records_NR: Tensor
    state_N: Tensor
    k_open_OPD: Tensor
    v_open_OPD: Tensor


class CodedPool:
    """A `PackedPool` of `num_blocks x layers x KV heads` head pages as records of `codec`.

    At most `max_open_pages` are open at a time: rows x layers x KV heads suffice. Two threads may call it, never about
    the same page: arriving layers are stored while a step runs."""

    num_shards = 1

    def __init__(
        self,
        spec: ModelSpec,
        codec: PageCodec,
        *,
        num_blocks: int,
        max_open_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: str = "cpu",
    ) -> None:
        self.num_blocks, self.page_size, self.dtype, self.device = num_blocks, page_size, dtype, torch.device(device)
        self.num_layers, self.num_kv_heads, self.head_dim = spec.num_layers, spec.num_kv_heads, spec.head_dim
        self._codec = codec
        record_bytes = codec.record_bytes(page_size, self.head_dim, dtype)
        self._records_NR = zeros_on_first_touch((self.num_head_pages, record_bytes), torch.uint8, device)
        open_shape = (max_open_pages, page_size, self.head_dim)
        self._k_open = zeros_on_first_touch(open_shape, dtype, device)
        self._v_open = zeros_on_first_touch(open_shape, dtype, device)
        # Of each page: its place in the open store, or EMPTY or CODED.
        self._state_N = torch.full((self.num_head_pages,), EMPTY, dtype=STATE, device=device)
        self._free_places = torch.arange(max_open_pages, dtype=torch.int64)
        self._num_free = max_open_pages
        self._places_lock = Lock()

    @classmethod
    def of_size(
        cls,
        spec: ModelSpec,
        codec: PageCodec,
        *,
        memory_bytes: int,
        max_open_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: str = "cpu",
    ) -> CodedPool:
        """As many blocks as fit into `memory_bytes` beside the open pages. Raises ConfigError if not even one does."""
        per_page = codec.record_bytes(page_size, spec.head_dim, dtype) + STATE.itemsize
        per_block = spec.num_layers * spec.num_kv_heads * per_page
        open_bytes = max_open_pages * _open_bytes(page_size, spec.head_dim, dtype)
        if memory_bytes < open_bytes + per_block:
            raise ConfigError(
                f"kv_memory_bytes: one block of {page_size} tokens needs {per_block} and {max_open_pages} open pages "
                f"need {open_bytes}, got {memory_bytes}: raise it, or let fewer requests run at once"
            )
        num_blocks = (memory_bytes - open_bytes) // per_block
        return cls(
            spec,
            codec,
            num_blocks=num_blocks,
            max_open_pages=max_open_pages,
            page_size=page_size,
            dtype=dtype,
            device=device,
        )

    @property
    def memory(self) -> CodedMemory:
        return CodedMemory(self._records_NR, self._state_N, self._k_open, self._v_open)

    @property
    def integer_records(self) -> IntegerRecords | None:
        """How records are laid out, if they are integers."""
        return self._codec.integer_records(self.head_dim) if isinstance(self._codec, IntegerCodec) else None

    @property
    def num_head_pages(self) -> int:
        return self.num_blocks * self.num_layers * self.num_kv_heads

    @property
    def head_page_bytes(self) -> int:
        """Of K and V together, coded."""
        return self._records_NR.shape[1]

    @property
    def num_open_pages(self) -> int:
        """Pages that are open now."""
        return len(self._free_places) - self._num_free

    @property
    def memory_bytes(self) -> int:
        """Of records, open pages and states."""
        open_bytes = len(self._free_places) * _open_bytes(self.page_size, self.head_dim, self.dtype)
        return self.num_head_pages * (self.head_page_bytes + STATE.itemsize) + open_bytes

    def write_records(self, pages_X: Tensor, records_XR: Tensor) -> None:
        """Store whole head pages that were coded by the same codec, as they came."""
        self._close(pages_X)
        self.fill_records(pages_X, records_XR)

    def fill_records(self, pages_X: Tensor, records_XR: Tensor) -> None:
        """As `write_records`, of empty pages: the host does not wait for the device."""
        self._records_NR.index_copy_(0, pages_X, records_XR)
        self._state_N.index_fill_(0, pages_X, CODED)

    def write_pages(self, pages_X: Tensor, k_XPD: Tensor, v_XPD: Tensor, num_tokens_X: Tensor | None = None) -> None:
        self._close(pages_X)
        self.fill_pages(pages_X, k_XPD, v_XPD, num_tokens_X)

    def fill_pages(self, pages_X: Tensor, k_XPD: Tensor, v_XPD: Tensor, num_tokens_X: Tensor | None = None) -> None:
        """As `write_pages`, of empty pages. With `num_tokens_X` on the host, that does not wait for the device."""
        if num_tokens_X is None:
            self._fill_whole(pages_X, k_XPD, v_XPD)
            return
        is_whole = num_tokens_X == self.page_size
        whole, partial = (is_there.nonzero()[:, 0] for is_there in (is_whole, ~is_whole))
        whole, partial = (moved(index, self.device) for index in (whole, partial))
        self._fill_whole(pages_X[whole], k_XPD[whole], v_XPD[whole])
        self.fill_open(pages_X[partial], k_XPD[partial], v_XPD[partial])

    def fill_open(self, pages_X: Tensor, k_XPD: Tensor, v_XPD: Tensor) -> None:
        """As `fill_pages`, none of which is full."""
        places = self._open(pages_X)
        self._k_open[places], self._v_open[places] = k_XPD, v_XPD

    def append(self, slots_X: Tensor, k_XD: Tensor, v_XD: Tensor) -> None:
        pages_X, offsets_X = slots_X // self.page_size, slots_X % self.page_size
        states_X = self._state_N[pages_X]
        if bool((states_X < 0).any()):
            coded, others = states_X == CODED, states_X != CODED
            self._overwrite(pages_X[coded], offsets_X[coded], k_XD[coded], v_XD[coded])
            self._open(pages_X[states_X == EMPTY])
            pages_X, offsets_X, k_XD, v_XD = (x[others] for x in (pages_X, offsets_X, k_XD, v_XD))
            states_X = self._state_N[pages_X]
        places_X = states_X.long()
        self._k_open[places_X, offsets_X], self._v_open[places_X, offsets_X] = k_XD, v_XD
        is_full = offsets_X == self.page_size - 1
        if bool(is_full.any()):
            full = places_X[is_full]
            self._encode(pages_X[is_full], self._k_open[full], self._v_open[full])

    def gather(self, pages_X: Tensor, k_XPD: Tensor, v_XPD: Tensor) -> None:
        for start in range(0, len(pages_X), PAGES_PER_DECODE):
            some = slice(start, start + PAGES_PER_DECODE)
            k, v = self._decode(pages_X[some])
            k_XPD[some], v_XPD[some] = k, v
        places_X = self._state_N[pages_X].long()
        is_open = (places_X >= 0).nonzero()[:, 0]
        places = places_X[is_open]
        k_XPD[is_open], v_XPD[is_open] = self._k_open[places], self._v_open[places]

    def release(self, pages: PageIds) -> None:
        index = torch.from_numpy(pages).long().to(self.device)
        self._close(index)
        self._state_N[index] = EMPTY

    def _overwrite(self, pages: Tensor, offsets: Tensor, k_XD: Tensor, v_XD: Tensor) -> None:
        """One token of each coded page is replaced. The others are coded a second time, from what the first left."""
        k, v = (x.clone() for x in self._decode(pages))
        each = torch.arange(len(pages), device=self.device)
        k[each, offsets], v[each, offsets] = k_XD, v_XD
        self._encode(pages, k, v)

    def _encode(self, pages: Tensor, k_XPD: Tensor, v_XPD: Tensor) -> None:
        if len(pages):
            self._close(pages)
            self._fill_whole(pages, k_XPD, v_XPD)

    def _fill_whole(self, pages: Tensor, k_XPD: Tensor, v_XPD: Tensor) -> None:
        if len(pages):
            self.fill_records(pages, self._codec.encode(k_XPD, v_XPD, [1] * len(pages)))

    def _decode(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        records = self._records_NR.index_select(0, pages)
        return self._codec.decode(records, self.page_size, self.head_dim, self.dtype)

    def _open(self, pages: Tensor) -> Tensor:
        """Give each page a zeroed place in the open store; returns the places."""
        with self._places_lock:
            if len(pages) > self._num_free:
                room = f"{self._num_free} of {len(self._free_places)} places are free"
                raise InternalError(f"coded KV pool: {len(pages)} more pages to open, {room}")
            self._num_free -= len(pages)
            places = self._free_places[self._num_free : self._num_free + len(pages)].clone()
        places = moved(places, self.device)
        for opened in (self._k_open, self._v_open):
            opened.index_fill_(0, places, 0)  # `opened[places] = 0` would have the host copy a number, and wait
        self._state_N[pages] = places.to(STATE)
        return places

    def _close(self, pages: Tensor) -> None:
        """Give the places of those that are open back. Their states are the caller's to set."""
        places = self._state_N[pages].long().cpu()
        places = places[places >= 0]
        with self._places_lock:
            self._free_places[self._num_free : self._num_free + len(places)] = places
            self._num_free += len(places)


def _open_bytes(page_size: int, head_dim: int, dtype: torch.dtype) -> int:
    return 2 * page_size * head_dim * dtype.itemsize
