"""What a flow with TLS promises: the laws of test_law.py, and close_notify as the only end."""

from __future__ import annotations

import asyncio
import errno
import hashlib

import pytest
from OpenSSL import SSL
from tests.kit.engine_rig import Kind
from tests.kit.tls_relay_rig import BLOB, Engine, every_shape, every_side
from tests.kit.tls_rig import (
    SHAPES,
    End,
    PlainEnd,
    TlsEnd,
    ends_for,
    is_cut,
    join,
)

every_kind = pytest.mark.parametrize("kind", ["native", "native-2", "twin"], indirect=True)


@every_shape
@pytest.mark.loops("asyncio", "uvloop")
async def test_bytes_travel_both_ways(engine: Engine, shape: str) -> None:
    async with engine() as rig:
        flow = join(rig, shape)
        await flow.visitor.say(b"question")
        assert await flow.target.hear(8) == b"question"
        await flow.target.say(b"answer")
        assert await flow.visitor.hear(6) == b"answer"
        await rig.until(lambda: rig.engine.live(flow.token) == (8, 6), "plaintext counted")
        assert rig.engine.statistics().tls_in_use == len(shape)


@every_kind
@every_shape
@pytest.mark.parametrize("pair", ["tcp", "unix"])
async def test_finished_when_both_directions_ended(
    engine: Engine, shape: str, pair: str, kind: Kind
) -> None:
    async with engine(pair=pair) as rig:
        flow = join(rig, shape)
        sending = asyncio.create_task(flow.visitor.say(BLOB))
        assert await flow.target.hear(len(BLOB)) == BLOB
        await sending
        await flow.visitor.end()
        assert await flow.target.hear_all() == b""
        await flow.target.end()
        assert await flow.visitor.hear_all() == b""
        ended = await rig.ended(flow.token)
        assert ended == (flow.token, len(BLOB), 0, kind.module.REASON_FINISHED, 0, 0, 0)


@every_shape
@every_side
async def test_f13_tls_half_close_keeps_the_reply(engine: Engine, shape: str, side: int) -> None:
    async with engine() as rig:
        flow = join(rig, shape)
        asker, teller = (flow.visitor, flow.target)[:: 1 if side == 1 else -1]
        await asker.say(b"request")
        await asker.end()
        assert await teller.hear_all() == b"request"
        sending = asyncio.create_task(teller.say(BLOB))
        assert await asker.hear(len(BLOB)) == BLOB
        await sending
        assert not rig.has_ended(flow.token)
        await teller.end()
        assert await asker.hear_all() == b""
        ended = await rig.ended(flow.token)
        assert (ended.reason, ended.side) == (rig.kind.module.REASON_FINISHED, 0)
        assert {ended.up, ended.down} == {7, len(BLOB)}


@every_shape
async def test_close_notify_without_fin_is_an_end(engine: Engine, shape: str) -> None:
    """The Go program sends no FIN when it has nothing more to say, and waits."""
    async with engine() as rig:
        flow = join(rig, shape)
        asker = flow.tls_end()
        teller = flow.other(asker)
        await asker.say(b"request")
        await asker.end_softly()
        assert await teller.hear_all() == b"request"
        await teller.say(b"reply")
        await teller.end()
        assert await asker.hear_all() == b"reply"
        # Ours is followed by a FIN: nobody has to wait for a socket that says no more.
        assert await rig.drain(asker.sock) == b""
        assert (await rig.ended(flow.token)).reason == rig.kind.module.REASON_FINISHED


@every_shape
async def test_tcp_closed_right_behind_the_close_notify(engine: Engine, shape: str) -> None:
    async with engine() as rig:
        flow = join(rig, shape)
        leaver = flow.tls_end()
        stayer = flow.other(leaver)
        await leaver.say(b"that is all")
        await leaver.end_softly()
        leaver.sock.close()
        assert await stayer.hear_all() == b"that is all"
        await stayer.end()
        ended = await rig.ended(flow.token)
        assert (ended.reason, ended.up + ended.down) == (rig.kind.module.REASON_FINISHED, 11)


