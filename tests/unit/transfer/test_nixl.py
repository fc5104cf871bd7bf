"""NIXL's writer and memory with a scripted library: what is late, what fails, what is told, and what is used again.

That the real library does what the scripted one does is tested in `tests/contract/test_transport*.py`.
"""

import base64
import queue
import threading
from concurrent.futures import CancelledError, Future

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.core.errors import ShipmentCorrupt, ShipmentIncompatible
from packlight.core.shipping import Chunk, LayerHeader
from packlight.transfer import nixl_agent, nixl_writer
from packlight.transfer.base import LayerOrder, Site, checksum, word_sum
from packlight.transfer.links import DROPPED, FAILED, MADE, OVERDUE, LinkDown, LinkSender, deadline_s
from packlight.transfer.nixl import LOST_AFTER_S, Inbox, NixlReceiver, NixlTransport
from packlight.transfer.nixl_writer import Outgoing, Peer, Writer
from tests.support.clock import FakeClock
from tests.support.cluster import eventually
from tests.support.transport_peer import payload

MIB = 1 << 20
PEER = Peer("DRAM", 0, b"somewhere")


class ScriptedAgent:
    """Writes end when the test says so: `states` has the next answers of `is_done`, and False is "in progress"."""

    def __init__(self):
        self.name, self.metadata = "scripted", b"meta/data"
        self.states, self.messages, self.told = queue.SimpleQueue(), [], []
        self.registered, self.released, self.writes = set(), [], []
        self.peers, self.is_closed, self.fails = set(), False, {}

    def _may_fail(self, call):
        if call in self.fails:
            raise self.fails[call]

    def register(self, memory):
        self._may_fail("register")
        self.registered.add(memory.data_ptr())
        return memory.data_ptr()

    def unregister(self, registered):
        self.registered.remove(registered)

    def add_peer(self, metadata):
        self._may_fail("add_peer")
        self.peers.add("peer")
        return "peer"

    def remove_peer(self, name):
        self.peers.discard(name)

    def write(self, payload, peer, kind, device, address):
        self._may_fail("write")
        self.writes.append((address, payload.numel()))
        return len(self.writes)

    def is_done(self, handle):
        self._may_fail("is_done")
        try:
            return self.states.get_nowait()
        except queue.Empty:
            return False

    def release(self, handle):
        self._may_fail("release")
        self.released.append(handle)

    def notify(self, peer, message):
        self._may_fail("notify")
        self.told.append(message)

    def notifications(self):
        messages, self.messages = self.messages, []
        return messages

    def close(self):
        self.is_closed = True


@pytest.fixture
def agent():
    return ScriptedAgent()


@pytest.fixture
def events():
    return []


@pytest.fixture
def writer(agent, events):
    writer = Writer(Site(on_link=lambda transport, event: events.append(event)), lambda: agent)
    yield writer
    writer.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name == "packlight-nixl"]


@pytest.fixture
def link(writer):
    link = writer.link(PEER)
    link.ready.result(5)
    return link


def done(agent, *states):
    for state in states or (True,):
        agent.states.put(state)


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_layers_lie_one_after_another_and_the_receiver_hears_of_the_end(agent, link):
    shipment = Outgoing(slab=7, address=1000, num_bytes=500)
    for size, offset in ((100, 0), (0, 100), (400, 100)):
        done(agent)
        landed = link.submit(shipment, payload(size, 1)).result(5)
        assert (landed.offset, landed.checksum) == (offset, checksum(payload(size, 1).numpy().tobytes()))
    assert agent.writes == [(1000, 100), (1100, 400)]
    assert not agent.told
    link.end(shipment)
    eventually(lambda: agent.told == [b"7"])
    assert not agent.registered


def test_what_does_not_fit_is_refused_and_what_fits_goes_on(agent, link):
    shipment = Outgoing(7, 0, 100)
    with pytest.raises(LinkDown, match="full"):
        link.submit(shipment, payload(101, 0)).result(5)
    done(agent)
    assert link.submit(shipment, payload(100, 0)).result(5).offset == 0
    assert not link.is_broken


