"""What this backend asks of a library of paged-attention kernels, and what it never asks: shapes that it has not.

Knows page lists in compressed sparse rows (CSR). Knows no request, layer or reader, and does not import FlashInfer:
`wrappers.py` does, and tests bring a library of their own that computes the same in plain torch.

Legend: N requests of a kernel call, J listed pages of all of them, X pages in memory, P page size, T tokens,
H query heads, K KV heads, G query heads per KV head, D head dim.

In decode a *request* is one (row, KV head): it has its own page list, its G query heads, and one KV head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from packlight.core.errors import ConfigError
from packlight.kv.table import Int32s


@dataclass(frozen=True, eq=False, slots=True)
class PageCounts:
    """How many pages each of N requests lists, and how many tokens are on its last one (1 to P), all int32 `[N]`."""

    num_pages_N: Int32s
    last_fill_N: Int32s

    @property
    def indptr(self) -> Int32s:
        """int32 `[N + 1]`: request n lists the entries from `indptr[n]` to `indptr[n + 1]`."""
        return np.concatenate([[0], np.cumsum(self.num_pages_N)]).astype(np.int32)

    @property
    def num_entries(self) -> int:
        """J."""
        return int(self.num_pages_N.sum())


@dataclass(frozen=True, slots=True)
class KernelShape:
    """What a kernel is compiled and scheduled for. `group` is G. A window of w tokens is the token itself and the
    w - 1 before it; `scale` is what q.k is multiplied by."""

    group: int
    head_dim: int
    page_size: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    scale: float
    sliding_window: int | None


@dataclass(frozen=True, slots=True)
class Limits:
    """What the kernels exist for."""

    head_dims: tuple[int, ...]
    q_dtypes: tuple[torch.dtype, ...]
    kv_dtypes: tuple[torch.dtype, ...]

    def refuse(self, head_dim: int, q_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
        """Raises ConfigError for a model or pool that the kernels cannot read, naming the backend that can."""
        wrong = _outside("head dim", head_dim, self.head_dims)
        wrong = wrong or _outside("dtype", q_dtype, self.q_dtypes) or _outside("KV dtype", kv_dtype, self.kv_dtypes)
        if wrong:
            raise ConfigError(f"attention 'flashinfer': {wrong}. Choose 'sdpa', which reads all of them")


def _outside(what: str, value: object, allowed: Sequence[object]) -> str | None:
    return None if value in allowed else f"no kernel for {what} {value}, only for {', '.join(map(str, allowed))}"


class DecodeKernel(Protocol):
    """One query token per request. What is planned last is what runs."""

    def plan(self, counts: PageCounts, shape: KernelShape) -> Tensor:
        """Host work only, no wait for the device. Returns where the page lists go before each `run`: int32 `[J]` on
        the device, the pages of request 0 first, the partly filled page last in each list."""
        ...

    def run(self, q_NGD: Tensor, k_XPD: Tensor, v_XPD: Tensor) -> Tensor:
        """`out_NGD` in q's dtype."""
        ...


class PrefillKernel(Protocol):
    """Several query tokens per request, the last ones stored: token i sees all stored tokens up to itself."""

    def plan(
        self, num_tokens_N: Int32s, counts: PageCounts, pages_J: Tensor, shape: KernelShape, num_heads: int
    ) -> None:
        """`pages_J` is int32 on the device; the same lists serve every `run`. `num_heads` is H."""
        ...

    def run(self, q_THD: Tensor, k_XKPD: Tensor, v_XKPD: Tensor) -> Tensor:
        """`out_THD` in q's dtype."""
        ...

    def run_with_lse(self, q_THD: Tensor, k_XKPD: Tensor, v_XKPD: Tensor) -> tuple[Tensor, Tensor]:
        """`out_THD`, and `lse_TH`: fp32, the natural log of the sum of exp(scale * q.k) over what a token sees."""
        ...


class Kernels(Protocol):
    """A library of kernels, on one device."""

    @property
    def limits(self) -> Limits: ...

    def decode(self) -> DecodeKernel:
        """For any number of requests. One kernel holds one plan: make as many as there are plans in a step."""
        ...

    def fixed_decode(self, num_requests: int, max_entries: int) -> DecodeKernel:
        """For exactly so many requests with at most so many listed pages: every address that `run` uses stays what it
        is over all plans, so a captured `run` can be replayed after another `plan`."""
        ...

    def prefill(self) -> PrefillKernel: ...
