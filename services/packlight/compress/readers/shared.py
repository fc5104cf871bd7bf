"""The readers of one decode worker: which reader a request's packing asks for, and how many pages it may read.

Knows packing specs and the recipe table. Knows no batch and no page. Requests that ask for the same method with the
same constants share a reader object, because a step scores the rows of one reader in one call.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

from packlight.compress.budget import read_budget
from packlight.compress.parts import READERS
from packlight.compress.readers.site import ReaderSite
from packlight.compress.recipes import find_recipe, param_of
from packlight.core.types import PackSpec
from packlight.kv.reading import MIN_PAGES, PageReader, ReaderKey, Reading


class Readers:
    """Owns the readers, and through them whatever they remember of the `num_rows` rows of one head-page table."""

    def __init__(self, *, page_size: int, head_dim: int, num_rows: int) -> None:
        self._site = ReaderSite(page_size, head_dim, num_rows)
        # A reader lives as long as a request's `Reading` holds it; constants are chosen by requests, without end.
        self._readers: WeakValueDictionary[ReaderKey, PageReader] = WeakValueDictionary()

    def reading_of(self, spec: PackSpec, num_prompt_tokens: int) -> Reading | None:
        """How a row packed by `spec` is read, or None for densely: a dense reader, or a budget that covers the prompt.

        The budget in tokens is rounded down to whole pages, but to no fewer than MIN_PAGES."""
        budget = read_budget(spec, num_prompt_tokens)
        if not find_recipe(spec.recipe).reads_pages or budget >= num_prompt_tokens:
            return None
        num_pages = max(MIN_PAGES, budget // self._site.page_size)
        return self.reading(self._key(spec, num_prompt_tokens), num_pages, _dense_layers(spec))

    def reading(self, key: ReaderKey, num_pages: int, num_dense_layers: int) -> Reading:
        """The same of a row whose reader was chosen elsewhere."""
        return Reading(self._reader(key), num_pages, num_dense_layers, key)

    def forget(self, row: int) -> None:
        """`row` was closed. Needs to be called for every row that had a reading; does no harm for others."""
        for reader in list(self._readers.values()):
            reader.forget(row)

    def _key(self, spec: PackSpec, num_prompt_tokens: int) -> ReaderKey:
        name = find_recipe(spec.recipe).reader
        reader_class: Any = READERS.load(name)
        constants: dict[str, float] = reader_class.constants(spec, num_prompt_tokens, self._site)
        return ReaderKey(name, tuple(constants.items()))

    def _reader(self, key: ReaderKey) -> PageReader:
        reader: PageReader | None = self._readers.get(key)
        if reader is None:
            reader_class: Any = READERS.load(key.name)
            reader = self._readers[key] = reader_class(**dict(key.constants))
        return reader


def _dense_layers(spec: PackSpec) -> int:
    has_param = any(param.name == "dense_layers" for param in find_recipe(spec.recipe).params)
    return int(param_of(spec, "dense_layers")) if has_param else 0
