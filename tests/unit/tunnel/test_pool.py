"""pool: which link a visitor gets, and who waits for one."""

from __future__ import annotations

import asyncio
import select
import socket
import time

import pytest
from tests.kit.engines import both
from tests.kit.pool_words import House
from tests.kit.timing import until, within

from nodepass.errors import PoolClosed, PoolTimeout
from nodepass.net import tcp
from nodepass.protocol.messages import Dialect, Idle
from nodepass.protocol.session import State
from nodepass.tunnel.idle_links import MAX_ENDING
from nodepass.tunnel.pool import Member, Pool, announce

# --- helpers -------------------------------------------------------------------------------------


def sent(member: Member) -> bytes:
    return member.session.data_to_send()


# --- Pool ----------------------------------------------------------------------------------------


@both
async def test_pool_gives_a_link_of_the_least_loaded_session() -> None:
    with House() as house:
        pool, busy, calm = Pool(), house.member(), house.member()
        busy.relays = 5
        for member in (busy, calm):
            pool.add(member)
        pool.give(busy, house.link(1))
        pool.give(calm, link := house.link(2))
        assert list(pool) == [busy, calm]
        assert pool.take_nowait() == (calm, link)
        found = pool.take_nowait()
        assert found is not None
        assert found[0] is busy, "a loaded session is better than none"
        assert pool.take_nowait() is None


async def test_c19_equals_get_visitors_by_turns() -> None:
    """Also when each visitor has gone before the next one comes."""
    with House() as house:
        pool, members = Pool(), [house.member() for _ in range(3)]
        for at, member in enumerate(members):
            pool.add(member)
            for number in range(4):
                pool.give(member, house.link(10 * at + number))
        taken = []
        for _ in range(12):
            found = pool.take_nowait()
            assert found is not None
            taken.append(found[0])
        assert taken == members * 4


async def test_pool_passes_over_sessions_that_cannot_launch() -> None:
    with House() as house:
        pool, stopping, live = Pool(), house.member(), house.member()
        for number, member in enumerate((stopping, live)):
            pool.add(member)
            pool.give(member, house.link(number))
        live.relays = 100
        stopping.session.drain()
        found = pool.take_nowait()
        assert found is not None
        assert found[0] is live
        assert pool.take_nowait() is None


async def test_pool_passes_over_links_that_have_died() -> None:
    with House() as house:
        pool, one, two = Pool(), house.member(), house.member()
        two.relays = 1
        for member in (one, two):
            pool.add(member)
        pool.give(one, dead := house.link(1))
        pool.give(two, alive := house.link(2))
        tcp.reset(house.far[1])
        assert select.select([dead.sock], [], [], 5)[0]
        assert await pool.take(1.0) == (two, alive)
        assert house.lost == 1


@both
async def test_pool_first_come_first_served() -> None:
    with House() as house:
        pool, member = Pool(), house.member()
        pool.add(member)
        takers = [asyncio.create_task(pool.take(5.0)) for _ in range(3)]
        await asyncio.sleep(0)
        assert pool.waiting == 3
        links = [house.link(number) for number in range(3)]
        for link in links:
            assert pool.take_nowait() is None, "who waits came first"
            pool.give(member, link)
        assert await asyncio.gather(*takers) == [(member, link) for link in links]
        assert pool.waiting == 0


@both
async def test_pool_wait_has_an_end() -> None:
    with House() as house:
        pool, member = Pool(), house.member()
        pool.add(member)
        with pytest.raises(PoolTimeout, match=r"0\.02 s"):
            await pool.take(0.02)
        assert pool.waiting == 0
        pool.give(member, link := house.link(1))
        assert len(member.idle_links) == 1
        assert await pool.take(5.0) == (member, link)


