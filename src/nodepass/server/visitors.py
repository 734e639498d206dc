"""The server's TCP visitors, until each has a link.

Owns: the port where they arrive, and those that wait for a link. Made by `server`.

    accepted ──slot──> link? ──joined──> `launches`
                         └── none within DIAL_TIMEOUT ──> reset, counted, told
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from nodepass.config.address import join_address
from nodepass.errors import EngineError, PoolClosed, PoolTimeout
from nodepass.net import tcp
from nodepass.net.listener import Listener
from nodepass.net.readiness import Watch
from nodepass.tunnel.context import Context
from nodepass.tunnel.idle_links import Link
from nodepass.tunnel.pool import Member, Pool
from nodepass.tunnel.slots import Slot, Slots

from .connected_client import ConnectedClient
from .launches import Launches
from .sessions import Sessions


class Visitor:
    """A TCP visitor that has a slot, and no link yet."""

    __slots__ = ("host", "port", "slot", "sock")

    def __init__(self, sock: socket.socket, host: str, port: int, slot: Slot) -> None:
        self.sock = sock
        self.host = host
        self.port = port
        self.slot = slot

    @property
    def address(self) -> str:
        """As "host:port"."""
        return join_address(self.host, self.port)

    def reset(self) -> None:
        """Have no more to do with it."""
        tcp.reset(self.sock)
        self.slot.release()


class Visitors:
    """Every TCP visitor of one server.

    Args:
        sessions: know whether there is a client at all.
        launches: take over who has got a link.
    """

    def __init__(
        self, context: Context, pool: Pool, slots: Slots, sessions: Sessions, launches: Launches
    ) -> None:
        self._log = context.log
        self._counters = context.counters
        self._relays = context.relays
        self._spawn = context.spawn
        self._timeout = context.settings.dial_timeout
        self._pool = pool
        self._slots = slots
        self._sessions = sessions
        self._launches = launches
        self._waiting = Watch()
        """Tells which of those that wait for a link have left."""
        self.listener: Listener | None = None
        """Where they arrive; None = TCP is not carried."""

    def pause(self) -> None:
        """Accept nobody for now; the kernel's queue holds who comes."""
        if self.listener is not None:
            self.listener.pause()

    def resume(self) -> bool:
        """Accept again; return whether it had been paused."""
        if self.listener is None or not self.listener.is_paused:
            return False
        self.listener.resume()
        return True

    def admit(self, sock: socket.socket, host: str, port: int) -> None:
        """Take in who has been accepted, there being a slot for it."""
        self._counters.visitors += 1
        visitor = Visitor(sock, host, port, Slot(self._slots))
        found = self._pool.take_nowait()
        if found is not None:
            self._join(visitor, *found)
        else:
            self._spawn(self._wait_for_link(visitor), "waiting for a link")

    def close(self) -> None:
        """Stop looking after those that wait; idempotent."""
        self._waiting.close()

    async def _wait_for_link(self, visitor: Visitor) -> None:
        waiting = asyncio.current_task()
        is_gone = False

        def leave() -> None:
            nonlocal is_gone
            if not tcp.is_alive(visitor.sock):  # a clean end is no reason: an answer may be wanted
                is_gone = True
                assert waiting is not None
                waiting.cancel()

        with contextlib.suppress(OSError):  # no room in the kernel: then it waits unwatched
            self._waiting.hangup(visitor.sock, leave)
        try:
            member, link = await self._pool.take(self._timeout)
        except (PoolTimeout, PoolClosed) as exc:
            self._waiting.remove(visitor.sock)
            self._turn_away(visitor, "warn", "no link", self._sessions.why_no_link(exc))
            return
        except BaseException:
            self._waiting.remove(visitor.sock)
            visitor.reset()
            if is_gone and waiting is not None and not waiting.uncancel():
                return  # the visitor has gone; that is all
            raise
        self._waiting.remove(visitor.sock)
        self._join(visitor, member, link)

    def _turn_away(self, visitor: Visitor, level: str, key: str, why: object) -> None:
        tcp.reset(visitor.sock)
        self._counters.visitors_refused += 1
        visitor.slot.release()
        self._log.repeated(level, key, "a visitor was turned away", why=why)

    def _join(self, visitor: Visitor, member: Member, link: Link) -> None:
        assert isinstance(member, ConnectedClient)
        try:
            relay = self._relays.join(visitor.sock, link.sock, tls_b=link.tls, head_b=link.head)
        except EngineError as exc:
            tcp.reset(link.sock)
            self._turn_away(visitor, "error", "engine", exc)
            return
        except BaseException:
            tcp.reset(link.sock)
            visitor.reset()
            raise
        self._launches.begin(relay, member, link.name, visitor.address, visitor.slot)
