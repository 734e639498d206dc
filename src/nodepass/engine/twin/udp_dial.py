"""The slow twin's UDP relays on the side that dials: a link, and the target's socket.

Part of `engine`, which describes the whole; nobody else comes here. The target is read only while
the link takes what it says: what is too much waits in the kernel, or is dropped there.
"""

from __future__ import annotations

import errno
import socket
import time
from typing import Final

from nodepass.engine.types import FlowOptions

from .flow import REASON_FINISHED, REASON_RESET, Ending
from .legs import Leg
from .udp_flow import HEADER_BYTES, TURN_DATAGRAMS, UdpFlow, UdpHost
from .udp_port import MAX_PAYLOAD, UdpPort

ATTEMPTS: Final = 4  # to send one datagram whose socket reports errors of earlier ones
REFUSAL_SECONDS: Final = 2.0  # of refusals alone until a target is taken for dead
SMALL_BYTES: Final = 1000  # raw: no sane path cuts a segment below it
SETTLE_SECONDS: Final = 0.1  # raw: a longer datagram may come in pieces


class Dialled(UdpFlow):
    """A link that is carried to a target.

    Args:
        target: a connected UDP socket.
        options: `idle` and `datagram` count.
    """

    side = 1

    def __init__(
        self,
        host: UdpHost,
        token: int,
        leg: Leg,
        options: FlowOptions,
        head: bytes,
        *,
        target: socket.socket,
    ) -> None:
        super().__init__(host, token, leg, options.idle, head)
        self.target = target
        self._datagram = options.datagram
        self.port = UdpPort(target, options.datagram, self.tally)
        self._refused = 0.0
        """When the target began to refuse, on the monotonic clock; 0 = it does not."""

    def retarget(self, target: socket.socket) -> None:
        """Go on with another socket; what waits leaves by that."""
        old = self.target
        self.target, self.port = target, UdpPort(target, self._datagram, self.tally)
        self._refused = 0.0
        self.host.loop.remove_reader(old)
        self.host.loop.remove_writer(old)
        old.close()
        if self.is_blocked:
            self.call_step()
        self.watch_target()

    def emit(self, data: bytes) -> bool:
        is_retried = False
        for _ in range(ATTEMPTS):
            try:
                self.port.send(data)
            except (BlockingIOError, InterruptedError):
                self.host.loop.add_writer(self.target, self._have_room)
                return False
            except ConnectionRefusedError as exc:
                if self._refuse(exc):
                    return False
            except OSError:
                if not is_retried:
                    is_retried = True  # it may have been an earlier datagram's
                    continue
                self.tally.lose()
                return True
            else:
                self.tally.go_up(data)
                self.active = time.monotonic()
                return True
        self.tally.unsent += 1
        return True

    def _have_room(self) -> None:
        self.host.loop.remove_writer(self.target)
        self.step()

    def _refuse(self, exc: OSError) -> bool:
        """Count a refusal; end, and tell so, if there have been nothing else for long."""
        now = time.monotonic()
        self.tally.refused += 1
        self._refused = self._refused or now
        if now - self._refused >= REFUSAL_SECONDS:
            self.bury(REASON_RESET, 3 - self.side, exc.errno or errno.ECONNREFUSED)
        return self.is_over

    def pass_on(self) -> None:
        self.watch_target()

    def watch_target(self) -> None:
        """Read the target while the link takes what it says."""
        if self.is_over:
            return
        # Always anew: libuv stops watching a socket on which it sees an error.
        self.host.loop.remove_reader(self.target)
        if not self.leg.backlog and not self.ending:
            self.host.loop.add_reader(self.target, self.hear)

    def hear(self) -> None:
        """Pass on what the target says, a turn's worth."""
        self.host.turns += 1
        for _ in range(TURN_DATAGRAMS):
            if self.is_over or self.ending or self.leg.backlog:
                break
            try:
                parcel = self.port.receive()
            except (BlockingIOError, InterruptedError):
                break
            except ConnectionRefusedError as exc:
                self._refuse(exc)
                continue
            except OSError:
                continue  # of a datagram that was counted when it left
            self._refused = 0.0
            if not parcel.is_whole:
                self.tally.too_large += 1
            else:
                self.answer(parcel.data)
        self.watch_link()
        self.watch_target()

    def answer(self, data: bytes) -> None:
        """Give a datagram of the target's to the link."""
        if self.give(len(data).to_bytes(HEADER_BYTES, "big") + data):
            self.tally.go_down(data)

    def close(self, ending: Ending) -> None:
        del ending
        if not self.host.loop.is_closed():
            self.host.loop.remove_reader(self.target)
            self.host.loop.remove_writer(self.target)
        self.target.close()


class RawDialled(Dialled):
    """The seed dialect: one datagram, one answer, no frames."""

    _is_asked = False
    _grown = 0.0
    """When the datagram last grew, on the monotonic clock."""
    _size = 0

    def begin(self) -> None:
        if not self.is_over:
            self.read_on(True)
            self.read()  # what is here already belongs to the head
        super().begin()

    def step(self) -> None:
        """Send the datagram as soon as it looks whole."""
        self._is_due = self.is_blocked = False
        if self.is_over:
            return
        if self._is_asked:
            self.inbox.clear()
        elif len(self.inbox) > MAX_PAYLOAD:
            self.tally.too_large += 1
            self._is_asked = True
            self.inbox.clear()
        elif self.inbox and self._looks_whole():
            if self.emit(bytes(self.inbox)):
                self._is_asked = True
                self.inbox.clear()
            else:
                self.is_blocked = not self.is_over
        if self.is_drained and self._is_asked and not self.tally.datagrams_up:
            super().hear_end()  # nothing went out, so no answer will come
        self.settle(False)

    def _looks_whole(self) -> bool:
        if len(self.inbox) != self._size:
            self._size, self._grown = len(self.inbox), time.monotonic()
        is_settled = time.monotonic() - self._grown >= SETTLE_SECONDS
        # A question that was cut by a reset is none.
        is_at_end = self.is_drained and (not self.ending or self.ending.reason == REASON_FINISHED)
        return self._size < SMALL_BYTES or is_at_end or is_settled

    def hear_end(self) -> None:
        if not self._size and not self.inbox:
            super().hear_end()
        # Otherwise there is a question; whoever has said all may still listen to the answer.

    def watch_step(self) -> None:
        if self._size and not self._is_asked:
            self.step()
        if not self.is_over:
            super().watch_step()

    def answer(self, data: bytes) -> None:
        if self.tally.datagrams_down:
            return
        if not data or self.give(data):
            self.tally.go_down(data)
            self.pass_on()

    def pass_on(self) -> None:
        if self.tally.datagrams_down and not self.leg.backlog:
            self.bury(REASON_FINISHED)
        else:
            super().pass_on()
