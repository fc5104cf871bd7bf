"""From logits to tokens: the one place where an answer's next token is decided.

Shapes: R rows (requests) of a step, V vocabulary, N tokens that survived the filters.

A row's token depends on its own logits, parameters, history and position only, so it is the same in every batch, on
every worker and after a restart. Each row goes through: logit bias, penalties, what its grammar allows, temperature,
top-k, min-p, top-p, and a draw by inverse CDF over ascending token ids in fp64. Knows no model, no request and no stop
rule.

On a GPU the rows that want nothing but a token are drawn there (`draws.py`), and the host waits once per step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from packlight.compress.topk import indices_from, top_indices
from packlight.core.errors import InternalError, PacklightError
from packlight.core.hashing import counter_uniform
from packlight.core.types import SamplingParams, Token
from packlight.engine.draws import draw_rows
from packlight.models.grammar import Constraint

# Top-p rarely needs more tokens than this. When it does, it tries eight times as many.
NUCLEUS_PREFIX = 1024

FloatArray = np.ndarray[tuple[int], np.dtype[np.float64]]


class PenaltyState:
    """Which tokens one request has seen, kept up to date a token at a time. Owned by the request's sequence."""

    def __init__(self, prompt_token_ids: Iterable[int], generated_token_ids: Iterable[int] = ()) -> None:
        self._prompt_ids = torch.from_numpy(np.unique(np.fromiter(prompt_token_ids, dtype=np.int64)))
        self._generated = Counter(generated_token_ids)

    def add(self, token_id: int) -> None:
        """Records a generated token."""
        self._generated[token_id] += 1

    def apply(self, logits_V: Tensor, params: SamplingParams) -> None:
        """Changes the logits in place, as vLLM does: repetition (prompt and answer, multiplies), then frequency and
        presence (answer only, subtract)."""
        ids = torch.tensor(list(self._generated.keys()), dtype=torch.int64)
        counts = torch.tensor(list(self._generated.values()), dtype=logits_V.dtype)
        if params.repetition_penalty != 1.0:
            seen = torch.cat([self._prompt_ids, ids])
            value = logits_V[seen]
            logits_V[seen] = torch.where(
                value > 0, value / params.repetition_penalty, value * params.repetition_penalty
            )
        logits_V[ids] -= params.frequency_penalty * counts + params.presence_penalty


@dataclass(frozen=True, slots=True)
class SampleRow:
    """How one row is drawn. `position` is the absolute position of the token being drawn. `penalties` is needed when
    the parameters have penalties, `constraint` when they have a grammar."""

    params: SamplingParams
    position: int
    penalties: PenaltyState | None = None
    banned_token_ids: tuple[int, ...] = ()
    constraint: Constraint | None = None

    @property
    def is_argmax(self) -> bool:
        """The token is the argmax of the raw logits."""
        return self.params.is_plain_greedy and not self.banned_token_ids and self.constraint is None

    @property
    def is_plain(self) -> bool:
        """The token is drawn from the raw logits, and nothing is asked about the others."""
        params = self.params
        changes = params.has_penalties or params.logit_bias or self.banned_token_ids or self.constraint is not None
        return not changes and params.num_logprobs is None


def sample(logits_RV: Tensor, rows: Sequence[SampleRow]) -> list[Token | PacklightError]:
    """One token per row of `logits_RV` (any float dtype, any device; not changed).

    A row from which nothing can be drawn (a NaN or +inf logit, every token banned, a token id beyond the vocabulary)
    gets an InternalError, one whose grammar cannot be followed an InvalidRequest; the others do not notice."""
    assert logits_RV.shape[0] == len(rows), (logits_RV.shape, len(rows))
    if logits_RV.device.type != "cpu":
        return sample_on_device(logits_RV, rows)
    best = logits_RV.max(dim=-1)  # the first index among equals; NaN if any logit is
    parts = zip(logits_RV, rows, best.indices.tolist(), best.values.tolist(), strict=True)
    return [_sample_row(*part) for part in parts]


def sample_on_device(logits_RV: Tensor, rows: Sequence[SampleRow]) -> list[Token | PacklightError]:
    """`sample`, with one transfer of token ids to the host; and one of the logits of rows that want more than that."""
    if not rows:
        return []
    drawn_R = draw_rows(
        logits_RV, [row.params for row in rows], [counter_uniform(row.params.seed, row.position) for row in rows]
    )
    best = logits_RV.max(dim=-1)
    found = torch.stack([best.indices.double(), best.values.double(), drawn_R.double()], dim=1).tolist()
    others = [index for index, row in enumerate(rows) if not row.is_plain]
    raw = dict(zip(others, logits_RV[others].float().cpu(), strict=True)) if others else {}
    return [
        _sample_row(raw[index], row, int(best_id), value) if index in raw else _drawn(row, best_id, value, drawn)
        for index, (row, (best_id, value, drawn)) in enumerate(zip(rows, found, strict=True))
    ]


def _drawn(row: SampleRow, best_id: float, best_value: float, drawn: float) -> Token | PacklightError:
    try:
        _check_finite(best_value, row)
    except InternalError as error:
        return error
    return Token(int(best_id if row.is_argmax else drawn))


