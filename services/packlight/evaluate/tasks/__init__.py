"""The tasks that packing is measured on, by name.

Samples are generated, so any length and depth can be asked for and nothing has to be downloaded. Names, sizes and
wording follow RULER (arXiv 2404.06654), except where a corpus would be needed: its essays are replaced by `essays.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from packlight.core.errors import ConfigError
from packlight.evaluate.tasks.base import CountTokens, Message, Sample, Task
from packlight.evaluate.tasks.base import make_sample as _make_sample
from packlight.evaluate.tasks.common_words import CommonWords
from packlight.evaluate.tasks.needles import Needles
from packlight.evaluate.tasks.tracking import VariableTracking
from packlight.evaluate.tasks.two_turn import make_two_turn

__all__ = ["TASKS", "CountTokens", "Message", "Sample", "Task", "find_task", "make_sample", "make_two_turn"]

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "niah_single_1": Needles("noise"),
        "niah_single_2": Needles("essay"),
        "niah_single_3": Needles("essay", value="uuid"),
        "niah_multikey_1": Needles("essay", num_keys=4),
        "niah_multikey_2": Needles("needles"),
        "niah_multikey_3": Needles("needles", key="uuid", value="uuid"),
        "niah_multivalue": Needles("essay", num_values=4),
        "niah_multiquery": Needles("essay", num_keys=4, num_queries=4),
        "vt": VariableTracking(),
        "cwe": CommonWords(),
    }
)


def find_task(name: str) -> Task:
    """The task called `name`. Raises ConfigError listing the known ones."""
    task = TASKS.get(name)
    if task is None:
        raise ConfigError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    return task


def make_sample(name: str, length: int, depth: float, seed: int, count_tokens: CountTokens) -> Sample:
    """The sample of the task called `name`: see `base.make_sample`. Raises ConfigError for an unknown name too."""
    return _make_sample(name, find_task(name), length, depth, seed, count_tokens)
