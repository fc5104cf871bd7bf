"""Shared memory between processes: who may open it, what a foreign header can reach, and what is left behind."""

import errno
import gc
import mmap
import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight.core.errors import ShipmentCorrupt, ShipmentIncompatible
from packlight.core.shipping import Chunk, LayerHeader
from packlight.transfer import shm
from packlight.transfer.shm import ShmTransport

MAX_BYTES = 64 << 10
PAGE = mmap.PAGESIZE


def payload(size, seed=0):
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def open_segments():
    """Of all descriptors: what other tests left behind may be closed at any time."""
    gc.collect()
    return sum(shm.NAME in target for target in map(target_of, os.listdir("/proc/self/fd")))


def target_of(descriptor):
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:  # the listing's own
        return ""


def mapped_segments():
    with open("/proc/self/maps") as maps:
        return sum(shm.NAME in line for line in maps)


@contextmanager
def joined(num_layers=3, max_layer_bytes=MAX_BYTES):
    receiver = ShmTransport().receiver(num_layers=num_layers, max_layer_bytes=max_layer_bytes)
    sender = ShmTransport().sender(receiver.offer)
    try:
        yield sender, receiver
    finally:
        sender.release()
        receiver.release()


def send(sender, layer, data):
    return list(sender.frames(layer, (1,), data))


def resident_bytes(receiver):
    return os.fstat(receiver._fd).st_blocks * 512


def test_payload_never_enters_the_stream():
    with joined() as (sender, receiver):
        for layer, size in enumerate((1, PAGE, MAX_BYTES)):
            (header,) = send(sender, layer, payload(size))
            assert header.offset % PAGE == 0
            assert torch.equal(receiver.take(header).payload, payload(size))


def test_memory_is_lent_while_it_is_needed_and_given_back():
    with joined(num_layers=8) as (sender, receiver):
        empty = resident_bytes(receiver)
        assert empty <= PAGE
        for layer in range(8):
            (header,) = send(sender, layer, payload(MAX_BYTES))
            receiver.take(header)
            assert resident_bytes(receiver) <= empty + MAX_BYTES


def test_nothing_is_left_open_or_mapped():
    before, mapped = open_segments(), mapped_segments()
    for _ in range(3):
        with joined() as (sender, receiver):
            assert open_segments() > before
            (header,) = send(sender, 0, payload(5000))
            received = receiver.take(header)
        assert torch.equal(received.payload, payload(5000))
        del received, receiver, sender, header
    assert open_segments() == before
    assert mapped_segments() == mapped


def test_what_does_not_fit_goes_inline_and_the_next_layer_may_fit_again():
    with joined(num_layers=1) as (sender, _):
        kinds = [[type(frame) for frame in send(sender, 0, payload(size))] for size in (MAX_BYTES - 9, PAGE, 0)]
    assert kinds == [[LayerHeader], [LayerHeader, Chunk], [LayerHeader]]


@pytest.mark.parametrize("result", [OSError(errno.ENOSPC, "no space"), 7])
def test_a_host_without_memory_ships_inline(monkeypatch, caplog, result):
    def full(fd, data, offset):
        if isinstance(result, OSError):
            raise result
        return result

    with joined() as (sender, receiver):
        monkeypatch.setattr(shm.os, "pwrite", full)
        frames = send(sender, 0, payload(3000))
        monkeypatch.undo()
        assert [type(frame) for frame in frames] == [LayerHeader, Chunk]
        assert receiver.take(frames[0]) is None
        assert torch.equal(receiver.take(frames[1]).payload, payload(3000))
        (header,) = send(sender, 1, payload(50))  # memory is back
        assert torch.equal(receiver.take(header).payload, payload(50))
    assert "inline" in caplog.text


def test_a_layer_in_shared_memory_may_not_cut_an_inline_one_short():
    with joined() as (sender, receiver):
        receiver.take(LayerHeader(0, (1,), 100, 0))
        (header,) = send(sender, 1, payload(50))
        with pytest.raises(ShipmentCorrupt, match="0 of 100 bytes"):
            receiver.take(header)


@settings(max_examples=300, deadline=None)
@given(offset=st.integers(0, 2**64 - 1) | st.integers(0, 4 * MAX_BYTES), num_bytes=st.integers(0, MAX_BYTES))
def test_no_header_reaches_outside_the_segment(offset, num_bytes):
    with joined() as (sender, receiver):
        send(sender, 0, payload(MAX_BYTES))
        with pytest.raises(ShipmentCorrupt, match="is said to lie" if is_outside(offset, num_bytes) else "checksum"):
            receiver.take(LayerHeader(0, (1,), num_bytes, 12345, offset))


def is_outside(offset, num_bytes):
    return offset < PAGE or offset + num_bytes > PAGE + 3 * MAX_BYTES


