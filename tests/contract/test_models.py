"""What every `LanguageModel` promises, for each way of computing one: transformers, plain torch, compiled kernels.

The measure is transformers' own eager attention in float32. In float32 a way must equal it to rounding; in bfloat16 it
must be no further from it than transformers' own bfloat16 is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from packlight.core.errors import ModelError
from packlight.core.types import ModelSpec
from packlight.models.adapter import load_transformers_model
from packlight.models.base import LanguageModel
from packlight.models.folder import ModelFolder, read_json
from packlight.models.fused.compiled import CompiledModel
from packlight.models.fused.load import load_fused_model
from packlight.models.fused.plain import PlainModel
from packlight.models.fused.shape import read_shape
from packlight.models.fused.weights import Checkpoint
from packlight.models.spec import load_spec
from tests.support.native import VARIANTS, open_variant
from tests.support.tiny_models import TINY_CONFIGS, VOCABULARY, DenseAttention, write_model_folder

LENGTHS = (11, 1, 7, 33)
ALL_ROWS = torch.arange(sum(LENGTHS))
FUSED_FAMILIES = ("llama", "qwen2", "qwen2-late-windows", "qwen3", "mistral")


def silent(_: str) -> None:
    pass


# ── the ways ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Way:
    name: str
    dtype: str
    build: Callable[[ModelFolder, ModelSpec], LanguageModel]

    def load(self, folder: ModelFolder) -> LanguageModel:
        return self.build(folder, load_spec(folder, name="tiny", dtype=self.dtype))


def by_transformers(folder: ModelFolder, spec: ModelSpec) -> LanguageModel:
    return load_transformers_model(folder, spec, device="cpu", on_progress=silent)


def plain(folder: ModelFolder, spec: ModelSpec) -> LanguageModel:
    shape = read_shape(read_json(folder.path / "config.json"))
    return PlainModel(Checkpoint(folder, shape, getattr(torch, spec.dtype), "cpu"), shape, spec, "cpu")


def compiled(variant: Any) -> Callable[[ModelFolder, ModelSpec], LanguageModel]:
    def build(folder: ModelFolder, spec: ModelSpec) -> LanguageModel:
        shape = read_shape(read_json(folder.path / "config.json"))
        return CompiledModel(Checkpoint(folder, shape, torch.bfloat16, "cpu"), shape, spec, open_variant(variant))

    return build


WAYS = [
    Way("transformers", "float32", by_transformers),
    Way("plain", "float32", plain),
    Way("plain-bf16", "bfloat16", plain),
    *(Way(variant.name, "bfloat16", compiled(variant)) for variant in VARIANTS),
]


@pytest.fixture(params=WAYS, ids=lambda way: way.name)
def way(request: pytest.FixtureRequest) -> Way:
    return request.param  # type: ignore[no-any-return]


# ── the models ───────────────────────────────────────────────────────────────────────────────────────────────────────

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FUSED_FAMILIES},
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-3.1-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "llama-odd-vocabulary": ("llama", {"vocab_size": VOCABULARY + 5}),
    "llama-eight-per-head": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1}),
}


@dataclass(frozen=True)
class Tiny:
    folder: ModelFolder
    expected_TV: Tensor
    rounding: float


@pytest.fixture(scope="module")
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random model, its logits in eager float32, and how far transformers' own bfloat16 is from them (rms)."""
    family, changes = MODELS[request.param]
    folder, eager = made(tmp_path_factory.mktemp(request.param), family, changes)
    sequences, tokens_T, positions_T = flat_batch()
    with torch.inference_mode():
        expected_TV = torch.cat([eager(sequence[None]).logits[0] for sequence in sequences])
    rounded = by_transformers(folder, load_spec(folder, name="tiny", dtype="bfloat16"))
    logits_TV = rounded.forward(tokens_T, positions_T, DenseAttention(LENGTHS), ALL_ROWS)
    return Tiny(folder, expected_TV, rms(logits_TV - expected_TV))


def made(folder: Path, family: str, changes: dict[str, Any]) -> tuple[ModelFolder, Any]:
    """Vectors are moved away from the ones and zeros they start as: a norm or bias left out must show."""
    config = TINY_CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(3)
    eager = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in eager.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return write_model_folder(folder, eager), eager


@pytest.fixture(scope="module")
def mistral_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return made(tmp_path_factory.mktemp("mistral"), "mistral", {})[0]


def flat_batch() -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    return sequences, torch.cat(sequences), torch.cat([torch.arange(length) for length in LENGTHS])


def rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


# ── the promises ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tiny", MODELS, indirect=True)
def test_flat_batch_equals_each_sequence_alone_in_eager_transformers(tiny: Tiny, way: Way) -> None:
    _, tokens_T, positions_T = flat_batch()
    logits_TV = way.load(tiny.folder).forward(tokens_T, positions_T, DenseAttention(LENGTHS), ALL_ROWS)
    apart = logits_TV - tiny.expected_TV
    assert logits_TV.dtype == torch.float32
    assert tiny.expected_TV.std() > 0.1, "the model must not answer the same to everything"
    if way.dtype == "float32":
        assert apart.abs().max() < 1e-5
    else:
        assert rms(apart) < 1.15 * tiny.rounding


