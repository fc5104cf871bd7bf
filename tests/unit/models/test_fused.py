"""The fused lane's parts: packed weights, rotary frequencies, which models it takes, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from packlight.core.config import DType, ModelConfig, Weights
from packlight.core.errors import ModelError
from packlight.models.adapter import TransformersModel
from packlight.models.base import LanguageModel, load_model
from packlight.models.folder import ModelFolder
from packlight.models.fused import load as lane
from packlight.models.fused.compiled import CompiledModel
from packlight.models.fused.packing import PackedMatrix, interleaved, packed
from packlight.models.fused.plain import PlainModel
from packlight.models.fused.rotary import inverse_frequencies
from packlight.models.fused.shape import why_not
from packlight.models.opened import open_model
from packlight.models.spec import load_spec
from packlight.native.compile import NativeUnavailable
from packlight.native.linear import LinearFunctions, room_elements
from packlight.native.variants import Variant
from tests.support.native import VARIANTS, open_variant
from tests.support.tiny_models import TINY_CONFIGS, eager_model, write_model_folder


def silent(_: str) -> None:
    pass


FORMS = (Weights.NATIVE, Weights.INT8, Weights.INT4)


def load(folder: ModelFolder, dtype: str, weights: Weights = Weights.NATIVE, device: str = "cpu") -> LanguageModel:
    spec = load_spec(folder, name="tiny", dtype=dtype)
    return load_model(folder, spec, device=device, weights=weights, on_progress=silent)


# ── packed weights ───────────────────────────────────────────────────────────────────────────────────────────────────


def random_weights(num_outputs: int, depth: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_outputs)
    return torch.randn(num_outputs, depth, generator=generator).bfloat16()


def rows_of(matrix: PackedMatrix, variant: Variant, rows_R: Tensor) -> Tensor:
    """The kernel's own reading of packed weights, bf16 `[R, C]`."""
    depth = matrix.struct.depth
    out_RC = torch.empty(len(rows_R), depth, dtype=torch.bfloat16)
    room = torch.empty(room_elements(depth, 2), dtype=torch.bfloat16)
    functions = LinearFunctions(open_variant(variant))
    functions.rows(matrix.struct, rows_R.data_ptr(), len(rows_R), out_RC.data_ptr(), room.data_ptr(), 2)
    return out_RC


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize(
    ("weights", "largest_error"), [(Weights.NATIVE, 0.0), (Weights.INT8, 0.6), (Weights.INT4, 0.6)]
)
def test_weights_come_back_within_half_a_step(variant: Variant, weights: Weights, largest_error: float) -> None:
    """In steps of the quantisation; a tenth for the rounding of scales and results to bfloat16."""
    weight_NC = random_weights(77, 96)
    read_NC = rows_of(packed(weight_NC, None, weights), variant, torch.arange(77)).float()
    exact_NC = weight_NC.float()
    groups = exact_NC.unflatten(1, (-1, 32))
    int4_steps = (groups.amax(-1) - groups.amin(-1)).repeat_interleave(32, dim=1) / 15
    int8_steps = exact_NC.abs().amax(1, keepdim=True) / 127
    step_NC = int8_steps if weights is Weights.INT8 else int4_steps
    rounding_NC = exact_NC.abs().amax(1, keepdim=True) * 2**-8 if weights is not Weights.NATIVE else 0.0
    assert ((read_NC - exact_NC).abs() <= largest_error * step_NC + rounding_NC).all()


