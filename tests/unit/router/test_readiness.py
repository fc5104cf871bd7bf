"""Why a router cannot serve, said so that one knows what to do."""

from __future__ import annotations

import pytest

from packlight.core.types import LocalPrefill, ModelSpec, Role, WorkerInfo, WorkerLoad
from packlight.models.fake_spec import fake_spec
from packlight.router.readiness import why_not_ready

SPEC: ModelSpec = fake_spec()


def worker(role: Role, **fields: object) -> WorkerInfo:
    facts = {"model": SPEC.name, "fingerprint": SPEC.fingerprint, "compatibility": "c1", **fields}
    return WorkerInfo(f"{role}-0", 1, role, "host:1", **facts)  # type: ignore[arg-type]


PREFILL, DECODE = worker(Role.PREFILL), worker(Role.DECODE)
OFFER = LocalPrefill("decode-0/prefill", 1000, 0.2, WorkerLoad())


@pytest.mark.parametrize(
    "workers",
    [
        (PREFILL, DECODE),
        (worker(Role.DECODE, local_prefill=OFFER),),
        (PREFILL, worker(Role.PREFILL, draining=True), DECODE),
    ],
    ids=["a pair", "one that prefills itself", "a pair and one that leaves"],
)
def test_ready(workers: tuple[WorkerInfo, ...]) -> None:
    assert why_not_ready(workers, SPEC) is None


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        ((), "no worker has reported"),
        ((DECODE,), "no prefill worker is up"),
        ((PREFILL,), "no decode worker is up"),
        ((PREFILL, worker(Role.DECODE, draining=True)), "no decode worker is up"),
        ((worker(Role.PREFILL, draining=True), worker(Role.DECODE, draining=True)), "all 2 workers are draining"),
        ((PREFILL, worker(Role.DECODE, compatibility="c2")), "(decode c2, prefill c1): give them one version"),
        (
            (worker(Role.PREFILL, model="other", fingerprint="f2"),),
            "the workers have other (f2): give all one model.path",
        ),
        ((PREFILL, worker(Role.DECODE, fingerprint="f2")), "no decode worker is up"),
    ],
)
def test_why_not(workers: tuple[WorkerInfo, ...], said: str) -> None:
    why = why_not_ready(workers, SPEC)
    assert why is not None
    assert said in why
