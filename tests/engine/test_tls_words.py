"""What TLS says by itself in mid stream: key updates, asked for and answered, whole and in halves.

The visitor's records are sealed by hand, because no library sends these when told to.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable

import pytest
from OpenSSL import SSL
from tests.engine.conftest import IS_SANITIZED
from tests.kit.engine_rig import PATIENCE, Rig, resident_bytes
from tests.kit.hand_seal import (
    ALERT,
    HANDSHAKE,
    KEY_UPDATE_ASKED,
    HandSealer,
    _expand,
)
from tests.kit.tls_rig import PlainEnd, is_cut, our_end

Engine = Callable[..., Rig]
ANSWER = 5 + 5 + 1 + 16
"""Bytes of a sealed key update."""
CLOSE_NOTIFY = b"\1\0"
HALF = 4
"""Bytes of a message from which OpenSSL knows that it has begun: type and length."""


class HandEnd:
    """An outer end whose words are sealed by hand, and read by a library."""

    def __init__(self, rig: Rig, sock: socket.socket, ours: SSL.Connection) -> None:
        self.rig = rig
        self.sock = sock
        self.sealer = HandSealer()
        self.tls = self.sealer.side.tls
        for _ in range(3):
            for here, there in ((self.tls, ours), (ours, self.tls)):
                with contextlib.suppress(SSL.WantReadError):
                    here.do_handshake()
                with contextlib.suppress(SSL.WantReadError):
                    while True:
                        there.bio_write(here.bio_read(1 << 16))
        with contextlib.suppress(SSL.WantReadError):
            self.tls.recv(1)  # the tickets

    async def put(self, *records: bytes) -> None:
        await self.rig.send(self.sock, b"".join(records))

    async def say(self, data: bytes) -> None:
        await self.put(self.sealer.seal(data))

    async def end(self) -> None:
        await self.put(self.sealer.seal(CLOSE_NOTIFY, ALERT))

    async def hear(self, size: int) -> bytes:
        """Receive exactly `size` bytes; fewer only at the close_notify."""
        heard = b""
        async with asyncio.timeout(PATIENCE):
            while len(heard) < size:
                try:
                    heard += self.tls.recv(size - len(heard))
                except SSL.WantReadError:
                    data = await self.rig.loop.sock_recv(self.sock, 1 << 16)
                    if not data:
                        raise EOFError("cut") from None
                    self.tls.bio_write(data)
                except SSL.ZeroReturnError:
                    break
        return heard

    def ask(self) -> bytes:
        return self.sealer.update_keys(is_asked=True)

    def ask_in_halves(self) -> tuple[bytes, bytes]:
        sealer = self.sealer
        halves = (
            sealer.seal(KEY_UPDATE_ASKED[:HALF], HANDSHAKE),
            sealer.seal(KEY_UPDATE_ASKED[HALF:], HANDSHAKE),
        )
        sealer._secret = _expand(sealer._secret, b"traffic upd", 32)
        sealer._sent = 0
        return halves


def join_by_hand(
    rig: Rig, *, buffers: dict[str, int] | None = None
) -> tuple[HandEnd, PlainEnd, int]:
    outer, a = rig.ends(**(buffers or {}))
    connection = our_end(True)
    visitor = HandEnd(rig, outer, connection)
    target, b = rig.ends(**(buffers or {}))
    return visitor, PlainEnd(rig, target), rig.hand_over(a, b, tls_a=connection)


async def finish(rig: Rig, visitor: HandEnd, target: PlainEnd, token: int) -> None:
    await visitor.end()
    assert await target.hear_all() == b""
    await target.end()
    assert await visitor.hear(1) == b""
    assert (await rig.ended(token)).reason == rig.kind.module.REASON_FINISHED


@pytest.mark.parametrize("is_asked", [True, False])
async def test_key_updates_between_the_words(engine: Engine, is_asked: bool) -> None:
    async with engine() as rig:
        visitor, target, token = join_by_hand(rig)
        for turn in range(100):
            await visitor.put(visitor.sealer.update_keys(is_asked=is_asked))
            await visitor.say(b"to %3d" % turn)
            await target.say(b"fro %3d" % turn)
            assert await target.hear(6) == b"to %3d" % turn
            assert await visitor.hear(7) == b"fro %3d" % turn
        await finish(rig, visitor, target, token)


async def test_answers_come_without_words_of_ours(engine: Engine) -> None:
    """Nobody has anything to say, and the peer is answered all the same."""
    async with engine() as rig:
        visitor, target, token = join_by_hand(rig)
        for _ in range(50):
            await visitor.put(visitor.ask(), visitor.ask())
            assert len(await rig.receive(visitor.sock, ANSWER)) == ANSWER
        rig.engine.abort(token)
        assert await is_cut(target)


async def test_answers_keep_their_place_among_much_data(engine: Engine) -> None:
    """Behind parked records, which were sealed with the keys before."""
    blob = bytes(range(256)) * 8000
    async with engine() as rig:
        visitor, target, token = join_by_hand(rig, buffers={"sndbuf": 4096, "rcvbuf": 4096})
        sending = asyncio.create_task(target.say(blob))
        await rig.until(lambda: rig.engine.statistics().parked_bytes, "bytes parked")
        for turn in range(20):
            await visitor.put(visitor.ask())
            await visitor.say(b"%2d" % turn)
            assert await target.hear(2) == b"%2d" % turn
        assert await visitor.hear(len(blob)) == blob
        await sending
        await finish(rig, visitor, target, token)


async def test_who_asks_for_ever_and_reads_nothing_is_reset(engine: Engine) -> None:
    """OpenSSL answers without limit; the memory for it is bounded."""
    async with engine() as rig:
        visitor, target, token = join_by_hand(rig, buffers={"sndbuf": 4096, "rcvbuf": 4096})
        before = resident_bytes()
        asked = 0
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while not rig.has_ended(token):
                await visitor.put(*(visitor.ask() for _ in range(200)))
                asked += 200
                assert asked < 100_000, "nobody stops it"
        ended = await rig.ended(token)
        assert ended.reason == rig.kind.module.REASON_RESET
        assert (ended.side, ended.code) == (1, errno.ENOBUFS)
        assert await is_cut(target)
        assert IS_SANITIZED or resident_bytes() - before < 8 << 20


async def test_half_a_message_holds_our_words_back(engine: Engine) -> None:
    """OpenSSL writes nothing while it has read one half: the words wait, and cost no time."""
    async with engine() as rig:
        visitor, target, token = join_by_hand(rig)
        for turn in range(5):
            first, second = visitor.ask_in_halves()
            await visitor.put(first)
            await asyncio.sleep(0.02)
            await target.say(b"answer %d" % turn)
            await asyncio.sleep(0.02)
            before = rig.engine.statistics().turns
            await asyncio.sleep(0.05)
            assert rig.engine.statistics().turns - before < 20
            await visitor.put(second)
            assert await visitor.hear(8) == b"answer %d" % turn
            await visitor.say(b"thanks")
            assert await target.hear(6) == b"thanks"
        await finish(rig, visitor, target, token)


async def test_half_a_message_and_much_to_say(engine: Engine) -> None:
    blob = bytes(range(256)) * 4000
    async with engine() as rig:
        visitor, target, token = join_by_hand(rig)
        first, second = visitor.ask_in_halves()
        await visitor.put(first)
        await asyncio.sleep(0.02)
        sending = asyncio.create_task(target.say(blob))
        await asyncio.sleep(0.05)
        await visitor.put(second)
        assert await visitor.hear(len(blob)) == blob
        await sending
        await finish(rig, visitor, target, token)


async def test_the_other_half_never_comes(engine: Engine) -> None:
    """The peer ends, or is cut, in the middle of a message: no stream that looks whole."""
    async with engine() as rig:
        for how in ("end", "fin", "reset"):
            visitor, target, token = join_by_hand(rig)
            await visitor.put(visitor.ask_in_halves()[0])
            await target.say(b"words that cannot be sealed")
            await asyncio.sleep(0.02)
            if how == "end":
                await visitor.end()
            elif how == "fin":
                visitor.sock.shutdown(socket.SHUT_WR)
            else:
                visitor.sock.close()
            await rig.until(lambda token=token: rig.has_ended(token), "the flow ends")
            ended = await rig.ended(token)
            assert (ended.reason, ended.side) == (rig.kind.module.REASON_RESET, 1)
            assert await is_cut(target)


async def test_the_target_ends_behind_half_a_message(engine: Engine) -> None:
    """Our close_notify cannot be sealed for now; it comes, or the flow is reset, never a FIN."""
    async with engine() as rig:
        visitor, target, token = join_by_hand(rig)
        first, second = visitor.ask_in_halves()
        await visitor.put(first)
        await asyncio.sleep(0.02)
        await target.say(b"bye")
        await target.end()
        await asyncio.sleep(0.05)
        await visitor.put(second)
        assert await visitor.hear(3) == b"bye"
        assert await visitor.hear(1) == b""
        await visitor.end()
        assert await target.hear_all() == b""
        assert (await rig.ended(token)).reason == rig.kind.module.REASON_FINISHED


async def test_the_target_ends_without_a_word_behind_half_a_message(engine: Engine) -> None:
    """No close_notify can be made now: then a reset, but never a FIN, which would be a lie."""
    async with engine() as rig:
        visitor, target, token = join_by_hand(rig)
        first, second = visitor.ask_in_halves()
        await visitor.put(first)
        await asyncio.sleep(0.02)
        await target.end()
        await asyncio.sleep(0.02)
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            await visitor.put(second)
            assert await visitor.hear(1) == b""
            await visitor.end()
        ended = await rig.ended(token)
        if ended.reason != rig.kind.module.REASON_FINISHED:
            assert (ended.reason, ended.side) == (rig.kind.module.REASON_RESET, 1)


async def test_nothing_is_said_behind_our_end(engine: Engine) -> None:
    """The peer goes on, and asks for keys as before; it gets no answer any more."""
    async with engine() as rig:
        visitor, target, token = join_by_hand(rig)
        await target.end()
        assert await visitor.hear(1) == b""
        for turn in range(20):
            await visitor.put(visitor.ask(), visitor.ask())
            await visitor.say(b"%2d" % turn)
            assert await target.hear(2) == b"%2d" % turn
        assert await rig.drain(visitor.sock) == b""
        await visitor.end()
        assert await target.hear_all() == b""
        assert (await rig.ended(token)).reason == rig.kind.module.REASON_FINISHED
