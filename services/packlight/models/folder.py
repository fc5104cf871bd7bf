"""A model folder in Hugging Face layout: its files, whether they are whole, and a sample that tells them apart.

Knows file names, JSON and the safetensors header. Does not know where folders come from (`source.py`), what a
configuration means (`spec.py`) or torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from packlight.core.errors import ModelError

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"

_HEAD_BYTES = 16 << 20
_NUM_SAMPLES, _SAMPLE_BYTES = 1024, 4096


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A checked folder. `name` is what clients call the model; a dummy has no weights (`dummy.py`). Usable wherever a
    path is."""

    path: Path
    name: str
    is_dummy: bool = False

    def __fspath__(self) -> str:
        return str(self.path)


class Hasher(Protocol):
    def update(self, data: bytes, /) -> None: ...


def check_folder(path: Path) -> None:
    """Raises ModelError, with path and fix, unless config, tokenizer and every weight file are there and whole."""
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: there is no config.json. {_hint(path)}")
    read_json(path / "config.json")
    if not (path / "tokenizer.json").is_file():
        raise ModelError(
            f"{path}: there is no tokenizer.json. Save the model's fast tokenizer there "
            "(transformers: AutoTokenizer.from_pretrained(...).save_pretrained(folder))"
        )
    for weights in weight_files(path):
        safetensors_header(weights)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of the model, by the rules of transformers. Raises ModelError if one is missing."""
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if not (path / WEIGHTS_INDEX).is_file():
        raise ModelError(f"{path}: there is neither {WEIGHTS} nor {WEIGHTS_INDEX}. {_hint(path)}")
    placed = read_json(path / WEIGHTS_INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ModelError(f"{path / WEIGHTS_INDEX}: it has no weight_map. Download the model again")
    files = [path / name for name in sorted(set(placed.values()))]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file}: listed in {WEIGHTS_INDEX}, but not there. Download the model again")
    return files


def safetensors_header(path: Path) -> dict[str, Any]:
    """Names, dtypes, shapes and offsets in a safetensors file. Raises ModelError if the file is cut or garbled."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max(entry["data_offsets"][1] for entry in entries.values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error}). Download the model again") from None
    if 8 + length + end != size:
        raise ModelError(f"{path}: {size} bytes long, {8 + length + end} expected. Download the model again")
    return entries


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError if it is unreadable or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}). Download or save the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value


def read_json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def sample_file(hasher: Hasher, path: Path) -> None:
    """Feed what tells a large file from others: its size, its first 16 MiB, and 4 KiB at 1024 even places of the rest.

    A few MiB are read whatever the size. Headers lie in the part that is read whole."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            hasher.update(size.to_bytes(8, "little"))
            hasher.update(file.read(_HEAD_BYTES))
            for offset in _sample_offsets(size):
                hasher.update(os.pread(file.fileno(), _SAMPLE_BYTES, offset))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None


def _sample_offsets(size: int) -> Iterator[int]:
    if size <= _HEAD_BYTES:
        return iter(())
    last = max(size - _SAMPLE_BYTES, _HEAD_BYTES)
    return (_HEAD_BYTES + (last - _HEAD_BYTES) * i // (_NUM_SAMPLES - 1) for i in range(_NUM_SAMPLES))


def _hint(path: Path) -> str:
    gguf = sorted(path.glob("*.gguf"))
    if gguf:
        return f"It holds a GGUF file: set model.path to {gguf[0]}"
    if any(path.glob("pytorch_model*.bin")):
        return "It holds PyTorch pickles, which are not loaded: save the model as safetensors"
    return "A model folder has config.json, tokenizer.json and *.safetensors; or give a GGUF file or a hub id"