@every_kind
@every_shape
async def test_f20_tls_close_behind_much_data(engine: Engine, shape: str, kind: Kind) -> None:
    """The sender is long gone when the slow receiver begins."""
    async with engine() as rig:
        flow = join(rig, shape)
        await flow.visitor.say(BLOB)
        await flow.visitor.end()
        flow.visitor.sock.close()
        await asyncio.sleep(0.05)
        await flow.target.end()
        got = await flow.target.hear_all()
        assert hashlib.sha256(got).digest() == hashlib.sha256(BLOB).digest()
        ended = await rig.ended(flow.token)
        assert (ended.reason, ended.up) == (kind.module.REASON_FINISHED, len(BLOB))


@every_shape
@every_side
async def test_f20_tls_end_while_parked(engine: Engine, shape: str, side: int) -> None:
    """The end of the stream comes while bytes wait for a receiver that does not read."""
    small = {"sndbuf": 4096, "rcvbuf": 4096}
    blob = BLOB[:400_000]
    async with engine() as rig:
        flow = join(rig, shape, buffers=small)
        source, sink = (flow.visitor, flow.target)[:: 1 if side == 1 else -1]
        sending = asyncio.create_task(speak_and_end(source, blob))
        await rig.until(lambda: rig.engine.statistics().parked_bytes, "bytes parked")
        assert await sink.hear_all() == blob
        await sending
        await sink.end()
        assert await source.hear_all() == b""
        ended = await rig.ended(flow.token)
        assert (ended.reason, ended.up + ended.down) == (rig.kind.module.REASON_FINISHED, 400_000)


@pytest.mark.parametrize("shape", ["a", "ab"])
@pytest.mark.parametrize("is_gone_first", [True, False])
async def test_f20_tls_reset_behind_a_whole_stream(
    engine: Engine, shape: str, is_gone_first: bool
) -> None:
    """Who has said its close_notify and is gone answers ours with RST; nothing is lost by it.

    All the while its last bytes wait in our kernel, because the receiver does not read. (What had
    not left the peer's kernel is lost with such an RST; then the flow is reset, too.)
    """
    async with engine() as rig:
        visitor, a, tls_a = ends_for(rig, "a", shape)
        small = {"sndbuf": 4096, "rcvbuf": 4096}
        target, b, tls_b = ends_for(rig, "b", shape, buffers=small)
        token = rig.hand_over(a, b, tls_a=tls_a, tls_b=tls_b)
        await visitor.say(BLOB[:40_000])
        await rig.until(lambda: rig.engine.statistics().parked_bytes, "bytes parked")
        await visitor.say(BLOB[40_000:60_000])
        assert isinstance(visitor, TlsEnd)
        await visitor.end_softly()
        await asyncio.sleep(0.05)
        if is_gone_first:
            visitor.sock.close()
            await target.end()
        else:
            await target.end()
            await asyncio.sleep(0.05)
            visitor.sock.close()  # with our close_notify unread
        await asyncio.sleep(0.25)
        assert rig.engine.statistics().parked_bytes
        assert not rig.has_ended(token)
        assert await target.hear_all() == BLOB[:60_000]
        ended = await rig.ended(token)
        assert ended[1:4] == (60_000, 0, rig.kind.module.REASON_FINISHED)


async def speak_and_end(end: End, data: bytes) -> None:
    await end.say(data)
    await end.end()


# --- what lies in the Connection, heads, early ends ----------------------------------------------


@every_shape
async def test_heads_stay_plaintext_and_come_first(engine: Engine, shape: str) -> None:
    async with engine() as rig:
        flow = join(rig, shape, head_a=b"head of a, ", head_b=b"head of b, ")
        await flow.visitor.say(b"body of a")
        await flow.target.say(b"body of b")
        assert await flow.target.hear(20) == b"head of a, body of a"
        assert await flow.visitor.hear(20) == b"head of b, body of b"


@every_shape
async def test_head_larger_than_every_buffer(engine: Engine, shape: str) -> None:
    async with engine() as rig:
        flow = join(rig, shape, head_a=BLOB, buffers={"sndbuf": 8192, "rcvbuf": 8192})
        await flow.visitor.say(b"tail")
        await flow.visitor.end()
        assert await flow.target.hear_all() == BLOB + b"tail"


