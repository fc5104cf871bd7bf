"""The dashboards are what their description generates, and Grafana can read them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from deploy import chart
from deploy.observability import promql
from deploy.observability.generate import DASHBOARDS, FILES, dashboards
from deploy.observability.grafana import COLUMNS
from deploy.observability.request_life import PARTS
from packlight.telemetry.catalogue import CATALOGUE
from tests.deploy.support import metrics_named_in

Json = dict[str, Any]
BOARDS = {board.uid: json.loads((FILES / f"{board.uid}.json").read_text()) for board in DASHBOARDS}
UNITS = {"s", "percentunit", "Bps", "cps", "short", "none"}


def panels_of(board: Json) -> list[Json]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def test_the_files_are_what_is_generated() -> None:
    stale = [path.name for path, text in dashboards() if path.read_text() != text]
    assert not stale, "run python -m deploy.chart"
    assert {path.name for path in FILES.glob("*.json")} == {f"{uid}.json" for uid in BOARDS}


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_panels_are_complete_and_distinct(board: Json) -> None:
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels_of(board):
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["targets"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
    titles = [panel["title"] for panel in panels_of(board)]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_panels_do_not_overlap(board: Json) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= COLUMNS
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_the_data_source_is_the_viewers_choice(board: Json) -> None:
    names = [variable["name"] for variable in board["templating"]["list"]]
    assert names == ["datasource", "namespace"]
    asked = [item for panel in panels_of(board) for item in (panel, *panel["targets"])]
    assert {item["datasource"]["uid"] for item in asked} == {"${datasource}"}
    for panel in panels_of(board):
        for target in panel["targets"]:
            num_metrics = sum(target["expr"].count(f"packlight_{role}_") for role in CATALOGUE)
            assert target["expr"].count('namespace=~"$namespace"') == num_metrics


def test_expressions_name_only_metrics_bounds_and_labels_that_exist() -> None:
    for board in BOARDS.values():
        for panel in panels_of(board):
            for target in panel["targets"]:
                named = metrics_named_in(target["expr"])
                assert named, target["expr"]
                assert all(bounds <= set(metric.buckets) for metric, bounds in named.items())
                labels = {label for metric in named for label in metric.labels} | {"le", "__auto"}
                assert set(_filled_in(target["legendFormat"])) <= labels


def test_the_parts_of_the_first_token_are_those_that_are_measured() -> None:
    (metric,) = (metric for metric in CATALOGUE["router"] if metric.name == "time_to_first_token_part_seconds")
    assert ", ".join(PARTS) in metric.help


@pytest.mark.parametrize(
    "ask",
    [
        lambda: promql.rate("router", "request"),
        lambda: promql.rate("router", "request_seconds"),
        lambda: promql.gauge("router", "requests"),
        lambda: promql.gauge("decode", "pages", status="free"),
        lambda: promql.quantile(0.5, "decode", "pages"),
    ],
)
def test_what_the_catalogue_lacks_cannot_be_asked(ask: Any) -> None:
    with pytest.raises(KeyError):
        ask()


def test_a_share_needs_a_bucket_that_ends_there() -> None:
    assert 'le="0.8"' in promql.share_up_to(0.8, "router", "attention_mass_retained")
    with pytest.raises(ValueError, match=r"no bucket that ends at 0\.81"):
        promql.share_up_to(0.81, "router", "attention_mass_retained")


def test_compose_shows_what_the_chart_ships() -> None:
    compose = yaml.safe_load((chart.ROOT / "deploy" / "compose.yaml").read_text())
    mount = "../helm/packlight/files:/etc/packlight:ro"
    services = compose["services"]
    assert all(mount in services[name]["volumes"] for name in ("prometheus", "grafana"))
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (FILES / home.removeprefix("/etc/packlight/")).is_file()
    (rules,) = yaml.safe_load((chart.ROOT / "deploy" / "prometheus.yaml").read_text())["rule_files"]
    assert list(FILES.glob(rules.removeprefix("/etc/packlight/"))) == [FILES / "alerts.yaml"]


def _filled_in(legend: str) -> list[str]:
    """The labels of `{{label}}`."""
    return [part.partition("}}")[0] for part in legend.split("{{")[1:]]
