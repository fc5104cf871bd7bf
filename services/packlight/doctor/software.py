"""What must be installed: the engine's libraries, a compiler for the kernels, and the model.

Torch is imported by the check that is about it and by nothing else: a router's doctor must do without.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from pathlib import Path

from packlight.core.config import ModelConfig
from packlight.core.errors import ModelError
from packlight.doctor.base import Finding, Patient, human_bytes, missing, ok, unused, warning
from packlight.models.folder import check_folder, weight_files
from packlight.models.source import PACKAGED_MODELS, packaged_file

_INSTALL = "pip install 'packlight[engine]' (on a machine without GPU install torch for CPUs first)"


def check_torch(patient: Patient) -> Finding:
    """Torch can be imported, which wheels for another platform or CUDA cannot."""
    if not patient.computes:
        return unused("the router does without")
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        return missing(f"it cannot be imported: {error}", _INSTALL)
    return ok(f"{torch.__version__}, {torch.get_num_threads()} threads")


def check_transformers(patient: Patient) -> Finding:
    """Installed; not imported, as that takes seconds."""
    if not patient.computes:
        return unused("the router does without")
    try:
        return ok(importlib.metadata.version("transformers"))
    except importlib.metadata.PackageNotFoundError:
        return missing("it is not installed", _INSTALL)


def check_native(patient: Patient) -> Finding:
    """The compiled CPU kernels: there, or a compiler to make them with at the first start."""
    if not patient.computes or patient.uses_gpu:
        return unused("only workers that compute on CPUs have use for them")
    from packlight.native.library import status

    native = status()
    if native.path is not None:
        return ok(f"{native.variant.name}, compiled")
    if native.compiler is not None:
        return ok(f"{native.variant.name}, compiled at the first start, by {native.compiler}")
    fix = "install one: apt-get install --no-install-recommends g++"
    wanted = [f"{name}.attention" for name, section in patient.sections.items() if section.attention == "cpu"]
    if wanted:
        return missing(f"{native.reason}, and {', '.join(wanted)} is cpu", fix)
    return warning(str(native.reason), f"{fix}; until then attention is torch's, which is slower")


def check_model(patient: Patient) -> Finding:
    """`model.path` leads to a model, and its files are whole. Downloads and converts nothing."""
    config = patient.config.model
    if config.path == "fake":
        return ok("fake: arithmetic instead of a model")
    try:
        return _model_at(config)
    except ModelError as error:
        return missing(error.message, "see docs/configuration.md, model.path")


def _model_at(config: ModelConfig) -> Finding:
    path = Path(config.path).expanduser()
    if config.path in PACKAGED_MODELS and not path.exists():
        file = packaged_file(config.path)
        return ok(f"{config.path}, {human_bytes(file.stat().st_size)}, from the package {_package(config.path)}")
    if path.is_file():
        if path.suffix != ".gguf":
            return missing(f"{path} is a single file and not GGUF", "for safetensors, give the folder it lies in")
        return ok(f"{path}, {human_bytes(path.stat().st_size)}, converted at the first start")
    if path.is_dir():
        check_folder(path)
        return ok(f"{path}, {human_bytes(sum(file.stat().st_size for file in weight_files(path)))}")
    return _hub_model(config.path)


def _hub_model(name: str) -> Finding:
    """Looked for in the hub's cache only: a doctor does not download gigabytes."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"model.path {name!r}: no such folder or file")
    if importlib.util.find_spec("huggingface_hub") is None:
        return missing(f"{name} is on the hub, whose library is not installed", _INSTALL)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return ok(f"{name}, in the hub's cache at {snapshot_download(name, local_files_only=True)}")
    except LocalEntryNotFoundError:
        return warning(f"{name} is not in the hub's cache", "the first start downloads it, which takes a network")


def _package(name: str) -> str:
    distribution = PACKAGED_MODELS[name].distribution
    return f"{distribution} {importlib.metadata.version(distribution)}"
