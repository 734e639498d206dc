"""acceptor: limits on TLS handshakes, seed clients beside TLS, what a handshake costs."""

from __future__ import annotations

import asyncio
import select
import time

import pytest
from tests.kit.acceptor_words import CLAIM, HELLO, gone, street
from tests.kit.engines import both, engines, native
from tests.kit.timing import limit, until, within

from nodepass.engine.relays import Handshake
from nodepass.net import tcp
from nodepass.server.acceptor import KNOWN_SHARE, MAX_PENDING_PER_SOURCE

# --- limits --------------------------------------------------------------------------------------


@both
@engines
async def test_evicted_while_shaking(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodepass.server.acceptor.MAX_PENDING_PER_SOURCE", 4)
    async with street(kind) as here:
        crowd = await here.shaking(4)
        far = await here.secured()
        await until(lambda: here.is_out(crowd[0].sock), 5, "the oldest one's end")
        assert here._given[0].fileno() == -1
        assert not any(here.is_out(other.sock) for other in crowd[1:])
        await far.write(HELLO)
        await until(lambda: here.openings, 5, "the opening")
        assert (len(here.acceptor), here.counters.strangers) == (3, 1)
        await until(lambda: len(here.relays) == 3, 5, "what is lent")


@both
@engines
async def test_descriptor_of_an_evicted_one_is_not_given_away_too_early(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number stays taken until the engine has let go, or a newcomer would get its events."""
    monkeypatch.setattr("nodepass.server.acceptor.MAX_PENDING_PER_SOURCE", 1)
    async with street(kind) as here:
        await here.shaking()
        near = here.near()
        here.acceptor.make_room()
        assert len(here.acceptor) == 0
        assert near.fileno() >= 0, "the engine still has it"
        newcomer = here.come()
        assert here.near().fileno() != near.fileno()
        await until(lambda: near.fileno() == -1, 5, "its end")
        await asyncio.sleep(0.01)
        assert not here.is_out(newcomer)


@both
@engines
async def test_closed_while_shaking(kind: str) -> None:
    async with street(kind) as here:
        fars = await here.shaking(5)
        silent = here.come()
        here.acceptor.close()
        here.acceptor.close()
        assert len(here.acceptor) == 0
        await gone(here)
        assert all(here.is_out(far.sock) for far in fars)
        assert here.is_out(silent)
        assert (here.counters.strangers, here.openings) == (0, [])


@both
@engines
async def test_closed_together_with_its_engine(kind: str) -> None:
    """As a tunnel ends: nothing may run afterwards, so all is closed when close() is done."""
    async with street(kind) as here:
        await here.shaking(5)
        here.acceptor.close()
        await here.relays.close()
        assert all(near.fileno() < 0 for near in here._given)


@both
@engines
@pytest.mark.parametrize("how", ["evicted", "closed"])
async def test_gone_in_the_turn_in_which_its_handshake_ends(
    kind: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine has told, and the acceptor has not heard yet."""
    async with street(kind) as here:
        far = here.greeted()
        (caller,) = here.acceptor._pending.values()
        go = here.acceptor.make_room if how == "evicted" else here.acceptor.close
        finish = Handshake.finish

        def finish_and_go(shake: Handshake) -> None:
            finish(shake)
            go()

        monkeypatch.setattr(Handshake, "finish", finish_and_go)
        async with within(5):
            await far.shake()
            await far.write(HELLO)
        await gone(here)
        assert caller.is_released
        assert here.openings == []


@both
@engines
async def test_limit_per_source_holds_with_tls(kind: str) -> None:
    """64 unfinished, whatever stage they are in; a client's own burst gets through."""
    async with street(kind) as here:
        assert here.tls is not None
        shaking = await here.shaking(30)
        silent = [here.come() for _ in range(34)]
        assert len(here.acceptor) == 64
        last = await here.secured()
        await until(lambda: sum(map(here.is_out, silent)) == 1, 5, "the end of one of the silent")
        assert not any(here.is_out(other.sock) for other in shaking)
        await last.write(HELLO)
        await until(lambda: here.openings, 5, "the opening")
        assert (len(here.acceptor), here.counters.strangers) == (63, 1)


@both
@engines
async def test_burst_of_one_client_gets_in(kind: str) -> None:
    async with street(kind) as here:

        async def call() -> None:
            await (await here.secured()).write(CLAIM)

        async with within(30):
            await asyncio.gather(*(call() for _ in range(60)))
        await until(lambda: len(here.openings) == 60, 10, "all of them")
        assert (len(here.acceptor), here.counters.strangers) == (0, 0)


@both
@engines
async def test_burst_of_a_client_that_is_known_may_be_larger(kind: str) -> None:
    """For it a handshake is done half a round trip before it is for us."""
    async with street(kind) as here:
        here.known.add("10.0.0.1")
        fars = await here.shaking(KNOWN_SHARE * MAX_PENDING_PER_SOURCE)
        assert len(here.acceptor) == len(fars)
        assert here.counters.strangers == 0
        here.come()
        await until(lambda: here.is_out(fars[0].sock), 5, "the oldest one's end")
        assert here.counters.strangers == 1


@native
@both
@pytest.mark.parametrize("is_together", [True, False])
async def test_handshakes_that_have_ended_unheard_make_no_crowd(
    is_together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn of the loop takes long; meanwhile the engine is done and the claims are here."""
    monkeypatch.setattr("nodepass.server.acceptor.MAX_PENDING_PER_SOURCE", 3)
    async with street("native") as here:
        fars = [here.greeted() for _ in range(3)]
        for far in fars:
            far.side.shake()
            far.sock.send(far.side.give())
        await until(lambda: len(here.relays) == 3, 5, "handshakes under way")
        for far in fars:  # from here on without a turn
            while not far.side.shake():
                assert select.select([far.sock], [], [], 5)[0]
                far.side.take(far.sock.recv(65536))
            if not is_together:
                far.sock.send(far.side.give())
                time.sleep(limit(0.05))
            far.side.write(CLAIM)
            far.sock.send(far.side.give())
        time.sleep(limit(0.1))
        late = here.come()
        assert len(here.openings) == 3
        assert not here.is_out(late)
        assert here.counters.strangers == 0


# --- seed clients --------------------------------------------------------------------------------


@both
@engines
async def test_promotes_nobody_who_has_begun_to_speak_tls(kind: str) -> None:
    async with street(kind, data_port=9102) as here:
        silent = here.come(port=1)
        await here.shaking(2)
        secured = await here.secured()
        callers = here.acceptor._pending.values()
        await until(lambda: any(caller.records for caller in callers), 5, "its handshake here")
        caller = here.acceptor.promote("10.0.0.1", 0.0)
        assert caller is not None
        assert (caller.port, caller.tls) == (1, None)
        assert here.acceptor.promote("10.0.0.1", 0.0) is None
        silent.send(b"x")
        await secured.write(HELLO)
        await until(lambda: here.openings, 5, "the opening")


@both
async def test_promotes_nobody_whose_first_byte_is_here_but_unread() -> None:
    async with street("python", data_port=9102) as here:
        far = here.greeted()
        far.side.shake()
        far.sock.send(far.side.give())
        select.select([here.near()], [], [], 5)
        assert here.acceptor.promote("10.0.0.1", 0.0) is None
        assert len(here.relays) == 1, "its handshake has begun instead"


@both
async def test_sweep_leaves_handshakes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodepass.server.acceptor.MAX_PENDING_PER_SOURCE", 3)
    async with street("python") as here:
        assert here.tls is not None
        await here.shaking(2)
        far = here.greeted()
        far.side.shake()
        far.sock.send(far.side.give())
        select.select([here.near()], [], [], 5)
        here.come()
        assert here.tls.accepted == 3
        assert len(here.acceptor) == 3, "the oldest had to go, though it was shaking"


# --- what TLS costs ------------------------------------------------------------------------------


@engines
async def test_crowd_of_handshakes_leaves_no_connection_behind(kind: str) -> None:
    async with street(kind) as here:
        fars = await here.shaking(20)
        for far in fars[::2]:
            tcp.reset(far.sock)
        here.acceptor.close()
        await gone(here)
        assert here.relays.statistics().tls_in_use == 0
