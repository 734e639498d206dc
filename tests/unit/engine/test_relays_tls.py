"""relay: TLS handshakes and relays with TLS legs, and on which engine they run."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import subprocess
import sys
import textwrap
from types import ModuleType

import pytest
from OpenSSL import SSL
from tests.kit.acceptor_desk import oldest, outside
from tests.kit.engine_rig import tcp_pair
from tests.kit.engines import both, engines, native
from tests.kit.secure import PythonSide, TlsStream, python_client
from tests.kit.stream import Stream
from tests.kit.timing import until, within

from nodepass.config.environment import Settings
from nodepass.engine.relays import Handshake, HandshakeResult, Reason, Relay, RelayResult, Relays
from nodepass.engine.twin import engine as twin
from nodepass.errors import EngineClosed, EngineError, TlsError
from nodepass.observe.log import Log
from nodepass.tls import contexts
from nodepass.tls.codec import Records


class House:
    """One Relays, a certificate, and the outer ends of what is secured and joined."""

    def __init__(self, kind: str) -> None:
        self.relays = Relays(Settings(threads=1, engine=kind))  # type: ignore[arg-type]
        self.tls = contexts.ServerTls(
            1, None, None, Log("house", "none"), self.relays.alpn_selector
        )
        self._socks: list[socket.socket] = []

    def pair(self) -> tuple[Stream, socket.socket]:
        """Return the outer and the inner end of a connection."""
        outer, inner = tcp_pair()
        self._socks += [outer, inner]
        return Stream(outer), inner

    def accept(self) -> SSL.Connection:
        return self.tls.accept(is_native=False)

    async def secured(self) -> tuple[TlsStream, socket.socket, SSL.Connection]:
        """Return a connection whose handshake is done: its far end, and ours."""
        outer, inner = self.pair()
        connection, far = self.accept(), TlsStream(outer, PythonSide(python_client()))
        async with within(10):
            _, result = await asyncio.gather(far.shake(), self.relays.secure(inner, connection))
        assert result.is_done, result
        return far, inner, connection

    async def __aenter__(self) -> House:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.relays.close()
        for sock in self._socks:
            sock.close()


async def ended(relay: Relay) -> RelayResult:
    async with within(10):
        return await relay.result


async def shaken(handshake: Handshake) -> HandshakeResult:
    async with within(10):
        return await handshake.result


# --- handshakes --------------------------------------------------------------------------------


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


# --- cancelled while the engine has the socket -------------------------------------------------


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


class Slow:
    """An engine that ends a handshake when the test says so."""

    def __init__(self, *_: object, **__: object) -> None:
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self.aborted: list[int] = []
        self._completions: list[tuple[int, ...]] = []

    def fileno(self) -> int:
        return self._ear.fileno()

    def handshake(self, fd: int, connection: object) -> int:
        return 7

    def abort(self, token: int) -> None:
        self.aborted.append(token)

    def tell(self, reason: Reason) -> None:
        self._completions = [(7, 0, 0, reason, 0, 0, 0)]
        self._bell.send(b"!")

    def poll(self) -> list[tuple[int, ...]]:
        with contextlib.suppress(OSError):
            self._ear.recv(100)
        completions, self._completions = self._completions, []
        return completions

    def close(self, deadline: float) -> bool:
        self._bell.close()
        self._ear.close()
        return True


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[Slow]:
    """Engines made in a test, slow ones all."""
    made: list[Slow] = []

    def make(*_: object, **__: object) -> Slow:
        made.append(Slow())
        return made[-1]

    monkeypatch.setattr(twin, "Engine", make)
    return made


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


# --- relays with TLS ---------------------------------------------------------------------------


@both
@engines
@pytest.mark.parametrize("side", ["a", "b"])
async def test_one_leg_speaks_tls(kind: str, side: str) -> None:
    """Bytes both ways, heads first, and each direction ends by itself."""
    async with House(kind) as house:
        far, inner, connection = await house.secured()
        plain, other = house.pair()
        if side == "a":
            relay = house.relays.join(inner, other, tls_a=connection, head_a=b"early ")
        else:
            relay = house.relays.join(other, inner, tls_b=connection, head_b=b"early ")
        assert (inner.fileno(), other.fileno()) == (-1, -1)
        async with within(10):
            await far.write(b"question")
            assert await plain.read_exactly(14) == b"early question"
            far.finish(fin=False)
            assert await plain.read() == b"", "half-closed by a close_notify alone"
            await plain.write(b"answer")
            assert await far.read_exactly(6) == b"answer"
            plain.close()
            assert await far.read() == b"", "a close_notify"
            assert await outside(far).read() == b"", "and a FIN behind it"
        result = await ended(relay)
        moved = (14, 6) if side == "a" else (6, 14)
        assert result == RelayResult(*moved, Reason.FINISHED, 0, 0)


@both
@engines
async def test_both_legs_speak_tls(kind: str) -> None:
    async with House(kind) as house:
        one, inner_one, tls_one = await house.secured()
        two, inner_two, tls_two = await house.secured()
        relay = house.relays.join(inner_one, inner_two, tls_a=tls_one, tls_b=tls_two)
        data = os.urandom(200_000)
        async with within(20):
            writing = asyncio.create_task(one.write(data))
            assert await two.read_exactly(len(data)) == data
            await writing
            two.finish()
            assert await one.read() == b""
            one.finish(fin=False)
            assert await two.read() == b""
        assert await ended(relay) == RelayResult(len(data), 0, Reason.FINISHED, 0, 0)


@both
@engines
@pytest.mark.parametrize(
    ("how", "words"),
    [("cut", "truncated"), ("garbage", "bad TLS record"), ("reset", "econnreset")],
)
async def test_broken_tls_is_a_result(kind: str, how: str, words: str) -> None:
    async with House(kind) as house:
        far, inner, connection = await house.secured()
        plain, other = house.pair()
        relay = house.relays.join(inner, other, tls_a=connection)
        if how == "cut":
            outside(far).finish()
        elif how == "reset":
            far.reset()
        else:
            await outside(far).write(b"\x17\x03\x03\x00\x20" + bytes(32))
        result = await ended(relay)
        assert (result.reason, result.side) == (Reason.RESET, 1)
        assert result.describe() == words
        async with within(5):
            assert await plain.is_reset(), "a truncated stream must not look whole"


@both
@engines
async def test_abort_resets_a_tls_leg_too(kind: str) -> None:
    async with House(kind) as house:
        far, inner, connection = await house.secured()
        plain, other = house.pair()
        relay = house.relays.join(inner, other, tls_a=connection)
        relay.abort()
        assert (await ended(relay)).reason is Reason.ABORTED
        async with within(5):
            assert await plain.is_reset()
            assert await outside(far).is_reset()


@both
@engines
async def test_join_with_tls_moves_ownership_on_success_only(kind: str) -> None:
    async with House(kind) as house:
        _, inner, connection = await house.secured()
        _, other = house.pair()
        other.close()
        with pytest.raises(EngineError):
            house.relays.join(inner, other, tls_a=connection)
        assert inner.fileno() >= 0
        assert len(house.relays) == 0
        _, other = house.pair()
        house.relays.join(inner, other, tls_a=connection)
        assert len(house.relays) == 1, "socket and connection were still good"


def test_results_have_words_for_what_only_tls_has() -> None:
    assert RelayResult(0, 0, Reason.RESET, 1, errno.EBADMSG).describe() == "bad TLS record"
    assert RelayResult(0, 0, Reason.RESET, 2, errno.ENODATA).describe() == "truncated"


# --- closing -----------------------------------------------------------------------------------


@both
@engines
async def test_close_gives_back_what_is_shaking(kind: str) -> None:
    async with House(kind) as house:
        outer, inner = house.pair()
        heard: list[HandshakeResult] = []
        handshake = house.relays.shake(inner, house.accept())
        handshake.result.add_done_callback(lambda result: heard.append(result.result()))
        _, waiting = house.pair()
        task = asyncio.create_task(house.relays.secure(waiting, house.accept()))
        far, secured, connection = await house.secured()
        _, other = house.pair()
        relay = house.relays.join(secured, other, tls_a=connection)
        assert await house.relays.close()
        assert [result.reason for result in heard] == [Reason.ABORTED], "told before close ends"
        assert relay.result.done()
        async with within(5):
            assert (await task).reason is Reason.ABORTED
            assert await outside(far).is_reset()
        assert len(house.relays) == 0
        for sock in (inner, waiting):
            assert sock.fileno() >= 0, "lent, never given"
        await outer.write(b"x")
        async with within(5):
            assert await asyncio.get_running_loop().sock_recv(inner, 10) == b"x"


# --- where TLS cannot run on the native engine -------------------------------------------------


def moved_engine() -> ModuleType:
    """A native engine whose table of OpenSSL functions cannot be had."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("TLS was given to an engine that has said it cannot")

    class Engine(twin.Engine):
        handshake = refuse  # type: ignore[assignment]

    module = ModuleType("nodepass._fastcopy")
    vars(module).update(
        ABI=twin.ABI,
        Engine=Engine,
        Newcomer=twin.Newcomer,
        tls_trouble=lambda: "SSL_read is not where it was",
        alpn_selector=refuse,
    )
    return module


