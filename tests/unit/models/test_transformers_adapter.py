"""The adapter against plain transformers, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from packlight.core.errors import ModelError
from packlight.core.types import ModelSpec
from packlight.models.adapter import attend, load_transformers_model
from packlight.models.base import LanguageModel
from packlight.models.folder import ModelFolder, check_folder
from packlight.models.spec import load_spec
from tests.support.tiny_models import TINY_CONFIGS, VOCABULARY, DenseAttention, eager_model, write_model_folder

LENGTHS = (11, 1, 7)


def silent(_: str) -> None:
    pass


def load(folder: ModelFolder, *, dtype: str = "float32") -> LanguageModel:
    check_folder(folder.path)
    spec = load_spec(folder, name="tiny", dtype=dtype)
    return load_transformers_model(folder, spec, device="cpu", on_progress=silent)


def flat_batch(seed: int = 1) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    return sequences, torch.cat(sequences), torch.cat([torch.arange(length) for length in LENGTHS])


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return write_model_folder(tmp_path_factory.mktemp("llama"), eager_model("llama"))


@pytest.fixture
def broken_folder(llama_folder: ModelFolder, tmp_path: Path) -> ModelFolder:
    """A copy to break."""
    return ModelFolder(Path(shutil.copytree(llama_folder.path, tmp_path / "broken")), "broken")


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_flat_batch_equals_each_sequence_alone_in_eager_transformers(family: str, tmp_path: Path) -> None:
    eager = eager_model(family)
    model = load(write_model_folder(tmp_path / family, eager))
    sequences, tokens_T, positions_T = flat_batch()
    with torch.inference_mode():
        expected = torch.cat([eager(sequence[None]).logits[0] for sequence in sequences])
    logits = model.forward(tokens_T, positions_T, DenseAttention(LENGTHS), torch.arange(len(tokens_T)))
    assert expected.std() > 0.1, "the model must not answer the same to everything"
    assert (logits - expected).abs().max() < 1e-5


def test_windows_are_felt(tmp_path: Path) -> None:
    """The parity above would not notice a window that is ignored by both sides."""
    model = load(write_model_folder(tmp_path / "mistral", eager_model("mistral")))
    _, tokens_T, positions_T = flat_batch()

    class Unwindowed(DenseAttention):
        def attend(self, *args: Any, sliding_window: int | None, **kwargs: Any) -> torch.Tensor:
            return super().attend(*args, sliding_window=None, **kwargs)

    rows = torch.arange(len(tokens_T))
    apart = model.forward(tokens_T, positions_T, DenseAttention(LENGTHS), rows) - model.forward(
        tokens_T, positions_T, Unwindowed(LENGTHS), rows
    )
    assert apart[5:11].abs().max() > 1e-3
    assert apart[:5].abs().max() == 0


def test_only_the_wanted_rows_have_logits(llama_folder: ModelFolder) -> None:
    model = load(llama_folder)
    _, tokens_T, positions_T = flat_batch()
    everything = model.forward(tokens_T, positions_T, DenseAttention(LENGTHS), torch.arange(len(tokens_T)))
    some = model.forward(tokens_T, positions_T, DenseAttention(LENGTHS), torch.tensor([18, 3]))
    none = model.forward(tokens_T, positions_T, DenseAttention(LENGTHS), torch.tensor([], dtype=torch.int64))
    assert torch.allclose(some, everything[[18, 3]], atol=1e-6)
    assert none.shape == (0, VOCABULARY)


def test_computes_in_the_dtype_of_the_spec(llama_folder: ModelFolder) -> None:
    """The rows of two models in one process do not mix either: attention is stateless."""
    exact, rounded = load(llama_folder), load(llama_folder, dtype="bfloat16")
    seen: list[torch.dtype] = []

    class Watching(DenseAttention):
        def attend(self, layer: int, q_THD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(q_THD.dtype)
            return super().attend(layer, q_THD, *args, **kwargs)

    _, tokens_T, positions_T = flat_batch()
    rows = torch.arange(len(tokens_T))
    approximate = rounded.forward(tokens_T, positions_T, Watching(LENGTHS), rows)
    logits = exact.forward(tokens_T, positions_T, DenseAttention(LENGTHS), rows)
    assert set(seen) == {torch.bfloat16}
    assert approximate.dtype == torch.float32
    assert 0 < (approximate - logits).abs().max() < 0.1 * logits.abs().max()


def test_weights_are_not_random(llama_folder: ModelFolder) -> None:
    """Twice the same, whatever the seed."""
    _, tokens_T, positions_T = flat_batch()
    answers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        answers.append(load(llama_folder).forward(tokens_T, positions_T, DenseAttention(LENGTHS), torch.tensor([18])))
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_kv_heads": 4}, "layer 0 attends with q, k, v of"),
        ({"head_dim": 16}, "layer 0 attends with q, k, v of"),
        ({"num_layers": 2}, "2 were expected"),
        ({"vocab_size": VOCABULARY + 1}, "logits"),
        ({"sliding_windows": (None, 4, None)}, "attend with windows"),
    ],
)
def test_proof_at_load_catches_a_spec_that_lies(
    llama_folder: ModelFolder, change: dict[str, Any], sentence: str
) -> None:
    spec: ModelSpec = dataclasses.replace(load_spec(llama_folder, name="tiny", dtype="float32"), **change)
    with pytest.raises(ModelError, match=sentence) as caught:
        load_transformers_model(llama_folder, spec, device="cpu", on_progress=silent)
    assert str(llama_folder.path) in caught.value.message


def test_missing_weights_are_an_error_and_not_random_numbers(broken_folder: ModelFolder) -> None:
    weights = load_file(broken_folder.path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken_folder.path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing .* first model\.layers\.1\.mlp\.up_proj"):
        load(broken_folder)


def test_weights_of_another_shape_are_an_error(broken_folder: ModelFolder) -> None:
    weights = load_file(broken_folder.path / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, broken_folder.path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm"):
        load(broken_folder)


@pytest.mark.parametrize(
    ("family", "sentence"),
    [("no_such_model", "cannot load it"), ("bert", "has no|does not use|BertLMHeadModel|cannot")],
)
def test_families_that_transformers_cannot_serve(broken_folder: ModelFolder, family: str, sentence: str) -> None:
    path = broken_folder.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": family}))
    with pytest.raises(ModelError, match=sentence) as caught:
        load(broken_folder)
    assert str(broken_folder.path) in caught.value.message


@pytest.mark.parametrize(
    "extras", [{"s_aux": torch.zeros(2)}, {"softcap": 50.0}, {"attention_mask": torch.zeros(1, 1, 3, 3)}]
)
def test_attention_that_needs_more_than_q_k_and_v_is_refused(extras: dict[str, Any]) -> None:
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    q_1HTD, k_1KTD = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    mask = extras.pop("attention_mask", None)
    with pytest.raises(ModelError, match="more than q, k and v"):
        attend(module, q_1HTD, k_1KTD, k_1KTD, mask, packlight_batch=DenseAttention([3]), **extras)
