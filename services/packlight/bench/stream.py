"""How fast this machine reads memory: the limit that decoding is held against.

Knows one buffer that no cache holds, and several ways of reading it once. Which way is fastest depends on the machine,
so all are measured in every round and the one with the best median is the limit. It is *read* bandwidth, because
decoding reads weights and KV and writes next to nothing; a copy would count its writes as well.

    native     `packlight_stream_read` of the compiled kernels: four runs of memory side by side in each thread
    max_u8     torch: the largest byte
    sum_i64    torch: the sum of 64-bit words
    dot_f32    torch: a dot product of the buffer's halves, which goes through the BLAS
    copy       on a GPU only: one half onto the other, bytes read and bytes written both counted
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from packlight.bench.timing import Spread, seconds_of
from packlight.kv.pool import zeros_on_first_touch
from packlight.native.compile import NativeUnavailable
from packlight.native.library import open_library
from packlight.native.stream import stream_read

BUFFER_BYTES = 512 << 20  # several times the last-level cache of a large server
GB = 1e9


def synced(function: Callable[[], object], device: str) -> Callable[[], object]:
    """`function`, over when the device is done with it."""
    if not device.startswith("cuda"):
        return function

    def until_done() -> None:
        function()
        torch.cuda.synchronize()

    return until_done


class Stream:
    """Reads one buffer with `num_threads`. `skipped` says why a way is missing."""

    def __init__(self, num_threads: int, num_bytes: int = BUFFER_BYTES, device: str = "cpu") -> None:
        """`num_bytes` is a multiple of 128. Sets torch's number of threads."""
        torch.set_num_threads(num_threads)
        self.num_bytes = num_bytes
        self._buffer = zeros_on_first_touch((num_bytes,), torch.uint8, device).fill_(1)
        self.skipped: dict[str, str] = {}
        ways = self._torch_ways()
        ways |= self._native_way(num_threads) if device == "cpu" else self._copy_way()
        self._ways = {name: synced(way, device) for name, way in ways.items()}

    def subjects(self, prefix: str = "stream/") -> Mapping[str, Callable[[], float]]:
        """For `take_turns`: each way reads the buffer once and returns its seconds."""
        return {prefix + name: partial(seconds_of, read) for name, read in self._ways.items()}

    def limit(self, seconds: Mapping[str, Spread], prefix: str = "stream/") -> tuple[str, Spread]:
        """The fastest way and its seconds, out of what `take_turns` returned."""
        name = min(self._ways, key=lambda way: seconds[prefix + way].median)
        return name, seconds[prefix + name]

    def rates(self, seconds: Mapping[str, Spread], prefix: str = "stream/") -> dict[str, float]:
        """GB/s of every way, medians."""
        return {name: seconds[prefix + name].per(self.num_bytes / GB).median for name in self._ways}

    def _torch_ways(self) -> dict[str, Callable[[], object]]:
        words = self._buffer.view(torch.int64)
        first, second = self._buffer.view(torch.float32).chunk(2)
        return {
            "max_u8": self._buffer.amax,
            "sum_i64": words.sum,
            "dot_f32": partial(torch.dot, first, second),
        }

    def _copy_way(self) -> dict[str, Callable[[], object]]:
        first, second = self._buffer.chunk(2)
        return {"copy": partial(second.copy_, first)}

    def _native_way(self, num_threads: int) -> dict[str, Callable[[], object]]:
        try:
            library = open_library()
        except NativeUnavailable as error:
            self.skipped["native"] = error.message
            return {}
        read = partial(stream_read, library, self._buffer.data_ptr(), self.num_bytes, num_threads)
        expected = int(self._buffer.view(torch.int64).sum()) % 2**64
        assert read() == expected, "the native stream did not read all of the buffer"
        return {"native": read}
