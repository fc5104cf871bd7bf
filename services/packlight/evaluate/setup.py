"""Putting an evaluation together: the model's weights, a runner, a harness, and what the report says of the machine.

The part of `packlight eval` that needs torch before anything is measured. Knows configuration; measures nothing.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from packlight.core.config import Config
from packlight.core.workers import Role
from packlight.engine.build import build_model, build_runner
from packlight.evaluate.exact import Clock
from packlight.evaluate.harness import Harness, Limits, OnStep
from packlight.evaluate.plan import Plan
from packlight.models.opened import OpenedModel

PACKAGES = ("packlight", "torch", "transformers", "numpy")


def build_harness(
    config: Config, opened: OpenedModel, plan: Plan, *, on_progress: Callable[[str], None], on_step: OnStep
) -> Harness:
    """Loads the weights. The exact pool is as large as a prefill worker's, the packed one as a decode worker's."""
    if config.prefill.threads or config.decode.threads:
        torch.set_num_threads(max(config.prefill.threads or 1, config.decode.threads or 1))
    model = build_model(opened, config.model, Role.PREFILL, on_progress=on_progress)
    runner = build_runner(model, config.model.device, config.kv, config.prefill)
    limits = Limits(config.decode.kv_memory_bytes // runner.pool.head_page_bytes)
    return Harness(
        runner,
        opened.tokenizer,
        plan,
        limits,
        chunk_tokens=config.prefill.chunk_tokens,
        clock=make_clock(config.model.device),
        on_step=on_step,
    )


def make_clock(device: str) -> Clock:
    """Seconds. An accelerator runs behind the program; waiting for it charges its time to what it was spent on."""
    if not device.startswith("cuda"):
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def describe_machine(device: str) -> str:
    """What times depend on: the processor, or the accelerator, and how many threads compute."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, {_processor()}"
    return f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def describe_versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def _processor() -> str:
    """Linux keeps the name in /proc; elsewhere the architecture has to do."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
