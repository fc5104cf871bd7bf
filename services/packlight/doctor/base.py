"""What a check is and what it finds.

Knows levels and the table's row. Does not know what is checked: that is in `machine.py`, `software.py`, `gpu.py` and
`surroundings.py`, one function a check, and `command.py` has the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from packlight.core.config import Config, WorkerSection


class Level(StrEnum):
    """OK: it is there. UNUSED: it is not, and nothing configured needs it. WARNING: it works, worse than it could.
    MISSING: the role cannot start, or not serve."""

    OK = "ok"
    UNUSED = "unused"
    WARNING = "warning"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """`found` says what is there, with numbers; `fix` what to do, where there is something to do."""

    level: Level
    found: str
    fix: str = ""


def ok(found: str) -> Finding:
    return Finding(Level.OK, found)


def unused(found: str) -> Finding:
    return Finding(Level.UNUSED, found)


def warning(found: str, fix: str) -> Finding:
    return Finding(Level.WARNING, found, fix)


def missing(found: str, fix: str) -> Finding:
    return Finding(Level.MISSING, found, fix)


@dataclass(frozen=True, slots=True)
class Patient:
    """What is examined: a role with its configuration, on this machine. `root` is `/`, except in tests."""

    role: str
    config: Config
    environ: Mapping[str, str]
    root: Path = Path("/")

    @property
    def computes(self) -> bool:
        """Whether the role holds weights."""
        return self.role != "router"

    @property
    def is_fleet(self) -> bool:
        """Whether it is one process of several; `serve` keeps index and fleet in memory whatever is configured."""
        return self.role != "serve"

    @property
    def uses_gpu(self) -> bool:
        return self.computes and self.config.model.device.startswith("cuda")

    @property
    def sections(self) -> Mapping[str, WorkerSection]:
        """The worker sections that this process reads, by name."""
        both: dict[str, WorkerSection] = {"prefill": self.config.prefill, "decode": self.config.decode}
        return {name: section for name, section in both.items() if self.role in (name, "serve")}

    @property
    def pool_bytes(self) -> int:
        """What the configured KV pools of this process take together."""
        local = self.config.decode.local_prefill.kv_memory_bytes if self.role == "decode" else 0
        return local + sum(section.kv_memory_bytes for section in self.sections.values())


Check = Callable[[Patient], Finding]


def examine(check: Check, patient: Patient) -> Finding:
    """What the check finds. One that raises has found something, too: a doctor does not faint."""
    try:
        return check(patient)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return warning(f"could not be examined ({reason})", "look at what the message names; this is no verdict")


def human_bytes(num_bytes: float) -> str:
    """With a binary unit: 1536 is `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} TiB"
