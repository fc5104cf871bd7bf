"""Captured decode steps against eager ones, with a recording of torch's operations in the place of CUDA's graphs."""

import numpy as np
import pytest
import torch

from packlight.attention.flashinfer.backend import FlashInferAttention
from packlight.compress.readers.hsa import HSAReader
from packlight.compress.readers.quest import QuestReader
from packlight.core.config import DType, GraphsConfig, ModelConfig
from packlight.engine.graph_choice import Mode
from packlight.engine.graphs import GraphedRunner
from packlight.engine.runner import DecodeRunner
from packlight.kv.pages import PageBook
from packlight.kv.pool import KVPool
from packlight.kv.reading import Reading
from packlight.kv.summaries import PageSummaries
from packlight.kv.table import HeadPageTable
from packlight.models.adapter import load_transformers_model
from packlight.models.opened import open_model
from tests.support.fake_flashinfer import fake_kernels
from tests.support.tape import TapeEngine
from tests.support.tiny_models import eager_model, write_model_folder

PAGE, ROWS = 4, 6
READERS = {"quest": QuestReader(), "hsa": HSAReader(num_dims=32)}


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request, tmp_path_factory):
    folder = write_model_folder(tmp_path_factory.mktemp(request.param), eager_model(request.param))
    opened = open_model(ModelConfig(path=str(folder.path), dtype=DType.FLOAT32), on_progress=print)
    return load_transformers_model(folder, opened.spec, device="cpu", on_progress=print)


class World:
    """A pool of random packed KV, and a runner over it."""

    def __init__(self, model, *, graphs):
        spec = model.spec
        self.pool = KVPool(spec, num_blocks=120, page_size=PAGE, dtype=torch.float32)
        self.pool.k.fill_(1e4)
        self.pool.v.fill_(1e4)
        shape = {"num_rows": ROWS, "num_layers": spec.num_layers, "num_kv_heads": spec.num_kv_heads}
        self.book = PageBook(self.pool.num_head_pages)
        self.table = HeadPageTable(self.book, page_size=PAGE, **shape)
        self.summaries = PageSummaries(self.pool.num_head_pages, spec.head_dim, torch.float32)
        self.generator, self.modes, self.engine = torch.Generator().manual_seed(5), [], TapeEngine()
        backend = FlashInferAttention("cpu", fake_kernels())
        if not graphs:
            self.runner = DecodeRunner(model, self.pool, backend)
            return
        sizes = GraphsConfig(batch_sizes=[1, 4], tokens=[6 * PAGE, 12 * PAGE])
        self.runner = GraphedRunner(model, self.pool, backend, self.engine, sizes=sizes)
        self.runner.on_mode = self.modes.append

    def add(self, lengths):
        """A row; `lengths[layer]` tokens in every head."""
        row, spec = self.table.open(), self.runner.model.spec
        for layer, length in enumerate(lengths):
            pages = torch.from_numpy(self.table.fill_layer(row, layer, [length] * spec.num_kv_heads)).long()
            k, v = torch.randn(2, len(pages), PAGE, spec.head_dim, generator=self.generator)
            fill = [min(PAGE, length - start) for start in range(0, length, PAGE)] * spec.num_kv_heads
            self.pool.write_pages(pages, k, v)
            self.summaries.build(pages, k, torch.tensor(fill))
        return row

    def step(self, rows, tokens, positions, **how):
        self.table.grow(rows)
        logits = self.runner.decode(self.table, rows, tokens, positions, summaries=self.summaries, **how).clone()
        self.table.advance(rows)
        return logits


@pytest.fixture(params=[None, *READERS])
def reading(request):
    return None if request.param is None else Reading(READERS[request.param], 5, num_dense_layers=1)


def pair(model, reading):
    worlds = World(model, graphs=True), World(model, graphs=False)
    progress = []
    worlds[0].runner.prepare(
        worlds[0].table, worlds[0].summaries, [reading] if reading else [], on_progress=progress.append
    )
    assert worlds[0].book.num_held == 0
    assert progress[-1].startswith(f"captured {12 if reading else 8} decode steps")
    return worlds


