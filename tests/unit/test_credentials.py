"""Whether three files make a member of a fleet, and that the process follows them when they change."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from packlight.core.config_tree import build_config
from packlight.core.credentials import CredentialFiles, open_credentials, read_credentials
from packlight.core.errors import ConfigError
from tests.support.certificates import CA, CERTIFICATE, KEY, Authority, authority, in_days, replace


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return authority(tmp_path / "ours")


def test_three_files_that_fit(ours: Authority) -> None:
    ours.issue(not_before=in_days(-1), not_after=in_days(30))
    credentials = read_credentials(ours.config)
    assert credentials.ca == (ours.folder / CA).read_bytes()
    assert credentials.certificate == (ours.folder / CERTIFICATE).read_bytes()
    assert credentials.key == (ours.folder / KEY).read_bytes()
    assert (credentials.valid_until - credentials.valid_from) / 86400 == pytest.approx(31, abs=0.001)
    assert credentials.key.decode() not in repr(credentials)


@pytest.mark.parametrize("kind", trustme.KeyType)
def test_keys_that_are_taken(ours: Authority, kind: trustme.KeyType) -> None:
    ours.write(ours.ca.issue_cert("packlight", key_type=kind))
    read_credentials(ours.config)


def test_a_certificate_may_have_other_names_too(ours: Authority) -> None:
    ours.issue("router.example", "packlight")
    read_credentials(ours.config)


def test_an_intermediate_ca_stands_behind_the_certificate(ours: Authority) -> None:
    intermediate = ours.ca.create_child_ca()
    ours.write(intermediate.issue_cert("packlight"))
    read_credentials(ours.config)
    ours.write(leaf_alone(intermediate))
    with pytest.raises(ConfigError, match=r"Give tls\.ca the CA that issued it, and tls\.cert what is between"):
        read_credentials(ours.config)


def leaf_alone(ca: trustme.CA) -> trustme.LeafCert:
    whole = ca.issue_cert("packlight")
    return trustme.LeafCert(whole.private_key_pem.bytes(), whole.cert_chain_pems[0].bytes(), [])


def for_servers_only(ours: Authority) -> None:
    """A certificate that no client may show, made by hand."""
    key, now = ec.generate_private_key(ec.SECP256R1()), in_days(0)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "self")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(in_days(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("packlight")]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    for path in (CA, CERTIFICATE):
        replace(ours.folder / path, pem)
    with_key(ours, key)


def with_key(ours: Authority, key: PrivateKeyTypes) -> None:
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    replace(ours.folder / KEY, key.private_bytes(*plain))


def encrypted(ours: Authority) -> None:
    key = serialization.load_pem_private_key((ours.folder / KEY).read_bytes(), None)
    secret = serialization.BestAvailableEncryption(b"secret")
    text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret)
    replace(ours.folder / KEY, text)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda ours: (ours.folder / CA).unlink(), r"tls\.ca .*/ca\.crt: No such file or directory"),
        (lambda ours: (ours.folder / KEY).unlink(), r"tls\.key .*/tls\.key: No such file or directory"),
        (lambda ours: replace(ours.folder / CERTIFICATE, b"hello"), r"tls\.cert .*: no begin certificate in it"),
        (lambda ours: replace(ours.folder / KEY, b"hello"), r"tls\.key .*: no private key in it"),
        (
            lambda ours: replace(ours.folder / CA, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
            r"tls\.ca .* cannot be used: .* PEM files are expected",
        ),
        (encrypted, r"tls\.key .*: it is encrypted"),
        (
            lambda ours: replace(ours.folder / KEY, b"-----BEGIN PRIVATE KEY-----\nA\n-----END PRIVATE KEY-----\n"),
            r"tls\.key .* cannot be used: .* PEM files are expected",
        ),
        (
            lambda ours: with_key(ours, ed25519.Ed25519PrivateKey.generate()),
            "it is an Ed25519 key, which gRPC",
        ),
        (
            lambda ours: with_key(ours, ec.generate_private_key(ec.SECP521R1())),
            "it is a P-521 key, which gRPC",
        ),
        (
            lambda ours: replace(ours.folder / KEY, ours.ca.issue_cert("packlight").private_key_pem.bytes()),
            r"tls\.key .*: it is not the key of tls\.cert",
        ),
        (
            lambda ours: replace(ours.folder / CA, trustme.CA().cert_pem.bytes()),
            r"tls\.cert .* is not accepted with tls\.ca .*: unable to get local issuer certificate\. Give tls\.ca",
        ),
        (lambda ours: ours.issue("elsewhere"), r"tls\.cert .*: it is not for 'packlight'. Issue one with this among"),
        (
            lambda ours: ours.issue(not_before=in_days(-2), not_after=in_days(-1)),
            r"certificate has expired\. Issue it, or the CA, anew",
        ),
        (lambda ours: ours.issue(not_before=in_days(1), not_after=in_days(2)), r"not yet valid\. Look at this machine"),
        (for_servers_only, "Its extended key usage must have serverAuth and clientAuth"),
    ],
)
def test_what_is_wrong_is_said_with_the_file(ours: Authority, spoil: Callable[[Authority], object], said: str) -> None:
    spoil(ours)
    with pytest.raises(ConfigError, match=said):
        read_credentials(ours.config)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("tls.ca=a",), r"without tls\.cert and tls\.key: set tls\.ca, tls\.cert and tls\.key, or none"),
        (("tls.cert=a", "tls.key=b"), r"without tls\.ca:"),
        (("tls.name=Not A Name",), r"tls\.name: "),
        (
            ("tls.ca=a", "tls.cert=b", "tls.key=c", "decode.transports=[nixl,process_group,grpc]"),
            r"decode\.transports names nixl and process_group, which TLS does not cover",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_config({}, list(settings))


def test_transports_in_the_clear_can_be_allowed() -> None:
    settings = [
        "tls.ca=a",
        "tls.cert=b",
        "tls.key=c",
        "decode.transports=[nixl,grpc]",
        "tls.allow_plain_transports=true",
    ]
    assert build_config({}, settings).tls.is_on
    assert not build_config({}, ["decode.transports=[nixl,grpc]"]).tls.is_on


# ── files that change ────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_tls_there_are_none() -> None:
    assert open_credentials(build_config({}).tls) is None


def test_the_same_files_are_the_same_object(ours: Authority) -> None:
    files = CredentialFiles(ours.config)
    assert files.current() is files.current()


def test_new_files_are_read(ours: Authority, caplog: pytest.LogCaptureFixture) -> None:
    files = CredentialFiles(ours.config)
    before = files.current()
    with caplog.at_level(logging.INFO):
        ours.issue(not_after=in_days(7))
        after = files.current()
    assert after is not before
    assert after.certificate == (ours.folder / CERTIFICATE).read_bytes()
    assert f"certificate renewed, valid until {in_days(7):%Y-%m-%d}" in caplog.text


def test_files_that_do_not_fit_change_nothing_until_they_do(ours: Authority, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever renews them replaces one after the other."""
    files = CredentialFiles(ours.config)
    before, renewed = files.current(), ours.ca.issue_cert("packlight")
    replace(ours.folder / CERTIFICATE, renewed.cert_chain_pems[0].bytes())
    assert files.current() is before
    assert files.current() is before
    (complaint,) = caplog.messages
    assert "is not the key of" in complaint
    assert "the certificate stays as it was, valid until" in complaint
    (ours.folder / KEY).unlink()
    assert files.current() is before
    replace(ours.folder / KEY, renewed.private_key_pem.bytes())
    assert files.current().key == renewed.private_key_pem.bytes()


def test_a_volume_that_kubernetes_turns_over(tmp_path: Path, ours: Authority) -> None:
    """The files are links into a folder that is a link itself: one rename changes all three."""
    volume, first, second = tmp_path / "volume", tmp_path / "first", tmp_path / "second"
    shutil.copytree(ours.folder, first)
    ours.issue()
    shutil.copytree(ours.folder, second)
    volume.mkdir()
    (volume / "..data").symlink_to(first)
    for name in (CA, CERTIFICATE, KEY):
        (volume / name).symlink_to(Path("..data") / name)
    files = CredentialFiles(Authority(volume, ours.ca).config)
    assert files.current().certificate == (first / CERTIFICATE).read_bytes()
    (volume / "..data.new").symlink_to(second)
    (volume / "..data.new").rename(volume / "..data")
    assert files.current().certificate == (second / CERTIFICATE).read_bytes()


def test_the_rehearsal_is_as_strict_as_a_fleet(ours: Authority) -> None:
    """A name in the subject only is no name: gRPC looks at alternative names."""
    leaf = ours.ca.issue_cert("elsewhere", common_name="packlight")
    ours.write(leaf)
    with pytest.raises(ConfigError, match="it is not for 'packlight'"):
        read_credentials(ours.config)
