"""Who may call a worker of a fleet with TLS, whom its router calls, and what a renewed certificate changes."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import trustme

from packlight.core.credentials import CredentialFiles, read_credentials
from packlight.core.workers import Role, WorkerInfo
from packlight.models.fake import fake_answer
from packlight.router.clients import GrpcDecodeClients
from packlight.wire.channel import Channels, Dialer, start_server
from packlight.wire.decode import decode_handler
from packlight.wire.security import channel_credentials
from tests.support.certificates import CA, Authority, authority
from tests.support.cluster import loopback
from tests.support.fake_pair import answer, fake_pair, make_request, until
from tests.support.waiting import eventually


class Echo(grpc.GenericRpcHandler):
    """Sends what it got, and once `go_on` is set, what it got again."""

    def __init__(self) -> None:
        self.go_on, self.num_calls = asyncio.Event(), 0

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        async def serve(request: bytes, context: grpc.aio.ServicerContext) -> None:
            self.num_calls += 1
            await context.write(request)
            await self.go_on.wait()
            await context.write(request)

        return grpc.unary_stream_rpc_method_handler(serve)


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return authority(tmp_path / "ours")


@asynccontextmanager
async def server(files: CredentialFiles | None) -> AsyncIterator[tuple[Echo, str]]:
    echo = Echo()
    echo.go_on.set()
    running, port = await start_server([echo], "127.0.0.1", 0, files)
    try:
        yield echo, f"127.0.0.1:{port}"
    finally:
        await running.stop(None)


async def ask(channel: grpc.aio.Channel) -> list[bytes]:
    async with asyncio.timeout(60):
        return [data async for data in channel.unary_stream("/echo/Echo")(b"hello")]


async def refusal(channel: grpc.aio.Channel) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(channel)
    await channel.close()
    return caught.value


def certificate_shown(address: str, files: CredentialFiles) -> bytes:
    """What a new connection gets to see, in DER."""
    context = ssl.create_default_context(cadata=files.current().ca.decode())
    host, _, port = address.partition(":")
    with (
        socket.create_connection((host, int(port))) as plain,
        context.wrap_socket(plain, server_hostname=files.name) as secure,
    ):
        return secure.getpeercert(binary_form=True) or b""


def first_certificate(files: CredentialFiles) -> bytes:
    return ssl.PEM_cert_to_DER_cert(files.current().certificate.decode())


# ── who may call ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_members_call_each_other(ours: Authority) -> None:
    files = CredentialFiles(ours.config)
    async with server(files) as (_, address):
        channel = Dialer(files).open(address)
        assert await ask(channel) == [b"hello", b"hello"]
        await channel.close()


async def test_a_certificate_of_another_ca_is_refused_by_both_ends(ours: Authority, tmp_path: Path) -> None:
    files, theirs = CredentialFiles(ours.config), authority(tmp_path / "theirs")
    async with server(files) as (echo, address):
        error = await refusal(Dialer(CredentialFiles(theirs.config)).open(address))
        assert (error.code(), "CERTIFICATE_VERIFY_FAILED" in error.details()) == (grpc.StatusCode.UNAVAILABLE, True)
        # One that trusts us, but is not trusted.
        stranger = replace(read_credentials(theirs.config), ca=files.current().ca)
        error = await refusal(dial(address, channel_credentials(stranger)))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert echo.num_calls == 0


async def test_a_client_without_a_certificate_is_refused(ours: Authority) -> None:
    files = CredentialFiles(ours.config)
    async with server(files) as (echo, address):
        error = await refusal(dial(address, grpc.ssl_channel_credentials(files.current().ca)))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert echo.num_calls == 0


async def test_a_certificate_for_something_else_is_refused_by_both_ends(ours: Authority, tmp_path: Path) -> None:
    """The CA of a whole cluster vouches for more than one fleet."""
    files, neighbour = CredentialFiles(ours.config), authority(tmp_path / "neighbour", ours.ca)
    neighbour.issue("database")
    theirs = CredentialFiles(neighbour.config.model_copy(update={"name": "database"}))
    async with server(files) as (echo, address):
        error = await refusal(dial(address, channel_credentials(theirs.current())))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert error.details() == "your certificate is not for 'packlight'"
        assert echo.num_calls == 0
    async with server(theirs) as (echo, address):
        error = await refusal(Dialer(files).open(address))
        assert "Hostname Verification Check failed" in error.details()
        assert echo.num_calls == 0


@pytest.mark.parametrize("has_tls", ["server", "client"])
async def test_plaintext_and_tls_do_not_mix(ours: Authority, has_tls: str) -> None:
    files = CredentialFiles(ours.config)
    async with server(files if has_tls == "server" else None) as (echo, address):
        error = await refusal(Dialer(files if has_tls == "client" else None).open(address))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert echo.num_calls == 0


def dial(address: str, credentials: grpc.ChannelCredentials) -> grpc.aio.Channel:
    """As `Dialer` does, with whatever credentials."""
    return grpc.aio.secure_channel(address, credentials, options=[("grpc.ssl_target_name_override", "packlight")])


# ── renewal ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_server_shows_its_new_certificate(ours: Authority) -> None:
    files = CredentialFiles(ours.config)
    async with server(files) as (_, address):
        before = await asyncio.to_thread(certificate_shown, address, files)
        assert before == first_certificate(files)
        ours.issue()
        after = await asyncio.to_thread(certificate_shown, address, files)
        assert after == first_certificate(files) != before


async def test_a_new_ca_needs_no_restart(ours: Authority, tmp_path: Path) -> None:
    """First both CAs are trusted, then certificates by the new one come, then the old CA goes."""
    files = CredentialFiles(ours.config)
    async with server(files) as (_, address):
        new = Authority(ours.folder, trustme.CA())
        new.issue()
        member = authority(tmp_path / "member", new.ca)
        channel = Dialer(CredentialFiles(member.config)).open(address)
        assert len(await ask(channel)) == 2
        await channel.close()
        ours.issue()  # a folder with one certificate of the old CA, which nobody trusts now
        (ours.folder / CA).write_bytes(new.ca.cert_pem.bytes())
        channel = Dialer(CredentialFiles(member.config)).open(address)
        assert len(await ask(channel)) == 2, "the server keeps what it has where new files do not fit"
        await channel.close()


async def test_calls_in_progress_outlive_the_certificate_they_began_with(ours: Authority) -> None:
    files = CredentialFiles(ours.config)
    channels = Channels(Dialer(files))
    async with server(files) as (echo, address):
        echo.go_on.clear()
        old = channels.get(address)
        assert channels.get(address) is old
        answer = aiter(old.unary_stream("/echo/Echo")(b"hello"))
        assert await anext(answer) == b"hello"
        ours.issue()
        new = channels.get(address)
        assert new is not old
        echo.go_on.set()
        assert [data async for data in answer] == [b"hello"]
        assert await ask(new) == [b"hello", b"hello"]
        await eventually(lambda: is_closed(old))
        await channels.close()


async def test_channels_close_what_is_retired(ours: Authority) -> None:
    files = CredentialFiles(ours.config)
    channels = Channels(Dialer(files))
    async with server(files) as (echo, address):
        echo.go_on.clear()
        old = channels.get(address)
        answer = aiter(old.unary_stream("/echo/Echo")(b"hello"))
        assert await anext(answer) == b"hello"
        ours.issue()
        new = channels.get(address)
        await channels.close()
        assert is_closed(old)
        assert is_closed(new)


def is_closed(channel: grpc.aio.Channel) -> bool:
    """It takes no calls."""
    try:
        channel.unary_stream("/echo/Echo")(b"").cancel()
    except grpc.aio.UsageError:
        return True
    return False


async def test_a_routers_answers_in_progress_outlive_the_certificate_they_began_with(ours: Authority) -> None:
    files = CredentialFiles(ours.config)
    clients = GrpcDecodeClients(Dialer(files))
    async with fake_pair() as pair, loopback(decode_handler(pair.decode), files) as (decode, _):
        worker = WorkerInfo("decode-0", 1, Role.DECODE, decode.address, "m", "f", "c", speaks_tls=True)
        before = clients.get(worker)
        assert clients.get(worker) is before
        pair.decode_gate.is_open = False
        old = asyncio.create_task(answer(before, make_request([1, 2, 3], 20, request_id="old")))
        await until(lambda: pair.decode.num_unfinished == 1)
        ours.issue()
        after = clients.get(worker)
        assert after is not before
        assert clients.get(worker) is after
        assert len(clients._retired) == 1
        pair.decode_gate.let_all()
        tokens = await answer(after, make_request([1, 2, 3], 20, request_id="new"))
        assert tokens == await old == fake_answer([1, 2, 3], 20)
        assert clients.get(worker) is after
        assert clients._retired == []
        await eventually(lambda: not clients._closing)
        await clients.close()
