"""A GGUF file, written out as a folder in Hugging Face layout, once.

Knows the cache of converted models: `<cache>/<name>-<digest>/`, complete as soon as it exists. Weights are stored in
float32, so they are exactly what the GGUF file means; the engine rounds to its own dtype when it loads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from packlight.core.errors import ModelError
from packlight.models.folder import sample_file
from packlight.models.gguf.architecture import Architecture, architecture_of, hf_config, tensor_names
from packlight.models.gguf.reader import GGUFFile
from packlight.models.gguf.tokenizer import build_tokenizer, chat_template, generation_config, tokenizer_config

# Part of every cache key: raise it when the same GGUF file would be written differently.
CONVERSION_VERSION = 1
_FLOAT32_BYTES = 4
# Weights are used where they are mapped; kernels want them to begin on a cache line.
_ALIGNMENT = 64

Progress = Callable[[str], None]


def converted(gguf_path: Path, *, name: str, cache_dir: Path, on_progress: Progress) -> Path:
    """The folder of `gguf_path`, converted now if it never was. Several processes may ask at once: one converts.

    Raises ModelError if the file cannot be read or the cache cannot be written."""
    target = cache_dir / f"{_file_name(name)}-{_cache_key(gguf_path)}"
    if target.is_dir():
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _held(FileLock(f"{target}.lock"), on_progress):
            if not target.is_dir():
                _convert_beside(gguf_path, target, on_progress)
    except OSError as error:
        raise ModelError(
            f"{target}: the converted model cannot be written ({error}). "
            "Set model.cache_dir to a writable folder with room for the weights in float32"
        ) from None
    return target


def convert(gguf_path: Path, folder: Path) -> None:
    """Write config, tokenizer, chat template and weights of `gguf_path` into `folder`, which exists."""
    gguf = GGUFFile(gguf_path)
    architecture = architecture_of(gguf)
    names = tensor_names(gguf, architecture)
    config = hf_config(gguf, architecture)
    tokenizer = build_tokenizer(gguf)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation_config(gguf))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(gguf))
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    template = chat_template(gguf)
    if template is not None:
        (folder / "chat_template.jinja").write_bytes(template.encode())
    shapes = {target: gguf.tensors[source].shape for source, target in names.items()}
    tensors = (_hf_tensor(gguf, source, architecture, config) for source in names)
    write_safetensors(folder / "model.safetensors", shapes, tensors)


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterator[npt.NDArray[np.float32]]
) -> None:
    """A safetensors file of float32 tensors, one at a time: the library's writer wants all of them in memory, twice.

    `tensors` come in the order of `shapes`. Format: u64 header length, JSON header, then the data back to back."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + int(np.prod(shape, dtype=np.int64)) * _FLOAT32_BYTES
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for shape, tensor in zip(shapes.values(), tensors, strict=True):
            assert tensor.shape == shape
            file.write(np.ascontiguousarray(tensor, dtype="<f4").data)


def _hf_tensor(
    gguf: GGUFFile, name: str, architecture: Architecture, config: Mapping[str, Any]
) -> npt.NDArray[np.float32]:
    tensor = gguf.load(name)
    if architecture.permutes_qk and ".attn_q." in name:
        return _unpermuted(tensor, config["num_attention_heads"])
    if architecture.permutes_qk and ".attn_k." in name:
        return _unpermuted(tensor, config["num_key_value_heads"])
    return tensor


def _unpermuted(rows: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Rows of each head from llama.cpp's order (0, d/2, 1, d/2+1, ...), for interleaved RoPE, to (0, 1, 2, ...)."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _convert_beside(gguf_path: Path, target: Path, on_progress: Progress) -> None:
    """Convert into a sibling and rename it: `target` is either absent or whole. The lock is held."""
    for stale in target.parent.glob(f"{target.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    on_progress(f"converting {gguf_path.name} to safetensors in {target} (once)")
    scratch = target.parent / f"{target.name}.tmp-{os.getpid()}"
    scratch.mkdir()
    try:
        convert(gguf_path, scratch)
        for path in (*scratch.iterdir(), scratch):
            _sync(path)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _sync(target.parent)


def _held(lock: FileLock, on_progress: Progress) -> Any:
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        on_progress("waiting for another process that converts the same model")
        return lock.acquire()


def _cache_key(gguf_path: Path) -> str:
    hasher = hashlib.blake2b(f"packlight gguf {CONVERSION_VERSION}".encode(), digest_size=8)
    sample_file(hasher, gguf_path)
    return hasher.hexdigest()


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
