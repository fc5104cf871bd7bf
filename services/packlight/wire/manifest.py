"""The manifest's bytes: opaque to the RPC layer, parsed only when the compatibility hash in front of them is ours."""

from __future__ import annotations

from dataclasses import asdict, fields

from google.protobuf.message import DecodeError

from packlight.core.errors import ShipmentCorrupt
from packlight.core.shipping import Manifest
from packlight.wire.v1 import kv_pb2


def encode_manifest(manifest: Manifest) -> bytes:
    return bytes(kv_pb2.Manifest(**asdict(manifest)).SerializeToString())


def decode_manifest(data: bytes) -> Manifest:
    """Raises ShipmentCorrupt if `data` is no manifest."""
    try:
        message = kv_pb2.Manifest.FromString(data)
    except DecodeError as error:
        raise ShipmentCorrupt(f"a manifest of {len(data)} bytes cannot be parsed: {error}") from None
    return Manifest(**{field.name: getattr(message, field.name) for field in fields(Manifest)})
