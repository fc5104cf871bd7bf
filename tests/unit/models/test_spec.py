"""What is read from a model folder without torch: shape, windows, fingerprint, dtype; and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from packlight.core.config import DType
from packlight.core.errors import ModelError
from packlight.models.folder import sample_file
from packlight.models.spec import fingerprint, load_spec, resolve_dtype, sliding_windows, with_family_defaults
from packlight.models.support import refuse_unsupported
from tests.support.tiny_models import TINY_CONFIGS, VOCABULARY, eager_model, write_gguf, write_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("spec") / "tiny", eager_model("llama")).path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "elsewhere"))


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_spec_of_a_folder(folder: Path) -> None:
    spec = load_spec(folder, name="tiny", dtype="bfloat16")
    assert (spec.name, spec.dtype) == ("tiny", "bfloat16")
    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim) == (3, 2, 32)
    assert (spec.vocab_size, spec.max_context, spec.eos_token_ids) == (VOCABULARY, 256, (2,))
    assert spec.sliding_windows == (None, None, None)


def test_max_context_can_be_lowered_but_not_raised(folder: Path) -> None:
    assert load_spec(folder, name="t", dtype="float32", max_context=100).max_context == 100
    with pytest.raises(ModelError, match=r"max_context is 257.*made for 256"):
        load_spec(folder, name="t", dtype="float32", max_context=257)


def test_old_config_files_leave_out_what_can_be_derived(copy: Path) -> None:
    edit(copy / "config.json", head_dim=None, num_key_value_heads=None)
    spec = load_spec(copy, name="t", dtype="float32")
    assert (spec.num_kv_heads, spec.head_dim) == (4, 16)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"])
def test_what_cannot_be_derived_is_asked_for(copy: Path, key: str) -> None:
    edit(copy / "config.json", **{key: None})
    with pytest.raises(ModelError, match=f"{key} must be a positive integer"):
        load_spec(copy, name="t", dtype="float32")


HUB_STYLE: dict[str, dict[str, Any]] = {
    "plain": {"model_type": "llama"},
    "mistral-v0.1": {"model_type": "mistral", "sliding_window": 7},
    "mistral-v0.3": {"model_type": "mistral", "sliding_window": None},
    "mistral-silent": {"model_type": "mistral"},
    "phi3": {"model_type": "phi3", "sliding_window": 7, "pad_token_id": 0},
    "qwen2-off": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 7, "max_window_layers": 2},
    "qwen2-on": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    "qwen2-silent": {"model_type": "qwen2", "sliding_window": 7, "max_window_layers": 2},
    "qwen3-on": {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 5},
    "qwen3-moe-on": {"model_type": "qwen3_moe", "use_sliding_window": True, "sliding_window": 7},
    "qwen3-moe-silent": {"model_type": "qwen3_moe", "sliding_window": 7},
    "gemma3-pattern": {"model_type": "gemma3_text", "sliding_window": 7, "sliding_window_pattern": 3},
    "gemma3-silent": {"model_type": "gemma3_text"},
    "gemma3-types": {"model_type": "gemma3_text", "sliding_window": 7, "layer_types": ["full_attention"] * 8},
    "cohere2": {"model_type": "cohere2", "sliding_window": 7},
    "olmo3": {"model_type": "olmo3", "sliding_window": 7},
    "mixtral": {"model_type": "mixtral", "sliding_window": 7},
    "starcoder2": {"model_type": "starcoder2", "sliding_window": 7},
}


@pytest.mark.parametrize("style", HUB_STYLE)
def test_windows_are_resolved_as_transformers_does(style: str, copy: Path) -> None:
    """From raw files as they lie on the hub, where transformers fills in what they do not say."""
    config = {"num_hidden_layers": 8, "hidden_size": 64, "num_attention_heads": 4, **HUB_STYLE[style]}
    (copy / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoConfig.from_pretrained(copy)
    window = getattr(theirs, "sliding_window", None)
    types = getattr(theirs, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * 8
    expected = tuple(window if kind == "sliding_attention" else None for kind in types)
    assert sliding_windows(with_family_defaults(config)) == expected


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_shapes_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    config = TINY_CONFIGS[family]()
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    assert sliding_windows(raw) == tuple(window if kind == "sliding_attention" else None for kind in types)


def test_fingerprint_names_what_is_computed_and_not_where(folder: Path, copy: Path) -> None:
    assert fingerprint(folder, "float32") == fingerprint(copy, "float32")
    assert fingerprint(folder, "float32") != fingerprint(folder, "bfloat16")
    assert len(fingerprint(folder, "float32")) == 32


@pytest.mark.parametrize(
    "change",
    ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"],
)
def test_fingerprint_changes_with_one_byte(change: str, folder: Path, copy: Path) -> None:
    data = bytearray((copy / change).read_bytes())
    data[-3] ^= 1
    (copy / change).write_bytes(data)
    assert fingerprint(folder, "float32") != fingerprint(copy, "float32")


def test_fingerprint_does_not_confuse_files_with_one_another(folder: Path, copy: Path) -> None:
    (copy / "chat_template.jinja").rename(copy / "chat_template.json")
    assert fingerprint(folder, "float32") != fingerprint(copy, "float32")


def test_large_files_are_sampled_everywhere(tmp_path: Path) -> None:
    """A run of 64 KiB that differs is seen wherever it lies in 40 MiB, and so are the last bytes."""

    def digest(data: bytes) -> str:
        (tmp_path / "f").write_bytes(data)
        hasher = hashlib.blake2b()
        sample_file(hasher, tmp_path / "f")
        return hasher.hexdigest()

    plain = bytearray(40 << 20)
    original = digest(plain)
    assert digest(bytes(40 << 20)) == original
    for start in (0, 16 << 20, 23_456_789, (40 << 20) - 65536):
        changed = bytearray(plain)
        changed[start : start + 65536] = b"\1" * 65536
        assert digest(changed) != original, start
    assert digest(plain[:-1]) != original
    plain[-1] = 1
    assert digest(plain) != original


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx2 avx512_bf16 amx_tile", "bfloat16"), ("amx_bf16", "bfloat16"), ("fpu avx2 avx512f", "float32")],
)
def test_auto_dtype_follows_the_processor(flags: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\n")
    assert resolve_dtype(DType.AUTO, "cpu", cpuinfo=tmp_path / "cpuinfo") == expected
    assert resolve_dtype(DType.FLOAT16, "cpu", cpuinfo=tmp_path / "cpuinfo") == "float16"
    assert resolve_dtype(DType.AUTO, "cuda:1", cpuinfo=tmp_path / "cpuinfo") == "bfloat16"
    assert resolve_dtype(DType.AUTO, "cpu", cpuinfo=tmp_path / "absent") == "float32"


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "gemma3", "vision_config": {"a": 1}}, "more than text"),
        ({"model_type": "x", "audio_config": {"a": 1}}, "more than text"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "latent"),
        ({"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]}, "'linear_attention'"),
        ({"model_type": "llama4_text", "layer_types": ["chunked_attention"]}, "'chunked_attention'"),
        ({"model_type": "mamba2"}, "recurrent"),
        ({"model_type": "gpt_oss"}, "sinks"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "soft-capped"),
        ({"model_type": "bloom"}, "ALiBi"),
        ({"model_type": "falcon", "alibi": True}, "ALiBi"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic RoPE"),
        ({"model_type": "phi3", "rope_scaling": {"rope_type": "longrope"}}, "longrope RoPE"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic"}}, "dynamic RoPE"),
        ({"model_type": "g", "rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "longrope RoPE"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "looks ahead"),
        ({"model_type": "openelm", "num_query_heads": [4, 8]}, "different head counts"),
        ({"model_type": "gemma3n_text", "num_kv_shared_layers": 10}, "share"),
        ({"hidden_size": 8}, "no model_type"),
    ],
)
def test_what_cannot_be_served_exactly_is_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence) as caught:
        refuse_unsupported(config, where="/models/x")
    assert caught.value.message.startswith("/models/x: ")


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_what_can_be_served_is_not_refused(family: str) -> None:
    refuse_unsupported(TINY_CONFIGS[family]().to_dict(), where="x")
    refuse_unsupported({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, where="x")
    refuse_unsupported({"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, where="x")


def test_a_router_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    """A whole GGUF model is resolved, read and asked to render a chat; torch is never imported."""
    write_gguf(tmp_path / "tiny.gguf", eager_model("llama"))
    code = f"""
import sys
from packlight.core.config import DType, ModelConfig
from packlight.models.source import resolve
from packlight.models.spec import load_spec, resolve_dtype
from packlight.models.tokenizer import ChatTokenizer
folder = resolve(ModelConfig(path={str(tmp_path / "tiny.gguf")!r}, cache_dir={str(tmp_path)!r}), on_progress=print)
spec = load_spec(folder, name=folder.name, dtype=resolve_dtype(DType.AUTO, "cpu"))
ids = ChatTokenizer.from_folder(folder).apply_chat_template([{{"role": "user", "content": "the"}}])
assert ids and spec.num_layers == 3
print(sorted({{"torch", "transformers"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
