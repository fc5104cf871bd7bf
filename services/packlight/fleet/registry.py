"""The fleet registries there are, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from packlight.core.config import FleetConfig
from packlight.core.registry import Registry
from packlight.fleet.base import Fleet

FLEETS = Registry(
    "fleet registry", {"memory": "packlight.fleet.memory:build", "redis": "packlight.fleet.redis_fleet:build"}
)


def build_fleet(config: FleetConfig, environ: Mapping[str, str], clock: Callable[[], float]) -> Fleet:
    """The registry that `config` names. `clock` is monotonic, in seconds. Connects to nothing yet.

    Raises ConfigError for an unknown name, or for `redis` when `REDIS_URL` names no server.
    """
    fleet: Fleet = FLEETS.load(config.backend)(config, environ, clock)
    return fleet
