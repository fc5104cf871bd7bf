"""Every alert fires when it should and is silent when it should be, in Prometheus' own words."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import chart
from packlight.core.config import Config
from packlight.telemetry.catalogue import CATALOGUE
from tests.deploy.support import metrics_named_in

RULES = chart.CHART / "files" / "alerts.yaml"
RUNBOOK = chart.ROOT / "docs" / "operations.md"
ROUTER, WORKER = 'job="router"', 'job="decode", instance="decode-0"'
TTFT, TPOT = "packlight_router_time_to_first_token_seconds", "packlight_router_time_per_output_token_seconds"
MASS, SHADOWS = "packlight_router_attention_mass_retained", "packlight_prefill_shadow_tokens_total"


@dataclass(frozen=True)
class Case:
    """Samples, one a minute in promtool's notation, and whether the alert fires in minute `at`."""

    alert: str
    fires: bool
    at: int
    series: dict[str, str]
    labels: str = ROUTER


def latency(metric: str, le: str, slow: int, minutes: int, *, of: int = 100, before: int = 0) -> dict[str, str]:
    """`of` observations a minute, of which `slow` are slow, after `before` minutes without a slow one."""
    fast, then = f"0+{of}x{before}", f"{of * before}+{of - slow}x{minutes}"
    return {
        f'{metric}_bucket{{{ROUTER}, le="{le}"}}': then if not before else f"{fast} {then}",
        f"{metric}_count{{{ROUTER}}}": f"0+{of}x{before + minutes + 1}",
    }


def burn_cases(fast: str, slowly: str, metric: str, le: str) -> Iterator[Case]:
    """Of 100 requests a minute 15 slow ones are too many for an hour and 7 for six hours, as 1 may be slow."""
    yield Case(fast, True, 70, latency(metric, le, 20, 75))
    yield Case(fast, False, 70, latency(metric, le, 10, 75))
    yield Case(fast, False, 69, latency(metric, le, 20, 15, before=60))  # ten bad minutes in a good hour
    yield Case(slowly, True, 70, latency(metric, le, 8, 75))
    yield Case(slowly, False, 70, latency(metric, le, 4, 75))
    yield Case(slowly, False, 130, latency(metric, le, 8, 30, before=110))  # half an hour, but not six


def outcomes(bad: str, num_bad: int) -> dict[str, str]:
    """100 completed requests a minute, and `num_bad` of another outcome."""
    return {
        f'packlight_router_requests_total{{{ROUTER}, endpoint="chat", outcome="completed"}}': "0+100x30",
        f'packlight_router_requests_total{{{ROUTER}, endpoint="chat", outcome="{bad}"}}': f"0+{num_bad}x30",
    }


def pages(role: str, free: int, held: int, cached: int) -> dict[str, str]:
    states = {"free": free, "held": held, "cached": cached}
    return {f'packlight_{role}_pages{{{WORKER}, state="{state}"}}': f"{num}+0x20" for state, num in states.items()}


def one_error(type: str) -> dict[str, str]:
    """None for ten minutes, then one."""
    return {f'packlight_decode_errors_total{{{WORKER}, type="{type}"}}': "0x10 1x30"}


def mass(num_low: int) -> dict[str, str]:
    return {
        f'{MASS}_bucket{{{ROUTER}, recipe="snapkv", le="0.8"}}': f"0+{num_low}x60",
        f'{MASS}_count{{{ROUTER}, recipe="snapkv"}}': "0+100x60",
    }


def shadows(yes: int, no: int) -> dict[str, str]:
    return {
        f'{SHADOWS}{{{ROUTER}, recipe="h2o", same="{same}"}}': f"0+{num}x180"
        for same, num in (("yes", yes), ("no", no))
    }


READY, WORKERS = f"packlight_router_ready{{{ROUTER}, %s}}", f"packlight_router_workers{{{ROUTER}, %s}}"
OLDEST = f"packlight_%s_oldest_queued_timestamp_seconds{{{WORKER}}}"
EXPIRY = f"packlight_%s_certificate_expiry_timestamp_seconds{{{WORKER}}}"
RETRIES = f'packlight_router_retries_total{{{ROUTER}, type="WorkerLost"}}'
LOST = f'packlight_router_errors_total{{{ROUTER}, type="WorkerLost"}}'
RECIPE = f'{ROUTER}, recipe="%s"'

