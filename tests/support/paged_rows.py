"""Rows of ragged head pages with random KV, beside the same KV in plain tensors: what attention tests compare."""

import torch

from packlight.attention.base import DecodeBatch
from packlight.core.types import ModelSpec
from packlight.kv.coded import CodedPool
from packlight.kv.fp8_pool import FP8Pool
from packlight.kv.pages import PageBook
from packlight.kv.pool import KVPool
from packlight.kv.summaries import PageSummaries
from packlight.kv.table import HeadPageTable

SCALE = 0.3


def model_spec(num_layers, num_kv_heads, head_dim):
    return ModelSpec("m", "f", num_layers, num_kv_heads, head_dim, 10, 100, (), "float32", (None,) * num_layers)


class PagedRows:
    """`lengths[row][layer][head]` tokens each. `stored[row, layer, head]` is (k [S, D], v [S, D]).

    What is not stored must not matter: it is 1e4, and finite because the end of a page is multiplied by zero."""

    def __init__(
        self,
        lengths,
        *,
        num_heads,
        head_dim=8,
        page_size=4,
        num_blocks=128,
        dtype=torch.float32,
        seed=0,
        codec=None,
        device="cpu",
    ):
        self.generator = torch.Generator().manual_seed(seed)
        self.num_layers, self.num_kv_heads = len(lengths[0]), len(lengths[0][0])
        self.num_heads, self.head_dim, self.page_size, self.dtype = num_heads, head_dim, page_size, dtype
        self.device, memory = device, {"page_size": page_size, "dtype": dtype, "device": device}
        spec = model_spec(self.num_layers, self.num_kv_heads, head_dim)
        if codec is None:
            self.pool = KVPool(spec, num_blocks=num_blocks, **memory)
            self.pool.k.fill_(1e4)
            self.pool.v.fill_(1e4)
        elif codec == "fp8 pool":
            self.pool = FP8Pool(spec, num_blocks=num_blocks, **memory)
        else:
            num_open = len(lengths) * self.num_layers * self.num_kv_heads
            self.pool = CodedPool(spec, codec, num_blocks=num_blocks, max_open_pages=num_open, **memory)
        self.summaries = PageSummaries(self.pool.num_head_pages, head_dim, dtype, device)
        self.table = HeadPageTable(
            PageBook(self.pool.num_head_pages),
            num_rows=len(lengths) + 2,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            page_size=page_size,
        )
        self.stored = {}
        self.rows = [self._fill(row_lengths) for row_lengths in lengths]

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def _fill(self, row_lengths):
        row = self.table.open()
        for layer, lengths in enumerate(row_lengths):
            pages = torch.from_numpy(self.table.fill_layer(row, layer, lengths)).long()
            shape = (len(pages), self.page_size, self.head_dim)
            k_pages, v_pages = (torch.full(shape, 1e4).to(self.dtype) for _ in range(2))
            counts, page = [], 0
            for head, length in enumerate(lengths):
                k, v = self.random(length, self.head_dim), self.random(length, self.head_dim)
                self.stored[row, layer, head] = (k, v)
                for start in range(0, length, self.page_size):
                    counts.append(min(self.page_size, length - start))
                    k_pages[page, : counts[-1]] = k[start : start + self.page_size]
                    v_pages[page, : counts[-1]] = v[start : start + self.page_size]
                    page += 1
            filled = [x.to(self.device) for x in (pages, k_pages, v_pages, torch.tensor(counts))]
            self.pool.write_pages(*filled)
            self.summaries.build(*(filled[index] for index in (0, 1, 3)))
        return row

    def new_tokens(self, rows):
        """q, k, v of one step: `[layers, B, heads, D]`."""
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        return [self.random(self.num_layers, len(rows), count, self.head_dim).to(self.device) for count in heads]

    def step(self, backend, rows, reads=(), tokens=None, *, windows=None, on_layer=None):
        """One decode step; the outputs of all layers `[layers, B, heads, D]`. `stored` follows."""
        q, k, v = self.new_tokens(rows) if tokens is None else tokens
        self.table.grow(rows)
        plan = backend.plan(DecodeBatch(self.pool, self.table, tuple(rows), tuple(reads), self.summaries, on_layer))
        outputs = []
        for layer in range(self.num_layers):
            window = None if windows is None else windows[layer]
            outputs.append(plan.attend(layer, q[layer], k[layer], v[layer], scale=SCALE, sliding_window=window))
            for index, row in enumerate(rows):
                for head in range(self.num_kv_heads):
                    self._store(row, layer, head, k[layer, index, head], v[layer, index, head])
        self.table.advance(rows)
        return torch.stack(outputs)

    def _store(self, row, layer, head, k_D, v_D):
        place, k_D, v_D = self.table.overwrite[row, layer, head], k_D.cpu(), v_D.cpu()
        old = self.stored[row, layer, head]
        if place < 0:
            self.stored[row, layer, head] = tuple(
                torch.cat([x_SD, x_D[None]]) for x_SD, x_D in zip(old, (k_D, v_D), strict=True)
            )
        else:
            self.stored[row, layer, head] = tuple(x_SD.clone() for x_SD in old)
            for x_SD, x_D in zip(self.stored[row, layer, head], (k_D, v_D), strict=True):
                x_SD[place] = x_D

    def num_pages(self, row, layer, head):
        return -(-len(self.stored[row, layer, head][0]) // self.page_size)

    def page_ids(self, row, layer, head):
        return self.table.pages[row, layer, head, : self.num_pages(row, layer, head)].tolist()

    def expected(self, row, layer, q_HD, chosen=None, window=None):
        """Attention of one token over what is stored by now, or over the chosen pages of each head, the slow way."""
        group, q_HD = self.num_heads // self.num_kv_heads, q_HD.cpu()
        out_HD = torch.zeros(q_HD.shape)
        for head in range(self.num_heads):
            k, v = (x.float() for x in self.stored[row, layer, head // group])
            seen = torch.ones(len(k), dtype=torch.bool)
            if chosen is not None:
                seen = torch.isin(torch.arange(len(k)) // self.page_size, torch.tensor(chosen[head // group]))
            if window:
                seen[: max(0, len(k) - window)] = False
            weights = torch.softmax(k[seen] @ q_HD[head].float() * SCALE, 0)
            out_HD[head] = weights @ v[seen]
        return out_HD


def chosen_pages(scores, num_pages, budget):
    """The rule for every reader: the first page, the last, the best of the others with ties to the lower ordinal."""
    if num_pages <= budget:
        return list(range(num_pages))
    order = sorted(range(1, num_pages - 1), key=lambda page: (-scores[page], page))
    return sorted([0, *order[: budget - 2], num_pages - 1])


def bounds_of(k_SD, page_size):
    """[M, 2 * D], recomputed."""
    return torch.stack([torch.cat([page.amin(0), page.amax(0)]) for page in k_SD.split(page_size)])
