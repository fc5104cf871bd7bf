"""Transport by torch.distributed: Gloo between CPUs, NCCL between GPUs; headers go through the stream.

Knows offers and headers. How two processes meet is in `process_group_pair.py`, how layers get from one to the other in
`process_group_links.py` and `process_group_receiving.py`.

The receiver offers the address of a store that it owns and a number for the shipment. A sender asks there for a pair of
groups of its own, once; all shipments of the two workers share it. A layer is received into memory of its own, whoever
wants it: one that nobody waits for any more is received too, and dropped. So a cancelled shipment leaves no group
out of step.
"""

from __future__ import annotations

import re

from packlight.core.errors import ShipmentCorrupt, ShipmentIncompatible
from packlight.core.shipping import LayerHeader, ShipFrame
from packlight.transfer.base import KVReceiver, KVSender, LayerOrder, ReceivedLayer, Site
from packlight.transfer.inline import InlineReceiver
from packlight.transfer.landings import Landings
from packlight.transfer.links import Links, LinkSender
from packlight.transfer.process_group_links import SendingLink
from packlight.transfer.process_group_pair import Meeting, payload_device
from packlight.transfer.process_group_receiving import MeetingPoint

_OFFER = re.compile(r"(?P<meeting>\[?[\w.:%-]{1,255}\]?:\d{1,5}/(?:cpu|cuda)/[0-9a-f]{32})/(?P<shipment>\d{1,19})")


class ProcessGroupTransport:
    """Both ends of it: it listens with the first receiver, and makes links for senders."""

    def __init__(self, site: Site | None = None) -> None:
        self._site = site or Site()
        self._landings = Landings(payload_device(self._site.device))
        self._meeting_point: MeetingPoint | None = None
        self._links = Links(lambda peer: SendingLink(Meeting.parse(peer), self._site))

    def sender(self, offer: str) -> KVSender:
        parsed = _OFFER.fullmatch(offer)
        if parsed is None:
            raise ShipmentIncompatible(f"{offer[:80]!r} is no offer of a process group")
        link, shipment = self._links.get(parsed["meeting"]), int(parsed["shipment"])
        return LinkSender(link, lambda payload: link.submit(shipment, payload))

    def receiver(self, *, num_layers: int, max_layer_bytes: int) -> KVReceiver:
        if self._meeting_point is None:
            self._meeting_point = MeetingPoint(self._site, self._landings)
        shipment = self._landings.open(num_layers, max_layer_bytes)
        order = LayerOrder(num_layers=num_layers, max_layer_bytes=max_layer_bytes)
        return ProcessGroupReceiver(f"{self._meeting_point.name}/{shipment}", shipment, self._landings, order)

    def close(self) -> None:
        self._links.close()
        if self._meeting_point is not None:
            self._meeting_point.close()


class ProcessGroupReceiver:
    def __init__(self, offer: str, shipment: int, landings: Landings, order: LayerOrder) -> None:
        self.offer, self._shipment, self._landings, self._order = offer, shipment, landings, order
        self._inline = InlineReceiver(order)

    def take(self, frame: ShipFrame) -> ReceivedLayer | None:
        if not isinstance(frame, LayerHeader) or frame.offset is None:
            return self._inline.take(frame)
        self._inline.between_layers()
        self._order.expect(frame)
        payload = self._landings.take(self._shipment, frame.offset)
        if payload is None or payload.numel() != frame.num_bytes:
            found = "nothing" if payload is None else f"{payload.numel()} bytes"
            raise ShipmentCorrupt(f"layer {frame.layer}: {found} arrived where {frame.num_bytes} bytes were announced")
        self._order.verify_where_it_lies(frame, payload)
        return ReceivedLayer(frame.layer, frame.lengths, payload)

    def release(self, *, unused: bool = False) -> None:
        """What is on its way still arrives, and is dropped then."""
        self._landings.close(self._shipment)
        self._inline.release()
