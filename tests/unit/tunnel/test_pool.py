"""pool: shelves of idle links, the demand for them, and who gets the next one."""

from __future__ import annotations

import asyncio
import select
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.kit.engine_rig import tcp_pair
from tests.kit.timing import until, within

from nodepass.errors import PoolClosed, PoolTimeout
from nodepass.net import tcp
from nodepass.net.readiness import Watch
from nodepass.protocol.messages import Dialect, Idle
from nodepass.protocol.session import Role, Session, State
from nodepass.tunnel.demand import DEMAND_MARGIN, DEMAND_WINDOW, Demand
from nodepass.tunnel.idle_links import MAX_ENDING, IdleLinks, Link
from nodepass.tunnel.pool import Member, Pool, announce

both = pytest.mark.loops("asyncio", "uvloop")


# --- helpers -----------------------------------------------------------------------------------


class House:
    """A watch, links with their far ends, and everything closed at the end."""

    def __init__(self) -> None:
        self.watch = Watch()
        self.far: dict[int | str, socket.socket] = {}
        self.lost = 0
        self._socks: list[socket.socket] = []
        self._shelves: list[IdleLinks] = []

    def link(self, name: int | str) -> Link:
        near, far = tcp_pair()
        self._socks += [near, far]
        self.far[name] = far
        return Link(near, name)

    def idle_links(self, grace: float = 0.0) -> IdleLinks:
        idle_links = IdleLinks(self.watch, self._count, grace)
        self._shelves.append(idle_links)
        return idle_links

    def member(self, dialect: Dialect = Dialect.NATIVE, least: int = 2, most: int = 8) -> Member:
        session = Session(Role.SERVER, dialect, now=0.0, interval=5.0)
        return Member(session, self.idle_links(), Demand(least, most, 0.0))

    def is_reset(self, name: int | str) -> bool:
        """Wait for the end of a link as its peer sees it; tell whether it was a reset."""
        far = self.far[name]
        assert select.select([far], [], [], 5)[0], f"link {name} is still open"
        try:
            assert not far.recv(100)
        except ConnectionResetError:
            return True
        return False

    def is_open(self, name: int | str) -> bool:
        return not tcp.has_ended(self.far[name])

    def _count(self, _link: Link) -> None:
        self.lost += 1

    def __enter__(self) -> House:
        return self

    def __exit__(self, *_: object) -> None:
        for idle_links in self._shelves:
            idle_links.clear()
        self.watch.close()
        for sock in self._socks:
            sock.close()


def sent(member: Member) -> bytes:
    return member.session.data_to_send()


# --- idle links ----------------------------------------------------------------------------------


@both
async def test_shelf_hands_over_the_newest() -> None:
    with House() as house:
        idle_links = house.idle_links()
        links = [house.link(number) for number in range(3)]
        for link in links:
            idle_links.put(link)
        assert len(idle_links) == 3
        assert 1 in idle_links
        assert [idle_links.take() for _ in range(4)] == [links[2], links[1], links[0], None]
        assert 1 not in idle_links
        assert house.lost == idle_links.lost == 0


@both
async def test_shelf_claims_by_name_once() -> None:
    with House() as house:
        idle_links = house.idle_links()
        link = house.link(7)
        idle_links.put(link)
        assert idle_links.claim(8) is None
        assert idle_links.claim(7) is link
        assert idle_links.claim(7) is None
        assert len(idle_links) == 0


@both
@pytest.mark.parametrize("how", ["end", "reset"])
async def test_shelf_notices_a_dead_link_at_once(how: str) -> None:
    with House() as house:
        idle_links = house.idle_links()
        idle_links.put(house.link(1))
        idle_links.put(house.link(2))
        if how == "reset":
            tcp.reset(house.far[1])
        else:
            house.far[1].close()
        await until(lambda: house.lost, 5, "the loss")
        assert (len(idle_links), idle_links.lost, house.lost) == (1, 1, 1)
        assert idle_links.claim(1) is None
        assert house.is_open(2)


