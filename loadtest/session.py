"""One run, from a command line to results: server, plan, Locust, samples.

Knows processes and temporary files. What is sent is the plan's business, what comes of it `summary.py`'s.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from deploy.cluster import die_with_parent
from loadtest import servers
from loadtest.asking import Asker
from loadtest.plan import Plan
from loadtest.planning import make_plan
from loadtest.results import Header, LoadRun
from loadtest.samples import Sample, read_samples
from loadtest.scenario import Scenario, find_scenario, load_scenario
from loadtest.scrape import PERIOD_S, Scraper
from loadtest.summary import figures
from loadtest.target import Target, check_url, describe
from packlight.bench.output import machine_facts, say
from packlight.bench.serve.prompts import Prompts
from packlight.core.config import ModelConfig
from packlight.core.errors import ConfigError
from packlight.models.opened import open_model

ROOT = Path(__file__).parents[1]
LOCUSTFILE = Path(__file__).with_name("locustfile.py")
_END_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Job:
    """What the command line asks for, read and checked before a server is started."""

    arguments: argparse.Namespace
    source: Path
    scenario: Scenario
    prompts: Prompts
    tokenizer: str
    tokenizer_context: int
    seed: int


def prepare(arguments: argparse.Namespace) -> Job:
    """Raises StartupError for whatever can be known to be wrong without a server."""
    source = find_scenario(arguments.scenario)
    scenario = load_scenario(source, arguments.set)
    if arguments.url is not None:
        check_url(arguments.url)
    body_of(arguments)
    api_key(arguments)
    tokenizer = arguments.tokenizer or _served_model(arguments.serve_set) or "smollm2"
    opened = open_model(ModelConfig(path=tokenizer), on_progress=say)
    return Job(
        arguments=arguments,
        source=source,
        scenario=scenario,
        prompts=Prompts(opened.tokenizer, "chat"),
        tokenizer=tokenizer,
        tokenizer_context=opened.spec.max_context,
        # A server that is still up remembers the prompts of the last run.
        seed=secrets.randbelow(10**6) if arguments.seed is None else arguments.seed,
    )


def plan_for(job: Job, target: Target) -> Plan:
    max_context = job.arguments.max_context or target.max_context or job.tokenizer_context
    body = {"model": target.model, **body_of(job.arguments)}
    return make_plan(job.scenario, job.source, job.prompts, body, job.seed, max_context)


@contextmanager
def target_of(arguments: argparse.Namespace) -> Iterator[Target]:
    """The server, started if need be. Raises ServerUnreachable."""
    key = api_key(arguments)
    if arguments.url is not None:
        yield describe(check_url(arguments.url), "already running", arguments.model, key)
        return
    start = servers.cluster if arguments.cluster else servers.embedded
    kind = "cluster of deploy/cluster.py" if arguments.cluster else "packlight serve"
    say(f"starting: {kind}")
    with start(arguments.serve_set) as url:
        yield describe(url, kind, arguments.model, key)


def measure(job: Job) -> tuple[LoadRun, bool]:
    """The run, and whether it was interrupted or lost a sender; what was answered is kept. Raises StartupError."""
    with target_of(job.arguments) as target, tempfile.TemporaryDirectory(prefix="packlight-load-") as folder:
        plan = plan_for(job, target)
        plan_path, samples_path = Path(folder) / "plan.json", Path(folder) / "samples.jsonl"
        plan.write(plan_path)
        _wake(target, plan, api_key(job.arguments))
        scraper = Scraper(job.arguments.metrics or [f"{target.url}/metrics"])
        say(f"{_num_requests(plan)} requests over {plan.duration_s:g} s to {target.model} at {target.url}")
        is_interrupted = _drive(_locust(job.arguments, target, plan_path, samples_path), scraper)
        if not samples_path.exists():
            raise ConfigError("Locust ended before the run began; what it said stands above")
        began_at, samples = read_samples(samples_path)
        counted = tuple(_counted(sample, job.prompts) for sample in samples)
        scrapes = scraper.since(began_at) if began_at is not None else ()
        run = LoadRun(header=_header(job, target, plan), samples=counted, scrapes=scrapes)
        num_lost = len(plan.conversations) - len({sample.conversation for sample in samples})
        if num_lost and not is_interrupted:
            say(f"a sending process ended before its time: nothing is known of {num_lost} conversations")
        # On Locust's page a run that is over stays until somebody ends it.
        is_cut = num_lost > 0 or (is_interrupted and len(samples) < run.header.num_planned)
        return replace(run, figures=figures(run)), is_cut


def _drive(command: Sequence[str], scraper: Scraper) -> bool:
    """Runs Locust to its end, looking at the server's metrics meanwhile. Whether it was interrupted."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
        start_new_session=True,  # Ctrl-C must reach this process only, which then ends Locust and reports
        preexec_fn=die_with_parent(),
    )
    try:
        while process.poll() is None:
            scraper.take()
            with suppress(subprocess.TimeoutExpired):
                process.wait(PERIOD_S)
        scraper.take()  # counters with everything that was answered
        return False
    except KeyboardInterrupt:
        say("interrupted: reporting on what was answered")
        return True
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _locust(arguments: argparse.Namespace, target: Target, plan: Path, samples: Path) -> list[str]:
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", target.url]
    command += ["--plan", str(plan), "--samples", str(samples), "--reply-timeout", str(arguments.timeout)]
    command += ["--exit-code-on-error", "0", "--loglevel", "WARNING"]
    command += ["--api-key-from", arguments.api_key_from] if arguments.api_key_from else []
    command += ["--processes", str(arguments.processes)] if arguments.processes else []
    command += ["--csv", str(Path(arguments.csv).resolve())] if arguments.csv else []
    if not arguments.ui:
        # With a file for its JSON, Locust does not print its own tables.
        return [*command, "--headless", "--only-summary", "--json-file", str(samples.with_name("locust"))]
    say(f"Locust's page is at http://127.0.0.1:{arguments.ui_port}; Ctrl-C ends the run and writes the report")
    return [*command, "--autostart", "--web-host", "127.0.0.1", "--web-port", str(arguments.ui_port)]


