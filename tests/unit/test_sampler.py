import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.core.errors import InternalError
from packlight.core.hashing import counter_uniform
from packlight.core.types import SamplingParams, Token
from packlight.engine import sampler
from packlight.engine.draws import draw_rows
from packlight.engine.sampler import PenaltyState, SampleRow, sample, sample_on_device
from tests.support.tape import TapeEngine

GREEDY = SamplingParams(temperature=0.0)


class Only:
    """A constraint that always allows the same tokens."""

    def __init__(self, token_ids, num_tokens):
        self._mask = np.isin(np.arange(num_tokens), list(token_ids))

    def add(self, token_id):
        pass

    def allowed(self):
        return self._mask


def draw(logits, params, positions, **row):
    """The token ids drawn from one distribution at several positions."""
    logits_V = torch.as_tensor(logits, dtype=torch.float32)
    rows = [SampleRow(params, position, **row) for position in positions]
    return [token.token_id for token in sample(logits_V.expand(len(rows), -1), rows)]


def oracle_probabilities(logits, params):
    """What `params` make of `logits`, the slow way: fp64 [V], zero where filtered out."""
    logits = np.asarray(logits, dtype=np.float64)
    weights = np.exp((logits - logits.max()) / params.temperature)
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if params.top_k:
        ranked = ranked[: params.top_k]
    ranked = [token for token in ranked if weights[token] >= params.min_p * weights.max()]
    total, mass, nucleus = sum(weights[ranked]), 0.0, []
    for token in ranked:
        nucleus.append(token)
        mass += weights[token]
        if mass >= params.top_p * total:
            break
    kept = np.zeros_like(weights)
    kept[nucleus] = weights[nucleus]
    return kept / kept.sum()


def oracle_token(probabilities, params, position):
    """Inverse CDF over ascending ids, plus how far the noise is from the nearest border between two tokens."""
    noise, cdf = counter_uniform(params.seed, position), np.cumsum(probabilities)
    return int(np.argmax(cdf > noise)), float(np.abs(cdf - noise).min())


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.01, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 20, 500]),
    top_p=st.sampled_from([0.0, 0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(deadline=None)
@given(st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=60), params_strategy, st.integers(0, 10_000))
def test_equals_the_naive_sampler(logits, params, position):
    probabilities = oracle_probabilities(logits, params)
    expected, distance = oracle_token(probabilities, params, position)
    (drawn,) = draw(logits, params, [position])
    assert probabilities[drawn] > 0
    assert drawn == expected or distance < 1e-12


@pytest.mark.parametrize("prefix", [1, 4, 1024])
@pytest.mark.parametrize("top_p", [0.1, 0.8, 0.99, 0.999999])
def test_nucleus_is_the_same_however_little_is_sorted(monkeypatch, prefix, top_p):
    monkeypatch.setattr(sampler, "NUCLEUS_PREFIX", prefix)
    logits = np.random.default_rng(0).normal(size=3000).round(1)  # many ties, also at the border
    params = SamplingParams(top_p=top_p)
    allowed = set(np.flatnonzero(oracle_probabilities(logits, params)))
    drawn = set(draw(logits, params, range(400)))
    weights_N = torch.as_tensor(logits, dtype=torch.float32).double().exp()
    assert set(sampler._nucleus(weights_N, top_p).tolist()) == allowed
    assert drawn <= allowed


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=3),
        SamplingParams(seed=4, temperature=0.6),
        SamplingParams(seed=5, top_k=4),
        SamplingParams(seed=6, min_p=0.1),
        SamplingParams(seed=7, top_p=0.7),
        SamplingParams(seed=8, top_k=6, min_p=0.02, top_p=0.95, temperature=1.3),
    ],
)
def test_frequencies_follow_the_distribution(params):
    logits = [0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 1.5, 0.1]
    num_draws, expected = 4000, oracle_probabilities(logits, params)
    counts = np.bincount(draw(logits, params, range(num_draws)), minlength=len(logits))
    possible = expected > 0
    assert not counts[~possible].any()
    chi_square = (((counts - num_draws * expected) ** 2)[possible] / (num_draws * expected[possible])).sum()
    freedom = possible.sum() - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)  # the noise is fixed, so this cannot flicker


