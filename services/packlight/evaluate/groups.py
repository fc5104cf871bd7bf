"""Which variants of a prompt decode together. Knows sizes in pages, nothing else; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from packlight.core.errors import RequestNeverFits

# A step pads every row to the longest of its group, so rows of about one size belong together.
LARGEST_TO_SMALLEST = 2.0


@dataclass(frozen=True, slots=True)
class Size:
    """What one variant needs: `num_rows` rows of `num_pages` head pages each."""

    num_rows: int
    num_pages: int


def plan_groups(sizes: Sequence[Size], *, max_pages: int, max_rows: int) -> list[list[int]]:
    """Indices into `sizes`, each in one group; no group exceeds `max_pages` or `max_rows`, largest rows first.

    Raises RequestNeverFits when a variant alone is too large."""
    groups: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index].num_pages, index)):
        _check_fits(sizes[index], max_pages, max_rows)
        if not groups or not _joins(sizes[index], [sizes[other] for other in groups[-1]], max_pages, max_rows):
            groups.append([])
        groups[-1].append(index)
    return groups


def num_pages_of(sizes: Sequence[Size]) -> int:
    return sum(size.num_rows * size.num_pages for size in sizes)


def _joins(size: Size, group: Sequence[Size], max_pages: int, max_rows: int) -> bool:
    return (
        group[0].num_pages <= LARGEST_TO_SMALLEST * size.num_pages
        and num_pages_of([*group, size]) <= max_pages
        and sum(member.num_rows for member in [*group, size]) <= max_rows
    )


def _check_fits(size: Size, max_pages: int, max_rows: int) -> None:
    if num_pages_of([size]) > max_pages or size.num_rows > max_rows:
        raise RequestNeverFits(
            f"{size.num_rows} rows of {size.num_pages} head pages are wanted, the pool has {max_pages} and "
            f"{max_rows} rows: ask for shorter prompts, or raise decode.kv_memory_bytes"
        )
