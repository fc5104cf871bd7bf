"""Streams: which token is fed where, when a row is done, and what is noted of it."""

from __future__ import annotations

import math

import pytest
import torch

from packlight.core.errors import InternalError
from packlight.evaluate.streams import (
    AnswerStream,
    Continuation,
    ContinuationStream,
    ForcedStream,
    Stream,
    greedy,
    relative_error,
)

VOCABULARY = 8
EOS = 7
OUTPUTS = torch.ones(2, 3)


def says(token_id: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(token_id), VOCABULARY).float()


def feed(stream: Stream, answers: list[int]) -> list[tuple[int, int]]:
    """(token, position) of every step until the stream is done; `answers` are what the model says."""
    fed = []
    for token_id in answers:
        if stream.is_done:
            break
        fed.append((stream.token_id, stream.position))
        stream.take(says(token_id), OUTPUTS)
    return fed


def answering(**kwargs) -> AnswerStream:
    defaults = {"position": 10, "max_tokens": 4, "eos_token_ids": (EOS,), "is_complete": lambda answer: False}
    return AnswerStream(**(defaults | kwargs))


def test_an_answer_goes_on_from_its_beginning():
    stream = answering(answer=[1])
    assert feed(stream, [2, 3, 4, 5]) == [(1, 10), (2, 11), (3, 12)]
    assert stream.answer == [1, 2, 3, 4]


def test_a_script_is_fed_before_the_answer():
    stream = answering(script=(5, 6), max_tokens=2)
    assert feed(stream, [0, 1, 2, 3]) == [(5, 10), (6, 11), (1, 12)]
    assert stream.answer == [1, 2]


def test_an_answer_ends_with_the_end_token_or_when_complete():
    ended = answering(answer=[1])
    feed(ended, [2, EOS, 3])
    assert ended.answer == [1, 2, EOS]
    complete = answering(answer=[1], is_complete=lambda answer: 2 in answer)
    feed(complete, [2, 3])
    assert complete.answer == [1, 2]


@pytest.mark.parametrize("answer", [[EOS], [1, 2, 3, 4]])
def test_an_answer_may_be_done_before_it_begins(answer):
    assert answering(answer=answer).is_done


def test_a_continuation_stops_before_the_end_token():
    stream = ContinuationStream(1, 10, max_tokens=5, eos_token_ids=(EOS,))
    assert feed(stream, [2, EOS, 3]) == [(1, 10), (2, 11)]
    result = stream.result()
    assert result.token_ids == (1, 2)
    assert result.logits_NV.argmax(1).tolist() == [2, EOS]
    assert result.outputs_NLC.shape == (2, 2, 3)


def test_a_continuation_has_a_token_even_if_the_answer_ends_at_once():
    stream = ContinuationStream(EOS, 10, max_tokens=5, eos_token_ids=(EOS,))
    feed(stream, [EOS, 1])
    assert stream.result().token_ids == (EOS,)


def test_a_continuation_ends_at_its_length():
    stream = ContinuationStream(1, 10, max_tokens=2, eos_token_ids=())
    assert len(feed(stream, [1, 1, 1, 1])) == 2


def test_a_forced_stream_feeds_the_exact_tokens_whatever_the_model_says():
    exact = Continuation((3, 4), torch.stack([says(4), says(5)]), torch.stack([OUTPUTS, OUTPUTS]))
    stream = ForcedStream(exact, start=10)
    assert feed(stream, [4, 6, 0]) == [(3, 10), (4, 11)]
    assert stream.agrees == [True, False]
    assert stream.kl_nats[0] == 0.0
    # One-hot logits that differ: two entries of the softmax change places.
    high, low = math.e / (math.e + VOCABULARY - 1), 1 / (math.e + VOCABULARY - 1)
    assert stream.kl_nats[1] == pytest.approx(high - low)
    assert stream.errors == [0.0, 0.0]


def test_relative_error_is_a_mean_over_layers():
    exact = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    packed = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert relative_error(exact, packed) == pytest.approx(0.25)
    assert math.isfinite(relative_error(torch.zeros(2, 2), torch.zeros(2, 2)))


def test_ties_go_to_the_lower_token_and_nan_is_an_error():
    assert greedy(torch.tensor([0.0, 2.0, 2.0])) == 1
    with pytest.raises(InternalError, match="not finite"):
        greedy(torch.tensor([0.0, math.nan]))