def test_a_row_does_not_notice_its_batch():
    generator = torch.Generator().manual_seed(0)
    logits_RV = 3 * torch.randn(7, 5000, generator=generator)
    rows = [
        SampleRow(GREEDY, 5),
        SampleRow(SamplingParams(seed=1), 5),
        SampleRow(SamplingParams(seed=1, top_p=0.9, num_logprobs=3), 5),
        SampleRow(SamplingParams(seed=2, top_k=40, min_p=0.01), 900),
        SampleRow(SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2), 7, PenaltyState([1, 2], [3])),
        SampleRow(SamplingParams(temperature=0.0, num_logprobs=0), 8, banned_token_ids=(4,)),
        SampleRow(SamplingParams(seed=3, grammar="any"), 9, constraint=Only(range(0, 5000, 7), 5000)),
    ]
    together = sample(logits_RV, rows)
    alone = [sample(logits_RV[[index]], [row])[0] for index, row in enumerate(rows)]
    backwards = sample(logits_RV.flip(0), rows[::-1])[::-1]
    assert together == alone == backwards


def test_seed_and_position_are_the_only_noise():
    logits = [0.0] * 1000
    first = draw(logits, SamplingParams(seed=1), range(50))
    assert draw(logits, SamplingParams(seed=1), range(50)) == first
    assert draw(logits, SamplingParams(seed=2), range(50)) != first
    assert draw(logits, SamplingParams(seed=1), range(1, 51))[:-1] == first[1:]
    assert first == [int(counter_uniform(1, position) * 1000) for position in range(50)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_lowest_of_equals(dtype):
    logits_RV = torch.tensor([[1, 5, 5, 0], [7, 7, 7, 7], [-3, -4, -2, -2]], dtype=dtype)
    assert sample(logits_RV, [SampleRow(GREEDY, 9)] * 3) == [Token(1), Token(0), Token(2)]


def test_ties_at_the_border_of_a_filter_go_to_lower_ids():
    logits = [2.0, 1.0, 1.0, 1.0, 1.0]
    assert set(draw(logits, SamplingParams(top_k=3), range(200))) == {0, 1, 2}
    assert set(draw([0.0] * 8, SamplingParams(top_p=0.5), range(200))) == {0, 1, 2, 3}
    assert set(draw([0.0] * 8, SamplingParams(min_p=1.0), range(200))) == set(range(8))


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(top_k=2)])
def test_bias_of_100_forces_and_of_minus_100_forbids(params):
    logits, forced = [0.0, 8.0, 3.0, 9.0], []
    for token in range(4):
        biased = replace(params, logit_bias=((token, 100.0),))
        forced.append(set(draw(logits, biased, range(30))))
    assert forced == [{0}, {1}, {2}, {3}]
    forbidden = replace(params, logit_bias=((3, -100.0), (1, -100.0)))
    assert set(draw(logits, forbidden, range(30))) <= {0, 2}


def test_biases_of_one_token_add_up_before_the_draw():
    assert draw([0.0, 1.0], SamplingParams(temperature=0.0, logit_bias=((0, 0.6), (0, 0.6))), [0]) == [0]


@settings(deadline=None)
@given(
    prompt=st.lists(st.integers(0, 9), max_size=20),
    generated=st.lists(st.integers(0, 9), max_size=20),
    repetition=st.sampled_from([1.0, 0.5, 1.7]),
    presence=st.sampled_from([0.0, -2.0, 1.5]),
    frequency=st.sampled_from([0.0, -0.5, 0.25]),
)
def test_penalties_equal_the_naive_ones(prompt, generated, repetition, presence, frequency):
    raw = [2.0, -1.0, 0.0, 3.5, -2.5, 1.0, 0.5, -0.5, 4.0, -4.0]
    expected = list(raw)
    for token in range(10):
        if token in prompt or token in generated:
            expected[token] = raw[token] / repetition if raw[token] > 0 else raw[token] * repetition
        expected[token] -= frequency * generated.count(token) + presence * (token in generated)
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, temperature=0.0
    )
    at_once, grown, logits_V = PenaltyState(prompt, generated), PenaltyState(prompt), torch.tensor(raw)
    for token in generated:
        grown.add(token)
    for state in (at_once, grown):
        shaped_V = logits_V.clone()
        state.apply(shaped_V, params)
        torch.testing.assert_close(shaped_V, torch.tensor(expected))
    (token,) = draw(raw, params, [0], penalties=at_once)
    assert expected[token] == pytest.approx(max(expected))


