"""Names of plug-ins and where they live, as plain strings.

Knows names. Imports a plug-in only when it is asked for, so a name can be checked, listed and documented on a machine
that cannot import it (FlashInfer on a laptop, torch on a router).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from packlight.core.errors import ConfigError


class Registry(Mapping[str, str]):
    """`Registry("attention backend", {"reference": "packlight.attention.reference:ReferenceAttention"})`."""

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def load(self, name: str) -> Any:
        """The object behind `name`. Raises ConfigError for an unknown name, listing the known ones."""
        target = self._entries.get(name)
        if target is None:
            raise ConfigError(f"unknown {self.kind} {name!r}: choose one of {', '.join(sorted(self._entries))}")
        module, _, attribute = target.partition(":")
        return getattr(import_module(module), attribute)

    def __getitem__(self, name: str) -> str:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
