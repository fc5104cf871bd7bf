"""Why a router cannot serve, said so that one knows what to do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from packlight.core.types import ModelSpec
from packlight.core.workers import LocalPrefill, Role, WorkerInfo, WorkerLoad
from packlight.models.fake_spec import fake_spec
from packlight.router.readiness import serves, why_not_ready
from packlight.router.strangers import Strangers

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


# ── TLS ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

TLS_PREFILL, TLS_DECODE = worker(Role.PREFILL, speaks_tls=True), worker(Role.DECODE, speaks_tls=True)


@pytest.mark.parametrize("speaks_tls", [True, False])
def test_workers_that_speak_as_the_router_does_are_enough(speaks_tls: bool) -> None:
    everybody = (PREFILL, DECODE, TLS_PREFILL, TLS_DECODE)
    assert why_not_ready(everybody, SPEC, speaks_tls=speaks_tls) is None
    assert [serves(one, SPEC, speaks_tls=speaks_tls) for one in everybody] == [not speaks_tls] * 2 + [speaks_tls] * 2


@pytest.mark.parametrize(
    ("workers", "speaks_tls", "said"),
    [
        (
            (PREFILL, DECODE),
            True,
            "worker prefill-0 at host:1 speaks plaintext, this router TLS: "
            "give worker prefill-0 tls.ca, tls.cert and tls.key too (1 more like it)",
        ),
        (
            (TLS_PREFILL,),
            False,
            "worker prefill-0 at host:1 speaks TLS, this router plaintext: "
            "give the router tls.ca, tls.cert and tls.key too",
        ),
        (
            (TLS_PREFILL, DECODE),
            True,
            "no decode worker is up; worker decode-0 at host:1 speaks plaintext, this router TLS: "
            "give worker decode-0 tls.ca, tls.cert and tls.key too",
        ),
        ((TLS_PREFILL,), True, "no decode worker is up"),
    ],
)
def test_why_not_with_tls(workers: tuple[WorkerInfo, ...], speaks_tls: bool, said: str) -> None:
    assert why_not_ready(workers, SPEC, speaks_tls=speaks_tls) == said


def test_a_stranger_is_told_of_once_in_its_life(caplog: pytest.LogCaptureFixture) -> None:
    strangers = Strangers(speaks_tls=True)
    for _ in range(3):
        assert len(strangers.tell((PREFILL, TLS_DECODE))) == 1
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith("It gets no requests until then")
    strangers.tell((replace(PREFILL, generation=2), TLS_DECODE))
    assert len(caplog.messages) == 2
    assert strangers.tell((TLS_PREFILL, TLS_DECODE)) == []