@pytest.mark.parametrize("parts", [b"c", b"p", b"pc", b"pcs", b"hps"])
@every_shape
async def test_bytes_inside_the_connection_come_first(
    engine: Engine, shape: str, parts: bytes
) -> None:
    """p = read by OpenSSL, c = in its BIO, s = in the socket, h = head; in any company."""
    async with engine() as rig:
        visitor, a, tls_a = ends_for(rig, "a", shape)
        target, b, tls_b = ends_for(rig, "b", shape)
        end, connection = (visitor, tls_a) if tls_a else (target, tls_b)
        assert isinstance(end, TlsEnd)
        assert isinstance(connection, SSL.Connection)
        wanted, head = b"", b""
        for letter in parts.decode():
            words = BLOB[len(wanted) : len(wanted) + 1000]
            if letter == "h":
                head = words
            elif letter == "s":
                await rig.send(end.sock, end.seal(words))
            else:
                connection.bio_write(end.seal(words))
            if letter == "p":
                assert connection.recv(1) == words[:1]  # the rest waits inside
                words = words[1:]
            wanted += words
        key = "head_a" if end is visitor else "head_b"
        token = rig.hand_over(a, b, tls_a=tls_a, tls_b=tls_b, **{key: head})
        other = target if end is visitor else visitor
        assert await other.hear(len(wanted)) == wanted
        await end.end()
        assert await other.hear_all() == b""
        await other.end()
        assert (await rig.ended(token)).reason == rig.kind.module.REASON_FINISHED


@every_shape
async def test_much_inside_the_connection(engine: Engine, shape: str) -> None:
    """More than any buffer, for a receiver that is slow at first."""
    async with engine() as rig:
        small = {"sndbuf": 4096, "rcvbuf": 4096}
        visitor, a, tls_a = ends_for(rig, "a", shape, buffers=small)
        target, b, tls_b = ends_for(rig, "b", shape, buffers=small)
        end, connection = (visitor, tls_a) if tls_a else (target, tls_b)
        assert isinstance(end, TlsEnd)
        assert isinstance(connection, SSL.Connection)
        connection.bio_write(end.seal(BLOB[:1_000_000]) + end.seal_end())
        token = rig.hand_over(a, b, tls_a=tls_a, tls_b=tls_b)
        other = target if end is visitor else visitor
        await rig.until(lambda: rig.engine.statistics().parked_bytes, "bytes parked")
        assert await other.hear_all() == BLOB[:1_000_000]
        await other.end()
        assert await end.hear_all() == b""
        assert (await rig.ended(token)).reason == rig.kind.module.REASON_FINISHED


@every_shape
async def test_an_end_inside_the_connection(engine: Engine, shape: str) -> None:
    async with engine() as rig:
        visitor, a, tls_a = ends_for(rig, "a", shape)
        target, b, tls_b = ends_for(rig, "b", shape)
        end, connection = (visitor, tls_a) if tls_a else (target, tls_b)
        assert isinstance(end, TlsEnd)
        assert isinstance(connection, SSL.Connection)
        connection.bio_write(end.seal(b"all") + end.seal_end())
        token = rig.hand_over(a, b, tls_a=tls_a, tls_b=tls_b)
        other = target if end is visitor else visitor
        assert await other.hear_all() == b"all"
        await other.say(b"thanks")
        await other.end()
        assert await end.hear_all() == b"thanks"
        assert (await rig.ended(token)).reason == rig.kind.module.REASON_FINISHED


@every_shape
async def test_a_bad_record_inside_the_connection(engine: Engine, shape: str) -> None:
    async with engine() as rig:
        visitor, a, tls_a = ends_for(rig, "a", shape)
        target, b, tls_b = ends_for(rig, "b", shape)
        end, connection = (visitor, tls_a) if tls_a else (target, tls_b)
        assert isinstance(end, TlsEnd)
        assert isinstance(connection, SSL.Connection)
        record = bytearray(end.seal(b"forged"))
        record[-1] ^= 1
        connection.bio_write(bytes(record))
        token = rig.hand_over(a, b, tls_a=tls_a, tls_b=tls_b)
        other = target if end is visitor else visitor
        assert await is_cut(other)
        assert (await rig.ended(token)).code == errno.EBADMSG


@every_shape
async def test_words_that_wait_inside_the_connection_are_sent(engine: Engine, shape: str) -> None:
    """What OpenSSL has written before, session tickets for one, goes out first."""
    async with engine() as rig:
        visitor, a, tls_a = ends_for(rig, "a", shape)
        target, b, tls_b = ends_for(rig, "b", shape)
        end, connection = (visitor, tls_a) if tls_a else (target, tls_b)
        assert isinstance(connection, SSL.Connection)
        connection.send(b"sealed by the caller, ")
        rig.hand_over(a, b, tls_a=tls_a, tls_b=tls_b)
        assert await end.hear(22) == b"sealed by the caller, "
        other = target if end is visitor else visitor
        await other.say(b"sealed by the engine")
        assert await end.hear(20) == b"sealed by the engine"