def test_bias_comes_before_the_repetition_penalty():
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0, logit_bias=((0, 4.0),))
    assert draw([0.0, 3.0], params, [0], penalties=PenaltyState([0])) == [1]  # (0 + 4) / 2 < 3
    assert draw([0.0, 3.0], params, [0], penalties=PenaltyState([1])) == [0]


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_p=0.1), SamplingParams(top_k=1)])
def test_banned_tokens_are_never_drawn(params):
    assert set(draw([9.0, 8.0, 0.0], params, range(40), banned_token_ids=(0, 1))) == {2}


def test_logprobs_are_of_the_raw_distribution():
    logits_V = torch.tensor([1.0, 3.0, 3.0, -torch.inf, 2.0])
    expected = logits_V.log_softmax(0)
    params = SamplingParams(temperature=0.0, logit_bias=((0, 100.0),), num_logprobs=3)
    (token,) = sample(logits_V[None], [SampleRow(params, 0)])
    assert token.token_id == 0
    assert token.logprob == expected[0].item()
    assert token.top_logprobs == ((1, expected[1].item()), (2, expected[2].item()), (4, expected[4].item()))


def test_logprobs_zero_and_more_than_the_vocabulary():
    logits_V = torch.tensor([0.0, 1.0])
    chosen, everything = sample(
        logits_V.expand(2, -1), [SampleRow(SamplingParams(temperature=0.0, num_logprobs=n), 0) for n in (0, 20)]
    )
    assert (chosen.token_id, chosen.top_logprobs) == (1, ())
    assert [token for token, _ in everything.top_logprobs] == [1, 0]
    assert chosen.logprob == everything.top_logprobs[0][1] == pytest.approx(-math.log1p(math.exp(-1)))


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(temperature=0.0, num_logprobs=2)])
@pytest.mark.parametrize("broken", [[torch.nan] * 4, [0, torch.nan, 9, 0], [0, torch.inf, 0, 0], [-torch.inf] * 4])
def test_a_broken_row_fails_alone(params, broken):
    healthy = [0.0, 50.0, 0.0, 0.0]
    results = sample(torch.tensor([healthy, broken, healthy]), [SampleRow(params, 12)] * 3)
    assert isinstance(results[1], InternalError)
    assert "position 12" in results[1].message
    assert [result.token_id for result in (results[0], results[2])] == [1, 1]


def test_banning_everything_fails_that_row_only():
    rows = [SampleRow(GREEDY, 0, banned_token_ids=(0, 1)), SampleRow(GREEDY, 0)]
    failed, drawn = sample(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), rows)
    assert isinstance(failed, InternalError)
    assert drawn == Token(1)


@pytest.mark.parametrize("token_id", [-1, 2])
def test_ids_beyond_the_vocabulary_fail_their_row_only(token_id):
    rows = [
        SampleRow(SamplingParams(temperature=0.0, logit_bias=((token_id, 1.0),)), 0),
        SampleRow(GREEDY, 0, banned_token_ids=(token_id,)),
        SampleRow(GREEDY, 0),
    ]
    *failed, drawn = sample(torch.tensor([[0.0, 1.0]] * 3), rows)
    assert all(isinstance(error, InternalError) and str(token_id) in error.message for error in failed)
    assert drawn == Token(1)


def test_logits_are_left_alone():
    logits_RV = torch.tensor([[0.0, 1.0, 2.0]])
    params = SamplingParams(presence_penalty=1.0, top_p=0.5, logit_bias=((0, 5.0),))
    sample(logits_RV, [SampleRow(params, 0, PenaltyState([], [2]), (1,))])
    assert logits_RV.tolist() == [[0.0, 1.0, 2.0]]


def test_tiny_temperature_is_greedy_and_does_not_overflow():
    logits = torch.linspace(-50, 50, 200)
    assert set(draw(logits, SamplingParams(temperature=1e-30), range(20))) == {199}


@pytest.mark.parametrize(("noise", "expected"), [(0.0, 2), (0.5, 3), (1 - 2**-53, 3)])
def test_noise_at_its_limits_draws_a_possible_token(monkeypatch, noise, expected):
    monkeypatch.setattr(sampler, "counter_uniform", lambda seed, position: noise)
    assert draw([-torch.inf, -torch.inf, 0.0, 0.0, -torch.inf], SamplingParams(), [0]) == [expected]


