"""How rows are read, told to the ranks: once in the life of a row, because it does not change.

Knows the keys of readers and JSON. Every rank makes readers of its own from the keys, which score its own heads and
remember their queries; nothing of that travels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from packlight.compress.readers.shared import Readers
from packlight.kv.reading import ReaderKey, Reading


def told_readings(readings: Iterable[Reading | None]) -> str:
    """Those of rows that begin a life, in order. They come from `Readers`, so that they have a key."""
    return json.dumps([None if reading is None else _facts(reading) for reading in readings])


class ReadingMirror:
    """One rank's copy of how each row is read. Owns what its readers remember."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers
        self._readings: dict[int, Reading | None] = {}

    def apply(self, fresh_rows: Sequence[int], told: str) -> None:
        """`fresh_rows` begin a life, and are read as `told_readings` said."""
        for row, facts in zip(fresh_rows, json.loads(told), strict=True):
            self._readers.forget(row)
            self._readings[row] = None if facts is None else self._reading(*facts)

    def of(self, rows: Sequence[int]) -> tuple[Reading | None, ...]:
        return tuple(self._readings[row] for row in rows)

    def _reading(self, name: str, constants: list[tuple[str, float]], num_pages: int, num_dense_layers: int) -> Reading:
        key = ReaderKey(name, tuple((constant, value) for constant, value in constants))
        return self._readers.reading(key, num_pages, num_dense_layers)


def _facts(reading: Reading) -> tuple[object, ...]:
    assert reading.key is not None, "a reader that no other rank could make"
    return *reading.key, reading.num_pages, reading.num_dense_layers
