"""relays: relays with TLS legs, and on which engine they run."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import subprocess
import sys
import textwrap
from types import ModuleType

import pytest
from tests.kit.acceptor_desk import outside
from tests.kit.engine_rig import tcp_pair
from tests.kit.engines import both, engines, native
from tests.kit.relay_house import House
from tests.kit.timing import within

from nodepass.config.environment import Settings
from nodepass.engine.relays import HandshakeResult, Reason, Relay, RelayResult, Relays
from nodepass.engine.twin import engine as twin
from nodepass.errors import EngineError, TlsError


async def ended(relay: Relay) -> RelayResult:
    async with within(10):
        return await relay.result


# --- relays with TLS -----------------------------------------------------------------------------


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


# --- closing -------------------------------------------------------------------------------------


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


# --- where TLS cannot run on the native engine ---------------------------------------------------


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
