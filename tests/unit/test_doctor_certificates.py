"""What the doctor finds of a process's certificate."""

from __future__ import annotations

from pathlib import Path

import pytest

from packlight.core.config_tree import build_config
from packlight.doctor.base import Level, Patient
from packlight.doctor.certificates import check_tls
from tests.support.certificates import Authority, authority, in_days


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return authority(tmp_path / "ours")


def patient(*settings: str, role: str = "decode") -> Patient:
    return Patient(role, build_config({}, list(settings)), {})


@pytest.mark.parametrize("role", ["router", "prefill", "decode"])
def test_a_good_certificate(ours: Authority, role: str) -> None:
    ours.issue(not_before=in_days(-60), not_after=in_days(30))
    found = check_tls(patient(*ours.settings, role=role))
    assert found.level is Level.OK
    assert f"is for packlight, by {ours.config.ca}, valid until {in_days(30):%Y-%m-%d}" in found.found


def test_a_certificate_that_nobody_renews(ours: Authority) -> None:
    ours.issue(not_before=in_days(-85), not_after=in_days(5))
    found = check_tls(patient(*ours.settings))
    assert found.level is Level.WARNING
    assert "nine tenths of its time are over" in found.found


def test_a_certificate_that_does_not_do(ours: Authority) -> None:
    ours.issue(not_before=in_days(-90), not_after=in_days(-1))
    found = check_tls(patient(*ours.settings))
    assert found.level is Level.MISSING
    assert found.found.endswith("certificate has expired")
    assert found.fix == "Issue it, or the CA, anew"


def test_without_tls_none_is_needed(ours: Authority) -> None:
    assert check_tls(patient()).level is Level.UNUSED
    assert check_tls(patient(*ours.settings, role="serve")).level is Level.UNUSED
