"""Records what kvpress keeps, as a fixture that is replayed without it.

Runs in an environment of its own (see tests/fixtures/kvpress/README.md): kvpress excludes the transformers version that
Packlight uses. Knows kvpress and transformers. Imports nothing of Packlight, so that an oracle cannot agree by sharing
code.

Shapes: L layers, H query heads, K KV heads, S tokens, D head dim.

The kept indices are not asked of kvpress but read off its cache: every cached key is found among the exact keys, bit by
bit. Only Ada-KV, which masks instead of dropping, is read from the mask that its attention uses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from kvpress import AdaKVPress, ObservedAttentionPress, PyramidKVPress, SnapKVPress, StreamingLLMPress
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

FIXTURE = Path(__file__).parents[1] / "fixtures" / "kvpress"
SEED = 6
NUM_TOKENS = 300
WINDOW, KERNEL, BETA, NUM_SINKS = 32, 5, 2, 4
BUDGETS = (64, 150)
# Ada-KV's heads compete, and a window of 32 alone would satisfy its safeguard at these budgets.
ADA_WINDOW, SAFEGUARDS = 8, {"adakv": 0.2, "adakv_safe": 0.9}
# Random weights attend almost evenly, which would leave the ranking to rounding. One factor per KV head and its query
# heads, so that a sharp head competes with a flat one.
QK_FACTORS = (12.0, 8.0)
WITHOUT_THRESHOLD = ("streaming_llm", "adakv_safe")
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
# (layers, tokens, ratio dropped, window, beta): tapered, clipped at the prompt, and the fall-back to a uniform budget.
SCHEDULES = (
    (4, 300, 0.5, 16, 4),
    (4, 300, 0.5, 16, 20),
    (4, 300, 0.3, 16, 20),
    (4, 1000, 0.75, 16, 20),
    (8, 1000, 0.5, 16, 20),
    (8, 4096, 0.75, 32, 20),
    (8, 4096, 0.25, 32, 20),
    (30, 8192, 0.875, 32, 20),
    (32, 8192, 0.9, 32, 10),
    # Divide without a remainder, tapered and clipped, so that integer and real arithmetic agree.
    (5, 1000, 0.6, 16, 20),
    (5, 960, 0.5, 62, 8),
    (5, 1000, 0.4, 20, 20),
)


@dataclass
class Run:
    """One forward pass: what rotary embedding made of every layer's queries and keys, and what the cache held after."""

    q_HSD: list[Tensor] = field(default_factory=list)
    k_KSD: list[Tensor] = field(default_factory=list)
    cached_KND: list[Tensor] = field(default_factory=list)


def main() -> None:
    torch.manual_seed(SEED)
    ids = torch.randint(0, SHAPE["vocab_size"], (1, NUM_TOKENS))
    exact = forward(build_model("sdpa"), ids)
    arrays = {"q_LHSD": torch.stack(exact.q_HSD).numpy(), "k_LKSD": torch.stack(exact.k_KSD).numpy()}
    cases = [record(*row, exact, ids, arrays) for row in all_presses()]
    facts = {
        "made_by": "tests/oracles/record_kvpress.py",
        "versions": {name: version(name) for name in ("kvpress", "torch", "transformers", "numpy")},
        "model": {"class": "LlamaForCausalLM", **SHAPE, "qk_factors": QK_FACTORS, "seed": SEED, "dtype": "float32"},
        "num_tokens": NUM_TOKENS,
        "cases": cases,
        "pyramid_schedules": [schedule(*row) for row in SCHEDULES],
    }
    np.savez_compressed(FIXTURE / "llama4.npz", **arrays)
    (FIXTURE / "llama4.json").write_text(as_json(facts))


def as_json(facts: dict[str, Any]) -> str:
    """One line per fact, and per row of a list of rows."""
    lines = []
    for key, value in facts.items():
        rows = isinstance(value, list)
        text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]" if rows else json.dumps(value)
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def build_model(attention: str) -> LlamaForCausalLM:
    """The same weights for every attention implementation."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation=attention)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                heads = projection.weight.unflatten(0, (len(QK_FACTORS), -1))
                heads.mul_(torch.tensor(QK_FACTORS)[:, None, None])
    return model


def all_presses() -> Iterator[tuple[str, int, Any]]:
    """Method, budget in tokens (window included) and press of everything that is run."""
    for budget in BUDGETS:
        # The half token keeps int(S * (1 - ratio)) at the budget whatever the rounding.
        ratio = 1 - (budget + 0.5) / NUM_TOKENS
        yield "snapkv", budget, SnapKVPress(ratio, WINDOW, KERNEL)
        yield "streaming_llm", budget, StreamingLLMPress(ratio, NUM_SINKS)
        yield "observed", budget, ObservedAttentionPress(ratio)
        yield "pyramidkv", budget, PyramidKVPress(ratio, WINDOW, KERNEL, BETA)
        for name, share in SAFEGUARDS.items():
            yield name, budget, AdaKVPress(SnapKVPress(ratio, ADA_WINDOW, KERNEL), share)


def record(
    method: str, budget: int, press: Any, exact: Run, ids: Tensor, arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Adds the case's kept mask [L, K, S] and, once per method, its scores; returns its row of the description."""
    attention = "eager" if method == "observed" else "sdpa"
    model = build_model(attention)
    with scores_of(press) as scores_KS, press(model):
        run = forward(model, ids)
    pairs = zip(run.k_KSD + run.q_HSD, exact.k_KSD + exact.q_HSD, strict=True)
    drift = max(float((a - b).abs().max()) for a, b in pairs)
    assert drift < 1e-4, f"{press}: the {attention} attention moved queries or keys by {drift}"
    kept_LKS = unmasked(model) if method in SAFEGUARDS else cached(run)
    scores_LKS = torch.stack(scores_KS).numpy()
    arrays[f"kept_{method}_{budget}"] = kept_LKS
    if method in ("snapkv", "observed"):
        arrays.setdefault(f"scores_{method}", scores_LKS)
    gap = margin(scores_LKS, kept_LKS, per_layer=method in SAFEGUARDS)
    return {
        "method": method,
        "budget": budget,
        "call": repr(press),
        "attention": attention,
        "drift": drift,
        "margin": None if method in WITHOUT_THRESHOLD else gap,
    }


