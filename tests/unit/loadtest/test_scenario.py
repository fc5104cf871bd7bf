"""Scenario files: what is shipped is right, and what is wrong is told so by path and with what is allowed."""

from __future__ import annotations

import pytest

from loadtest.scenario import FOLDER, Burst, Trace, find_scenario, load_scenario, scenario_names
from packlight.core.errors import ConfigError

CHAT = """
about: a test
duration_s: 10
arrivals: {kind: steady, rate_per_s: 2}
prompts: {kind: chat, prompt_tokens: 128, max_tokens: 8}
"""


@pytest.fixture
def chat(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(CHAT)
    return path


def test_all_that_are_promised_are_shipped_and_right():
    promised = {
        "steady_chat",
        "long_documents",
        "shared_document",
        "multi_turn_agents",
        "burst",
        "ramp",
        "trace_replay",
    }
    assert promised | {"smoke"} == set(scenario_names())
    for name in scenario_names():
        scenario = load_scenario(find_scenario(name))
        assert scenario.about
        assert {"ttft", "tpot"} <= scenario.slo.limits().keys()


def test_the_smoke_run_is_short():
    """Less than a minute with the server's start; a slow machine gets longer for its answers."""
    assert load_scenario(find_scenario("smoke")).duration_s <= 30


def test_a_single_length_is_a_list_of_one(chat):
    assert load_scenario(chat).prompts.prompt_tokens == (128,)
    assert load_scenario(chat, ["prompts.prompt_tokens=[64, 256]"]).prompts.prompt_tokens == (64, 256)


def test_settings_can_be_changed_one_by_one(chat):
    scenario = load_scenario(chat, ["arrivals.rate_per_s=7.5", "slo.ttft_s=1", "max_in_flight=3"])
    assert (scenario.arrivals.rate_per_s, scenario.slo.ttft_s, scenario.max_in_flight) == (7.5, 1.0, 3)
    burst = "arrivals={kind: burst, rate_per_s: 1, burst_per_s: 9, every_s: 5, burst_s: 1}"
    assert isinstance(load_scenario(chat, [burst]).arrivals, Burst)


def test_a_trace_brings_its_own_prompts():
    assert isinstance(load_scenario(FOLDER / "trace_replay.yaml").arrivals, Trace)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            "duration=3",
            r"mine\.yaml: duration: no such setting, allowed here: about, arrivals, .*did you mean duration_s",
        ),
        (
            "arrivals.rate_per_sec=3",
            r"arrivals\.rate_per_sec: no such setting, allowed here: kind, process, rate_per_s; ",
        ),
        (
            "prompts.kind=poem",
            r"prompts\.kind: .*'chat', 'long_document', 'shared_document' or 'multi_turn', got 'poem'",
        ),
        ("arrivals.kind=steadily", r"arrivals\.kind: got 'steadily', must be one of steady, ramp, burst, trace"),
        ("arrivals.process=normal", r"arrivals\.process: input should be 'poisson' or 'constant', got 'normal'"),
        ("arrivals.rate_per_s=0", r"arrivals\.rate_per_s: input should be greater than 0, got 0"),
        ("arrivals.rate_per_s=many", r"arrivals\.rate_per_s: input should be a valid number.*, got 'many'"),
        ("slo.ttft=1", r"slo\.ttft: no such setting, allowed here: e2e_s, tpot_s, ttft_s"),
        ("duration_s=.inf", r"duration_s: input should be a finite number, got inf"),
        ("prompts.turns=3", r"prompts: turns 3: only prompts of kind multi_turn have several"),
        ("prompts=null", r"prompts: are missing, and only a trace brings its own"),
        ("arrivals={kind: trace, file: t.jsonl}", r"prompts: a trace brings its own, leave them out"),
        ("arrivals={kind: ramp, from_per_s: 1}", r"arrivals\.to_per_s: is missing"),
        (
            "arrivals={kind: burst, rate_per_s: 1, burst_per_s: 2, every_s: 3, burst_s: 3}",
            r"arrivals: burst_s 3 must be less than every_s 3",
        ),
        ("duration_s", r"--set duration_s: expected path=value"),
        ("duration_s=[", r"--set duration_s=\[: not a YAML value"),
    ],
)
def test_what_is_wrong_is_refused_with_its_path(chat, change, told):
    with pytest.raises(ConfigError, match=told):
        load_scenario(chat, [change])


@pytest.mark.parametrize(("text", "told"), [("- a list", "mapping of settings"), ("a: [", "not valid YAML")])
def test_a_file_that_is_no_mapping(tmp_path, text, told):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"bad\.yaml: .*{told}"):
        load_scenario(path)


def test_an_unknown_scenario_lists_those_that_are_known():
    with pytest.raises(ConfigError, match=r"--scenario stedy_chat: .*burst, long_documents, .*steady_chat"):
        find_scenario("stedy_chat")
