"""A cluster of processes whose KV goes beside the stream: the same answers, and really by the way that was asked for.

The fake model's KV is so little that a layer is a few hundred bytes; how large ones travel is tested in
`tests/contract/test_transport_processes.py`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from packlight.core.errors import ShipmentIncompatible
from packlight.models.fake import fake_answer
from packlight.transfer.registry import build_transport
from packlight.wire.channel import Channels
from packlight.wire.decode import GrpcDecodeClient
from tests.e2e.helpers import ask, client_of, expected
from tests.support.cluster import SMALL_POOLS, eventually, running_cluster, running_worker
from tests.support.fake_pair import answer, make_request

pytestmark = pytest.mark.e2e

SETTINGS = (
    "model.path=fake",
    *SMALL_POOLS,
    "decode.max_batch=4",
    "index.timeout_s=0.25",
    "decode.staging_bytes=4194304",
)


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


def num_layers(cluster, transport, way):
    name = f"packlight_prefill_shipped_layers_total{{transport={transport}}}{{way={way}}}"
    return sum(cluster.metrics(worker).get(name, 0) for worker in ("prefill-0", "prefill-1"))


def num_links(cluster, worker, transport, event):
    role = worker.partition("-")[0]
    return cluster.metrics(worker).get(f"packlight_{role}_links_total{{event={event}}}{{transport={transport}}}", 0)


def test_answers_are_those_of_the_stream_and_bytes_go_beside_it(cluster, transport):
    with client_of(cluster.url) as client, ThreadPoolExecutor(4) as pool:
        # Shipments that come before the links are there go inline; both prefill workers get some.
        eventually(lambda: ask(client, "first", 2) and num_layers(cluster, transport, "beside") > 0)
        before = num_layers(cluster, transport, "beside"), num_layers(cluster, transport, "inline")
        prompts = [f"{number}: what is the sum of all of these bytes?" for number in range(24)]
        for prompt, (tokens, usage) in zip(
            prompts, pool.map(lambda prompt: ask(client, prompt, 20), prompts), strict=True
        ):
            assert tokens == expected(prompt, 20)
            assert usage.model_extra["kv"]["shipped_bytes"] > 0
    assert num_layers(cluster, transport, "beside") - before[0] >= 12
    made = [num_links(cluster, worker, transport, "made") for worker in ("prefill-0", "prefill-1")]
    assert max(made) == 1
    assert all(
        num_links(cluster, worker, transport, "dropped") == 0 for worker in ("prefill-0", "prefill-1", "decode-0")
    )


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
        assert [other.end(), one.end()] == [0, 0]
        assert "Traceback" not in one.output + other.output
