"""Fixtures shared by all tests. The real model is opened once per session."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Both before torch is imported. How threads wait: see packlight.cli. Processes of pytest-xdist share the cores already.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

from packlight.core.config import DType, ModelConfig
from packlight.core.workers import Role
from packlight.engine.build import build_model
from packlight.models.opened import OpenedModel, open_model
from tests.support.native import SANITIZED
from tests.support.pairwise import pairwise

# How long an example takes says more of the machine than of the code. `pytest --hypothesis-profile deep` looks longer
# wherever a test says no number of its own.
hypothesis.settings.register_profile("packlight", deadline=None, max_examples=50)
hypothesis.settings.register_profile("deep", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("packlight")

# Who is started in the background by a shell ignores interrupts, and so do the processes that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.support.redis_servers", "tests.support.tiny_models"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with long tests come first: whole files go to processes, and what takes minutes must not be begun last.
    Inside a file the order stays. A test with a timeout of its own is the longest of all.

    Sanitized kernels are slow: what the whole product of parameters says of them, the plain ones are asked."""
    if SANITIZED:
        kept = pairwise(items)
        chosen = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = kept
    long: dict[Path, list[bool]] = {}
    for item in items:
        marks = [item.get_closest_marker(name) is not None for name in ("timeout", "slow", "e2e")]
        long[item.path] = max(long.get(item.path, marks), marks)
    items.sort(key=lambda item: long[item.path], reverse=True)


@pytest.fixture(scope="session")
def smollm2() -> OpenedModel:
    """SmolLM2-135M-Instruct in float32: files, spec and tokenizer."""
    return open_model(ModelConfig(path="smollm2", dtype=DType.FLOAT32), on_progress=print)


@pytest.fixture(scope="session")
def smollm2_model(smollm2):
    """Its weights, behind our adapter."""
    config = ModelConfig(path="smollm2", dtype=DType.FLOAT32)
    return build_model(smollm2, config, Role.DECODE, on_progress=print)
