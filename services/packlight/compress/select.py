"""Choosing the tokens a layer keeps: written once, for every scorer and budget.

Shapes: W window rows, S keys up to the anchor, N = S - W prefix positions, K KV heads, D head dim.

What holds for every method holds here: the sinks and the window are kept; the rest goes by score, ties to the lower
index; indices ascend; a budget that covers the prompt is the identity; tokens generated after the anchor are kept; a
sliding-window layer keeps what its attention can see, which is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from packlight.compress.base import LayerView, Scorer, Selection
from packlight.compress.budget import Budget, keeps_all
from packlight.compress.recipes import BUDGETS, SCORERS, find_recipe
from packlight.compress.topk import top_indices
from packlight.compress.window import window_mass
from packlight.core.errors import InternalError
from packlight.core.types import PackSpec


def select(view: LayerView, spec: PackSpec, *, num_tokens: int, sliding_window: int | None = None) -> Selection:
    """The tokens that each KV head of the layer keeps, of the `num_tokens` >= S that exist.

    Tokens S .. num_tokens - 1 were generated in an earlier life of a resumed answer and are kept on top of the budget.
    Queries and keys are looked at only if something is to be dropped by score.
    Raises InternalError when the attention mass is not finite."""
    anchor = view.num_tokens
    assert num_tokens >= anchor > 0, (num_tokens, anchor)
    if sliding_window is not None:
        return _keep_from(max(0, num_tokens - sliding_window), num_tokens, view)
    if keeps_all(spec, anchor):
        return _keep_from(0, num_tokens, view)
    return _keep_best(view, spec, num_tokens)


def _keep_from(first: int, num_tokens: int, view: LayerView) -> Selection:
    index = torch.arange(first, num_tokens, device=view.k_KSD.device)
    return Selection((index,) * view.k_KSD.shape[0], retained_mass=1.0)


def _keep_best(view: LayerView, spec: PackSpec, num_tokens: int) -> Selection:
    window = view.q_WHD.shape[0]
    assert window == spec.window, f"{window} query rows, but the recipe's window is {spec.window}"
    num_prefix = view.num_tokens - window
    scorer, budget = _parts(spec)
    mass_KS = window_mass(view.q_WHD, view.k_KSD, view.scale, view.lse_WH)
    if not isfinite(mass_KS.sum().item()):
        raise InternalError(f"the attention of layer {view.layer} is not finite, so no token can be preferred")
    scores_KN = scorer.score(view, mass_KS, spec).clone()
    scores_KN[:, : spec.sinks] = torch.inf
    lengths = budget.allot(spec, view.num_tokens, view.site, scores_KN)
    prefix = [top_indices(row_N, length - window) for row_N, length in zip(scores_KN, lengths, strict=True)]
    rest = torch.arange(num_prefix, num_tokens, device=view.k_KSD.device)
    indices = tuple(torch.cat([index, rest]) for index in prefix)
    return Selection(indices, _retained(mass_KS, prefix, num_prefix))


def _parts(spec: PackSpec) -> tuple[Scorer, Budget]:
    recipe = find_recipe(spec.recipe)
    assert recipe.scorer and recipe.budget, recipe  # noqa: PT018 - one statement: what drops has both
    return SCORERS.load(recipe.scorer)(), BUDGETS.load(recipe.budget)()


def _retained(mass_KS: Tensor, prefix: Sequence[Tensor], num_prefix: int) -> float:
    kept_K = mass_KS[:, num_prefix:].sum(dim=1)
    kept_K += torch.stack([row_S[index].sum() for row_S, index in zip(mass_KS, prefix, strict=True)])
    return float((kept_K / mass_KS.sum(dim=1)).mean().clamp(max=1.0))