def test_the_end_is_told_when_the_last_write_is_over(agent, link):
    shipment = Outgoing(7, 0, 100)
    landing = link.submit(shipment, payload(100, 0))
    eventually(lambda: agent.writes)
    link.end(shipment)
    with pytest.raises(LinkDown):
        link.submit(shipment, payload(0, 0)).result(5)  # and nothing comes after it
    assert not agent.told
    done(agent)
    landing.result(5)
    eventually(lambda: agent.told == [b"7"])


def test_what_has_arrived_counts_even_if_the_library_keeps_it(agent, link):
    shipment = Outgoing(7, 0, 100)
    agent.fails["release"] = RuntimeError("busy")
    done(agent)
    assert link.submit(shipment, payload(60, 0)).result(5).offset == 0
    del agent.fails["release"]
    done(agent)
    assert link.submit(shipment, payload(40, 0)).result(5).offset == 60
    link.end(shipment)
    eventually(lambda: agent.told == [b"7"])


def test_what_was_called_off_is_not_written(agent, link, writer):
    shipment, is_open = Outgoing(7, 0, 100), threading.Event()
    writer._commands.put(lambda agent: is_open.wait(5))
    landing = link.submit(shipment, payload(10, 0))
    assert landing.cancel()
    is_open.set()
    link.end(shipment)
    eventually(lambda: agent.told)
    assert not agent.writes
    with pytest.raises(CancelledError):
        landing.result(0)


def test_into_a_gpus_memory_the_checksum_is_one_that_a_gpu_computes(agent, writer):
    link = writer.link(Peer("VRAM", 1, b"somewhere"))
    link.ready.result(5)
    done(agent)
    assert link.submit(Outgoing(7, 0, 100), payload(100, 0)).result(5).checksum == word_sum(payload(100, 0))


@pytest.mark.parametrize("call", ["register", "write", "is_done"])
def test_the_first_failure_ends_the_link_and_every_layer(agent, link, events, call):
    shipment = Outgoing(7, 0, 1000)
    landings = [link.submit(shipment, payload(10, 0)) for _ in range(3)]
    eventually(lambda: len(agent.writes) == 3)
    agent.fails[call] = RuntimeError("torn")
    landings.append(link.submit(shipment, payload(10, 0)))
    for landing in landings:
        with pytest.raises(LinkDown):
            landing.result(5)
    eventually(lambda: events == [MADE, DROPPED])
    assert link.is_broken
    assert not agent.peers
    assert not agent.registered
    with pytest.raises(LinkDown):
        link.submit(shipment, payload(10, 0)).result(0)
    link.end(shipment)
    assert not agent.told


def test_a_write_that_is_late_ends_the_link(agent, link, events, monkeypatch):
    monkeypatch.setattr(nixl_writer, "deadline_s", lambda num_bytes: 0.05)
    with pytest.raises(LinkDown):
        link.submit(Outgoing(7, 0, 100), payload(100, 0)).result(5)
    assert events == [MADE, DROPPED]


def test_a_write_that_does_not_come_back_from_the_library_holds_up_no_layer(agent, link, monkeypatch):
    goes_on, clock = threading.Event(), FakeClock()
    monkeypatch.setattr(agent, "write", lambda *args: goes_on.wait(60) and 1)
    shipment = Outgoing(7, 0x1000, MIB)
    sender = LinkSender(link, lambda layer: link.submit(shipment, layer), lambda: link.end(shipment), clock)
    layers = [sender.frames(number, (10,), payload(1000, seed=number)) for number in range(2)]
    assert isinstance(next(layers[0]), Future)
    clock.advance(OVERDUE * deadline_s(1000))
    assert [[type(frame) for frame in frames] for frames in layers] == [[LayerHeader, Chunk]] * 2
    assert link.is_broken
    sender.release()
    assert agent.told == []  # all the time the library may write there
    agent.states.put(True)
    goes_on.set()
    eventually(lambda: agent.told == [b"7"])


