"""Links: when they are made, given up and made again, and what becomes of layers that they do not carry."""

from concurrent.futures import Future

import pytest
import torch

from packlight.core.errors import ShipmentIncompatible
from packlight.core.shipping import Chunk, LayerHeader
from packlight.transfer.base import CPU, Site, checksum, word_sum
from packlight.transfer.links import OVERDUE, REST_S, Landed, LinkDown, Links, LinkSender, deadline_s, refused
from tests.support.clock import FakeClock

DATA = torch.arange(200, dtype=torch.uint8)


class ScriptedLink:
    device = CPU

    def __init__(self, peer="peer"):
        self.peer, self.ready, self.is_broken, self.is_closed = peer, Future(), False, False
        self.landings, self.num_released = [], 0

    def submit(self, payload):
        self.landings.append(Future())
        return self.landings[-1]

    def released(self):
        self.num_released += 1

    def give_up(self):
        self.is_broken = True

    def close(self):
        self.is_closed = True


@pytest.fixture
def link():
    return ScriptedLink()


@pytest.fixture
def sender(link, clock):
    return LinkSender(link, link.submit, link.released, clock)


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def links(clock):
    return Links(ScriptedLink, clock)


# ── links by peer ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_shipments_of_a_pair_share_a_link(links):
    assert links.get("a") is links.get("a") is not links.get("b")


def test_a_link_that_broke_rests_and_then_there_is_a_new_one(links, clock):
    first = links.get("a")
    first.is_broken = True
    for passed_s in (0.0, REST_S / 2, REST_S * 0.49):
        clock.advance(passed_s)
        with pytest.raises(ShipmentIncompatible, match="broke"):
            links.get("a")
        links.get("b")
    assert first.is_closed
    clock.advance(0.02 * REST_S)
    assert links.get("a") is not first


def test_closing_closes_all(links):
    all_links = [links.get(name) for name in "abc"]
    links.close()
    assert all(link.is_closed for link in all_links)


# ── layers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_header_is_sent_when_the_bytes_have_landed_and_not_before(link, sender):
    frames = sender.frames(3, (7, 8), DATA)
    (landing,) = link.landings  # it is under way already
    assert next(frames) is landing
    assert next(frames) is landing
    landing.set_result(Landed(64, 12345))
    assert list(frames) == [LayerHeader(3, (7, 8), 200, 12345, 64)]


@pytest.mark.parametrize("how", ["broken", "cancelled"])
def test_a_layer_that_does_not_land_goes_inline(link, sender, how):
    frames = sender.frames(0, (1,), DATA)
    next(frames)
    (landing,) = link.landings
    if how == "broken":
        landing.set_exception(LinkDown("gone"))
    else:
        landing.cancel()
    header, chunk = frames
    assert header == LayerHeader(0, (1,), 200, checksum(DATA.numpy().tobytes()))
    assert chunk == Chunk(memoryview(DATA.numpy()))


def test_a_link_that_does_not_come_back_is_given_up_with_all_its_layers(link, sender, clock):
    first, second = sender.frames(0, (1,), DATA), sender.frames(1, (1,), DATA)
    limit_s = OVERDUE * deadline_s(DATA.numel())
    for passed_s in (0.0, limit_s / 2, limit_s * 0.49):
        clock.advance(passed_s)
        assert next(first) is link.landings[0]
        assert not link.is_broken
    clock.advance(0.02 * limit_s)
    for frames in (first, second):
        assert [type(frame) for frame in frames] == [LayerHeader, Chunk]
        assert link.is_broken
    link.landings[0].set_result(Landed(0, 0))  # it came back at last, and nobody listens
    assert [type(frame) for frame in sender.frames(2, (1,), DATA)] == [LayerHeader, Chunk]


def test_what_landed_before_its_link_broke_has_landed(link, sender):
    frames = sender.frames(0, (1,), DATA)
    link.landings[0].set_result(Landed(64, 12345))
    link.is_broken = True
    assert list(frames) == [LayerHeader(0, (1,), 200, 12345, 64)]


def test_what_is_refused_at_once_does_not_wait(link):
    sender = LinkSender(link, lambda payload: refused("not made"))
    assert [type(frame) for frame in sender.frames(0, (1,), DATA)] == [LayerHeader, Chunk]
    sender.release()


def test_releasing_calls_off_what_is_not_begun_and_tells_the_link_once(link, sender):
    sender.frames(0, (1,), DATA)
    sender.frames(1, (1,), DATA)
    link.landings[0].set_running_or_notify_cancel()
    sender.release()
    sender.release()
    assert [landing.cancelled() for landing in link.landings] == [False, True]
    assert link.num_released == 1


def test_a_layer_made_after_the_end_is_not_sent(link, sender):
    sender.release()
    assert [type(frame) for frame in sender.frames(0, (1,), DATA)] == [LayerHeader, Chunk]
    assert not link.landings


def test_large_layers_may_take_longer():
    assert deadline_s(0) < deadline_s(100 << 20) < 12


# ── what transports are told, and a GPU's checksum ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("host", "advertise", "reach"),
    [
        ("127.0.0.1", None, "127.0.0.1"),
        ("0.0.0.0", "10.1.2.3:7000", "10.1.2.3"),
        ("::", "[fd00::7]:7000", "fd00::7"),
        ("::1", None, "::1"),
        ("0.0.0.0", "worker-0.workers", "worker-0.workers"),
    ],
)
def test_where_others_reach_a_site(host, advertise, reach):
    assert Site(host, advertise).reach == reach


def test_a_site_on_all_interfaces_is_reached_by_name(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    assert Site("0.0.0.0").reach == "here"


def test_one_wrong_bit_anywhere_changes_the_sum_of_words():
    right = word_sum(DATA)
    for place in range(DATA.numel()):
        for bit in range(8):
            wrong = DATA.clone()
            wrong[place] ^= 1 << bit
            assert word_sum(wrong) != right


def test_order_and_length_change_the_sum_of_words():
    swapped = torch.cat([DATA[4:8], DATA[:4], DATA[8:]])
    zeros = [word_sum(torch.zeros(size, dtype=torch.uint8)) for size in range(9)]
    assert word_sum(swapped) != word_sum(DATA)
    assert len(set(zeros)) == 9
    assert 0 <= word_sum(torch.full((4000,), 255, dtype=torch.uint8)) < 1 << 63