@every_shape
async def test_early_data_and_early_end(engine: Engine, shape: str) -> None:
    """Everything happened before the engine saw the sockets."""
    async with engine() as rig:
        visitor, a, tls_a = ends_for(rig, "a", shape)
        target, b, tls_b = ends_for(rig, "b", shape)
        await speak_and_end(visitor, b"early")
        await speak_and_end(target, b"bird")
        await asyncio.sleep(0.01)
        token = rig.hand_over(a, b, tls_a=tls_a, tls_b=tls_b)
        assert await target.hear_all() == b"early"
        assert await visitor.hear_all() == b"bird"
        assert (await rig.ended(token))[1:] == (5, 4, rig.kind.module.REASON_FINISHED, 0, 0, 0)


@every_shape
async def test_records_byte_by_byte(engine: Engine, shape: str) -> None:
    async with engine() as rig:
        flow = join(rig, shape)
        end = flow.tls_end()
        words = end.seal(b"slowly") + end.seal(b"") + end.seal(b", but surely") + end.seal_end()
        for index in range(len(words)):
            await rig.send(end.sock, words[index : index + 1])
            await asyncio.sleep(0)
        assert await flow.other(end).hear_all() == b"slowly, but surely"


# --- idle, abort, close --------------------------------------------------------------------------


@every_shape
async def test_idle_limit(engine: Engine, shape: str) -> None:
    async with engine() as rig:
        flow = join(rig, shape, idle=0.3)
        for _ in range(6):
            await asyncio.sleep(0.1)
            await flow.visitor.say(b"still here")
        assert not rig.has_ended(flow.token)
        ended = await rig.ended(flow.token)
        assert (ended.reason, ended.side, ended.up) == (rig.kind.module.REASON_IDLE, 0, 60)
        for end in (flow.visitor, flow.target):
            assert await is_cut(end)


@every_kind
@every_shape
async def test_abort_at_any_moment(engine: Engine, shape: str, kind: Kind) -> None:
    async with engine() as rig:
        for step in range(20):
            flow = join(rig, shape, head_b=b"!" * step)
            ends = (flow.visitor, flow.target)
            tasks = [asyncio.create_task(end.say(BLOB)) for end in ends]
            for _ in range(step % 8):
                await asyncio.sleep(0)
            rig.engine.abort(flow.token)
            ended = await rig.ended(flow.token)
            assert ended.reason == kind.module.REASON_ABORTED
            said = await asyncio.gather(*tasks, return_exceptions=True)
            for end, error in zip(ends, said, strict=True):
                assert isinstance(error, OSError) or await is_cut(end)


@every_kind
async def test_close_with_open_flows(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        flows = [join(rig, SHAPES[step % 3], idle=5.0 * (step % 2)) for step in range(30)]
        tasks = [asyncio.create_task(flow.visitor.say(BLOB)) for flow in flows[:6]]
        await asyncio.sleep(0.02)
        assert await rig.close() is True
        for flow in flows:
            ended = await rig.ended(flow.token)
            assert (ended.reason, ended.side) == (kind.module.REASON_ABORTED, 0)
            assert await is_cut(flow.target)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert rig.engine.statistics().tls_in_use == 0


async def test_refused_connections_stay_the_callers(engine: Engine) -> None:
    """Refused, and joined after all: nothing was half taken."""
    async with engine(flows=1) as rig:
        first = join(rig, "a")
        visitor, a, tls_a = ends_for(rig, "a", "a")
        target, b, _ = ends_for(rig, "b", "a")
        assert isinstance(target, PlainEnd)
        with pytest.raises(OSError, match="relay") as caught:
            rig.engine.relay(a.fileno(), b.fileno(), tls_a=tls_a)
        assert caught.value.errno == errno.ENOBUFS
        assert rig.engine.statistics().tls_in_use == 1
        rig.engine.abort(first.token)
        await rig.ended(first.token)
        rig.hand_over(a, b, tls_a=tls_a)
        await visitor.say(b"at last")
        assert await target.hear(7) == b"at last"
