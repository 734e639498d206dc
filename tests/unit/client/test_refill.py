"""refill: links are dialled in parallel until enough lie ready, and given to early launches."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import time
from collections.abc import Callable

import pytest
from tests.kit.engine_rig import tcp_pair
from tests.kit.engines import both
from tests.kit.timing import until, within

from nodepass.client import refill
from nodepass.client.refill import MAX_DIALS, QUIET_FAILURES, Refill
from nodepass.errors import PeerWireError, PoolTimeout
from nodepass.net import tcp
from nodepass.net.readiness import Watch
from nodepass.observe.log import Log
from nodepass.tunnel.idle_links import IdleLinks, Link


class Yard:
    """A refill of idle links; its dials are what the test makes of them."""

    def __init__(self, *, pause: float = 0.01, level: str = "none") -> None:
        self.watch = Watch()
        self.idle_links = IdleLinks(self.watch, self._on_lost)
        self.gate = asyncio.Event()
        """Dials wait until it is set."""
        self.fault: Exception | None = None
        """What dials end with instead of a link."""
        self.fault_now: Exception | None = None
        """What they end with before they have begun."""
        self.dials = 0
        self.names: list[int | str] = []
        self.far: dict[int | str, socket.socket] = {}
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._socks: list[socket.socket] = []
        self.refill = Refill(self.idle_links, self._begin, lambda: 1.0, pause, Log("yard", level))

    def want(self, count: int) -> None:
        self.refill.wanted = count
        self.refill.fill()

    def open_gate(self) -> None:
        self.gate.set()

    async def settle(self) -> None:
        """Let every dial end."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def cancel_dials(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _on_lost(self, link: Link) -> None:
        self.refill.lose(link)

    def _begin(self, on_end: Callable[[Link | Exception], None]) -> None:
        self.dials += 1
        if self.fault_now is not None:
            on_end(self.fault_now)
            return
        task = asyncio.ensure_future(self._dial(on_end))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _dial(self, on_end: Callable[[Link | Exception], None]) -> None:
        await self.gate.wait()
        if self.fault is not None:
            on_end(self.fault)
            return
        name = self.names.pop(0) if self.names else next(self._numbers)
        near, far = tcp_pair()
        self._socks += [near, far]
        self.far[name] = far
        on_end(Link(near, name))

    async def __aenter__(self) -> Yard:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.refill.close()
        self.cancel_dials()
        await self.settle()
        self.idle_links.clear()
        self.watch.close()
        for sock in self._socks:
            sock.close()


# --- filling -----------------------------------------------------------------------------------


@both
async def test_fills_up_to_the_wish_and_no_further() -> None:
    async with Yard() as yard:
        yard.open_gate()
        yard.want(10)
        yard.refill.fill()
        assert yard.refill.dialling == 10
        await until(lambda: len(yard.idle_links) == 10, 5, "ten links")
        await yard.settle()
        yard.refill.fill()
        assert (yard.dials, yard.refill.made, yard.refill.dialling) == (10, 10, 0)
        yard.want(4)
        assert yard.dials == 10, "too many is no reason to dial"


@both
async def test_refills_what_is_taken_and_what_dies() -> None:
    async with Yard() as yard:
        yard.open_gate()
        yard.want(3)
        await until(lambda: len(yard.idle_links) == 3, 5, "three links")
        taken = yard.idle_links.take()
        assert taken is not None
        yard.refill.fill()
        await until(lambda: len(yard.idle_links) == 3, 5, "one in its place")
        yard.far[1].close()
        await until(lambda: yard.refill.made == 5, 5, "one in place of the dead")
        assert len(yard.idle_links) == 3


@both
async def test_bounds_dials_under_way() -> None:
    async with Yard() as yard:
        yard.want(500)
        await asyncio.sleep(0.02)
        assert yard.refill.dialling == MAX_DIALS
        yard.refill.fill()
        assert yard.refill.dialling == MAX_DIALS
        yard.open_gate()
        await until(lambda: len(yard.idle_links) == 500, 10, "all links")
        assert yard.refill.made == 500


@both
@pytest.mark.parametrize("fault", [PeerWireError("garbage"), OSError("refused")])
async def test_failures_back_off_and_do_not_spin(fault: Exception) -> None:
    async with Yard(pause=0.05) as yard:
        yard.open_gate()
        yard.fault = fault
        yard.want(4)
        await yard.settle()
        yard.refill.fill()
        assert yard.dials == 4, "nothing is dialled during the pause"
        # Pauses of 0.1 s doubling would be the start; here the ceiling of 0.05 s binds at once.
        await asyncio.sleep(0.3)
        assert 8 <= yard.dials <= 4 * 7
        yard.fault = None
        await until(lambda: len(yard.idle_links) == 4, 5, "links once it works again")


