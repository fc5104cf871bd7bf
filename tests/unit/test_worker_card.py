from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packlight.core.workers import Role, WorkerInfo, WorkerLoad
from packlight.fleet.card import decode_worker, encode_worker

NUMBERS = st.floats(0, 1e12)
COUNTS = st.integers(0, 2**62)
LOADS = st.builds(WorkerLoad, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, NUMBERS, NUMBERS, NUMBERS)
WORKERS = st.builds(
    WorkerInfo,
    st.text(),
    COUNTS,
    st.sampled_from(Role),
    *[st.text()] * 4,
    COUNTS,
    COUNTS,
    st.booleans(),
    LOADS,
    speaks_tls=st.booleans(),
)
WORKER = WorkerInfo("p0", 1, Role.PREFILL, "10.0.0.1:7000", "smol", "fp", "compat")


@given(WORKERS)
def test_a_card_reads_as_it_was_written(worker: WorkerInfo) -> None:
    assert decode_worker(encode_worker(worker).encode()) == worker


def edited(**changes: object) -> str:
    return json.dumps({**json.loads(encode_worker(WORKER)), **changes})


def test_fields_of_a_later_release_are_ignored() -> None:
    load = {"num_running": 2, "color": "green"}
    found = decode_worker(edited(shoe_size=43, load=load))
    assert found is not None
    assert found.load == WorkerLoad(num_running=2)


def test_fields_an_earlier_release_did_not_write_have_their_defaults() -> None:
    card = json.loads(encode_worker(WORKER))
    del card["load"], card["draining"]
    assert decode_worker(json.dumps(card)) == WORKER


@pytest.mark.parametrize(
    "text", [edited(v=2), edited(role="cook"), edited(load=3), '{"v": 1}', "[]", "not json", b"\xff\xfe"]
)
def test_what_cannot_be_read_is_no_worker(text: str | bytes) -> None:
    assert decode_worker(text) is None
