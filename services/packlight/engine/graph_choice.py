"""Which captured step, if any, a decode step can be replayed with. Pure: lengths and readings in, a choice out.

A captured step has a fixed number of rows and a bound on the pages of a head. A step with fewer rows is padded with a
row of its own, which then is computed several times over with the same result; a step that fits nowhere runs eagerly,
and says why.

Legend: B rows of the step, L layers, K KV heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum

import numpy as np

from packlight.attention.base import FixedShape
from packlight.kv.reading import PageRule, Reading, RuledReader
from packlight.kv.table import Int32s


class Mode(StrEnum):
    """How a step ran: replayed, or eagerly and why."""

    REPLAYED = "replayed"
    NO_GRAPHS = "eager_no_graphs"
    WATCHED = "eager_watched"  # somebody looks at each layer, on the host
    BATCH = "eager_batch"
    PAGES = "eager_pages"
    UNEVEN = "eager_uneven"  # layers that attend alike hold different lengths
    READERS = "eager_readers"


def choose_shape(
    shapes: Iterable[FixedShape],
    lengths_BLK: Int32s,
    page_size: int,
    reads: Sequence[Reading | None],
    windows: Sequence[int | None],
) -> FixedShape | Mode:
    """The smallest shape that takes the step. `lengths_BLK` counts the new tokens; `windows` are the model's."""
    fitting = [shape for shape in shapes if len(lengths_BLK) <= shape.num_rows]
    if not fitting:
        return Mode.BATCH
    num_pages_B = -(-lengths_BLK.max(axis=(1, 2)) // page_size)
    fitting = [shape for shape in fitting if num_pages_B.max() <= shape.num_pages]
    if not fitting:
        return Mode.PAGES
    readings = list(reads) or [None] * len(lengths_BLK)
    fitting = [shape for shape in fitting if _reads_like(shape.reading, readings, num_pages_B.tolist())]
    if not fitting:
        return Mode.READERS
    if not is_even(lengths_BLK, windows, fitting[0].reading):
        fitting = [shape for shape in fitting if not shape.is_even]
    if not fitting:
        return Mode.UNEVEN
    return min(fitting, key=lambda shape: (shape.num_rows, shape.num_pages, not shape.is_even, _num_read(shape)))


def is_even(lengths_BLK: Int32s, windows: Sequence[int | None], reading: Reading | None) -> bool:
    """Whether layers with the same window, and on the same side of the dense layers, hold the same lengths."""
    num_dense = reading.num_dense_layers if reading is not None else 0
    first: dict[tuple[int | None, bool], Int32s] = {}
    for layer, window in enumerate(windows):
        lengths_BK = lengths_BLK[:, layer]
        if not np.array_equal(first.setdefault((window, layer < num_dense), lengths_BK), lengths_BK):
            return False
    return True


def pad_rows(rows: Sequence[int], num_pages_B: Sequence[int], num_rows: int) -> list[int]:
    """Places in the step, `num_rows` of them: every row, then the cheapest again and again."""
    cheapest = min(range(len(rows)), key=lambda place: num_pages_B[place])
    return [*range(len(rows)), *[cheapest] * (num_rows - len(rows))]


def rule_of(reading: Reading) -> PageRule | None:
    """What the reader's scores are; None if only it knows."""
    return reading.reader.rule if isinstance(reading.reader, RuledReader) else None


def _reads_like(captured: Reading | None, reads: Sequence[Reading | None], num_pages_B: Sequence[int]) -> bool:
    """Whether every row can be read as the shape is; without a reading only one that reads no more in full."""
    if captured is None:
        return not any(reads)
    return any(reads) and all(
        num_pages <= captured.num_pages if reading is None else _is_covered(reading, captured)
        for reading, num_pages in zip(reads, num_pages_B, strict=True)
    )


def _is_covered(reading: Reading, captured: Reading) -> bool:
    return (
        rule_of(reading) == rule_of(captured) is not None
        and reading.num_dense_layers == captured.num_dense_layers
        and reading.num_pages <= captured.num_pages
    )


def _num_read(shape: FixedShape) -> int:
    return shape.reading.num_pages if shape.reading is not None else shape.num_pages
