"""Layers on their way from a device to the host: nobody looks too early, and no memory is used again too early."""

import asyncio
import threading
from concurrent.futures import Future

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from packlight.attention.sdpa import SdpaAttention
from packlight.core.config import PrefillConfig
from packlight.core.errors import InternalError
from packlight.core.shipping import Chunk, LayerHeader
from packlight.core.types import PackSpec, PrefillRequest, SamplingParams
from packlight.engine.compute import Compute
from packlight.engine.runner import Runner
from packlight.kv.pool import KVPool
from packlight.prefill.outbox import Outbox
from packlight.prefill.staging import Staging
from packlight.prefill.worker import PrefillWorker
from packlight.telemetry.metrics import PrefillMetrics
from packlight.transfer.base import CPU
from packlight.transfer.inproc import InprocSender
from packlight.transfer.links import Landed, LinkSender
from packlight.transfer.registry import build_transport
from packlight.wire.frames import event_from_bytes, event_to_bytes
from tests.support.deferred_copier import PATIENCE_S, DeferredCopier
from tests.support.fake_pair import running
from tests.support.tiny_models import sharp_llama

LIMIT_BYTES = 2048


def payload(number, size=1024):
    """No byte of it is poison."""
    return torch.randint(0, 128, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))


@pytest.fixture
def copier():
    return DeferredCopier()


def device(copier):
    """A thread that ends copies, a moment after they were started. Returns what ends it."""
    over = threading.Event()

    def work():
        while not over.is_set() or not copier.started.empty():
            over.wait(0.0005)
            if not copier.started.empty():
                copier.next().finish()

    thread = threading.Thread(target=work)
    thread.start()

    def end():
        over.set()
        thread.join(PATIENCE_S)

    return end


@pytest.fixture
def staging(copier):
    made = Staging(copier, limit_bytes=LIMIT_BYTES)
    yield made
    end = device(copier)  # closing waits for what was started
    made.close()
    end()


def drawn(frames):
    """The frames of one layer, waited for; never before what they wait for is done."""
    out = []
    for frame in frames:
        if isinstance(frame, Future):
            frame.exception(timeout=PATIENCE_S)
        else:
            out.append(frame)
    return out


def assert_not_started(copier, staging):
    """Whatever the staging thread was told before this, it has dealt with: it answers in order."""
    other = staging.frames(InprocSender(), 0, (1,), payload(0, 0))
    copier.next().finish()
    assert len(drawn(other)) == 2
    assert copier.started.empty()


def test_frames_are_pending_until_the_bytes_are_there(copier, staging):
    data = payload(1)
    frames = staging.frames(InprocSender(), 3, (5, 6), data)
    copy = copier.next()
    pending = next(frames)
    assert isinstance(pending, Future)
    assert not pending.done()
    copy.finish()
    pending.result(timeout=PATIENCE_S)
    header, chunk = frames
    assert (header.layer, header.lengths, header.num_bytes) == (3, (5, 6), len(data))
    assert bytes(chunk.data) == bytes(data.numpy())


def test_copies_start_before_anybody_asks_and_end_in_order(copier, staging):
    shipment = InprocSender()
    layers = [staging.frames(shipment, layer, (1,), payload(layer)) for layer in range(2)]
    copies = [copier.next(), copier.next()]
    copies[0].finish()
    assert len(drawn(layers[0])) == 2
    assert isinstance(next(layers[1]), Future)
    copies[1].finish()
    assert len(drawn(layers[1])) == 2


def test_a_layer_waits_for_memory_until_the_last_reader_of_another_is_gone(copier, staging):
    shipment = InprocSender()
    layers = [staging.frames(shipment, layer, (1,), payload(layer)) for layer in range(3)]
    for _ in range(2):
        copier.next().finish()
    header, chunk = drawn(layers[0])
    read = torch.frombuffer(chunk.data, dtype=torch.uint8)[7:]
    del header, chunk
    layers[0] = None
    assert_not_started(copier, staging)
    assert torch.equal(read, payload(0)[7:])
    del read
    copier.next().finish()
    assert bytes(drawn(layers[2])[1].data) == bytes(payload(2).numpy())


