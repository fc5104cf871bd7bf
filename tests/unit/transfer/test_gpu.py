"""Links between GPUs: payloads are sent from and received into their memory. NCCL wants a device for each end."""

import pytest
import torch

from packlight.core.errors import ShipmentCorrupt, ShipmentIncompatible
from packlight.transfer.base import Site
from packlight.transfer.registry import build_transport
from packlight.wire.frames import event_from_bytes
from tests.support.transport_peer import draw, payload

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["nixl", "process_group"])
def joined(request):
    """(sender, receiver) of two devices, or of one."""
    num_devices = torch.cuda.device_count()
    if num_devices < (2 if request.param == "process_group" else 1):
        pytest.skip(f"{num_devices} GPUs")
    here, there = (Site(device=torch.device("cuda", index % num_devices)) for index in range(2))
    transports = [build_transport(request.param, site) for site in (here, there)]
    try:
        receiver = transports[1].receiver(num_layers=4, max_layer_bytes=8 << 20)
    except ShipmentIncompatible as error:
        pytest.skip(error.message)
    sender = transports[0].sender(receiver.offer)
    sender.ready.result(60)
    yield sender, receiver
    for end in (sender, receiver, *transports):
        end.close() if end in transports else end.release()


def header_of(sender, layer, data):
    (frame,) = draw(sender.frames(layer, (1,), data))
    return event_from_bytes(frame)


def test_payload_stays_in_the_memory_of_gpus(joined):
    sender, receiver = joined
    assert sender.device.type == "cuda"
    for layer, size in enumerate((1, 0, 70_001, 8 << 20)):
        data = payload(size, layer)
        received = receiver.take(header_of(sender, layer, data.to(sender.device)))
        assert received.payload.is_cuda
        assert torch.equal(received.payload.cpu(), data)


def test_a_layer_is_sent_when_it_is_computed_and_not_before(joined):
    sender, receiver = joined
    data = torch.zeros(8 << 20, dtype=torch.uint8, device=sender.device)
    torch.cuda._sleep(200_000_000)  # on the stream that computes: about a tenth of a second
    data += 7
    received = receiver.take(header_of(sender, 0, data))
    assert bool((received.payload == 7).all())


def test_bytes_changed_on_the_way_are_found(joined):
    sender, receiver = joined
    header = header_of(sender, 0, payload(1000, 0).to(sender.device))
    with pytest.raises(ShipmentCorrupt, match="checksum"):
        receiver.take(type(header)(header.layer, header.lengths, header.num_bytes, header.checksum ^ 1, header.offset))
