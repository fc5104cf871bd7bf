"""One answer over several attempts: what is asked next, and how it ends when nothing more is tried."""

from __future__ import annotations

from dataclasses import replace

import pytest

from packlight.compress.policy import Decision, Plan
from packlight.core.errors import InvalidRequest, WorkerLost
from packlight.core.types import (
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    PackSpec,
    Progress,
    SamplingParams,
    StopRules,
    Token,
    Tokens,
    Usage,
)
from packlight.core.workers import Role, WorkerInfo
from packlight.router.attempts import Attempts
from packlight.router.placement import Pair, Reason

LOST = WorkerLost("gone")
SNAP = PackSpec("snapkv", ratio=0.5)


def make_attempts(num_tokens: int = 3) -> Attempts:
    request = GenerateRequest("mine", (5, 6), 2, SamplingParams(), StopRules(num_tokens), deadline_s=10.0)
    return Attempts(request, Plan(Decision(PackSpec()), on_hit=Decision(SNAP), hit_tokens=16))


def pair(number: int, num_cached_tokens: int = 0) -> Pair:
    prefill, decode = (
        WorkerInfo(f"{role}-{number}", 1, role, f"{role}:{number}", "model", "print", "same") for role in Role
    )
    return Pair(prefill, decode, False, num_cached_tokens, 0.1, Reason.CHEAPER)


def tokens(*token_ids: int) -> Tokens:
    return Tokens("mine.0", tuple(Token(token_id) for token_id in token_ids))


def progress(num_cached_tokens: int, num_generated_tokens: int) -> Progress:
    return Progress("mine.0", Usage(2, num_cached_tokens, num_generated_tokens))


def test_an_attempt_has_a_number_an_address_and_the_time_that_is_left():
    attempts = make_attempts()
    sent = [attempts.begin(pair(number), spent_s) for number, spent_s in ((7, 1.0), (8, 99.0))]
    assert [request.request_id for request in sent] == ["mine.0", "mine.1"]
    assert [(request.prefill_id, request.prefill_address) for request in sent] == [
        ("prefill-7", "prefill:7"),
        ("prefill-8", "prefill:8"),
    ]
    assert [request.deadline_s for request in sent] == [9.0, 0.001]
    assert attempts.num_made == 2


@pytest.mark.parametrize(("num_cached", "pack"), [(0, PackSpec()), (16, SNAP)])
def test_the_first_decision_holds_for_all_attempts(num_cached, pack):
    attempts = make_attempts()
    first, second = attempts.decide(pair(0, num_cached)), attempts.decide(pair(1, 16 - num_cached))
    assert first == second
    assert attempts.begin(pair(1), 0.0).pack == first.pack == pack


def test_an_answer_that_began_goes_on_from_what_the_client_has():
    attempts = make_attempts()
    attempts.see(tokens(1))
    attempts.see(tokens(2))
    assert attempts.resumed().token_ids == (5, 6, 1, 2)
    assert attempts.resumed().num_prompt_tokens == 2
    assert attempts.begin(pair(0), 0.0).token_ids == (5, 6, 1, 2)


def test_the_client_sees_one_answer():
    """Under one id; and as cached counts what the first attempt found, not what that one left for the next."""
    attempts = make_attempts()
    assert attempts.see(progress(16, 1)) == replace(progress(16, 1), request_id="mine")
    seen = attempts.see(progress(0, 2))
    assert isinstance(seen, Progress)
    assert seen.usage == Usage(2, 16, 2)


def test_whoever_failed_is_avoided():
    attempts = make_attempts()
    attempts.fail(LOST, "decode-0")
    attempts.fail(LOST, "prefill-1")
    assert attempts.avoid == {"decode-0", "prefill-1"}


@pytest.mark.parametrize(("error", "is_worth_another"), [(LOST, True), (InvalidRequest("no"), False)])
def test_only_what_may_go_better_elsewhere_is_tried_again(error, is_worth_another):
    attempts = make_attempts()
    attempts.fail(error, "decode-0")
    assert attempts.is_worth_another is is_worth_another
    assert attempts.end() == Failed("mine", error)


def test_an_end_that_was_lost_with_its_worker_is_made_up():
    attempts = make_attempts(num_tokens=2)
    attempts.see(progress(0, 1))
    attempts.see(tokens(1, 2))
    attempts.fail(LOST, "decode-0")
    assert not attempts.is_worth_another
    assert attempts.end() == Finished("mine", FinishReason.LENGTH, Usage(2, 0, 2))


def test_a_complete_answer_whose_usage_is_unknown_is_asked_for_again():
    attempts = make_attempts(num_tokens=2)
    attempts.see(tokens(1, 2))
    attempts.fail(LOST, "decode-0")
    assert attempts.is_worth_another
