"""The `packlight` command: reads flags, files and the environment, starts one role, ends it on a signal.

Signals, exit codes and the terminal live only here.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from packlight import __version__
from packlight.bench import command as bench
from packlight.core.config import Config
from packlight.core.config_tree import build_config
from packlight.core.errors import ConfigError, StartupError
from packlight.doctor import command as doctor
from packlight.evaluate import command as evaluation
from packlight.telemetry.logs import set_up_logging

ROLES: Mapping[str, str] = {
    "serve": "router, prefill and decode in one process (a laptop)",
    "router": "the HTTP API in front of a fleet",
    "prefill": "a prefill worker of a fleet",
    "decode": "a decode worker of a fleet",
    "eval": evaluation.SUMMARY,
    "bench": bench.SUMMARY,
    "doctor": doctor.SUMMARY,
    "config": "print the effective configuration and exit",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. 0 after a clean end, 1 where a doctor or a benchmark is not content, 2 for a wrong flag, file or
    model."""
    arguments = _parser().parse_args(argv)
    # OpenMP reads its environment when torch is imported. By default its threads spin while they wait, and as soon as
    # anything else runs on the cores a step takes twenty times as long (docs/benchmarks.md); asleep they cost 10 %.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if arguments.role == "bench":
            return bench.run(arguments)
        config = load_config(arguments.config, arguments.set)
        if arguments.role == "config":
            print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
            return 0
        if arguments.role == "doctor":
            return doctor.run(arguments, config, os.environ)
        set_up_logging(config.log_level, format=config.log_format)
        if arguments.role == "eval":
            return evaluation.run(arguments, config, sys.argv[1:] if argv is None else argv)
        asyncio.run(_run(arguments.role, config))
    except StartupError as error:
        print(f"packlight {arguments.role}: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def load_config(path: str | None, overrides: Sequence[str]) -> Config:
    """The configuration of a file and `--set` flags. Raises ConfigError naming the file, or the setting and limit."""
    tree: Any = {}
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).read_bytes()) or {}
        except OSError as error:
            raise ConfigError(f"--config {path}: {error.strerror}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"--config {path}: not valid YAML: {error}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"--config {path}: a mapping of sections is expected, got {type(tree).__name__}")
    return build_config(tree, overrides)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="packlight", description="LLM serving that ships only the KV that matters.")
    parser.add_argument("--version", action="version", version=f"packlight {__version__}")
    roles = parser.add_subparsers(dest="role", required=True, metavar="ROLE")
    for role, summary in ROLES.items():
        command = roles.add_parser(role, help=summary, description=summary)
        if role == "bench":
            bench.add_arguments(command)
            continue
        command.add_argument("--config", metavar="FILE", help="YAML, see docs/configuration.md")
        command.add_argument("--set", metavar="PATH=VALUE", action="append", default=[], help="one setting, repeatable")
        if role == "eval":
            evaluation.add_arguments(command)
        elif role == "doctor":
            doctor.add_arguments(command)
    return parser


async def _run(role: str, config: Config) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await _entry(role)(config, stop, _say)


def _entry(role: str) -> Callable[[Config, asyncio.Event, Callable[[str], None]], Awaitable[None]]:
    """Imports one role only: the router must start without torch."""
    if role == "serve":
        from packlight.embedded import serve as serve_embedded

        return serve_embedded
    if role == "router":
        from packlight.router.server import serve
    elif role == "prefill":
        from packlight.prefill.app import serve
    else:
        from packlight.colocated import serve
    return lambda config, stop, say: serve(config, os.environ, stop, say)


def _say(line: str) -> None:
    print(line, flush=True)
