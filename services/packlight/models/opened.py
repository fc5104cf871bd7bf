"""A model as every process opens it: where its files are, what it is, how it reads text. Free of torch: routers do this
too, and only workers go on to load the weights (`models/base.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from packlight.core.config import ModelConfig
from packlight.core.types import ModelSpec
from packlight.models.fake_spec import FakeTokenizer, fake_spec
from packlight.models.folder import ModelFolder
from packlight.models.source import resolve
from packlight.models.spec import load_spec, resolve_dtype
from packlight.models.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """`folder` is None for the fake model, which has no files."""

    folder: ModelFolder | None
    spec: ModelSpec
    tokenizer: ChatTokenizer | FakeTokenizer


def open_model(config: ModelConfig, *, on_progress: Callable[[str], None]) -> OpenedModel:
    """Find, convert if need be, and describe the configured model. Raises ModelError with the path and the fix."""
    if config.path == "fake":
        return OpenedModel(None, fake_spec(max_context=config.max_context or 4096), FakeTokenizer())
    folder = resolve(config, on_progress=on_progress)
    spec = load_spec(
        folder,
        name=config.name or folder.name,
        dtype=resolve_dtype(config.dtype, config.device, config.weights),
        max_context=config.max_context,
    )
    return OpenedModel(folder, spec, ChatTokenizer.from_folder(folder))
