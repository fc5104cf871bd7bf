"""`packlight bench prefill`: its arithmetic, and that the report says what was measured, whatever that is."""

import argparse
import json

import pytest
import torch

from packlight.bench.micro import prefill
from packlight.bench.micro.measure.attention import Shape
from packlight.bench.micro.measure.prefill import num_flops
from packlight.core.errors import ConfigError


@pytest.fixture(autouse=True)
def _same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*arguments):
    parser = argparse.ArgumentParser()
    prefill.add_arguments(parser)
    return prefill.run(parser.parse_args([*arguments, "--threads", "1", "--rounds", "3", "--slice", "0"]))


def test_the_report_has_every_backend_at_every_context(capsys):
    assert (
        run("--context", "0,40", "--chunk", "24", "--dtype", "float32", "--backends", "reference,sdpa,cpu", "--json")
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert [entry["context"] for entry in report["contexts"]] == [0, 40]
    for entry in report["contexts"]:
        assert set(entry["backends"]) | set(entry["skipped"]) == {"reference", "sdpa", "cpu"}
        assert entry["backends"]["reference"]["speedup"] == {"median": 1, "min": 1, "max": 1}
        for figures in entry["backends"].values():
            flops = num_flops(Shape(30, 9, 3, 64), entry["context"], 24)
            assert figures["gflops"] == pytest.approx(flops / figures["layer_ms"] / 1e6)
            assert figures["max_error"] < 1e-5


def test_flops_count_what_is_seen():
    """Three queries behind two tokens see 3, 4 and 5 keys; two products of two flops per number."""
    assert num_flops(Shape(1, 6, 2, 10), context=2, chunk=3) == 4 * 6 * 10 * (3 + 4 + 5)


def test_flags_that_cannot_be_are_named():
    for flags in (["--chunk", "0"], ["--backends", "sdpa,fast"], ["--dtype", "int8"], ["--context", "some"]):
        with pytest.raises(ConfigError, match=flags[0]):
            run(*flags)
