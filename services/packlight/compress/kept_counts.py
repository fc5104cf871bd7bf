"""Counting where the tokens that a selection keeps lie, layer by layer.

Knows selections and the bins of `core/kept_map.py`. One request's counts; only requests that ask for them have any.

Legend: G groups of layers, B bins, N kept tokens of all KV heads.
"""

from __future__ import annotations

import torch

from packlight.compress.base import Selection
from packlight.core.kept_map import KeptMap, bin_width, group_of, num_bins, num_groups, share_bytes
from packlight.core.types import ModelSpec


class KeptCounts:
    """Of the first `num_tokens` tokens: the prompt. What was generated before a resumption is kept anyway."""

    def __init__(self, spec: ModelSpec, num_tokens: int) -> None:
        self._spec, self._num_tokens = spec, num_tokens
        self._bin_tokens = bin_width(num_tokens)
        self._num_bins = num_bins(num_tokens, self._bin_tokens)
        self._counts_GB = torch.zeros(num_groups(spec.num_layers), self._num_bins, dtype=torch.int64)

    def add(self, layer: int, selection: Selection) -> None:
        index_N = torch.cat(selection.indices)
        bins_N = index_N[index_N < self._num_tokens] // self._bin_tokens
        group = group_of(layer, self._spec.num_layers)
        self._counts_GB[group] += torch.bincount(bins_N, minlength=self._num_bins).cpu()

    def as_map(self) -> KeptMap:
        """Once every layer is counted."""
        layers = range(self._spec.num_layers)
        groups = [group_of(layer, len(layers)) for layer in layers]
        num_heads = [groups.count(group) * self._spec.num_kv_heads for group in range(len(self._counts_GB))]
        ends = [*range(self._bin_tokens, self._num_tokens, self._bin_tokens), self._num_tokens]
        widths = [end - index * self._bin_tokens for index, end in enumerate(ends)]
        rows: list[list[int]] = self._counts_GB.tolist()
        return KeptMap(
            num_tokens=self._num_tokens,
            num_layers=len(layers),
            bin_tokens=self._bin_tokens,
            num_kept_tokens=tuple(sum(row) / heads for row, heads in zip(rows, num_heads, strict=True)),
            shares=b"".join(
                share_bytes(row, [heads * width for width in widths])
                for row, heads in zip(rows, num_heads, strict=True)
            ),
        )