def test_bytes_changed_on_the_way_are_found():
    with joined() as (sender, receiver):
        (header,) = send(sender, 0, payload(5000))
        os.pwrite(sender._fd, b"\xff" if payload(5000)[4321] != 255 else b"\x00", header.offset + 4321)
        with pytest.raises(ShipmentCorrupt, match="checksum"):
            receiver.take(header)


def test_a_segment_cannot_be_shrunk_or_grown_under_its_reader():
    with joined() as (sender, _):
        for size in (0, 1 << 30):
            with pytest.raises(PermissionError):
                os.ftruncate(sender._fd, size)


@settings(deadline=None)
@given(st.text() | st.from_regex(r"[0-9]{1,6}\.[0-9]{1,4}\.[0-9]{1,9}\.[0-9a-f]{32}", fullmatch=True))
def test_no_text_but_a_receivers_offer_opens_anything(offer):
    with pytest.raises(ShipmentIncompatible):
        ShmTransport().sender(offer)


def changed(offer, place, change):
    parts = offer.split(".")
    parts[place] = change(parts[place])
    return ".".join(parts)


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (2, lambda size: str(int(size) + PAGE)),
        (3, lambda nonce: nonce[:-1] + ("0" if nonce[-1] != "0" else "1")),
    ],
    ids=["size", "nonce"],
)
def test_another_segment_in_the_same_place_is_not_taken_for_the_receivers(place, change):
    before = open_segments()
    receiver = ShmTransport().receiver(num_layers=1, max_layer_bytes=MAX_BYTES)
    with pytest.raises(ShipmentIncompatible, match="another one"):
        ShmTransport().sender(changed(receiver.offer, place, change))
    receiver.release()
    assert open_segments() == before


def test_a_segment_that_could_be_shrunk_is_refused():
    fd = os.memfd_create(shm.NAME, os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    with pytest.raises(ShipmentIncompatible, match="another one"):
        ShmTransport().sender(f"{os.getpid()}.{fd}.{PAGE}.{'0' * 32}")
    os.close(fd)


def test_a_segment_of_another_user_is_refused(monkeypatch):
    receiver = ShmTransport().receiver(num_layers=1, max_layer_bytes=MAX_BYTES)
    monkeypatch.setattr(shm.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ShipmentIncompatible, match="another one"):
        ShmTransport().sender(receiver.offer)
    receiver.release()


def test_another_file_is_not_even_opened(tmp_path, monkeypatch):
    """A path of /proc may name anything that process has open: terminals, pipes, devices."""
    with open(tmp_path / "file", "wb+") as other:
        monkeypatch.setattr(shm.os, "open", lambda *args: pytest.fail("opened"))
        with pytest.raises(ShipmentIncompatible, match="something else"):
            ShmTransport().sender(f"{os.getpid()}.{other.fileno()}.0.{'0' * 32}")


def test_a_receiver_that_is_gone_is_not_found():
    receiver = ShmTransport().receiver(num_layers=1, max_layer_bytes=MAX_BYTES)
    receiver.release()
    with pytest.raises(ShipmentIncompatible):
        ShmTransport().sender(receiver.offer)


def test_a_segment_that_cannot_be_read_leaves_nothing_open(monkeypatch):
    receiver = ShmTransport().receiver(num_layers=1, max_layer_bytes=MAX_BYTES)
    before = open_segments()

    def broken(fd, size, offset):
        raise OSError("an error of the system")

    monkeypatch.setattr(shm.os, "pread", broken)
    with pytest.raises(ShipmentIncompatible, match="an error of the system"):
        ShmTransport().sender(receiver.offer)
    assert open_segments() == before
    receiver.release()


def test_a_system_without_memfd_cannot_receive_so(monkeypatch):
    monkeypatch.delattr(shm.os, "memfd_create")
    with pytest.raises(ShipmentIncompatible, match="memfd_create"):
        ShmTransport().receiver(num_layers=1, max_layer_bytes=1)


SENDER = """
    import os, signal, sys
    import torch
    from packlight.transfer.shm import ShmTransport
    from packlight.wire.frames import event_to_bytes
    sender = ShmTransport().sender(sys.argv[1])
    for layer in range(2):
        for frame in sender.frames(layer, (1,), torch.full((50_000,), layer + 1, dtype=torch.uint8)):
            print(event_to_bytes(frame).hex(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_has_written_can_be_read_and_nothing_else_is_left():
    from packlight.wire.frames import event_from_bytes

    before = open_segments()
    receiver = ShmTransport().receiver(num_layers=2, max_layer_bytes=MAX_BYTES)
    command = [sys.executable, "-c", textwrap.dedent(SENDER), receiver.offer]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode < 0, ended.stderr
    headers = [event_from_bytes(bytes.fromhex(line)) for line in ended.stdout.split()]
    for layer, header in enumerate(headers):
        received = receiver.take(header)
        assert received.payload.numel() == 50_000
        assert (received.payload == layer + 1).all()
    assert len(headers) == 2
    receiver.release()
    del received
    assert open_segments() == before
    assert not any(shm.NAME in name for name in os.listdir("/dev/shm"))
