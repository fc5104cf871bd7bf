"""Whole models on the GPU: against the same model on the CPU in float32, and captured steps against eager ones."""

import pytest
import torch
import transformers

from packlight.attention.sdpa import SdpaAttention
from packlight.compress.readers.hsa import HSAReader
from packlight.compress.readers.quest import QuestReader
from packlight.core.config import DType, GraphsConfig, ModelConfig
from packlight.engine.graph_choice import Mode
from packlight.engine.graphs import CudaGraphs, GraphedRunner
from packlight.engine.runner import ChunkWork, DecodeRunner, Runner
from packlight.kv.pages import PageBook
from packlight.kv.pool import KVPool
from packlight.kv.reading import Reading
from packlight.kv.summaries import PageSummaries
from packlight.kv.table import HeadPageTable
from packlight.models.adapter import load_transformers_model
from packlight.models.base import load_model
from packlight.models.fused.plain import PlainModel
from packlight.models.opened import open_model
from tests.support.tiny_models import TINY_CONFIGS, write_model_folder

pytestmark = pytest.mark.gpu
PAGE, NUM_TOKENS = 16, 24
PROMPT = [(7 * index) % 250 + 3 for index in range(90)]


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3", "fused llama", "fused qwen3"])
def folder(request, tmp_path_factory):
    """Heads of 128, because there are kernels for them. The model is computed by transformers, or by the fused lane."""
    torch.manual_seed(0)
    lane, _, family = request.param.rpartition(" ")
    config = TINY_CONFIGS[family]()
    config.head_dim = 128
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return write_model_folder(tmp_path_factory.mktemp(f"{lane or 'transformers'}-{family}"), model)


def load(folder, dtype, device):
    """On the CPU, where answers come from that are right, by transformers in any case."""
    opened = open_model(ModelConfig(path=str(folder.path), dtype=dtype, device=device), on_progress=print)
    if device == "cuda" and folder.path.name.startswith("fused"):
        model = load_model(folder, opened.spec, device=device, on_progress=print)
        assert isinstance(model, PlainModel)
        return model
    return load_transformers_model(folder, opened.spec, device=device, on_progress=print)


def runner_of(model, backend, device):
    dtype = getattr(torch, model.spec.dtype)
    return Runner(model, KVPool(model.spec, num_blocks=16, page_size=PAGE, dtype=dtype, device=device), backend)


def logits_of(runner, tokens):
    """After each token from the prompt's end on: the prompt in two chunks, then token by token."""
    blocks = PageBook(16).allocate(16)
    runner.prefill([ChunkWork(tokens[:50], 0, blocks, False)])
    rows = [runner.prefill([ChunkWork(tokens[50 : len(PROMPT)], 50, blocks, True)])]
    for place in range(len(PROMPT), len(tokens)):
        rows.append(runner.prefill([ChunkWork(tokens[place : place + 1], place, blocks, True)]))
    return torch.cat(rows).cpu()


@pytest.fixture(scope="module")
def answer(folder):
    """The greedy answer on the CPU in float32, and its logits."""
    runner, tokens = runner_of(load(folder, DType.FLOAT32, "cpu"), SdpaAttention(), "cpu"), list(PROMPT)
    while len(tokens) < len(PROMPT) + NUM_TOKENS:
        tokens.append(int(logits_of(runner, tokens)[-1].argmax()))
    return tokens, logits_of(runner, tokens)


def test_tokens_in_float32_are_those_of_the_cpu(folder, answer):
    tokens, expected = answer
    got = logits_of(runner_of(load(folder, DType.FLOAT32, "cuda"), SdpaAttention(), "cuda"), tokens)
    assert got.argmax(-1).tolist() == expected.argmax(-1).tolist()
    torch.testing.assert_close(got, expected, atol=5e-3, rtol=5e-3)


def test_tokens_in_bfloat16_differ_only_where_two_are_nearly_equal(folder, answer, flashinfer):
    tokens, expected = answer
    got = logits_of(runner_of(load(folder, DType.BFLOAT16, "cuda"), flashinfer, "cuda"), tokens)
    error = float((got - expected).abs().max())
    assert error < 0.05 * float(expected.abs().max())
    best = expected.topk(2).values
    is_clear = best[:, 0] - best[:, 1] > 2 * error
    assert is_clear.sum() >= NUM_TOKENS // 3
    assert torch.equal(got.argmax(-1)[is_clear], expected.argmax(-1)[is_clear])