def test_memory_that_the_library_does_not_let_go_of_is_kept(agent, link, writer):
    agent.fails["release"] = RuntimeError("in progress")
    landing = link.submit(Outgoing(7, 0, 100), payload(100, 0))
    eventually(lambda: agent.writes)
    agent.fails["is_done"] = RuntimeError("torn")
    with pytest.raises(LinkDown):
        landing.result(5)
    assert [write.payload.numel() for write in writer._unfinished] == [100]
    assert agent.registered


def test_another_link_is_not_disturbed(agent, link, writer, events):
    other = writer.link(PEER)
    other.ready.result(5)
    link.close()
    done(agent)
    assert other.submit(Outgoing(7, 0, 100), payload(100, 0)).result(5).offset == 0
    assert events == [MADE, MADE]  # closing is nothing to report


def test_a_peer_that_cannot_be_reached(agent, writer, events):
    agent.fails["add_peer"] = RuntimeError("no route")
    link = writer.link(PEER)
    with pytest.raises(LinkDown):
        link.ready.result(5)
    assert link.is_broken
    assert events == [FAILED]


def test_without_the_library_every_link_is_refused(events):
    def make():
        raise ShipmentIncompatible("NIXL is not installed")

    writer = Writer(Site(on_link=lambda transport, event: events.append(event)), make)
    for _ in range(2):
        link = writer.link(PEER)
        with pytest.raises(LinkDown):
            link.ready.result(5)
        link.end(Outgoing(7, 0, 100))
        link.close()
    writer.close()


def test_a_writer_that_ends_leaves_no_layer_waiting(agent, link, writer):
    landing = link.submit(Outgoing(7, 0, 100), payload(100, 0))
    eventually(lambda: agent.writes)

    def explodes(agent):
        raise ZeroDivisionError

    writer._commands.put(explodes)
    with pytest.raises(LinkDown):
        landing.result(5)
    with pytest.raises(LinkDown):
        link.submit(Outgoing(7, 0, 100), payload(100, 0)).result(5)


# ── receiving ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def agents():
    return []


@pytest.fixture
def inbox(agents, clock):
    def make(name, memory):
        agents.append(ScriptedAgent())
        return agents[-1]

    inbox = Inbox(Site(staging_bytes=8 * MIB), make, clock)
    yield inbox
    inbox.close()
    assert all(agent.is_closed for agent in agents)


def receiver_of(inbox, num_layers=2, num_bytes=4 * MIB):
    order = LayerOrder(num_layers=num_layers, max_layer_bytes=num_bytes)
    return NixlReceiver(inbox, num_layers, num_bytes, order)


def address_of(receiver):
    return int(receiver.offer.split("/")[1])


def land(inbox, receiver, layer, offset, data):
    start = address_of(receiver) - inbox.memory.data_ptr() + offset
    inbox.memory[start : start + data.numel()] = data
    return LayerHeader(layer, (1,), data.numel(), checksum(data.numpy().tobytes()), offset)


def test_an_offer_says_all_that_a_sender_needs(inbox):
    slab, address, size, kind, device, metadata = receiver_of(inbox).offer.split("/")
    assert (slab, size, kind, device) == ("1", str(4 * MIB), "DRAM", "0")
    assert int(address) == inbox.memory.data_ptr()
    assert base64.urlsafe_b64decode(metadata) == b"meta/data"


def test_a_whole_shipment_leaves_memory_that_is_used_again_at_once(inbox):
    receiver = receiver_of(inbox)
    for layer in range(2):
        header = land(inbox, receiver, layer, 1000 * layer, payload(1000, layer))
        assert torch.equal(receiver.take(header).payload, payload(1000, layer))
    receiver.release()
    assert address_of(receiver_of(inbox)) == address_of(receiver)


@pytest.mark.parametrize("is_unused", [True, False])
def test_an_abandoned_one_does_only_if_nobody_was_told_of_it(inbox, is_unused):
    receiver = receiver_of(inbox)
    receiver.release(unused=is_unused)
    receiver.release()
    assert (address_of(receiver_of(inbox)) == address_of(receiver)) == is_unused


