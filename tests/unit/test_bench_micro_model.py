"""The micro-benchmarks that run a model, on a tiny random Llama: every part is real but the size.

No figure is compared with a clock; bytes, tokens and ratios are.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from packlight.bench.command import find_bench, parse
from packlight.bench.micro.measure.packing import kept_lengths, parse_pack
from packlight.bench.micro.measure.receiver import Shipment
from packlight.bench.micro.measure.weights import weight_bytes
from packlight.bench.micro.transport import make_entry
from packlight.core.config import ModelConfig
from packlight.core.errors import ConfigError
from packlight.core.types import ModelSpec, Timings
from packlight.core.workers import Role
from packlight.engine.build import build_model
from packlight.models.opened import open_model
from packlight.transfer.registry import TRANSPORTS
from tests.support.tiny_models import TINY_CONFIGS, write_model_folder

LAYERS, KV_HEADS, HEAD_DIM, ITEM = 3, 2, 32, 4  # float32
TOKEN_BYTES = 2 * LAYERS * KV_HEADS * HEAD_DIM * ITEM


@pytest.fixture(autouse=True)
def _same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A folder; room for two thousand tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    config = TINY_CONFIGS["llama"]()
    config.max_position_embeddings = 2048
    torch.manual_seed(0)
    write_model_folder(folder, transformers.AutoModelForCausalLM.from_config(config))
    return str(folder)


def report_of(capsys, name: str, folder: str, *arguments: str) -> dict:
    module = find_bench(name)
    flags = ("--model", folder, "--set", "model.dtype=float32", *arguments, "--json")
    assert module.run(parse(name, module, flags)) == 0
    return json.loads(capsys.readouterr().out)


# ── step ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

TINY_STEP = ("--slice", "0", "--stream-mb", "1", "--threads", "1", "--rounds", "3", "--prefill-rounds", "1")


def test_step_counts_the_bytes_that_its_floor_is_made_of(tiny, capsys):
    report = report_of(
        capsys, "step", tiny, *TINY_STEP, "--batch", "1,2", "--context", "40,80", "--attention", "reference,sdpa"
    )
    steps = report["steps"]
    sizes = {(step["attention"], step["batch"], step["context"]) for step in steps}
    assert len(sizes) == len(steps) == 2 * 2 * 2
    for step in steps:
        assert step["kv_bytes"] == step["batch"] * (step["context"] + 1) * TOKEN_BYTES
        assert step["bytes"] == step["kv_bytes"] + report["weight_bytes"]
        assert step["floor_ms"] == pytest.approx(step["bytes"] / step["stream_gbs"] / 1e6)
        assert step["tokens_per_s"] == pytest.approx(1000 * step["batch"] / step["step_ms"]["median"])
        assert 0 < step["ratio"]["min"] <= step["ratio"]["median"] <= step["ratio"]["max"]


def test_step_reads_less_of_what_was_packed(tiny, capsys):
    report = report_of(
        capsys, "step", tiny, *TINY_STEP, "--batch", "1", "--context", "1024", "--attention", "sdpa",
        "--recipe", "none,snapkv@8,quest@8",
    )  # fmt: skip
    by_recipe = {step["recipe"]: step["kv_bytes"] for step in report["steps"]}
    assert by_recipe["none"] == 1025 * TOKEN_BYTES
    assert by_recipe["snapkv@8"] == (128 + 1) * TOKEN_BYTES
    assert by_recipe["snapkv@8"] < by_recipe["quest@8"] < by_recipe["none"]  # two of its layers read everything


def test_step_prefills_and_profiles(tiny, capsys):
    report = report_of(
        capsys, "step", tiny, *TINY_STEP, "--batch", "1", "--context", "16", "--attention", "sdpa",
        "--prefill", "70", "--set", "prefill.chunk_tokens=32",
    )  # fmt: skip
    [prefill] = report["prefill"]
    assert prefill["tokens"] == 70
    assert prefill["tokens_per_s"]["median"] == pytest.approx(70 / prefill["seconds"]["median"])
    report_of(capsys, "step", tiny, *TINY_STEP, "--batch", "1", "--context", "16", "--attention", "sdpa", "--profile")


def test_the_profile_goes_to_stderr(tiny, capsys):
    module = find_bench("step")
    flags = ("--model", tiny, *TINY_STEP, "--batch", "1", "--context", "16", "--attention", "sdpa", "--profile")
    assert module.run(parse("step", module, (*flags, "--json"))) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["steps"]
    assert "Self CPU" in shown.err


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_weights_are_counted_once(family, tmp_path):
    # Gemma goes through transformers, Llama through our own lane; both tie the head to the embedding.
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(TINY_CONFIGS[family]())
    write_model_folder(tmp_path, model)
    config = ModelConfig(path=str(tmp_path), dtype="float32")
    loaded = build_model(open_model(config, on_progress=print), config, Role.DECODE, on_progress=print)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters * ITEM <= weight_bytes(loaded) < 1.02 * num_parameters * ITEM  # and some buffers


# ── packing ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SPEC = ModelSpec("t", "t", 4, 2, 16, 100, 4096, (), "bfloat16", (None,) * 4)


def test_recipes_are_named_with_how_much_smaller_they_are():
    assert parse_pack("recipe", "snapkv@8", SPEC).ratio == 1 / 8
    assert parse_pack("recipe", "snapkv", SPEC).ratio == 0.25
    assert parse_pack("recipe", "none", SPEC).ratio is None
    for text in ("nothing", "snapkv@", "snapkv@0", "snapkv@x", "none@8"):
        with pytest.raises(ConfigError, match="--recipe"):
            parse_pack("recipe", text, SPEC)


def test_recipes_keep_what_they_would_keep_of_a_prompt():
    assert kept_lengths(SPEC, parse_pack("recipe", "none", SPEC), 800) == [[800] * 2] * 4
    assert kept_lengths(SPEC, parse_pack("recipe", "snapkv@8", SPEC), 800) == [[100] * 2] * 4
    pyramid = kept_lengths(SPEC, parse_pack("recipe", "pyramidkv@8", SPEC), 800)
    assert pyramid[0][0] > pyramid[-1][0]
    for name in ("adakv@8", "cake@8", "h2o@8"):
        lengths = kept_lengths(SPEC, parse_pack("recipe", name, SPEC), 800)
        assert sum(map(sum, lengths)) == pytest.approx(4 * 2 * 100, rel=0.05)


# ── selection ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_selection_is_a_share_of_the_prefill_of_its_round(tiny, capsys):
    report = report_of(
        capsys, "selection", tiny, "--tokens", "200,300", "--recipes", "none,snapkv@4,h2o@4", "--rounds", "1",
        "--threads", "1",
    )  # fmt: skip
    assert [length["tokens"] for length in report["lengths"]] == [200, 300]
    for length in report["lengths"]:
        assert list(length["recipes"]) == ["none", "snapkv@4", "h2o@4"]
        for entry in length["recipes"].values():
            share = entry["cost_ms"]["median"] / length["prefill_ms"]["median"]
            assert entry["share"]["median"] == pytest.approx(share)
        assert length["recipes"]["none"]["kept_share"] == 1
        assert length["recipes"]["snapkv@4"]["kept_share"] == pytest.approx(0.25, abs=0.01)
        assert length["recipes"]["snapkv@4"]["cost_ms"]["median"] > 0


def test_selection_refuses_prompts_that_the_model_cannot_have(tiny, capsys):
    with pytest.raises(ConfigError, match="--tokens: got 5000"):
        report_of(capsys, "selection", tiny, "--tokens", "5000")


# ── transport ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.e2e
def test_every_transport_ships_the_same_bytes_and_some_are_hidden(tiny, capsys):
    report = report_of(
        capsys, "transport", tiny, "--tokens", "100", "--rounds", "1", "--hidden", "--hidden-rounds", "1",
        "--threads", "1",
    )  # fmt: skip
    measured = report["transports"]
    assert set(measured) | set(report["skipped"]) == set(TRANSPORTS)
    assert {"inproc", "grpc"} <= set(measured)
    for name, entry in measured.items():
        assert entry["shipped_bytes"] == 112 * TOKEN_BYTES  # whole pages
        assert entry["gbs"]["median"] == pytest.approx(entry["shipped_bytes"] / entry["ready_ms"]["median"] / 1e6)
        assert entry["cpu_s_per_gib"]["median"] > 0
        assert ("hidden" in entry) == (name != "inproc")
        if name != "inproc":
            assert 0 <= entry["hidden"]["hidden_share"] <= 1
            assert entry["hidden"]["ready_ms"]["median"] >= entry["hidden"]["prefill_ms"]["median"]


def test_what_is_hidden_is_what_does_not_come_after_the_prefill():
    alone = Shipment(ready_s=0.5, cpu_s=1.0, shipped_bytes=1 << 30, timings=Timings(select_s=0.1))
    times = Timings(decode_queue_s=0.01, prefill_queue_s=0.02, prefill_s=3.0)
    entry = make_entry([alone], [Shipment(ready_s=3.13, cpu_s=9.0, shipped_bytes=1 << 30, timings=times)])
    assert entry["cpu_s_per_gib"]["median"] == 1.0
    assert entry["hidden"]["exposed_ms"]["median"] == pytest.approx(100)
    assert entry["hidden"]["sending_ms"]["median"] == pytest.approx(400)
    assert entry["hidden"]["hidden_share"] == pytest.approx(0.75)


# ── router ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_router_names_the_parts_of_its_overhead(tiny, capsys):
    report = report_of(
        capsys, "router", tiny, "--tokens", "900", "--requests", "3", "--answer", "4", "--documents", "2",
        "--set", "kv.recipe=none",
    )  # fmt: skip
    assert report["tokens"] <= 900
    assert report["tokens"] > 600
    assert report["times_tokenised"] == 1
    parts = report["parts_ms"]
    for part in ("total", "tokenise", "overhead", "parse", "template", "hash", "match", "per_event", "first_chunk"):
        assert 0 < parts[part]["min"] <= parts[part]["median"] <= parts[part]["p99"], part
    assert parts["total"]["median"] >= parts["overhead"]["median"]


def test_router_needs_a_tokenizer():
    module = find_bench("router")
    with pytest.raises(ConfigError, match="tokenizer"):
        module.run(parse("router", module, ["--model", "fake"]))