@pytest.mark.parametrize("how", ["end", "reset"])
async def test_shelf_takes_no_link_that_died_in_this_very_turn(how: str) -> None:
    with House() as house:
        idle_links = house.idle_links()
        alive = house.link(1)
        idle_links.put(alive)
        dead = house.link(2)
        idle_links.put(dead)
        if how == "reset":
            tcp.reset(house.far[2])
        else:
            house.far[2].close()
        assert select.select([dead.sock], [], [], 5)[0]
        assert idle_links.take() is alive
        assert (idle_links.lost, house.lost) == (1, 1)
        assert idle_links.take() is None


@both
async def test_shelf_keeps_a_link_with_early_bytes() -> None:
    with House() as house:
        idle_links = house.idle_links()
        link = house.link(1)
        idle_links.put(link)
        house.far[1].send(b"early")
        house.far[1].shutdown(socket.SHUT_WR)
        await asyncio.sleep(0.02)
        assert len(idle_links) == 1
        assert idle_links.take() is link
        assert link.sock.recv(10) == b"early"
        assert house.lost == 0


@both
async def test_shelf_keeps_an_ended_link_for_its_launch() -> None:
    """The client's side: the visitor's end may overtake the launch on the other connection."""
    with House() as house:
        idle_links = house.idle_links(grace=5.0)
        link = house.link(1)
        idle_links.put(link)
        house.far[1].shutdown(socket.SHUT_WR)
        await until(lambda: house.lost, 5, "the end")
        assert len(idle_links) == 0, "it does not count as idle any more"
        assert 1 in idle_links
        assert idle_links.take() is None
        assert idle_links.claim(1) is link
        assert 1 not in idle_links
        assert idle_links.claim(1) is None
        link.sock.send(b"answer")
        assert select.select([house.far[1]], [], [], 5)[0]
        assert house.far[1].recv(10) == b"answer"


@both
async def test_shelf_grace_has_an_end() -> None:
    with House() as house:
        idle_links = house.idle_links(grace=0.03)
        idle_links.put(house.link(1))
        house.far[1].shutdown(socket.SHUT_WR)
        await until(lambda: house.lost, 5, "the end")
        await until(lambda: 1 not in idle_links, 5, "the end of the grace")
        assert house.is_reset(1)
        assert idle_links.claim(1) is None
        assert house.lost == 1


@both
async def test_shelf_has_no_grace_for_a_reset_link() -> None:
    with House() as house:
        idle_links = house.idle_links(grace=5.0)
        idle_links.put(house.link(1))
        tcp.reset(house.far[1])
        await until(lambda: house.lost, 5, "the reset")
        assert 1 not in idle_links
        assert idle_links.lost == 1


async def test_shelf_retires_the_oldest() -> None:
    with House() as house:
        idle_links = house.idle_links()
        for number in range(4):
            idle_links.put(house.link(number))
        for count in (0, -3):
            idle_links.retire(count)
        assert len(idle_links) == 4
        idle_links.retire(2)
        assert [number in idle_links for number in range(4)] == [False, False, True, True]
        assert house.is_reset(0)
        assert house.is_reset(1)
        assert house.is_open(2)
        idle_links.retire(100)
        assert len(idle_links) == 0
        assert house.lost == 0, "what is retired is not lost"


async def test_shelf_retires_a_link_that_dies_meanwhile() -> None:
    with House() as house:
        idle_links = house.idle_links()
        idle_links.put(house.link(1))
        tcp.reset(house.far[1])
        idle_links.retire(1)
        await asyncio.sleep(0.02)
        assert (len(idle_links), house.lost) == (0, 0)


@both
async def test_shelf_clear_resets_all_and_forgets_the_graced() -> None:
    with House() as house:
        idle_links = house.idle_links(grace=0.05)
        idle_links.put(house.link(1))
        idle_links.put(house.link(2))
        house.far[1].shutdown(socket.SHUT_WR)
        await until(lambda: house.lost, 5, "the end")
        idle_links.clear()
        idle_links.clear()
        assert 1 not in idle_links
        assert 2 not in idle_links
        assert house.is_reset(1)
        assert house.is_reset(2)
        await asyncio.sleep(0.08)  # the timer of the graced one does not come


