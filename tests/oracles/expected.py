"""What each recipe of the table should keep of a prompt, by the references: one function per recipe.

This is where Packlight's own decisions meet the papers, and each difference is written out: the sinks and the window
are forced, they are inside the budget, and what a paper leaves to chance (ties, rounding) is decided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from packlight.compress.recipes import param_of
from packlight.core.types import PackSpec
from tests.oracles import adakv, cake, h2o, mass, plain, pyramidkv, rocketkv, snapkv, streaming_llm
from tests.oracles.plain import Vector

# Further from a near-tie than fp32 can blur.
DECIDED = 2e-5


class NearTie(Exception):
    """Rounding could turn the choice, so this input says nothing. It must be replaced, not the comparison loosened."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """The exact queries [S, H, D] and keys [K, S, D] of every layer. Remembers what was slow to work out."""

    q_LSHD: list[Tensor]
    k_LKSD: list[Tensor]
    scale: float
    _known: dict[object, Any] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        return len(self.k_LKSD)

    @property
    def num_tokens(self) -> int:
        return self.k_LKSD[0].shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k_LKSD[0].shape[0]

    def weights(self, layer: int, window: int) -> list[list[Vector]]:
        """[H][W][S]."""
        return self._once((layer, window), lambda: self._attention(layer, window))

    def accumulated(self, layer: int) -> list[Vector]:
        """[K][S]."""
        return self._once(layer, lambda: h2o.accumulated(self._attention(layer, self.num_tokens), self.num_kv_heads))

    def wants(self, layer: int, window: int) -> tuple[float, float]:
        """CAKE's dispersion and shift."""
        return self._once(("wants", layer, window), lambda: cake.dispersion_and_shift(self.weights(layer, window)))

    def indicator(self, layer: int, window: int, gamma: float, kernel: int) -> list[Vector]:
        """CAKE's scores [K][N]."""
        return self._once(
            ("indicator", layer, window, gamma, kernel),
            lambda: cake.indicator(self.weights(layer, window), self.num_kv_heads, gamma, kernel),
        )

    def _once(self, key: object, work_out: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = work_out()
        return self._known[key]

    def _attention(self, layer: int, num_rows: int) -> list[list[Vector]]:
        return plain.causal_weights(self.q_LSHD[layer][-num_rows:], self.k_LKSD[layer], self.scale)


Kept = list[list[list[int]]]  # [layer][KV head][token], ascending


def streaming_kept(prompt: Prompt, spec: PackSpec) -> Kept:
    tokens = streaming_llm.kept(prompt.num_tokens, budget_of(spec), spec.sinks)
    return [[tokens] * prompt.num_kv_heads] * prompt.num_layers


def h2o_kept(prompt: Prompt, spec: PackSpec) -> Kept:
    return _h2o(prompt, spec, [budget_of(spec)] * prompt.num_layers)


def h2o_pyramid_kept(prompt: Prompt, spec: PackSpec) -> Kept:
    return _h2o(prompt, spec, _pyramid(prompt, spec))


def snapkv_kept(prompt: Prompt, spec: PackSpec) -> Kept:
    return _by_window(prompt, spec, [[budget_of(spec)] * prompt.num_kv_heads] * prompt.num_layers)


def pyramidkv_kept(prompt: Prompt, spec: PackSpec) -> Kept:
    return _by_window(prompt, spec, [[length] * prompt.num_kv_heads for length in _pyramid(prompt, spec)])


def adakv_kept(prompt: Prompt, spec: PackSpec) -> Kept:
    base, alpha = budget_of(spec) - spec.window, param_of(spec, "alpha")
    lengths = []
    for layer in range(prompt.num_layers):
        scores_KN = [_with_sinks(scores_N, spec) for scores_N in window_scores(prompt, spec, layer)]
        _check_decided([score for scores_N in scores_KN for score in scores_N], base * prompt.num_kv_heads)
        lengths.append([count + spec.window for count in adakv.conserving(scores_KN, base, alpha)])
    return _by_window(prompt, spec, lengths)


def cake_kept(prompt: Prompt, spec: PackSpec) -> Kept:
    """Every layer has its sinks and one token more, whatever its preference."""
    taus = param_of(spec, "tau1"), param_of(spec, "tau2")
    preferences = [cake.preference(*prompt.wants(layer, spec.window), *taus) for layer in range(prompt.num_layers)]
    shares = cake.allocate(preferences, prompt.num_tokens - spec.window, budget_of(spec) - spec.window, spec.sinks + 1)
    kernel, gamma = spec.kernel or 5, param_of(spec, "gamma")
    kept = []
    for layer, share in enumerate(shares):
        scores_KN = prompt.indicator(layer, spec.window, gamma, kernel)
        kept.append([_choose(scores_N, prompt, spec, share + spec.window) for scores_N in scores_KN])
    return kept


def rocketkv_kept(prompt: Prompt, spec: PackSpec) -> Kept:
    head_dim = prompt.k_LKSD[0].shape[2]
    stage1 = rocketkv.split(prompt.num_tokens, budget_of(spec), num_new=0, head_dim=head_dim)
    return _by_window(prompt, spec, [[stage1.cap] * prompt.num_kv_heads] * prompt.num_layers)


def mass_kept(prompt: Prompt, spec: PackSpec) -> Kept:
    """The budget, if one is asked for, is an upper bound; one token besides sinks and window is the least."""
    target, least, lengths = param_of(spec, "target"), spec.sinks + spec.window + 1, []
    most = prompt.num_tokens if spec.budget_tokens is None else spec.budget_tokens
    for layer in range(prompt.num_layers):
        pairs = zip(window_scores(prompt, spec, layer), window_mass(prompt, spec, layer), strict=True)
        wanted = [mass.least(scores_N, mass_S, target, spec.sinks) for scores_N, mass_S in pairs]
        lengths.append([min(max(num, least), most) for num in wanted])
    return _by_window(prompt, spec, lengths)


EXPECTED: Mapping[str, Callable[[Prompt, PackSpec], Kept]] = MappingProxyType(
    {
        "streaming_llm": streaming_kept,
        "h2o": h2o_kept,
        "h2o_pyramid": h2o_pyramid_kept,
        "snapkv": snapkv_kept,
        "pyramidkv": pyramidkv_kept,
        "adakv": adakv_kept,
        "cake": cake_kept,
        "rocketkv": rocketkv_kept,
        "rocketkv_mt": rocketkv_kept,
        "mass": mass_kept,
    }
)


def budget_of(spec: PackSpec) -> int:
    assert spec.budget_tokens is not None
    return spec.budget_tokens


def budget_near(recipe: str, prompt: Prompt, spec: PackSpec) -> tuple[PackSpec, Kept]:
    """The first budget from the spec's on that is not nearly tied anywhere, and what should be kept under it."""
    for extra in range(16):
        decided = replace(spec, budget_tokens=budget_of(spec) + extra)
        try:
            return decided, EXPECTED[recipe](prompt, decided)
        except NearTie:
            continue
    raise AssertionError(f"{recipe} has no budget near {spec.budget_tokens} that rounding could not turn")


def window_scores(prompt: Prompt, spec: PackSpec, layer: int) -> list[Vector]:
    """Group sum, then pooling."""
    assert spec.kernel is not None
    weights_HWS = prompt.weights(layer, spec.window)
    return snapkv.scores(weights_HWS, prompt.num_kv_heads, kernel=spec.kernel, pooling=spec.pooling.value)


def window_mass(prompt: Prompt, spec: PackSpec, layer: int) -> list[Vector]:
    """[K][S]."""
    per_head = [plain.add_up(rows) for rows in prompt.weights(layer, spec.window)]
    return [plain.add_up(group) for group in plain.groups(per_head, prompt.num_kv_heads)]


def _pyramid(prompt: Prompt, spec: PackSpec) -> list[int]:
    """No layer is left without room for one scored token."""
    beta = int(param_of(spec, "beta"))
    official = pyramidkv.official(prompt.num_tokens, budget_of(spec), spec.window, prompt.num_layers, beta)
    return [max(length, spec.sinks + spec.window + 1) for length in official]


def _h2o(prompt: Prompt, spec: PackSpec, budgets: list[int]) -> Kept:
    """The most recent tokens are a share of the layer's budget: at least the window, and room is left for the sinks."""
    kept = []
    for layer, budget in enumerate(budgets):
        recent = max(spec.window, min(int(param_of(spec, "recent") * budget), budget - spec.sinks))
        scores_KS = prompt.accumulated(layer)
        for scores_S in scores_KS:
            _check_decided(scores_S[spec.sinks : len(scores_S) - recent], budget - recent - spec.sinks)
        kept.append([h2o.kept(scores_S, budget, recent, spec.sinks) for scores_S in scores_KS])
    return kept


def _by_window(prompt: Prompt, spec: PackSpec, lengths: list[list[int]]) -> Kept:
    kept = []
    for layer, lengths_K in enumerate(lengths):
        pairs = zip(window_scores(prompt, spec, layer), lengths_K, strict=True)
        kept.append([_choose(scores_N, prompt, spec, length) for scores_N, length in pairs])
    return kept


def _choose(scores_N: Vector, prompt: Prompt, spec: PackSpec, length: int) -> list[int]:
    _check_decided(scores_N[spec.sinks :], length - spec.window - spec.sinks)
    return plain.kept(scores_N, prompt.num_tokens, length, spec.sinks)


def _with_sinks(scores_N: Vector, spec: PackSpec) -> Vector:
    return [float("inf")] * spec.sinks + scores_N[spec.sinks :]


def _check_decided(scores_N: Vector, count: int) -> None:
    if 0 < count < len(scores_N) and plain.margin(scores_N, count) < DECIDED:
        raise NearTie
