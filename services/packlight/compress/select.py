"""Choosing the tokens a layer keeps: written once, for every scorer and budget.

Shapes: W window rows, S keys up to the anchor, N = S - W prefix positions, K KV heads, D head dim.

What holds for every method holds here: the sinks and the window are kept; the rest goes by score, ties to the lower
index; indices ascend; a budget that covers the prompt is the identity; tokens generated after the anchor are kept; a
sliding-window layer keeps what its attention can see, which is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite

import torch
from torch import Tensor

from packlight.compress.base import Candidates, LayerBudget, LayerView, ModelBudget, Scorer, Selection
from packlight.compress.budget import keeps_all
from packlight.compress.coverage import pending_share, retained_share, tokens_for_share
from packlight.compress.parts import BUDGETS, SCORERS
from packlight.compress.recipes import find_recipe
from packlight.compress.topk import top_indices, top_of_rows
from packlight.compress.window import WindowAttention, attention_given
from packlight.core.errors import InternalError
from packlight.core.types import PackSpec


class Selector:
    """The selections of one request. Layers are added in order, as they are computed, and come out in order.

    A budget that divides tokens among layers answers for all of them when the last one is added; until then their
    scores wait here, 8 bytes per token and KV head."""

    def __init__(self, spec: PackSpec, *, num_prompt_tokens: int, num_tokens: int, reads_late: bool = False) -> None:
        """Tokens `num_prompt_tokens .. num_tokens - 1` were generated in an earlier life of a resumed answer and are
        kept on top of the budget.

        With `reads_late` no layer waits for the device, unless its lengths depend on scores or there is a mass floor:
        whether attention was finite, and what was retained, is told by `read_masses` in the end."""
        assert num_tokens >= num_prompt_tokens > 0, (num_tokens, num_prompt_tokens)
        self._spec, self._anchor, self._num_tokens, self._reads_late = spec, num_prompt_tokens, num_tokens, reads_late
        self._recipe = find_recipe(spec.recipe)
        self._waiting: list[tuple[int, Selection | Candidates]] = []

    def scores(self, sliding_window: int | None = None) -> bool:
        """Whether a layer's queries and keys decide what it keeps."""
        return sliding_window is None and not keeps_all(self._spec, self._anchor)

    @property
    def looks_at_keys(self) -> bool:
        """Whether scoring needs the keys where the window's attention is known."""
        return self._recipe.looks_at_keys

    def add(self, view: LayerView, sliding_window: int | None = None) -> list[tuple[int, Selection]]:
        """The layers that can be packed now, with what each of their KV heads keeps.

        Queries and keys are looked at only if they decide: `scores`.
        Raises InternalError when the attention mass is not finite, as far as that is read here."""
        assert view.num_tokens == self._anchor, (view.num_tokens, self._anchor)
        found = self._find(view, sliding_window)
        if isinstance(found, Selection) and not self._waiting:
            return [(view.layer, found)]
        self._waiting.append((view.layer, found))
        return self.finish() if view.layer == view.num_layers - 1 else []

    def finish(self) -> list[tuple[int, Selection]]:
        """The layers that still wait, as if there were no others."""
        scored = [found for _, found in self._waiting if isinstance(found, Candidates)]
        divided = iter(self._divide(scored))
        ready = [(layer, next(divided) if isinstance(found, Candidates) else found) for layer, found in self._waiting]
        self._waiting = []
        return ready

    def _find(self, view: LayerView, sliding_window: int | None) -> Selection | Candidates:
        """The layer's selection, or only its scores if its length depends on other layers."""
        if not self.scores(sliding_window):
            return self._all_from(max(0, self._num_tokens - (sliding_window or self._num_tokens)), view)
        candidates = rate(view, self._spec, reads_late=self._reads_late)
        return candidates if self._recipe.divides_layers else self._best(candidates)

    def _all_from(self, first: int, view: LayerView) -> Selection:
        index = torch.arange(first, self._num_tokens, device=view.k_KSD.device)
        return Selection((index,) * view.k_KSD.shape[0], retained_mass=1.0)

    def _best(self, candidates: Candidates) -> Selection:
        assert self._recipe.budget is not None
        budget: LayerBudget = BUDGETS.load(self._recipe.budget)()
        return self._keep(candidates, budget.allot(self._spec, candidates))

    def _keep(self, candidates: Candidates, lengths: Sequence[int]) -> Selection:
        return keep(candidates, lengths, self._spec, self._num_tokens, reads_late=self._reads_late)

    def _divide(self, layers: Sequence[Candidates]) -> list[Selection]:
        if not layers:
            return []
        assert self._recipe.budget is not None
        budget: ModelBudget = BUDGETS.load(self._recipe.budget)()
        lengths = budget.divide(self._spec, layers)
        pairs = zip(layers, lengths, strict=True)
        return [self._keep(candidates, lengths_K) for candidates, lengths_K in pairs]


