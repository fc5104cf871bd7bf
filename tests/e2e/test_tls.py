"""Real processes that speak TLS to each other: who is answered, who is not, and what happens when certificates change.

The tests build on one another: the last ones leave a fleet of another CA."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import grpc
import openai
import pytest
import trustme

from packlight.core.credentials import CredentialFiles
from packlight.core.errors import WorkerLost
from packlight.core.shipping import PrefillEvent, Shipped
from packlight.core.types import PackSpec, PrefillRequest, SamplingParams
from packlight.wire.channel import Dialer
from packlight.wire.prefill import GrpcPrefillClient
from tests.e2e.helpers import Stream, ask, client_of, expected, health_of
from tests.support.certificates import CA, CERTIFICATE, KEY, Authority, authority, in_days, replace
from tests.support.cluster import (
    PATIENCE_S,
    PATIENT,
    SMALL_POOLS,
    RunningCluster,
    eventually,
    packlight,
    running_cluster,
    running_process,
)

pytestmark = pytest.mark.e2e

WORKERS = ("prefill-0", "decode-0")
PROMPT = tuple(range(1, 33))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def cluster(ours: Authority) -> Iterator[RunningCluster]:
    settings = ("model.path=fake", *SMALL_POOLS, *PATIENT, "decode.transports=[grpc]", *ours.settings)
    flags = [flag for setting in settings for flag in ("--set", setting)]
    with running_cluster("--prefill", "1", "--decode", "1", *flags) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: RunningCluster) -> Iterator[openai.OpenAI]:
    with client_of(cluster.url) as client:
        yield client


def address_of(cluster: RunningCluster, name: str) -> str:
    return cluster.process.wait_for(rf"worker {name} is ready on (\S+:\d+) with TLS")[1]


def certificate_of(cluster: RunningCluster, name: str) -> str:
    """What the worker shows whoever comes now."""
    host, _, port = address_of(cluster, name).partition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection((host, int(port))) as plain, context.wrap_socket(plain) as secure:
        return ssl.DER_cert_to_PEM_cert(secure.getpeercert(binary_form=True) or b"")


def strangers(cluster: RunningCluster) -> list[str]:
    """Whom the router sees and cannot call, in its words."""
    return list(health_of(cluster.url)["details"].get("strangers", []))


def issued(ours: Authority) -> str:
    return (ours.folder / CERTIFICATE).read_text()


async def shipment_of(channel: grpc.aio.Channel) -> list[PrefillEvent]:
    """What a prefill worker sends whoever asks it on `channel`. Raises WorkerLost if that is nothing."""
    request = PrefillRequest(
        request_id="direct",
        token_ids=PROMPT,
        num_prompt_tokens=len(PROMPT),
        sampling=SamplingParams(temperature=0.0),
        pack=PackSpec(),
        deadline_s=PATIENCE_S,
    )
    async with channel, aclosing(GrpcPrefillClient(channel, "prefill-0").prefill(request)) as events:
        return [event async for event in events]


def test_it_answers(cluster: RunningCluster, client: openai.OpenAI) -> None:
    tokens, usage = ask(client, "Is anybody listening?", 12)
    assert tokens == expected("Is anybody listening?", 12)
    assert usage.kv["shipped_bytes"] > 0
    assert strangers(cluster) == []


async def test_a_member_may_ask(cluster: RunningCluster, ours: Authority) -> None:
    channel = Dialer(CredentialFiles(ours.config)).open(address_of(cluster, "prefill-0"))
    assert isinstance((await shipment_of(channel))[-1], Shipped)


async def test_nobody_else_may(cluster: RunningCluster, ours: Authority, tmp_path: Path) -> None:
    address, theirs = address_of(cluster, "prefill-0"), authority(tmp_path / "theirs")
    neighbour = authority(tmp_path / "neighbour", ours.ca)
    neighbour.issue("database")
    name = [("grpc.ssl_target_name_override", "packlight")]
    certificates = {who: (who.folder / CERTIFICATE).read_bytes() for who in (theirs, neighbour)}
    keys = {who: (who.folder / KEY).read_bytes() for who in (theirs, neighbour)}
    ca = (ours.folder / CA).read_bytes()
    strangers = {
        "in plaintext": Dialer().open(address),
        "without a certificate": grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca), name),
        "of another CA": grpc.aio.secure_channel(
            address, grpc.ssl_channel_credentials(ca, keys[theirs], certificates[theirs]), name
        ),
        "for something else": grpc.aio.secure_channel(
            address, grpc.ssl_channel_credentials(ca, keys[neighbour], certificates[neighbour]), name
        ),
    }
    for who, channel in strangers.items():
        with pytest.raises(WorkerLost):
            pytest.fail(f"{who}: {await shipment_of(channel)}")


def test_a_worker_in_plaintext_gets_no_requests_and_is_told_of(cluster: RunningCluster, client: openai.OpenAI) -> None:
    settings = ("model.path=fake", *SMALL_POOLS, *PATIENT, "fleet.backend=redis", "decode.worker_id=odd")
    with running_process(packlight("decode", *settings), {"REDIS_URL": cluster.redis_url}) as process:
        address = process.wait_for(r"worker odd is ready on (\S+:\d+)")[1]
        seen: list[str] = []
        eventually(lambda: seen.extend(strangers(cluster)) or seen, what="the router does not see it")
        assert seen == [
            f"worker odd at {address} speaks plaintext, this router TLS: "
            "give worker odd tls.ca, tls.cert and tls.key too"
        ]
        cluster.process.wait_for(r"worker odd at \S+ speaks plaintext, this router TLS")
        for number in range(4):
            assert ask(client, f"question {number}")[0] == expected(f"question {number}", 8)
        process.end()


def test_a_renewed_certificate_is_shown_and_answers_go_on(
    cluster: RunningCluster, client: openai.OpenAI, ours: Authority
) -> None:
    stream, before = Stream(client, "a long answer", 200), issued(ours)
    stream.read(3)
    until = in_days(7)
    ours.issue(not_after=until)
    assert issued(ours) != before
    for name in ("router", *WORKERS):
        expiry = f"packlight_{name.partition('-')[0]}_certificate_expiry_timestamp_seconds"
        assert cluster.metrics(name)[expiry] == int(until.timestamp())
    for name in WORKERS:
        assert certificate_of(cluster, name) == issued(ours)
    assert ask(client, "And now?")[0] == expected("And now?", 8)
    assert stream.read_all() == expected("a long answer", 200)


def test_a_new_ca_takes_over_without_a_restart(cluster: RunningCluster, client: openai.OpenAI, ours: Authority) -> None:
    """Both are trusted, then certificates are of the new one, then only that is trusted."""
    pids, new = cluster.pids, Authority(ours.folder, trustme.CA())
    both = ours.ca.cert_pem.bytes() + new.ca.cert_pem.bytes()
    replace(ours.folder / CA, both)
    assert ask(client, "one")[0] == expected("one", 8)
    new.issue(ca=both)
    assert ask(client, "two")[0] == expected("two", 8)
    replace(ours.folder / CA, new.ca.cert_pem.bytes())
    assert ask(client, "three")[0] == expected("three", 8)
    for name in WORKERS:
        assert certificate_of(cluster, name) == issued(ours)
    assert cluster.pids == pids
