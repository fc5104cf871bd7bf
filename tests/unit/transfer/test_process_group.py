"""Process groups: what arrives and is not wanted, strangers, links that cannot be made, and what listens where."""

import socket
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.core.errors import ShipmentCorrupt, ShipmentIncompatible
from packlight.core.shipping import LayerHeader
from packlight.transfer import process_group_links, process_group_receiving
from packlight.transfer.base import CPU, Site
from packlight.transfer.landings import Landings
from packlight.transfer.links import DROPPED, FAILED, MADE, LinkDown
from packlight.transfer.process_group import ProcessGroupTransport
from packlight.transfer.process_group_links import GOODBYE, NO_SHIPMENT
from packlight.transfer.process_group_pair import ASKS, WORD_TAG, Meeting, ask, part_of
from packlight.wire.frames import event_from_bytes
from tests.support.cluster import eventually
from tests.support.transport_peer import draw, payload


@pytest.fixture
def events():
    return []


@pytest.fixture
def transport(events):
    made = ProcessGroupTransport(Site(on_link=lambda transport, event: events.append(event)))
    yield made
    made.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("packlight-")]


def joined(transport, num_layers=3, max_layer_bytes=1 << 20):
    receiver = transport.receiver(num_layers=num_layers, max_layer_bytes=max_layer_bytes)
    sender = transport.sender(receiver.offer)
    sender.ready.result(10)
    return sender, receiver


def headers(sender, layer, data):
    return [event_from_bytes(frame) for frame in draw(sender.frames(layer, (1,), data))]


def test_payload_never_enters_the_stream(transport, events):
    sender, receiver = joined(transport)
    for layer, size in enumerate((1, 0, 1 << 20)):
        (header,) = headers(sender, layer, payload(size, layer))
        assert torch.equal(receiver.take(header).payload, payload(size, layer))
    eventually(lambda: events == [MADE, MADE])  # at both ends


def test_a_sender_who_cannot_be_met_costs_no_other(transport, events, monkeypatch):
    def met(store, name):
        if name == "unlucky":
            raise RuntimeError("too many open files")
        return part_of(store, name)

    monkeypatch.setattr(process_group_receiving, "part_of", met)
    receiver = transport.receiver(num_layers=1, max_layer_bytes=100)
    transport._meeting_point._store.clone().queue_push(ASKS, "unlucky/cpu")
    eventually(lambda: events == [FAILED])
    transport.sender(receiver.offer).ready.result(10)


def test_a_layer_before_the_link_is_there_goes_inline(transport):
    receiver = transport.receiver(num_layers=1, max_layer_bytes=100)
    sender = transport.sender(receiver.offer)
    if not sender.ready.done():
        assert next(iter(sender.frames(0, (1,), payload(100, 0)))).offset is None
    sender.ready.result(10)


def test_what_is_not_wanted_or_too_large_goes_inline_and_the_link_stays(transport, events):
    sender, receiver = joined(transport, num_layers=1, max_layer_bytes=100)
    assert headers(sender, 0, payload(101, 0))[0].offset is None
    assert headers(sender, 0, payload(100, 0))[0].offset is not None
    assert headers(sender, 1, payload(100, 0))[0].offset is None  # one layer too many
    receiver.release()
    assert headers(sender, 0, payload(100, 0))[0].offset is None
    assert DROPPED not in events


@given(offset=st.integers(0, 2**64 - 1), num_bytes=st.integers(0, 100))
@settings(deadline=None, max_examples=50)
def test_no_header_finds_what_has_not_arrived(offset, num_bytes):
    transport = ProcessGroupTransport()
    receiver = transport.receiver(num_layers=1, max_layer_bytes=100)
    with pytest.raises(ShipmentCorrupt, match="nothing arrived"):
        receiver.take(LayerHeader(0, (1,), num_bytes, 0, offset))
    transport.close()


@settings(deadline=None)
@given(st.text() | st.from_regex(r"[0-9.:/a-z]{1,60}", fullmatch=True))
def test_no_text_but_a_receivers_offer_is_connected_to(offer):
    with pytest.raises(ShipmentIncompatible, match="no offer"):
        ProcessGroupTransport().sender(offer)


@pytest.mark.parametrize("host", ["10.1.2.3", "worker-0.workers", "fd00::7"])
def test_a_meeting_survives_its_text(host):
    meeting = Meeting(host, 7001, "cpu", "0" * 32)
    assert Meeting.parse(str(meeting)) == meeting


