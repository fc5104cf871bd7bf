"""Without a CUDA device, and without FlashInfer where it is what is tested, these tests are skipped."""

import os

import pytest
import torch

from packlight.attention.flashinfer.backend import FlashInferAttention
from packlight.attention.flashinfer.wrappers import is_installed
from tests.gpu.machine import NOTHING_SKIPPED


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "gpu" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def flashinfer():
    """The backend: its kernels are compiled once."""
    if not is_installed():
        (pytest.fail if NOTHING_SKIPPED in os.environ else pytest.skip)("FlashInfer is not installed")
    return FlashInferAttention("cuda")


@pytest.fixture
def no_waiting():
    """What the host would have to wait for raises, from when it is called until the test ends."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
