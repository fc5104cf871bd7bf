"""The certificate of this process: whether its three files fit together, and how long it is still good for."""

from __future__ import annotations

import time

from packlight.core.credentials import date_of, read_credentials
from packlight.core.errors import ConfigError
from packlight.doctor.base import Finding, Patient, missing, ok, unused, warning

_LAST_SHARE = 0.1
"""Of a certificate's life. Whoever renews certificates does so well before: cert-manager when a third is left."""


def check_tls(patient: Patient) -> Finding:
    """The key is the certificate's, `tls.ca` vouches for it, it is for `tls.name`, and it is valid, and for a while."""
    config = patient.config.tls
    if not patient.is_fleet:
        return unused("`serve` is one process")
    if not config.is_on:
        return unused("tls.ca, tls.cert and tls.key are not set: keep the fleet on a private network")
    try:
        credentials = read_credentials(config)
    except ConfigError as error:
        found, _, fix = error.message.partition(". ")
        return missing(found, fix or "see docs/operations.md, Certificates")
    until, life_s = date_of(credentials.valid_until), credentials.valid_until - credentials.valid_from
    found = f"{config.cert} is for {config.name}, by {config.ca}, valid until {until}"
    if credentials.valid_until - time.time() < _LAST_SHARE * life_s:
        return warning(f"{found}: nine tenths of its time are over", "renew it; no process has to be restarted")
    return ok(found)
