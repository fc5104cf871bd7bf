"""The `packlight` command: reads flags, files and the environment, starts one role, ends it on a signal.

Signals, exit codes and the terminal live only here.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

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

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
        with _ended_by_signals():
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
            tree = yaml.load(Path(path).read_bytes(), _Loader) or {}
        except OSError as error:
            raise ConfigError(f"--config {path}: {error.strerror}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"--config {path}: not valid YAML: {error}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"--config {path}: a mapping of sections is expected, got {type(tree).__name__}")
    return build_config(tree, overrides)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice. YAML's own takes the last one, without a word about the others."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if (name := str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(problem=f"{name} is there twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


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
    serve = _entry(role)
    if role != "router":
        from packlight.engine.device import check_device

        check_device(config.model.device)
    await serve(config, _Stop(), _say)


class _Stop(asyncio.Event):
    """Set by a signal, from when somebody waits for it: then there are requests to finish. Before that the loop is kept
    from looking, by the model being loaded, for as long as that takes."""

    async def wait(self) -> Literal[True]:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.set)
        return await super().wait()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Until a `_Stop` takes over, a signal ends what runs within at once. As the first process of a container this one
    would otherwise not even notice SIGTERM."""
    before = {number: signal.signal(number, _end) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _: FrameType | None) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(0)


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