@both
async def test_a_dial_that_fails_at_once_ends_the_round() -> None:
    async with Yard(pause=0.05) as yard:
        yard.open_gate()
        yard.fault_now = OSError("no descriptor")
        yard.want(4)
        assert (yard.dials, yard.refill.dialling) == (1, 0)
        yard.fault_now = None
        await until(lambda: len(yard.idle_links) == 4, 5, "links once it works again")


@both
async def test_a_fault_of_ours_backs_off_like_any_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("on purpose")

    with caplog.at_level(logging.ERROR, "nodepass"):
        async with Yard(pause=0.05, level="error") as yard:
            begin = yard.refill._begin
            monkeypatch.setattr(yard.refill, "_begin", fail)
            yard.open_gate()
            yard.want(4)
            assert yard.refill.dialling == 0
            monkeypatch.setattr(yard.refill, "_begin", begin)
            await until(lambda: len(yard.idle_links) == 4, 5, "links once it works again")
    assert "an internal error in dialling a link" in caplog.text


@both
async def test_failures_are_told_once_they_are_no_accident(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG, "nodepass"):
        async with Yard(pause=0.005, level="debug") as yard:
            yard.open_gate()
            yard.fault = OSError("refused")
            yard.want(1)
            await until(lambda: yard.dials > QUIET_FAILURES + 3, 5, "failures")
            yard.fault = None
            await until(lambda: len(yard.idle_links) == 1, 5, "a link")
            yard.refill.note_success()  # it was launched
            yard.fault = OSError("refused")
            yard.idle_links.retire(1)
            yard.refill.fill()
            await yard.settle()
    levels = [record.levelname for record in caplog.records]
    quiet = ["DEBUG"] * QUIET_FAILURES
    assert levels == [*quiet, "WARNING", "DEBUG"], "told once a minute, and anew after a success"


async def test_a_success_during_the_pause_does_not_shorten_it() -> None:
    async with Yard(pause=0.05) as yard:
        yard.want(2)
        await asyncio.sleep(0)
        yard.fault = OSError("refused")
        yard.open_gate()
        await yard.settle()
        yard.fault = None
        assert yard.dials == 2
        yard.refill.fill()
        assert yard.refill.dialling == 0
        await until(lambda: len(yard.idle_links) == 2, 5, "both links, after the pause")


# --- launches that come before their link ------------------------------------------------------


@both
async def test_claim_of_a_link_that_is_here() -> None:
    async with Yard() as yard:
        yard.open_gate()
        yard.want(1)
        await until(lambda: len(yard.idle_links) == 1, 5, "the link")
        assert (await yard.refill.claim(1, 1.0)).name == 1
        with pytest.raises(PoolTimeout):
            await yard.refill.claim(1, 0.01)


@both
async def test_claim_waits_for_its_link_and_no_other() -> None:
    async with Yard() as yard:
        yard.names = ["aaaa0001", "aaaa0002"]
        claiming = asyncio.create_task(yard.refill.claim("aaaa0002", 5.0))
        await asyncio.sleep(0)
        yard.open_gate()
        yard.want(2)
        assert (await claiming).name == "aaaa0002"
        await until(lambda: yard.refill.made == 3, 5, "one in its place")
        assert "aaaa0001" in yard.idle_links
        assert "aaaa0002" not in yard.idle_links


@both
async def test_claim_twice_while_waiting() -> None:
    async with Yard() as yard:
        claiming = asyncio.create_task(yard.refill.claim(1, 5.0))
        await asyncio.sleep(0)
        with pytest.raises(PoolTimeout, match="twice"):
            await yard.refill.claim(1, 5.0)
        yard.open_gate()
        yard.want(1)
        assert (await claiming).name == 1, "the first is not harmed"


@both
@pytest.mark.parametrize("delay", [0.04, 0.06])
async def test_claim_whose_link_comes_in_the_turn_of_the_time_out(delay: float) -> None:
    """Whichever is first within the turn, the link is with the caller or reset."""
    async with Yard() as yard:
        yard.want(1)
        claiming = asyncio.create_task(yard.refill.claim(1, 0.05))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(delay, yard.open_gate)
        await asyncio.sleep(0.03)
        _block(0.05)
        try:
            link = await claiming
        except PoolTimeout:
            await until(lambda: 1 in yard.far and tcp.has_ended(yard.far[1]), 5, "the reset")
        else:
            assert link.name == 1
            assert not tcp.has_ended(yard.far[1])
        assert 1 not in yard.idle_links


