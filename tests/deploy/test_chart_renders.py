"""The chart renders with both Helms, as it did before, into objects that Kubernetes knows."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy import chart, tools
from tests.deploy.support import CASES, HELM_VERSIONS, fetched, objects, rendered, with_kubernetes_validate

pytestmark = pytest.mark.slow

KUBERNETES = ("1.27", "1.31", "1.35")  # the oldest that Chart.yaml allows, and newer ones
CUSTOM_RESOURCES = {
    "monitoring.coreos.com/v1": "prometheus-operator/monitoring.coreos.com/v1",
    "keda.sh/v1alpha1": "keda/keda.sh/v1alpha1",
    "gateway.networking.k8s.io/v1": "gateway-api/gateway.networking.k8s.io/v1",
    "cert-manager.io/v1": "cert-manager/cert-manager.io/v1",
}
RULES = """groups:
  - name: packlight
    rules:
      - alert: NoReadyWorker
        expr: packlight_router_workers{role="decode"} == 0
        annotations: {summary: "{{ $labels.role }} is gone"}
"""


@pytest.mark.parametrize("helm", HELM_VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_lint(case: str, helm: str) -> None:
    binary = fetched(lambda: tools.helm(helm))
    flags = [flag for file in chart.CASES[case] for flag in ("--values", str(file))]
    done = subprocess.run([binary, "lint", "--strict", chart.CHART, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("helm", HELM_VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_golden_render(case: str, helm: str) -> None:
    golden = (chart.GOLDEN / f"{case}.yaml").read_text()
    assert rendered(case, helm) == golden, "if that is meant: python -m deploy.chart, and read the diff"


@pytest.mark.parametrize("case", CASES)
def test_no_key_is_said_twice(case: str) -> None:
    """YAML takes the last one without a word."""

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
            keys = [key.value for key, _ in node.value]
            assert len(keys) == len(set(keys)), f"{node.start_mark}: {keys}"
            return super().construct_mapping(node, deep)

    assert list(yaml.load_all(rendered(case), Strict))


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_knows_every_field(version: str) -> None:
    files = [str(chart.GOLDEN / f"{case}.yaml") for case in CASES]
    options = ["-k", version, "--strict", "--quiet", "--no-warn"]
    done = with_kubernetes_validate("kubernetes_validate", *options, *files)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_misspelt_field_would_be_found(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((chart.GOLDEN / "default.yaml").read_text().replace("minReadySeconds", "minReadySecond"))
    assert with_kubernetes_validate("kubernetes_validate", "-k", "1.35", "--strict", str(wrong)).returncode == 1


def test_custom_resources_have_the_fields_of_their_types(tmp_path: Path) -> None:
    found = [item for case in CASES for item in objects(case) if item["apiVersion"] in CUSTOM_RESOURCES]
    kinds = {"ServiceMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute", "Certificate"}
    assert {item["kind"] for item in found} == kinds
    assert _type_errors(found, tmp_path) == ""


def test_a_misspelt_field_of_a_custom_resource_would_be_found(tmp_path: Path) -> None:
    (monitor, *_) = (item for item in objects("h100") if item["kind"] == "ServiceMonitor")
    monitor["spec"]["endpoints"][0]["intervall"] = "15s"
    assert "intervall" in _type_errors([monitor], tmp_path)


def test_rules_and_dashboards_in_the_chart_are_passed_on_as_they_are(tmp_path: Path) -> None:
    fetched(lambda: tools.helm(chart.GOLDEN_HELM))
    copy = tmp_path / "packlight"
    shutil.copytree(chart.CHART, copy, ignore=shutil.ignore_patterns("files"))
    (copy / "files").mkdir()
    (copy / "files" / "sample.yaml").write_text(RULES)
    dashboard = json.dumps({"title": "Fleet", "panels": [{"legendFormat": "{{role}}"}]}, indent=2)
    (copy / "files" / "fleet.json").write_text(dashboard)
    text = chart.render(chart.GOLDEN_HELM, *chart.CASES["everything"], chart=copy)
    items = [item for item in yaml.safe_load_all(text) if item]
    (rule,) = (item for item in items if item["kind"] == "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(RULES)
    (board,) = (item for item in items if item["metadata"]["name"] == "pack-dashboard-fleet")
    assert json.loads(board["data"]["fleet.json"]) == json.loads(dashboard)
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert _type_errors([rule], tmp_path) == ""


def _type_errors(items: list[dict[str, object]], folder: Path) -> str:
    """What the TypeScript compiler and the types' own validators have against the objects."""
    types = fetched(tools.crd_types)
    lines = []
    for number, item in enumerate(items):
        module = f"@kubernetes-models/{CUSTOM_RESOURCES[str(item['apiVersion'])]}"
        lines += [
            f'import {{ {item["kind"]} as Model{number}, type I{item["kind"]} as Type{number} }} from "{module}";',
            f"const object{number}: Type{number} = {json.dumps(item)};",
            f"new Model{number}(object{number}).validate();",
        ]
    (folder / "check.ts").write_text("\n".join(lines))
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "node_modules").unlink(missing_ok=True)
    (folder / "node_modules").symlink_to(types / "node_modules")
    options = ["--strict", "--skipLibCheck", "--module", "nodenext", "--target", "es2022", "check.ts"]
    compiled = subprocess.run(["node_modules/.bin/tsc", *options], cwd=folder, capture_output=True, text=True)
    checked = subprocess.run(["node", "check.js"], cwd=folder, capture_output=True, text=True)
    return compiled.stdout + checked.stderr
