"""Images: what the Dockerfile says of its targets, and that its steps do what they say; the compose file beside it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from deploy import tools
from deploy.chart import ROOT
from packlight.core.config_tree import build_config
from packlight.native.compile import build
from packlight.native.variants import VARIANTS, cpu_flags, supported
from tests.deploy.image_build import Image, context_files
from tests.deploy.support import (
    DOCKERFILE,
    command_of,
    fetched,
    inherited,
    lineage,
    stages,
    with_kubernetes_validate,
)
from tests.support.cluster import free_port, running_process

TARGETS = ("router", "worker-cpu", "worker-cuda")
COMPOSE = ROOT / "deploy" / "compose.yaml"
PINNED = re.compile(r".+(:v?\d+\.\d+\.\d+[\w.-]*|@sha256:[0-9a-f]{64})")


@pytest.mark.slow
def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run([fetched(tools.hadolint), DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_runs_packlight_as_nobody_and_says_how_it_is(target: str) -> None:
    user, health = inherited(target, "USER"), inherited(target, "HEALTHCHECK")
    entry, command = inherited(target, "ENTRYPOINT"), inherited(target, "CMD")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "a number: Kubernetes must see that it is not root"
    assert command_of(health) == ["healthcheck"]
    assert command_of(entry) == ["packlight"]
    assert command_of(command)[0] in ("router", "decode")


@pytest.mark.parametrize("target", ["router", "worker-cpu"])
def test_what_is_shipped_was_built_elsewhere(target: str) -> None:
    """No pip, compiler or source lands in a layer of the shipped stages."""
    assert _shipped_steps(target) == ["install -d -o 10001 -g 10001 /var/cache/packlight"]


def test_on_gpus_there_is_a_c_compiler_because_triton_needs_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And nothing else that is built."""
    build = pytest.importorskip("triton.runtime.build")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(RuntimeError, match="Failed to find C compiler"):
        build._find_compiler.__wrapped__("c")
    (tmp_path / "gcc").touch(0o755)
    assert build._find_compiler.__wrapped__("c") == str(tmp_path / "gcc")
    _, compiler = _shipped_steps("worker-cuda")
    assert " install -y --no-install-recommends gcc libc6-dev " in compiler


def test_base_images_are_pinned() -> None:
    bases = {stage.base for stage in stages().values()} - set(stages())
    assert bases
    assert all(PINNED.fullmatch(base) for base in bases)


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"
    for source in context_files():
        assert (ROOT / source).exists()
        assert any(Path(source).match(pattern) or source.startswith(f"{pattern}/") for pattern in kept), source


@pytest.mark.parametrize(("image", "extras"), [("router", ()), ("worker", ("engine",))])
def test_requirements_are_locked_and_fit(image: str, extras: tuple[str, ...]) -> None:
    locked = _locked(image)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        assert name in locked, f"python deploy/requirements/lock.py: {name} is new"
        assert requirement.specifier.contains(Version(locked[name])), (
            f"python deploy/requirements/lock.py: {requirement}"
        )
    assert ("torch" in locked) == (image == "worker")


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(1800)  # it installs torch
def test_the_images_steps_make_a_router_and_a_worker_that_needs_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a clean environment, with nothing of this one. The worker comes to lie over the router: what both have, which
    is all that the router has, is installed once."""
    monkeypatch.setenv("PIP_COMPILE", "0")  # bytecode of torch and transformers takes longer than all the rest
    image = Image(tmp_path)
    image.build("router")
    _check_router(image)
    assert _locked("router").items() <= _locked("worker").items(), "a worker on its own would lack something"
    kernels = tmp_path / "opt/packlight/lib/python3.11/site-packages/packlight/native/prebuilt"
    _give_kernels(kernels)
    image.build("worker-cpu")
    assert image.run("packlight", "--version").stdout.startswith("packlight ")
    assert {path.name.split("-")[1] for path in kernels.glob("*.so")} == {variant.name for variant in VARIANTS}
    asked = "from packlight.native.library import open_library; print(open_library().variant.name)"
    image.environ["PATH"] = str(tmp_path / "opt/packlight/bin")
    assert image.run("python", "-c", asked).stdout.strip() == supported(cpu_flags())[0].name


def _check_router(image: Image) -> None:
    """No torch, SmolLM2 inside, and nothing written but its cache."""
    assert image.run("packlight", "--version").stdout.startswith("packlight ")
    assert "No module named 'torch'" in image.run("python", "-c", "import torch").stderr
    before = _files(image.root / "opt")
    port = free_port()
    settings = [flag for setting in (f"router.port={port}", "log_level=debug") for flag in ("--set", setting)]
    environ = image.environ | {
        "HOME": str(image.root / "var/cache/packlight"),
        "PACKLIGHT_HEALTH_URL": f"http://127.0.0.1:{port}/health/live",
    }
    health = image.root / "usr/local/bin/healthcheck"
    with running_process([str(image.root / "opt/packlight/bin/packlight"), "router", *settings], environ) as process:
        process.wait_for("the router listens on", timeout_s=180)
        checked = subprocess.run([health], capture_output=True, text=True, env=environ)
        assert (checked.returncode, json.loads(checked.stdout)) == (0, {"live": True})
        environ["PACKLIGHT_HEALTH_URL"] = f"http://127.0.0.1:{port}/health/ready"
        unready = subprocess.run([health], capture_output=True, text=True, env=environ)
        assert unready.returncode == 1
        assert json.loads(unready.stdout)["model"] == "smollm2"
        assert process.end() == 0
    assert _files(image.root / "opt") == before


def _give_kernels(folder: Path) -> None:
    """Most forms of the kernels this machine needs too, and the image gets them from here. The plainest is compiled by
    the image's own step, and so are those that this machine cannot run."""
    folder.mkdir(parents=True)
    for variant in supported(cpu_flags())[:-1]:
        shutil.copy(build(variant), folder)


