"""handshake(): both roles, every cut of the bytes, what lies behind it."""

from __future__ import annotations

import asyncio
import contextlib
import ssl

import pytest
from tests.kit.engine_rig import Rig
from tests.kit.handshake_rig import Engine, Shake, every_role, held, stuff
from tests.kit.tls_rig import (
    TlsEnd,
)

from nodepass.tls.codec import Records


@every_role
@pytest.mark.loops("asyncio", "uvloop")
async def test_both_sides_agree(engine: Engine, is_server: bool) -> None:
    async with engine() as rig:
        shake = Shake(rig, is_server)
        with held(shake):
            shake.start()
            assert rig.engine.live(shake.token) == (0, 0)
            assert rig.engine.statistics().tls_in_use == 1
            await shake.both()
            assert rig.engine.live(shake.token) is None
            ours, theirs = Records(shake.connection), shake.end
            # The socket and the Connection are the caller's again.
            await rig.send(shake.inner, ours.seal(b"hello"))
            assert await theirs.hear(5) == b"hello"
            await theirs.say(b"hi")
            heard = b""
            while len(heard) < 2:
                heard += ours.open(await rig.loop.sock_recv(shake.inner, 1 << 16))
            assert heard == b"hi"
        statistics = rig.engine.statistics()
        assert (statistics.handshakes, statistics.handshakes_failed) == (1, 0)
        assert (statistics.tls_in_use, statistics.flows_open) == (0, 0)


@every_role
async def test_the_lent_socket_is_left_alone_afterwards(engine: Engine, is_server: bool) -> None:
    """No event of a socket that was given back reaches the engine any more."""
    async with engine() as rig:
        shake = Shake(rig, is_server)
        with held(shake):
            shake.start()
            await shake.both()
            await asyncio.sleep(0.05)
            before = rig.engine.statistics()
            for _ in range(20):
                await shake.end.say(b"nobody of the engine listens")
                await asyncio.sleep(0.002)
            after = rig.engine.statistics()
            assert after.stale_events == before.stale_events
            assert after.wakeups - before.wakeups < 10
            assert len(shake.inner.recv(1 << 16)) > 20 * 28


@every_role
async def test_a_handshake_and_then_a_relay(engine: Engine, is_server: bool) -> None:
    """What the peer sends on the heels of the handshake is the first that arrives."""
    async with engine() as rig:
        for _ in range(20):
            shake = Shake(rig, is_server)
            shake.start()

            async def shake_and_say(end: TlsEnd = shake.end) -> None:
                await end.shake()
                await end.say(b"early, ")

            await shake_and_say()
            await shake.ended()
            target, b = rig.ends()
            token = rig.hand_over(shake.inner, b, tls_a=shake.connection)
            await shake.end.say(b"late")
            assert await rig.receive(target, 11) == b"early, late"
            await rig.send(target, b"answer")
            assert await shake.end.hear(6) == b"answer"
            rig.engine.abort(token)
            await rig.ended(token)
        assert rig.engine.statistics().flows_total == 20


@every_role
async def test_bytes_that_came_along_lie_in_the_connection_or_the_socket(
    engine: Engine, is_server: bool
) -> None:
    """One segment holds the last words of the handshake and the first of the data."""
    async with engine() as rig:
        shake = Shake(rig, is_server)
        with held(shake):
            shake.start()
            end = shake.end
            while True:
                try:
                    end.object.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await end.flush()
                    end.incoming.write(await rig.loop.sock_recv(end.sock, 1 << 16))
            if not is_server:
                await (
                    end.flush()
                )  # the server ends first: its data cannot be awaited by the client
            data = end.outgoing.read() + end.seal(b"straight on")
            await rig.send(end.sock, data)
            ended = await shake.ended()
            assert ended.reason == rig.kind.module.REASON_FINISHED
            records = Records(shake.connection)
            heard = records.open(b"")
            while len(heard) < 11:
                heard += records.open(await rig.loop.sock_recv(shake.inner, 1 << 16))
            assert heard == b"straight on"