@both
async def test_claim_times_out_with_its_link_in_hand() -> None:
    """The link is there, the claimer has not run yet, and its time is over."""
    async with Yard() as yard:
        yard.want(1)
        claiming = asyncio.create_task(yard.refill.claim(1, 0.05))

        def open_late() -> None:
            yard.open_gate()
            _block(0.04)  # the dial's next step and the end of the wait fall into one turn

        asyncio.get_running_loop().call_later(0.03, open_late)
        link = await claiming
        assert link.name == 1
        assert not tcp.has_ended(yard.far[1])


@both
@pytest.mark.parametrize("turns", range(6))
async def test_claim_cancelled_around_the_arrival_of_its_link(turns: int) -> None:
    async with Yard() as yard:
        claiming = asyncio.create_task(yard.refill.claim(1, 5.0))
        yard.want(1)
        await asyncio.sleep(0.01)
        yard.open_gate()
        for _ in range(turns):
            await asyncio.sleep(0)
        claiming.cancel()
        await asyncio.wait({claiming})
        await yard.settle()
        if claiming.cancelled() and 1 not in yard.idle_links:
            assert 1 in yard.far
            await until(lambda: tcp.has_ended(yard.far[1]), 5, "the reset of the link")
        else:
            assert not tcp.has_ended(yard.far[1])


# --- closing -----------------------------------------------------------------------------------


@both
async def test_close_during_dials_leaks_nothing() -> None:
    async with Yard() as yard:
        yard.want(5)
        await asyncio.sleep(0.01)
        yard.refill.close()
        yard.refill.close()
        yard.open_gate()
        await yard.settle()
        assert len(yard.idle_links) == 0
        assert yard.refill.made == 0
        for far in yard.far.values():
            await until(lambda far=far: tcp.has_ended(far), 5, "its end")  # type: ignore[misc]
        yard.refill.fill()
        assert yard.refill.dialling == 0


@both
async def test_close_during_failing_dials_and_during_the_pause() -> None:
    async with Yard(pause=0.02) as yard:
        yard.fault = OSError("refused")
        yard.want(2)
        await asyncio.sleep(0.01)
        yard.refill.close()
        yard.open_gate()
        await yard.settle()
        await asyncio.sleep(0.04)
        assert yard.dials == 2
    async with Yard(pause=0.02) as yard:
        yard.open_gate()
        yard.fault = OSError("refused")
        yard.want(2)
        await yard.settle()
        yard.refill.close()
        await asyncio.sleep(0.04)
        assert yard.dials == 2


@both
async def test_close_ends_claims() -> None:
    async with Yard() as yard:
        claiming = asyncio.create_task(yard.refill.claim(1, 5.0))
        await asyncio.sleep(0)
        yard.refill.close()
        async with within(1):
            await asyncio.wait({claiming})
        assert claiming.cancelled() or isinstance(claiming.exception(), PoolTimeout)


def _block(seconds: float) -> None:
    """Hold the loop, so that everything due meanwhile falls into one turn."""
    time.sleep(seconds)


# --- links that die ----------------------------------------------------------------------------


@both
async def test_f05_links_that_die_young_do_not_make_us_spin() -> None:
    """A far side that drops every link at once is a failing dial, however well it connects."""
    async with Yard(pause=0.05) as yard:
        yard.open_gate()
        yard.want(4)
        for _ in range(50):
            await asyncio.sleep(0.01)
            for name in list(yard.far):
                yard.far.pop(name).close()
        # Half a second of pauses up to 0.05 s, four dials after each, is about 60; a spinning
        # refill makes thousands.
        assert yard.dials < 150


@both
async def test_link_that_dies_old_is_replaced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodepass.client.refill.YOUNG", 0.0)
    async with Yard(pause=30.0) as yard:
        yard.open_gate()
        yard.want(1)
        await until(lambda: len(yard.idle_links) == 1, 5, "a link")
        yard.far[1].close()
        await until(lambda: yard.dials == 2, 5, "another dial, without the pause of 30 s")


@both
async def test_c11_claim_has_an_end() -> None:
    """Its launch has been given up, and whoever sent it must not wait for ever."""
    async with Yard() as yard:
        with pytest.raises(PoolTimeout, match="never came"):
            await yard.refill.claim(1, 0.02)
        yard.open_gate()
        yard.want(2)
        await until(lambda: len(yard.idle_links) == 2, 5, "two others")
        assert 1 not in yard.idle_links


@both
async def test_c23_links_whose_launch_came_too_early_are_few() -> None:
    async with Yard() as yard:
        for name in range(2 * refill.TOO_LATE):
            with pytest.raises(PoolTimeout, match="never came"):
                await yard.refill.claim(name, 0.0)
        assert len(yard.refill._too_late) == refill.TOO_LATE
