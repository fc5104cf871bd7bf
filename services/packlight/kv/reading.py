"""Reading some pages only: the seam between attention backends, which read pages, and readers, which rate them.

Knows queries and page summaries. Knows no backend, no request and no method: those are `attention/` and
`compress/readers/`, which do not know each other.

Legend: B rows that share a reader, K KV heads, G query heads per KV head, D head dim, E = 2 * D, M pages per head.

Who does what in each layer of a decode step:

    reader      scores every page of every (row, KV head): one paper's idea, and nothing else of it
    backend     takes the best pages within the budget, page 0 and the last page always among them, ties to the lower
                ordinal; and attends to those
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

# Page 0, where the attention sinks are, and the last page, where the newest tokens are.
MIN_PAGES = 2


class PageBounds(Protocol):
    """Page summaries that are multiplied where they lie."""

    def products(self, probe_BKGE: Tensor) -> Tensor:
        """fp32 `[B, K, G, M]`: each row of the probe times each page's summary, added up over E."""
        ...


@dataclass(frozen=True, eq=False, slots=True)
class PageQuery:
    """What a decode step asks of the pages of some rows, in one layer.

    rows: the B table rows, the key of whatever a reader remembers from step to step.
    q_BKGD: the new token's queries after RoPE; query head h belongs to KV head h // G. The pool's dtype.
    scale: what the model multiplies q.k by.
    bounds_BKME: fp32, each page's smallest key elements, then its largest; the new token is in them. Anything finite
        where there is no page. Or what multiplies by them. Valid until `score` returns.
    num_tokens_BKM: tokens stored in each page, an integer dtype; 0 where a head has no such page."""

    layer: int
    rows: Sequence[int]
    q_BKGD: Tensor
    scale: float
    bounds_BKME: Tensor | PageBounds
    num_tokens_BKM: Tensor


class PageReader(Protocol):
    """How much each page matters to the next token. Called once per layer and step for all rows that share it."""

    def score(self, query: PageQuery) -> Tensor:
        """fp32 `[B, K, M]`, finite; higher is read first. Anything finite where there is no page."""
        ...

    def forget(self, row: int) -> None:
        """`row` was closed: drop what is remembered of it. Not an error for a row never seen."""
        ...


class PageRating(Enum):
    """What the scores of the known readers are; `PageRule.num_dims` matters to the second only.

    SUM_OF_BOUNDS: sum over the group of sum_d max(q_d * low_d, q_d * high_d).
    MASS_OF_REPRESENTATIVES: attention to one representative key per page, in the dims where the group is largest."""

    SUM_OF_BOUNDS = "sum of bounds"
    MASS_OF_REPRESENTATIVES = "mass of representatives"


@dataclass(frozen=True, slots=True)
class PageRule:
    """A way to score that can be followed without asking the reader, by a kernel that knows it."""

    rating: PageRating
    num_dims: int = 0


@runtime_checkable
class RuledReader(PageReader, Protocol):
    """A reader without memory whose `score` is what `rule` says, up to rounding."""

    @property
    def rule(self) -> PageRule: ...


class ReaderKey(NamedTuple):
    """What a reader is made from, by its name in the registry: two readers of one key score alike, wherever they are.
    What they remember of rows is their own."""

    name: str
    constants: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """How one row is read. Rows of a batch that hold the same `reader` object are scored in one call.

    `num_pages` >= MIN_PAGES is the most that a KV head reads in a step; a head that has no more reads them all. Layers
    before `num_dense_layers`, and layers with a sliding window, read everything. `key` is the reader's, where another
    process has to read its share of the row alike."""

    reader: PageReader
    num_pages: int
    num_dense_layers: int = 0
    key: ReaderKey | None = None

    def __post_init__(self) -> None:
        assert self.num_pages >= MIN_PAGES, f"a head reads at least {MIN_PAGES} pages, not {self.num_pages}"
