"""The Triton kernels of the fused lane, in Triton's interpreter; on a GPU, `tests/gpu/test_triton.py` runs them.

Triton decides when it is imported: `TRITON_INTERPRET=1 pytest` this file, with Triton installed.
"""

import importlib
import os
from importlib.util import find_spec

import pytest
import torch

from packlight.models.folder import read_json
from packlight.models.fused.plain import PlainModel
from packlight.models.fused.shape import read_shape
from packlight.models.fused.weights import Checkpoint
from packlight.models.spec import load_spec
from tests.support import layer_ops_checks as checks
from tests.support.tiny_models import DenseAttention, eager_model, write_model_folder

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None,
    reason="needs Triton and TRITON_INTERPRET=1",
)
# The interpreter cuts numbers off where they do not fit bf16, and does not round.
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


@pytest.fixture
def ops():
    return importlib.import_module("packlight.models.fused.layer_kernels").TritonLayerOps()


@every_dtype
@pytest.mark.parametrize(("num_tokens", "size"), checks.SIZES)
@pytest.mark.parametrize("has_delta", [True, False])
def test_sums_and_their_norms(ops, dtype, num_tokens, size, has_delta):
    checks.check_add_norm(ops, "cpu", dtype, num_tokens, size, has_delta=has_delta)


@every_dtype
@pytest.mark.parametrize("heads", checks.HEADS, ids=str)
@pytest.mark.parametrize("has_norm", [True, False])
def test_turns(ops, dtype, heads, has_norm):
    checks.check_turn(ops, "cpu", dtype, heads, has_norm=has_norm)


@every_dtype
@pytest.mark.parametrize(("num_tokens", "size"), [*checks.SIZES, (2, 1500)])
def test_gates(ops, dtype, num_tokens, size):
    checks.check_gate(ops, "cpu", dtype, num_tokens, size)


def test_no_tokens(ops):
    checks.check_no_tokens(ops, "cpu")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_says_the_same_tokens(ops, family, tmp_path):
    """Qwen3 has norms of each head."""
    folder = write_model_folder(tmp_path, eager_model(family))
    spec, shape = load_spec(folder, name="tiny", dtype="float32"), read_shape(read_json(folder.path / "config.json"))
    fused, plain = (
        PlainModel(Checkpoint(folder, shape, torch.float32, "cpu"), shape, spec, "cpu", some_ops)
        for some_ops in (ops, None)
    )
    tokens_T = torch.randint(3, 250, (9,), generator=torch.Generator().manual_seed(0))
    positions_T = torch.cat([torch.arange(5), torch.arange(4)])
    step = (tokens_T, positions_T, DenseAttention([5, 4]), torch.arange(9))
    got, expected = fused.forward(*step), plain.forward(*step)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