def test_only_the_wanted_rows_have_logits(mistral_folder: ModelFolder, way: Way) -> None:
    model, (_, tokens_T, positions_T) = way.load(mistral_folder), flat_batch()
    everything = model.forward(tokens_T, positions_T, DenseAttention(LENGTHS), ALL_ROWS)
    some = model.forward(tokens_T, positions_T, DenseAttention(LENGTHS), torch.tensor([18, 3]))
    none = model.forward(tokens_T, positions_T, DenseAttention(LENGTHS), torch.tensor([], dtype=torch.int64))
    assert torch.allclose(some, everything[[18, 3]], atol=1e-5)
    assert none.shape == (0, VOCABULARY)


def test_attention_is_asked_once_per_layer_in_order(mistral_folder: ModelFolder, way: Way) -> None:
    model, (_, tokens_T, positions_T) = way.load(mistral_folder), flat_batch()
    asked: list[tuple[int, int | None, float]] = []

    class Watching(DenseAttention):
        def attend(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, **how: Any) -> Tensor:
            asked.append((layer, how["sliding_window"], how["scale"]))
            assert (q_THD.shape, k_TKD.shape, v_TKD.shape) == ((52, 4, 32), (52, 2, 32), (52, 2, 32))
            assert {q_THD.dtype, k_TKD.dtype, v_TKD.dtype} == {getattr(torch, way.dtype)}
            return super().attend(layer, q_THD, k_TKD, v_TKD, **how)

    model.forward(tokens_T, positions_T, Watching(LENGTHS), ALL_ROWS)
    assert asked == [(layer, 5, 32**-0.5) for layer in range(3)]


def test_what_attention_was_given_may_be_kept(mistral_folder: ModelFolder, way: Way) -> None:
    """Selection and shipping of a layer look at its tensors while the next layer computes."""
    model, (_, tokens_T, positions_T) = way.load(mistral_folder), flat_batch()
    kept: list[tuple[Tensor, Tensor]] = []

    class Keeping(DenseAttention):
        def attend(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, **how: Any) -> Tensor:
            kept.extend((tensor, tensor.clone()) for tensor in (q_THD, k_TKD, v_TKD))
            return super().attend(layer, q_THD, k_TKD, v_TKD, **how)

    model.forward(tokens_T, positions_T, Keeping(LENGTHS), ALL_ROWS)
    assert all(torch.equal(given, then) for given, then in kept)


def test_attention_may_answer_with_a_view(mistral_folder: ModelFolder, way: Way) -> None:
    model, (_, tokens_T, positions_T) = way.load(mistral_folder), flat_batch()

    class Strided(DenseAttention):
        def attend(self, *args: Any, **how: Any) -> Tensor:
            return super().attend(*args, **how).transpose(0, 1).contiguous().transpose(0, 1)

    straight = model.forward(tokens_T, positions_T, DenseAttention(LENGTHS), ALL_ROWS)
    assert torch.equal(model.forward(tokens_T, positions_T, Strided(LENGTHS), ALL_ROWS), straight)


def test_one_token_alone_is_what_it_is_in_a_batch(mistral_folder: ModelFolder, way: Way) -> None:
    """To rounding: products of other sizes add in another order."""
    model, (_, tokens_T, positions_T) = way.load(mistral_folder), flat_batch()
    together = model.forward(tokens_T, positions_T, DenseAttention(LENGTHS), ALL_ROWS)
    alone = model.forward(tokens_T[11:12], positions_T[11:12], DenseAttention([1]), torch.tensor([0]))
    assert rms(alone[0] - together[11]) < (1e-6 if way.dtype == "float32" else 0.03)


def test_threads_do_not_change_the_answer(mistral_folder: ModelFolder, way: Way) -> None:
    model, (_, tokens_T, positions_T) = way.load(mistral_folder), flat_batch()
    before, answers = torch.get_num_threads(), []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            answers.append(model.forward(tokens_T, positions_T, DenseAttention(LENGTHS), ALL_ROWS))
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(answers[0], answers[1], atol=1e-5 if way.dtype == "float32" else 0.05)


# ── who takes which model ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "lie",
    [{"num_kv_heads": 4}, {"head_dim": 16}, {"num_layers": 2}, {"vocab_size": 5}, {"sliding_windows": (None, 4, None)}],
    ids=lambda lie: next(iter(lie)),
)
def test_a_spec_that_lies_is_refused(mistral_folder: ModelFolder, lie: dict[str, Any]) -> None:
    """Pages were sized by it."""
    spec = replace(load_spec(mistral_folder, name="tiny", dtype="float32"), **lie)
    for load in (by_transformers, load_fused):
        with pytest.raises(ModelError):
            load(mistral_folder, spec)


def load_fused(folder: ModelFolder, spec: ModelSpec) -> LanguageModel | None:
    from packlight.core.config import Weights

    return load_fused_model(folder, spec, device="cpu", weights=Weights.NATIVE, on_progress=silent)
