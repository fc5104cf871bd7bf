"""Traces: equal hash ids become equal text, every prompt has exactly its tokens, and bad lines are named."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadtest.replay import BLOCK_TOKENS, BlockTexts, Recorded, Replayed, read_trace, scale
from packlight.bench.serve.prompts import Prompts
from packlight.core.config import ModelConfig
from packlight.core.errors import ConfigError
from packlight.models.opened import open_model

SAMPLE = Path(__file__).parents[3] / "loadtest" / "traces" / "sample.jsonl"
BLOCK = 40


@pytest.fixture(scope="module", params=["fake", "smollm2"])
def prompts(request) -> Prompts:
    return Prompts(open_model(ModelConfig(path=request.param), on_progress=print).tokenizer, "chat")


@pytest.fixture
def texts(prompts) -> BlockTexts:
    return BlockTexts(prompts, BLOCK, "0")


def request_of(num_tokens: int, *hash_ids: int) -> Replayed:
    return Replayed(0.0, num_tokens, 1, hash_ids)


def count(prompts: Prompts, texts: BlockTexts, request: Replayed) -> int:
    return prompts.count(texts.system, texts.question(request))


def num_alike(one: str, other: str) -> int:
    """Characters before the first that differ."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


@pytest.mark.parametrize("num_tokens", [70, 101, 113, 159, 160, 161, 200, 437])
def test_a_prompt_has_exactly_its_tokens(prompts, texts, num_tokens):
    ids = range(-(-num_tokens // BLOCK))
    assert count(prompts, texts, request_of(num_tokens, *ids)) == num_tokens


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_tokens=st.integers(50, 400), ids=st.lists(st.integers(0, 1000), max_size=12, unique=True))
def test_whatever_the_ids(prompts, texts, num_tokens, ids):
    assert count(prompts, texts, request_of(num_tokens, *ids)) == max(num_tokens, texts.least_tokens)


def test_equal_ids_become_equal_text_and_others_do_not(prompts, texts):
    """Two that share three whole blocks, and one that shares none."""
    shared, other, alone = (
        texts.question(request_of(250, *ids)).content
        for ids in ((7, 8, 9, 1, 2, 3, 4), (7, 8, 9, 5, 6, 10, 11), (20, 21, 22, 23, 24, 25, 26))
    )
    beginning = " ".join(texts.text(block) for block in (7, 8, 9))
    assert shared.startswith(beginning)
    assert other.startswith(beginning)
    assert num_alike(shared, other) < len(beginning) + len(texts.text(1))
    assert num_alike(shared, alone) < len(texts.text(7)) / 2


def test_whole_blocks_have_the_tokens_of_a_block(prompts, texts):
    assert {prompts.count_text(f" {texts.text(block)}") for block in range(20)} == {BLOCK}


def test_a_longer_prompt_of_the_same_blocks_begins_as_the_shorter_one(texts):
    short = texts.question(request_of(150, 1, 2, 3, 4)).content
    long = texts.question(request_of(300, 1, 2, 3, 4, 5, 6, 7, 8)).content
    assert num_alike(short, long) >= len(" ".join([texts.text(1), texts.text(2)]))


def test_the_seed_changes_all_text_and_no_length(prompts, texts):
    again, other = (BlockTexts(prompts, BLOCK, seed) for seed in ("0", "1"))
    request = request_of(200, 1, 2, 3, 4, 5)
    assert again.question(request) == texts.question(request)
    assert other.question(request) != texts.question(request)
    assert prompts.count(other.system, other.question(request)) == 200


# ── lengths and time ─────────────────────────────────────────────────────────────────────────────────────────────────

TRACE = [
    Recorded(5000, 6000, 400, tuple(range(12))),
    Recorded(9000, 12_000, 4000, tuple(range(24))),
    Recorded(65_000, 100, 10, (0,)),
]


def test_the_longest_request_just_fits():
    scaled = scale(TRACE, duration_s=1000, speed=1, max_context=8000, length_scale=None)
    assert scaled.length_scale == 0.5
    assert scaled.block_tokens == BLOCK_TOKENS // 2
    assert [(r.due_s, r.input_tokens, r.output_tokens) for r in scaled.requests] == [
        (0, 3000, 200),
        (4, 6000, 2000),
        (60, 50, 5),
    ]
    assert scaled.num_clipped == 0


def test_lengths_that_fit_stay_as_they_are():
    assert scale(TRACE, duration_s=1000, speed=1, max_context=20_000, length_scale=None).length_scale == 1


def test_what_a_given_scale_leaves_too_long_is_clipped_and_counted():
    scaled = scale(TRACE, duration_s=1000, speed=1, max_context=8000, length_scale=1.0)
    assert scaled.num_clipped == 1
    assert all(request.input_tokens + request.output_tokens <= 8000 for request in scaled.requests)


def test_speed_and_duration_are_those_of_the_replay():
    scaled = scale(TRACE, duration_s=5, speed=2, max_context=8000, length_scale=None)
    assert [request.due_s for request in scaled.requests] == [0, 2]


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write(tmp_path, *lines: str) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines))
    return path


GOOD = json.dumps({"timestamp": 3, "input_length": 10, "output_length": 2, "hash_ids": [0], "more": "ignored"})


def test_requests_are_read_in_the_order_of_time(tmp_path):
    early = GOOD.replace('"timestamp": 3', '"timestamp": 1')
    assert [request.timestamp for request in read_trace(write(tmp_path, GOOD, "", early))] == [1, 3]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2: the line: Invalid JSON"),
        (GOOD.replace("input_length", "input"), "line 2: input_length: Field required"),
        (GOOD.replace("10", "-1"), "line 2: input_length: Input should be greater than or equal to"),
        (GOOD.replace("[0]", '["a"]'), r"line 2: hash_ids\.0: Input should be a valid integer"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, told):
    with pytest.raises(ConfigError, match=told):
        read_trace(write(tmp_path, GOOD, line))


def test_no_file_and_no_requests(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="has no requests"):
        read_trace(write(tmp_path, ""))


def test_the_sample_is_what_its_script_makes(tmp_path):
    made = tmp_path / "sample.jsonl"
    subprocess.run([sys.executable, str(SAMPLE.with_name("generate.py")), str(made)], check=True)
    assert made.read_bytes() == SAMPLE.read_bytes()


def test_the_sample_is_such_a_trace():
    """A block per 512 tokens, and an id that comes again has the same ids before it."""
    before: dict[int, tuple[int, ...]] = {}
    trace = read_trace(SAMPLE)
    for request in trace:
        assert len(request.hash_ids) == -(-request.input_length // BLOCK_TOKENS)
        for place, block in enumerate(request.hash_ids):
            assert before.setdefault(block, request.hash_ids[:place]) == request.hash_ids[:place]
    num_ids = sum(len(request.hash_ids) for request in trace)
    assert len(before) < 0.9 * num_ids