def test_or_when_its_sender_says_that_it_is_over(inbox, agents):
    receiver = receiver_of(inbox)
    receiver.take(land(inbox, receiver, 0, 0, payload(1000, 0)))
    receiver.release()
    agents[0].messages = [b"what?", b"99", b"1"]
    assert address_of(receiver_of(inbox)) == address_of(receiver)


def test_memory_lost_to_the_dead_comes_back_with_a_new_agent(inbox, agents, clock):
    for _ in range(2):
        receiver_of(inbox, num_bytes=8 * MIB).release()
    kept = receiver_of(inbox, num_bytes=8 * MIB)
    with pytest.raises(ShipmentIncompatible, match="too few"):
        receiver_of(inbox, num_bytes=8 * MIB)
    assert len(agents) == 1  # they may still say that it is over
    clock.advance(LOST_AFTER_S + 1)
    with pytest.raises(ShipmentIncompatible, match="too few"):
        receiver_of(inbox, num_bytes=8 * MIB)
    inbox._renewal.join(5)
    assert [agent.is_closed for agent in agents] == [True, False]
    assert receiver_of(inbox, num_bytes=MIB).offer
    header = land(inbox, kept, 0, 0, payload(1000, 0))
    assert torch.equal(kept.take(header).payload, payload(1000, 0))
    kept.release()  # its sender cannot write any more
    assert receiver_of(inbox, num_bytes=MIB).offer


def test_while_the_agent_is_replaced_nothing_is_offered(inbox, agents, clock, monkeypatch):
    is_open = threading.Event()
    monkeypatch.setattr(ScriptedAgent, "close", lambda agent: is_open.wait(5))
    for _ in range(3):
        receiver_of(inbox, num_bytes=8 * MIB).release()
    clock.advance(LOST_AFTER_S + 1)
    for why in ("too few", "being replaced"):
        with pytest.raises(ShipmentIncompatible, match=why):
            receiver_of(inbox, num_bytes=8 * MIB)
    is_open.set()
    monkeypatch.undo()
    inbox._renewal.join(5)
    assert receiver_of(inbox, num_bytes=MIB).offer
    agents[0].is_closed = True  # by the patched call


@settings(max_examples=200, deadline=None)
@given(offset=st.integers(0, 2**64 - 1) | st.integers(0, 8 * MIB), num_bytes=st.integers(0, 4 * MIB))
def test_no_header_reaches_outside_the_slab(offset, num_bytes):
    agent = ScriptedAgent()
    inbox = Inbox(Site(staging_bytes=8 * MIB), lambda name, memory: agent)
    receiver = receiver_of(inbox)
    is_outside = offset + num_bytes > 4 * MIB
    with pytest.raises(ShipmentCorrupt, match="is said to lie" if is_outside else "checksum"):
        receiver.take(LayerHeader(0, (1,), num_bytes, 12345, offset))


@settings(deadline=None)
@given(st.text() | st.from_regex(r"[0-9]{1,6}/[0-9]{1,9}/[0-9]{1,9}/[A-Z]{4}/[0-9]/", fullmatch=True))
def test_no_text_but_a_receivers_offer_is_written_to(offer):
    with pytest.raises(ShipmentIncompatible, match="no offer"):
        NixlTransport().sender(offer)


def test_without_the_library_nothing_is_offered(monkeypatch, caplog):
    monkeypatch.setattr(nixl_agent, "MODULES", ("nixl_cu99",))
    transport = NixlTransport()
    for _ in range(2):
        with pytest.raises(ShipmentIncompatible, match="pip install --no-deps"):
            transport.receiver(num_layers=1, max_layer_bytes=1)
    assert caplog.text.count("nixl is not offered") == 1
    transport.close()


@pytest.mark.parametrize(("cuda", "module"), [("12.8", "nixl_cu12"), ("13.0", "nixl_cu13"), (None, "nixl_cu12")])
def test_where_both_wheels_are_there_torchs_cuda_version_decides(monkeypatch, cuda, module):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("torch.version.cuda", cuda)
    assert nixl_agent.installed() == module
