"""The micro-benchmarks that need no model: their arithmetic, and that what is printed says what was measured.

Sizes are tiny and no figure is compared with a clock: what a machine takes for anything is not asserted.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from packlight.attention.registry import BACKENDS
from packlight.bench import output
from packlight.bench.command import BENCHES, find_bench, parse
from packlight.bench.micro.measure.attention import SHAPES, Question, measure
from packlight.bench.micro.measure.index import PathShape, Tree
from packlight.bench.micro.measure.rows import Layout, make_rows
from packlight.bench.stream import Stream
from packlight.bench.timing import Spread, percentile, slices_of, take_turns
from packlight.compress.parts import CODECS
from packlight.compress.payload import payload_bytes
from packlight.core.errors import ConfigError
from packlight.core.types import ModelSpec, PackSpec
from packlight.prefix.memory import MemoryPrefixIndex
from tests.support.redis_servers import find_binary, running_server

MICRO = [name for name, module in BENCHES.items() if ".micro." in module]


@pytest.fixture(autouse=True)
def _same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bench(name: str, *arguments: str) -> int:
    module = find_bench(name)
    return module.run(parse(name, module, arguments))


def report_of(capsys, name: str, *arguments: str) -> dict:
    """What `--json` printed, which is all that was printed."""
    assert bench(name, *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


# ── timing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_subjects_take_turns_and_the_order_rotates():
    order = []

    def subject(name, value):
        return lambda: order.append(name) or value

    seconds = take_turns({"a": subject("a", 1.0), "b": subject("b", 2.0), "c": subject("c", 3.0)}, 3)
    assert "".join(order) == "abcbcacab"
    assert {name: spread.values for name, spread in seconds.items()} == {
        "a": (1.0,) * 3,
        "b": (2.0,) * 3,
        "c": (3.0,) * 3,
    }


def test_no_round_is_begun_that_would_not_end_within_the_budget():
    now = 0.0

    def subject():
        nonlocal now
        now += 4.0
        return 4.0

    def rounds_within(budget_s):
        return len(take_turns({"a": subject}, 9, budget_s=budget_s, clock=lambda: now)["a"].values)

    assert [rounds_within(budget_s) for budget_s in (1.0, 8.0, 15.9, 100.0)] == [1, 2, 3, 9]


def test_a_ratio_is_taken_in_each_round():
    # The machine was ten times slower in the second round: for both, so the ratio knows nothing of it.
    ours, theirs = Spread((1.0, 20.0, 3.0)), Spread((2.0, 40.0, 6.0))
    assert ours.over(theirs).values == (0.5, 0.5, 0.5)
    assert ours.median == 3.0
    assert ours.as_json() == {"median": 3.0, "min": 1.0, "max": 20.0}
    assert Spread((2.0, 4.0)).per(8.0).values == (4.0, 2.0)


def test_a_slice_is_as_many_calls_as_fit_after_two_that_do_not_count():
    now, num_calls = 0.0, 0

    def call():
        nonlocal now, num_calls
        num_calls += 1
        now += 10.0 if num_calls == 1 else 0.25

    take_slice = slices_of(call, slice_s=1.0, clock=lambda: now)
    assert num_calls == 2
    assert take_slice() == pytest.approx(0.25)
    assert num_calls == 2 + 4


def test_percentiles_are_values_that_occurred():
    values = [float(value) for value in range(100, 0, -1)]
    assert percentile(values, 0.5) == 50.0
    assert percentile(values, 0.07) == 7.0
    assert percentile(values, 0.99) == 99.0
    assert percentile(values, 1.0) == 100.0
    assert percentile([7.0, 8.0], 0.0) == percentile([7.0], 0.99) == 7.0


# ── output ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_json_goes_to_stdout_alone_or_to_a_file_beside_the_table(tmp_path, capsys):
    output.emit({"a": 1}, ["a table"], output.STDOUT)
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    output.emit({"a": 1}, ["a table"], str(tmp_path / "result.json"))
    assert json.loads((tmp_path / "result.json").read_text()) == {"a": 1}
    assert capsys.readouterr().out == "a table\n"
    output.emit({"a": 1}, ["a table"], None)
    assert capsys.readouterr().out == "a table\n"


@pytest.mark.parametrize("name", MICRO)
def test_a_file_in_no_folder_is_noticed_before_anything_is_measured(name, capsys):
    with pytest.raises(ConfigError, match="/nowhere/at/all"):
        bench(name, "--json", "/nowhere/at/all.json")


def test_a_table_is_as_wide_as_its_widest_cells():
    assert output.table(("name", "n"), [("longer", "1"), ("x", "1000")]) == [
        "name       n",
        "------  ----",
        "longer     1",
        "x       1000",
    ]


def test_numbers_may_be_written_short():
    assert output.counts("pages", "1e4,16") == [10_000, 16]
    for text in ("", "1,x", "0", "1.5"):
        with pytest.raises(ConfigError, match="--pages"):
            output.counts("pages", text)


def test_flags_are_known_without_torch():
    code = (
        "import argparse, sys\n"
        "from packlight.bench.command import find_bench\n"
        f"for name in {MICRO!r}:\n"
        "    bench = find_bench(name)\n"
        "    bench.add_arguments(argparse.ArgumentParser())\n"
        "    assert bench.SUMMARY and 'torch' not in sys.modules, f'{name} imports torch'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ── stream ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_limit_is_the_way_with_the_best_median():
    stream = Stream(num_threads=1, num_bytes=1 << 16)
    seconds = {name: Spread((1.0, 1.0, 1.0)) for name in stream.subjects()}
    seconds["stream/sum_i64"] = Spread((0.5, 0.5, 9.0))
    name, limit = stream.limit(seconds)
    assert (name, limit.values) == ("sum_i64", (0.5, 0.5, 9.0))
    assert stream.rates(seconds)["sum_i64"] == pytest.approx((1 << 16) / 0.5 / 1e9)
    assert all(read() > 0 for read in stream.subjects().values())
    assert ("stream/native" in seconds) != ("native" in stream.skipped)


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

SPEC = ModelSpec("t", "t", 2, 3, 16, 100, 4096, (), "bfloat16")


def test_rows_have_the_lengths_that_were_asked_for_and_count_what_a_step_reads():
    lengths = [[64, 70, 16], [33, 1, 128]]
    rows = make_rows(SPEC, Layout(16, torch.bfloat16), lengths, num_rows=2)
    assert rows.table.lengths[list(rows.rows)].tolist() == [lengths, lengths]
    token_bytes = 2 * 16 * 2
    for layer, tokens in enumerate(lengths):
        # Each head reads its new token as well.
        assert rows.layer_bytes(layer, 2) == 2 * (sum(tokens) + 3) * token_bytes


def test_pages_of_a_row_lie_in_runs_as_after_a_while_of_serving():
    rows = make_rows(SPEC, Layout(16, torch.bfloat16), [[1024] * 3] * 2, num_rows=4)
    steps = np.diff(rows.table.held(rows.rows[0]))
    assert 0.5 < (steps == 1).mean() < 1


def test_sparse_rows_count_the_pages_they_read_and_the_summaries_they_look_at():
    pack = PackSpec("quest", ratio=0.25, params=(("dense_layers", 1.0),))
    rows = make_rows(SPEC, Layout(16, torch.bfloat16), [[255] * 3] * 2, num_rows=1, pack=pack, num_prompt_tokens=255)
    assert rows.reading is not None
    page_bytes, summary_bytes = 2 * 16 * 16 * 2, 2 * 16 * 2
    assert rows.layer_bytes(0, 1) == 3 * 16 * page_bytes  # dense
    assert rows.layer_bytes(1, 1) == 3 * (rows.reading.num_pages * page_bytes + 16 * summary_bytes)


def test_coded_rows_take_a_record_per_page():
    codec = CODECS.load("int8")()
    rows = make_rows(SPEC, Layout(16, torch.bfloat16, "int8"), [[160, 32, 7]] * 2, num_rows=1)
    assert rows.page_bytes == codec.record_bytes(16, 16, torch.bfloat16)
    assert rows.page_bytes < 2 * 16 * 16 * 2


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────────

TINY = ("--slice", "0", "--stream-mb", "1", "--threads", "1")
TINY_ATTENTION = ("--context", "100", "--batch", "2", "--rounds", "3", *TINY)


def test_attention_reports_every_backend_beside_the_stream(capsys):
    report = report_of(capsys, "attention", *TINY_ATTENTION)
    assert report["stream_gbs"] > 0
    assert set(report["backends"]) | set(report["skipped"]) >= set(BACKENDS)
    assert {"reference", "sdpa"} <= set(report["backends"])
    layer_bytes = 2 * 3 * 101 * 2 * 64 * 2
    for name, entry in report["backends"].items():
        assert entry["layer_bytes"] == layer_bytes
        assert entry["gbs"] == pytest.approx(layer_bytes / entry["layer_ms"] / 1e6)
        assert entry["gbs_min"] <= entry["gbs"] <= entry["gbs_max"]
        assert entry["max_error"] is None if name == "reference" else entry["max_error"] < 0.02
    assert report["kv_bytes"] == 30 * layer_bytes
    assert report["machine"]["threads"] == 1
    assert report["machine"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_attention_also_reads_sparsely(capsys):
    report = report_of(capsys, "attention", *TINY_ATTENTION, "--backends", "reference,sdpa", "--sparse", "0.3")
    sparse = report["sparse"]["backends"]
    assert set(sparse) == {"reference", "sdpa"}
    # A head reads 1 of 7 pages, or the two that are always read; and looks at the summaries of seven.
    assert sparse["sdpa"]["layer_bytes"] == 2 * 3 * (2 * 2 * 16 * 64 * 2 + 7 * 2 * 64 * 2)
    assert sparse["sdpa"]["max_error"] < 0.02


def test_attention_over_a_coded_pool_counts_coded_bytes(capsys):
    report = report_of(capsys, "attention", *TINY_ATTENTION, "--backends", "sdpa", "--codec", "int8")
    record = CODECS.load("int8")().record_bytes(16, 64, torch.bfloat16)
    assert report["backends"]["sdpa"]["layer_bytes"] == 2 * 3 * 101 * record // 16


def test_large_shapes_are_laid_out_as_far_as_memory_goes():
    shape = SHAPES["llama8b"]
    layer_bytes = 2 * 2 * 50 * shape.num_kv_heads * shape.head_dim * 2
    question = Question(
        shape, Layout(16, torch.bfloat16), 50, 2, ("sdpa",), num_rounds=1, slice_s=0,
        memory_bytes=3 * layer_bytes, stream_bytes=1 << 16,
    )  # fmt: skip
    answer = measure(question, on_progress=print)
    assert answer.num_layers == 3
    assert answer.kv_bytes == 3 * layer_bytes * 51 // 50


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--backends", "sdpa,fast"), "--backends: unknown 'fast'; choose one of reference"),
        (("--shape", "gpt"), "--shape: unknown 'gpt'"),
        (("--codec", "zip"), "--codec: unknown 'zip'"),
        (("--dtype", "int3"), "--dtype: unknown 'int3'"),
        (("--context", "0"), "--context: got 0, must be at least 1"),
        (("--sparse", "1.5"), "--sparse: got 1.5"),
        (("--threads", "0"), "--threads: got 0"),
    ],
)
def test_attention_refuses_what_cannot_be(flags, words):
    with pytest.raises(ConfigError, match=words):
        bench("attention", *flags)


# ── codecs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_codecs_report_sizes_that_the_payload_has(capsys):
    report = report_of(capsys, "codecs", "--tokens", "70", "--rounds", "1", "--slice", "0", "--threads", "1")
    assert set(report["codecs"]) == set(CODECS)
    native_bytes = 3 * 5 * 2 * 16 * 64 * 2
    for name, entry in report["codecs"].items():
        assert entry["native_bytes"] == native_bytes
        due = payload_bytes(CODECS.load(name)(), [70] * 3, 16, 64, torch.bfloat16)
        assert entry["payload_bytes"] == due
        assert entry["ratio"] == pytest.approx(native_bytes / due)
        assert entry["encode_gbs"]["median"] > 0
        assert entry["decode_gbs"]["median"] > 0
    assert report["codecs"]["native"]["max_error"] == 0
    assert 0 < report["codecs"]["int8"]["max_error"] < report["codecs"]["int2"]["max_error"]


def test_codecs_that_have_no_form_for_a_head_are_named(capsys):
    report = report_of(
        capsys, "codecs", "--tokens", "16", "--head-dim", "48", "--rounds", "1", "--slice", "0", "--threads", "1"
    )
    assert "turboquant4" in report["skipped"]
    assert set(report["codecs"]) | set(report["skipped"]) == set(CODECS)


# ── index ────────────────────────────────────────────────────────────────────────────────────────────────────────────

TINY_INDEX = ("--pages", "500,5e3", "--rounds", "2", "--calls", "3", "--insertions", "2")


async def test_the_tree_counts_pages_once_however_many_paths_share_them():
    shape = PathShape(num_system=2, num_document=5, num_question=3, questions_per_document=2)
    tree = Tree(MemoryPrefixIndex(1000), shape)
    await tree.grow(2 + 2 * 5 + 4 * 3)
    assert (tree.num_paths, tree.num_pages) == (4, 24)
    assert len({page for number in range(4) for page in tree.path(number)}) == 24
    assert tree.path(0)[:7] == tree.path(1)[:7]
    assert tree.path(1)[:2] == tree.path(2)[:2]
    assert tree.path(1)[2] != tree.path(2)[2]
    for number in range(4):
        await tree.match(number)


def test_index_in_memory(capsys):
    report = report_of(capsys, "index", *TINY_INDEX, "--indexes", "memory")
    sizes = report["indexes"]["memory"]["sizes"]
    assert sizes[0]["pages"] >= 500
    assert sizes[1]["pages"] >= 5000
    assert all("match_over_ping" not in size for size in sizes)
    assert report["indexes"]["memory"]["growth"] == pytest.approx(
        sizes[1]["match_us"]["p50"] / sizes[0]["match_us"]["p50"]
    )


@pytest.mark.skipif(find_binary("redis") is None, reason="no redis-server")
def test_index_in_a_redis_of_its_own(capsys, monkeypatch):
    monkeypatch.delenv("REDIS_URL", raising=False)
    report = report_of(capsys, "index", *TINY_INDEX, "--indexes", "redis")
    for size in report["indexes"]["redis"]["sizes"]:
        assert 0 < size["match_us"]["p50"] <= size["match_us"]["p99"]
        assert size["ping_us"]["p50"] > 0
        ratio = size["match_over_ping"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert size["lookups_per_s"] > 0
        assert size["insert_us"]["p50"] > 0


def test_index_leaves_nothing_on_a_server_of_somebody_else(capsys, monkeypatch):
    with running_server("redis") as server:
        monkeypatch.setenv("REDIS_URL", server.url)
        report_of(capsys, "index", *TINY_INDEX, "--indexes", "redis")
        assert server.command("DBSIZE") == b":0\r\n"