def select(view: LayerView, spec: PackSpec, *, num_tokens: int, sliding_window: int | None = None) -> Selection:
    """What one layer keeps, of the `num_tokens` >= S that exist: see `Selector`. It competes with no other layer."""
    selector = Selector(spec, num_prompt_tokens=view.num_tokens, num_tokens=num_tokens)
    [(_, selection)] = selector.add(view, sliding_window) or selector.finish()
    return selection


def rate(view: LayerView, spec: PackSpec, *, reads_late: bool = False) -> Candidates:
    """The layer's scores. Raises InternalError when its attention is not finite, unless that is read later."""
    window = view.q_WHD.shape[0]
    assert window == spec.window, f"{window} query rows, but the recipe's window is {spec.window}"
    name = find_recipe(spec.recipe).scorer
    assert name is not None, "a recipe that drops tokens has a scorer"
    scorer: Scorer = SCORERS.load(name)()
    mass_KS, lse_WH = _attention(view)
    # A sum shows every NaN and infinity of its terms.
    if not reads_late and not isfinite(mass_KS.sum().item()):
        raise _not_finite(view.layer)
    scored = scorer.score(replace(view, lse_WH=lse_WH), mass_KS, spec)
    scores_KN = scored.scores_KN.clone()
    scores_KN[:, : spec.sinks] = torch.inf
    return Candidates(view.site, view.num_tokens, scores_KN, mass_KS, scored.layer_weight)


def _attention(view: LayerView) -> WindowAttention:
    """What the window attends to: as it is known, else in one pass over the keys."""
    if view.mass_KS is not None and view.lse_WH is not None:
        return WindowAttention(view.mass_KS, view.lse_WH)
    return attention_given(view.q_WHD, view.k_KSD, view.scale, view.lse_WH)


def keep(
    candidates: Candidates, lengths: Sequence[int], spec: PackSpec, num_tokens: int, *, reads_late: bool = False
) -> Selection:
    """The best `lengths[k]` tokens of each KV head, window included; more of them if the mass floor asks for it."""
    choose = _keep_late if reads_late else _keep
    selection = choose(candidates, lengths, num_tokens)
    # A floor has to know what is retained: with one, every layer waits for the device.
    if spec.mass_floor == 0 or _mass_of(candidates, selection) >= spec.mass_floor:
        return selection
    needed = tokens_for_share(candidates, spec.mass_floor)
    longer = [max(pair) for pair in zip(lengths, needed, strict=True)]
    grown = replace(choose(candidates, longer, num_tokens), num_grown=sum(longer) - sum(lengths))
    # The same sum in another order may fall short of the floor by its last bit.
    return replace(grown, retained_mass=max(_mass_of(candidates, grown), spec.mass_floor))


def read_masses(masses: Sequence[tuple[int, float | Tensor]]) -> list[float]:
    """The retained mass of each (layer, retained mass). Waits for the device at most once.

    Raises InternalError for the first layer whose attention was not finite."""
    pending = [mass for _, mass in masses if isinstance(mass, Tensor)]
    arrived = iter(torch.stack(pending).tolist() if pending else ())
    read = [next(arrived) if isinstance(mass, Tensor) else mass for _, mass in masses]
    for (layer, _), mass in zip(masses, read, strict=True):
        if not isfinite(mass):
            raise _not_finite(layer)
    return read


def _not_finite(layer: int) -> InternalError:
    return InternalError(f"the attention of layer {layer} is not finite, so no token can be preferred")


def _mass_of(candidates: Candidates, selection: Selection) -> float:
    return read_masses([(candidates.site.layer, selection.retained_mass)])[0]


def _keep(candidates: Candidates, lengths: Sequence[int], num_tokens: int) -> Selection:
    rows = zip(candidates.scores_KN, lengths, strict=True)
    prefix = [top_indices(row_N, length - candidates.window) for row_N, length in rows]
    rest = _rest(candidates, num_tokens)
    return Selection(tuple(torch.cat([index, rest]) for index in prefix), retained_share(candidates, prefix))


def _keep_late(candidates: Candidates, lengths: Sequence[int], num_tokens: int) -> Selection:
    """The same without waiting for the device; all heads at once where they keep alike."""
    scores_KN, window, rest = candidates.scores_KN, candidates.window, _rest(candidates, num_tokens)
    if len(set(lengths)) == 1:
        prefix_KX = top_of_rows(scores_KN, lengths[0] - window)
        indices = torch.cat([prefix_KX, rest.expand(len(prefix_KX), -1)], dim=1).unbind()
        return Selection(indices, pending_share(candidates, prefix_KX))
    rows = zip(scores_KN, lengths, strict=True)
    prefix = [top_of_rows(row_N[None], length - window)[0] for row_N, length in rows]
    return Selection(tuple(torch.cat([index, rest]) for index in prefix), pending_share(candidates, prefix))


def _rest(candidates: Candidates, num_tokens: int) -> Tensor:
    """The window and what was generated since: always kept."""
    return torch.arange(candidates.num_prefix, num_tokens, device=candidates.scores_KN.device)