def test_memory_is_used_again(copier, staging):
    for layer in range(20):
        frames = staging.frames(InprocSender(), layer, (1,), payload(layer))
        copier.next().finish()
        assert bytes(drawn(frames)[1].data) == bytes(payload(layer).numpy())
        del frames
    assert copier.num_allocated_bytes <= LIMIT_BYTES


def test_a_reader_that_stalls_holds_up_no_other(copier, staging):
    stalled, other = InprocSender(), InprocSender()
    held = [staging.frames(stalled, layer, (1,), payload(layer)) for layer in range(4)]
    for _ in range(2):
        copier.next().finish()
    for layer in range(3):
        frames = staging.frames(other, layer, (1,), payload(10 + layer))
        copier.next().finish()
        assert bytes(drawn(frames)[1].data) == bytes(payload(10 + layer).numpy())
        del frames
    assert copier.started.empty()
    assert len(drawn(held[0])) == 2


def test_layers_of_a_shipment_keep_their_order_when_they_wait(copier, staging):
    large, shipment = InprocSender(), InprocSender()
    held = staging.frames(large, 0, (1,), payload(0, LIMIT_BYTES))
    copier.next().finish()
    layers = [
        staging.frames(shipment, layer, (1,), payload(layer + 1, size)) for layer, size in enumerate((900, 8, 64, 32))
    ]
    for layer, size in enumerate((900, 8, 64, 32)):
        copier.next().finish()
        header, chunk = drawn(layers[layer])
        assert (header.layer, header.num_bytes) == (layer, size)
        del header, chunk
        layers[layer] = None
    assert len(drawn(held)) == 2


def test_a_layer_larger_than_all_the_memory_goes_alone(copier, staging):
    frames = staging.frames(InprocSender(), 0, (1,), payload(1, 5 * LIMIT_BYTES))
    copier.next().finish()
    assert bytes(drawn(frames)[1].data) == bytes(payload(1, 5 * LIMIT_BYTES).numpy())


def test_a_link_begins_to_send_when_the_bytes_are_there_and_before_frames_are_drawn(copier, staging):
    class Link:
        device, ready, submitted = CPU, Future(), Future()

    def submit(host):
        Link.submitted.set_result(host.clone())
        landed = Future()
        landed.set_result(Landed(64, 0))
        return landed

    frames = staging.frames(LinkSender(Link, submit), 0, (1,), payload(1))
    copy = copier.next()
    assert not Link.submitted.done()
    copy.finish()
    assert torch.equal(Link.submitted.result(timeout=PATIENCE_S), payload(1))
    (header,) = drawn(frames)
    assert header.offset == 64


@pytest.mark.parametrize("fails", ["copy", "start"])
def test_a_copy_that_fails_fails_its_layer_and_no_other(copier, staging, fails):
    copier.refuses = fails == "start"
    frames = staging.frames(InprocSender(), 7, (1,), payload(1))
    if fails == "copy":
        copier.next().fail()
    with pytest.raises(InternalError, match="layer 7 could not be copied to the host: the device is gone"):
        drawn(frames)
    copier.refuses = False
    after = staging.frames(InprocSender(), 0, (1,), payload(2))
    copier.next().finish()
    assert len(drawn(after)) == 2


def test_closing_ends_every_layer(copier, staging):
    shipment = InprocSender()
    layers = [staging.frames(shipment, layer, (1,), payload(layer)) for layer in range(4)]
    copies = [copier.next(), copier.next()]
    closing = threading.Thread(target=staging.close)
    closing.start()
    for copy in copies:  # what was started uses the memory until it ends
        copy.finish()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert [len(drawn(frames)) for frames in layers[:2]] == [2, 2]
    for frames in (*layers[2:], staging.frames(shipment, 4, (1,), payload(4))):
        with pytest.raises(InternalError, match="the worker ends"):
            drawn(frames)