# ── many rows at once ────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=150)
@given(
    st.lists(st.sampled_from([-math.inf, -3.0, 0.0, 0.5, 0.5000001, 1.0, 4.0, 30.0]), min_size=2, max_size=40).filter(
        lambda logits: max(logits) > -math.inf
    ),
    st.lists(params_strategy, min_size=1, max_size=4),
    st.integers(0, 10_000),
)
def test_rows_drawn_at_once_are_rows_drawn_alone(logits, params, position):
    """Where the noise is not within rounding of the border between two tokens."""
    rows = [SampleRow(each, position + index) for index, each in enumerate(params)]
    logits_RV = torch.tensor(logits).expand(len(rows), -1)
    together, alone = sample_on_device(logits_RV, rows), sample(logits_RV, rows)
    for row, one, other in zip(rows, together, alone, strict=True):
        _, margin = oracle_token(oracle_probabilities(logits, row.params), row.params, row.position)
        assert one == other or margin < 1e-12


def test_a_large_vocabulary_at_once_with_rows_of_every_kind():
    """Greedy, filtered, penalised, with logprobs, broken: each as if it were alone."""
    logits_RV = 4 * torch.randn(9, 49_152, generator=torch.Generator().manual_seed(3))
    logits_RV[7, 5] = torch.nan
    rows = [
        SampleRow(GREEDY, 5),
        SampleRow(SamplingParams(seed=1), 5),
        SampleRow(SamplingParams(seed=1, top_p=0.9), 5),
        SampleRow(SamplingParams(seed=2, top_k=40, min_p=0.01, temperature=0.3), 900),
        SampleRow(SamplingParams(seed=2, top_k=1), 900),
        SampleRow(SamplingParams(repetition_penalty=1.3), 7, PenaltyState([1, 2], [3])),
        SampleRow(SamplingParams(seed=4, num_logprobs=2), 8),
        SampleRow(SamplingParams(seed=5), 9),
        SampleRow(SamplingParams(temperature=0.0), 8, banned_token_ids=(4,)),
    ]
    together, alone = sample_on_device(logits_RV, rows), sample(logits_RV, rows)
    assert isinstance(together.pop(7), InternalError)
    assert isinstance(alone.pop(7), InternalError)
    assert together == alone
    assert sample_on_device(logits_RV[:0], []) == []


def test_drawing_at_once_fetches_nothing_from_the_device():
    params = [SamplingParams(top_p=0.9, top_k=50), SamplingParams(), GREEDY]
    TapeEngine().capture(lambda: draw_rows(torch.randn(3, 500), params, [0.1, 0.5, 0.9]))


@pytest.mark.parametrize("noise", [0.0, 1.0 - 2.0**-53])
def test_noise_at_its_limits_draws_a_possible_token_at_once(monkeypatch, noise):
    monkeypatch.setattr(sampler, "counter_uniform", lambda seed, position: noise)
    logits_RV = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]])
    for params in (SamplingParams(), SamplingParams(top_p=0.999), SamplingParams(min_p=0.01)):
        assert sample_on_device(logits_RV, [SampleRow(params, 1)]) == [Token(1 if noise == 0.0 else 3)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_what_the_grammar_allows_is_drawn(temperature):
    params = SamplingParams(temperature=temperature, grammar="any", num_logprobs=1)
    row = SampleRow(params, 5, constraint=Only([2, 3], 5))
    [token] = sample(torch.tensor([[9.0, 8.0, 1.0, 1.0, 7.0]]), [row])
    assert token.token_id == 2 if temperature == 0.0 else token.token_id in (2, 3)
    assert token.top_logprobs[0][0] == 0  # log-probabilities are those of the model, not of the grammar


def test_a_grammar_that_allows_nothing_fails_its_row_only():
    logits_RV = torch.zeros(3, 4)
    rows = [
        SampleRow(GREEDY, 1),
        SampleRow(replace(GREEDY, grammar="any"), 1, constraint=Only([], 4)),
        SampleRow(replace(GREEDY, grammar="any"), 1, constraint=Only([3], 4)),
    ]
    first, failed, last = sample(logits_RV, rows)
    assert (first, last) == (Token(0), Token(3))
    assert isinstance(failed, InternalError)
