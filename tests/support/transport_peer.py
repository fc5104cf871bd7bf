"""One end of a KV transport in a process of its own: `python -m tests.support.transport_peer NAME [staging bytes]`.

Reads commands from standard input and answers each with one line, both JSON; frames travel as hexadecimal.

    {"do": "offer", "layers": n, "bytes": most}     -> {"wish": ..., "id": ...}
    {"do": "take", "id": ..., "frame": hex}         -> {"layer": n, "sum": checksum} | {"error": name} | {}
    {"do": "send", "wishes": [...], "sizes": [...]} -> {"frames": [[shipment, hex], ...]}, layers of all by turns
    {"do": "start", "wish": ..., "sizes": [...]}    -> {} at once, and then sends until the process ends
    {"do": "facts"}                                 -> {"threads": n, "fds": n, "links": [...]}
    {"do": "release"}                               -> {}, every end released
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from concurrent.futures import Future
from typing import Any

import torch

from packlight.core.errors import PacklightError
from packlight.transfer.base import Site, as_bytes, checksum
from packlight.transfer.links import LinkSender
from packlight.transfer.registry import build_transport, connect, wish
from packlight.wire.frames import event_from_bytes, event_to_bytes


def payload(size: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def draw(frames) -> list[bytes]:
    """The frames of one layer, waited for."""
    out = []
    for frame in frames:
        if isinstance(frame, Future):
            frame.exception(timeout=60)
        else:
            out.append(event_to_bytes(frame))
    return out


class Peer:
    def __init__(self, name: str, staging_bytes: int) -> None:
        self.name, self.links = name, []
        site = Site(staging_bytes=staging_bytes, on_link=lambda transport, event: self.links.append(event))
        self.transport = build_transport(name, site)
        self.ends: list[Any] = []

    def offer(self, layers: int, bytes: int) -> dict:
        self.ends.append(self.transport.receiver(num_layers=layers, max_layer_bytes=bytes))
        return {"wish": wish(self.name, self.ends[-1]), "id": len(self.ends) - 1}

    def take(self, id: int, frame: str) -> dict:
        try:
            received = self.ends[id].take(event_from_bytes(bytes.fromhex(frame)))
        except PacklightError as error:
            return {"error": type(error).__name__}
        return {} if received is None else {"layer": received.layer, "sum": checksum(as_bytes(received.payload))}

    def sender(self, wanted: str) -> LinkSender:
        _, sender = connect([wanted], {self.name: self.transport})
        self.ends.append(sender)
        sender.ready.result(30)
        return sender

    def send(self, wishes: list[str], sizes: list[int]) -> dict:
        senders = [self.sender(wanted) for wanted in wishes]
        begun = [
            (number, sender.frames(layer, (1,), payload(size, 1000 * number + layer)))
            for layer, size in enumerate(sizes)
            for number, sender in enumerate(senders)
        ]
        frames = [[number, frame.hex()] for number, layer in begun for frame in draw(layer)]
        for sender in senders:
            sender.release()
        return {"frames": frames}

    def start(self, wish: str, sizes: list[int]) -> dict:
        sender = self.sender(wish)
        self.begun = [sender.frames(layer, (1,), payload(size, layer)) for layer, size in enumerate(sizes)]
        return {}

    def facts(self) -> dict:
        gc.collect()
        fds, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        return {"threads": threads, "fds": fds, "links": self.links, "ours": threading.active_count()}

    def release(self) -> dict:
        for end in self.ends:
            end.release()
        self.ends.clear()
        return {}


def main() -> None:
    torch.set_num_threads(1)
    peer = Peer(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 64 << 20)
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(peer, command.pop("do"))(**command)
        print(json.dumps(answer), flush=True)
    peer.transport.close()


if __name__ == "__main__":
    main()
