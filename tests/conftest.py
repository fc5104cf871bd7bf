"""Fixtures shared by all tests. The real model is opened once per session."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported; see packlight.cli

import hypothesis
import pytest

from packlight.core.config import DType, ModelConfig
from packlight.core.types import Role
from packlight.engine.build import build_model
from packlight.models.opened import OpenedModel, open_model

# How long an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("packlight", deadline=None)
hypothesis.settings.load_profile("packlight")

pytest_plugins = ["tests.support.redis_servers", "tests.support.tiny_models"]


@pytest.fixture(scope="session")
def smollm2() -> OpenedModel:
    """SmolLM2-135M-Instruct in float32: files, spec and tokenizer."""
    return open_model(ModelConfig(path="smollm2", dtype=DType.FLOAT32), on_progress=print)


@pytest.fixture(scope="session")
def smollm2_model(smollm2):
    """Its weights, behind our adapter."""
    config = ModelConfig(path="smollm2", dtype=DType.FLOAT32)
    return build_model(smollm2, config, Role.DECODE, on_progress=print)
