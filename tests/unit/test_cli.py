"""The command: what it prints, how it ends, what it refuses and how it says so."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from packlight import __version__
from packlight.cli import load_config, main
from packlight.core.config import Config
from packlight.core.errors import ConfigError
from tests.support.cluster import PATIENCE_S, SMALL_POOLS, packlight, running_process

ROLES = ("serve", "router", "prefill", "decode")
PORT_OF = {"serve": "router.port", "router": "router.port", "prefill": "prefill.port", "decode": "decode.port"}


def flags(*settings: str) -> list[str]:
    return [flag for setting in settings for flag in ("--set", setting)]


# ── what is printed ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_config_prints_yaml_that_loads_back(tmp_path, capsys):
    settings = ["router.port=8123", "kv.recipe=snapkv", "kv.budget=256", "decode.transports=[grpc]", "model.name=null"]
    assert main(["config", *flags(*settings)]) == 0
    printed = capsys.readouterr().out
    file = tmp_path / "config.yaml"
    file.write_text(printed)
    config = load_config(str(file), [])
    assert config == load_config(None, settings)
    assert (config.router.port, config.kv.budget, config.decode.transports) == (8123, 256, ["grpc"])
    assert list(yaml.safe_load(printed)) == list(Config.model_fields)


def test_a_file_and_flags_on_top_of_it(tmp_path):
    file = tmp_path / "fleet.yaml"
    file.write_text("router: {port: 9000, host: 0.0.0.0}\nlog_level: debug\n")
    config = load_config(str(file), ["router.port=9001"])
    assert (config.router.port, config.router.host, config.log_level) == (9001, "0.0.0.0", "debug")


def test_an_empty_file_is_all_defaults(tmp_path):
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing\n")
    assert load_config(str(file), []) == Config()


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version(flag, capsys):
    with pytest.raises(SystemExit) as ended:
        main([flag])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert __version__ in printed if flag == "--version" else all(role in printed for role in ROLES)


@pytest.mark.parametrize("arguments", [[], ["fly"], ["serve", "--set"], ["serve", "--port", "1"]])
def test_a_wrong_command_line_ends_with_2_and_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: packlight" in capsys.readouterr().err


# ── what is refused: exit code 2, and one line that says where and what to do ────────────────────────────────────────


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("router.port=http", ["router.port", "'http'"]),
        ("router.port=70000", ["router.port", "65535", "'70000'"]),
        ("router.prot=1", ["router.prot", "no such setting, did you mean router.port?", "docs/configuration.md"]),
        ("prefil.port=1", ["prefil: no such setting, did you mean prefill?"]),
        ("router.max_in_flight=1", ["router.max_in_flight: no such setting, did you mean router.max_inflight?"]),
        ("decode.transports=[]", ["decode.transports: ", "at least 1 item"]),
        ("decode.transports=grpc", ["decode.transports: a list is expected, such as [a, b], got 'grpc'"]),
        ("decode.graphs.batch_sizes=[0]", ["decode.graphs.batch_sizes.0: input should be greater than 0", "'0'"]),
        ("router.drain_s=inf", ["router.drain_s: input should be a finite number"]),
        ("fleet.heartbeat_s=5", ["fleet.heartbeat_s: got 5, must be less than fleet.ttl_s, which is 5"]),
        ("nonsense=1", ["nonsense", "no such setting"]),
        ("router.port", ["--set router.port", "path=value", "--set router.port=8080"]),
        ("=1", ["--set =1", "path=value"]),
        ("model.dtype=int3", ["model.dtype", "bfloat16", "'int3'"]),
        ("router.port.x=1", ["router.port"]),
        ("prefill.threads=0", ["prefill.threads", "1", "'0'"]),
    ],
)
def test_wrong_settings(setting, words, capsys):
    assert main(["serve", "--set", setting]) == 2
    error = capsys.readouterr().err
    assert error.startswith("packlight serve: ")
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["No such file"]),
        ("router: [", ["not valid YAML", "line 1"]),
        ("- router", ["mapping", "list"]),
        ("router: 5", ["router", "5"]),
        ("router:\n  # port: 8000\n", ["router: a section of settings is expected; give it some, or leave it out"]),
        ("router: {port: [1, 2]}", ["router.port", "[1, 2]"]),
        ("router: {port: 1}\nkv: {}\nrouter: {port: 2}\n", ["router is there twice", "line 3"]),
        (b"\x80abc", ["not valid YAML"]),
    ],
)
def test_wrong_files(content, words, tmp_path, capsys):
    file = tmp_path / "packlight.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["router", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert str(file) in error or "router" in error


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(ConfigError, match="directory"):
        load_config(str(tmp_path), [])


@pytest.fixture
def refusal(capsys):
    """Run a role that cannot start, in this process: the last line it prints."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def last_line(role: str, *settings: str) -> str:
        assert main([role, *flags("model.path=fake", *SMALL_POOLS, *settings)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    yield last_line
    root.handlers[:], root.level = handlers, level


@pytest.mark.parametrize("role", ROLES)
def test_a_model_that_is_not_there(role, refusal):
    line = refusal(role, "model.path=/no/such/model", f"{PORT_OF[role]}=0")
    assert line.startswith(f"packlight {role}: model.path '/no/such/model': no such folder or file. Give ")


@pytest.mark.parametrize("role", ["serve", "prefill", "decode"])
@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there(role, device, refusal):
    line = refusal(role, f"model.device={device}")
    assert line.startswith(f"packlight {role}: model.device '{device}': ")
    assert "`packlight doctor`" in line


@pytest.mark.parametrize("role", ROLES)
def test_a_port_that_is_taken(role, refusal):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal(role, f"{PORT_OF[role]}={port}")
    assert line.startswith(f"packlight {role}: cannot listen on 127.0.0.1:{port}")
    assert f"--set {PORT_OF[role]}=" in line


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_metrics_port_that_is_taken(role, refusal):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal(role, f"{role}.metrics_port={port}")
    assert f"127.0.0.1:{port}" in line
    assert f"--set {role}.metrics_port=" in line


@pytest.mark.parametrize("role", ["router", "prefill", "decode"])
def test_a_fleet_in_redis_needs_an_address(role, refusal, monkeypatch):
    monkeypatch.delenv("REDIS_URL", raising=False)
    assert "REDIS_URL" in refusal(role, "fleet.backend=redis")


def test_an_unknown_backend_lists_the_known_ones(refusal):
    assert "memory, redis" in refusal("router", "index.backend=etcd")


def test_the_process_ends_with_2_and_no_traceback():
    command = [sys.executable, "-m", "packlight", "prefill", *flags("model.path=/no/such/model")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("packlight prefill: model.path")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_at_once_what_is_still_starting(number, code, tmp_path):
    """It reads a file in which nothing comes, as it would read weights for minutes."""
    pipe = tmp_path / "ca.pem"
    os.mkfifo(pipe)
    with running_process(packlight("router", f"tls.ca={pipe}", "tls.cert=cert.pem", "tls.key=key.pem")) as process:
        with pipe.open("wb"):  # returns when it is being read
            process.popen.send_signal(number)
            assert process.popen.wait(PATIENCE_S) == code
        assert process.output == ""


# ── what is imported ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "statement",
    [
        "import packlight.cli",
        "import packlight.router.server",
        "import packlight.cli; packlight.cli.main(['config'])",
        "import packlight.prefix.redis_index, packlight.fleet.redis_fleet, packlight.wire.decode",
    ],
)
def test_the_control_plane_starts_without_torch(statement):
    """By what is loaded in the end, however indirectly."""
    check = "import sys; print('loaded:', [n for n in ('torch', 'transformers') if n in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", f"{statement}\n{check}"], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "loaded: []"


def test_the_package_has_its_entry_point():
    assert "packlight.cli:main" in (Path(__file__).parents[2] / "pyproject.toml").read_text()