def _wake(target: Target, plan: Plan, key: str | None) -> None:
    """One short request, untimed: the first one a server gets may find it still compiling. If it fails, so will those
    that count, and they are reported."""
    message = {"role": "user", "content": "Hello"}
    asker = Asker(target.url, key, timeout_s=60.0, clock=perf_counter)
    asker.ask(plan.body | {"messages": [message], "max_tokens": 2}, 0.0, is_follow_up=False, references=())


def _counted(sample: Sample, prompts: Prompts) -> Sample:
    """Tokens that the server did not count are counted here; the text is not kept."""
    answer = sample.answer
    num_tokens = answer.num_output_tokens if answer.counted_by == "usage" else prompts.count_text(answer.text)
    return replace(sample, answer=replace(answer, num_output_tokens=num_tokens, text=""))


def _header(job: Job, target: Target, plan: Plan) -> Header:
    return Header(
        command=shlex.join(["python", "-m", "loadtest", *sys.argv[1:]]),
        scenario=plan.scenario,
        settings=job.scenario.model_dump(mode="json", exclude_none=True),
        url=target.url,
        server=target.kind,
        model=target.model,
        tokenizer=job.tokenizer,
        body=plan.body,
        seed=job.seed,
        num_planned=_num_requests(plan),
        max_in_flight=plan.max_in_flight,
        duration_s=plan.duration_s,
        slo_s=job.scenario.slo.limits(),
        machine=machine_facts(),
        notes=plan.notes,
    )


def _num_requests(plan: Plan) -> int:
    return sum(len(conversation.turns) for conversation in plan.conversations)


def body_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What every request says. Raises ConfigError for flags that are not JSON objects."""
    fixed: dict[str, Any] = {
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    kv = _object("--kv", arguments.kv)
    return fixed | _object("--body", arguments.body) | ({"kv": kv} if kv else {})


def api_key(arguments: argparse.Namespace) -> str | None:
    """Raises ConfigError if the variable that is to hold it does not."""
    variable = arguments.api_key_from
    if variable and not os.environ.get(variable):
        raise ConfigError(f"--api-key-from {variable}: there is no such environment variable; export the key in it")
    return os.environ[variable] if variable else None


def _object(flag: str, text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"{flag}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{flag}: a JSON object is expected, got {text}")
    return found


def _served_model(settings: Sequence[str]) -> str | None:
    found = [setting.partition("=")[2] for setting in settings if setting.startswith("model.path=")]
    return found[-1] if found else None
