"""The UDP target of a client: which sessions have lost it, and where it is now.

A UDP socket keeps the address that it was connected to and the one of ours that it left from, and
says nothing when either has moved. So all sessions are looked at about once a second:

    asked, and it used to answer, for SILENCE     -> look
    the kernel will not send                      -> look
    asked, and it has never answered              -> look, at a slow pace: one-way streams are such

A look resolves the target and asks the kernel for the way there. The session goes on with another
socket, under its link and with what waits in it, only if there is a reason: its address is none
of the target's any more, another address of ours leads there, nothing can be sent, or others are
to be had where this one has long been silent. A target that merely says nothing keeps its
session, and sees the same source address.

Owns: what is known of each session's target; sockets only until the engine has them. Called by
`session`.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import socket
from collections import deque
from collections.abc import Callable, Collection, Coroutine
from typing import Final

from nodepass.engine.relays import UdpRelay, UdpResult
from nodepass.errors import DialError, EngineError
from nodepass.net import udp
from nodepass.net.resolver import Candidate, SocketAddress
from nodepass.observe.log import Log

PERIOD: Final = 1.0
"""Seconds between two looks at one session."""
SLICE: Final = 128
"""Sessions looked at in one turn of the loop: half a millisecond."""
SILENCE: Final = 3.0
"""Seconds for which a target that used to answer may say nothing though it is asked: resolvers
and games ask again after one or two."""
DESERTION: Final = 15.0
"""Seconds after which another address of the target is tried, if it has several."""
LONGEST_PAUSE: Final = 8.0
"""Seconds between two looks for one session, at most; the pause begins at PERIOD and doubles."""
ONE_WAY_PAUSE: Final = 10.0
"""Seconds between two looks for a session that was never answered."""
MISSES: Final = 2
"""So many looks in a row must have missed its address: names may stand for changing parts of a
pool."""

Spawn = Callable[[Coroutine[object, object, None], str], None]


class _Session:
    """One relay and what it has been told by its target."""

    __slots__ = (
        "address", "asked_at", "down", "is_lost", "misses", "pause", "relay", "source", "unsent",
        "up", "waits_until",
    )  # fmt: skip

    def __init__(self, relay: UdpRelay, address: SocketAddress, source: str) -> None:
        self.relay = relay
        self.address = address
        self.source = source
        self.up = self.down = self.unsent = 0
        """Its counts as they were last seen."""
        self.asked_at: float | None = None
        """Since when it is asked without an answer, in seconds of the loop; None = it is not."""
        self.is_lost = False
        """Whether the kernel would not send its last datagrams."""
        self.misses = 0
        """Looks in a row that did not find its address."""
        self.pause = PERIOD
        self.waits_until = 0.0

    @property
    def pace(self) -> float:
        """Seconds until the next look."""
        return self.pause if self.down or self.is_lost else ONE_WAY_PAUSE

    def look(self, now: float) -> bool:
        """Take note of its counts; return whether its target is to be looked for."""
        counts = self.relay.datagrams()
        if counts.down != self.down:
            self.asked_at, self.pause, self.misses = None, PERIOD, 0
        elif counts.up + counts.unsent != self.up + self.unsent and self.asked_at is None:
            self.asked_at = now
            self.waits_until = now + (SILENCE if self.down else ONE_WAY_PAUSE)
        if counts.up != self.up or counts.unsent != self.unsent:
            self.is_lost = counts.unsent != self.unsent and counts.up == self.up
        self.up, self.down, self.unsent = counts.up, counts.down, counts.unsent
        return now >= self.waits_until and (self.is_lost or self.asked_at is not None)

    def postpone(self, now: float) -> None:
        """Look again after the pause."""
        self.waits_until = now + self.pace
        self.pause = min(LONGEST_PAUSE, self.pause * 2)


class UdpTarget:
    """Where the UDP sessions of a client go.

    Args:
        host: address or name; empty = this machine.
        port: 1..65535.
        timeout: seconds for a lookup.
        log: where moves are told.
        spawn: runs a task.
    """

    def __init__(self, host: str, port: int, timeout: float, log: Log, spawn: Spawn) -> None:
        self._loop = asyncio.get_running_loop()
        self._host, self._port = host, port
        self._timeout = timeout
        self._log = log
        self._spawn = spawn
        self._avoided: set[SocketAddress] = set()
        self._sessions: dict[UdpRelay, _Session] = {}
        self._round: deque[_Session] = deque()
        """Those that are still to be looked at in this round."""
        self._timer: asyncio.TimerHandle | None = None
        self._is_looking = False

    @property
    def shown(self) -> str:
        """The target as errors and log lines name it."""
        return udp.shown_target(self._host, self._port)

    async def dial(self) -> tuple[socket.socket, SocketAddress]:
        """Connect a UDP socket; an address that has refused is tried last.

        Returns:
            The socket, the caller's own, and where it is connected to.

        Raises:
            DialError: see `udp.dial`.
        """
        return await udp.dial(self._host, self._port, self._timeout, self._avoided)

    def avoid(self, address: SocketAddress) -> None:
        """Take it that nobody is to be had at one of the target's addresses."""
        self._avoided = {address}

    def watch(self, relay: UdpRelay, address: SocketAddress, source: str) -> None:
        """Look at a session now and then, up to its end.

        Args:
            address: what its socket is connected to.
            source: host of ours that it leaves from.
        """
        session = self._sessions[relay] = _Session(relay, address, source)
        relay.result.add_done_callback(functools.partial(self._part, session))
        self._schedule(PERIOD)

    def close(self) -> None:
        """Look no more; idempotent."""
        self._sessions.clear()
        self._round.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _part(self, session: _Session, result: asyncio.Future[UdpResult]) -> None:
        self._sessions.pop(session.relay, None)
        if not result.cancelled() and result.result().code == errno.ECONNREFUSED:
            self.avoid(session.address)

    def _schedule(self, delay: float) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(delay, self._look_at_some)

    def _look_at_some(self) -> None:
        self._timer = None
        if not self._sessions:
            return
        if not self._round:
            self._round.extend(self._sessions.values())
        now = self._loop.time()
        due: list[_Session] = []
        count = min(SLICE, len(self._round))
        for _ in range(count):
            session = self._round.popleft()
            if not session.relay.result.done() and session.look(now):
                session.postpone(now)
                due.append(session)
        if due:
            self._spawn(self._find(due), "looking for a target")
        self._schedule(PERIOD * count / max(count, len(self._sessions)))

    async def _find(self, sessions: list[_Session]) -> None:
        """Resolve the target and move the sessions that have a reason to."""
        try:
            candidates = await udp.look_up(self._host, self._port, self._timeout)
        except DialError as exc:
            self._log.repeated("warn", "lost target", "the target cannot be found", why=str(exc))
            return
        for session in sessions:
            if session.relay.result.done():
                continue
            try:
                self._move(session, candidates)
            except DialError as exc:
                self._log.repeated(
                    "warn", "lost target", "the target cannot be found", why=str(exc)
                )
            except EngineError as exc:
                self._log.debug("a session could not be given another socket", why=str(exc))

    def _move(self, session: _Session, candidates: list[Candidate]) -> None:
        known = [c for c in candidates if c[1] == session.address]
        avoided: Collection[SocketAddress] = self._avoided
        why = ""
        if not known:
            session.misses += 1
            if session.is_lost or session.misses >= MISSES:
                why = "its name stands for another address now"
        elif session.is_lost:
            why = "the kernel would not send to it"
        elif len(candidates) > 1 and session.down and self._is_deserted(session):
            self.avoid(session.address)
            avoided = self._avoided
            why = "it has not answered for long, and its name has other addresses"
        elif self._source_of(known) != session.source:
            why = "another address of this machine leads there now"
        if known:
            session.misses = 0
        if not why:
            return
        sock, address = udp.connect(self.shown, candidates, avoided)
        source = sock.getsockname()[0]
        try:
            if not session.relay.retarget(sock):
                sock.close()
                return
        except BaseException:
            sock.close()
            raise
        was, session.address, session.source = session.address, address, source
        session.asked_at, session.is_lost, session.misses = None, False, 0
        self._log.repeated(
            "info",
            f"moved {why}",
            "UDP sessions go on with their target elsewhere",
            target=self.shown,
            was=was[0],
            now=address[0],
            why=why,
        )

    def _is_deserted(self, session: _Session) -> bool:
        asked = session.asked_at
        return asked is not None and self._loop.time() - asked >= DESERTION

    def _source_of(self, known: list[Candidate]) -> str:
        """Return the address of ours that a socket to there would have now."""
        sock, _ = udp.connect(self.shown, known)
        with sock:
            return str(sock.getsockname()[0])
