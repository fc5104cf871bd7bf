"""The Triton kernels of a decode step's pages, in Triton's interpreter; on a GPU, `tests/gpu/test_triton.py` runs them.

Triton decides when it is imported: `TRITON_INTERPRET=1 pytest` this file, with Triton installed.
"""

import importlib
import os
from importlib.util import find_spec

import pytest
import torch

from packlight.attention.flashinfer.backend import FlashInferAttention
from packlight.attention.flashinfer.ops import TorchPageOps
from packlight.compress.readers.freekv import FreeKVReader
from packlight.compress.readers.hsa import HSAReader
from packlight.compress.readers.quest import QuestReader
from packlight.kv.reading import Reading
from tests.support import page_ops_checks as checks
from tests.support.fake_flashinfer import fake_kernels
from tests.support.paged_rows import PagedRows

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None,
    reason="needs Triton and TRITON_INTERPRET=1",
)
every_shape = pytest.mark.parametrize("shape", checks.SHAPES, ids=str)


@pytest.fixture
def ops():
    return importlib.import_module("packlight.attention.flashinfer.page_kernels").TritonPageOps()


@every_shape
@pytest.mark.parametrize(
    ("dtype", "rule"),
    [(torch.bfloat16, checks.BOUNDS), (torch.float16, checks.MASS), (torch.float32, checks.MASS_OF_FEW_DIMS)],
)
def test_ratings(ops, dtype, shape, rule):
    checks.check_ratings(ops, "cpu", dtype, shape, rule)


@every_shape
@pytest.mark.parametrize("few", [True, False], ids=["ties", "distinct"])
def test_pages_picked_of_given_scores(ops, shape, few):
    checks.check_picked(ops, "cpu", shape, few=few, seed=0)


@every_shape
def test_pages_picked_by_mass(ops, shape):
    checks.check_picked_by_mass(ops, "cpu", shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (40, 1), (128, 4)])
def test_new_tokens(ops, dtype, head_dim, page_size):
    checks.check_stored(ops, "cpu", dtype, head_dim, page_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_new_tokens_as_fp8_numbers(ops, dtype):
    checks.check_stored(ops, "cpu", dtype, 64, 16, fp8=True, exact=True)


def test_steps_of_every_kind_of_row(ops):
    """Read by rules, by a reader of its own, densely, and through a window; a page is begun in some of the steps."""
    reads = [Reading(QuestReader(), 3), None, Reading(HSAReader(5), 4, 1), Reading(FreeKVReader(0.9, 8), 5)]
    lengths = [[[30, 17]] * 3, [[5, 9]] * 3, [[22, 40]] * 3, [[25, 31]] * 3]
    ours, theirs = (PagedRows(lengths, num_heads=4) for _ in range(2))
    backends = [FlashInferAttention("cpu", fake_kernels(), some_ops) for some_ops in (ops, TorchPageOps())]
    for _ in range(2):
        tokens = ours.new_tokens(ours.rows)
        got, expected = (
            paged.step(backend, paged.rows, reads, tokens, windows=[None, None, 6])
            for paged, backend in zip((ours, theirs), backends, strict=True)
        )
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
