"""`packlight eval`: flags in, progress while it runs, results as they come, tables and reports in the end.

Knows the terminal and files. Does not know how anything is measured. Imports torch only when it runs, so that `--help`
and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from packlight.compress.recipes import find_recipe
from packlight.core.config import Config
from packlight.core.errors import ConfigError, InvalidRequest, PacklightError, StartupError
from packlight.core.types import ModelSpec
from packlight.evaluate.plan import Plan, check_lengths, split_by_fit
from packlight.evaluate.progress import Progress
from packlight.evaluate.prompts import check_prompts, make_jobs
from packlight.evaluate.report import html_report, markdown_report, terminal_report
from packlight.evaluate.results import TEACHER_FORCED, Header, Results
from packlight.evaluate.tasks.two_turn import NAME as TWO_TURN
from packlight.evaluate.textfile import write
from packlight.evaluate.variants import make_grid, parse_codecs, parse_recipes
from packlight.models.opened import OpenedModel, open_model

SUMMARY = "measure what each way of packing costs, on prompts whose answers are known"
PROTOCOL = (
    "Question and beginning of the answer are in the prompt, so the window sees them. Greedy decoding. KL, top-1 "
    "agreement and attention error are taken along the exact model's own continuation, after every token fed. Factor "
    "x asks for a budget of 1/x of the prompt: tokens kept, or tokens read per step where a recipe keeps them all."
)
ALL = "all"


@dataclass(frozen=True, slots=True)
class Preset:
    """What is run where a flag does not say otherwise."""

    codecs: str
    factors: str
    lengths: str
    tasks: str
    depths: int


FULL = Preset(ALL, "2,4,8,16,32", "512,1024,2048", f"niah_single_1,niah_single_2,vt,{TEACHER_FORCED},{TWO_TURN}", 3)
QUICK = Preset("native", "4,16", "1024", f"niah_single_1,{TEACHER_FORCED}", 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `eval`, beside those that every command has."""
    parser.add_argument("--quick", action="store_true", help="minutes instead of half an hour (SmolLM2 on two cores)")
    parser.add_argument(
        "--recipes", metavar="A,B:KEY=VALUE", default=ALL, help="with options of `kv`, if any; or `all`"
    )
    parser.add_argument("--codecs", metavar="A,B", help="codecs to compare with native; or `all`")
    parser.add_argument("--coded", metavar="A,B", default="none,snapkv", help="the recipes to run with these codecs")
    parser.add_argument("--factors", metavar="2,4,8", help="how many times smaller than the prompt the budgets are")
    parser.add_argument("--lengths", metavar="512,1024", help="prompt lengths, in tokens")
    parser.add_argument("--tasks", metavar="A,B", help=f"names of tasks, {TEACHER_FORCED}, {TWO_TURN}")
    parser.add_argument("--depths", metavar="N", type=int, help="places where a needle is hidden")
    parser.add_argument("--samples", metavar="N", type=int, default=1, help="prompts for each task, length and depth")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=32, help="longest answer")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the first sample; the others count up")
    parser.add_argument("--json", metavar="FILE", help="results, rewritten after every prompt")
    parser.add_argument("--html", metavar="FILE", help="a report with plots")
    parser.add_argument("--markdown", metavar="FILE", help="the tables")


def run(arguments: argparse.Namespace, config: Config, argv: Sequence[str]) -> int:
    """Evaluates the configured model. 0 when done, 130 when interrupted; what was measured until then is kept.

    Raises StartupError for wrong flags, for a model that cannot be loaded and for prompts that do not fit it."""
    for path in (arguments.json, arguments.html, arguments.markdown):
        _check_writable(path)
    opened = open_model(config.model, on_progress=_say)
    plan = make_plan(arguments, opened.spec)
    check_prompts(plan.jobs, opened.tokenizer)
    return _measure(arguments, config, opened, plan, argv)


def make_plan(arguments: argparse.Namespace, model: ModelSpec) -> Plan:
    """What the flags ask for. Raises ConfigError naming the flag, or what the model cannot have."""
    preset = QUICK if arguments.quick else FULL
    for name in ("samples", "max_new_tokens"):
        _at_least_one(name, getattr(arguments, name))
    lengths = [int(value) for value in _numbers("lengths", arguments.lengths or preset.lengths)]
    check_lengths(lengths, model, arguments.max_new_tokens)
    codecs = arguments.codecs or preset.codecs
    variants = make_grid(
        parse_recipes(arguments.recipes),
        parse_codecs(codecs),
        _numbers("factors", arguments.factors or preset.factors),
        coded=_recipe_names("coded", arguments.coded),
    )
    fitting, refused = split_by_fit(variants, model)
    if refused and ALL not in (arguments.recipes, codecs):
        raise ConfigError(refused[0])
    for reason in refused:
        _say(f"left out: {reason}")
    depths = _at_least_one("depths", arguments.depths if arguments.depths is not None else preset.depths)
    jobs = make_jobs(
        [name.strip() for name in (arguments.tasks or preset.tasks).split(",")],
        lengths,
        depths,
        arguments.samples,
        arguments.seed,
    )
    return Plan(jobs, tuple(fitting), max_new_tokens=arguments.max_new_tokens)


def _measure(
    arguments: argparse.Namespace, config: Config, opened: OpenedModel, plan: Plan, argv: Sequence[str]
) -> int:
    # Takes seconds: torch and transformers.
    from packlight.evaluate.journal import Journal
    from packlight.evaluate.setup import build_harness, describe_machine, describe_versions

    started = time.monotonic()
    progress = Progress(sys.stderr, plan.num_steps)
    harness = build_harness(config, opened, plan, on_progress=_say, on_step=progress.step)
    header = Header(
        model=opened.spec.name,
        dtype=opened.spec.dtype,
        machine=describe_machine(config.model.device),
        started_at=datetime.now(UTC),
        command=shlex.join(["packlight", *argv]),
        seed=arguments.seed,
        protocol=PROTOCOL,
        versions=describe_versions(),
        durations_s={"loading": time.monotonic() - started},
    )
    journal = Journal(header, Path(arguments.json) if arguments.json else None, time.monotonic)
    try:
        for observations in harness.run():
            journal.add(observations)
    except KeyboardInterrupt:
        return 130
    except PacklightError as error:
        raise StartupError(error.message) from error
    finally:
        progress.close()
        _report(journal.results(), arguments)
    return 0


def _report(results: Results, arguments: argparse.Namespace) -> None:
    """What there is, even if that is not all that was asked for."""
    if not results.points:
        return
    print(terminal_report(results))
    if arguments.html:
        write(Path(arguments.html), html_report(results))
    if arguments.markdown:
        write(Path(arguments.markdown), markdown_report(results))


def _recipe_names(flag: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    try:
        return [find_recipe(name).name for name in names]
    except InvalidRequest as error:
        raise ConfigError(f"--{flag}: {error.message.removeprefix('kv.recipe: ')}") from None


def _numbers(flag: str, text: str) -> list[float]:
    try:
        return [float(value) for value in text.split(",")]
    except ValueError:
        raise ConfigError(f"--{flag}: got {text!r}, must be numbers separated by commas") from None


def _at_least_one(flag: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"--{flag.replace('_', '-')}: got {value}, must be at least 1")
    return value


def _check_writable(path: str | None) -> None:
    """Half an hour later would be a bad time to notice."""
    if path is not None and not Path(path).resolve().parent.is_dir():
        raise ConfigError(f"cannot write {path}: there is no such folder; make it first")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
