"""Real processes: short prompts are prefilled where they are decoded, and a fleet without prefill workers serves.

With the arithmetic model, 4096 tokens fit beside decode, and what does not is a long prompt.
"""

from __future__ import annotations

import openai
import pytest

from tests.e2e.helpers import Stream, ask, client_of, expected, health_of
from tests.support.cluster import SMALL_POOLS, RunningCluster, eventually, running_cluster

pytestmark = pytest.mark.e2e

POOL_TOKENS = 4096
SETTINGS = (
    "model.path=fake",
    "model.max_context=20000",
    *SMALL_POOLS,
    f"decode.local_prefill.kv_memory_bytes={POOL_TOKENS * 16}",
    "index.timeout_s=5",
    "prefill.attention=sdpa",
    "decode.attention=sdpa",
)
FLAGS = [flag for setting in SETTINGS for flag in ("--set", setting)]
SHORT, MIDDLE = "Is it here?", "A question of some length. " * 100
LONG = "So long that it does not fit beside decode. " * 100


def num_placed(cluster: RunningCluster, prefill: str) -> float:
    metrics = cluster.metrics("router")
    return sum(
        value
        for name, value in metrics.items()
        if name.startswith(f"packlight_router_placements_total{{prefill={prefill}}}")
    )


def num_prefilled(cluster: RunningCluster, name: str) -> float:
    return cluster.metrics(name).get("packlight_prefill_requests_total{outcome=completed}", 0.0)


@pytest.fixture(scope="module")
def alone():
    """One decode worker and a router."""
    with running_cluster("--prefill", "0", "--decode", "1", *FLAGS) as cluster:
        yield cluster
        assert cluster.process.end() == 0


def test_a_decode_worker_alone_serves(alone):
    with client_of(alone.url) as client:
        for prompt in (SHORT, MIDDLE):
            tokens, usage = ask(client, prompt, 20)
            assert tokens == expected(prompt, 20)
            assert usage.prompt_tokens == len(prompt)
        assert health_of(alone.url)["details"]["workers"] == {"prefill": 0, "decode": 1}
    assert (num_prefilled(alone, "decode-0"), num_placed(alone, "local")) == (2, 2)


def test_the_prefix_of_a_conversation_is_found_again(alone):
    turn = "The first turn of a chat, long enough for some pages of sixteen tokens."
    with client_of(alone.url) as client:
        ask(client, turn)

        def is_found() -> bool:
            tokens, usage = ask(client, turn + " And the second.")
            assert tokens == expected(turn + " And the second.", 8)
            return usage.prompt_tokens_details.cached_tokens == len(turn) // 16 * 16

        eventually(is_found)


def test_what_fits_nowhere_is_told_the_limit(alone):
    with client_of(alone.url) as client, pytest.raises(openai.APIStatusError) as refused:
        ask(client, LONG)
    assert refused.value.status_code == 503
    assert f"up to {POOL_TOKENS} tokens themselves" in refused.value.message
    assert "decode.local_prefill.kv_memory_bytes" in refused.value.message


def test_an_answer_that_runs_and_a_prompt_that_comes_share_the_thread(alone):
    with client_of(alone.url) as client:
        stream = Stream(client, SHORT, 1500)
        stream.read(20)
        for _ in range(3):
            assert ask(client, MIDDLE)[0] == expected(MIDDLE, 8)
        assert stream.read_all() == expected(SHORT, 1500)


def test_short_prompts_stay_long_ones_go_and_a_dead_prefill_worker_is_made_up_for():
    with (
        running_cluster("--prefill", "1", "--decode", "2", "--keep-going", *FLAGS) as cluster,
        client_of(cluster.url) as client,
    ):
        assert ask(client, SHORT)[0] == expected(SHORT, 8)
        assert ask(client, LONG)[0] == expected(LONG, 8)
        assert (num_placed(cluster, "local"), num_placed(cluster, "remote")) == (1, 1)
        assert num_prefilled(cluster, "prefill-0") == 1
        assert sum(num_prefilled(cluster, name) for name in ("decode-0", "decode-1")) == 1

        cluster.kill("prefill-0")
        for number in range(4):
            prompt = f"{number} {MIDDLE}"
            assert ask(client, prompt)[0] == expected(prompt, 8)
        with pytest.raises(openai.APIStatusError) as refused:
            ask(client, LONG)
        assert refused.value.status_code == 503
        eventually(lambda: health_of(cluster.url)["details"]["workers"] == {"prefill": 0, "decode": 2})
        assert health_of(cluster.url)["ready"]
        assert ask(client, MIDDLE)[0] == expected(MIDDLE, 8)