@contextmanager
def scores_of(press: Any) -> Iterator[list[Tensor]]:
    """What the press scores each token of each layer [K, S], in the order of layers."""
    scorer, seen = getattr(press, "press", press), []
    original = scorer.score

    def score(*args: Any) -> Tensor:
        scores_1KS = original(*args)
        seen.append(scores_1KS[0].clone())
        return scores_1KS

    scorer.score = score
    try:
        yield seen
    finally:
        del scorer.score


@torch.no_grad()
def forward(model: LlamaForCausalLM, ids: Tensor) -> Run:
    """One pass over the prompt, with the rotary embedding's results looked at."""
    run, cache, rotate = Run(), DynamicCache(), modeling_llama.apply_rotary_pos_emb

    def watched(q_1HSD: Tensor, k_1KSD: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q_1HSD, k_1KSD = rotate(q_1HSD, k_1KSD, *args, **kwargs)
        run.q_HSD.append(q_1HSD[0].clone())
        run.k_KSD.append(k_1KSD[0].clone())
        return q_1HSD, k_1KSD

    modeling_llama.apply_rotary_pos_emb = watched
    try:
        model(ids, past_key_values=cache)
    finally:
        modeling_llama.apply_rotary_pos_emb = rotate
    run.cached_KND.extend(layer.keys[0] for layer in cache.layers)
    return run


def cached(run: Run) -> np.ndarray:
    """Kept mask [L, K, S]: each cached key is the one exact key that it equals in every bit."""
    kept_LKS = np.zeros((len(run.k_KSD), *run.k_KSD[0].shape[:2]), dtype=bool)
    for layer, (k_KSD, cached_KND) in enumerate(zip(run.k_KSD, run.cached_KND, strict=True)):
        for head, (k_SD, cached_ND) in enumerate(zip(k_KSD, cached_KND, strict=True)):
            equal_NS = (cached_ND[:, None] == k_SD[None]).all(dim=-1)
            assert (equal_NS.sum(dim=1) == 1).all(), "a cached key is not exactly one of the exact keys"
            kept_LKS[layer, head] = equal_NS.any(dim=0).numpy()
            assert kept_LKS[layer, head].sum() == len(cached_ND)
    return kept_LKS


def unmasked(model: LlamaForCausalLM) -> np.ndarray:
    """Kept mask [L, K, S] of Ada-KV: all but the keys that its attention replaces."""
    kept_LKS = np.ones((SHAPE["num_hidden_layers"], SHAPE["num_key_value_heads"], NUM_TOKENS), dtype=bool)
    for layer, block in enumerate(model.model.layers):
        _, heads, tokens = block.self_attn.masked_key_indices
        kept_LKS[layer, heads, tokens] = False
    return kept_LKS


def margin(scores_LKS: np.ndarray, kept_LKS: np.ndarray, *, per_layer: bool) -> float:
    """The least relative gap between the worst kept and the best dropped score: how far the choice is from a tie.

    Within each head, or within each layer for a method whose heads compete."""
    ranked = (len(scores_LKS), -1) if per_layer else (-1, scores_LKS.shape[-1])
    gaps = []
    for scores_N, kept_N in zip(scores_LKS.reshape(ranked), kept_LKS.reshape(ranked), strict=True):
        worst, best = scores_N[kept_N].min(), scores_N[~kept_N].max()
        gaps.append(float((worst - best) / worst))
    return min(gaps)


def schedule(num_layers: int, num_tokens: int, ratio: float, window: int, beta: int) -> dict[str, Any]:
    """PyramidKV's budgets, window included, of every layer."""
    press = PyramidKVPress(compression_ratio=ratio, window_size=window, beta=beta)
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": num_layers})
    modules = [SimpleNamespace(config=config, layer_idx=layer) for layer in range(num_layers)]
    return {
        "call": f"{press}.get_layer_budget(module, {num_tokens})",
        "num_layers": num_layers,
        "num_tokens": num_tokens,
        "ratio": ratio,
        "window": window,
        "beta": beta,
        "budgets": [press.get_layer_budget(module, num_tokens) for module in modules],
    }


if __name__ == "__main__":
    main()