def test_four_bits_keep_what_was_four_bits() -> None:
    """Sixteen levels per group, as a Q4_1 file has them, survive but for bfloat16."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (64, 4, 32), generator=generator)
    codes[..., :2] = torch.tensor([0, 15])
    scale, least = torch.rand(64, 4, 1, generator=generator), -torch.rand(64, 4, 1, generator=generator)
    weight_NC = (codes * scale.bfloat16() + least.bfloat16()).flatten(1).float()
    read_NC = rows_of(packed(weight_NC, None, Weights.INT4), VARIANTS[0], torch.arange(64)).float()
    assert (read_NC - weight_NC).abs().max() <= 2**-7 * weight_NC.abs().max()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("weights", FORMS)
def test_products_equal_those_of_the_weights_read_back(variant: Variant, weights: Weights) -> None:
    """In float64; every count of rows around a tile, a block and a piece; columns that fill no block."""
    functions = LinearFunctions(open_variant(variant))
    for num_outputs, depth in ((32, 32), (77, 96), (288, 576)):
        bias_N = torch.randn(num_outputs)
        matrix = packed(random_weights(num_outputs, depth), bias_N, weights)
        weight_NC = rows_of(matrix, variant, torch.arange(num_outputs)).double()
        if matrix.scales is not None and weights is Weights.INT8:  # not rounded to bfloat16 in a product
            weight_NC = (weight_NC / matrix.scales[:num_outputs, None]).round() * matrix.scales[:num_outputs, None]
        for num_rows in (1, 2, 3, 8, 9, 15, 16, 17, 31, 32, 33, 48, 64, 255, 256, 257, 300):
            x_TC, num_threads = torch.randn(num_rows, depth).bfloat16(), 1 + num_rows % 3
            out_TN = torch.full((num_rows, num_outputs), torch.nan)
            room = torch.empty(room_elements(depth, num_threads), dtype=torch.bfloat16)
            addresses = (x_TC.data_ptr(), num_rows, out_TN.data_ptr(), room.data_ptr())
            functions.multiply(matrix.struct, *addresses, num_threads)
            expected_TN = x_TC.double() @ weight_NC.T + bias_N
            assert (out_TN - expected_TN).abs().max() <= 2e-6 * expected_TN.abs().max() * depth**0.5


def test_quantised_weights_are_smaller() -> None:
    weight_NC = random_weights(576, 576)
    sizes = [packed(weight_NC, None, weights).num_bytes for weights in FORMS]
    assert [size * 8 / weight_NC.numel() for size in sizes] == [16.0, 8 + 32 / 576, 5.0]


def test_gate_and_up_alternate_by_sixteen() -> None:
    gate_up = torch.arange(96)[:, None]
    rows = interleaved(gate_up).flatten().tolist()
    assert rows == [*range(16), *range(48, 64), *range(16, 32), *range(64, 80), *range(32, 48), *range(80, 96)]


# ── rotary ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8192},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_frequencies_equal_transformers(rope: dict[str, Any]) -> None:
    setting = {"rope_theta": 500_000.0, **rope}
    config = transformers.LlamaConfig(head_dim=128, max_position_embeddings=131_072, rope_parameters=setting)
    theirs, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    assert factor == 1.0
    torch.testing.assert_close(inverse_frequencies(setting, 128), theirs, rtol=1e-6, atol=0)


# ── which models, and which way ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return write_model_folder(tmp_path_factory.mktemp("llama"), eager_model("llama"))


@pytest.fixture
def other_folder(llama_folder: ModelFolder, tmp_path: Path) -> ModelFolder:
    """A copy to change."""
    return ModelFolder(Path(shutil.copytree(llama_folder.path, tmp_path / "other")), "other")


def reconfigure(folder: ModelFolder, **changes: Any) -> dict[str, Any]:
    path = folder.path / "config.json"
    config: dict[str, Any] = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))
    return config


@pytest.mark.parametrize(("dtype", "kind"), [("float32", PlainModel), ("bfloat16", CompiledModel)])
def test_the_way_follows_the_dtype(llama_folder: ModelFolder, dtype: str, kind: type) -> None:
    assert type(load(llama_folder, dtype)) is kind


def test_without_a_compiler_plain_torch_computes(llama_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(**kwargs: Any) -> None:
        raise NativeUnavailable("no C++ compiler: install one")

    monkeypatch.setattr(lane, "open_library", unavailable)
    said: list[str] = []
    spec = load_spec(llama_folder, name="tiny", dtype="bfloat16")
    model = load_model(llama_folder, spec, device="cpu", on_progress=said.append)
    assert isinstance(model, PlainModel)
    assert said[0] == "computing in plain torch: no C++ compiler: install one"
    with pytest.raises(ModelError, match=r"model\.weights=int8 is not possible: no C\+\+ compiler"):
        load(llama_folder, "bfloat16", Weights.INT8)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gemma2"}, "family gemma2"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "a checkpoint with quantisation of its own"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rotary embedding of type yarn"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_parameters": None}, "rotary embedding of type yarn"),
        ({"partial_rotary_factor": 0.5}, "rotary embedding of a part of each head"),
        ({"intermediate_size": 128}, "of shape .96, 64. where .128, 64. was expected"),
        ({"tie_word_embeddings": False}, "a checkpoint without lm_head.weight"),
        ({"attention_bias": True}, "a checkpoint without model.layers.0.self_attn.q_proj.bias"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_it_leaves_to_transformers(other_folder: ModelFolder, changes: dict[str, Any], reason: str) -> None:
    import re

    assert re.search(reason, why_not(reconfigure(other_folder, **changes), other_folder) or "")


def test_weights_in_eight_bit_floats_are_left_to_transformers(other_folder: ModelFolder) -> None:
    file = other_folder.path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, file, metadata={"format": "pt"})
    reason = why_not(json.loads((other_folder.path / "config.json").read_text()), other_folder)
    assert reason == "model.norm.weight stored as F8_E4M3"


def test_other_families_are_computed_by_transformers(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path, eager_model("gemma3"))
    assert isinstance(load(folder, "float32"), TransformersModel)
    with pytest.raises(ModelError, match=r"model\.weights=int4 is not possible: family gemma3_text.*weights=native"):
        load(folder, "bfloat16", Weights.INT4)


@pytest.mark.parametrize(
    ("dtype", "device", "reason"), [("float32", "cpu", "dtype float32"), ("bfloat16", "meta", "device meta")]
)
def test_quantised_weights_need_the_kernels(llama_folder: ModelFolder, dtype: str, device: str, reason: str) -> None:
    with pytest.raises(ModelError, match=f"model.weights=int8 is not possible: {reason}"):
        load(llama_folder, dtype, Weights.INT8, device)


def test_depths_that_are_no_multiple_of_a_tile_are_plain(tmp_path: Path) -> None:
    config = TINY_CONFIGS["llama"]()
    config.intermediate_size = 80
    eager = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    folder = write_model_folder(tmp_path, eager)
    assert isinstance(load(folder, "bfloat16"), PlainModel)
    with pytest.raises(ModelError, match="intermediate size 80, which is no multiple of 32"):
        load(folder, "bfloat16", Weights.INT4)


def test_quantised_weights_make_auto_bfloat16(llama_folder: ModelFolder) -> None:
    config = ModelConfig(path=str(llama_folder.path), dtype=DType.AUTO, weights=Weights.INT8)
    assert open_model(config, on_progress=silent).spec.dtype == "bfloat16"


def test_kv_of_other_weights_is_compatible(llama_folder: ModelFolder) -> None:
    """A fleet may read prompts in full precision and write answers in four bits."""
    fingerprints = {
        open_model(
            ModelConfig(path=str(llama_folder.path), dtype=DType.BFLOAT16, weights=weights), on_progress=silent
        ).spec.fingerprint
        for weights in FORMS
    }
    assert len(fingerprints) == 1


def test_it_does_not_import_transformers(llama_folder: ModelFolder) -> None:
    """Which takes seconds."""
    script = (
        "import sys; from packlight.core.config import ModelConfig; from packlight.core.workers import Role\n"
        "from packlight.engine.build import build_model; from packlight.models.opened import open_model\n"
        f"config = ModelConfig(path={str(llama_folder.path)!r}, dtype='bfloat16')\n"
        "build_model(open_model(config, on_progress=print), config, Role.DECODE, on_progress=print)\n"
        "assert 'torch' in sys.modules; sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