class World:
    """A pool of random packed KV on the GPU, and a runner over it."""

    def __init__(self, model, backend, *, graphs):
        spec = model.spec
        self.pool = KVPool(spec, num_blocks=120, page_size=PAGE, dtype=torch.bfloat16, device="cuda")
        self.pool.k.fill_(1e4)
        self.pool.v.fill_(1e4)
        shape = {"num_rows": 6, "num_layers": spec.num_layers, "num_kv_heads": spec.num_kv_heads}
        self.table = HeadPageTable(PageBook(self.pool.num_head_pages), page_size=PAGE, **shape)
        self.summaries = PageSummaries(self.pool.num_head_pages, spec.head_dim, torch.bfloat16, "cuda")
        self.generator, self.modes = torch.Generator().manual_seed(5), []
        self.runner = DecodeRunner(model, self.pool, backend)
        if graphs:
            sizes = GraphsConfig(batch_sizes=[1, 4], tokens=[6 * PAGE, 15 * PAGE])
            self.runner = GraphedRunner(model, self.pool, backend, CudaGraphs(self.pool.device), sizes=sizes)
            self.runner.on_mode = self.modes.append

    def add(self, length, growth=0):
        """`growth` more tokens in each layer than in the one before."""
        row, spec = self.table.open(), self.runner.model.spec
        for layer in range(spec.num_layers):
            length += growth
            pages = torch.from_numpy(self.table.fill_layer(row, layer, [length] * spec.num_kv_heads)).long().cuda()
            k, v = torch.randn(2, len(pages), PAGE, spec.head_dim, generator=self.generator).bfloat16().cuda()
            fill = [min(PAGE, length - start) for start in range(0, length, PAGE)] * spec.num_kv_heads
            self.pool.write_pages(pages, k, v)
            self.summaries.build(pages, k, torch.tensor(fill, device="cuda"))
        return row

    def step(self, rows, tokens, positions, reads):
        self.table.grow(rows)
        logits = self.runner.decode(self.table, rows, tokens, positions, reads=reads, summaries=self.summaries).cpu()
        self.table.advance(rows)
        return logits


def test_layers_of_different_lengths_are_replayed_too(folder, flashinfer):
    model = load(folder, DType.BFLOAT16, "cuda")
    graphed, eager = World(model, flashinfer, graphs=True), World(model, flashinfer, graphs=False)
    graphed.runner.prepare(graphed.table, graphed.summaries, on_progress=print)
    for world in (graphed, eager):
        live = [world.add(length, growth) for length, growth in ((70, 5), (16, 0), (90, 31))]
    for number in range(10):
        tokens, positions = [11 + number + row for row in live], [210 + number] * len(live)
        got, expected = (world.step(live, tokens, positions, ()) for world in (graphed, eager))
        torch.testing.assert_close(got, expected, atol=0.1, rtol=0.05)
    assert set(graphed.modes) == {Mode.REPLAYED}


@pytest.mark.parametrize("reader", [None, QuestReader(), HSAReader(num_dims=64)], ids=["dense", "quest", "hsa"])
def test_replayed_steps_are_the_eager_ones(folder, flashinfer, reader):
    """Batches of every size, rows that come and go, pages that fill up; freed memory is poisoned between replays."""
    model = load(folder, DType.BFLOAT16, "cuda")
    reading = Reading(reader, 3, num_dense_layers=1) if reader else None
    graphed, eager = World(model, flashinfer, graphs=True), World(model, flashinfer, graphs=False)
    graphed.runner.prepare(graphed.table, graphed.summaries, [reading] if reading else [], on_progress=print)
    for world in (graphed, eager):
        live = [world.add(length) for length in (70, 16, 200)]
    for number in range(30):
        if number == 10:
            live = live[1:]
        if number == 15:
            for world in (graphed, eager):
                world.table.close(0)
                new = world.add(33)
            live = [*live, new]
        if number == 22:
            live = live[-1:]
        poison = torch.full((1 << 22,), torch.nan, device="cuda")
        del poison
        reads = (reading,) * len(live) if reading else ()
        tokens, positions = [11 + number + row for row in live], [210 + number] * len(live)
        got, expected = (world.step(live, tokens, positions, reads) for world in (graphed, eager))
        torch.testing.assert_close(got, expected, atol=0.1, rtol=0.05)
    assert set(graphed.modes) == {Mode.REPLAYED}
