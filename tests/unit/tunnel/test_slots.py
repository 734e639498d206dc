"""Slots: who gets the next place, and what UDP may not take."""

from __future__ import annotations

import asyncio

import pytest

from nodepass.tunnel.slots import TCP_SHARE, SlotQueue, Slots


class Queues:
    """Who waits for a slot, and what the slots have asked for."""

    def __init__(self, limit: int, *, keeps_for_tcp: bool = True) -> None:
        self.tcp = self.udp = self.full = 0
        self.order: list[str] = []
        self.slots = Slots(
            limit,
            keeps_for_tcp=keeps_for_tcp,
            on_full=self._on_full,
            resume_tcp=self._resume_tcp,
            admit_udp=self._admit_udp,
        )

    def _on_full(self) -> None:
        self.full += 1

    def _resume_tcp(self) -> bool:
        if not self.tcp:
            return False
        self.tcp -= 1
        self.order.append("tcp")
        self.slots.take()
        return True

    def _admit_udp(self) -> bool:
        if not self.udp:
            return False
        self.udp -= 1
        self.order.append("udp")
        self.slots.take(is_udp=True)
        return True


def test_slots_are_counted() -> None:
    queues = Queues(2)
    assert queues.slots.has_room
    queues.slots.take()
    queues.slots.take(is_udp=True)
    assert (queues.slots.taken, queues.slots.udp, queues.full) == (2, 1, 1)
    assert not queues.slots.has_room
    assert repr(queues.slots) == "<Slots 2 of 2, udp=1>"
    queues.slots.give(is_udp=True)
    queues.slots.give()
    assert (queues.slots.taken, queues.slots.udp) == (0, 0)


def test_who_waits_gets_the_next_place_by_turns() -> None:
    queues = Queues(1)
    queues.slots.take()
    queues.tcp, queues.udp = 2, 3
    for _ in range(5):
        queues.slots.give(is_udp=queues.order[-1:] == ["udp"])
    assert queues.order == ["udp", "tcp", "udp", "tcp", "udp"]


@pytest.mark.parametrize(("tcp", "udp"), [(3, 0), (0, 3)])
def test_one_kind_alone_does_not_wait_for_the_other(tcp: int, udp: int) -> None:
    queues = Queues(1)
    queues.slots.take(is_udp=bool(udp))
    queues.tcp, queues.udp = tcp, udp
    for _ in range(3):
        queues.slots.give(is_udp=bool(udp))
    assert (queues.tcp, queues.udp, len(queues.order)) == (0, 0, 3)


def test_udp_leaves_a_share_to_tcp() -> None:
    queues = Queues(2 * TCP_SHARE)
    taken = 0
    while queues.slots.has_udp_room:
        queues.slots.take(is_udp=True)
        taken += 1
    assert taken == 2 * TCP_SHARE - 2
    assert queues.full == 1, "UDP is full, and somebody hears of it"
    assert queues.slots.has_room
    queues.udp = 1
    queues.slots.take()
    queues.slots.give()
    assert queues.order == [], "a TCP visitor's place is not for UDP"
    queues.slots.give(is_udp=True)
    assert queues.order == ["udp"]


@pytest.mark.parametrize("limit", [1, TCP_SHARE - 1, 100])
def test_udp_may_have_all_where_there_is_no_tcp_or_hardly_a_slot(limit: int) -> None:
    queues = Queues(limit, keeps_for_tcp=limit < TCP_SHARE)
    for _ in range(limit):
        assert queues.slots.has_udp_room
        queues.slots.take(is_udp=True)
    assert not queues.slots.has_udp_room


def test_nobody_gets_in_while_more_are_served_than_may_be() -> None:
    queues = Queues(1)
    queues.slots.take()
    queues.slots.take()
    queues.tcp = 1
    queues.slots.give()
    assert queues.order == []


# --- Queue -------------------------------------------------------------------------------------


async def test_queue_is_first_come_first_served() -> None:
    queue = SlotQueue(1)
    served: list[str] = []

    async def take(name: str) -> None:
        await queue.take()
        served.append(name)

    assert queue.take_nowait()
    assert queue.is_full
    assert not queue.take_nowait()
    waiting = [asyncio.ensure_future(take(name)) for name in "abc"]
    await asyncio.sleep(0)
    for count in range(1, 4):
        queue.give()
        assert not queue.take_nowait(), "it is given to who waits"
        await asyncio.sleep(0)
        assert served == list("abc")[:count]
    await asyncio.gather(*waiting)
    queue.give()
    assert queue.take_nowait()


async def test_queue_forgets_who_gives_up() -> None:
    queue = SlotQueue(1)
    assert queue.take_nowait()
    waiting = [asyncio.ensure_future(queue.take()) for _ in range(100)]
    await asyncio.sleep(0)
    for one in waiting[:-1]:
        one.cancel()
    await asyncio.wait(waiting[:-1])
    assert len(queue._waiting) == 1
    queue.give()
    await waiting[-1]
    assert queue.is_full


async def test_queue_passes_on_a_place_that_came_too_late() -> None:
    queue = SlotQueue(1)
    assert queue.take_nowait()
    one, other = (asyncio.ensure_future(queue.take()) for _ in range(2))
    await asyncio.sleep(0)
    queue.give()
    one.cancel()  # in the very turn
    await other
    assert one.cancelled()
    assert queue.is_full
    queue.give()
    assert not queue.is_full
