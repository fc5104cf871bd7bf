"""GGUF files: reading, converting, and the tokenizer in them, against the `gguf` package and transformers."""

from __future__ import annotations

import json
import struct
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from packlight.core.errors import ModelError
from packlight.models.base import load_model
from packlight.models.folder import ModelFolder, safetensors_header
from packlight.models.gguf.convert import convert
from packlight.models.gguf.reader import GGUFFile
from packlight.models.gguf.tokenizer import PRE_TOKENIZERS
from packlight.models.spec import load_spec
from packlight.models.tokenizer import ChatTokenizer
from tests.support.tiny_models import (
    CHATML,
    SPECIAL_TOKENS,
    VOCABULARY,
    DenseAttention,
    eager_model,
    tiny_vocabulary,
    write_gguf,
)
from tests.unit.models.bpe_oracle import SPLITS, BpeOracle
from tests.unit.models.texts import TRICKY_TEXTS

Kind = gguf.GGMLQuantizationType
FAMILIES = ("llama", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def llama_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, eager_model("llama"), quantisation=Kind.Q8_0)
    return path


def converted(path: Path, folder: Path) -> Path:
    folder.mkdir()
    convert(path, folder)
    return folder


def rewrite(path: Path, target: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert data.count(old) >= 1
    assert len(old) == len(new)
    target.write_bytes(data.replace(old, new, 1))
    return target


def test_reader_sees_what_the_gguf_package_sees(llama_gguf: Path) -> None:
    theirs, ours = gguf.GGUFReader(llama_gguf), GGUFFile(llama_gguf)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        assert np.array_equal(ours.load(tensor.name), gguf.dequantize(tensor.data, tensor.tensor_type))


@pytest.mark.parametrize("family", FAMILIES)
def test_unquantised_model_survives_the_round_trip_exactly(family: str, tmp_path: Path) -> None:
    """Through llama.cpp's names and its permutation of q and k, and back."""
    model = eager_model(family)
    write_gguf(tmp_path / "tiny.gguf", model)
    weights = load_file(converted(tmp_path / "tiny.gguf", tmp_path / "out") / "model.safetensors")
    original = {name: tensor for name, tensor in model.state_dict().items() if name in weights}
    assert original.keys() == weights.keys()
    assert len(weights) >= len(model.state_dict()) - 1, "only a tied head may be left out"
    assert all(torch.equal(weights[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1, Kind.Q8_0])
def test_weights_equal_those_transformers_reads_from_gguf(family: str, kind: Kind, tmp_path: Path) -> None:
    model = eager_model(family)
    write_gguf(tmp_path / "tiny.gguf", model, quantisation=kind)
    theirs = load_gguf_checkpoint(str(tmp_path / "tiny.gguf"), return_tensors=True, model_to_load=model)["tensors"]
    ours = load_file(converted(tmp_path / "tiny.gguf", tmp_path / "out") / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_model_answers_like_the_original(family: str, tmp_path: Path) -> None:
    """Proves config.json: head size, RoPE, biases, norms, tied embeddings."""
    model = eager_model(family)
    write_gguf(tmp_path / "tiny.gguf", model)
    folder = ModelFolder(converted(tmp_path / "tiny.gguf", tmp_path / "out"), "tiny")
    loaded = load_model(folder, load_spec(folder, name="t", dtype="float32"), device="cpu", on_progress=lambda _: None)
    tokens_T = torch.arange(3, 20)
    logits = loaded.forward(tokens_T, torch.arange(17), DenseAttention([17]), torch.arange(17))
    with torch.inference_mode():
        assert (logits - model(tokens_T[None]).logits[0]).abs().max() < 1e-5


def test_config_says_what_llama_cpp_knows(llama_gguf: Path, tmp_path: Path) -> None:
    folder = converted(llama_gguf, tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(folder)
    original = eager_model("llama").config
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "rms_norm_eps", "vocab_size"):
        assert getattr(config, key) == getattr(original, key), key
    assert config.rope_parameters["rope_theta"] == original.rope_parameters["rope_theta"]
    assert (folder / "chat_template.jinja").read_bytes() == CHATML.encode()
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, {"rope_type": "default"}),
        ({"llama.rope.scaling.type": "none"}, {"rope_type": "default"}),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
            {"rope_type": "linear", "factor": 2.0},
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 64,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_rope_scaling(metadata: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", eager_model("llama"), metadata=metadata)
    config = json.loads((converted(tmp_path / "tiny.gguf", tmp_path / "out") / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_theta": 10000.0, **expected}


def test_llama3_rope_is_recognised_by_its_factors(tmp_path: Path) -> None:
    """The factors are what transformers itself computes for Llama 3.1: plain frequencies over scaled ones."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    config = transformers.LlamaConfig(
        hidden_size=64, head_dim=32, num_attention_heads=2, rope_parameters=dict(rope), max_position_embeddings=16384
    )
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"]
    plain = 500000.0 ** (-torch.arange(0, 32, 2) / 32)
    factors = (plain / init(config, "cpu")[0]).numpy().astype(np.float32)

    class WithFactors(gguf.GGUFWriter):
        def write_header_to_file(self, path: Path | None = None) -> None:
            self.add_tensor("rope_freqs.weight", factors)
            super().write_header_to_file(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", WithFactors)
        model = eager_model("llama")
        model.config.rope_parameters["rope_theta"] = 500000.0
        write_gguf(tmp_path / "tiny.gguf", model)
        factors[-1] *= 1.5
        write_gguf(tmp_path / "strange.gguf", model)
    folder = converted(tmp_path / "tiny.gguf", tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["rope_parameters"] == rope
    with pytest.raises(ModelError, match="not Llama 3's"):
        converted(tmp_path / "strange.gguf", tmp_path / "strange")


def test_weights_begin_on_a_cache_line(llama_gguf: Path, tmp_path: Path) -> None:
    path = converted(llama_gguf, tmp_path / "out") / "model.safetensors"
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert (8 + length) % 64 == 0
    assert all(entry["data_offsets"][0] % 64 == 0 for entry in safetensors_header(path).values())


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"llama.expert_count": 4}, "mixture-of-experts"),
        ({"split.count": 3}, "Join the parts"),
        ({"llama.rope.dimension_count": 16}, "not the head size"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.block_count": 4}, "9 tensors are missing, such as blk.3"),
        ({"tokenizer.ggml.pre": "poro-chat"}, "pre-tokenizer 'poro-chat' is not known .*smollm"),
        ({"tokenizer.ggml.model": "llama"}, "of kind 'llama'"),
        ({"tokenizer.ggml.merges": ["Ġ the", "no such"]}, "unusable merges"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "1 tokens twice"),
        ({"llama.feed_forward_length": [96, 96, 48]}, "all layers must be alike"),
    ],
)
def test_what_cannot_be_converted_exactly_is_refused(metadata: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    """The metadata is overwritten before anything is written out."""
    path = tmp_path / "tiny.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", _overwriting(metadata))
        write_gguf(path, eager_model("llama"))
    with pytest.raises(ModelError, match=sentence) as caught:
        converted(path, tmp_path / "out")
    assert str(path) in caught.value.message
    assert not list((tmp_path / "out").iterdir())


def _overwriting(metadata: dict[str, Any]) -> Any:
    write_header = gguf.GGUFWriter.write_header_to_file

    def replaced(self: gguf.GGUFWriter, path: Path | None = None) -> None:
        for key, value in metadata.items():
            kinds = {int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING, list: gguf.GGUFValueType.ARRAY}
            self.kv_data[0].pop(key, None)
            self.add_key_value(key, value, kinds[type(value)])
        write_header(self, path)

    return replaced


def test_unknown_architectures_tensors_and_types_are_refused(llama_gguf: Path, tmp_path: Path) -> None:
    strange = rewrite(llama_gguf, tmp_path / "a.gguf", b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba")
    with pytest.raises(ModelError, match=r"architecture 'mamba' is not supported .*llama, qwen2, qwen3"):
        converted(strange, tmp_path / "a")
    strange = rewrite(llama_gguf, tmp_path / "b.gguf", b"blk.1.ffn_gate.weight", b"blk.1.ffn_gala.weight")
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_gala\.weight has no place in a llama model"):
        converted(strange, tmp_path / "b")
    info = b"token_embd.weight" + struct.pack("<IQQ", 2, 64, VOCABULARY)
    strange = rewrite(
        llama_gguf, tmp_path / "c.gguf", info + struct.pack("<I", Kind.Q8_0), info + struct.pack("<I", 77)
    )
    with pytest.raises(ModelError, match=r"cannot dequantise token_embd\.weight \(ggml type 77"):
        converted(strange, tmp_path / "c")


@pytest.mark.parametrize("size", [0, 3, 20, 200, 5000, -1])
def test_cut_files_are_errors_that_name_the_file(size: int, llama_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(llama_gguf.read_bytes()[:size])
    with pytest.raises(ModelError) as caught:
        converted(path, tmp_path / "out")
    assert str(path) in caught.value.message


@settings(max_examples=150, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=8))
def test_garbled_headers_never_escape_as_other_errors(flips: list[tuple[int, int]], llama_gguf: Path) -> None:
    garbled = bytearray(llama_gguf.read_bytes())
    for position, byte in flips:
        garbled[position] = byte
    path = llama_gguf.with_name("garbled.gguf")
    path.write_bytes(garbled)
    with suppress(ModelError):
        GGUFFile(path)


@pytest.fixture(scope="module", params=sorted(SPLITS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ChatTokenizer, BpeOracle]:
    """The rebuilt tokenizer of each known pre-tokenizer, and the oracle."""
    path = tmp_path_factory.mktemp("pre") / "tiny.gguf"
    write_gguf(path, eager_model("llama"), pre=request.param)
    tokenizer = ChatTokenizer.from_folder(converted(path, path.parent / "out"))
    tokens, merges = tiny_vocabulary()
    ignores = PRE_TOKENIZERS[request.param].ignore_merges
    return tokenizer, BpeOracle(tokens, merges, SPECIAL_TOKENS, request.param, ignore_merges=ignores)


def test_every_known_pre_tokenizer_is_tested() -> None:
    assert PRE_TOKENIZERS.keys() == SPLITS.keys()


def test_ids_equal_the_oracle(pair: tuple[ChatTokenizer, BpeOracle]) -> None:
    tokenizer, oracle = pair
    assert tokenizer.vocab_size == VOCABULARY
    for text in TRICKY_TEXTS:
        normal = _normalised(tokenizer, text)
        assert tokenizer.encode(text) == oracle.encode(normal), text


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("the ing1234567890 \n\t'sté.:-|<>日😀\u0301"), max_size=40))
def test_ids_of_random_texts_equal_the_oracle(pair: tuple[ChatTokenizer, BpeOracle], text: str) -> None:
    tokenizer, oracle = pair
    assert tokenizer.encode(text) == oracle.encode(_normalised(tokenizer, text))


def _normalised(tokenizer: ChatTokenizer, text: str) -> str:
    """Qwen composes characters (NFC) before it splits; the others change nothing."""
    composes = tokenizer.encode("e\u0301") == tokenizer.encode("é")
    return unicodedata.normalize("NFC", text) if composes else text


@pytest.mark.parametrize(
    ("pre", "metadata", "expected"),
    [
        ("smollm", {}, False),
        ("llama-bpe", {}, True),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, False),
        ("smollm", {"tokenizer.ggml.add_bos_token": True}, True),
    ],
)
def test_bos_only_where_the_model_wants_it(pre: str, metadata: dict[str, Any], expected: bool, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", eager_model("llama"), pre=pre, metadata=metadata)
    tokenizer = ChatTokenizer.from_folder(converted(tmp_path / "tiny.gguf", tmp_path / "out"))
    assert (tokenizer.encode("the", add_special_tokens=True)[0] == 1) is expected
    assert tokenizer.encode("the")[0] != 1
