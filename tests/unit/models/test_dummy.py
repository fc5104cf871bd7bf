"""Dummy models: real shapes, drawn weights, a tokenizer that reads bytes and spells every answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from packlight.core.config import ModelConfig, Weights
from packlight.core.errors import ModelError
from packlight.models.base import load_model
from packlight.models.dummy import shape_names
from packlight.models.dummy_tensors import DummyParameter, dummy_tensor
from packlight.models.folder import ModelFolder
from packlight.models.opened import OpenedModel, open_model
from tests.support.tiny_models import DenseAttention

TINY = {
    "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
TINY_MOE = TINY | {
    "model_type": "qwen3_moe", "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False,
}  # fmt: skip


def folder_of(model: OpenedModel) -> ModelFolder:
    assert model.folder is not None
    return model.folder


def opened(path: str, cache: Path) -> OpenedModel:
    config = ModelConfig(path=path, weights=Weights.DUMMY, dtype="float32", cache_dir=str(cache))
    return open_model(config, on_progress=lambda line: None)


@pytest.fixture(params=[TINY, TINY_MOE], ids=["fused", "transformers"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "shape"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(request.param))
    return path


@pytest.mark.parametrize(
    ("name", "num_layers", "kv_heads", "vocabulary"),
    [("llama-3.1-8b", 32, 8, 128256), ("qwen3-8b", 36, 8, 151936), ("qwen3-30b-a3b", 48, 4, 151936)],
)
def test_shapes_that_come_with_the_package(
    name: str, num_layers: int, kv_heads: int, vocabulary: int, tmp_path: Path
) -> None:
    model = opened(name, tmp_path)
    spec = model.spec
    assert (spec.name, spec.num_layers, spec.num_kv_heads, spec.head_dim) == (name, num_layers, kv_heads, 128)
    assert (spec.vocab_size, spec.eos_token_ids) == (vocabulary, (vocabulary - 1,))
    assert name in shape_names()


def test_text_is_bytes_and_every_answer_is_text(folder: Path, tmp_path: Path) -> None:
    tokenizer = opened(str(folder), tmp_path).tokenizer
    tokens = tokenizer.encode("Größe 1\n")
    assert len(tokens) == len("Größe 1\n".encode())
    assert tokenizer.decode(tokens) == "Größe 1\n"
    spelled = [tokenizer.token_bytes(token) for token in range(256, 299)]
    assert all(word.startswith(b" ") and len(word) > 2 for word in spelled)
    assert len(set(spelled)) == len(spelled)
    assert tokenizer.is_special(299)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == tokenizer.encode(
        "user: hi\nassistant: "
    )


def test_it_is_made_once_and_known_by_what_it_is_made_from(folder: Path, tmp_path: Path) -> None:
    first = opened(str(folder), tmp_path)
    made_at = (folder_of(first).path / "tokenizer.json").stat().st_mtime_ns
    again = opened(str(folder), tmp_path)
    assert again.spec == first.spec
    assert (folder_of(again).path / "tokenizer.json").stat().st_mtime_ns == made_at
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert opened(str(folder), tmp_path).spec.fingerprint != first.spec.fingerprint


def test_two_loads_compute_the_same_finite_numbers(folder: Path, tmp_path: Path) -> None:
    """As a prefill and a decode worker do, in different processes."""
    model = opened(str(folder), tmp_path)
    tokens_T = torch.tensor([1, 2, 3, 250, 7])
    logits = [
        load_model(
            folder_of(model), model.spec, device="cpu", weights=Weights.DUMMY, on_progress=lambda line: None
        ).forward(tokens_T, torch.arange(5), DenseAttention([5]), torch.tensor([4]))
        for _ in range(2)
    ]
    assert logits[0].shape == (1, 300)
    assert torch.isfinite(logits[0]).all()
    assert logits[0].std() > 0
    assert torch.equal(*logits)


def test_numbers_depend_on_the_name_alone() -> None:
    one = dummy_tensor("a.weight", (8, 8), torch.float32, "cpu")
    assert torch.equal(one, dummy_tensor("a.weight", (8, 8), torch.float32, "cpu"))
    assert not torch.equal(one, dummy_tensor("b.weight", (8, 8), torch.float32, "cpu"))
    assert dummy_tensor("a_norm.weight", (4,), torch.float32, "cpu").tolist() == [1.0] * 4
    assert dummy_tensor("a.bias", (4,), torch.float32, "cpu").tolist() == [0.0] * 4


def test_a_name_that_is_neither(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'llama'.*llama-3.1-8b, qwen3-30b-a3b, qwen3-8b"):
        opened("llama", tmp_path)


@pytest.mark.parametrize(
    "shape", [(5000, 300), (3, 700, 900), (2, 3, 40)], ids=["rows of many blocks", "a block a row", "one block"]
)
def test_a_part_of_a_parameter_is_a_part_of_the_whole(shape: tuple[int, ...]) -> None:
    whole = dummy_tensor("a.weight", shape, torch.float32, "cpu")
    parameter = DummyParameter("a.weight", shape, torch.float32, "cpu")
    assert parameter.get_shape() == list(whole.shape)
    for dim, size in enumerate(shape):
        for start, end in ((0, size // 2), (size // 2, size), (size // 3, size - 1), (size, size)):
            index = tuple(slice(start, end) if dim == other else slice(0, shape[other]) for other in range(len(shape)))
            assert torch.equal(parameter[index], whole[index])
    first, last = whole[0].flatten(), whole[-1].flatten()
    assert abs(float(torch.corrcoef(torch.stack([first, last]))[0, 1])) < 0.5, "blocks repeat each other"
