"""The server's UDP visitors: each gets a slot and a link, as TCP visitors do.

Owns: the gates of one server, and the sources that wait for a slot or a link. Datagrams never
come up here: the engine has the sockets and parks what arrives meanwhile. Made by `server`.

    source unknown ──newcomer──> slot? ──> link? ──bind──> relay ──idle, link lost──> unknown again
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from nodepass.config.address import join_address
from nodepass.engine.relays import Gate
from nodepass.engine.types import Newcomer
from nodepass.errors import EngineError, PoolClosed, PoolTimeout
from nodepass.net import tcp, udp
from nodepass.observe.stats import Datagrams
from nodepass.protocol.messages import Dialect
from nodepass.protocol.session import SILENT_PERIODS
from nodepass.tunnel.context import Context
from nodepass.tunnel.idle_links import Link
from nodepass.tunnel.pool import Member, Pool
from nodepass.tunnel.slots import Slot, Slots

from .connected_client import ConnectedClient
from .launches import Launches
from .sessions import Sessions

RELIEF_PAUSE: Final = 0.1
"""Seconds between two tries to make room while sources wait for a slot."""


class _Waiting(NamedTuple):
    """A source that waits for a slot."""

    gate: Gate
    newcomer: Newcomer
    until: float
    """Seconds of the loop at which it is turned away."""


class UdpVisitors:
    """Every UDP visitor of one server.

    Args:
        sessions: know whether there is a client at all.
        launches: take over who has got a link.
    """

    def __init__(
        self, context: Context, pool: Pool, slots: Slots, sessions: Sessions, launches: Launches
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._settings = context.settings
        self._log = context.log
        self._counters = context.counters
        self._relays = context.relays
        self._spawn = context.spawn
        self._pool = pool
        self._slots = slots
        self._sessions = sessions
        self._launches = launches
        self._socks: list[socket.socket] = []
        """Bound, and not yet the engine's."""
        self._gates: list[Gate] = []
        self.address: tuple[str, int] | None = None
        """Host and port of the first socket; None = UDP is off."""
        self._waiting: deque[_Waiting] = deque()
        self._room_timer: asyncio.TimerHandle | None = None
        self._is_shut = False

    @property
    def waiting(self) -> int:
        """Sources without a slot."""
        return len(self._waiting)

    def datagrams(self) -> Datagrams:
        """Return what was dropped before it reached a relay."""
        return Datagrams.total(gate.datagrams() for gate in self._gates)

    async def open(self, host: str, port: int, on_absent: Callable[[str], None]) -> None:
        """Bind the sockets; what arrives waits in the kernel.

        Args:
            on_absent: called with each address that this machine has not got.

        Raises:
            ListenError: an address cannot be bound.
        """
        self._socks = await udp.listen(host, port, on_absent)
        name = self._socks[0].getsockname()
        self.address = (str(name[0]), int(name[1]))

    def begin(self, *, has_tls: bool) -> None:
        """Let the engine receive.

        Raises:
            EngineError: it has no room.
        """
        while self._socks:
            gate = self._relays.serve(self._socks[0], self._meet, has_tls=has_tls)
            self._gates.append(gate)
            del self._socks[0]

    def shut(self) -> None:
        """Let nobody in any more; idempotent."""
        self._is_shut = True
        for gate in self._gates:
            gate.shut()
        while self._waiting:
            self._turn_away(self._waiting.popleft())
        if self._room_timer is not None:
            self._room_timer.cancel()
            self._room_timer = None

    def close(self) -> None:
        """Close the sockets and end what is open; idempotent."""
        self.shut()
        for sock in self._socks:
            sock.close()
        self._socks = []
        for gate in self._gates:
            gate.abort()

    async def wait_closed(self, timeout: float) -> None:  # noqa: ASYNC109
        """Wait until the engine has let go of the sockets."""
        if results := [gate.result for gate in self._gates]:
            await asyncio.wait(results, timeout=timeout)

    def admit_one(self) -> bool:
        """Give a free slot to who waits longest; return whether anybody did."""
        if not self._waiting:
            return False
        waiting = self._waiting.popleft()
        self._admit(waiting.gate, waiting.newcomer)
        return True

    # ----------------------------------------------------------------------- newcomers

    def _meet(self, gate: Gate, newcomer: Newcomer) -> None:
        self._counters.visitors += 1
        if self._is_shut:
            self._turn_away(_Waiting(gate, newcomer, 0.0))
        elif self._slots.has_udp_room and not self._waiting:
            self._admit(gate, newcomer)
        else:
            until = self._loop.time() + self._settings.dial_timeout
            self._waiting.append(_Waiting(gate, newcomer, until))
            self.make_room()

    def make_room(self) -> None:
        """End sessions that look finished, for as long as all slots are taken.

        Whether TCP visitors wait cannot be seen: they are in the kernel's queue.
        """
        if self._room_timer is None and self._gates and not self._is_shut:
            for gate in self._gates if self._slots.udp else ():
                gate.relieve()
            self._room_timer = self._loop.call_later(RELIEF_PAUSE, self._relieve_again)

    def _relieve_again(self) -> None:
        self._room_timer = None
        now = self._loop.time()
        while self._waiting and self._waiting[0].until <= now:
            self._turn_away(
                self._waiting.popleft(), "no slot of SEMAPHORE_LIMIT came free in time"
            )
        slots = self._slots
        while slots.has_udp_room and self.admit_one():
            pass  # a slot that was a TCP visitor's turn, and none came
        if self._waiting or (slots.udp and not slots.has_udp_room):
            self.make_room()

    def _admit(self, gate: Gate, newcomer: Newcomer) -> None:
        slot = Slot(self._slots, is_udp=True)
        found = self._pool.take_nowait()
        if found is not None:
            self._bind(gate, newcomer, slot, *found)
        else:
            self._spawn(self._wait_for_link(gate, newcomer, slot), "waiting for a link")

    async def _wait_for_link(self, gate: Gate, newcomer: Newcomer, slot: Slot) -> None:
        try:
            member, link = await self._pool.take(self._settings.dial_timeout)
        except (PoolTimeout, PoolClosed) as exc:
            slot.release()
            self._turn_away(_Waiting(gate, newcomer, 0.0), self._sessions.why_no_link(exc))
            return
        except BaseException:
            slot.release()
            raise
        self._bind(gate, newcomer, slot, member, link)

    def _turn_away(self, waiting: _Waiting, why: str = "") -> None:
        waiting.gate.turn_away(waiting.newcomer)
        self._counters.visitors_refused += 1
        if why:
            self._log.repeated("warn", "no link", "a visitor was turned away", why=why)

    # -------------------------------------------------------------------------- relays

    def _bind(
        self, gate: Gate, newcomer: Newcomer, slot: Slot, member: Member, link: Link
    ) -> None:
        assert isinstance(member, ConnectedClient)
        settings = self._settings
        is_raw = member.session.dialect is Dialect.SEED
        try:
            udp.tune_link(link.sock, SILENT_PERIODS * settings.report_interval)
            relay = self._relays.bind(
                gate,
                newcomer,
                link.sock,
                tls=link.tls,
                head=link.head,
                idle=settings.udp_read_timeout if is_raw else settings.udp_idle_timeout,
                is_raw=is_raw,
            )
        except (EngineError, OSError) as exc:
            tcp.reset(link.sock)
            # Not at once: the next in the queue would fail within this very call, and so on.
            self._loop.call_soon(slot.release)
            self._turn_away(_Waiting(gate, newcomer, 0.0), str(exc))
            return
        except BaseException:
            tcp.reset(link.sock)
            slot.release()
            raise
        visitor = join_address(newcomer.host, newcomer.port)
        self._launches.begin(relay, member, link.name, visitor, slot)
