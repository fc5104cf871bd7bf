"""`packlight bench packing` at toy size: it measures every way, of pages that have the size they say."""

import pytest

from packlight.bench.micro.measure.packers import COPY, KEPT
from packlight.core.errors import ConfigError
from tests.unit.test_bench_micro import bench, report_of

TOY = ("--tokens", "1040", "--layers", "2", "--rounds", "2", "--slice", "0", "--threads", "1")


def test_every_way_is_held_against_a_copy(capsys):
    report = report_of(capsys, "packing", *TOY)
    assert set(report["kept"]) == set(KEPT)
    num_pages = {"everything": 65, "an eighth in runs": 9, "an eighth one by one": 9}
    for kept, entry in report["kept"].items():
        assert entry["bytes"] == 3 * num_pages[kept] * 2 * 16 * 64 * 2
        assert {COPY, "torch"} <= set(entry["ways"])
        assert all(cost["layer_ms"]["min"] > 0 for cost in entry["ways"].values())
        assert entry["ways"][COPY]["copies"] == {"median": 1.0, "min": 1.0, "max": 1.0}


def test_the_table_has_a_line_for_each(capsys):
    assert bench("packing", *TOY) == 0
    printed = capsys.readouterr().out
    assert all(kept in printed for kept in KEPT)
    assert "times a copy" in printed


@pytest.mark.parametrize(
    ("flags", "words"), [(("--dtype", "int8"), "--dtype: unknown 'int8'"), (("--tokens", "0"), "--tokens: got 0")]
)
def test_flags_that_cannot_be_are_refused(flags, words):
    with pytest.raises(ConfigError, match=words):
        bench("packing", *flags)