async def test_c27_nothing_can_speak_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """One clear error, for the start to end with."""
    monkeypatch.setitem(sys.modules, "nodepass._fastcopy", moved_engine())
    monkeypatch.setattr(twin, "tls_trouble", lambda: "pyOpenSSL cannot be loaded (why)")
    relays = Relays(Settings(engine="native"))
    try:
        with pytest.raises(TlsError, match=r"TLS cannot be used here: pyOpenSSL cannot"):
            relays.load_tls()
    finally:
        await relays.close()


@both
async def test_tls_runs_on_the_twin_beside_a_native_engine_that_cannot(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "nodepass._fastcopy", moved_engine())
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with House("native") as house:
            relays = house.relays
            assert relays.kind == "native"
            assert relays.alpn_selector is None, "the twin's: Python chooses"
            await asyncio.to_thread(relays.load_tls)
            _, shaking = house.pair()
            handshake = relays.shake(shaking, house.accept())
            far, inner, connection = await house.secured()
            target, other = house.pair()
            secure = relays.join(inner, other, tls_a=connection)
            one, a = house.pair()
            two, b = house.pair()
            plain = relays.join(a, b)
            assert len(relays) == 3
            assert relays.statistics().flows_open == 1, "plain bytes stay with the fast engine"
            async with within(10):
                await far.write(b"secret")
                assert await target.read_exactly(6) == b"secret"
                await one.write(b"open")
                assert await two.read_exactly(4) == b"open"
            assert secure.live() == (6, 0)
            assert plain.live() == (4, 0)
            assert await relays.close()
            assert (await secure.result).reason is Reason.ABORTED
            assert (await plain.result).reason is Reason.ABORTED
            assert (await handshake.result).reason is Reason.ABORTED
            assert len(relays) == 0
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "the slow Python engine" in told[0]
    assert "SSL_read is not where it was" in told[0]