@both
async def test_shelf_told_again_of_a_link_that_has_gone() -> None:
    """One batch of the watch may hold a link that an earlier callback took away."""
    with House() as house:
        idle_links = house.idle_links()
        taken: list[Link | None] = []

        def take_other(_link: Link) -> None:
            taken.append(idle_links.take())

        other = IdleLinks(house.watch, take_other)
        other.put(house.link("first"))
        idle_links.put(house.link("second"))
        house.far["first"].close()
        house.far["second"].shutdown(socket.SHUT_WR)
        await until(lambda: taken, 5, "the loss")
        await asyncio.sleep(0.02)
        assert taken == [None]
        assert house.lost == 1


async def test_shelf_survives_a_needless_wake_up() -> None:
    """A watch may call back although the link is alive (a number used again)."""

    class Nervous(Watch):
        def hangup(self, sock: socket.socket, on_ready: object) -> None:
            super().hangup(sock, on_ready)  # type: ignore[arg-type]
            callbacks.append(on_ready)

    callbacks: list[object] = []
    with House() as house:
        house.watch.close()
        house.watch = Nervous()
        idle_links = house.idle_links()
        link = house.link(1)
        idle_links.put(link)
        callbacks[0]()  # type: ignore[operator]
        assert len(idle_links) == 1
        assert idle_links.take() is link
        callbacks[0]()  # type: ignore[operator]
        assert house.lost == 0


# --- Demand ------------------------------------------------------------------------------------


def test_demand_starts_with_the_least() -> None:
    assert Demand(16, 1024, 0.0).wanted == 16


def test_demand_follows_a_burst_up_to_the_most() -> None:
    demand = Demand(4, 20, 0.0)
    raises = [demand.wanted for _ in range(100) if demand.count_launch(0.0)]
    assert raises == sorted(raises)
    assert demand.wanted == 20
    assert not demand.count_launch(0.0)
    assert len(raises) < 10, "a steadily rising rate does not cost a signal per launch"


def test_demand_counts_a_window_at_a_time() -> None:
    demand = Demand(4, 1000, 0.0)
    for turn in range(100):
        demand.count_launch(turn * DEMAND_WINDOW)
    assert demand.wanted <= 4 + 2 * DEMAND_MARGIN


def test_demand_shrinks_in_quiet_and_not_below_the_least() -> None:
    demand = Demand(4, 1000, 0.0)
    for _ in range(200):
        demand.count_launch(0.0)
    demand.end_period()
    assert demand.wanted >= 4 + DEMAND_MARGIN * 200, "that period was no quiet one"
    before = demand.wanted
    surplus = demand.end_period()
    assert 0 < surplus == before - demand.wanted
    for _ in range(100):
        demand.end_period()
    assert demand.wanted == 4
    assert demand.end_period() == 0


def test_demand_counts_who_waits() -> None:
    demand = Demand(4, 100, 0.0)
    assert demand.count_waiting(50)
    assert demand.wanted >= 54
    assert not demand.count_waiting(10)
    assert demand.count_waiting(1000)
    assert demand.wanted == 100
    assert not demand.count_waiting(2000)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.floats(0, 10)),
        st.tuples(st.just("wait"), st.integers(0, 5000)),
        st.tuples(st.just("rest"), st.just(0)),
    ),
    max_size=200,
)


@given(st.integers(1, 100), st.integers(0, 1000), steps)
def test_demand_keeps_its_bounds_and_tells_the_truth(
    least: int, span: int, done: list[tuple[str, float]]
) -> None:
    most = least + span
    demand = Demand(least, most, 0.0)
    now = 0.0
    for what, value in done:
        before = demand.wanted
        if what == "take":
            now += value
            assert demand.count_launch(now) is (demand.wanted > before)
            assert demand.wanted >= before
        elif what == "wait":
            assert demand.count_waiting(int(value)) is (demand.wanted > before)
            assert demand.wanted >= min(most, least + int(value))
        else:
            assert demand.end_period() == before - demand.wanted
        assert least <= demand.wanted <= most


@given(st.integers(1, 200), st.integers(1, 400))
def test_demand_covers_the_busiest_window_of_the_period(least: int, launches: int) -> None:
    demand = Demand(least, 100_000, 0.0)
    for _ in range(launches):
        demand.count_launch(0.0)
    assert demand.wanted >= least + DEMAND_MARGIN * launches
    demand.count_launch(10.0)
    demand.end_period()
    assert demand.wanted >= least + DEMAND_MARGIN * launches, "a burst is remembered one period"


# --- Pool --------------------------------------------------------------------------------------


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
