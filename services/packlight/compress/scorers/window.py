"""SnapKV (arXiv 2404.14469) per KV head: the attention of the last queries, pooled over neighbouring tokens.

Shapes: K KV heads, S keys, N prefix positions.

Pooling is what makes it work: the window's queries attend to the beginning of an answer, and its later tokens are
needed by queries that do not exist yet. So the kernel has to reach over the rest of the answer. The paper's 5 and 7
lose the later digits of a number on small models; 63 (RocketKV, arXiv 2502.14051) keeps them, and a narrower one
wastes less of a tiny budget. Group-sum, then pool: for max-pooling the order matters, and this is RocketKV's.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from packlight.compress.base import LayerView, Scored
from packlight.compress.budget import base_budget
from packlight.core.types import PackSpec, Pooling

KERNEL = 63
TIGHT_KERNEL = 31
TIGHT_TOKENS = 100


class WindowScorer:
    """Max or mean over the kernel's neighbourhood of the window's attention mass, within the prefix."""

    def score(self, view: LayerView, mass_KS: Tensor, spec: PackSpec) -> Scored:
        num_prefix = view.num_tokens - view.q_WHD.shape[0]
        return Scored(pooled(mass_KS[:, :num_prefix], pooling_kernel(spec, view.num_tokens), spec.pooling))


def pooled(values_KN: Tensor, kernel: int, pooling: Pooling) -> Tensor:
    """[K, N]: stride 1, centred. The mean counts what lies beyond the edges as zeros, as SnapKV's does."""
    pool = max_pool1d if pooling is Pooling.MAX else avg_pool1d
    return pool(values_KN, kernel, stride=1, padding=kernel // 2)


def pooling_kernel(spec: PackSpec, num_tokens: int) -> int:
    """The width asked for, else 63, or 31 when fewer than 100 tokens are left beside the window."""
    if spec.kernel is not None:
        return spec.kernel
    return TIGHT_KERNEL if base_budget(spec, num_tokens) - spec.window < TIGHT_TOKENS else KERNEL
