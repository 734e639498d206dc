"""handshake(): how it fails and what is said of it; and what its caller may do."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import socket
import ssl

import pytest
import trustme
from OpenSSL import SSL
from tests.kit.engine_rig import Kind, reset_on_close
from tests.kit.handshake_rig import Engine, Shake, every_role, held, stuff
from tests.kit.tls_rig import (
    ALPN,
    HOST,
    alpn_context,
    authority,
    leaf,
    our_context,
    our_end,
    their_context,
)

from nodepass.errors import EngineClosed, EngineError
from nodepass.tls import _openssl

# --- failures ------------------------------------------------------------------------------------


@every_role
@pytest.mark.parametrize("size", [1, 5, 6, 100, 3000])
async def test_garbage(engine: Engine, is_server: bool, size: int) -> None:
    """Bytes that are no TLS: refused at once, or when the peer gives up."""
    async with engine() as rig:
        for seed in range(8):
            shake = Shake(rig, is_server)
            with held(shake):
                shake.start()
                await rig.send(shake.end.sock, random.Random(seed).randbytes(size))
                shake.end.sock.shutdown(socket.SHUT_WR)
                ended = await shake.ended()
                assert ended.code in {errno.EBADMSG, errno.ENODATA}
                if ended.code == errno.EBADMSG:
                    assert _openssl.describe(ended.detail)
                else:
                    assert (ended.detail, size < 100) == (0, True)


async def test_plain_http(engine: Engine) -> None:
    async with engine() as rig:
        shake = Shake(rig, True)
        with held(shake):
            shake.start()
            await rig.send(shake.end.sock, b"GET / HTTP/1.1\r\nHost: tunnel\r\n\r\n")
            ended = await shake.fails(errno.EBADMSG)
            assert _openssl.describe(ended.detail) == "http request"
            statistics = rig.engine.statistics()
            assert (statistics.handshakes, statistics.handshakes_failed) == (1, 1)


async def test_a_server_that_speaks_no_tls(engine: Engine) -> None:
    async with engine() as rig:
        shake = Shake(rig, False)
        with held(shake):
            shake.start()
            await rig.send(shake.end.sock, b"220 mail.example.org ESMTP\r\n")
            ended = await shake.fails(errno.EBADMSG)
            assert _openssl.describe(ended.detail) == "wrong version number"


@every_role
@pytest.mark.parametrize("kept", [0, 1, 3, 6, 100])
async def test_the_peer_closes_early(engine: Engine, is_server: bool, kept: int) -> None:
    async with engine() as rig:
        shake = Shake(rig, is_server)
        with held(shake):
            shake.start()
            if not is_server:
                shake.end.incoming.write(await rig.loop.sock_recv(shake.end.sock, 1 << 16))
            with contextlib.suppress(ssl.SSLWantReadError):
                shake.end.object.do_handshake()
            await rig.send(shake.end.sock, shake.end.outgoing.read()[:kept])
            shake.end.sock.close()
            ended = await shake.fails(errno.ENODATA)
            assert ended.detail == 0


@every_role
async def test_the_peer_resets(engine: Engine, is_server: bool) -> None:
    async with engine() as rig:
        shake = Shake(rig, is_server)
        with held(shake):
            shake.start()
            reset_on_close(shake.end.sock)
            shake.end.sock.close()
            ended = await shake.ended()
            assert ended.reason == rig.kind.module.REASON_RESET
            assert ended.code in {errno.ECONNRESET, errno.EPIPE}


async def test_the_peer_resets_while_our_words_wait(engine: Engine) -> None:
    async with engine() as rig:
        shake = Shake(rig, False)
        with held(shake):
            await stuff(shake.inner)
            shake.start()
            await asyncio.sleep(0.02)
            reset_on_close(shake.end.sock)
            shake.end.sock.close()
            ended = await shake.ended()
            assert ended.reason == rig.kind.module.REASON_RESET
            assert ended.code in {errno.ECONNRESET, errno.EPIPE}


@every_role
async def test_the_peer_says_close_notify_in_the_middle(engine: Engine, is_server: bool) -> None:
    async with engine() as rig:
        shake = Shake(rig, is_server)
        with held(shake):
            shake.start()
            await rig.send(shake.end.sock, b"\x15\x03\x03\x00\x02\x01\x00")
            # As the very first word it is no TLS at all.
            await shake.fails(errno.EBADMSG if is_server else errno.ENODATA)


async def test_the_peer_does_not_trust_us(engine: Engine) -> None:
    """Its alert tells why."""
    async with engine() as rig:
        shake = Shake(rig, True, theirs=their_context(False, verifies=True))
        with held(shake):
            shake.start()
            with pytest.raises(ssl.SSLCertVerificationError):
                await shake.end.shake()
            shake.end.sock.close()
            ended = await shake.fails(errno.EBADMSG)
            assert "unknown ca" in _openssl.describe(ended.detail)


async def test_we_do_not_trust_the_peer(engine: Engine) -> None:
    """Our alert reaches the peer, and the Connection tells what was wrong."""
    context = SSL.Context(SSL.TLS_METHOD)
    trustme.CA().configure_trust(context)
    context.set_verify(SSL.VERIFY_PEER)
    async with engine() as rig:
        shake = Shake(rig, False, ours=context)
        with held(shake):
            shake.start()
            with pytest.raises(ssl.SSLError, match=r"(?i)unknown.ca"):
                await shake.end.shake()
            ended = await shake.fails(errno.EBADMSG)
            assert _openssl.describe(ended.detail) == "certificate verify failed"
            failure = _openssl.verify_failure(shake.connection)
            assert failure is not None
            assert "issuer" in failure[1]


@pytest.mark.parametrize("host", [HOST, "127.0.0.1", "other.test", "127.0.0.2"])
async def test_the_name_in_the_certificate(engine: Engine, host: str) -> None:
    context = SSL.Context(SSL.TLS_METHOD)
    authority().configure_trust(context)
    context.set_verify(SSL.VERIFY_PEER)
    async with engine() as rig:
        shake = Shake(rig, False, ours=context)
        _openssl.require_name(shake.connection, host)
        with held(shake):
            shake.start()
            if host in {HOST, "127.0.0.1"}:
                await shake.both()
                assert _openssl.verify_failure(shake.connection) is None
                return
            with pytest.raises(ssl.SSLError, match=r"(?i)bad.certificate"):
                await shake.end.shake()
            ended = await shake.fails(errno.EBADMSG)
            assert _openssl.describe(ended.detail) == "certificate verify failed"
            failure = _openssl.verify_failure(shake.connection)
            assert failure is not None
            assert "mismatch" in failure[1]


async def test_a_server_too_old_for_us(engine: Engine) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    leaf().configure_cert(old)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    async with engine() as rig:
        shake = Shake(rig, False, theirs=old)
        with held(shake):
            shake.start()
            with pytest.raises(ssl.SSLError, match=r"(?i)unsupported.protocol"):
                await shake.end.shake()
            ended = await shake.fails(errno.EBADMSG)
            assert "protocol version" in _openssl.describe(ended.detail)


def offering(*protocols: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context


@pytest.mark.parametrize(
    "offered", [["nodepass/2"], ["h2", "nodepass/2"], ["nodepass/2", "x" * 255]]
)
async def test_alpn_is_chosen(engine: Engine, kind: Kind, offered: list[str]) -> None:
    async with engine() as rig:
        shake = Shake(rig, True, ours=alpn_context(kind), theirs=offering(*offered))
        with held(shake):
            shake.start()
            await shake.both()
            assert shake.connection.get_alpn_proto_negotiated() == ALPN
            assert shake.end.object.selected_alpn_protocol() == ALPN.decode()


@pytest.mark.parametrize("offered", [["http/1.1"], ["nodepass/1", "nodepass/22"], ["nodepass/"]])
async def test_alpn_has_nothing_in_common(engine: Engine, kind: Kind, offered: list[str]) -> None:
    async with engine() as rig:
        shake = Shake(rig, True, ours=alpn_context(kind), theirs=offering(*offered))
        with held(shake):
            shake.start()
            if kind.module.alpn_selector() is None:
                # Python's callback cannot refuse in peace; its caller looks at what came of it.
                await shake.both()
                assert shake.connection.get_alpn_proto_negotiated() == b""
                return
            with pytest.raises(ssl.SSLError, match=r"(?i)no.application.protocol"):
                await shake.end.shake()
            ended = await shake.fails(errno.EBADMSG)
            assert _openssl.describe(ended.detail)


async def test_alpn_is_not_offered(engine: Engine, kind: Kind) -> None:
    """OpenSSL does not ask then; whoever wants it looks at what was negotiated."""
    async with engine() as rig:
        shake = Shake(rig, True, ours=alpn_context(kind), theirs=offering())
        with held(shake):
            shake.start()
            await shake.both()
            assert shake.connection.get_alpn_proto_negotiated() == b""


async def test_our_alert_stands_behind_a_full_socket(engine: Engine) -> None:
    """Best effort: a peer that does not read gets no alert, and costs no time."""
    async with engine() as rig:
        shake = Shake(rig, True)
        with held(shake):
            await stuff(shake.inner)
            shake.start()
            await rig.send(shake.end.sock, b"\x16\x03\x01\x00\x05garbage")
            await shake.fails(errno.EBADMSG)


# --- the engine's caller -------------------------------------------------------------------------


@every_role
async def test_abort_in_the_middle(engine: Engine, is_server: bool) -> None:
    async with engine() as rig:
        shake = Shake(rig, is_server)
        with held(shake):
            shake.start()
            await asyncio.sleep(0.02)
            rig.engine.abort(shake.token)
            rig.engine.abort(shake.token)
            ended = await shake.ended()
            assert ended[1:] == (0, 0, rig.kind.module.REASON_ABORTED, 0, 0, 0)
            assert rig.engine.live(shake.token) is None
            # The socket is open, and nobody has sent a farewell.
            await rig.send(shake.inner, b"still mine")
            heard = await rig.receive(shake.end.sock, 10 if is_server else 1)
            assert heard == (b"still mine" if is_server else b"\x16")
            statistics = rig.engine.statistics()
            assert (statistics.tls_in_use, statistics.handshakes_failed) == (0, 0)


async def test_abort_at_any_moment(engine: Engine) -> None:
    async with engine() as rig:
        finished = 0
        for step in range(60):
            shake = Shake(rig, step % 2 == 0)
            with held(shake):
                shake.start()
                task = asyncio.create_task(shake.end.shake())
                for _ in range(step % 10):
                    await asyncio.sleep(0.0005 * (step % 3))
                rig.engine.abort(shake.token)
                ended = await shake.ended()
                assert ended.reason in {
                    rig.kind.module.REASON_ABORTED,
                    rig.kind.module.REASON_FINISHED,
                }
                finished += ended.reason == rig.kind.module.REASON_FINISHED
                shake.inner.shutdown(socket.SHUT_RDWR)
                await asyncio.gather(task, return_exceptions=True)
        assert finished < 60


async def test_descriptors_are_used_again_at_once(engine: Engine) -> None:
    """Closed by its owner, the number comes back with another socket: no old event hits it."""
    async with engine() as rig:
        for step in range(60):
            shake = Shake(rig, step % 2 == 0)
            with held(shake):
                shake.start()
                if step % 3 == 0:
                    rig.engine.abort(shake.token)
                    await shake.ended()
                else:
                    await shake.both()
        assert rig.engine.statistics().bugs == 0


async def test_close_with_open_handshakes(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        shakes = [Shake(rig, step % 2 == 0) for step in range(10)]
        with held(*shakes):
            for shake in shakes:
                shake.start()
            assert await rig.close() is True
            for shake in shakes:
                ended = await shake.ended()
                assert (ended.reason, ended.side) == (kind.module.REASON_ABORTED, 0)
            assert rig.engine.statistics().tls_in_use == 0
            with pytest.raises(EngineClosed):
                shakes[0].start()


async def test_refused_descriptors(engine: Engine) -> None:
    async with engine() as rig:
        _, inner = rig.ends()
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.setblocking(False)
        reader, writer = os.pipe()
        connection = our_end(True)
        with contextlib.closing(inner), contextlib.closing(udp):
            for fd, code in (
                (-1, errno.EBADF),
                (999_999, errno.EBADF),
                (reader, errno.ENOTSOCK),
                (udp.fileno(), errno.EPROTOTYPE),
            ):
                with pytest.raises(EngineError) as caught:
                    rig.engine.handshake(fd, connection)
                assert caught.value.errno == code
            inner.setblocking(True)
            with pytest.raises(EngineError) as caught:
                rig.engine.handshake(inner.fileno(), connection)
            assert caught.value.errno == errno.EINVAL
            os.fstat(inner.fileno())
        os.close(reader)
        os.close(writer)
        statistics = rig.engine.statistics()
        assert (statistics.handshakes, statistics.tls_in_use) == (0, 0)


async def test_a_connection_that_is_done_already(engine: Engine) -> None:
    async with engine() as rig:
        shake = Shake(rig, True, ours=our_context(True))
        with held(shake):
            shake.start()
            await shake.both()
            shake.start()
            ended = await shake.ended()
            assert ended.reason == rig.kind.module.REASON_FINISHED