# ── compose ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def compose() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return tree


@pytest.mark.slow
def test_compose_has_the_fields_of_its_schema(compose: dict[str, Any], tmp_path: Path) -> None:
    schema = str(fetched(tools.compose_schema))
    for name, tree in (("right", compose), ("wrong", compose | {"services": {"a": {"imag": "b"}}})):
        (tmp_path / name).write_text(json.dumps(tree))
    assert with_kubernetes_validate("jsonschema", "-i", str(tmp_path / "right"), schema).stderr == ""
    assert "imag" in with_kubernetes_validate("jsonschema", "-i", str(tmp_path / "wrong"), schema).stderr


def test_compose_runs_a_fleet_of_images_that_exist(compose: dict[str, Any]) -> None:
    services = compose["services"]
    config = build_config(yaml.safe_load(compose["configs"]["packlight"]["content"]))
    assert config.index.backend == config.fleet.backend == "redis"
    assert {name: services[name].get("deploy", {}).get("replicas", 1) for name in ("router", "prefill", "decode")} == {
        "router": 1, "prefill": 2, "decode": 2
    }  # fmt: skip
    for role in ("router", "prefill", "decode"):
        assert services[role]["build"]["target"] in TARGETS
        assert services[role]["command"][0] == role
        assert _seconds(services[role]["stop_grace_period"]) > getattr(config, role).drain_s + 10
        assert getattr(config, role).host == "0.0.0.0"
    assert all(PINNED.fullmatch(service["image"]) for service in services.values())
    assert all(service["read_only"] and service["cap_drop"] == ["ALL"] for service in services.values())
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_health_checks_and_prometheus_ask_at_the_ports_of_the_config(compose: dict[str, Any]) -> None:
    config = build_config(yaml.safe_load(compose["configs"]["packlight"]["content"]))
    asked = {target: inherited(target, "ENV") for target in ("router", "worker-cpu")}
    assert f"PACKLIGHT_HEALTH_URL=http://127.0.0.1:{config.router.port}/health/ready" in asked["router"]
    assert f"PACKLIGHT_HEALTH_URL=http://127.0.0.1:{config.prefill.metrics_port}/health/ready" in asked["worker-cpu"]
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus.yaml").read_text())["scrape_configs"]
    ports = {job["job_name"]: job["dns_sd_configs"][0]["port"] for job in scraped}
    workers = {role: getattr(config, role).metrics_port for role in ("prefill", "decode")}
    assert ports == {"router": config.router.port, **workers}


@pytest.mark.slow
def test_prometheus_takes_its_config(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool: apt-get install prometheus")
    done = subprocess.run(
        [promtool, "check", "config", ROOT / "deploy" / "prometheus.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _locked(image: str) -> dict[str, str]:
    """Package -> version."""
    lines = (ROOT / "deploy" / "requirements" / f"{image}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def _shipped_steps(target: str) -> list[str]:
    return [text for stage in lineage(target) for word, text in stage.instructions if word == "RUN"]


def _files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def _seconds(text: str) -> int:
    return int(text.removesuffix("s"))