CASES = (
    *burn_cases("PacklightFirstTokenBurnsFast", "PacklightFirstTokenBurnsSlowly", TTFT, "5.0"),
    *burn_cases("PacklightOutputTokenBurnsFast", "PacklightOutputTokenBurnsSlowly", TPOT, "0.1"),
    Case("PacklightNoRouter", True, 5, {"up": "1x10"}, labels=""),
    Case("PacklightNoRouter", False, 5, {READY % 'pod="a"': "0x10"}, labels=""),
    Case("PacklightNoReadyWorker", True, 5, {READY % 'pod="a"': "0x10", READY % 'pod="b"': "0x10"}),
    Case("PacklightNoReadyWorker", False, 5, {READY % 'pod="a"': "0x10", READY % 'pod="b"': "1x10"}),
    Case("PacklightNoReadyWorker", False, 5, {READY % 'pod="a"': "1x4 0 1x5"}),
    Case("PacklightPoolEmpty", True, 9, {WORKERS % 'role="prefill"': "1x3 0x9"}, f'{ROUTER}, role="prefill"'),
    Case("PacklightPoolEmpty", False, 9, {WORKERS % 'role="prefill"': "2x3 1x9"}, f'{ROUTER}, role="prefill"'),
    Case("PacklightWorkerLost", True, 12, {RETRIES: "0x5 1x9", LOST: "0x14"}),
    Case("PacklightWorkerLost", False, 12, {RETRIES: "3x14", LOST: "2x14"}),
    Case("PacklightWorkerLost", False, 25, {RETRIES: "0x5 1x30", LOST: "0x35"}),  # it was a while ago
    Case("PacklightRequestsFailing", True, 20, outcomes("failed", 5)),
    Case("PacklightRequestsFailing", True, 20, outcomes("timeout", 5)),
    Case("PacklightRequestsFailing", False, 20, outcomes("failed", 1)),
    Case("PacklightRequestsFailing", False, 20, outcomes("cancelled", 50)),
    Case("PacklightRequestsRefused", True, 25, outcomes("refused", 10)),
    Case("PacklightRequestsRefused", False, 25, outcomes("refused", 2)),
    Case("PacklightQueueAge", True, 3, {OLDEST % "prefill": "60x9"}, WORKER),  # in minute 3 it waits for two
    Case("PacklightQueueAge", True, 3, {OLDEST % "decode": "60x9"}, WORKER),
    Case("PacklightQueueAge", False, 3, {OLDEST % "decode": "0+60x9"}, WORKER),  # always another one that just came
    Case("PacklightQueueAge", False, 3, {OLDEST % "decode": "0x9"}, WORKER),  # nobody waits
    Case("PacklightPagesExhausted", True, 10, pages("decode", 2, 98, 0), WORKER),
    Case("PacklightPagesExhausted", False, 10, pages("decode", 10, 90, 0), WORKER),
    Case("PacklightPagesExhausted", True, 10, pages("prefill", 1, 97, 2), WORKER),
    Case("PacklightPagesExhausted", False, 10, pages("prefill", 0, 60, 40), WORKER),  # a full cache is a good one
    Case("PacklightIndexAway", True, 5, {f"packlight_router_index_available{{{ROUTER}}}": "1 0x9"}),
    Case("PacklightIndexAway", False, 5, {f"packlight_router_index_available{{{ROUTER}}}": "1x3 0 1x9"}),
    *(
        case
        for role in CATALOGUE
        for case in (
            Case("PacklightCertificateEnds", True, 10, {EXPIRY % role: "21600x15"}, WORKER),
            Case("PacklightCertificateEnds", False, 10, {EXPIRY % role: "86400x15"}, WORKER),
        )
    ),
    *(
        case
        for name in ("ShipmentCorrupt", "ShipmentIncompatible")
        for case in (
            Case(f"Packlight{name}", True, 15, one_error(name), f'{WORKER}, type="{name}"'),
            Case(f"Packlight{name}", False, 5, one_error(name), f'{WORKER}, type="{name}"'),
            Case(f"Packlight{name}", False, 15, one_error("QueueFull"), f'{WORKER}, type="{name}"'),
        )
    ),
    Case("PacklightFidelityFloorBreached", True, 50, mass(10), RECIPE % "snapkv"),
    Case("PacklightFidelityFloorBreached", False, 50, mass(2), RECIPE % "snapkv"),
    Case("PacklightShadowsDisagree", True, 150, shadows(6, 4), RECIPE % "h2o"),
    Case("PacklightShadowsDisagree", False, 150, shadows(9, 1), RECIPE % "h2o"),
    Case("PacklightShadowsDisagree", False, 3, shadows(0, 10), RECIPE % "h2o"),  # too few to say so
)