@both
async def test_pool_link_that_comes_in_the_turn_of_the_time_out_is_not_lost() -> None:
    with House() as house:
        pool, member = Pool(), house.member()
        pool.add(member)
        taking = asyncio.create_task(pool.take(0.05))
        await asyncio.sleep(0)
        link = house.link(1)

        async def give() -> None:
            await turn.wait()
            pool.give(member, link)

        def hold_the_loop() -> None:
            turn.set()
            time.sleep(0.05)  # the next step of `give` and the end of the wait are due together

        turn = asyncio.Event()
        giving = asyncio.create_task(give())
        asyncio.get_running_loop().call_later(0.03, hold_the_loop)
        try:
            assert await taking == (member, link)
        except PoolTimeout:
            await until(lambda: len(member.idle_links) == 1, 5, "an idle link")
        await giving
        assert house.is_open(1)
        assert pool.waiting == 0


@both
async def test_pool_link_that_comes_after_the_time_out_is_kept() -> None:
    with House() as house:
        pool, member = Pool(), house.member()
        pool.add(member)
        with pytest.raises(PoolTimeout):
            await pool.take(0.01)
        pool.give(member, house.link(1))
        assert len(member.idle_links) == 1
        assert house.is_open(1)


@both
async def test_pool_waiter_cancelled_with_a_link_in_hand() -> None:
    with House() as house:
        pool, member = Pool(), house.member()
        pool.add(member)
        taking = asyncio.create_task(pool.take(5.0))
        await asyncio.sleep(0)
        pool.give(member, link := house.link(1))
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        assert await pool.take(1.0) == (member, link), "it is somebody else's now"
        assert house.is_open(1)


@both
async def test_pool_waiter_cancelled_with_a_link_in_hand_passes_it_on() -> None:
    with House() as house:
        pool, member = Pool(), house.member()
        pool.add(member)
        first, second = (asyncio.create_task(pool.take(5.0)) for _ in range(2))
        await asyncio.sleep(0)
        pool.give(member, link := house.link(1))
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert await second == (member, link)


@both
@pytest.mark.parametrize("state", [State.DRAINING, State.CLOSED])
async def test_pool_session_that_ends_in_the_turn_of_its_link(state: State) -> None:
    """The link is in hand, but nothing can be launched on it any more: on with the next one."""
    with House() as house:
        pool, gone, stays = Pool(), house.member(), house.member()
        for member in (gone, stays):
            pool.add(member)
        taking = asyncio.create_task(pool.take(5.0))
        await asyncio.sleep(0)
        pool.give(gone, house.link(1))
        if state is State.DRAINING:
            gone.session.drain()
        else:
            gone.session.bye("stopped")
        await asyncio.sleep(0.01)
        assert house.is_reset(1)
        assert not taking.done()
        pool.give(stays, link := house.link(2))
        assert await taking == (stays, link)


