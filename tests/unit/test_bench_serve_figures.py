"""What durations and figures mean, on answers whose times are written down."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packlight.bench.serve.answers import Answer
from packlight.bench.serve.figures import MEASURES, Decoding, decoding, figures, ratio, spread
from packlight.bench.serve.results import Header, Run, Server, Turn, load
from packlight.core.errors import ConfigError

# Asked late: due at 1, sent at 1.5. Five tokens in three events, the last one without text.
LATE = Answer(due_s=1.0, sent_s=1.5, event_s=(2.0, 2.5, 3.5), end_s=4.0, num_output_tokens=5, num_prompt_tokens=9)
FAILED = Answer(due_s=0.0, sent_s=0.0, error="HTTP 503: no worker")
NO_SLO: dict[str, float] = {}


def steady(first_s: float, gap_s: float, num_tokens: int, **fields: object) -> Answer:
    """Sent at 0; a token an event."""
    times = tuple(first_s + index * gap_s for index in range(num_tokens))
    return replace(Answer(due_s=0, sent_s=0, event_s=times, end_s=times[-1], num_output_tokens=num_tokens), **fields)


def turn(*answers: Answer, server: str = "a", index: int = 0, **fields: object) -> Turn:
    known = {"prompt_tokens": 100, "load": "some", "concurrency": len(answers)}
    return Turn(round=index, server=server, answers=answers, **(known | fields))


def figure(key: str, of: Turn, slo: dict[str, float] = NO_SLO) -> float | None:
    (measure,) = [measure for measure in MEASURES if measure.key == key]
    return measure.of(of, slo)


def measure(key: str):
    return next(measure for measure in MEASURES if measure.key == key)


def test_durations_count_from_when_a_request_was_due() -> None:
    assert (LATE.ttft_s, LATE.e2e_s) == (1.0, 3.0)


def test_tpot_divides_by_tokens_and_gaps_are_between_events() -> None:
    assert LATE.tpot_s == (4.0 - 2.0) / 4
    assert LATE.gaps_s == (0.5, 1.0)
    assert LATE.tokens_per_event == 5 / 3


def test_one_token_has_no_tpot() -> None:
    single = steady(1.0, 0.1, 1)
    assert (single.ttft_s, single.tpot_s, single.gaps_s) == (1.0, None, ())


def test_a_failed_answer_has_no_durations() -> None:
    broken = replace(LATE, error="cut")
    for answer in (FAILED, broken):
        assert (answer.ttft_s, answer.tpot_s, answer.e2e_s, answer.tokens_per_event) == (None, None, None, None)
        assert answer.gaps_s == ()


def test_decoding_counts_only_while_all_are_at_it() -> None:
    early, late = steady(1.0, 0.1, 41), steady(3.0, 0.5, 5)  # 1.0 .. 5.0 and 3.0 .. 5.0
    found = decoding(turn(early, late))
    assert found == Decoding(pytest.approx(2.0), pytest.approx(20 + 4))
    assert figure("decode_tokens_per_s", turn(early, late)) == pytest.approx(12.0)
    assert figure("decode_window_s", turn(early, late)) == pytest.approx(2.0)


def test_answers_that_never_overlap_have_no_decode_rate() -> None:
    apart = turn(steady(1.0, 0.1, 5), steady(2.0, 0.1, 5))
    assert decoding(apart) is None
    assert figure("decode_tokens_per_s", apart) is None


def test_more_answers_than_run_at_once_add_their_stretches() -> None:
    answers = [steady(0.0, 0.25, 9), steady(0.0, 0.25, 5), steady(1.0, 0.25, 5)]
    found = decoding(turn(*answers, concurrency=2))
    assert found == Decoding(pytest.approx(2.0), pytest.approx(16))


def test_tokens_without_text_come_with_the_end() -> None:
    silent = steady(1.0, 1.0, 3, num_output_tokens=5, end_s=5.0)  # events at 1, 2, 3 and an end at 5
    assert decoding(turn(silent)) == Decoding(4.0, 4.0)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=6))
def test_the_decode_rate_is_that_of_counting_tenths_of_seconds(shapes: list[tuple[int, int, int]]) -> None:
    answers = [steady(first, gap, num) for first, gap, num in shapes]
    at_once = len(answers)
    seconds = tokens = 0
    for second in range(30 + 30 * 20):
        if all(answer.event_s[0] <= second and second + 1 <= answer.event_s[-1] for answer in answers):
            seconds += 1
            tokens += sum(second < at <= second + 1 for answer in answers for at in answer.event_s[1:])
    found = decoding(turn(*answers, concurrency=at_once))
    assert (found or (0, 0)) == pytest.approx((seconds, tokens))


def test_figures_are_medians_of_answers_and_totals_of_turns() -> None:
    of = turn(steady(1.0, 0.1, 11), steady(2.0, 0.2, 11), steady(4.0, 0.2, 11, is_follow_up=True), FAILED)
    assert figure("ttft_s", of) == 1.5
    assert figure("follow_up_ttft_s", of) == 4.0
    assert figure("tpot_s", of) == pytest.approx(0.2)
    assert figure("span_s", of) == pytest.approx(6.0)
    assert figure("output_tokens_per_s", of) == pytest.approx(33 / 6)
    assert figure("itl_p99_s", of) == pytest.approx(0.2)


def test_goodput_counts_a_failure_as_a_request_that_was_not_served_well() -> None:
    slo = {"ttft": 1.5, "tpot": 0.15}
    of = turn(steady(1.0, 0.1, 11), steady(2.0, 0.1, 11), steady(1.0, 0.2, 11), FAILED)
    assert figure("slo_share", of, slo) == 1 / 4
    assert figure("goodput_per_s", of, slo) == pytest.approx(1 / 3)
    assert figure("goodput_per_s", of) is None


def test_what_was_not_asked_for_is_not_found() -> None:
    asked = [steady(1.0, 0.1, 3, found=found) for found in (True, False, None)]
    assert figure("found_share", turn(*asked)) == 0.5
    assert figure("found_share", turn(asked[2])) is None


def test_ratios_are_taken_within_rounds() -> None:
    # The machine was twice as slow in the second round, and the base failed in the third.
    base = [turn(steady(1.0, 0.1, 5)), turn(steady(2.0, 0.2, 5), index=1), turn(FAILED, index=2)]
    other = [turn(steady(first, 0.1, 5), index=index) for index, first in enumerate((0.5, 1.0, 9.0))]
    assert ratio(other, base, measure("ttft_s"), NO_SLO).values == (0.5, 0.5)
    assert spread(base, measure("ttft_s"), NO_SLO).values == (1.0, 2.0)
    assert spread([turn(FAILED)], measure("ttft_s"), NO_SLO) is None
    assert ratio([turn(FAILED)], base, measure("ttft_s"), NO_SLO) is None


def made_up_run() -> Run:
    servers = tuple(Server(name=name, url="http://127.0.0.1:1", model="m") for name in "ab")
    header = Header(
        command="packlight bench serve",
        workload="chat",
        api="completions",
        tokenizer="smollm2",
        seed=0,
        max_tokens=5,
        prefill_first=False,
        servers=servers,
        machine={"cpu": "a cpu", "isa": ["avx2"]},
        slo_s={"ttft": 1.0},
    )
    kv = {"recipe": "snapkv", "kept_tokens": 12.5, "shipped_bytes": 1e6, "exact_bytes": 8e6}
    turns = [
        turn(steady(speed * 1.0, speed * 0.1, 5, kv=kv, found=True), LATE, server=name, index=index, peak=70.0 * speed)
        for index in range(3)
        for name, speed in (("a", 1), ("b", 2))
    ]
    return Run(header=header, turns=tuple(turns))


def test_a_run_survives_its_file(tmp_path) -> None:
    run, path = made_up_run(), tmp_path / "run.json"
    open_loop = turn(steady(1.0, 0.1, 5), prompt_tokens=7, load="1 per s", concurrency=None)
    run = replace(run, turns=(*run.turns, open_loop))
    path.write_text(run.to_json())
    assert load(path) == run
    path.write_text(replace(run, figures=figures(run)).to_json())
    found = load(path).figures["100 tokens, some"]
    assert found["b"]["peak"] == {"median": 140, "min": 140, "max": 140, "ratio": {"median": 2, "min": 2, "max": 2}}
    assert found["a"]["failed"] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", ["document"]), ('{"header": {}}', ["header", "Field required"]), ("[]", ["document"])],
)
def test_other_files_are_refused(tmp_path, text: str, words: list[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load(path)
    assert all(word in refused.value.message for word in [str(path), "take the run again", *words[1:]])


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*gone\.json"):
        load(tmp_path / "gone.json")