@pytest.fixture(scope="module")
def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def alerts(rules: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found = [rule for rule in rules if "alert" in rule]
    assert len({rule["alert"] for rule in found}) == len(found)
    return {rule["alert"]: rule for rule in found}


def test_every_alert_is_tried_both_ways(alerts: dict[str, Any]) -> None:
    assert {(case.alert, case.fires) for case in CASES} == {(name, fires) for name in alerts for fires in (True, False)}


def test_the_alerts_fire_and_do_not_fire(alerts: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    alone = [case for case in CASES if case.alert == "PacklightNoRouter"]
    together = [case for case in CASES if case not in alone]
    done = _tried(tmp_path, alerts, *([case] for case in alone), together)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_threshold_that_is_wrong_would_be_found(alerts: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """The test of the test: the case of a full pool, turned around."""
    case = next(case for case in CASES if case.alert == "PacklightPagesExhausted" and case.fires)
    assert _tried(tmp_path, alerts, [replace(case, fires=False)]).returncode == 1


def test_prometheus_takes_the_rules() -> None:
    done = _promtool("check", "rules", str(RULES))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_name_only_metrics_and_bounds_that_exist(rules: list[dict[str, Any]]) -> None:
    recorded = {rule["record"] for rule in rules if "record" in rule}
    for rule in rules:
        named = metrics_named_in(rule["expr"])
        assert named or any(record in rule["expr"] for record in recorded)
        for metric, bounds in named.items():
            assert bounds <= set(metric.buckets), rule["expr"]


def test_every_alert_says_what_it_is_and_leads_to_its_section(alerts: dict[str, dict[str, Any]]) -> None:
    sections = set(re.findall(r"(?m)^### (Packlight\w+)$", RUNBOOK.read_text()))
    assert sections == set(alerts)
    for name, rule in alerts.items():
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_the_floor_is_the_one_that_auto_holds(alerts: dict[str, dict[str, Any]]) -> None:
    assert f'le="{Config().kv.policy.floor}"' in alerts["PacklightFidelityFloorBreached"]["expr"]


def test_the_catalogue_is_searched() -> None:
    (metric,) = metrics_named_in('rate(packlight_router_time_to_first_token_seconds_bucket{le="5.0"}[5m])').items()
    assert metric == (next(m for m in CATALOGUE["router"] if m.name == "time_to_first_token_seconds"), {5.0})
    with pytest.raises(KeyError):
        metrics_named_in("rate(packlight_router_request_seconds_total[5m])")


def _tried(folder: Path, alerts: dict[str, Any], *groups: list[Case]) -> subprocess.CompletedProcess[str]:
    """What promtool says. The cases of a group share one Prometheus, each in a namespace of its own: it is the starting
    of one that takes time."""
    file = folder / "alerts_test.yaml"
    tests = [_as_promtool_has_it(cases, alerts) for cases in groups]
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    return _promtool("test", "rules", str(file))


def _as_promtool_has_it(cases: list[Case], alerts: dict[str, Any]) -> dict[str, Any]:
    numbered = [(f'namespace="case-{number}"', case) for number, case in enumerate(cases)]
    series = [
        {"series": name.replace("{", f"{{{namespace}, ", 1), "values": values}
        for namespace, case in numbered
        for name, values in case.series.items()
    ]
    asked = [_asked(case, namespace, alerts[case.alert]["labels"]["severity"]) for namespace, case in numbered]
    return {"interval": "1m", "input_series": series, "promql_expr_test": asked}


def _asked(case: Case, namespace: str, severity: str) -> dict[str, Any]:
    """Asks for the synthetic series ALERTS: what an alert says is another test's."""
    found = [f'alertname="{case.alert}"', 'alertstate="firing"', *([namespace] if case.labels else [])]
    labels = ", ".join(filter(None, ('__name__="ALERTS"', *found, case.labels, f'severity="{severity}"')))
    samples = [{"labels": f"{{{labels}}}", "value": 1}] if case.fires else []
    return {"expr": f"ALERTS{{{', '.join(found)}}}", "eval_time": f"{case.at}m", "exp_samples": samples}


def _promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool: apt-get install --no-install-recommends prometheus")
    return subprocess.run([promtool, *arguments], capture_output=True, text=True)
