"""What the chart promises beyond valid YAML: settings that load, probes and ports that exist, an end that is waited
for, closed doors, streams that stream, and pairs of one revision."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest

from packlight.core.config import Config
from packlight.core.config_tree import build_config
from packlight.telemetry.catalogue import CATALOGUE, Kind, full_name
from tests.deploy.support import CASES, Object, config_tree, container, objects, pick, pod_spec, pod_specs

pytestmark = pytest.mark.slow

ROLES = ("router", "prefill", "decode")
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
SCALERS = ("ScaledObject", "HorizontalPodAutoscaler")


def config_of(case: str) -> Config:
    return build_config(config_tree(objects(case)))


@pytest.mark.parametrize("case", CASES)
def test_the_rendered_config_loads(case: str) -> None:
    config = config_of(case)
    assert config.index.backend == config.fleet.backend == "redis"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("role", ROLES)
def test_ports_are_those_of_the_config(case: str, role: str) -> None:
    items, config = objects(case), config_of(case)
    section = getattr(config, role)
    ports = {port["name"]: port["containerPort"] for port in container(items, role)["ports"]}
    expected = {"http": section.port} if role == "router" else {"grpc": section.port, "metrics": section.metrics_port}
    assert ports == expected
    assert {port["targetPort"] for port in pick(items, "Service", role)["spec"]["ports"]} == set(ports)
    probed = [next(iter(_action(container(items, role), kind).values()))["port"] for kind in PROBES]
    assert set(probed) <= set(ports)
    by_hand = _environment(items, role)["PACKLIGHT_HEALTH_URL"]
    assert by_hand.endswith(f":{section.port if role == 'router' else section.metrics_port}/health/ready")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("role", ROLES)
def test_a_pod_has_longer_to_end_than_its_drain(case: str, role: str) -> None:
    spec, drain_s = pod_spec(objects(case), role), getattr(config_of(case), role).drain_s
    before_s = (
        int(container(objects(case), role)["lifecycle"]["preStop"]["exec"]["command"][1]) if role == "router" else 0
    )
    assert spec["terminationGracePeriodSeconds"] >= math.ceil(drain_s) + before_s + 10


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_new_worker_is_known_before_the_next_old_one_goes(case: str, role: str) -> None:
    spec = pick(objects(case), "Deployment", role)["spec"]
    assert spec["minReadySeconds"] >= config_of(case).fleet.ttl_s
    starting_s = _probe_seconds(container(objects(case), role)["startupProbe"])
    assert spec["progressDeadlineSeconds"] > starting_s + spec["minReadySeconds"]


@pytest.mark.parametrize("role", ROLES)
def test_a_rollout_is_given_the_time_of_the_download_it_waits_for(role: str) -> None:
    items = objects("h100")
    download_s = pick(items, "Job")["spec"]["activeDeadlineSeconds"]
    starting_s = _probe_seconds(container(items, role)["startupProbe"])
    assert pick(items, "Deployment", role)["spec"]["progressDeadlineSeconds"] > download_s + starting_s


@pytest.mark.parametrize(
    "change", ['commonLabels={"team": "a"}', 'serviceAccount.name="other"', 'image.tag="2"', "podSecurity.runAsUser=1"]
)
def test_a_job_that_would_change_is_another_job(change: str) -> None:
    """Kubernetes refuses to change the pods of one that is there, and with it the upgrade."""
    before, after = (pick(objects("h100", *sets), "Job") for sets in ((), (change,)))
    assert after["spec"] != before["spec"]
    assert after["metadata"]["name"] != before["metadata"]["name"]
    assert pick(objects("h100", "workers.replicas=7"), "Job")["metadata"]["name"] == before["metadata"]["name"]


@pytest.mark.parametrize("case", CASES)
def test_pods_have_no_privileges(case: str) -> None:
    specs = list(pod_specs(objects(case)))
    assert len(specs) >= 4
    for spec in specs:
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for box in [*spec["containers"], *spec.get("initContainers", [])]:
            security = box["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"]["drop"] == ["ALL"]
            assert set(security["capabilities"].get("add", [])) <= {"IPC_LOCK"}
            assert "memory" in box["resources"]["limits"]


@pytest.mark.parametrize("case", CASES)
def test_every_mount_has_its_volume(case: str) -> None:
    for spec in pod_specs(objects(case)):
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        mounts = {mount["name"] for box in [*spec["containers"], *spec.get("initContainers", [])]
                  for mount in box.get("volumeMounts", [])}  # fmt: skip
        assert mounts == volumes


@pytest.mark.parametrize("case", CASES)
def test_selectors_find_their_pods_and_no_others(case: str) -> None:
    items = objects(case)
    pods = {item["metadata"]["labels"]["app.kubernetes.io/component"]: item["spec"]["template"]["metadata"]["labels"]
            for item in items if item["kind"] == "Deployment"}  # fmt: skip
    for item in items:
        spec = item.get("spec", {})
        selector = spec.get("podSelector") or spec.get("selector")
        if item["kind"] not in ("Service", "PodDisruptionBudget", "NetworkPolicy", "Deployment"):
            continue
        component = item["metadata"]["labels"]["app.kubernetes.io/component"]
        assert _matching(selector.get("matchLabels", selector), pods) == {component}


@pytest.mark.parametrize("case", CASES)
def test_only_the_call_chain_is_open(case: str) -> None:
    """router -> decode -> prefill, these three -> Redis, and nobody else is let in by a pod of the release."""
    items = objects(case)
    flows = {(peer, policy["metadata"]["labels"]["app.kubernetes.io/component"])
             for policy in items if policy["kind"] == "NetworkPolicy"
             for rule in policy["spec"]["ingress"] for peer in _peers(rule.get("from", []))}  # fmt: skip
    bundled = {(role, "redis") for role in ROLES if case != "h100"}
    outside = {("test", "router")} if case == "everything" else set()
    both_ways = {("prefill", "decode")} if case == "everything" else set()  # its `transferPorts`
    assert flows == {("router", "decode"), ("decode", "prefill")} | bundled | outside | both_ways


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("role", ROLES)
def test_what_a_pod_may_call_is_what_the_other_lets_in(case: str, role: str) -> None:
    items = objects(case)
    called = {peer for rule in pick(items, "NetworkPolicy", role)["spec"]["egress"] for peer in _peers(rule["to"])}
    for peer in called:
        callers = {
            name for rule in pick(items, "NetworkPolicy", peer)["spec"]["ingress"] for name in _peers(rule["from"])
        }
        assert role in callers


def test_a_release_behind_a_time_out_streams_as_long_as_the_router_lets_it() -> None:
    items, config = objects("everything"), config_of("everything")
    annotations = pick(items, "Ingress")["metadata"]["annotations"]
    prefix = "nginx.ingress.kubernetes.io"
    assert annotations[f"{prefix}/proxy-buffering"] == "off"
    assert int(annotations[f"{prefix}/proxy-read-timeout"]) > config.router.request_timeout_s
    assert annotations[f"{prefix}/proxy-body-size"] == "0", "what the user says wins"
    (rule,) = pick(items, "HTTPRoute")["spec"]["rules"]
    assert int(rule["timeouts"]["request"].removesuffix("s")) > config.router.request_timeout_s
    (backend,) = rule["backendRefs"]
    service = pick(items, "Service", "router")
    assert (backend["name"], backend["port"]) == (service["metadata"]["name"], service["spec"]["ports"][0]["port"])


@pytest.mark.parametrize("controller", ["nginx", "haproxy", "traefik", "alb", "other"])
def test_every_ingress_controller(controller: str) -> None:
    sets = ("ingress.enabled=true", 'ingress.hosts=["a.example"]', f'ingress.controller="{controller}"')
    ingress = pick(objects("default", *sets), "Ingress")
    told = [value for value in ingress["metadata"]["annotations"].values() if "610" in value]
    assert bool(told) == (controller in ("nginx", "haproxy", "alb"))
    paths = [path["path"] for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]]
    assert paths == ["/v1"], "metrics and health are nobody's business outside"


def test_pools_share_a_revision_that_changes_with_what_they_compute() -> None:
    same = [_revisions(objects("default", *sets)) for sets in ((), ("prefill.replicas=7",), ("router.replicas=7",))]
    assert same[0] == same[1] == same[2]
    changes = ("config.kv.page_size=32", 'image.tag="2"', 'decode.image.repository="other"', 'revision="blue"')
    changed = [_revisions(objects("default", change)) for change in changes]
    for revisions in (*same, *changed):
        assert len(set(revisions)) == 1, "both pools, label and environment"
    assert len({revisions[0] for revisions in (same[0], *changed)}) == 1 + len(changes)


def test_redis_addresses() -> None:
    secret = ("redis.bundled.enabled=false", 'redis.external.urlSecret.name="s"')
    assert _environment(objects("default"), "router")["REDIS_URL"] == "redis://demo-packlight-redis:6379/0"
    reference = _environment(objects("default", *secret), "decode")["REDIS_URL"]
    assert reference == {"secretKeyRef": {"name": "s", "key": "REDIS_URL"}}
    with_password = [entry["name"] for entry in container(objects("everything"), "prefill")["env"]]
    assert with_password.index("REDIS_PASSWORD") < with_password.index("REDIS_URL"), "only earlier ones are expanded"


def test_the_authority_of_an_external_redis_is_a_file_beside_the_config() -> None:
    items = objects("default", "redis.bundled.enabled=false", 'redis.external.url="rediss://r:6380/0"',
                    'redis.external.caSecret="ca"')  # fmt: skip
    sources = pod_spec(items, "router")["volumes"][0]["projected"]["sources"]
    assert {"secret": {"name": "ca", "items": [{"key": "ca.crt", "path": "redis-ca/ca.crt"}]}} in sources


@pytest.mark.parametrize("role", ROLES)
def test_every_pod_has_the_certificate_where_its_config_says(role: str) -> None:
    sets = ('tls.secretName="fleet"', 'config.tls.name="blue"')
    tls, spec = build_config(config_tree(objects("default", *sets))).tls, pod_spec(objects("default", *sets), role)
    (secret,) = _secrets(objects("default", *sets), role)
    (mount,) = (mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == "config")
    mounted = {item["key"]: f"{mount['mountPath']}/{item['path']}" for item in secret["items"]}
    assert secret["name"] == "fleet"
    assert mounted == {"ca.crt": tls.ca, "tls.crt": tls.cert, "tls.key": tls.key}
    assert tls.name == "blue", "what is set is kept"
    assert mount.get("subPath") is None, "a file mounted alone would not follow its secret"


def test_the_certificate_that_is_asked_for_is_the_one_that_is_mounted() -> None:
    items = objects("everything")
    certificate, (source, *_) = pick(items, "Certificate")["spec"], _secrets(items, "decode")
    assert certificate["secretName"] == source["name"]
    assert certificate["dnsNames"] == [config_of("everything").tls.name]
    assert {"server auth", "client auth"} <= set(certificate["usages"])


def test_pods_with_and_without_tls_are_not_paired() -> None:
    """Of another revision, they are no pair to any router; and each router calls those that speak as it does."""
    assert _revisions(objects("default")) != _revisions(objects("default", 'tls.secretName="fleet"'))


def test_nothing_starts_on_half_a_model() -> None:
    items = objects("h100")
    job = pick(items, "Job")["spec"]["template"]["spec"]["containers"][0]
    marker = next(entry["value"] for entry in job["env"] if entry["name"] == "MODEL_MARKER")
    assert marker.startswith(f"{config_of('h100').model.path}/")
    for role in ROLES:
        (wait,) = pod_spec(items, role)["initContainers"]
        assert wait["command"][-1] == marker
    other = pick(objects("h100", 'model.download.revision="v2"'), "Job")
    assert other["metadata"]["name"] != pick(items, "Job")["metadata"]["name"], "jobs cannot be changed"


def test_scaling_asks_for_metrics_that_exist() -> None:
    known = {full_name(role, metric) + ("_total" if metric.kind is Kind.COUNTER else "")
             for role, metrics in CATALOGUE.items() for metric in metrics}  # fmt: skip
    texts = [json.dumps(item) for case in CASES for item in objects(case) if item["kind"] in SCALERS]
    asked = {word for text in texts for word in re.findall(r"\w+", text) if word.startswith("packlight_")}
    assert {"packlight_decode_queued_requests", "packlight_prefill_queued_requests", "packlight_decode_pages"} <= asked
    assert asked <= known


def test_who_scales_does_not_also_count() -> None:
    for case in CASES:
        scaled = {item["spec"]["scaleTargetRef"]["name"] for item in objects(case)
                  if item["kind"] in SCALERS}  # fmt: skip
        for item in objects(case):
            if item["kind"] == "Deployment":
                assert ("replicas" in item["spec"]) == (item["metadata"]["name"] not in scaled)


def _action(box: Object, kind: str) -> Object:
    return {key: value for key, value in box[kind].items() if key in ("httpGet", "tcpSocket", "grpc")}


def _probe_seconds(probe: Object) -> int:
    return int(probe["periodSeconds"]) * int(probe["failureThreshold"])


def _matching(selector: dict[str, str], pods: dict[str, dict[str, str]]) -> set[str]:
    return {component for component, labels in pods.items() if selector.items() <= labels.items()}


def _peers(peers: list[Object]) -> set[str]:
    selectors = [peer["podSelector"]["matchLabels"] for peer in peers if "podSelector" in peer]
    return {selector["app.kubernetes.io/component"] for selector in selectors}


def _secrets(items: list[Object], role: str) -> list[Object]:
    sources = pod_spec(items, role)["volumes"][0]["projected"]["sources"]
    return [source["secret"] for source in sources if "secret" in source]


def _revisions(items: list[Object]) -> list[Any]:
    labels = [
        pick(items, "Deployment", role)["spec"]["template"]["metadata"]["labels"] for role in ("prefill", "decode")
    ]
    environment = [_environment(items, role)["POD_REVISION"] for role in ("prefill", "decode")]
    return [*(label["packlight/revision"] for label in labels), *environment]


def _environment(items: list[Object], role: str) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container(items, role)["env"]}
