"""A real Prometheus scrapes a real cluster: every panel has something to show, every rule is understood."""

from __future__ import annotations

import json
import math
import shutil
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from deploy.observability.generate import DASHBOARDS, FILES
from deploy.observability.grafana import Dashboard
from tests.e2e.helpers import client_of
from tests.support.cluster import (
    PATIENCE_S,
    SMALL_POOLS,
    RunningCluster,
    eventually,
    free_port,
    running_cluster,
    running_process,
)

pytestmark = pytest.mark.e2e

SETTINGS = (
    "model.path=fake",
    *SMALL_POOLS,
    *("prefill.attention=sdpa", "decode.attention=sdpa"),  # nothing to compile
    *("prefill.shadow_ratio=1", "index.timeout_s=5", "kv.floor=0.5"),
)
FLAGS = [flag for setting in SETTINGS for flag in ("--set", setting)]
WINDOW_S, SEEN_S = 6, 60
SLOW = {f"Packlight{what}Burns{how}" for what in ("FirstToken", "OutputToken") for how in ("Fast", "Slowly")}
SLOW |= {"PacklightQueueAge"}
KINDS = ({}, {"recipe": "snapkv", "ratio": 0.5}, {"recipe": "snapkv", "budget": 64, "floor": 0.9})


@dataclass(frozen=True)
class Prometheus:
    url: str

    def ask(self, path: str, **query: str) -> Any:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=PATIENCE_S) as reply:
            return json.load(reply)["data"]

    def is_up(self, num_targets: int) -> bool:
        with suppress(OSError):
            targets = self.ask("targets", state="active")["activeTargets"]
            return [target["health"] for target in targets] == ["up"] * num_targets
        return False

    def has_data(self, expr: str) -> bool:
        """Whether the expression had a number at any time lately. NaN is a quantile of nothing."""
        now = time.time()
        found = self.ask("query_range", query=expr, start=str(now - SEEN_S), end=str(now), step="1")["result"]
        return any(math.isfinite(float(value)) for series in found for _, value in series["values"])


@pytest.fixture(scope="module")
def cluster() -> Iterator[RunningCluster]:
    with running_cluster(*FLAGS, "--prefill", "1", "--decode", "1", "--keep-going") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def prometheus(cluster: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("needs prometheus: apt-get install --no-install-recommends prometheus")
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    config = folder / "prometheus.yaml"
    config.write_text(yaml.safe_dump(scraping(cluster)))
    where = [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
    with running_process([binary, f"--config.file={config}", *where]):
        prometheus = Prometheus(f"http://127.0.0.1:{port}")
        eventually(lambda: prometheus.is_up(3), what="Prometheus does not scrape all three processes")
        with steady_load(cluster):
            yield prometheus


def scraping(cluster: RunningCluster) -> dict[str, Any]:
    addresses = {
        name: cluster.process.wait_for(rf"(?m)^{name} +\| .* metrics on http://(\S+)/metrics$")[1]
        for name in ("prefill-0", "decode-0")
    }
    addresses["router"] = f"127.0.0.1:{cluster.port}"
    jobs = [
        {"job_name": name.removesuffix("-0"), "static_configs": [{"targets": [address]}]}
        for name, address in addresses.items()
    ]
    every = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    return {"global": every, "rule_files": [str(FILES / "alerts.yaml")], "scrape_configs": jobs}


@contextmanager
def steady_load(cluster: RunningCluster) -> Iterator[None]:
    """One request after the other, of all kinds, till the block ends."""
    done = threading.Event()

    def go_on() -> None:
        with client_of(cluster.url) as client:
            for number in range(sys.maxsize):
                if done.wait(0.02):
                    return
                with suppress(openai.OpenAIError):  # at the end the cluster is broken on purpose
                    send(client, number)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def send(client: openai.OpenAI, number: int) -> None:
    question = {"role": "user", "content": f"{number % 7} is how this begins, and it goes on and on. " * 12}
    kv = KINDS[number % len(KINDS)]
    client.chat.completions.create(
        model="fake", messages=[question], max_tokens=300, temperature=0, extra_body={"kv": kv, "min_tokens": 300}
    )


def as_grafana_asks(expr: str) -> str:
    """With its variables filled in: all namespaces, which is `.*`."""
    return expr.replace("$__rate_interval", f"{WINDOW_S}s").replace("$namespace", ".*")


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board.uid)
def test_every_panel_has_something_to_show(prometheus: Prometheus, board: Dashboard) -> None:
    text = (FILES / f"{board.uid}.json").read_text()
    panels = [panel for panel in json.loads(text)["panels"] if panel["type"] != "row"]
    empty = {
        f"{panel['title']}: {target['legendFormat']}": as_grafana_asks(target["expr"])
        for panel in panels
        for target in panel["targets"]
    }

    def all_shown() -> bool:
        for name in [name for name, expr in empty.items() if prometheus.has_data(expr)]:
            del empty[name]
        return not empty

    with suppress(AssertionError):
        eventually(all_shown)
    assert not empty


def test_every_rule_is_evaluated_and_all_is_well(prometheus: Prometheus) -> None:
    """But for how soon tokens come and how long requests wait: that depends on the machine."""
    eventually(lambda: all(rule["lastEvaluation"] > "1" for rule in rules_of(prometheus)))
    for rule in rules_of(prometheus):
        assert rule["health"] == "ok", rule
        is_slow = rule["name"] in SLOW and rule["state"] == "pending"
        assert is_slow or rule.get("state", "inactive") == "inactive", rule
    assert {rule["name"] for rule in rules_of(prometheus)} == named_in(FILES / "alerts.yaml")


def test_alerts_wake_up_when_the_fleet_loses_a_part(prometheus: Prometheus, cluster: RunningCluster) -> None:
    """Pending at least, for it takes minutes till some fire; and annotations that name what they are about."""
    cluster.kill("redis")
    cluster.kill("prefill-0")
    found = {"PacklightIndexAway": "inactive", "PacklightWorkerLost": "inactive"}

    def all_noticed() -> bool:
        found.update({rule["name"]: rule["state"] for rule in rules_of(prometheus) if rule["name"] in found})
        return found["PacklightIndexAway"] != "inactive" and found["PacklightWorkerLost"] == "firing"

    with suppress(AssertionError):
        eventually(all_noticed)
    assert all_noticed(), found
    (lost,) = [rule for rule in rules_of(prometheus) if rule["name"] == "PacklightWorkerLost"]
    assert "attempts met a lost worker" in lost["alerts"][0]["annotations"]["description"]


def rules_of(prometheus: Prometheus) -> list[dict[str, Any]]:
    return [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]


def named_in(file: Path) -> set[str]:
    groups = yaml.safe_load(file.read_text())["groups"]
    return {rule.get("alert") or rule["record"] for group in groups for rule in group["rules"]}
