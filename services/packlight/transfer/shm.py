"""Transport between two processes of one host: payloads through anonymous shared memory, headers through the stream.

The receiver makes a *segment* per shipment: a memfd, which has no name that could leak and is gone with the last
process that has it open, however that one died. It is sealed: nobody can shrink it under a reader. Its offer says where
the segment is in /proc, how large it is, and a random nonce that it begins with. A sender that cannot open that path
(another host, container or user), or finds another segment there, is not on the receiver's host; the pair then takes
its next transport.

Layers are written one after another, each once, so neither end waits for the other. The system lends memory page by
page as it is written, and the receiver gives a layer's back when it takes the next: a segment of any size costs what is
under way. What does not fit goes inline, in chunks, as if this were the inline transport.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor

from packlight.core.errors import ShipmentCorrupt, ShipmentIncompatible
from packlight.core.shipping import LayerHeader, ShipFrame
from packlight.transfer.base import (
    CPU,
    KVReceiver,
    KVSender,
    LayerOrder,
    ReceivedLayer,
    Site,
    as_bytes,
    checksum,
)
from packlight.transfer.inline import InlineReceiver, InlineSender

NAME = "packlight-kv"
NONCE_BYTES = 16
HEAD_BYTES = mmap.PAGESIZE
"""The nonce has a page of its own, so that payloads can be freed page by page."""

_OFFER = re.compile(r"(?P<pid>\d{1,10})\.(?P<fd>\d{1,10})\.(?P<size>\d{1,15})\.(?P<nonce>[0-9a-f]{32})")
log = logging.getLogger(__name__)


class ShmTransport:
    def __init__(self, site: Site | None = None) -> None:
        """It is the same everywhere."""

    def sender(self, offer: str) -> KVSender:
        return ShmSender(*_open_segment(offer))

    def receiver(self, *, num_layers: int, max_layer_bytes: int) -> KVReceiver:
        return ShmReceiver(num_layers=num_layers, max_layer_bytes=max_layer_bytes)

    def close(self) -> None:
        """It holds nothing."""


class ShmSender:
    """Writes with `pwrite`, never through a mapping: a machine out of memory is then an error and not a signal."""

    device = CPU

    def __init__(self, fd: int, size: int) -> None:
        self._fd: int | None = fd
        self._size, self._next = size, HEAD_BYTES
        self._inline = InlineSender()

    def frames(self, layer: int, lengths: tuple[int, ...], payload: Tensor) -> Iterator[ShipFrame]:
        data = as_bytes(payload)
        offset = self._write(data)
        if offset is None:
            yield from self._inline.frames(layer, lengths, payload)
        else:
            yield LayerHeader(layer, lengths, len(data), checksum(data), offset)

    def release(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _write(self, data: memoryview) -> int | None:
        """Where `data` lies now; None if it does not fit."""
        offset = self._next
        if self._fd is None or offset + len(data) > self._size:
            return None
        try:
            num_written = os.pwrite(self._fd, data, offset) if len(data) else 0
        except OSError as error:
            log.warning("no shared memory for %d bytes (%s): they go inline", len(data), error)
            return None
        if num_written < len(data):
            log.warning("shared memory took %d of %d bytes: they go inline", num_written, len(data))
            return None
        self._next = offset + _whole_pages(len(data))
        return offset


class ShmReceiver:
    def __init__(self, *, num_layers: int, max_layer_bytes: int) -> None:
        self._size = HEAD_BYTES + num_layers * _whole_pages(max_layer_bytes)
        self._fd, nonce = _make_segment(self._size)
        self.offer = f"{os.getpid()}.{self._fd}.{self._size}.{nonce.hex()}"
        self._order = LayerOrder(num_layers=num_layers, max_layer_bytes=max_layer_bytes)
        self._inline = InlineReceiver(self._order)
        self._map: mmap.mmap | None = None
        self._lent = slice(0, 0)

    def take(self, frame: ShipFrame) -> ReceivedLayer | None:
        """As told by a stranger: no offset or size that `frame` may hold is followed outside the segment."""
        self._give_back()
        if not isinstance(frame, LayerHeader) or frame.offset is None:
            return self._inline.take(frame)
        self._inline.between_layers()
        self._order.expect(frame)
        end = frame.offset + frame.num_bytes
        if not HEAD_BYTES <= frame.offset <= end <= self._size:
            raise ShipmentCorrupt(
                f"layer {frame.layer} is said to lie at bytes {frame.offset} to {end} of a segment of {self._size}"
            )
        return self._read(frame, slice(frame.offset, end))

    def release(self, *, unused: bool = False) -> None:
        """The memory itself goes when the last payload that was handed out does."""
        self._map = None
        self._inline.release()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _read(self, header: LayerHeader, where: slice) -> ReceivedLayer:
        if self._map is None:
            self._map = mmap.mmap(self._fd, self._size)
        self._lent = where
        data = memoryview(self._map)[where]
        self._order.verify(header, data)
        payload = torch.frombuffer(data, dtype=torch.uint8) if len(data) else torch.empty(0, dtype=torch.uint8)
        return ReceivedLayer(header.layer, header.lengths, payload)

    def _give_back(self) -> None:
        """The memory of the layer before: its pages read as zeros from now on."""
        start, end = self._lent.start, self._lent.stop
        self._lent = slice(0, 0)
        if self._map is not None and end > start and start % mmap.PAGESIZE == 0:
            with suppress(OSError):  # where the system cannot, the memory goes with the segment
                self._map.madvise(mmap.MADV_REMOVE, start, end - start)


def _make_segment(size: int) -> tuple[int, bytes]:
    """(descriptor, nonce) of a sealed segment that takes no memory yet."""
    if not hasattr(os, "memfd_create"):
        raise ShipmentIncompatible("this system has no memfd_create, which shared memory is made with")
    nonce = secrets.token_bytes(NONCE_BYTES)
    fd = -1
    try:
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        os.pwrite(fd, nonce, 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _seals())
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise ShipmentIncompatible(f"no shared memory of {size} bytes: {error}") from None
    return fd, nonce


def _open_segment(offer: str) -> tuple[int, int]:
    """(descriptor, size) of the very segment that was offered."""
    parsed = _OFFER.fullmatch(offer)
    if parsed is None:
        raise ShipmentIncompatible(f"{offer[:80]!r} is no offer of shared memory")
    path, size = f"/proc/{parsed['pid']}/fd/{parsed['fd']}", int(parsed["size"])
    fd = -1
    try:
        # Looked at before it is opened: opening some files of another process would do something.
        if not os.readlink(path).startswith(f"/memfd:{NAME}"):
            raise ShipmentIncompatible(f"{path} is something else here: the receiver is on another host or container")
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
        _check_segment(fd, size, bytes.fromhex(parsed["nonce"]))
    except (OSError, ShipmentIncompatible) as error:
        if fd >= 0:
            os.close(fd)
        if isinstance(error, ShipmentIncompatible):
            raise
        raise ShipmentIncompatible(f"the receiver's shared memory cannot be opened from here: {error}") from None
    return fd, size


def _check_segment(fd: int, size: int, nonce: bytes) -> None:
    found = os.fstat(fd)
    is_meant = (
        (found.st_size, found.st_uid) == (size, os.geteuid())
        and fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _seals() == _seals()
        and secrets.compare_digest(os.pread(fd, NONCE_BYTES, 0), nonce)
    )
    if not is_meant:
        raise ShipmentIncompatible("the shared memory found here is another one than the receiver's")


def _seals() -> int:
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
