"""relay: sockets go to the engine, results come back, and which engine it is."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import sys
from types import ModuleType

import pytest
from tests.kit.engine_rig import tcp_pair
from tests.kit.engines import both, engines
from tests.kit.timing import until, within

from nodepass.config.environment import Settings
from nodepass.engine.relays import Reason, Relay, RelayResult, Relays
from nodepass.engine.twin import engine as twin
from nodepass.errors import EngineClosed, EngineError
from nodepass.net import tcp


class House:
    """One Relays, and the outer ends of what it joins."""

    def __init__(self, kind: str) -> None:
        self.relays = Relays(Settings(threads=1, engine=kind))  # type: ignore[arg-type]
        self._socks: list[socket.socket] = []

    def legs(self) -> tuple[socket.socket, socket.socket, socket.socket, socket.socket]:
        """Return visitor, a, b, target: a and b are the ends to join."""
        visitor, a = tcp_pair()
        b, target = tcp_pair()
        self._socks += [visitor, a, b, target]
        return visitor, a, b, target

    def join(self, head_a: bytes = b"") -> tuple[socket.socket, Relay, socket.socket]:
        visitor, a, b, target = self.legs()
        return visitor, self.relays.join(a, b, head_a=head_a), target

    async def __aenter__(self) -> House:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.relays.close()
        for sock in self._socks:
            sock.close()


async def read(sock: socket.socket, size: int = 1000) -> bytes:
    async with within(5):
        return await asyncio.get_running_loop().sock_recv(sock, size)


# --- joining -----------------------------------------------------------------------------------


@both
@engines
async def test_bytes_travel_and_the_result_counts_them(kind: str) -> None:
    async with House(kind) as house:
        assert house.relays.kind == kind
        visitor, relay, target = house.join(head_a=b"early ")
        assert len(house.relays) == 1
        assert "open=1" in repr(house.relays)
        visitor.send(b"question")
        data = b""
        while len(data) < 14:
            data += await read(target)
        assert data == b"early question"
        await until(lambda: relay.live() == (14, 0), 5, "the live count")
        visitor.shutdown(socket.SHUT_WR)
        assert await read(target) == b""
        target.send(b"answer")
        assert await read(visitor) == b"answer"
        target.close()
        async with within(5):
            result = await relay.result
        assert result == RelayResult(14, 6, Reason.FINISHED, 0, 0)
        assert relay.live() == (14, 6)
        assert len(house.relays) == 0
        assert result.describe() == "finished"
        relay.abort()  # a no-op now
        assert house.relays.statistics().flows_total == 1


@both
@engines
async def test_reset_is_a_result(kind: str) -> None:
    async with House(kind) as house:
        visitor, relay, target = house.join()
        tcp.reset(target)
        async with within(5):
            result = await relay.result
        assert (result.reason, result.side) == (Reason.RESET, 2)
        assert result.describe() == "econnreset"
        with pytest.raises(ConnectionResetError):
            await read(visitor)


@both
@engines
async def test_abort_resets_both(kind: str) -> None:
    async with House(kind) as house:
        visitor, relay, target = house.join()
        relay.abort()
        async with within(5):
            result = await relay.result
        assert result.reason is Reason.ABORTED
        assert result.describe() == "aborted"
        for end in (visitor, target):
            with pytest.raises(ConnectionResetError):
                await read(end)


@both
@engines
async def test_join_moves_ownership_on_success_only(kind: str) -> None:
    async with House(kind) as house:
        _, a, b, _ = house.legs()
        house.relays.join(a, b)
        assert (a.fileno(), b.fileno()) == (-1, -1)
        _, a, b, _ = house.legs()
        b.close()
        with pytest.raises(EngineError):
            house.relays.join(a, b)
        assert a.fileno() >= 0, "still ours"
        assert len(house.relays) == 1


@both
@engines
async def test_join_of_what_has_ended_already(kind: str) -> None:
    async with House(kind) as house:
        visitor, a, b, target = house.legs()
        visitor.send(b"last words")
        visitor.close()
        target.close()
        relay = house.relays.join(a, b)
        async with within(5):
            result = await relay.result
        assert result.reason in (Reason.FINISHED, Reason.RESET)


@both
@engines
async def test_connect_dials_and_joins(kind: str) -> None:
    async with House(kind) as house:
        visitor, a, _, _ = house.legs()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            b = tcp.open_stream(socket.AF_INET)
            name = listener.getsockname()
            relay = house.relays.connect(a, b, name, head=b"early ", timeout=5.0)
            assert (a.fileno(), b.fileno(), len(house.relays)) == (-1, -1, 1)
            visitor.send(b"question")
            visitor.shutdown(socket.SHUT_WR)
            await until(lambda: relay.live() == (14, 0), 5, "the live count")
            target, _ = listener.accept()
        with target:
            assert target.recv(1000, socket.MSG_WAITALL) == b"early question"
            target.send(b"answer")
        assert await read(visitor) == b"answer"
        async with within(5):
            result = await relay.result
        assert result == RelayResult(14, 6, Reason.FINISHED, 0, 0)
        assert result.is_met


@both
@engines
async def test_connect_in_vain_is_a_result(kind: str) -> None:
    async with House(kind) as house:
        visitor, a, _, _ = house.legs()
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            b = tcp.open_stream(socket.AF_INET)
            relay = house.relays.connect(a, b, nobody.getsockname(), head=b"early", timeout=5.0)
            async with within(5):
                result = await relay.result
        assert result == RelayResult(0, 0, Reason.UNMET, 2, errno.ECONNREFUSED)
        assert (result.is_met, result.is_clean, result.describe()) == (False, False, "unmet")
        assert relay.live() == (0, 0)
        assert len(house.relays) == 0
        with pytest.raises(ConnectionResetError):
            await read(visitor)


@both
@engines
async def test_connect_moves_ownership_on_success_only(kind: str) -> None:
    async with House(kind) as house:
        _, a, b, _ = house.legs()
        b.close()
        with pytest.raises(EngineError):
            house.relays.connect(a, b, ("127.0.0.1", 9), timeout=5.0)
        with tcp.open_stream(socket.AF_INET) as b, pytest.raises(ValueError, match="localhost"):
            house.relays.connect(a, b, ("localhost", 9), timeout=5.0)
        assert a.fileno() >= 0, "still ours"
        assert len(house.relays) == 0


def test_describe_names_a_code_that_has_no_name() -> None:
    assert RelayResult(0, 0, Reason.RESET, 1, 9999).describe() == "9999"
    assert RelayResult(0, 0, Reason.RESET, 1, errno.EPIPE).describe() == "epipe"
    assert RelayResult(0, 0, Reason.RESET, 1, 0).describe() == "reset"
    assert RelayResult(0, 0, Reason.IDLE, 0, 0).describe() == "idle"


# --- closing -----------------------------------------------------------------------------------


@both
@engines
async def test_close_aborts_what_is_open(kind: str) -> None:
    async with House(kind) as house:
        visitor, relay, target = house.join()
        visitor.send(b"x")
        assert await read(target) == b"x"
        assert await house.relays.close()
        assert await house.relays.close(), "idempotent"
        assert relay.result.done()
        assert (await relay.result).reason is Reason.ABORTED
        assert len(house.relays) == 0
        for end in (visitor, target):
            with pytest.raises(ConnectionResetError):
                await read(end)


@both
@engines
async def test_join_after_close_leaves_ownership(kind: str) -> None:
    async with House(kind) as house:
        await house.relays.close()
        _, a, b, _ = house.legs()
        with pytest.raises(EngineClosed):
            house.relays.join(a, b)
        assert min(a.fileno(), b.fileno()) >= 0


@both
@engines
async def test_many_at_once(kind: str) -> None:
    async with House(kind) as house:
        joined = [house.join() for _ in range(50)]
        for number, (visitor, _, _) in enumerate(joined):
            visitor.send(b"%d" % number)
            visitor.shutdown(socket.SHUT_WR)
        for number, (_, _, target) in enumerate(joined):
            assert await read(target) == b"%d" % number
            target.close()
        async with within(5):
            results = await asyncio.gather(*(relay.result for _, relay, _ in joined))
        assert [result.up for result in results] == [len(str(n)) for n in range(50)]


class Stuck:
    """An engine whose threads do not end."""

    def __init__(self, *_: object, **__: object) -> None:
        self._near, self._far = socket.socketpair()
        self._tokens = 0
        self.completions: list[tuple[int, ...]] = []

    def fileno(self) -> int:
        return self._near.fileno()

    def relay(self, *_: object, **__: object) -> int:
        self._tokens += 1
        return self._tokens

    def ring(self) -> None:
        pass

    def poll(self) -> list[tuple[int, ...]]:
        return self.completions

    def live(self, token: int) -> tuple[int, int] | None:
        return None

    def abort(self, token: int) -> None:
        raise AssertionError("aborted after the end")

    def close(self, deadline: float) -> bool:
        self._near.close()
        self._far.close()
        return False


async def test_close_of_an_engine_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its relays are cancelled, and whoever looks at them later comes to no harm."""
    module = ModuleType("nodepass._fastcopy")
    vars(module).update(ABI=twin.ABI, Engine=Stuck, Newcomer=twin.Newcomer)
    monkeypatch.setitem(sys.modules, "nodepass._fastcopy", module)
    async with House("native") as house:
        _, a, b, _ = house.legs()
        _, c, d, _ = house.legs()
        fds = [socket.socket(fileno=sock.fileno()) for sock in (a, b, c, d)]
        cancelled, kept = house.relays.join(a, b), house.relays.join(c, d)
        assert cancelled.live() == (0, 0)
        kept.result.cancel()
        engine = house.relays._running.engine
        assert isinstance(engine, Stuck)
        engine.completions = [(2, 1, 1, 0, 0, 0, 0), (99, 1, 1, 0, 0, 0, 0)]
        assert not await house.relays.close(0.1)
        assert cancelled.result.cancelled()
        assert cancelled.live() == (0, 0)
        cancelled.abort()
        for sock in fds:
            sock.close()


# --- which engine ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["missing", "of another release"])
async def test_twin_runs_where_the_native_engine_cannot(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if how == "missing":
        monkeypatch.setitem(sys.modules, "nodepass._fastcopy", None)
    else:
        stale = ModuleType("nodepass._fastcopy")
        stale.ABI = -1  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "nodepass._fastcopy", stale)
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with House("native") as house:
            assert house.relays.kind == "python"
            visitor, _, target = house.join()
            visitor.send(b"x")
            assert await read(target) == b"x"
    assert "native engine cannot be loaded" in caplog.text


async def test_twin_asked_for_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with House("python"):
            pass
    assert "NODEPASS_ENGINE=python" in caplog.text
