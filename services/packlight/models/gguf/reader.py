"""The GGUF container: metadata, and where each tensor lies. Specification: ggml's `docs/gguf.md`, versions 2 and 3.

Knows bytes. Does not know architectures, tokenizers or where a tensor belongs in a model. The quantised block formats
are the `gguf` package's; its reader is not used, because it makes one array per vocabulary entry: 5 s for 49,000
tokens, against 0.1 s here.

    "GGUF" u32 version u64 num_tensors u64 num_fields
    fields:  string key, u32 type, value           (string: u64 length, UTF-8)
    tensors: string name, u32 num_dims, u64 dims[fastest first], u32 type, u64 offset into the data
    padding to `general.alignment`, then the data
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from packlight.core.errors import ModelError

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`shape` is numpy's (slowest dimension first); `type_id` is ggml's; `offset` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


class GGUFFile:
    """One GGUF file, mapped into memory. Raises ModelError, naming the file, for anything it cannot read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _explained(path):
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            cursor = _Cursor(self._map)
            num_tensors, num_fields = _read_preamble(cursor)
            self.metadata: dict[str, Any] = {cursor.string(): cursor.value(cursor.u32()) for _ in range(num_fields)}
            infos = [_read_tensor_info(cursor) for _ in range(num_tensors)]
            alignment = int(self.metadata.get("general.alignment", DEFAULT_ALIGNMENT))
            self._data_start = -(-cursor.position // alignment) * alignment
        self.tensors = {info.name: info for info in infos}

    def require(self, key: str) -> Any:
        """A metadata value that no model works without."""
        if key not in self.metadata:
            raise ModelError(f"{self.path}: the metadata lacks {key!r}. Convert the model again, or use safetensors")
        return self.metadata[key]

    def load(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor, dequantised exactly as the `gguf` package does it."""
        try:
            from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
        except ImportError:
            raise ModelError(f"{self.path}: GGUF needs the gguf package: pip install 'packlight[engine]'") from None
        info = self.tensors[name]
        try:
            kind = GGMLQuantizationType(info.type_id)
            block_elements, block_bytes = GGML_QUANT_SIZES[kind]
            raw = self._rows(info, row_bytes=info.shape[-1] // block_elements * block_bytes)
            return np.asarray(dequantize(raw, kind), dtype=np.float32)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise ModelError(
                f"{self.path}: cannot dequantise {name} (ggml type {info.type_id}: {error}). "
                "The file may be cut short; else use a common quantisation such as Q8_0 or Q4_K_M, or safetensors"
            ) from None

    def _rows(self, info: TensorInfo, *, row_bytes: int) -> npt.NDArray[np.uint8]:
        shape = (*info.shape[:-1], row_bytes)
        count = int(np.prod(shape, dtype=np.int64))
        offset = self._data_start + info.offset
        return np.frombuffer(self._map, dtype=np.uint8, count=count, offset=offset).reshape(shape)


class _Cursor:
    """Reads little-endian values one after the other. Running over the end raises struct.error or ValueError."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self._buffer = buffer
        self.position = 0

    def unpack(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self._buffer, self.position)
        self.position += struct.calcsize(layout)
        return value

    def u32(self) -> int:
        return int(self.unpack("<I"))

    def u64(self) -> int:
        return int(self.unpack("<Q"))

    def take(self, num_bytes: int) -> bytes:
        data = self._buffer[self.position : self.position + num_bytes]
        if len(data) != num_bytes:
            raise ValueError(f"{num_bytes} bytes wanted at {self.position}, {len(data)} left")
        self.position += num_bytes
        return data

    def string(self) -> str:
        return self.take(self.u64()).decode()

    def value(self, type_id: int) -> Any:
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY:
            return self._array(self.u32(), self.u64())
        if type_id not in _SCALARS:
            raise ValueError(f"metadata of unknown type {type_id} at {self.position}")
        return self.unpack(_SCALARS[type_id])

    def _array(self, type_id: int, length: int) -> list[Any]:
        layout = _SCALARS.get(type_id)
        if layout is None:
            return [self.value(type_id) for _ in range(length)]
        data = self.take(length * struct.calcsize(layout))
        return [value for (value,) in struct.iter_unpack(layout, data)]


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    if cursor.take(len(MAGIC)) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = cursor.u32()
    if version not in SUPPORTED_VERSIONS:
        raise ValueError(f"version {version} is not one of {SUPPORTED_VERSIONS}, or the file is big-endian")
    return cursor.u64(), cursor.u64()


def _read_tensor_info(cursor: _Cursor) -> TensorInfo:
    name = cursor.string()
    dims = [cursor.u64() for _ in range(cursor.u32())]
    return TensorInfo(name, tuple(reversed(dims)), cursor.u32(), cursor.u64())


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(f"{path}: cannot be opened ({error.strerror})") from None
    except (struct.error, ValueError, ArithmeticError) as error:
        raise ModelError(f"{path}: not a readable GGUF file ({error}). Download or convert it again") from None
