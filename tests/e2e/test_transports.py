"""A cluster of processes whose KV goes beside the stream: the same answers, and really by the way that was asked for.

The fake model's KV is so little that a layer is a few hundred bytes; how large ones travel is tested in
`tests/contract/test_transport_processes.py`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from packlight.core.errors import ShipmentIncompatible
from packlight.models.fake import fake_answer
from packlight.transfer.registry import build_transport
from packlight.wire.channel import Channels
from packlight.wire.decode import GrpcDecodeClient
from tests.e2e.helpers import ask, client_of, expected
from tests.support.cluster import PATIENT, SMALL_POOLS, eventually, running_cluster, running_worker
from tests.support.fake_pair import answer, make_request

pytestmark = pytest.mark.e2e

SETTINGS = (
    "model.path=fake",
    *SMALL_POOLS,
    *PATIENT,
    "decode.max_batch=4",
    "decode.staging_bytes=4194304",
)


PREFILLS = ("prefill-0", "prefill-1")


@pytest.fixture(params=["nixl", "process_group"], scope="module")
def transport(request):
    try:
        made = build_transport(request.param)
        made.receiver(num_layers=1, max_layer_bytes=1).release(unused=True)
    except ShipmentIncompatible as error:
        pytest.skip(error.message)
    made.close()
    return request.param


@pytest.fixture(scope="module")
def cluster(transport):
    settings = (*SETTINGS, f"decode.transports=[{transport},grpc]")
    flags = [flag for setting in settings for flag in ("--set", setting)]
    with running_cluster("--prefill", "2", "--decode", "1", "--keep-going", *flags) as cluster:
        yield cluster


def num_layers(cluster, worker, transport, way):
    name = f"packlight_prefill_shipped_layers_total{{transport={transport}}}{{way={way}}}"
    return cluster.metrics(worker).get(name, 0)


def num_links(cluster, worker, transport, event):
    role = worker.partition("-")[0]
    return cluster.metrics(worker).get(f"packlight_{role}_links_total{{event={event}}}{{transport={transport}}}", 0)


def test_answers_are_those_of_the_stream_and_bytes_go_beside_it(cluster, transport):
    """Which prefill worker is asked is the router's choice. A link is made by the first shipment, which does not wait
    for it."""

    def counts(way):
        return {worker: num_layers(cluster, worker, transport, way) for worker in PREFILLS}

    with client_of(cluster.url) as client, ThreadPoolExecutor(4) as pool:
        eventually(lambda: ask(client, "first", 2) and sum(counts("beside").values()) > 0)
        linked = [worker for worker, num in counts("beside").items() if num]
        beside, inline, numbers = sum(counts("beside").values()), counts("inline"), count()

        def many_went_beside():
            prompts = [f"{next(numbers)}: what is the sum of all of these bytes?" for _ in range(24)]
            answers = pool.map(lambda prompt: ask(client, prompt, 20), prompts)
            for prompt, (tokens, usage) in zip(prompts, answers, strict=True):
                assert tokens == expected(prompt, 20)
                assert usage.model_extra["kv"]["shipped_bytes"] > 0
            return sum(counts("beside").values()) >= beside + 12

        eventually(many_went_beside)
    assert {worker: counts("inline")[worker] for worker in linked} == {worker: inline[worker] for worker in linked}
    assert max(num_links(cluster, worker, transport, "made") for worker in PREFILLS) == 1
    assert not any(num_links(cluster, worker, transport, "dropped") for worker in (*PREFILLS, "decode-0"))


def test_a_prefill_worker_that_dies_costs_no_answer(cluster):
    """The last test with this cluster."""
    with client_of(cluster.url) as client:
        for number in range(6):
            assert ask(client, f"{number} before", 8)[0] == expected(f"{number} before", 8)
        cluster.kill("prefill-0")
        for number in range(6):
            assert ask(client, f"{number} after", 8)[0] == expected(f"{number} after", 8)


async def test_workers_that_have_links_end_well(transport):
    """SIGTERM, and nothing is left to crash on: threads of links wait in foreign code."""
    settings = (f"decode.transports=[{transport},grpc]", "decode.staging_bytes=4194304")
    with running_worker("prefill") as (one, prefill_address), running_worker("decode", *settings) as (other, address):
        channels = Channels()
        client = GrpcDecodeClient(channels.get(address), "decode-0")
        for number in range(5):
            request = make_request([3, 1, 4, number], request_id=str(number), prefill_address=prefill_address)
            assert await answer(client, request) == fake_answer([3, 1, 4, number], 8)
        await client.close()
        await channels.close()
        ends = [other.end(), one.end()]
        assert ends == [0, 0], one.output[-5000:] + other.output[-5000:]
        assert "Traceback" not in one.output + other.output
