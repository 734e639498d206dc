"""A pool with sessions that a test makes."""

from __future__ import annotations

import select
import socket

from tests.kit.engine_rig import tcp_pair

from nodepass.net import tcp
from nodepass.net.readiness import Watch
from nodepass.protocol.messages import Dialect
from nodepass.protocol.session import Role, Session
from nodepass.tunnel.demand import Demand
from nodepass.tunnel.idle_links import IdleLinks, Link
from nodepass.tunnel.pool import Member


class House:
    """A watch, links with their far ends, and everything closed at the end."""

    def __init__(self) -> None:
        self.watch = Watch()
        self.far: dict[int | str, socket.socket] = {}
        self.lost = 0
        self._socks: list[socket.socket] = []
        self._made: list[IdleLinks] = []

    def link(self, name: int | str) -> Link:
        near, far = tcp_pair()
        self._socks += [near, far]
        self.far[name] = far
        return Link(near, name)

    def idle_links(self, grace: float = 0.0) -> IdleLinks:
        idle_links = IdleLinks(self.watch, self._count, grace)
        self._made.append(idle_links)
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
        for idle_links in self._made:
            idle_links.clear()
        self.watch.close()
        for sock in self._socks:
            sock.close()
