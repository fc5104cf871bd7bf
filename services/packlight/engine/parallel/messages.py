"""What the first process of a group tells the others: small messages of names, numbers and integers, over a pipe.

Knows bytes. Tensors travel beside, over the process group (`group.py`). No pickle: a message is the length of a JSON
header, the header, and its arrays as little-endian int64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from packlight.engine.runner import ChunkWork

Int64s = npt.NDArray[np.int64]
_INT64 = np.dtype("<i8")


class Kind(StrEnum):
    """What a follower is to do. Between PREFILL with `watched` and the end of its step a follower is asked in every
    layer, until RESUME."""

    OPEN = "open"  # the first message: which rank, and how to find the others
    LOAD = "load"
    EXACT_POOL = "exact_pool"
    PACKED_POOL = "packed_pool"
    PREFILL = "prefill"
    DECODE = "decode"
    STORE = "store"
    SUMMARISE = "summarise"
    KEYS = "keys"
    TOKENS = "tokens"
    WINDOW = "window"
    RESUME = "resume"


@dataclass(frozen=True, eq=False, slots=True)
class Message:
    """`arrays` are flat int64."""

    kind: Kind
    numbers: Mapping[str, int] = field(default_factory=dict)
    arrays: Sequence[Int64s] = ()
    text: str = ""


def encoded(message: Message) -> bytes:
    """What `read_message` reads."""
    sizes = [array.size for array in message.arrays]
    fields = {"kind": message.kind, "numbers": dict(message.numbers), "sizes": sizes, "text": message.text}
    header = json.dumps(fields).encode()
    body = [np.ascontiguousarray(array, dtype=_INT64).tobytes() for array in message.arrays]
    return b"".join([len(header).to_bytes(8, "little"), header, *body])


def read_message(pipe: BinaryIO) -> Message:
    """The next message. Raises EOFError when there is no other end."""
    header = json.loads(_read(pipe, int.from_bytes(_read(pipe, 8), "little")))
    arrays = [np.frombuffer(_read(pipe, size * _INT64.itemsize), dtype=_INT64) for size in header["sizes"]]
    return Message(Kind(header["kind"]), header["numbers"], arrays, header["text"])


def prefill_message(runner: int, works: Sequence[ChunkWork], *, is_watched: bool) -> Message:
    """A prefill step on the pool of number `runner`."""
    facts = [(work.start, work.wants_logits, len(work.token_ids), len(work.blocks)) for work in works]
    tokens = [np.asarray(work.token_ids, dtype=_INT64) for work in works]
    blocks = [np.asarray(work.blocks, dtype=_INT64) for work in works]
    arrays = (np.array(facts, dtype=_INT64).flatten(), np.concatenate(tokens), np.concatenate(blocks))
    return Message(Kind.PREFILL, {"runner": runner, "watched": int(is_watched)}, arrays)


def works_of(message: Message) -> list[ChunkWork]:
    """The chunks of a `prefill_message`."""
    facts, tokens, blocks = message.arrays
    starts, wants, num_tokens, num_blocks = facts.reshape(-1, 4).T
    token_parts, block_parts = (
        np.split(values, np.cumsum(sizes)[:-1]) for values, sizes in ((tokens, num_tokens), (blocks, num_blocks))
    )
    return [
        ChunkWork(part.tolist(), int(start), ids.astype(np.int32), bool(wanted))
        for part, start, ids, wanted in zip(token_parts, starts, block_parts, wants, strict=True)
    ]


def _read(pipe: BinaryIO, num_bytes: int) -> bytes:
    read = pipe.read(num_bytes)
    if len(read) < num_bytes:
        raise EOFError("the pipe was closed")
    return read
