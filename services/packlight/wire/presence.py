"""Whether an optional field of a protobuf message is there."""

from __future__ import annotations


def has(message: object, field: str) -> bool:
    return bool(message.HasField(field))  # type: ignore[attr-defined]