@both
async def test_pool_waiter_cancelled_before_a_link_comes() -> None:
    with House() as house:
        pool, member = Pool(), house.member()
        pool.add(member)
        first, second = (asyncio.create_task(pool.take(5.0)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        pool.give(member, link := house.link(1))
        with pytest.raises(asyncio.CancelledError):
            await first
        assert await second == (member, link), "the next in the row gets it"


@both
async def test_pool_cancelled_waiter_leaves_its_link_to_the_shelf() -> None:
    with House() as house:
        pool, member = Pool(), house.member()
        pool.add(member)
        taking = asyncio.create_task(pool.take(5.0))
        await asyncio.sleep(0)
        taking.cancel()
        pool.give(member, house.link(1))
        await asyncio.wait({taking})
        assert len(member.idle_links) == 1
        assert pool.waiting == 0


@both
async def test_pool_closed_turns_everybody_away() -> None:
    with House() as house:
        pool, member = Pool(), house.member()
        pool.add(member)
        pool.give(member, house.link(1))
        assert await pool.take(1.0)
        taking = asyncio.create_task(pool.take(5.0))
        late = asyncio.create_task(pool.take(5.0))
        await asyncio.sleep(0)
        late.cancel()
        pool.close()
        pool.close()
        with pytest.raises(PoolClosed):
            await taking
        with pytest.raises(asyncio.CancelledError):
            await late
        with pytest.raises(PoolClosed):
            await pool.take(5.0)
        assert pool.take_nowait() is None
        assert list(pool) == []
        pool.give(member, house.link(2))
        assert house.is_reset(2)


async def test_pool_closed_in_the_turn_of_the_time_out() -> None:
    with House() as house:
        pool, member = Pool(), house.member()
        pool.add(member)
        taking = asyncio.create_task(pool.take(0.03))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.02, pool.close)
        await asyncio.sleep(0.005)
        select.select([], [], [], 0.06)
        with pytest.raises((PoolClosed, PoolTimeout)):
            await taking


async def test_pool_close_resets_idle_links() -> None:
    with House() as house:
        pool, member = Pool(), house.member()
        pool.add(member)
        pool.give(member, house.link(1))
        pool.close()
        assert house.is_reset(1)


async def test_pool_remove_resets_the_links_of_a_session() -> None:
    with House() as house:
        pool, gone, stays = Pool(), house.member(), house.member()
        for number, member in enumerate((gone, stays)):
            pool.add(member)
            pool.give(member, house.link(number))
        pool.remove(gone)
        pool.remove(gone)
        assert house.is_reset(0)
        assert house.is_open(1)
        found = pool.take_nowait()
        assert found is not None
        assert found[0] is stays


@pytest.mark.parametrize("state", [State.DRAINING, State.CLOSED])
async def test_pool_takes_no_link_of_a_session_that_ends(state: State) -> None:
    with House() as house:
        pool, member = Pool(), house.member()
        pool.add(member)
        taking = asyncio.create_task(pool.take(0.05))
        await asyncio.sleep(0)
        if state is State.DRAINING:
            member.session.drain()
        else:
            member.session.bye("stopped")
        pool.give(member, house.link(1))
        assert house.is_reset(1)
        with pytest.raises(PoolTimeout):
            await taking


@both
async def test_pool_tells_sessions_of_those_who_wait() -> None:
    with House() as house:
        pool, one, two = Pool(), house.member(most=1000), house.member(most=1000)
        pool.add(one)
        takers = [asyncio.create_task(pool.take(5.0)) for _ in range(40)]
        await asyncio.sleep(0)
        assert one.demand.wanted >= 42
        assert f"idle://{one.demand.wanted}\n".encode() in sent(one)
        pool.add(two)
        assert two.demand.wanted >= 22, "each its share"
        assert f"idle://{two.demand.wanted}\n".encode() in sent(two)
        for task in takers:
            task.cancel()
        await asyncio.wait(takers)


async def test_pool_has_no_word_for_a_seed_session() -> None:
    with House() as house:
        member = house.member(Dialect.SEED)
        announce(member)
        assert sent(member) == b""
        native = house.member()
        announce(native)
        assert sent(native) == b"idle://2\n"
        assert Idle(2).count == native.demand.wanted


async def test_pool_serves_a_crowd_from_two_sessions() -> None:
    """Every waiter gets a link of its own, whatever the order of the arrivals."""
    with House() as house:
        pool, members = Pool(), [house.member(), house.member()]
        for member in members:
            pool.add(member)
        takers = [asyncio.create_task(pool.take(5.0)) for _ in range(50)]
        for number in range(50):
            pool.give(members[number % 2], house.link(number))
            if number % 7 == 0:
                await asyncio.sleep(0)
        async with within(5):
            found = await asyncio.gather(*takers)
        assert sorted(int(link.name) for _, link in found) == list(range(50))


@both
async def test_ended_links_that_wait_for_a_launch_are_few() -> None:
    with House() as house:
        idle_links = house.idle_links(grace=30.0)
        for number in range(MAX_ENDING + 5):
            idle_links.put(house.link(number))
            house.far[number].shutdown(socket.SHUT_WR)
            await until(lambda n=number: house.lost == n + 1, 5, "the loss")  # type: ignore[misc]
        assert all(house.is_reset(number) for number in range(5)), "the oldest give way"
        assert all(number in idle_links for number in range(5, MAX_ENDING + 5))
        idle_links.clear()
