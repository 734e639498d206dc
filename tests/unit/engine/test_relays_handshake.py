"""relays: TLS handshakes, and who gives up in the middle of one."""

from __future__ import annotations

import asyncio
import errno

import pytest
from tests.kit.acceptor_desk import oldest
from tests.kit.engines import both, engines
from tests.kit.relay_house import House, Slow
from tests.kit.secure import PythonSide, TlsStream, python_client
from tests.kit.timing import until, within

from nodepass.engine.relays import Handshake, HandshakeResult, Reason
from nodepass.errors import EngineClosed, EngineError
from nodepass.tls import contexts
from nodepass.tls.codec import Records


async def shaken(handshake: Handshake) -> HandshakeResult:
    async with within(10):
        return await handshake.result


# --- handshakes ----------------------------------------------------------------------------------


@both
@engines
async def test_handshake_gives_socket_and_connection_back(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with House(kind) as house:
        assert house.relays.kind == kind
        far, inner, connection = await house.secured()
        assert len(house.relays) == 0
        assert house.relays.statistics().handshakes == 1
        assert inner.fileno() >= 0
        records = Records(connection)
        inner.send(records.seal(b"hello"))
        async with within(5):
            assert await far.read_exactly(5) == b"hello"
            await far.write(b"answer")
            plain = b""
            while not plain:
                plain = records.open(await asyncio.get_running_loop().sock_recv(inner, 1000))
        assert plain == b"answer"
        assert len(records.binding()) == 32
    assert "slow Python engine runs instead" not in caplog.text


@both
@engines
async def test_handshake_of_both_ends_here(kind: str) -> None:
    """A client's and a server's at once, agreed on our protocol and bound to each other."""
    async with House(kind) as house:
        outer, inner = house.pair()
        ours = contexts.ClientTls("127.0.0.1", None, None).connect(1, is_native=True)
        theirs = house.tls.accept(is_native=True)
        async with within(10):
            results = await asyncio.gather(
                house.relays.secure(outer.sock, ours), house.relays.secure(inner, theirs)
            )
        assert all(result.is_done for result in results)
        contexts.check_alpn(ours)
        contexts.check_alpn(theirs)
        assert Records(ours).binding() == Records(theirs).binding()


@both
@engines
async def test_words_behind_the_handshake_are_not_lost(kind: str) -> None:
    """They may lie in the Connection already, or still in the socket."""
    async with House(kind) as house:
        outer, inner = house.pair()
        side, connection = PythonSide(python_client()), house.accept()
        handshake = house.relays.shake(inner, connection)
        async with within(10):
            while not side.shake():
                await outer.write(side.give())
                side.take(await outer.read())
            side.write(b"question")
            await outer.write(side.give())  # in one segment with what ends the handshake
        assert (await shaken(handshake)).is_done
        records, plain = Records(connection), b""
        async with within(5):
            plain = records.open(b"")
            while not plain:
                plain = records.open(await asyncio.get_running_loop().sock_recv(inner, 1000))
        assert plain == b"question"


@both
@engines
@pytest.mark.parametrize(
    ("said", "how", "code", "words"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "stay", errno.EBADMSG, ""),
        (b"x" * 300, "stay", errno.EBADMSG, ""),
        (b"", "end", errno.ENODATA, "it was closed"),
        (b"\x16\x03\x01\x00", "end", errno.ENODATA, "it was closed"),
        (b"", "reset", errno.ECONNRESET, "connection reset by peer"),
    ],
)
async def test_handshake_that_fails_says_how(
    kind: str, said: bytes, how: str, code: int, words: str
) -> None:
    async with House(kind) as house:
        outer, inner = house.pair()
        connection = house.accept()
        handshake = house.relays.shake(inner, connection)
        if said:
            await outer.write(said)
        if how == "end":
            outer.close()
        elif how == "reset":
            outer.reset()
        result = await shaken(handshake)
        assert (result.reason, result.code) == (Reason.RESET, code)
        assert not result.is_done
        assert words in result.describe_break()
        assert bool(result.describe_break()) is (code != errno.EBADMSG)
        if code == errno.EBADMSG:
            assert result.detail
            assert "does not speak TLS" in contexts.explain(
                connection, result.detail, is_server=True
            )
        assert inner.fileno() >= 0, "still ours"
        assert house.relays.statistics().handshakes_failed == 1
        handshake.abort()  # a no-op now


