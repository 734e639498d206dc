"""TLS flows whose ends are none: cut streams, bad records, alerts, resets."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl

import pytest
from tests.kit.engine_rig import reset_on_close
from tests.kit.tls_relay_rig import BLOB, Engine, every_shape, every_side
from tests.kit.tls_rig import (
    End,
    cut,
    ends_for,
    is_cut,
    join,
)

from nodepass.tls import _openssl


@every_shape
@pytest.mark.parametrize("kept", [0, 1, 4, 100])
async def test_fin_without_close_notify_is_a_reset(engine: Engine, shape: str, kept: int) -> None:
    """A stream that was cut, between records or within one, is never a whole one."""
    async with engine() as rig:
        flow = join(rig, shape)
        cutter = flow.tls_end()
        other = flow.other(cutter)
        await cutter.say(b"whole")
        assert await other.hear(5) == b"whole"
        await rig.send(cutter.sock, cutter.seal(b"never whole" * 50)[:kept])
        cutter.sock.shutdown(socket.SHUT_WR)
        assert await is_cut(other)
        ended = await rig.ended(flow.token)
        assert ended.reason == rig.kind.module.REASON_RESET
        assert (ended.side, ended.code) == (flow.side(cutter), errno.ENODATA)
        assert {ended.up, ended.down} == {5, 0}
        assert await is_cut(cutter)


@every_shape
async def test_cut_behind_bytes_delivers_them_first(engine: Engine, shape: str) -> None:
    async with engine() as rig:
        for size in (1, 1000, 60_000):
            flow = join(rig, shape)
            cutter = flow.tls_end()
            await cutter.say(BLOB[:size])
            cutter.sock.shutdown(socket.SHUT_WR)
            other = flow.other(cutter)
            assert await other.hear(size) == BLOB[:size]
            assert await is_cut(other)


@every_shape
async def test_cut_after_the_other_direction_is_finished(engine: Engine, shape: str) -> None:
    async with engine() as rig:
        flow = join(rig, shape)
        cutter = flow.tls_end()
        other = flow.other(cutter)
        await other.end()
        assert await cutter.hear_all() == b""
        await cutter.say(b"some of it")
        assert await other.hear(10) == b"some of it"
        cutter.sock.shutdown(socket.SHUT_WR)
        assert await is_cut(other)
        ended = await rig.ended(flow.token)
        assert (ended.side, ended.code) == (flow.side(cutter), errno.ENODATA)


@every_shape
async def test_bad_record_is_a_reset_with_an_alert(engine: Engine, shape: str) -> None:
    async with engine() as rig:
        flow = join(rig, shape)
        forger = flow.tls_end()
        other = flow.other(forger)
        await other.say(b"for you")
        assert await forger.hear(7) == b"for you"
        record = bytearray(forger.seal(b"forged"))
        record[-1] ^= 1
        await rig.send(forger.sock, bytes(record))
        with pytest.raises(ssl.SSLError, match=r"(?i)bad.record.mac"):
            await forger.hear(1)
        assert await is_cut(other)
        ended = await rig.ended(flow.token)
        assert ended.reason == rig.kind.module.REASON_RESET
        assert (ended.side, ended.code) == (flow.side(forger), errno.EBADMSG)
        assert _openssl.describe(ended.detail) == "decryption failed or bad record mac"
        assert {ended.up, ended.down} == {0, 7}


@every_shape
async def test_bytes_before_a_bad_record_arrive(engine: Engine, shape: str) -> None:
    async with engine() as rig:
        for _ in range(20):
            flow = join(rig, shape)
            forger = flow.tls_end()
            other = flow.other(forger)
            good, bad = forger.seal(b"good" * 1000), bytearray(forger.seal(b"bad"))
            bad[-1] ^= 1
            await rig.send(forger.sock, good + bad)
            assert await other.hear(4000) == b"good" * 1000
            assert await is_cut(other)
            assert (await rig.ended(flow.token)).code == errno.EBADMSG


@every_shape
async def test_alert_of_the_peer_is_a_reset(engine: Engine, shape: str) -> None:
    async with engine() as rig:
        flow = join(rig, shape)
        alarmed = flow.tls_end()
        alarmed.incoming.write(b"\x17\x03\x03\x00\x20" + bytes(32))  # a record that nobody sealed
        with pytest.raises(ssl.SSLError):
            alarmed.object.read(1)
        await alarmed.flush()
        assert await is_cut(flow.other(alarmed))
        ended = await rig.ended(flow.token)
        assert (ended.side, ended.code) == (flow.side(alarmed), errno.EBADMSG)
        assert "alert bad record mac" in _openssl.describe(ended.detail)


@every_shape
async def test_plain_bytes_instead_of_records(engine: Engine, shape: str) -> None:
    async with engine() as rig:
        flow = join(rig, shape)
        forger = flow.tls_end()
        await rig.send(forger.sock, b"GET / HTTP/1.1\r\n\r\n")
        assert await is_cut(flow.other(forger))
        ended = await rig.ended(flow.token)
        assert (ended.side, ended.code) == (flow.side(forger), errno.EBADMSG)
        assert _openssl.describe(ended.detail)


@every_shape
@every_side
async def test_f12_tls_reset_passes(engine: Engine, shape: str, side: int) -> None:
    async with engine() as rig:
        flow = join(rig, shape)
        leaver, stayer = (flow.visitor, flow.target)[:: 1 if side == 1 else -1]
        await leaver.say(b"last words")
        assert await stayer.hear(10) == b"last words"
        cut(leaver)
        assert await rig.is_reset(stayer.sock)
        ended = await rig.ended(flow.token)
        assert (ended.reason, ended.side) == (rig.kind.module.REASON_RESET, side)
        assert (ended.code, ended.detail) == (errno.ECONNRESET, 0)


@every_shape
@every_side
async def test_f12_tls_reset_overtakes_parked_bytes(engine: Engine, shape: str, side: int) -> None:
    async with engine() as rig:
        letters = "ab" if side == 1 else "ba"
        # The engine takes all of this at once, so that the kernel accepts the RST behind it.
        source, inner, tls_in = ends_for(rig, letters[0], shape)
        sink, own, tls_out = ends_for(
            rig, letters[1], shape, buffers={"sndbuf": 4096, "rcvbuf": 4096}
        )
        await source.say(BLOB[:200_000])
        socks, tls = (inner, own), (tls_in, tls_out)
        if side == 2:
            socks, tls = socks[::-1], tls[::-1]
        token = rig.hand_over(*socks, tls_a=tls[0], tls_b=tls[1])
        await rig.until(lambda: rig.engine.statistics().parked_bytes, "bytes parked")
        await asyncio.sleep(0.05)
        reset_on_close(source.sock)
        source.sock.close()
        ended = await rig.ended(token)
        assert (ended.reason, ended.side) == (rig.kind.module.REASON_RESET, side)
        assert await is_cut(sink)


@every_shape
async def test_last_words_before_a_reset_arrive(engine: Engine, shape: str) -> None:
    async with engine() as rig:
        for size in (1, 1000, 60_000) * 8:
            flow = join(rig, shape)
            leaver = flow.tls_end()
            await leaver.say(BLOB[:size])
            cut(leaver)
            assert await flow.other(leaver).hear(size) == BLOB[:size]
            assert (await rig.ended(flow.token)).side == flow.side(leaver)


@every_shape
async def test_last_words_before_a_reset_arrive_during_an_upload(
    engine: Engine, shape: str
) -> None:
    """The reset is met by sending, while what came before it is still unread."""
    words = b"HTTP/1.1 413 Too Large\r\n\r\n" + b"z" * 5000
    async with engine() as rig:
        for _ in range(20):
            flow = join(rig, shape)
            uploading = asyncio.ensure_future(flow.visitor.say(bytes(8_000_000)))
            assert await flow.target.hear(100) == bytes(100)
            await flow.target.say(words)
            cut(flow.target)
            assert await flow.visitor.hear(len(words)) == words
            ended = await rig.ended(flow.token)
            assert (ended.down, ended.reason) == (len(words), rig.kind.module.REASON_RESET)
            uploading.cancel()
            await asyncio.gather(uploading, return_exceptions=True)


@every_shape
async def test_sending_to_a_side_that_is_gone_is_a_reset(engine: Engine, shape: str) -> None:
    async with engine() as rig:
        flow = join(rig, shape)
        leaver = flow.tls_end()
        stayer = flow.other(leaver)
        await leaver.end_softly()
        leaver.sock.close()
        assert await stayer.hear_all() == b""
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            await talk_on(stayer)
        ended = await rig.ended(flow.token)
        assert (ended.reason, ended.side) == (rig.kind.module.REASON_RESET, flow.side(leaver))
        assert ended.code in {errno.ECONNRESET, errno.EPIPE}


async def talk_on(end: End) -> None:
    for _ in range(2000):
        await end.say(b"anybody there?")
        await asyncio.sleep(0.001)
