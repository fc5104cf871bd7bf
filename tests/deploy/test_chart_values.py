"""Values: a typo is refused with its path, what cannot work with the reason; what is generated is current."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deploy import chart
from tests.deploy.support import HELM_VERSIONS, config_tree, container, objects, pick, refused

TYPOS = {
    "router.replica=1": "router",
    "config.router.prot=8080": "config.router",
    'config.kv.policy={"flor": 1}': "config.kv.policy",
    "prefill.gpu.cuont=1": "prefill.gpu",
    'decode.gpu.count="all"': "decode.gpu.count",
    'networkPolicy.transferPorts=["7000:7100"]': "networkPolicy.transferPorts.0",
    "networkPolicy.transferPorts=[70000]": "networkPolicy.transferPorts.0",
    'decode.autoscaling={"kind": "kede"}': "decode.autoscaling.kind",
    'config.model.dtype="float8"': "config.model.dtype",
    "config.router.port=99999": "config.router.port",
    'workers.replicas="two"': "workers.replicas",
    'workers.tolerations=[{"keys": "gpu"}]': "workers.tolerations.0",
    'image.pullPolicy="Sometimes"': "image.pullPolicy",
    'revision="a b"': "revision",
    'router.image.digest="latest"': "router.image.digest",
    'networkPolicy.metricsFrom=[{"podSelecter": {}}]': "networkPolicy.metricsFrom.0",
    'model.volume={"pvc": {}}': "model.volume",
    'tls.certManager.issuerRef={"nmae": "ca"}': "tls.certManager.issuerRef",
}
CONTRADICTIONS = {
    ('config.router.host="127.0.0.1"',): "config.router.host",
    ('config.decode.host="localhost"',): "config.decode.host",
    ('config.index.backend="memory"',): "config.index.backend",
    ("config.decode.port=0",): "config.decode.port: give a port",
    ("config.prefill.metrics_port=null",): "config.prefill.metrics_port: give a port",
    ('config.model.path="Qwen/Qwen3-8B"',): "model.download.repo",
    ('config.model.path="/models/x"',): "model.volume or model.download",
    ("model.download.enabled=true",): "repo and folder",
    ('config.index.redis_url="redis://elsewhere"',): "redis.external",
    ('config.router.api_keys_file="/etc/packlight/api-keys"',): "router.apiKeys.secret.name",
    ('router.apiKeys.secret.name="keys"',): "/etc/packlight/api-keys",
    ("config.decode.tensor_parallel=2", "decode.gpu.count=1"): "config.decode.tensor_parallel: 2 ranks",
    ("config.prefill.tensor_parallel=4", "workers.gpu.count=2"): "config.prefill.tensor_parallel: 4 ranks",
    ('networkPolicy.transferPorts=["7100-7000"]',): "transferPorts: 7100-7000 is no range",
    ('networkPolicy.transferPorts=["7000-70000"]',): "transferPorts: 7000-70000 is no range",
    ('config.tls={"ca": "/ca", "cert": "/cert", "key": "/key"}',): "config.tls.ca: give the secret, tls.secretName",
    (
        'tls.secretName="fleet"',
        'config.decode.transports=["nixl", "grpc"]',
    ): "config.decode.transports: TLS does not cover nixl",
    ("redis.bundled.enabled=false",): "redis.external.urlSecret.name",
    ('redis.external.url="redis://elsewhere:6379/0"',): "bundled.enabled",
    ("ingress.enabled=true",): "ingress.hosts",
    ("gateway.enabled=true",): "gateway.parentRefs",
    ('prefill.autoscaling.kind="keda"', "prefill.autoscaling.minReplicas=9"): "prefill.autoscaling",
}


@pytest.mark.slow
@pytest.mark.parametrize("helm", HELM_VERSIONS)
@pytest.mark.parametrize("typo", TYPOS)
def test_a_typo_is_refused_with_its_path(typo: str, helm: str) -> None:
    """Helm 4 writes `/a/b/0`, Helm 3 `a.b.0`."""
    assert TYPOS[typo] in refused(typo, helm=helm).replace("'/", "'").replace("/", ".")


@pytest.mark.slow
@pytest.mark.parametrize("sets", CONTRADICTIONS)
def test_what_cannot_work_is_refused_with_the_reason(sets: tuple[str, ...]) -> None:
    assert CONTRADICTIONS[sets] in refused(*sets)


@pytest.mark.slow
def test_a_pod_has_a_gpu_for_each_rank() -> None:
    items = objects("h100", "config.prefill.tensor_parallel=4")
    assert _num_gpus(items, "prefill") == 4
    assert _num_gpus(items, "decode") == 1
    assert _num_gpus(objects("h100", "config.prefill.tensor_parallel=2", "prefill.gpu.count=8"), "prefill") == 8
    assert _num_gpus(objects("default", "config.prefill.tensor_parallel=2"), "prefill") is None


def _num_gpus(items: list[Any], role: str) -> int | None:
    count: int | None = container(items, role)["resources"]["limits"].get("nvidia.com/gpu")
    return count


@pytest.mark.slow
def test_a_range_of_ports_is_open_in_both_directions() -> None:
    items = objects("default", 'networkPolicy.transferPorts=["7000-7100", 18515]')
    ports = [{"protocol": "TCP", "port": 7000, "endPort": 7100}, {"protocol": "TCP", "port": 18515}]
    for role in ("prefill", "decode"):
        spec = pick(items, "NetworkPolicy", role)["spec"]
        for rules in (spec["ingress"], spec["egress"]):
            assert [rule["ports"] for rule in rules].count(ports) == 1


@pytest.mark.slow
def test_a_pool_says_its_differences_even_with_zeros() -> None:
    """Sprig's own merges would take `0` and `false` for nothing said."""
    items = objects("everything", "decode.gpu.count=0", "decode.rdma.enabled=false", "prefill.resources.limits={}")
    assert "nvidia.com/gpu" not in container(items, "decode")["resources"]["limits"]
    assert container(items, "decode")["resources"]["limits"] == {"memory": "8Gi"}
    assert container(items, "prefill")["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "add" not in container(items, "decode")["securityContext"]["capabilities"]


@pytest.mark.slow
def test_config_is_rendered_as_it_is_and_rolls_the_pods() -> None:
    before, after = objects("default"), objects("default", "config.decode.kv_memory_bytes=51539607552")
    assert config_tree(after)["decode"]["kv_memory_bytes"] == 51539607552
    names = [pick(items, "ConfigMap", "config")["metadata"]["name"] for items in (before, after)]
    assert names[0] != names[1]
    volumes = pick(after, "Deployment", "decode")["spec"]["template"]["spec"]["volumes"]
    assert {"configMap": {"name": names[1]}} in volumes[0]["projected"]["sources"]


def test_every_mapping_of_the_schema_is_closed() -> None:
    """Open are only those whose keys are the user's own, and what the API server checks itself."""
    open_objects = list(_open_objects(json.loads((chart.CHART / "values.schema.json").read_text()), "$"))
    assert {path.rpartition(".")[2] for path in open_objects} == {
        "global", "nodeAffinity", "podAffinity", "podAntiAffinity"
    }  # fmt: skip


def test_schema_and_readme_are_current() -> None:
    files = iter(chart.generated())
    for path, text in (next(files), next(files)):
        assert path.read_text() == text, "python -m deploy.chart"


def _open_objects(node: Any, path: str) -> Any:
    if isinstance(node, dict):
        if node.get("type") == "object" and "additionalProperties" not in node:
            yield path
        for key, value in node.items():
            yield from _open_objects(value, f"{path}.{key}")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _open_objects(value, f"{path}.{number}")
