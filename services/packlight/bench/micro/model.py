"""The model that a benchmark runs, named on the command line as everywhere else: a path, and settings.

Knows flags and configuration; imports torch only when weights are loaded.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from packlight.bench.micro.flags import num_threads
from packlight.bench.output import say
from packlight.core.config import Config
from packlight.core.config_tree import build_config
from packlight.core.workers import Role
from packlight.models.opened import OpenedModel, open_model

if TYPE_CHECKING:
    from packlight.models.base import LanguageModel


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", metavar="PATH", help="as `model.path` of the configuration")
    parser.add_argument("--set", metavar="PATH=VALUE", action="append", default=[], help="one setting, repeatable")


def config_of(arguments: argparse.Namespace) -> Config:
    """Raises ConfigError."""
    return build_config({}, [f"model.path={arguments.model}", *arguments.set])


def open_configured(config: Config) -> OpenedModel:
    """Files and tokenizer, without weights. Raises ModelError."""
    return open_model(config.model, on_progress=say)


def load_configured(config: Config, opened: OpenedModel, arguments: argparse.Namespace) -> LanguageModel:
    """The weights; torch computes with `--threads` from here on."""
    import torch

    from packlight.engine.build import build_model

    torch.set_num_threads(num_threads(arguments))
    return build_model(opened, config.model, Role.DECODE, on_progress=say)