async def receive(outbox, receiver, crossing):
    """What arrives, copied when it is complete, which is when the receiver may read it."""
    layers = []
    async for event in outbox.read():
        received = receiver.take(event_from_bytes(event_to_bytes(event)) if crossing else event)
        if received is not None:
            layers.append(received.payload.clone())
        if len(layers) == outbox.due:
            return layers
    raise AssertionError("the shipment ended too early")


@pytest.mark.parametrize("name", ["inproc", "grpc", "shm"])
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shipments=st.lists(st.lists(st.integers(0, 3000), min_size=1, max_size=8), min_size=1, max_size=4),
    limit_bytes=st.integers(64, 8192),
)
async def test_every_byte_arrives_by_every_transport(name, shipments, limit_bytes):
    copier, transport = DeferredCopier(), build_transport(name)
    staging, end = Staging(copier, limit_bytes=limit_bytes), device(copier)
    try:
        receiving = []
        for sizes in shipments:
            receiver = transport.receiver(num_layers=len(sizes), max_layer_bytes=3000)
            sender, outbox = transport.sender(receiver.offer), Outbox()
            outbox.due = len(sizes)
            for layer, size in enumerate(sizes):
                outbox.put_threadsafe(staging.frames(sender, layer, (1,), payload(layer, size)))
            receiving.append((receiver, sender, receive(outbox, receiver, crossing=name != "inproc")))
        async with asyncio.timeout(PATIENCE_S):
            arrived = await asyncio.gather(*(coming for _, _, coming in receiving))
        for sizes, layers in zip(shipments, arrived, strict=True):
            assert all(torch.equal(each, payload(layer, sizes[layer])) for layer, each in enumerate(layers))
    finally:
        for receiver, sender, _ in receiving:
            sender.release()
            receiver.release()
        end()
        staging.close()
        transport.close()


def test_layers_and_chunks_are_what_senders_make():
    """What `drawn` counts: a header and a chunk."""
    header, chunk = InprocSender().frames(0, (1,), payload(1))
    assert isinstance(header, LayerHeader)
    assert isinstance(chunk, Chunk)


async def layers_of(worker, request):
    """The bytes of each layer that a worker ships, by its number, with their lengths."""
    layers = {}
    async with running(worker.run()):
        async for event in worker.prefill(request):
            if isinstance(event, LayerHeader):
                layer = layers[event.layer] = (event.lengths, bytearray())
            elif isinstance(event, Chunk):
                layer[1].extend(event.data)
    return layers


@pytest.mark.parametrize("pack", [PackSpec(), PackSpec("snapkv", budget_tokens=24, window=8)], ids=["none", "snapkv"])
async def test_a_workers_layers_are_the_same_by_way_of_a_device(tmp_path, pack):
    model, prompt = sharp_llama(tmp_path, 2), tuple(5 + 7 * i % 240 for i in range(90))
    request = PrefillRequest("r", prompt, len(prompt), SamplingParams(temperature=0.0), pack)
    shipped = []
    for is_staged in (False, True):
        compute, copier = Compute(), DeferredCopier()
        runner = Runner(model, KVPool(model.spec, num_blocks=8, page_size=16, dtype=torch.float32), SdpaAttention())
        worker = PrefillWorker(
            PrefillConfig(shadow_ratio=0), runner, compute, metrics=PrefillMetrics(CollectorRegistry())
        )
        end = device(copier)
        if is_staged:
            worker._dispatch.staging = Staging(copier, limit_bytes=LIMIT_BYTES)
        shipped.append(await layers_of(worker, request))
        end()
        compute.close()
        assert (copier.num_allocated_bytes > 0) == is_staged
    assert shipped[0] == shipped[1]
    assert len(shipped[0]) == model.spec.num_layers
