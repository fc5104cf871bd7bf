"""Tiny random models for tests: folders, GGUF files, and attention written the obvious way.

Everything here is made by transformers, `tokenizers` and `gguf` themselves, never by the code under test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from packlight.core.config import DType, ModelConfig
from packlight.core.workers import Role
from packlight.engine.build import build_model
from packlight.models.base import LanguageModel
from packlight.models.folder import ModelFolder
from packlight.models.opened import open_model
from packlight.models.source import resolve

VOCABULARY = 288
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SLIDE_TWO = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def _config(name: str, **changes: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**(_COMMON | changes))


TINY_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": _config("LlamaConfig", tie_word_embeddings=True),
    "qwen2": _config("Qwen2Config", head_dim=16),
    "qwen2-late-windows": _config(
        "Qwen2Config", head_dim=16, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": _config("Qwen3Config"),
    "mistral": _config("MistralConfig", sliding_window=5),
    "gemma3": _config("Gemma3TextConfig", query_pre_attn_scalar=32, **_SLIDE_TWO),
    "qwen3-moe": _config("Qwen3MoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "mixtral": _config("MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
}


class DenseAttention:
    """An attention sink that follows the definition: every sequence alone, all scores, a mask, in float32.

    `lengths` are those of the sequences that lie one after the other in the flat batch."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = list(lengths)

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        num_groups = q_THD.shape[1] // k_TKD.shape[1]
        k_THD, v_THD = (tensor.float().repeat_interleave(num_groups, dim=1) for tensor in (k_TKD, v_TKD))
        sequences = zip(*(tensor.split(self._lengths) for tensor in (q_THD.float(), k_THD, v_THD)), strict=True)
        return torch.cat([_attention(q, k, v, scale, sliding_window) for q, k, v in sequences]).to(q_THD.dtype)


def _attention(q_SHD: Tensor, k_SHD: Tensor, v_SHD: Tensor, scale: float, window: int | None) -> Tensor:
    """S tokens of one sequence: each sees itself and those before it, or the last `window` of them."""
    age_SS = torch.arange(len(q_SHD))[:, None] - torch.arange(len(q_SHD))
    hidden_SS = (age_SS < 0) | (age_SS >= (window or len(q_SHD)))
    scores_HSS = torch.einsum("qhd,khd->hqk", q_SHD, k_SHD) * scale
    return torch.einsum("hqk,khd->qhd", scores_HSS.masked_fill(hidden_SS, float("-inf")).softmax(dim=-1), v_SHD)


def eager_model(family: str, *, seed: int = 0) -> Any:
    """A random model of a family, with transformers' own attention, in float32."""
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(TINY_CONFIGS[family](), attn_implementation="eager").eval()


def write_model_folder(folder: Path, model: Any) -> ModelFolder:
    model.save_pretrained(folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHATML)
    return ModelFolder(folder, folder.name)


def tiny_vocabulary() -> tuple[list[str], list[str]]:
    """Special tokens, the 256 bytes, and a few merges of blanks, digits and letters: tokens and merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["Ġ Ġ", "ĠĠ ĠĠ", "t h", "th e", "Ġ the", "i n", "in g", "1 2", "12 3", "Ċ Ċ", "Ġ a", "n t", "' t", "Ã ©"]
    merged = [merge.replace(" ", "") for merge in merges]
    tokens = [*SPECIAL_TOKENS, *alphabet, *merged]
    return tokens + [f"[PAD{index}]" for index in range(VOCABULARY - len(tokens))], merges


def tiny_tokenizer() -> Tokenizer:
    tokens, merges = tiny_vocabulary()
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_gguf(
    path: Path,
    model: Any,
    *,
    quantisation: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: dict[str, Any] | None = None,
    pre: str = "gpt-2",
) -> None:
    """`model` as llama.cpp's converter would write it. Matrices are quantised, vectors are not."""
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    _write_vocabulary(writer, pre)
    for key, value in (metadata or {}).items():
        _write_value(writer, key, value)
    for name, tensor in _gguf_tensors(model):
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quantize(tensor, quantisation), raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_vocabulary(writer: gguf.GGUFWriter, pre: str) -> None:
    tokens, merges = tiny_vocabulary()
    kinds = [3 if token in SPECIAL_TOKENS else 5 if token.startswith("[PAD") else 1 for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHATML)


def _write_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}
    getattr(writer, kinds[type(value)])(key, value)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _gguf_tensors(model: Any) -> Iterator[tuple[str, Any]]:
    config = model.config
    kind = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
    names = gguf.get_tensor_name_map(kind[config.model_type], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape).copy()
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), values


@pytest.fixture(scope="session")
def smollm2_folder() -> ModelFolder:
    """SmolLM2-135M-Instruct, converted into the default cache, so that only the first run ever converts it."""
    return resolve(ModelConfig(path="smollm2"), on_progress=lambda _: None)


def sharp_llama(folder: Path, times: float) -> LanguageModel:
    """A tiny Llama whose attention has preferences: random weights alone attend almost evenly."""
    eager = eager_model("llama")
    with torch.no_grad():
        for layer in eager.model.layers:
            layer.self_attn.q_proj.weight *= times
            layer.self_attn.k_proj.weight *= times
    config = ModelConfig(path=str(write_model_folder(folder, eager).path), dtype=DType.FLOAT32)
    return build_model(open_model(config, on_progress=print), config, Role.PREFILL, on_progress=print)