def test_replayed_steps_are_the_eager_ones(model, reading):
    """Batches of every size, rows that come and go, pages that fill up and begin, a row that is read densely."""
    graphed, eager = pair(model, reading)
    rows = {}
    for world in (graphed, eager):
        rows[world] = [world.add([length] * model.spec.num_layers) for length in (7, 16, 9)]
        assert rows[world] == rows[graphed]
    live = rows[graphed]
    token = 11
    for number in range(14):
        if number == 4:
            live = live[1:]
        if number == 6:
            for world in (graphed, eager):
                world.table.close(rows[graphed][0])
                new = world.add([5] * model.spec.num_layers)
            live = [*live, new]
        if number == 9:
            live = live[-1:]
        tokens, positions = [token + row for row in live], [40 + number] * len(live)
        reads = tuple(None if reading and row == live[-1] and number < 8 else reading for row in live)
        how = {"reads": reads if any(reads) else ()}
        got, expected = (world.step(live, tokens, positions, **how) for world in (graphed, eager))
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
        token = int(expected[0].argmax()) % 200
    assert set(graphed.modes) == {Mode.REPLAYED}
    assert torch.equal(graphed.pool.k_slots.isfinite(), eager.pool.k_slots.isfinite())


def test_layers_of_different_lengths_are_replayed_too(model):
    """As mass floors and layer budgets leave them; even and uneven rows in turn, and in one batch."""
    graphed, eager = pair(model, None)
    lengths = [[5, 14, 6], [8, 8, 8], [16, 1, 21]]
    for world in (graphed, eager):
        rows = [world.add(each) for each in lengths]
    for number, live in enumerate([rows, rows[1:2], rows[:1], rows[::-1], rows[1:2], rows]):
        tokens, positions = [number + row for row in live], [50 + number] * len(live)
        got, expected = (world.step(live, tokens, positions) for world in (graphed, eager))
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    assert set(graphed.modes) == {Mode.REPLAYED}


def test_what_does_not_fit_runs_eagerly_and_says_why(model):
    graphed, eager = pair(model, None)
    layers = model.spec.num_layers
    sparse = Reading(QuestReader(), 5)
    cases = {
        Mode.BATCH: [[5] * layers] * 5,
        Mode.PAGES: [[49] * layers],
    }
    for mode, lengths in cases.items():
        rows = [[world.add(each) for each in lengths] for world in (graphed, eager)]
        got, expected = (
            world.step(mine, [3] * len(mine), [60] * len(mine))
            for world, mine in zip((graphed, eager), rows, strict=True)
        )
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
        assert graphed.modes[-1] is mode
        for world, mine in zip((graphed, eager), rows, strict=True):
            for row in mine:
                world.table.close(row)
    row = graphed.add([5] * layers)
    graphed.step([row], [3], [60], reads=(sparse,))
    assert graphed.modes[-1] is Mode.READERS
    seen = []
    graphed.step([row], [3], [60], on_layer=lambda layer, queries: seen.append(layer))
    assert (graphed.modes[-1], seen) == (Mode.WATCHED, list(range(layers)))


def test_a_model_that_cannot_be_captured_runs_eagerly(model, caplog):
    world = World(model, graphs=True)

    class Refuses(TapeEngine):
        def capture(self, step):
            raise RuntimeError("operation not permitted when stream is capturing")

    world.runner._engine = Refuses()
    world.runner.prepare(world.table, world.summaries, on_progress=lambda text: None)
    assert "not permitted" in caplog.text
    assert world.book.num_held == 0
    world.step([world.add([5] * model.spec.num_layers)], [3], [60])
    assert world.modes == [Mode.NO_GRAPHS]


def test_a_replay_reads_nothing_but_its_buffers():
    """The recording is what is claimed of it: it refuses waits, and replays on garbage."""
    engine, x = TapeEngine(), torch.arange(4.0)
    with pytest.raises(RuntimeError, match="not permitted"):
        engine.capture(lambda: x * float(x.sum()))
    replay = engine.capture(lambda: (x * 2).view(2, 2).sum(0))
    x.copy_(torch.tensor([1.0, 1.0, 3.0, 4.0]))
    assert replay().tolist() == [8.0, 10.0]
    np.testing.assert_array_equal(x.numpy(), [1.0, 1.0, 3.0, 4.0])
