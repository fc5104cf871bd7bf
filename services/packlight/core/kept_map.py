"""Which parts of a prompt were kept, coarse enough to travel with an answer and to be drawn.

Knows how a prompt is cut into bins and a model into groups of layers. Does not know tensors, text or workers: counting
is `compress/kept_counts.py`'s, telling the client `router/explain.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_BINS = 512
MAX_GROUPS = 6
ALL = 255
"""The byte of a bin of which everything was kept."""


@dataclass(frozen=True, slots=True)
class KeptMap:
    """`num_tokens` of prompt in bins of `bin_tokens` (the last may be narrower), `num_layers` in groups of consecutive
    layers.

    `num_kept_tokens[group]` is the mean over the group's layers and KV heads. `shares[group * num_bins + bin]` is the
    share of the (layer, KV head, token) slots that was kept, as a byte: 0 only where nothing was, 255 only where all
    was."""

    num_tokens: int
    num_layers: int
    bin_tokens: int
    num_kept_tokens: tuple[float, ...]
    shares: bytes

    @property
    def num_groups(self) -> int:
        return len(self.num_kept_tokens)

    @property
    def num_bins(self) -> int:
        return num_bins(self.num_tokens, self.bin_tokens)

    @property
    def is_whole(self) -> bool:
        """Whether the parts fit each other; those of a map that came from elsewhere may not."""
        is_sized = min(self.bin_tokens, self.num_tokens, self.num_groups) > 0 and self.num_groups <= self.num_layers
        return is_sized and len(self.shares) == self.num_groups * self.num_bins

    def row(self, group: int) -> bytes:
        """The bins of one group."""
        return self.shares[group * self.num_bins : (group + 1) * self.num_bins]

    def layers(self, group: int) -> range:
        """The layers of one group: those that `group_of` puts there."""
        first, end = (-(-index * self.num_layers // self.num_groups) for index in (group, group + 1))
        return range(first, end)


def bin_width(num_tokens: int) -> int:
    """The narrowest bins of which `MAX_BINS` cover the prompt."""
    return -(-num_tokens // MAX_BINS)


def num_bins(num_tokens: int, bin_tokens: int) -> int:
    return -(-num_tokens // bin_tokens)


def num_groups(num_layers: int) -> int:
    return min(MAX_GROUPS, num_layers)


def group_of(layer: int, num_layers: int) -> int:
    """Groups differ by one layer at most."""
    return layer * num_groups(num_layers) // num_layers


def share_bytes(counts: Sequence[int], totals: Sequence[int]) -> bytes:
    """`counts[i]` of `totals[i]` >= 1 as bytes."""
    return bytes(_share_byte(count, total) for count, total in zip(counts, totals, strict=True))


def _share_byte(count: int, total: int) -> int:
    assert 0 <= count <= total, (count, total)
    if count in (0, total):
        return ALL if count else 0
    return max(1, min(ALL - 1, round(ALL * count / total)))
