"""Whether an optional field of a protobuf message is there."""

from __future__ import annotations

from google.protobuf.message import Message


def has(message: Message, field: str) -> bool:
    return bool(message.HasField(field))
