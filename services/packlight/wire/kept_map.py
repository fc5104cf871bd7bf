"""A kept map <-> its protobuf message.

A map only explains an answer, so one whose parts do not fit each other is no error: it is left out.
"""

from __future__ import annotations

from packlight.core.kept_map import KeptMap
from packlight.wire.v1 import common_pb2


def kept_map_to_proto(kept: KeptMap | None) -> common_pb2.KeptMap | None:
    if kept is None:
        return None
    return common_pb2.KeptMap(
        num_tokens=kept.num_tokens,
        num_layers=kept.num_layers,
        bin_tokens=kept.bin_tokens,
        num_kept_tokens=kept.num_kept_tokens,
        shares=kept.shares,
    )


def kept_map_from_proto(message: common_pb2.KeptMap) -> KeptMap | None:
    kept = KeptMap(
        num_tokens=message.num_tokens,
        num_layers=message.num_layers,
        bin_tokens=message.bin_tokens,
        num_kept_tokens=tuple(message.num_kept_tokens),
        shares=message.shares,
    )
    return kept if kept.is_whole else None
