"""One variant of one prompt, packed as it would be served: selected, gathered into pages, through the codec, into rows.

Knows the exact prompt and the rows that take it. Knows no task, no measure and no batch.

Shapes: L layers, K KV heads, S prompt tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from packlight.compress.budget import max_pages
from packlight.compress.layout import pages_of
from packlight.compress.pack import PackedLayer, pack
from packlight.compress.parts import CODECS
from packlight.compress.payload import decode_layer, encode_layer
from packlight.compress.recipes import codec_of, find_recipe
from packlight.compress.select import Selector
from packlight.core.types import ModelSpec, PackSpec
from packlight.engine.packed_rows import PackedRows
from packlight.evaluate.exact import Anchor, Clock, ExactPrompt
from packlight.kv.reading import Reading


@dataclass(frozen=True, slots=True)
class Footprint:
    """What is left of one prompt, and what it took to get there. Token counts are means over layers and KV heads.

    `num_read_tokens` is what a decode step reads of those kept; the summary of a page is as large as one token, and
    counts as one. `num_exact_read_tokens` is what attention over the exact KV reads: the prompt, or as much of it as a
    layer's sliding window shows. `packed_bytes` is the payload of a shipment. `select_s` covers scoring, selecting,
    packing and coding; `prefill_s` the exact prefill without any of these."""

    num_prompt_tokens: int
    num_kept_tokens: float
    num_read_tokens: float
    num_exact_read_tokens: float
    packed_bytes: int
    exact_bytes: int
    retained_mass: float
    select_s: float
    prefill_s: float


def pages_needed(spec: PackSpec, model: ModelSpec, num_prompt_tokens: int, page_size: int, num_new_tokens: int) -> int:
    """The head pages that a row takes at most. A mass floor may let it grow up to the whole prompt."""
    bounded_by = spec if spec.mass_floor == 0 else PackSpec()
    return max_pages(bounded_by, model, num_prompt_tokens, page_size, num_new_tokens=num_new_tokens)


def pack_prompt(
    prompt: ExactPrompt, anchor: Anchor, spec: PackSpec, rows: PackedRows, row_ids: Sequence[int], clock: Clock
) -> Footprint:
    """Packs what lies before the anchor, once, and stores the same pages in each of the rows."""
    model, page_size, codec = prompt.spec, prompt.pool.page_size, CODECS.load(codec_of(spec))()
    packing = _Packing(prompt, anchor, spec, clock)
    num_bytes, num_kept, num_read = 0, 0, 0
    for layer, packed in packing.layers():
        started = clock()
        payload = encode_layer(codec, packed)
        packing.select_s += clock() - started
        pages = decode_layer(codec, payload, packed.lengths, page_size, model.head_dim, prompt.pool.dtype)
        for row in row_ids:
            rows.store(row, layer, packed.lengths, *pages)
        num_bytes += payload.numel()
        num_kept += sum(packed.lengths)
        num_read += _num_read(packed.lengths, layer, rows.reading(row_ids[0]), model, page_size)
    num_sites = model.num_layers * model.num_kv_heads
    return Footprint(
        num_prompt_tokens=anchor.num_tokens,
        num_kept_tokens=num_kept / num_sites,
        num_read_tokens=num_read / num_sites,
        num_exact_read_tokens=_num_seen(model, anchor.num_tokens) / model.num_layers,
        packed_bytes=num_bytes,
        exact_bytes=model.kv_bytes_per_token(prompt.pool.dtype.itemsize) * anchor.num_tokens,
        retained_mass=packing.mass / model.num_layers,
        select_s=packing.select_s,
        prefill_s=prompt.prefill_s,
    )


@dataclass(slots=True)
class _Packing:
    """The layers of one selection, each as soon as it is decided."""

    prompt: ExactPrompt
    anchor: Anchor
    spec: PackSpec
    clock: Clock
    mass: float = 0.0
    select_s: float = 0.0

    def __post_init__(self) -> None:
        if find_recipe(self.spec.recipe).needs_all_queries:
            self.select_s += self.anchor.accumulate_s

    def layers(self) -> Iterator[tuple[int, PackedLayer]]:
        num_tokens, page_size = self.anchor.num_tokens, self.prompt.pool.page_size
        selector = Selector(self.spec, num_prompt_tokens=num_tokens, num_tokens=num_tokens)
        for layer in range(self.prompt.spec.num_layers):
            started = self.clock()
            kv = self.prompt.read(layer, num_tokens)
            view = self.prompt.view(self.anchor, layer, kv[0], self.spec.window)
            for ready, selection in selector.add(view, sliding_window(self.prompt.spec, layer)):
                packed = pack(*(kv if ready == layer else self.prompt.read(ready, num_tokens)), selection, page_size)
                self.mass += float(selection.retained_mass)
                self.select_s += self.clock() - started
                yield ready, packed
                started = self.clock()
            self.select_s += self.clock() - started


def _num_read(lengths: Sequence[int], layer: int, reading: Reading | None, model: ModelSpec, page_size: int) -> int:
    """Tokens of one layer that a decode step reads, over all heads, page summaries included."""
    if reading is None or layer < reading.num_dense_layers or sliding_window(model, layer) is not None:
        return sum(lengths)
    return sum(
        length
        if pages_of(length, page_size) <= reading.num_pages
        else reading.num_pages * page_size + pages_of(length, page_size)
        for length in lengths
    )


def _num_seen(model: ModelSpec, num_tokens: int) -> int:
    """Prompt tokens that the next token's attention sees, over all layers."""
    windows = (sliding_window(model, layer) for layer in range(model.num_layers))
    return sum(min(num_tokens, window or num_tokens) for window in windows)


def sliding_window(model: ModelSpec, layer: int) -> int | None:
    return model.sliding_windows[layer] if model.sliding_windows else None
