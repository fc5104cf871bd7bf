"""Transports beside the stream under real workers, in one process: answers, what is held, and what is measured."""

import pytest

from packlight.core.config import DecodeConfig, PrefillConfig
from packlight.core.errors import Draining, ShipmentIncompatible
from packlight.core.rate import LEAST_SHIPPED_BYTES
from packlight.core.types import Failed
from packlight.models.fake import fake_answer
from packlight.transfer import registry
from packlight.transfer.base import Site
from packlight.transfer.inline import InlineReceiver
from packlight.transfer.registry import build_transport
from tests.support.fake_pair import answer, collect, fake_pair, make_request

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
LONG = [index % 3 for index in range(8000)]  # small, so that the arithmetic stays exact in float32


@pytest.fixture(params=["nixl", "process_group"])
def transport(request):
    made = build_transport(request.param)
    try:
        made.receiver(num_layers=1, max_layer_bytes=1).release(unused=True)
    except ShipmentIncompatible as error:
        pytest.skip(error.message)
    made.close()
    return request.param


def layers_of(pair, transport, way):
    return pair.prefill._meter._metrics._layers.labels(transport, way)._value.get()


async def until_layers_go_beside(pair, transport):
    """The first shipments go inline, while the link is made."""
    for attempt in range(1000):
        assert await answer(pair.decode, make_request(PROMPT, request_id=str(attempt))) == fake_answer(PROMPT, 8)
        if layers_of(pair, transport, "beside"):
            return
    pytest.fail("no layer went beside the stream")


async def test_answers_are_the_same_beside_the_stream(transport):
    async with fake_pair(decode=DecodeConfig(transports=[transport])) as pair:
        await until_layers_go_beside(pair, transport)
        inline = layers_of(pair, transport, "inline")
        for number in range(20):
            prompt = [*PROMPT, number]
            request = make_request(prompt, request_id=f"beside {number}")
            assert await answer(pair.decode, request) == fake_answer(prompt, 8)
        assert layers_of(pair, transport, "inline") == inline


async def test_a_pairs_link_is_measured_by_its_shipments(transport):
    blocks, decode = 4096, DecodeConfig(transports=[transport])
    async with fake_pair(decode=decode, prefill_blocks=blocks, decode_blocks=blocks) as pair:
        await until_layers_go_beside(pair, transport)
        assert pair.decode.load().link_bytes_per_s == {}  # too little to tell
        request = make_request(LONG, 2, request_id="long")
        assert await answer(pair.decode, request) == fake_answer(LONG, 2)
        assert len(LONG) * 16 > LEAST_SHIPPED_BYTES
        rates = pair.decode.load().link_bytes_per_s
        assert rates.keys() == {"prefill-0"}
        shown = pair.decode._meter._metrics._link_pace.labels("prefill-0", transport)._value.get()
        assert shown == rates["prefill-0"] > 1e5


class Watched:
    """A transport whose receivers say how they were released."""

    def __init__(self, site=None):
        self.released = []

    def sender(self, offer):
        raise ShipmentIncompatible("it never reaches anybody")

    def receiver(self, *, num_layers, max_layer_bytes):
        transport = self

        class Receiver(InlineReceiver):
            offer = "somewhere"

            def release(self, *, unused=False):
                transport.released.append(unused)

        return Receiver(None)

    def close(self):
        self.released.append("closed")


@pytest.fixture
def watched(monkeypatch):
    """Instead of `nixl`."""
    watched = Watched()
    real = registry.TRANSPORTS.load
    monkeypatch.setattr(
        registry.TRANSPORTS, "load", lambda name: (lambda site: watched) if name == "nixl" else real(name)
    )
    return watched


async def test_a_transport_that_was_not_chosen_is_unused_from_then_on(watched):
    async with fake_pair(decode=DecodeConfig(transports=["nixl", "grpc"])) as pair:
        assert await answer(pair.decode, make_request(PROMPT)) == fake_answer(PROMPT, 8)
        assert watched.released == [True, False]  # released for good afterwards, like all
    assert watched.released[-1] == "closed"


async def test_so_is_one_of_a_request_that_was_refused(watched):
    async with fake_pair(decode=DecodeConfig(transports=["nixl", "grpc"]), prefill=PrefillConfig()) as pair:
        pair.prefill.drain()
        _, event = await collect(pair.decode, make_request(PROMPT))
        assert isinstance(event, Failed)
        assert isinstance(event.error, Draining)
        assert watched.released == [True, False]


def test_transports_are_built_for_where_the_worker_is():
    site = Site("0.0.0.0", "10.0.0.1:7")
    assert build_transport("process_group", site)._site is site