def test_no_word_of_tls_where_none_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "nodepass._fastcopy", moved_engine())

    async def run() -> None:
        relays = Relays(Settings(threads=1, engine="native"))
        a, b = tcp_pair()
        c, d = tcp_pair()
        relays.join(b, c)
        assert len(relays) == 1
        await relays.close()
        a.close()
        d.close()

    with caplog.at_level(logging.WARNING, "nodepass"):
        asyncio.run(run())
    assert caplog.records == []


MOVED = """
import asyncio, logging, socket, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from nodepass.tls.contexts import _openssl

def gone():
    raise _openssl.Moved("SSL_read is not where it was")

_openssl.table = gone
from nodepass.config.environment import Settings
from nodepass.observe.log import Log
from nodepass.engine.relays import Relays

async def main():
    from nodepass.tls.contexts import ClientTls, ServerTls
    relays = Relays(Settings(threads=1))
    print(relays.kind)
    server = ServerTls(1, None, None, Log("t", "none"), relays.alpn_selector)
    a, b = socket.socketpair()
    a.setblocking(False)
    b.setblocking(False)
    results = await asyncio.gather(
        relays.secure(a, server.accept(is_native=True)),
        relays.secure(b, ClientTls("x.example", None, None).connect(1, is_native=True)),
    )
    print([result.is_done for result in results])
    await relays.close()
    a.close()
    b.close()

asyncio.run(main())
"""


@native
def test_native_engine_notices_that_openssl_has_moved() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(MOVED)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "native"
    assert lines[-1] == "[True, True]"
    assert len(lines) == 3, "one warning"
    assert "SSL_read is not where it was" in lines[1]
