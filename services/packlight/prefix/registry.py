"""The prefix indexes there are, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from packlight.core.config import IndexConfig
from packlight.core.registry import Registry
from packlight.prefix.base import PrefixIndex

INDEXES = Registry(
    "prefix index", {"memory": "packlight.prefix.memory:build", "redis": "packlight.prefix.redis_index:build"}
)


def build_index(config: IndexConfig, environ: Mapping[str, str], clock: Callable[[], float]) -> PrefixIndex:
    """The index that `config` names. `clock` is monotonic, in seconds. Connects to nothing yet.

    Raises ConfigError for an unknown name, or for `redis` when neither `redis_url` nor `REDIS_URL` names a server.
    """
    index: PrefixIndex = INDEXES.load(config.backend)(config, environ, clock)
    return index
