"""FreeKV (arXiv 2505.13109): read the pages that the previous step's query would have chosen.

Shapes: B rows, K KV heads, G query heads per KV head, D head dim, M pages per head, R table rows.

Queries of consecutive steps are alike, so pages can be chosen before the query is known, off the critical path. Where a
KV head's query has turned too far the choice is corrected: made from the current query after all. What is remembered
of a row is its last query, not its last choice: the two say the same, but a choice made late knows the pages that
were completed since.

The paper always reads 512 (or 128) tokens at either end besides; here every reader reads the first page and the last.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from packlight.compress.readers.bounds import bound_probe, page_mass, page_products
from packlight.compress.readers.site import ReaderSite
from packlight.compress.recipes import param_of
from packlight.core.types import PackSpec
from packlight.kv.reading import PageQuery


class FreeKVReader:
    """A KV head's choice is corrected where the cosine of its consecutive queries, mean over the group, is below
    `cosine`; -1 never corrects. A page's score is its share of the softmax of Quest's bounds, mean over the group.

    `forget` may be called while another thread scores other rows."""

    def __init__(self, cosine: float, num_rows: int) -> None:
        self.cosine = cosine
        # A remembered query counts only in the life of the row in which it was asked.
        self._life_R = np.zeros(num_rows, dtype=np.int64)
        self._layers: dict[int, _LastQueries] = {}

    @staticmethod
    def constants(spec: PackSpec, num_prompt_tokens: int, site: ReaderSite) -> dict[str, float]:
        return {"cosine": param_of(spec, "cosine"), "num_rows": site.num_rows}

    def score(self, query: PageQuery) -> Tensor:
        guess_BKGD = self._guess(query).float()
        logits_BKGM = page_products(bound_probe(guess_BKGD * query.scale), query.bounds_BKME)
        return page_mass(logits_BKGM, query.num_tokens_BKM)

    def forget(self, row: int) -> None:
        self._life_R[row] += 1

    def _guess(self, query: PageQuery) -> Tensor:
        """`[B, K, G, D]`: the last query of each KV head, or its current one where that is too far from it."""
        rows, now_BKGD = list(query.rows), query.q_BKGD
        if query.layer not in self._layers:
            self._layers[query.layer] = _LastQueries(now_BKGD, num_rows=len(self._life_R))
        last_BKGD, is_known_B = self._layers[query.layer].exchange(rows, now_BKGD, self._life_R[rows])
        cosine_BK = F.cosine_similarity(now_BKGD.float(), last_BKGD.float(), dim=-1).mean(dim=-1).clamp(min=-1)
        is_near_BK = is_known_B[:, None] & (cosine_BK >= self.cosine)
        return torch.where(is_near_BK[:, :, None, None], last_BKGD, now_BKGD)


class _LastQueries:
    """The last query of every row in one layer, and the life of the row in which it was asked."""

    def __init__(self, like_BKGD: Tensor, num_rows: int) -> None:
        self._q_RKGD = like_BKGD.new_zeros((num_rows, *like_BKGD.shape[1:]))
        self._life_R = np.full(num_rows, -1, dtype=np.int64)

    def exchange(self, rows: list[int], q_BKGD: Tensor, life_B: np.ndarray) -> tuple[Tensor, Tensor]:
        """Remember these; return what was remembered and whether it is of the rows' present lives, bool `[B]`."""
        row_B = torch.tensor(rows, device=q_BKGD.device)
        last_BKGD, is_known_B = self._q_RKGD[row_B], torch.from_numpy(self._life_R[rows] == life_B)
        self._q_RKGD[row_B], self._life_R[rows] = q_BKGD, life_B
        return last_BKGD, is_known_B.to(q_BKGD.device)