def _sample_row(logits_V: Tensor, row: SampleRow, best_id: int, best_value: float) -> Token | PacklightError:
    try:
        _check_finite(best_value, row)
        if row.is_argmax and row.params.num_logprobs is None:
            return Token(best_id)
        raw_V = logits_V.float().cpu()
        shaped_V = _shape(raw_V, row)
        if shaped_V is not raw_V:
            best_id = int(shaped_V.numpy().argmax())
            _check_finite(shaped_V[best_id].item(), row)
        token_id = best_id if row.params.temperature == 0.0 else _draw(shaped_V, row)
        return _with_logprobs(token_id, raw_V, row.params.num_logprobs)
    except PacklightError as error:
        return error


def _check_finite(best_value: float, row: SampleRow) -> None:
    if not isfinite(best_value):
        raise InternalError(
            f"no token can be drawn for position {row.position}: the best logit is {best_value} "
            "(NaN or inf: the model's output is broken; -inf: every token is banned)"
        )


def _shape(raw_V: Tensor, row: SampleRow) -> Tensor:
    """A copy with bias, penalties and bans, and what the grammar allows; the raw row itself if there are none."""
    params, vocab_size = row.params, raw_V.shape[0]
    assert (row.constraint is not None) == bool(params.grammar), "a grammar needs a constraint"
    if not (params.logit_bias or params.has_penalties or row.banned_token_ids or row.constraint):
        return raw_V
    shaped_V = raw_V.clone()
    for token_id, bias in params.logit_bias:
        _check_id(token_id, vocab_size)
        shaped_V[token_id] += bias
    if params.has_penalties:
        assert row.penalties is not None, "parameters with penalties need a PenaltyState"
        row.penalties.apply(shaped_V, params)
    for token_id in row.banned_token_ids:
        _check_id(token_id, vocab_size)
        shaped_V[token_id] = -torch.inf
    if row.constraint is not None:
        shaped_V[torch.from_numpy(~row.constraint.allowed())] = -torch.inf
    return shaped_V


def _check_id(token_id: int, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        raise InternalError(
            f"token id {token_id} is outside the vocabulary of {vocab_size}; the router should refuse it"
        )


def _draw(logits_V: Tensor, row: SampleRow) -> int:
    """The token at which the CDF over ascending ids passes the row's noise."""
    ids_N, weights_N = _filter(logits_V, row.params)
    cdf_N = weights_N.cumsum(0)
    # The noise is at most 1 - 2**-53, so the target stays below the last entry even when rounded; and the first entry
    # above it belongs to a token of positive weight.
    target = counter_uniform(row.params.seed, row.position) * cdf_N[-1]
    place = torch.searchsorted(cdf_N, target, right=True)
    return int(place if ids_N is None else ids_N[place])


def _filter(logits_V: Tensor, params: SamplingParams) -> tuple[Tensor | None, Tensor]:
    """Surviving token ids (ascending; None means all) and their unnormalised probabilities in fp64.

    Each filter keeps the best tokens, ties to the lower id, of what the one before it left."""
    ids_N, logits_N = None, logits_V
    if 0 < params.top_k < logits_V.shape[0]:
        ids_N = top_indices(logits_V, params.top_k)
        logits_N = logits_V[ids_N]
    weights_N = logits_N.double().sub_(logits_N.max()).div_(params.temperature).exp_()
    if params.min_p > 0.0:
        kept = (weights_N >= params.min_p).nonzero().squeeze(1)  # the best weight is 1
        ids_N, weights_N = _narrow(ids_N, kept), weights_N[kept]
    if params.top_p < 1.0:
        kept = _nucleus(weights_N, params.top_p)
        ids_N, weights_N = _narrow(ids_N, kept), weights_N[kept]
    return ids_N, weights_N


def _narrow(ids_N: Tensor | None, kept: Tensor) -> Tensor:
    return kept if ids_N is None else ids_N[kept]


def _nucleus(weights_N: Tensor, top_p: float) -> Tensor:
    """Places of the fewest best tokens whose share of the weight reaches `top_p`; at least one."""
    values = weights_N.numpy()
    goal = top_p * values.sum()  # torch would add in an order that depends on its threads
    size, num_short = 0, 0
    while num_short == size < len(values):
        size = min(max(NUCLEUS_PREFIX, 8 * size), len(values))
        best = _largest(values, size)
        num_short = int(np.searchsorted(best.cumsum(), goal))
    num_kept = min(num_short + 1, size)  # short by all: rounding
    return indices_from(weights_N, num_kept, float(best[num_kept - 1]))


def _largest(values: FloatArray, count: int) -> FloatArray:
    """The `count` largest, descending. On CPU numpy sorts 20 times faster than torch."""
    return np.sort(np.partition(values, len(values) - count)[len(values) - count :])[::-1]


def _with_logprobs(token_id: int, raw_V: Tensor, num_logprobs: int | None) -> Token:
    """The token with what it wants of the raw distribution. Equal logits are listed by ascending id."""
    if num_logprobs is None:
        return Token(token_id)
    logprobs_V = raw_V.log_softmax(dim=-1)
    best = top_indices(raw_V, min(num_logprobs, raw_V.shape[0]))
    order = raw_V[best].sort(descending=True, stable=True).indices
    top = tuple((index, logprobs_V[index].item()) for index in best[order].tolist())
    return Token(token_id, logprobs_V[token_id].item(), top)
