"""idle links: kept, watched, taken, claimed; the dead are noticed."""

from __future__ import annotations

import asyncio
import select
import socket

import pytest
from tests.kit.engines import both
from tests.kit.pool_words import House
from tests.kit.timing import until

from nodepass.net import tcp
from nodepass.net.readiness import Watch
from nodepass.tunnel.idle_links import IdleLinks, Link


@both
async def test_idle_links_hands_over_the_newest() -> None:
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
async def test_idle_links_claims_by_name_once() -> None:
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
async def test_idle_links_notices_a_dead_link_at_once(how: str) -> None:
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
async def test_idle_links_takes_no_link_that_died_in_this_very_turn(how: str) -> None:
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
async def test_idle_links_keeps_a_link_with_early_bytes() -> None:
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
async def test_idle_links_keeps_an_ended_link_for_its_launch() -> None:
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
async def test_idle_links_grace_has_an_end() -> None:
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
async def test_idle_links_has_no_grace_for_a_reset_link() -> None:
    with House() as house:
        idle_links = house.idle_links(grace=5.0)
        idle_links.put(house.link(1))
        tcp.reset(house.far[1])
        await until(lambda: house.lost, 5, "the reset")
        assert 1 not in idle_links
        assert idle_links.lost == 1


async def test_idle_links_retires_the_oldest() -> None:
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


async def test_idle_links_retires_a_link_that_dies_meanwhile() -> None:
    with House() as house:
        idle_links = house.idle_links()
        idle_links.put(house.link(1))
        tcp.reset(house.far[1])
        idle_links.retire(1)
        await asyncio.sleep(0.02)
        assert (len(idle_links), house.lost) == (0, 0)


@both
async def test_idle_links_clear_resets_all_and_forgets_the_graced() -> None:
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
async def test_idle_links_told_again_of_a_link_that_has_gone() -> None:
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


async def test_idle_links_survives_a_needless_wake_up() -> None:
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
