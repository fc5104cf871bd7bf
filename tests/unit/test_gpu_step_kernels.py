"""How many kernels a captured decode step launches per layer: with CUDA graphs, what a packed step takes.

`pytest -rP` this file to see the counts.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from packlight.attention.flashinfer.backend import FlashInferAttention
from packlight.attention.flashinfer.ops import TorchPageOps
from packlight.compress.budget import base_budget
from packlight.compress.options import resolve
from packlight.core.types import PackSpec
from packlight.models.fused.ops import TorchLayerOps
from packlight.models.fused.plain import PlainModel
from tests.gpu.rig import Rig
from tests.gpu.steps import make_runner
from tests.support.fake_flashinfer import fake_kernels
from tests.support.step_kernels import CountedOps, CountingEngine, KernelCount, Launches
from tests.unit.models.test_dummy import TINY

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install --no-deps triton==3.9.0")

PAGE_KERNELS = "packlight.attention.flashinfer.page_kernels"
STORE_KERNEL = "packlight.attention.flashinfer.store_kernel"
LAYER_KERNELS = "packlight.models.fused.layer_kernels"
PRODUCTS_KERNEL = "packlight.attention.flashinfer.products_kernel"
NUM_TOKENS, FEW_LAYERS = 256, 3
EVERY_LAYER = {"_add_norm": 2, "linear": 4, "_turn": 1, "_store": 1, "decode": 1, "_gate": 1}
PER_LAYER = {
    "full": {**EVERY_LAYER, "index_select": 1},
    "rocketkv": {**EVERY_LAYER, "_rate": 1, "_pick": 1},
    "quest": {**EVERY_LAYER, "_rate": 1, "_pick": 1},
}
MOST_BESIDE_LAYERS = 12


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> KernelCount:
    count = KernelCount()
    for module in (PAGE_KERNELS, STORE_KERNEL, LAYER_KERNELS):
        names = [name for name, kernel in vars(importlib.import_module(module)).items() if hasattr(kernel, "warmup")]
        for name in names:
            monkeypatch.setattr(f"{module}.{name}", Launches(count, name))
    layer_ops = CountedOps(importlib.import_module(LAYER_KERNELS).TritonLayerOps(), TorchLayerOps())
    monkeypatch.setattr("packlight.models.fused.plain.layer_ops", lambda device: layer_ops)
    return count


def make_rig(folder: Path, count: KernelCount, family: str, num_layers: int) -> Rig:
    """In bfloat16, of a size that the compiled lane leaves to the plain one."""
    changes = {"model_type": family, "num_hidden_layers": num_layers, "intermediate_size": 80}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY | changes | {"max_position_embeddings": 2 * NUM_TOKENS}))
    page_ops: Any = CountedOps(importlib.import_module(PAGE_KERNELS).TritonPageOps(), TorchPageOps())
    return Rig(
        model_path=str(folder),
        device="cpu",
        dtype="bfloat16",
        batch=2,
        context=NUM_TOKENS,
        kept_tokens=64,
        backend=lambda: FlashInferAttention("cpu", fake_kernels(), page_ops),
        engine=lambda: CountingEngine(count),
    )


def pack_of(recipe: str) -> PackSpec | None:
    if recipe == "full":
        return None
    return resolve({"recipe": recipe, "budget": 64}, default_recipe=recipe, default_budget=None)


def step_kernels(rig: Rig, recipe: str, count: KernelCount) -> Counter[str]:
    """Of the captured step that reads as `recipe` does."""
    assert isinstance(rig.model, PlainModel)
    pack = pack_of(recipe)
    rows = rig.rows(rig.batch, base_budget(pack, NUM_TOKENS) if pack else NUM_TOKENS, pack, NUM_TOKENS if pack else 0)
    assert (rows.reading is None) == (recipe == "full")
    make_runner(rig, rows, graphed=True)
    return Counter(count.names)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("recipe", PER_LAYER)
def test_a_layer_launches_few_kernels(recipe: str, family: str, count: KernelCount, tmp_path: Path) -> None:
    fewer, more = (
        step_kernels(make_rig(tmp_path / str(num), count, family, num), recipe, count)
        for num in (FEW_LAYERS, FEW_LAYERS + 1)
    )
    per_layer = more - fewer
    print(f"{family} {recipe}: {per_layer.total()} per layer: {dict(per_layer)}")
    assert per_layer == PER_LAYER[recipe]
    if recipe != "quest":  # whose first layers are read in full
        assert fewer.total() - FEW_LAYERS * per_layer.total() <= MOST_BESIDE_LAYERS


@pytest.mark.parametrize("module", [PAGE_KERNELS, STORE_KERNEL, LAYER_KERNELS, PRODUCTS_KERNEL])
def test_no_number_of_a_step_is_a_reason_to_compile_anew(module: str) -> None:
    """Triton compiles for 1 and for multiples of 16 apart, in the middle of a step, unless told not to. Strides are
    the model's."""
    kernels = [kernel for kernel in vars(importlib.import_module(module)).values() if hasattr(kernel, "warmup")]
    numbers = {"before", "layer", "num_heads", "num_pages", "num_rows", "num_tokens"}
    specialised = [
        f"{kernel.__name__}: {param.name}"
        for kernel in kernels
        for param in kernel.params
        if param.name in numbers and not param.is_constexpr and not param.do_not_specialize
    ]
    assert kernels
    assert not [name for name in specialised if not name.startswith("_mass")]  # part of another kernel
