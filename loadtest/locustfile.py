"""What Locust runs. `python -m loadtest run` starts it; by hand, from the repository root:

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --scenario steady_chat

`--users` is the number of slots (default: the scenario's `max_in_flight`), not the load: that is the scenario's.
Without `--plan` a plan is made by a process of its own; workers and master make the same one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser

from loadtest.asking import Asker
from loadtest.conductor import Collector, Conductor, is_collecting, is_sending
from loadtest.plan import Plan, read_plan
from loadtest.samples import SampleFile
from packlight.core.errors import StartupError

_MOST_SPAWNS_PER_S = 100
_CSV_LINGER_S = 5.0  # workers report every 3 s, files are written every second


class Slot(User):
    """Goes through conversations that are due; see `conductor.py`."""

    conductor: ClassVar[Conductor]

    @task
    def work(self) -> None:
        self.conductor.work()
        raise StopUser


def add_arguments(parser: LocustArgumentParser, **_: Any) -> None:
    group = parser.add_argument_group("packlight")
    for flag, metavar, text in (
        ("--scenario", "NAME", "a shipped scenario, or the path of a .yaml file"),
        ("--plan", "FILE", "what `python -m loadtest plan` wrote, instead"),
        ("--samples", "FILE", "write every answer here, as JSON lines"),
        ("--kv", "JSON", "the `kv` object of requests"),
        ("--tokenizer", "MODEL", "what measures prompts, as `model.path` (default smollm2)"),
        ("--api-key-from", "VARIABLE", "the environment variable that holds an API key"),
    ):
        group.add_argument(flag, metavar=metavar, default="", help=text)
    group.add_argument("--reply-timeout", type=float, default=900.0, metavar="S", help="for each wait on the server")


def prepare(environment: Environment, **_: Any) -> None:
    """The plan is read before any user is there."""
    options: Any = environment.parsed_options
    try:
        plan = read_plan(Path(options.plan)) if options.plan else _make_plan(options)
    except StartupError as error:
        sys.exit(f"locust: {error.message}")
    options.num_users = options.num_users or plan.max_in_flight
    options.spawn_rate = options.spawn_rate or min(options.num_users, _MOST_SPAWNS_PER_S)
    all_there: Any = environment.events.spawning_complete
    if is_collecting(environment):
        file = SampleFile(Path(options.samples)) if options.samples else None
        linger_s = _CSV_LINGER_S if options.csv_prefix else 0.0
        collector = Collector(environment, plan, file, stays=not options.headless, linger_s=linger_s)
        all_there.add_listener(lambda **_: collector.begin())
    if is_sending(environment):
        test_start: Any = environment.events.test_start
        test_start.add_listener(lambda **_: _begin_test(environment, plan))
        all_there.add_listener(lambda **_: Slot.conductor.clock.begin())


def _begin_test(environment: Environment, plan: Plan) -> None:
    """Each test has a schedule of its own: one may follow another on Locust's web page."""
    options: Any = environment.parsed_options
    key = os.environ.get(options.api_key_from) if options.api_key_from else None
    host = environment.host or options.host
    Slot.conductor = Conductor(environment, plan, lambda clock: Asker(host, key, options.reply_timeout, clock))


def _make_plan(options: Any) -> Plan:
    """Seed 0, so that all processes of a test make the same."""
    if not options.host:
        sys.exit("locust: --host is missing; prompts are made for the model of one server")
    given = {
        "--scenario": options.scenario,
        "--url": options.host,
        "--kv": options.kv,
        "--tokenizer": options.tokenizer,
        "--api-key-from": options.api_key_from,
    }
    flags = [part for flag, value in given.items() if value for part in (flag, value)]
    with tempfile.TemporaryDirectory(prefix="packlight-load-") as folder:
        path = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "loadtest", "plan", "--seed", "0", "--out", str(path), *flags]
        if code := subprocess.run(command, check=False).returncode:
            sys.exit(code)
        return read_plan(path)


events.init_command_line_parser.add_listener(add_arguments)  # type: ignore[no-untyped-call]
events.init.add_listener(prepare)  # type: ignore[no-untyped-call]
