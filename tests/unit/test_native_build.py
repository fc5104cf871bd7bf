"""Building, keeping and finding the kernels; and what becomes of a server that cannot have them."""

import ctypes
import logging
import os
import subprocess
import sys

import pytest

from packlight.attention.registry import AUTO, NATIVE
from packlight.attention.sdpa import SdpaAttention
from packlight.core.errors import ConfigError
from packlight.engine.build import build_attention
from packlight.native import compile as native_compile
from packlight.native.compile import NativeUnavailable, build, library_path
from packlight.native.library import open_library, status
from packlight.native.stream import stream_read
from packlight.native.variants import VARIANTS, cpu_flags, supported

PORTABLE = VARIANTS[-1]


@pytest.fixture
def small_sources(tmp_path, monkeypatch):
    """One source, which compiles at once."""
    sources = tmp_path / "src"
    sources.mkdir()
    for name in ("packlight.h", "stream.cpp"):
        (sources / name).write_bytes((native_compile.SOURCES / name).read_bytes())
    monkeypatch.setattr(native_compile, "SOURCES", sources)
    return sources


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(native_compile, "COMPILERS", ("no-such-compiler",))


@pytest.fixture
def empty_home(tmp_path, monkeypatch):
    """Nothing was compiled before."""
    for defaults in (build.__kwdefaults__, open_library.__kwdefaults__, status.__kwdefaults__):
        monkeypatch.setitem(defaults, "cache", tmp_path / "cache")


def test_the_best_variant_is_the_one_with_the_most_instructions():
    assert [variant.name for variant in supported(frozenset())] == ["portable"]
    assert supported(frozenset(VARIANTS[0].cpu_flags)) == VARIANTS
    assert [variant.name for variant in supported(frozenset(VARIANTS[2].cpu_flags))] == ["avx512", "avx2", "portable"]


def test_flags_are_read_as_the_system_writes_them(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags\t\t: fpu avx2 fma\n")
    assert cpu_flags(cpuinfo) == {"fpu", "avx2", "fma"}
    assert cpu_flags(tmp_path / "absent") == frozenset()


def test_a_library_is_built_once_and_works(small_sources, tmp_path):
    lines = []
    first = build(PORTABLE, cache=tmp_path, on_progress=lines.append)
    assert build(PORTABLE, cache=tmp_path, on_progress=lines.append) == first
    assert len(lines) == 1
    words = memoryview(bytearray(8 * 64)).cast("Q")
    words[3], words[60] = 5, 7
    library = open_library(PORTABLE, cache=tmp_path)
    address = ctypes.addressof(ctypes.c_char.from_buffer(words))
    assert stream_read(library, address, 8 * 64, num_threads=2) == 12


def test_a_changed_source_is_built_anew(small_sources, tmp_path):
    before = library_path(PORTABLE, "c++", tmp_path)
    (small_sources / "packlight.h").write_text((small_sources / "packlight.h").read_text() + "// changed\n")
    assert library_path(PORTABLE, "c++", tmp_path) != before


def test_without_a_compiler_one_that_was_made_before_is_found(small_sources, tmp_path, monkeypatch):
    made = build(PORTABLE, cache=tmp_path)
    monkeypatch.setattr(native_compile, "COMPILERS", ("no-such-compiler",))
    assert build(PORTABLE, cache=tmp_path) == made
    monkeypatch.setattr(native_compile, "PREBUILT", tmp_path)
    assert build(PORTABLE, cache=tmp_path / "elsewhere") == made


def test_what_is_missing_is_named(small_sources, tmp_path, no_compiler):
    with pytest.raises(NativeUnavailable, match=r"no C\+\+ compiler .* install one"):
        build(PORTABLE, cache=tmp_path)


def test_a_compiler_that_fails_is_quoted(small_sources, tmp_path):
    (small_sources / "stream.cpp").write_text('#error "not today"\n')
    with pytest.raises(NativeUnavailable, match="not today"):
        build(PORTABLE, cache=tmp_path)
    assert not list(tmp_path.glob("*.so"))


def test_a_cache_that_cannot_be_written_is_named(small_sources, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NativeUnavailable, match="cannot hold the compiled kernels"):
        build(PORTABLE, cache=tmp_path / "file")


def test_status_compiles_nothing(tmp_path, no_compiler):
    found = status(cache=tmp_path)
    assert found.path is None
    assert found.compiler is None
    assert "no-such-compiler" in found.reason


def test_auto_does_without_the_kernels_and_says_so(empty_home, no_compiler, caplog):
    with caplog.at_level(logging.WARNING):
        assert isinstance(build_attention(AUTO, "cpu"), SdpaAttention)
    [record] = caplog.records
    assert "no C++ compiler" in record.getMessage()


def test_asked_for_by_name_they_are_required(empty_home, no_compiler):
    with pytest.raises(NativeUnavailable):
        build_attention(NATIVE, "cpu")


def test_auto_is_torch_on_a_gpu_and_native_cannot_be_had_there():
    assert isinstance(build_attention(AUTO, "cuda"), SdpaAttention)
    with pytest.raises(ConfigError, match="computes on CPUs"):
        build_attention(NATIVE, "cuda:1")


def test_an_unknown_backend_is_answered_with_those_there_are():
    with pytest.raises(ConfigError, match="choose one of auto, reference, cpu, sdpa"):
        build_attention("fast", "cpu")


def test_the_command_says_what_is_missing(tmp_path):
    environ = {**os.environ, "PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "packlight.native"], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "no native kernels: no C++ compiler" in done.stderr
