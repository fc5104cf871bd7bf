"""Tokens drawn on the GPU are those drawn on the CPU, from the same noise."""

import pytest
import torch

from packlight.core.types import SamplingParams
from packlight.engine.draws import draw_rows
from packlight.engine.sampler import PenaltyState, SampleRow, sample

pytestmark = pytest.mark.gpu


def test_the_same_tokens_as_on_the_cpu():
    """No noise here is near the border between two tokens, so there is nothing to be lenient about."""
    logits = 4 * torch.randn(96, 128_256, generator=torch.Generator().manual_seed(1))
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(seed=2, temperature=0.6, top_p=0.95),
        SamplingParams(seed=3, top_k=40),
        SamplingParams(seed=4, min_p=0.05, temperature=1.5),
        SamplingParams(seed=5, top_k=20, top_p=0.8, num_logprobs=3),
    ]
    rows = [SampleRow(kinds[index % len(kinds)], index) for index in range(95)]
    rows.append(SampleRow(SamplingParams(repetition_penalty=1.3, seed=6), 7, PenaltyState([1, 2], [3]), (9,)))
    on_gpu, on_cpu = sample(logits.cuda(), rows), sample(logits, rows)
    assert [token.token_id for token in on_gpu] == [token.token_id for token in on_cpu]


def test_drawing_does_not_wait_for_the_device(no_waiting):
    logits = torch.randn(8, 128_256, device="cuda")
    params = [SamplingParams(top_p=0.9, top_k=50, seed=seed) for seed in range(8)]
    draw_rows(logits, params, [0.5] * 8)
    torch.cuda.synchronize()
    no_waiting()
    draw_rows(logits, params, [0.5] * 8)
