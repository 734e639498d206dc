"""Pool and idle links against a model: no link is lost or given twice, nobody waits in vain."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections import deque

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from tests.kit.engine_rig import tcp_pair

from nodepass.errors import PoolClosed
from nodepass.net.readiness import Watch
from nodepass.protocol.messages import Dialect
from nodepass.protocol.session import Role, Session
from nodepass.tunnel.demand import Demand
from nodepass.tunnel.idle_links import IdleLinks, Link
from nodepass.tunnel.pool import Member, Pool

MOST_MEMBERS = 4
Found = tuple[Member, Link]


class PoolMachine(RuleBasedStateMachine):
    """A server's sessions, their links, and visitors that come, wait and leave."""

    @initialize()
    def begin(self) -> None:
        self.runner = asyncio.Runner()
        self.loop = self.runner.get_loop()
        self.runner.run(self._open())
        self.members: list[Member] = []
        self.idle: dict[int, dict[int, Link]] = {}
        """The model: idle links by member and name."""
        self.far: dict[Link, socket.socket] = {}
        self.served: list[Found] = []
        self.waiting: deque[asyncio.Task[Found]] = deque()
        self.names = itertools.count(1)
        self.lost = 0

    async def _open(self) -> None:
        self.watch, self.pool = Watch(), Pool()

    def teardown(self) -> None:
        if not hasattr(self, "runner"):
            return
        self.pool.close()
        self._turn()
        for task in self.waiting:
            assert isinstance(task.exception(), PoolClosed), "who waits is told of the end"
        taken = {id(link) for _, link in self.served}
        for link, far in self.far.items():
            assert (link.sock.fileno() < 0) is (id(link) not in taken), (
                "closed exactly if not given"
            )
            link.sock.close()
            far.close()
        self.watch.close()
        self.runner.close()

    # ----------------------------------------------------------------------- helpers

    def _turn(self) -> None:
        """Let the loop hear of everything that has happened."""
        for _ in range(6):
            self.loop.run_until_complete(asyncio.sleep(0))

    def _in_loop(self, call: object, *arguments: object) -> object:
        async def run() -> object:
            return call(*arguments)  # type: ignore[operator]

        return self.loop.run_until_complete(run())

    def _make_member(self) -> Member:
        session = Session(Role.SERVER, Dialect.NATIVE, now=0.0, interval=5.0)
        return Member(session, IdleLinks(self.watch, self._on_lost), Demand(1, 100, 0.0))

    def _on_lost(self, _link: Link) -> None:
        self.lost += 1

    def _able(self) -> list[Member]:
        return [m for m in self.members if m.can_launch and self.idle[id(m)]]

    def _expect(self, found: Found) -> None:
        """Take note of what a visitor has got, which has to be the pool's best."""
        member, link = found
        able = self._able()
        assert member in able
        assert member.relays == min(m.relays for m in able), "the least loaded session"
        assert isinstance(link.name, int)
        assert self.idle[id(member)].pop(link.name) is link, "it was idle, and is given once"
        self._serve(member, link)

    def _serve(self, member: Member, link: Link) -> None:
        assert all(link is not other for _, other in self.served)
        assert link.sock.fileno() >= 0
        member.handed.discard(link.name)
        member.relays += 1
        self.served.append((member, link))

    # ------------------------------------------------------------------------- rules

    @precondition(lambda self: len(self.members) < MOST_MEMBERS)
    @rule()
    def client_comes(self) -> None:
        member = self._in_loop(self._make_member)
        assert isinstance(member, Member)
        self.members.append(member)
        self.idle[id(member)] = {}
        self.pool.add(member)

    @precondition(lambda self: self.members)
    @rule(data=st.data(), count=st.integers(1, 5))
    def links_come(self, data: st.DataObject, count: int) -> None:
        member = data.draw(st.sampled_from(self.members))
        for _ in range(count):
            near, far = tcp_pair()
            near.setblocking(False)
            link = Link(near, next(self.names))
            self.far[link] = far
            self._in_loop(self.pool.give, member, link)
            self._turn()
            if not member.can_launch:
                assert near.fileno() < 0
            elif self.waiting:
                task = self.waiting.popleft()
                assert task.done(), "who waits longest gets it"
                assert task.result() == (member, link)
                self._serve(member, link)
            else:
                assert isinstance(link.name, int)
                self.idle[id(member)][link.name] = link

    @rule()
    def visitor_comes(self) -> None:
        able = self._able()
        found = self._in_loop(self.pool.take_nowait)
        if self.waiting or not able:
            assert found is None, "those who wait came first"
        else:
            assert isinstance(found, tuple)
            self._expect(found)

    @rule(count=st.integers(1, 3))
    def visitors_wait(self, count: int) -> None:
        for _ in range(count):
            task = self.loop.create_task(self.pool.take(60.0))
            self._turn()
            if self._able() and not self.waiting:
                assert task.done()
                self._expect(task.result())
            else:
                assert not task.done()
                self.waiting.append(task)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), comes=st.booleans())
    def visitor_gives_up(self, data: st.DataObject, comes: bool) -> None:
        """Maybe in the very turn in which a link comes for it: then the next one gets that."""
        place = data.draw(st.integers(0, len(self.waiting) - 1))
        task = self.waiting[place]
        able = [member for member in self.members if member.can_launch]
        link = None
        if comes and able and place == 0:
            near, far = tcp_pair()
            near.setblocking(False)
            link = Link(near, next(self.names))
            self.far[link] = far
            self._in_loop_and_cancel(able[0], link, task)
        else:
            task.cancel()
        del self.waiting[place]
        self._turn()
        assert task.cancelled()
        if link is None:
            return
        if self.waiting:
            following = self.waiting.popleft()
            assert following.done(), "it is not lost with who gave up"
            assert following.result() == (able[0], link)
            self._serve(able[0], link)
        else:
            assert isinstance(link.name, int)
            self.idle[id(able[0])][link.name] = link

    def _in_loop_and_cancel(self, member: Member, link: Link, task: asyncio.Task[Found]) -> None:
        async def run() -> None:
            self.pool.give(member, link)
            task.cancel()

        self.loop.run_until_complete(run())

    @precondition(lambda self: any(self.idle.values()))
    @rule(data=st.data())
    def link_dies(self, data: st.DataObject) -> None:
        links = [link for idle in self.idle.values() for link in idle.values()]
        link = data.draw(st.sampled_from(links))
        before = self.lost
        self.far[link].close()
        self._turn()
        assert self.lost == before + 1, "the dead are noticed at once"
        assert link.sock.fileno() < 0
        for idle in self.idle.values():
            idle.pop(int(link.name), None)

    @precondition(lambda self: self.served)
    @rule(data=st.data())
    def visitor_leaves(self, data: st.DataObject) -> None:
        member, _ = data.draw(st.sampled_from(self.served))
        if member.relays:
            member.relays -= 1

    @precondition(lambda self: self.members)
    @rule(data=st.data(), is_drained=st.booleans())
    def client_goes(self, data: st.DataObject, is_drained: bool) -> None:
        member = data.draw(st.sampled_from(self.members))
        if is_drained:
            member.session.drain()
            return  # it keeps its links until its session ends
        self.members.remove(member)
        self.pool.remove(member)
        self.pool.remove(member)
        gone = self.idle.pop(id(member))
        assert all(link.sock.fileno() < 0 for link in gone.values()), "its links are reset"

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "pool"):
            return
        assert self.pool.waiting == len(self.waiting)
        assert not (self.waiting and self._able()), "nobody waits beside an idle link"
        assert not any(task.done() for task in self.waiting)
        for member in self.members:
            assert len(member.idle_links) == len(self.idle[id(member)])
            assert not member.handed


TestPool = PoolMachine.TestCase