@every_role
async def test_byte_by_byte(engine: Engine, is_server: bool) -> None:
    async with engine() as rig:
        shake = Shake(rig, is_server)
        with held(shake):
            shake.start()
            end = shake.end
            async with asyncio.timeout(20):
                while True:
                    with contextlib.suppress(ssl.SSLWantReadError):
                        end.object.do_handshake()
                        break
                    await dribble(rig, end)
                    end.incoming.write(await rig.loop.sock_recv(end.sock, 1))
                await dribble(rig, end)
            ended = await shake.ended()
            assert ended.reason == rig.kind.module.REASON_FINISHED


async def dribble(rig: Rig, end: TlsEnd) -> None:
    """Send what there is one byte at a time."""
    data = end.outgoing.read()
    for index in range(len(data)):
        await rig.send(end.sock, data[index : index + 1])
        await asyncio.sleep(0)


async def test_first_bytes_lie_in_the_connection_already(engine: Engine) -> None:
    """The caller has looked at the first bytes to see that this is TLS."""
    async with engine() as rig:
        shake = Shake(rig, True)
        with held(shake):
            with contextlib.suppress(ssl.SSLWantReadError):
                shake.end.object.do_handshake()
            hello = shake.end.outgoing.read()
            shake.connection.bio_write(hello[:100])
            await rig.send(shake.end.sock, hello[100:])
            shake.start()
            await shake.both()


async def test_all_of_the_first_flight_lies_in_the_connection(engine: Engine) -> None:
    """No event of the socket will come: the engine must look by itself."""
    async with engine() as rig:
        shake = Shake(rig, True)
        with held(shake):
            with contextlib.suppress(ssl.SSLWantReadError):
                shake.end.object.do_handshake()
            shake.connection.bio_write(shake.end.outgoing.read())
            shake.start()
            await shake.both()


@every_role
async def test_a_socket_that_is_full(engine: Engine, is_server: bool) -> None:
    """Our words wait for room; FINISHED comes when all of them are out."""
    async with engine() as rig:
        shake = Shake(rig, is_server)
        with held(shake):
            stuffed = await stuff(shake.inner)
            shake.start()
            await asyncio.sleep(0.05)
            assert not rig.has_ended(shake.token)
            assert len(await rig.receive(shake.end.sock, stuffed)) == stuffed
            await shake.both()


async def test_the_last_words_wait_for_room(engine: Engine) -> None:
    """The client knows that all is well, and its Finished cannot leave yet."""
    async with engine(pair="unix") as rig:
        shake = Shake(rig, False)
        with held(shake):
            shake.start()
            end = shake.end
            end.incoming.write(await rig.loop.sock_recv(end.sock, 1 << 16))
            stuffed = await stuff(shake.inner)
            with contextlib.suppress(ssl.SSLWantReadError):
                end.object.do_handshake()
            await end.flush()
            await asyncio.sleep(0.05)
            assert not rig.has_ended(shake.token)
            assert len(await rig.receive(end.sock, stuffed)) == stuffed
            await shake.both()


async def test_three_hundred_at_once(engine: Engine) -> None:
    async with engine() as rig:
        shakes = [Shake(rig, index % 2 == 0) for index in range(300)]
        with held(*shakes):
            for shake in shakes:
                shake.start()
            assert rig.engine.statistics().tls_in_use == 300
            await asyncio.gather(*(shake.both() for shake in shakes))
            statistics = rig.engine.statistics()
            assert (statistics.handshakes, statistics.handshakes_failed) == (300, 0)
            assert statistics.tls_in_use == 0


async def test_a_relay_goes_on_beside_many_handshakes(engine: Engine) -> None:
    async with engine() as rig:
        chat = rig.join()
        shakes = [Shake(rig, True) for _ in range(50)]
        with held(*shakes):
            for shake in shakes:
                shake.start()
            all_done = asyncio.gather(*(shake.both() for shake in shakes))
            for _ in range(50):
                await rig.send(chat.visitor, b"ping")
                assert await rig.receive(chat.target, 4) == b"ping"
            await all_done
