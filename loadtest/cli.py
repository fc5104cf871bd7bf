"""`python -m loadtest COMMAND`: flags, files and exit codes.

Knows the terminal. Exit codes are listed in `verdict.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtest import report, verdict
from loadtest.results import LoadRun, load_run
from loadtest.scenario import FOLDER, load_scenario, scenario_names
from loadtest.session import Job, measure, plan_for, prepare, target_of
from packlight.bench.output import say
from packlight.core.errors import ConfigError, StartupError
from packlight.evaluate.textfile import write


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except verdict.ServerUnreachable as error:
        print(f"loadtest: {error.message}", file=sys.stderr)
        return verdict.UNREACHABLE
    except StartupError as error:
        print(f"loadtest: {error.message}", file=sys.stderr)
        return verdict.BAD_INPUT
    except KeyboardInterrupt:
        return verdict.INTERRUPTED
    return code


def run(arguments: argparse.Namespace) -> int:
    requirements = verdict.parse_requirements(arguments.require, arguments.max_errors)
    _check_folders(arguments.json, arguments.html, arguments.csv)
    job = prepare(arguments)
    verdict.check_slo(requirements, job.scenario.slo.limits())
    found, is_interrupted = measure(job)
    show(found, arguments.html)
    if arguments.json:
        write(Path(arguments.json), found.to_json())
    if found.figures["num_late"]:
        say(f"loadtest: no open load throughout: {report.openness(found)}")
    missed = verdict.shortfalls(found.figures, requirements)
    for line in missed:
        say(f"loadtest: {line}")
    return verdict.INTERRUPTED if is_interrupted else verdict.FAILED if missed else verdict.OK


def show(found: LoadRun, html: str | None) -> None:
    print(report.as_text(found), flush=True)
    if html:
        write(Path(html), report.as_page(found))


def show_again(arguments: argparse.Namespace) -> int:
    _check_folders(arguments.html)
    show(load_run(Path(arguments.file)), arguments.html)
    return verdict.OK


def compare(arguments: argparse.Namespace) -> int:
    _check_folders(arguments.html)
    runs = _named({path: load_run(Path(path)) for path in (arguments.first, arguments.second)})
    for line in report.differences(*runs.values()):
        say(f"loadtest: beware, {line}")
    print(report.compared_as_text(runs), flush=True)
    if arguments.html:
        write(Path(arguments.html), report.compared_as_page(runs))
    return verdict.OK


def plan(arguments: argparse.Namespace) -> int:
    """What a run would send, as a file for `locust -f loadtest/locustfile.py --plan FILE`."""
    _check_folders(arguments.out)
    job: Job = prepare(arguments)
    with target_of(arguments) as target:
        plan_for(job, target).write(Path(arguments.out))
    return verdict.OK


def list_scenarios(arguments: argparse.Namespace) -> int:
    for name in scenario_names():
        print(f"{name:<18} {load_scenario(FOLDER / f'{name}.yaml').about}")
    return verdict.OK


def _named(runs: Mapping[str, LoadRun]) -> dict[str, LoadRun]:
    """Short names that differ: those of the files, or the paths where these are alike."""
    if len(runs) < 2:
        raise ConfigError(f"compare {next(iter(runs))}: a run cannot be compared with itself")
    short = {Path(path).stem: run for path, run in runs.items()}
    return short if len(short) == len(runs) else dict(runs)


def _check_folders(*paths: str | None) -> None:
    """Before minutes are spent on measuring."""
    for path in paths:
        if path is not None and not Path(path).resolve().parent.is_dir():
            raise ConfigError(f"cannot write {path}: there is no such folder; make it first")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest", description="Load tests of OpenAI-compatible servers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    running = commands.add_parser("run", help="a scenario against a server: tables, JSON, a page, an exit code")
    _add_request_arguments(running)
    _add_run_arguments(running)
    running.set_defaults(run=run)

    comparing = commands.add_parser("compare", help="two runs side by side, and ratios")
    comparing.add_argument("first", metavar="A.json")
    comparing.add_argument("second", metavar="B.json")
    comparing.add_argument("--html", metavar="FILE")
    comparing.set_defaults(run=compare)

    reporting = commands.add_parser("report", help="a run's tables and page, again")
    reporting.add_argument("file", metavar="RUN.json")
    reporting.add_argument("--html", metavar="FILE")
    reporting.set_defaults(run=show_again)

    planning = commands.add_parser("plan", help="write what a run would send, for Locust on several machines")
    _add_request_arguments(planning)
    planning.add_argument("--url", required=True, help="the server it will be sent to")
    planning.add_argument("--out", metavar="FILE", required=True)
    planning.set_defaults(run=plan, serve_set=[])

    commands.add_parser("scenarios", help="those that are shipped").set_defaults(run=list_scenarios)
    return parser


def _add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """What is sent, and to whom."""
    repeated: dict[str, Any] = {"action": "append", "default": []}
    parser.add_argument("--scenario", default="smoke", metavar="NAME", help="a shipped one, or a .yaml file (smoke)")
    parser.add_argument("--set", metavar="PATH=VALUE", help="one setting of the scenario, repeatable", **repeated)
    parser.add_argument("--model", help="the model to name (default: the first that the server lists)")
    parser.add_argument("--tokenizer", metavar="MODEL", help="what measures prompts, as `model.path` (smollm2)")
    parser.add_argument("--max-context", metavar="N", type=int, help="tokens the model reads (default: what it says)")
    parser.add_argument("--seed", metavar="N", type=int, help="of the prompts' words (default: new in each run)")
    parser.add_argument("--kv", metavar="JSON", help="the `kv` object of requests")
    parser.add_argument("--body", metavar="JSON", help="further fields of requests; null leaves one out")
    parser.add_argument("--api-key-from", metavar="VARIABLE", help="the environment variable that holds an API key")


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    repeated: dict[str, Any] = {"action": "append", "default": []}
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help="a server that is running (default: `packlight serve` is started)")
    where.add_argument("--cluster", action="store_true", help="start the cluster of deploy/cluster.py")
    parser.add_argument(
        "--serve-set", metavar="PATH=VALUE", help="a setting of what is started, repeatable", **repeated
    )
    parser.add_argument("--timeout", metavar="S", type=float, default=900.0, help="for each wait on the server (900)")
    parser.add_argument(
        "--metrics", metavar="URL", help="Prometheus pages to sample, repeatable (URL/metrics)", **repeated
    )
    parser.add_argument("--require", metavar="goodput=0.9", help="the least share of requests within SLO", **repeated)
    parser.add_argument("--max-errors", metavar="SHARE", type=float, default=0.0, help="that may fail (0)")
    parser.add_argument("--json", metavar="FILE", help="every request and all figures")
    parser.add_argument("--html", metavar="FILE", help="the report, one page that needs nothing else")
    parser.add_argument("--csv", metavar="PREFIX", help="Locust's own CSV files")
    parser.add_argument("--ui", action="store_true", help="Locust's web page meanwhile")
    parser.add_argument("--ui-port", metavar="N", type=int, default=8089, help="its port (8089)")
    parser.add_argument("--processes", metavar="N", type=int, help="sending processes, where one is not enough")