def test_a_receiver_that_is_not_there_is_given_up_and_the_pair_rests(transport, events):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    offer = f"127.0.0.1:{port}/cpu/{'0' * 32}/7"
    sender = transport.sender(offer)
    with pytest.raises(LinkDown):
        sender.ready.result(10)
    assert headers(sender, 0, payload(5, 0))[0].offset is None
    eventually(lambda: events == [FAILED])
    with pytest.raises(ShipmentIncompatible, match="the next is tried in 10 s"):
        transport.sender(offer)


def test_somebody_else_at_the_same_address_is_not_taken_for_the_receiver(transport, events):
    receiver = transport.receiver(num_layers=1, max_layer_bytes=100)
    address, device, _, shipment = receiver.offer.split("/")
    sender = transport.sender(f"{address}/{device}/{'0' * 32}/{shipment}")
    with pytest.raises(LinkDown):
        sender.ready.result(10)


def test_a_worker_whose_host_is_not_its_own_does_not_offer_it():
    transport = ProcessGroupTransport(Site("192.0.2.1"))  # for documentation: no machine has it
    with pytest.raises(ShipmentIncompatible, match=r"no store can listen on 192\.0\.2\.1"):
        transport.receiver(num_layers=1, max_layer_bytes=1)


def test_it_listens_where_the_worker_does_and_nowhere_else(transport):
    receiver = transport.receiver(num_layers=1, max_layer_bytes=100)
    port = int(receiver.offer.partition("/")[0].rpartition(":")[2])
    sockets = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    listening = [fields[1] for fields in sockets if fields[3] == "0A" and fields[1].endswith(f":{port:04X}")]
    assert listening == [f"0100007F:{port:04X}"]


@pytest.mark.parametrize("words", [[NO_SHIPMENT, 1, GOODBYE - 1], [NO_SHIPMENT, 1, 1 << 60]])
def test_a_sender_that_announces_nonsense_is_dropped(transport, events, words):
    receiver = transport.receiver(num_layers=1, max_layer_bytes=100)
    pair = ask(Meeting.parse(receiver.offer.rpartition("/")[0]), "127.0.0.1", CPU)
    announced = torch.tensor(words)
    pair.wait(pair.send_words(announced, WORD_TAG), 5)
    eventually(lambda: events == [MADE, DROPPED])
    answer = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError):
        pair.wait(pair.receive_words(answer, WORD_TAG), 5)


def test_a_link_that_is_idle_stays(monkeypatch, events, transport):
    monkeypatch.setattr(process_group_links, "PING_S", 0.02)
    monkeypatch.setattr(process_group_receiving, "SILENCE_S", 0.5)
    sender, receiver = joined(transport)
    assert not threading.Event().wait(1.0)
    (header,) = headers(sender, 0, payload(50, 0))
    assert header.offset > 5  # pings were counted in between
    assert torch.equal(receiver.take(header).payload, payload(50, 0))
    assert DROPPED not in events


def test_a_sender_that_says_nothing_is_given_up(monkeypatch, events, transport):
    monkeypatch.setattr(process_group_receiving, "SILENCE_S", 0.2)
    receiver = transport.receiver(num_layers=1, max_layer_bytes=100)
    pair = ask(Meeting.parse(receiver.offer.rpartition("/")[0]), "127.0.0.1", CPU)
    eventually(lambda: events == [MADE, DROPPED])
    assert pair is not None


def test_no_layer_is_lost_when_a_link_breaks_under_it(transport, monkeypatch):
    """Whatever operation fails first, every layer's future ends."""
    sender, _ = joined(transport, num_layers=50)

    def fails(self, pair, parcel):
        raise RuntimeError("torn")

    monkeypatch.setattr(process_group_links.SendingLink, "_post", fails)
    begun = [sender.frames(layer, (1,), payload(100, layer)) for layer in range(20)]
    for frames in begun:
        assert not isinstance(draw(frames), Future)


# ── landings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_layer_is_taken_once():
    landings = Landings(CPU)
    shipment = landings.open(2, 100)
    assert landings.land(shipment, 5, payload(100, 0))
    assert landings.take(shipment, 4) is None
    assert torch.equal(landings.take(shipment, 5), payload(100, 0))
    assert landings.take(shipment, 5) is None


def test_nothing_lands_that_nobody_waits_for():
    landings = Landings(CPU)
    shipment = landings.open(1, 100)
    assert not landings.land(shipment + 1, 1, payload(1, 0))
    assert not landings.land(shipment, 1, payload(101, 0))
    assert landings.land(shipment, 1, payload(100, 0))
    assert not landings.land(shipment, 2, payload(1, 0))
    landings.close(shipment)
    landings.close(shipment)
    assert landings.take(shipment, 1) is None
    assert landings.num_open == 0