@both
@engines
async def test_handshake_that_we_refuse_tells_the_peer_why(kind: str) -> None:
    """Our alert has left before the socket comes back."""
    async with House(kind) as house:
        outer, inner = house.pair()
        far = TlsStream(outer, PythonSide(oldest()))
        connection = house.accept()
        handshake = house.relays.shake(inner, connection)
        async with within(10):
            with pytest.raises(OSError, match="PROTOCOL_VERSION"):
                await far.shake()
        result = await shaken(handshake)
        assert (result.code, bool(result.detail)) == (errno.EBADMSG, True)
        assert "TLS 1.3" in contexts.explain(connection, result.detail, is_server=True)


@both
@engines
async def test_handshake_aborted_gives_everything_back(kind: str) -> None:
    async with House(kind) as house:
        outer, inner = house.pair()
        handshake = house.relays.shake(inner, house.accept())
        assert len(house.relays) == 1
        handshake.abort()
        handshake.abort()
        result = await shaken(handshake)
        assert result == HandshakeResult(Reason.ABORTED, result.code, 0)
        assert result.describe_break() == "the TLS handshake was given up"
        await outer.write(b"x")
        async with within(5):
            assert await asyncio.get_running_loop().sock_recv(inner, 10) == b"x", "ours to read"


@both
@engines
async def test_many_handshakes_at_once(kind: str) -> None:
    async with House(kind) as house:
        async with within(30):
            done = await asyncio.gather(*(house.secured() for _ in range(30)))
        assert len({Records(connection).binding() for _, _, connection in done}) == 30
        assert house.relays.statistics().tls_in_use == 0


@both
@engines
async def test_handshake_refused_lends_nothing(kind: str) -> None:
    async with House(kind) as house:
        _, inner = house.pair()
        inner.close()
        with pytest.raises(EngineError):
            house.relays.shake(inner, house.accept())
        assert len(house.relays) == 0
        await house.relays.close()
        _, inner = house.pair()
        with pytest.raises(EngineClosed):
            await house.relays.secure(inner, house.accept())
        assert inner.fileno() >= 0


# --- cancelled while the engine has the socket ---------------------------------------------------


@both
@engines
async def test_secure_cancelled_ends_when_the_socket_is_back(kind: str) -> None:
    async with House(kind) as house:
        outer, inner = house.pair()
        task = asyncio.create_task(house.relays.secure(inner, house.accept()))
        await asyncio.sleep(0.02)
        assert len(house.relays) == 1
        task.cancel()
        async with within(5):
            with pytest.raises(asyncio.CancelledError):
                await task
        assert len(house.relays) == 0
        assert house.relays.statistics().tls_in_use == 0
        await outer.write(b"x")
        async with within(5):
            assert await asyncio.get_running_loop().sock_recv(inner, 10) == b"x"


@both
@engines
async def test_secure_within_a_time_limit(kind: str) -> None:
    async with House(kind) as house:
        outer, inner = house.pair()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.03):
                await house.relays.secure(inner, house.accept())
        assert len(house.relays) == 0
        await outer.write(b"x")
        async with within(5):
            assert await asyncio.get_running_loop().sock_recv(inner, 10) == b"x"


@both
@pytest.mark.parametrize("last", [Reason.ABORTED, Reason.FINISHED])
async def test_secure_waits_for_the_engine_however_often_it_is_cancelled(
    slow: list[Slow], last: Reason
) -> None:
    async with House("python") as house:
        _, inner = house.pair()
        task = asyncio.create_task(house.relays.secure(inner, house.accept()))
        await asyncio.sleep(0)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.01)
            assert not task.done(), "the socket is still lent"
        assert slow[0].aborted == [7]
        slow[0].tell(last)
        async with within(5):
            with pytest.raises(asyncio.CancelledError):
                await task
        assert task.cancelled()


@both
async def test_secure_cancelled_in_the_turn_of_its_result(slow: list[Slow]) -> None:
    async with House("python") as house:
        _, inner = house.pair()
        task = asyncio.create_task(house.relays.secure(inner, house.accept()))
        await asyncio.sleep(0)
        slow[0].tell(Reason.FINISHED)
        await until(lambda: not len(house.relays), 5, "the result")
        task.cancel()
        async with within(5):
            await asyncio.wait({task})
        assert slow[0].aborted == [], "there is nothing to abort any more"


async def test_close_of_an_engine_that_keeps_a_handshake(slow: list[Slow]) -> None:
    async with House("python") as house:
        _, inner = house.pair()
        handshake = house.relays.shake(inner, house.accept())
        await house.relays.close()
        assert handshake.result.cancelled()
        handshake.abort()
        assert slow[0].aborted == []
